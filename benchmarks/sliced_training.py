"""How much faster training steps of channel sub-nets are with physically smaller weights.

Each contender trains three sub-nets that keep .5, .25 and .1 of the channels through `ast_plugin.wrap`, forward,
backward and SGD with momentum, on one thread: with sliced leaf parameters and with a differentiable gather, with and
without the correction, in the other memory format, and masked. All of them and the plain dense network step in turn in
one process; the figures are medians of the ratios of CPU time in each round. The whole run's ratio is that of the three
sub-nets' steps together to three dense ones. Prints a table and writes the figures into a JSON file.

    python benchmarks/sliced_training.py                               # all of it, about 20 minutes
    python benchmarks/sliced_training.py --networks ResNet-32 --rounds 5
    python benchmarks/sliced_training.py --resample                    # other channels at every step
    python benchmarks/sliced_training.py --picture                     # the picture from the JSON file (extra report)
    python benchmarks/sliced_training.py --quick --output quick.json   # tiny shapes: does it run?
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ast_plugin
from ast_plugin.files import atomic_write_text
from inference_picture import picture
from sliced_tasks import NETWORKS, Task, make_task

RESULTS = Path(__file__).parent / "results" / "sliced_training.json"
KEPT = (0.5, 0.25, 0.1)
LAST = "channels_last"  # the other memory format, for networks of convolutions
CONTENDERS: dict[str, dict[str, Any] | None] = {
    f"dense, {LAST}": None,
    "leaves": {"slicing": "leaves", "correction": "off"},
    "leaves, correction": {"slicing": "leaves", "correction": "layer"},
    "gather": {"slicing": "gather", "correction": "off"},
    "gather, correction": {"slicing": "gather", "correction": "layer"},
    f"leaves, {LAST}": {"slicing": "leaves", "correction": "off"},
    "masked": {"slicing": "off", "correction": "off"},
    "masked, correction": {"slicing": "off", "correction": "layer"},
}
# At least, for leaves without correction: what a run of channel sub-nets is to gain.
WANTED = {"ResNet-50": (1.65, 2.5, 3.3), "ResNet-32": (1.4, 1.65, 1.9), "ViT-B blocks": (1.8, 3.4, 6.0)}


class Steps:
    """A network in training.

    Args:
        task: What is trained.
        options: Settings of `ast_plugin.wrap`; None for the plain dense network.
        resample: Whether other channels are drawn at every step.
        memory_format: Of the network and its pictures.
    """

    def __init__(
        self,
        task: Task,
        options: dict[str, Any] | None,
        *,
        resample: bool,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.task = task
        self.inputs = task.inputs.contiguous(memory_format=memory_format)
        self.model: nn.Module = task.build().to(memory_format=memory_format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.ast: ast_plugin.AlternatingSparseTraining | None = None
        self._drawn: dict[str, list[dict[str, Tensor]]] = {}
        if options is not None:
            self.ast = ast_plugin.wrap(
                self.optimizer,
                self.model,
                sparsities=tuple(1 - kept for kept in KEPT),
                method="static",
                pattern="channel",
                groups=task.groups,
                **options,
            )
            if resample:
                generator = torch.Generator().manual_seed(0)
                shapes = self.ast.masks.shapes
                for name, kept in zip(self.ast.sub_nets, KEPT, strict=True):
                    drawn = [_draw(task, kept, generator) for _ in range(2)]
                    self._drawn[name] = [task.groups.masks(units, shapes) for units in drawn]

    def step(self) -> float:
        """Make one step and return the seconds of CPU time that it took."""
        gc.collect()
        began = time.process_time()
        if self._drawn and self.ast is not None:
            name = self.ast.active
            self.ast.masks.replace(name, self._drawn[name][self.ast.step // len(KEPT) % 2])
        self.optimizer.zero_grad()
        self.task.loss(self.model(self.inputs)).backward()
        self.optimizer.step()
        return time.process_time() - began


def _draw(task: Task, kept: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return which units of each group stay, at random."""
    units = {}
    for group in task.groups.groups:
        flags = torch.zeros(group.units, dtype=torch.bool)
        flags[torch.randperm(group.units, generator=generator)[: max(1, round(kept * group.units))]] = True
        units[group.name] = flags
    return units


def measure(task: Task, names: Sequence[str], *, rounds: int, resample: bool) -> dict[str, Any]:
    """Return the dense step in ms, and the factors of every contender: by sub-net and over the whole run."""
    dense = Steps(task, None, resample=False)
    pictures = task.inputs.dim() == 4
    runs = {
        name: Steps(
            task,
            CONTENDERS[name],
            resample=resample,
            memory_format=torch.channels_last if name.endswith(LAST) else torch.contiguous_format,
        )
        for name in names
        if pictures or not name.endswith(LAST)
    }
    plain: list[float] = []
    took: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        before = dense.step()
        found = {name: [run.step() for _ in KEPT] for name, run in runs.items()}
        middle = statistics.mean((before, dense.step()))
        if number >= 0:
            plain.append(middle)
            for name, times in found.items():
                took[name].append([middle / t for t in times] + [len(KEPT) * middle / sum(times)])
    return {
        "dense_ms": 1000 * statistics.median(plain),
        "factors": {
            name: [statistics.median(values) for values in zip(*rows, strict=True)] for name, rows in took.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = []
    for network, found in results["networks"].items():
        lines.append(f"{network}: dense step {found['dense_ms']:.0f} ms")
        lines.append(f"  {'':22}" + "".join(f"{f'kept {kept:g}':>11}" for kept in KEPT) + f"{'whole run':>11}")
        for name, factors in found["factors"].items():
            lines.append(f"  {name:22}" + "".join(f"{factor:>10.2f}x" for factor in factors))
        lines.append(f"  {'at least (leaves)':22}" + "".join(f"{factor:>10.2f}x" for factor in WANTED[network]))
    return "\n".join(lines)


def drawn(results: dict[str, Any]) -> str:
    """Return the figures as an SVG document: a bar for each way to compute and each share of channels."""
    parts = {
        f"{network}, a training step": {
            "rows": [
                {
                    "engine": "PyTorch",
                    "name": name if name.startswith("dense") else f"{name}, kept {kept:g}",
                    "factor": factor,
                    "at_least": wanted if name == "leaves" else None,
                }
                for name, factors in found["factors"].items()
                for kept, factor, wanted in zip(KEPT, factors, WANTED[network], strict=False)
                if not name.startswith("dense") or kept == KEPT[0]
            ]
        }
        for network, found in results["networks"].items()
    }
    return picture({"parts": parts}, "times faster than the dense step; marks: wanted")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="counted rounds (default: 15; quick: 2)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--resample", action="store_true", help="draw other channels at every step")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    parser.add_argument(
        "--picture", action="store_true", help="draw the JSON file's figures beside it, measure nothing"
    )
    args = parser.parse_args(argv)
    if args.picture:
        atomic_write_text(args.output.with_suffix(".svg"), drawn(json.loads(args.output.read_text())))
        return 0
    rounds = args.rounds or (2 if args.quick else 15)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "quick": args.quick,
        "rounds": rounds,
        "resample": args.resample,
        "kept": KEPT,
        "networks": {},
    }
    for network in args.networks:
        print(f"Measuring: {network} ...", file=sys.stderr, flush=True)
        task = make_task(network, quick=args.quick)
        results["networks"][network] = measure(task, args.contenders, rounds=rounds, resample=args.resample)
        atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What alternating sparse training costs beside other ways to train with masks: time, memory, mask updates, whole runs.

ResNet-32 (CIFAR shape, batch 128) and timm's ViT-tiny (64 pixels, batch 32), each with SGD and AdamW, one thread. All
contenders step in turn in one process: plain training; this package with three sub-nets (correction on and off, freeze,
clipping), one and eight; torch.nn.utils.prune; parametrize with a mask; joint training; and the packages rigl-torch and
sparsimony where they are installed. Prints tables and writes the figures into a JSON file.

    pip install --no-deps rigl-torch sparsimony                     # what they declare to need is older, and not needed
    python benchmarks/overhead.py                                   # all of it, about an hour
    python benchmarks/overhead.py --parts steps --networks ViT-tiny --rounds 48
    python benchmarks/overhead.py --quick --output quick.json       # tiny shapes: does it run?
    python benchmarks/overhead.py --markdown                        # docs/cost.md from the JSON file; measures nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ast_plugin.files import atomic_write_text
from overhead_frontier import measure_forms
from overhead_lineup import build_all, peer_versions
from overhead_memory import measure_memory
from overhead_page import page, text
from overhead_runs import measure_mask_updates, measure_runs
from overhead_tasks import NETWORKS, OPTIMIZERS, Task, make_task
from overhead_timing import hook_times, measure, ratio

RESULTS = Path(__file__).parent / "results" / "overhead.json"
PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
PARTS = ("steps", "frontier", "memory", "mask_update", "runs", "short_runs")

_QUICK_SHAPES = ((64, 64, 3, 3), (128, 64, 3, 3), (10, 128))


def measure_steps(task: Task, *, rounds: int) -> dict[str, Any]:
    """Return the cost of a step of every contender, in ratios to the plain step and in ms inside hooks."""
    contenders, notes = build_all(task)
    samples = measure(contenders, task.batch, rounds=rounds)
    return {
        "rounds": rounds,
        "plain_ms": 1000 * statistics.median(sample.cpu for sample in samples["plain"]),
        "notes": notes,
        "contenders": {
            contender.name: {
                "reference": contender.reference,
                "ratio": ratio(samples[contender.name], samples[contender.reference]),
                "hooks_ms": {event: 1000 * took for event, took in hook_times(samples[contender.name]).items()}
                if contender.timer
                else {},
                "sparsities": contender.sparsities(),
            }
            for contender in contenders
            if contender.name != contender.reference
        },
    }


def measure_part(part: str, args: argparse.Namespace) -> Any:
    """Return the figures of one of `PARTS`."""
    make: Callable[..., Task] = lambda network, optimizer, **more: make_task(  # noqa: E731
        network, optimizer, quick=args.quick, **more
    )
    if part == "steps":
        tasks = [make(network, optimizer) for network in args.networks for optimizer in args.optimizers]
        return {task.label: measure_steps(task, rounds=args.rounds) for task in tasks}
    if part == "frontier":
        tasks = [make(network, args.optimizers[0]) for network in args.networks]
        return {task.label: measure_forms(task, rounds=args.rounds) for task in tasks}
    if part == "memory":
        return {network: measure_memory(make(network, "SGD")) for network in args.networks}
    if part == "mask_update":
        return measure_mask_updates(repeats=args.repeats, shapes=_QUICK_SHAPES if args.quick else None)
    task = make("ResNet-32", "SGD", batch_size=args.run_batch)
    return measure_runs(task, steps=args.run_steps if part == "runs" else args.short_run_steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the figures; or write the page from figures on file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="counted steps of every contender (default: 24; quick: 6)")
    parser.add_argument("--repeats", type=int, help="counted mask updates (default: 5; quick: 1)")
    parser.add_argument("--run-steps", type=int, help="steps of a whole run (default: 1000; quick: 60)")
    parser.add_argument("--short-run-steps", type=int, help="steps of a short one beside it (default: 300; quick: 30)")
    parser.add_argument("--run-batch", type=int, help="batch size of both (default: 32; quick: as for steps)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="OPTIMIZER")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help=f"measure these alone, the file keeps the others ({', '.join(PARTS)})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    parser.add_argument(
        "--markdown",
        type=Path,
        nargs="?",
        const=PAGE,
        metavar="PAGE",
        help="write the page from the JSON file and measure nothing (default: docs/cost.md)",
    )
    args = parser.parse_args(argv)
    if args.markdown is not None:
        if not args.output.exists():
            parser.error(f"--output {args.output} does not exist; measure first, without --markdown")
        atomic_write_text(args.markdown, page(json.loads(args.output.read_text(encoding="utf-8"))))
        print(f"Page: {args.markdown}")
        return 0
    for name, full, quick in (
        ("rounds", 24, 6),
        ("repeats", 5, 1),
        ("run_steps", 1000, 60),
        ("run_batch", 32, None),
        ("short_run_steps", 300, 30),
    ):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.parts and args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
        if results.get("quick", False) != args.quick:
            parser.error(
                f"{args.output} holds figures {'of' if results.get('quick') else 'without'} --quick; they "
                "cannot be mixed: name another --output"
            )
    results |= {"torch": torch.__version__, "python": sys.version.split()[0], "quick": args.quick}
    results["peers"] = peer_versions()
    for part in args.parts or PARTS:
        print(f"Measuring: {part} ...", file=sys.stderr, flush=True)
        results[part] = measure_part(part, args)
        atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(text(results))
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

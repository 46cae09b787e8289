"""What an ensemble of the sub-nets of one run is worth, on scikit-learn's handwritten digits.

The task, network and settings are those of `accuracy.py`. Beside the ensemble of one alternating run stand its members,
a dense network, and ensembles of three sparse networks that were trained apart, from initial weights of their own: for
a third of the steps each, which costs as much as the one run, and for all the steps each.

    python benchmarks/ensemble.py --processes 2 --page        # five seeds, 30 times 45 s; renews docs/ensemble.md
    python benchmarks/ensemble.py --arms alternating dense    # a third of that
    python benchmarks/ensemble.py --no-runs --page            # the tables of the page from what is on file
    python benchmarks/ensemble.py --steps 30 --seeds 2 --output quick.json    # does it run?

What is on file is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ast_plugin
from accuracy_runs import Settings, make_optimizer
from accuracy_tasks import Digits
from ast_plugin.files import atomic_write_text
from ast_plugin.integrations.family import ensemble
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.sub_nets import sparsity_name
from ast_plugin.training import AlternatingSparseTraining

RESULTS = Path(__file__).parent / "results" / "ensemble.json"
PAGE = Path(__file__).parent.parent / "docs" / "ensemble.md"
MARKER = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
ARMS = ("alternating", "dense", "thirds", "whole")
SEEDS = 5
APART = 1000  # how far apart the seeds of networks lie that are trained apart
DENSE = "s0"


class Networks(nn.Module):
    """Networks that were trained apart, as an ensemble takes them: one module that is each of them in turn."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.sub_nets = tuple(networks)
        self.members = nn.ModuleList(networks.values())
        self.on = 0

    @property
    def model(self) -> nn.Module:
        """The module itself."""
        return self

    @contextlib.contextmanager
    def sub_net(self, name: str) -> Iterator[nn.Module]:
        """Answer as one of the networks for the length of a block."""
        before, self.on = self.on, self.sub_nets.index(name)
        try:
            yield self
        finally:
            self.on = before

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the network whose turn it is."""
        return self.members[self.on](images)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def _digits() -> Digits:
    return Digits()


def train(sparsities: Sequence[float], *, seed: int, steps: int) -> AlternatingSparseTraining:
    """Train on one thread, as `accuracy.py` does."""
    torch.manual_seed(seed)
    task, defaults = _digits(), dict(Digits.defaults)
    options = {**defaults.pop("options"), **({"method": "static"} if tuple(sparsities) == (0.0,) else {})}
    settings = Settings(
        **{**defaults, "task": task.name, "seed": seed, "sparsities": tuple(sparsities), "steps": steps},
        options=options,
    )
    model = task.model()
    optimizer = make_optimizer(settings, model.parameters())
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=settings.sparsities, total_steps=steps, seed=seed, **settings.ast_options()
    )
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        optimizer.zero_grad()
        task.loss(model, task.batch(step, seed=seed)).backward()
        optimizer.step()
    return ast


def apart(sparsities: Sequence[float], *, seed: int, steps: int) -> Networks:
    """Train a sparse network for each sparsity, each with initial weights, batches and masks of its own."""
    networks: dict[str, nn.Module] = {}
    for index, sparsity in enumerate(sparsities):
        name = sparsity_name(sparsity)
        ast = train((sparsity,), seed=seed + APART * index, steps=steps)
        networks[name] = _digits().model()
        networks[name].load_state_dict(ast.materialize(name))
    return Networks(networks)


def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Return what goes into the JSON file: an `EnsembleReport` for each choice of members."""
    torch.set_num_threads(1)
    sparsities = Digits.defaults["sparsities"]
    started = time.process_time()
    source: Any
    if arm == "alternating":
        source = train(sparsities, seed=seed, steps=steps)
    elif arm == "dense":
        source = train((0.0,), seed=seed, steps=steps)
    else:
        source = apart(sparsities, seed=seed, steps=steps // len(sparsities) if arm == "thirds" else steps)
    seconds = time.process_time() - started
    # Of one run's members every choice of two or more; elsewhere all.
    sizes = range(2, len(source.sub_nets) + 1) if arm == "alternating" else [len(source.sub_nets)]
    choices = [names for size in sizes for names in itertools.combinations(source.sub_nets, size)]
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "reports": {"+".join(names): measured(source, names) for names in choices},
    }


def measured(source: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of some members on the test images."""
    digits = _digits()._digits
    loader = list(zip(digits.test_images.split(797), digits.test_labels.split(797), strict=True))
    return ensemble(source, names).evaluate(loader, clock=time.process_time).to_dict()


def key(found: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return what tells a run from others."""
    return str(found["arm"]), int(found["seed"]), int(found["steps"])


def _figures(runs: Sequence[Mapping[str, Any]], choice: str, name: str) -> list[dict[str, Any]]:
    """Return the records of a member, or of the ensemble, by seed."""
    return [next(r for r in run["reports"][choice]["records"] if r["name"] == name) for run in runs]


def _spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = show(statistics.mean(known))
    return f"{mean} ± {show(statistics.stdev(known))}" if len(known) > 1 else mean


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _thousandths(value: float) -> str:
    return f"{value:.3f}"


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, float]]:
    """Return what the tables show, as far as it is on file: text, arm, choice of members, member, cost of training."""
    names = [sparsity_name(sparsity) for sparsity in Digits.defaults["sparsities"]]
    every = "+".join(names)
    pairs = ["+".join(pair) for pair in itertools.combinations(names, 2)]
    rows = [
        ("a dense network", "dense", DENSE, DENSE, 1.0),
        *((f"{name} of one alternating run", "alternating", every, name, 1.0) for name in names),
        *((f"ensemble {choice} of one alternating run", "alternating", choice, "ensemble", 1.0) for choice in pairs),
        ("ensemble of all of one alternating run", "alternating", every, "ensemble", 1.0),
        ("ensemble of three trained apart, a third of the steps each", "thirds", every, "ensemble", 1.0),
        *((f"{name} trained alone, all the steps", "whole", every, name, 1.0) for name in names),
        ("ensemble of three trained apart, all the steps each", "whole", every, "ensemble", 3.0),
    ]
    arms = {run["arm"] for run in runs}
    return [row for row in rows if row[1] in arms]


def quality(results: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the table of accuracy, calibration and cost."""
    lines = []
    for text, arm, choice, name, cost in rows_of(results):
        runs = [run for run in results if run["arm"] == arm]
        found = _figures(runs, choice, name)
        lines.append(
            (
                text,
                _spread([record["accuracy"] for record in found], _percent),
                _spread([record["ece"] for record in found], _percent),
                _spread([record["nll"] for record in found], _thousandths),
                str(found[0]["forward_passes"]),
                f"{cost:g}",
                str(len(runs)),
            )
        )
    return TextTable(
        title="Accuracy, calibration and cost",
        columns=("", "accuracy, %", "ECE, %", "NLL, nats", "passes", "training", "seeds"),
        rows=tuple(lines),
    )


def uncertainty(results: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the table of what disagreement and confidence tell of errors."""
    lines = []
    for text, arm, choice, name, _ in rows_of(results):
        runs = [run for run in results if run["arm"] == arm]
        records = _figures(runs, choice, name)
        reports = [run["reports"][choice] for run in runs]
        # A member disagrees with nobody.
        of_all = [{}] * len(reports) if name != "ensemble" else reports
        lines.append(
            (
                text,
                _spread([report.get("disagreement_right") for report in of_all], _thousandths),
                _spread([report.get("disagreement_wrong") for report in of_all], _thousandths),
                _spread([report.get("error_detection") for report in of_all], _thousandths),
                _spread([record["error_detection"] for record in records], _thousandths),
            )
        )
    return TextTable(
        title="Disagreement on right and wrong answers, and what finds errors (AUROC)",
        columns=("", "right", "wrong", "AUROC, disagreement", "AUROC, low confidence"),
        rows=tuple(lines),
    )


TABLES = {"quality": quality, "uncertainty": uncertainty}


def markdown(found: TextTable) -> str:
    """Return a table as Markdown."""
    rule = tuple("---" if index == 0 else "---:" for index in range(len(found.columns)))
    return "\n".join("| " + " | ".join(line) + " |" for line in (found.columns, rule, *found.rows)) + "\n"


def renewed(page: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    return MARKER.sub(lambda m: f"{m['begin']}\n{markdown(TABLES[m['name']](results))}\n{m['end']}", page)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs on file, in order of arms and seeds."""
    found = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return sorted(found, key=lambda run: (ARMS.index(run["arm"]), run["seed"], run["steps"]))


def write(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the runs."""
    atomic_write_text(path, json.dumps({"torch": torch.__version__, "runs": list(runs)}, indent=1) + "\n")


def _found(jobs: Sequence[tuple[str, int, int]], processes: int) -> Iterator[dict[str, Any]]:
    """Yield what the runs come to as they end."""
    if processes == 1 or not jobs:
        yield from itertools.starmap(run, jobs)
        return
    # spawn: a forked process would inherit torch's threads in a state that it cannot use.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_run, jobs)


def _run(job: tuple[str, int, int]) -> dict[str, Any]:
    return run(*job)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds, from 0 (default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=Digits.defaults["steps"], help="of a run, for a quick trial")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    parser.add_argument("--no-runs", action="store_true", help="only show what is on file")
    parser.add_argument("--page", action="store_true", help=f"renew the tables of docs/{PAGE.name}")
    args = parser.parse_args(argv)
    if not args.no_runs:
        on_file = {key(found) for found in read(args.output)}
        wanted = [(arm, seed, args.steps) for arm in args.arms for seed in range(args.seeds)]
        missing = [job for job in wanted if job not in on_file]
        for number, found in enumerate(_found(missing, args.processes), start=1):
            write(args.output, [*read(args.output), found])
            done, arm, seed = f"[{number}/{len(missing)}]", found["arm"], found["seed"]
            print(f"{done} {arm}, seed {seed}: {found['seconds']:.0f} s", flush=True)
    results = [found for found in read(args.output) if found["steps"] == args.steps]
    for table in TABLES.values():
        print(f"\n{plain_table(table(results))}")
    if args.page:
        atomic_write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8"), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Accuracy on the demo's digits: one alternating run against training every sub-net separately.

For each sub-net (90, 95 and 98 % sparse by default), over several seeds:

* ``alternating``: all sub-nets from one run;
* ``separate``: each trained alone, for as many steps as the whole alternating run: three times its cost;
* ``separate-share``: each trained alone, for a third of those steps: the same cost;
* ``dense``: the dense network.

``--variants`` adds alternating runs with one setting changed. Results go into a JSON file after every run, and runs
that it holds already are not repeated: an interrupted benchmark goes on where it was.

    python benchmarks/digits.py --seeds 5
    python benchmarks/digits.py --seeds 5 --variants
    python benchmarks/digits.py --seeds 5 --only alternating correction-off --variants correction-off
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ast_plugin.demo_data import load_digits
from ast_plugin.demo_run import DemoRun
from ast_plugin.demo_settings import DemoSettings
from ast_plugin.files import atomic_write_text
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.sub_nets import sparsity_name

RESULTS = Path(__file__).parent / "results" / "digits.json"
SPARSITIES = (0.90, 0.95, 0.98)
ALTERNATING = "alternating"
SEPARATE = "separate"
SHARE = "separate-share"
DENSE = "dense"

VARIANTS: dict[str, dict[str, Any]] = {
    "correction-off": {"correction": "off"},
    "correction-global": {"correction": "global"},
    "inactive-freeze": {"inactive": "freeze"},
    "drop-fraction-.5": {"drop_fraction": 0.5},
    "drop-fraction-0": {"drop_fraction": 0.0},
    "end-step-.7": {"end_step": 0.7},
    "random": {"alternation": "random"},
    "erk": {"distribution": "erk"},
    "uniform": {"distribution": "uniform"},
    "rigl": {"method": "rigl"},
    "set": {"method": "set"},
    "static": {"method": "static"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training run.

    Attributes:
        label: The row of the table that it belongs to.
        settings: What is trained; its seed included.
    """

    label: str
    settings: DemoSettings

    @property
    def key(self) -> str:
        """What tells this run from every other: the label and all settings."""
        return json.dumps([self.label, self.settings.to_dict()], sort_keys=True)


def jobs(
    seeds: Sequence[int], steps: int, sparsities: Sequence[float], *, variants: Sequence[str], only: Sequence[str]
) -> Iterator[Job]:
    """Yield the runs, seed by seed, so that a table of the first seeds is complete early."""
    share = steps // len(sparsities)
    for seed in seeds:
        base = DemoSettings(sparsities=tuple(sparsities), steps=steps, seed=seed)
        rows = [(ALTERNATING, base), (DENSE, dataclasses.replace(base, sparsities=(0.0,), method="static"))]
        for sparsity in sparsities:
            alone = dataclasses.replace(base, sparsities=(sparsity,))
            rows += [(SEPARATE, alone), (SHARE, dataclasses.replace(alone, steps=share))]
        rows += [(name, dataclasses.replace(base, **VARIANTS[name])) for name in variants]
        for label, settings in rows:
            if not only or label in only:
                yield Job(label=label, settings=settings)


def run(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train and evaluate; returns what goes into the JSON file."""
    torch.set_num_threads(job.settings.threads)
    training = DemoRun(job.settings, load_digits())
    # Processor time, as everything runs on one thread: it does not depend on what else the machine does.
    started = time.process_time()
    while not training.finished:
        training.train_step()
    seconds = time.process_time() - started
    accuracies = training.evaluate()
    return job, {
        "label": job.label,
        "settings": job.settings.to_dict(),
        "accuracy": accuracies,
        "sparsity": {name: training.ast.masks.sparsity(name) for name in training.ast.sub_nets},
        "seconds": seconds,
        "statistics": training.ast.statistics(),
    }


def table(results: Sequence[dict[str, Any]], sparsities: Sequence[float]) -> TextTable:
    """Return one row a label: for every sub-net mean, standard deviation and range; cost; seeds."""
    names = [sparsity_name(s) for s in sparsities]
    labels = list(dict.fromkeys(result["label"] for result in results))
    reference = _cost(results, ALTERNATING)
    rows = []
    for label in labels:
        mine = [result for result in results if result["label"] == label]
        if label == DENSE:
            cells = [_spread([value for r in mine for value in r["accuracy"].values()]), *[""] * (len(names) - 1)]
        else:
            cells = [_spread([r["accuracy"][name] for r in mine if name in r["accuracy"]]) for name in names]
        steps, seconds = _cost(results, label)
        rows.append(
            (
                label,
                *cells,
                f"{steps / reference[0]:.2f}" if reference[0] else "",
                f"{seconds / reference[1]:.2f}" if reference[1] else "",
                str(len({r["settings"]["seed"] for r in mine})),
            )
        )
    return TextTable(
        title="Test accuracy in %: mean +- standard deviation (lowest .. highest); cost relative to the first row",
        columns=("", *names, "steps", "time", "seeds"),
        rows=tuple(rows),
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} +- {deviation:.1f} ({min(values):.1f} .. {max(values):.1f})"


def _cost(results: Sequence[dict[str, Any]], label: str) -> tuple[float, float]:
    """Return steps and seconds for one set of sub-nets, averaged over the seeds."""
    mine = [result for result in results if result["label"] == label]
    seeds = len({r["settings"]["seed"] for r in mine}) or 1
    return sum(r["settings"]["steps"] for r in mine) / seeds, sum(r["seconds"] for r in mine) / seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    parser.add_argument("--steps", type=int, default=DemoSettings().steps, help="of the whole alternating run")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=list(VARIANTS),
        metavar="NAME",
        help=f"of: {', '.join(VARIANTS)} (no name: all of them)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", default=[], help="only these rows, such as: alternating dense"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    variants = [] if args.variants is None else args.variants or list(VARIANTS)
    done: dict[str, dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else {}
    wanted = list(jobs(range(args.seeds), args.steps, args.sparsities, variants=variants, only=args.only))
    missing = [job for job in wanted if job.key not in done]
    try:
        _run_all(missing, done, args.processes, args.output)
    except KeyboardInterrupt:
        print(f"\nStopped; what is done is in {args.output}, the same command goes on.", file=sys.stderr)
        return 130
    print("\n" + plain_table(table([done[job.key] for job in wanted], args.sparsities)))
    return 0


def _run_all(missing: Sequence[Job], done: dict[str, dict[str, Any]], processes: int, output: Path) -> None:
    """Run the jobs and add their results to `done`, which is written after each."""
    # spawn: a forked process would inherit torch's threads in a state that it cannot use. Ctrl-C is for this process.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for number, (job, result) in enumerate(pool.imap_unordered(run, missing), start=1):
            done[job.key] = result
            atomic_write_text(output, json.dumps(done, indent=1))
            accuracies = "  ".join(f"{name} {value:.1f}" for name, value in result["accuracy"].items())
            print(
                f"[{number}/{len(missing)}] {job.label}, seed {job.settings.seed}: {accuracies} "
                f"({result['seconds']:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())

"""Accuracy on two real tasks: alternating training with each of its choices, separate training, joint training.

Tasks: the demo's digits (test accuracy) and a byte-level language model on the source of Python's standard library
(bits per byte of held-out files). Rows, in `accuracy_rows.py`, differ from the ``alternating`` row in what their text
says. Every run is kept in a JSON file and not repeated while its settings stay the same: an interrupted benchmark goes
on where it was, and several may run at once.

Seeds are shared: they decide initial weights, batches and masks. So rows are compared seed by seed, and tables give the
mean of these differences with its standard error, and mark those that a t test at 5 % calls different from zero.

    python benchmarks/accuracy.py --task digits
    python benchmarks/accuracy.py --task bytes --rows alternating separate correction-off --seeds 2
    python benchmarks/accuracy.py --no-runs --markdown docs/evidence.md
    python benchmarks/accuracy.py --task digits --forks FOLDER --rows granet-3 granet-3-tk
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_rows import ALTERNATING, DENSE, ROWS, TABLES, Row
from accuracy_runs import FINAL, Settings, run
from accuracy_tasks import TASKS
from ast_plugin.files import atomic_write_text
from ast_plugin.report_text import TextTable, plain_table
from ast_plugin.sub_nets import sparsity_name

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SEEDS = 5

# Two-sided 5 % points of Student's t by degrees of freedom; beyond them the normal distribution's is near enough.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
MARKER = re.compile(
    r"(?P<begin><!-- table: (?P<task>\w+)/(?P<table>\w+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL
)

Results = dict[str, dict[str, Any]]


def key(settings: Settings) -> str:
    """Return where a run is kept: all that decides it."""
    return json.dumps(settings.to_dict(), sort_keys=True)


def read(path: Path) -> Results:
    """Return the runs on file, by key."""
    if not path.exists():
        return {}
    return {json.dumps(entry["settings"], sort_keys=True): entry for entry in json.loads(path.read_text())}


def store(path: Path, result: dict[str, Any]) -> None:
    """Add a run to the file, together with what other processes have added meanwhile."""
    with _locked(path):
        results = read(path)
        results[json.dumps(result["settings"], sort_keys=True)] = result
        lines = [json.dumps(results[name], sort_keys=True) for name in sorted(results)]
        atomic_write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: one benchmark at a time
        yield
        return
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a row came to for one seed, over all its runs.

    Attributes:
        figures: By sub-net, by measure.
        passes: Forward and backward passes.
        time: Processor time relative to the reference run's of the same sitting; None if that is not known.
    """

    figures: Mapping[str, Mapping[str, float]]
    passes: int
    time: float | None


def outcome(row: Row, task: str, seed: int, results: Results, steps: int | None = None) -> Outcome | None:
    """Return what a row came to; None if a run of it is missing."""
    found = [results.get(key(settings)) for settings in row.runs(task, seed, steps=steps)]
    runs = [entry for entry in found if entry is not None and row.readout in entry["figures"]]
    if len(runs) < len(found):
        return None
    references = [entry.get("reference_seconds") or _reference_seconds(task, results, steps) for entry in runs]
    return Outcome(
        figures={name: values for entry in runs for name, values in entry["figures"][row.readout].items()},
        passes=sum(passes(entry["settings"]) for entry in runs),
        time=sum(e["seconds"] / r for e, r in zip(runs, references, strict=True)) if all(references) else None,
    )


def passes(settings: Mapping[str, Any]) -> int:
    """Return how many forward and backward passes a run makes."""
    together = settings["joint"] or settings["options"].get("alternation") == "joint"
    return int(settings["steps"]) * (len(settings["sparsities"]) if together else 1)


def _reference_seconds(task: str, results: Results, steps: int | None) -> float | None:
    """Return what the reference run takes, the mean over its seeds measured in this file's own sitting."""
    entries = [results.get(key(s)) for seed in range(SEEDS) for s in ROWS[ALTERNATING].runs(task, seed, steps=steps)]
    seconds = [entry["seconds"] for entry in entries if entry is not None and "reference_seconds" not in entry]
    return statistics.mean(seconds) if seconds else None


def difference(ours: Sequence[float], theirs: Sequence[float], decimals: int = 2) -> str:
    """Return the mean of paired differences with its standard error.

    It is starred if there are three or more, and a t test at 5 % tells their mean from zero.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.{decimals}f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    # Two differences may happen to be all but equal: they prove nothing.
    freedom = len(differences) - 1
    clear = freedom > 1 and abs(mean) > (_T[freedom - 1] if freedom <= len(_T) else 1.96) * error
    return f"{mean:+.{decimals}f} ± {error:.{decimals}f}{'*' if clear else ''}"


def table(task: str, name: str, seeds: Sequence[int], results: Results, steps: int | None = None) -> TextTable:
    """Return one line a row: per sub-net mean and standard deviation, or the difference; cost; seeds.

    Args:
        task: Name of the task.
        name: One of `TABLES`.
        seeds: Which seeds to use, as far as they were run.
        results: The runs on file.
        steps: Of the reference run; None takes the task's.
    """
    measure = next(iter(TASKS[task].measures))
    sub_nets = TABLES[name].sparsities or TASKS[task].defaults["sparsities"]
    names = [s if isinstance(s, str) else s[0] if isinstance(s, tuple) else sparsity_name(s) for s in sub_nets]
    absolute, decimals = TABLES[name].absolute, TASKS[task].decimals
    lines = []
    for row in ROWS.values():
        if row.table != name or task not in row.tasks:
            continue
        outcomes = {seed: outcome(row, task, seed, results, steps) for seed in seeds}
        theirs = {seed: outcome(ROWS[row.reference], task, seed, results, steps) for seed in seeds}
        base = {seed: outcome(ROWS[ALTERNATING], task, seed, results, steps) for seed in seeds}
        done = [s for s in seeds if outcomes[s] and base[s] and (absolute or theirs[s])]
        if not done:
            continue
        cells = []
        for sub_net in [next(iter(outcomes[done[0]].figures))] if row.name == DENSE else names:
            ours = [f for s in done if (f := _figure(outcomes[s], sub_net, measure)) is not None]
            others = [f for s in done if (f := _figure(theirs[s], sub_net, measure)) is not None]
            cells.append(
                "" if not ours else _spread(ours, decimals) if absolute else difference(ours, others, decimals)
            )
        cells += [""] * (len(names) - len(cells))
        cost = statistics.mean(outcomes[s].passes / base[s].passes for s in done)
        times = [outcomes[s].time for s in done if outcomes[s].time is not None]
        lines.append(
            (row.text, *cells, f"{cost:.2f}", f"{statistics.mean(times):.2f}" if times else "", str(len(done)))
        )
    return TextTable(
        title=TABLES[name].title.format(measure=f"{measure}, {TASKS[task].measures[measure]}"),
        columns=("", *names, "passes", "time", "seeds"),
        rows=tuple(lines),
    )


def _figure(found: Outcome | None, sub_net: str, measure: str) -> float | None:
    """Return a sub-net's figure; None where the row does not have that sub-net."""
    return found.figures.get(sub_net, {}).get(measure) if found is not None else None


def _spread(values: Sequence[float], decimals: int) -> str:
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def markdown(found: TextTable) -> str:
    """Return a table as Markdown."""
    lines = [found.columns, tuple("---" for _ in found.columns), *found.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_tables(page: Path, seeds: Sequence[int], results: Results) -> None:
    """Renew the tables of a page: what stands between ``<!-- table: TASK/TABLE -->`` and ``<!-- end of table -->``."""

    def renewed(match: re.Match[str]) -> str:
        return (
            match["begin"] + "\n" + markdown(table(match["task"], match["table"], seeds, results)) + "\n" + match["end"]
        )

    atomic_write_text(page, MARKER.sub(renewed, page.read_text(encoding="utf-8")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: both")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of seeds, from 0 (default: {SEEDS})")
    parser.add_argument("--steps", type=int, help="of the alternating run, for a quick trial")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    parser.add_argument(
        "--forks", type=Path, metavar="FOLDER", help="keep states there, from which runs with sup-tickets go on"
    )
    parser.add_argument("--no-runs", action="store_true", help="only show what is on file")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="renew the tables of this page")
    args = parser.parse_args(argv)
    rows = [ROWS[name] for name in args.rows or ROWS]
    seeds = range(args.seeds)
    # Row by row, so that with every row finished one comparison more is complete.
    wanted = [
        settings
        for row in rows
        for task in args.task
        if task in row.tasks
        for seed in seeds
        for settings in row.runs(task, seed, steps=args.steps)
    ]
    if not args.no_runs:
        done = read(args.output)
        missing = list({key(settings): settings for settings in wanted if key(settings) not in done}.values())
        try:
            _run_all(missing, args.processes, args.output, args.forks)
        except KeyboardInterrupt:
            print(f"\nStopped; what is done is in {args.output}, the same command goes on.", file=sys.stderr)
            return 130
    results = read(args.output)
    for task in args.task:
        for name in TABLES:
            if (found := table(task, name, seeds, results, args.steps)).rows:
                print(f"\n{task}\n{plain_table(found)}")
    if args.markdown:
        write_tables(args.markdown, seeds, results)
    return 0


def _run_all(missing: Sequence[Settings], processes: int, output: Path, forks: Path | None) -> None:
    for number, result in enumerate(_results(missing, processes, forks), start=1):
        store(output, result)
        settings = result["settings"]
        measure = next(iter(TASKS[settings["task"]].measures))
        shown = "  ".join(f"{name} {values[measure]:.3f}" for name, values in result["figures"][FINAL].items())
        print(
            f"[{number}/{len(missing)}] {settings['task']}, seed {settings['seed']}: {shown} "
            f"({result['seconds']:.0f} s)",
            flush=True,
        )


def _results(missing: Sequence[Settings], processes: int, forks: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what the runs come to as they end."""
    run_one = functools.partial(run, forks=forks)
    if processes == 1:
        yield from map(run_one, missing)
        return
    # spawn: a forked process would inherit torch's threads in a state that it cannot use. Ctrl-C is for this process.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(run_one, missing)


if __name__ == "__main__":
    sys.exit(main())

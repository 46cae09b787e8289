"""What whole runs of channel sub-nets cost beside one dense run, from the first step to the last.

ResNet-32 on CIFAR's shape, SGD with momentum, one thread. A run trains three sub-nets that keep .5, .25 and .1 of the
channels, by the default method with its ramp and its mask updates, and by variants of it. All runs and the dense one
step in turn in one process, and their CPU time is added up. The number of mask updates does not depend on the
length of a run, so that a longer one pays less for them: the second figure takes the measured cost of steps and updates
for a run of 10,000 steps. Prints a table and writes the figures into a JSON file.

    python benchmarks/sliced_runs.py                               # about 10 minutes
    python benchmarks/sliced_runs.py --quick --output quick.json   # tiny shapes and few steps: does it run?
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
from torch.nn.functional import cross_entropy

import ast_plugin
from ast_plugin.files import atomic_write_text
from sliced_tasks import CLASSES, Task, make_task
from sliced_training import KEPT

RESULTS = Path(__file__).parent / "results" / "sliced_runs.json"
NETWORK = "ResNet-32"
LONG = 10_000
RUNS: dict[str, dict[str, Any]] = {
    "default: granet, ramp over half of the run": {},
    "gmp: the same ramp, no regrowth": {"method": "gmp"},
    "ramp over a quarter of the run": {"end_step": 0.25},
    "no ramp: initial_sparsity=0.9": {"initial_sparsity": 0.9},
}


class Updates:
    """Counts the mask updates of a run."""

    def __init__(self) -> None:
        self.count = 0

    @ast_plugin.hookimpl
    def ast_masks_updated(self) -> None:
        """One more."""
        self.count += 1


class Run:
    """A network in training.

    Args:
        task: What is trained.
        options: Settings of `ast_plugin.wrap`; None for the plain dense network.
        steps: How long the run is.
        batch: Pictures a step.

    Attributes:
        took: Seconds of CPU time of every step without a mask update, in order.
        updating: The same of the steps with one, each with the number of its step.
        updates: How many mask updates there were.
    """

    def __init__(self, task: Task, options: dict[str, Any] | None, *, steps: int, batch: int) -> None:
        self.model = task.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.batch = batch
        self.took: dict[int, float] = {}
        self.updating: dict[int, float] = {}
        self._updates = Updates()
        if options is not None:
            ast_plugin.wrap(
                self.optimizer,
                self.model,
                sparsities=tuple(1 - kept for kept in KEPT),
                total_steps=steps,
                pattern="channel",
                groups=task.groups,
                plugins=[self._updates],
                **options,
            )

    @property
    def updates(self) -> int:
        """How many mask updates there were."""
        return self._updates.count

    def step(self, number: int) -> None:
        """Make a step and note the CPU time that it took."""
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(self.batch, 3, 32, 32, generator=generator)
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        before = self.updates
        began = time.process_time()
        self.optimizer.zero_grad()
        cross_entropy(self.model(inputs), labels).backward()
        self.optimizer.step()
        (self.took if self.updates == before else self.updating)[number] = time.process_time() - began

    def seconds(self) -> float:
        """Return the time of all steps."""
        return sum(self.took.values()) + sum(self.updating.values())

    def seconds_of(self, steps: int) -> float:
        """Return what a run of that many steps takes with as many mask updates.

        Each step with an update is taken to cost beside it what the nearest steps without one cost.
        """
        numbers = sorted(self.took)
        length = len(self.took) + len(self.updating)
        extra = 0.0
        plain = sum(self.took.values())
        for number, seconds in self.updating.items():
            near = sorted(numbers, key=lambda other: abs(other - number))[: 2 * len(KEPT)]
            usual = statistics.median(self.took[other] for other in near)
            extra += seconds - usual
            plain += usual
        return plain * steps / length + extra


def measure(*, steps: int, batch: int, quick: bool) -> dict[str, Any]:
    """Return the runs' times as shares of the dense run's."""
    task = make_task(NETWORK, quick=quick)
    dense = Run(task, None, steps=steps, batch=batch)
    runs = {name: Run(task, options, steps=steps, batch=batch) for name, options in RUNS.items()}
    order = [dense, *runs.values()]
    for run in order:  # what is made at the first call of all
        run.model(torch.randn(batch, 3, 32, 32))
    for number in range(steps):
        for run in order:
            run.step(number)
        order.append(order.pop(0))
        if number % 20 == 0:
            gc.collect()
    return {
        "dense_ms": 1000 * statistics.median(dense.took.values()),
        "runs": {
            name: {
                "share": run.seconds() / dense.seconds(),
                "share_long": run.seconds_of(LONG) / dense.seconds_of(LONG),
                "updates": run.updates,
            }
            for name, run in runs.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [
        f"{NETWORK}, batch {results['batch']}: dense step {results['dense_ms']:.0f} ms; whole runs of three sub-nets, "
        "as shares of one dense run",
        f"  {'':46}{str(results['steps']) + ' steps':>12}{str(LONG) + ' steps':>14}{'updates':>9}",
    ]
    for name, found in results["runs"].items():
        lines.append(f"  {name:46}{found['share']:>12.2f}{found['share_long']:>14.2f}{found['updates']:>9}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="length of the runs (default: 900; quick: 60)")
    parser.add_argument("--quick", action="store_true", help="tiny batches and few steps; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps, batch = args.steps or (60 if args.quick else 900), 2 if args.quick else 32
    results = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "quick": args.quick,
        "steps": steps,
        "batch": batch,
        **measure(steps=steps, batch=batch, quick=args.quick),
    }
    atomic_write_text(args.output, json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\nFigures: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

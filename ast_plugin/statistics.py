"""Counters of a run: steps, corrections and sparsities, in all, per sub-net and over time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Counter:
    """Sums over steps of one sub-net, or of one window of its history.

    Attributes:
        steps: Optimizer steps that happened.
        checks: Inner products compared with zero (one per corrected layer and step).
        conflicts: Checks in which the inner product was negative, so that the gradient was projected.
        cosine_sum: Sum over the checks of the cosine between gradient and reference, before projection.
    """

    steps: int = 0
    checks: int = 0
    conflicts: int = 0
    cosine_sum: float = 0.0

    def add(self, checks: int, conflicts: int, cosines: Sequence[float]) -> None:
        """Count the checks of one step."""
        self.steps += 1
        self.checks += checks
        self.conflicts += conflicts
        self.cosine_sum += sum(cosines)

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine in [-1, 1]; None before the first check."""
        return self.cosine_sum / self.checks if self.checks else None

    def to_dict(self) -> dict[str, Any]:
        """Return the public figures as a plain mapping."""
        return {
            "steps": self.steps,
            "checks": self.checks,
            "conflicts": self.conflicts,
            "mean_cosine": self.mean_cosine,
        }


class Statistics:
    """What happened in a run, kept from sums that the step computes anyway.

    Args:
        sub_nets: Names of the sub-nets.
        window: Optimizer steps summed into one point of the conflict history.
    """

    def __init__(self, sub_nets: Sequence[str], *, window: int) -> None:
        self.sub_nets = tuple(sub_nets)
        self.window = max(1, window)
        self._extra = 0  # steps of sub-nets beyond one at each optimizer step
        self._totals = {name: Counter() for name in self.sub_nets}
        self._windows = {name: Counter() for name in self.sub_nets}
        self._sparsity: list[dict[str, Any]] = []
        self._conflicts: list[dict[str, Any]] = []

    def step_finished(
        self,
        step: int,
        sub_net: str,
        *,
        checks: int,
        conflicts: int,
        cosines: Sequence[float],
        others: Sequence[str] = (),
    ) -> None:
        """Count one optimizer step of `sub_net`, and of `others` in the same step, the step number counting from 0."""
        self._totals[sub_net].add(checks, conflicts, cosines)
        self._windows[sub_net].add(checks, conflicts, cosines)
        for other in others:
            self._totals[other].add(0, 0, ())
        self._extra += len(others)
        if (step + 1) % self.window == 0:
            self._close_windows(step + 1)

    def masks_updated(self, step: int, sub_net: str, target: float, achieved: float) -> None:
        """Note the sparsity that a mask update aimed at and the one it reached, both in [0, 1]."""
        self._sparsity.append({"step": step, "sub_net": sub_net, "target": target, "achieved": achieved})

    def _close_windows(self, step: int) -> None:
        for name, counter in self._windows.items():
            if counter.checks:
                self._conflicts.append(
                    {
                        "step": step,
                        "sub_net": name,
                        "checks": counter.checks,
                        "conflicts": counter.conflicts,
                        "mean_cosine": counter.mean_cosine,
                    }
                )
        self._windows = {name: Counter() for name in self.sub_nets}

    def summary(self) -> dict[str, Any]:
        """Return steps, checks, conflicts and mean cosine, in all and under ``sub_nets`` for each."""
        total = Counter(steps=-self._extra)
        for counter in self._totals.values():
            total.steps += counter.steps
            total.checks += counter.checks
            total.conflicts += counter.conflicts
            total.cosine_sum += counter.cosine_sum
        per_sub_net = {name: counter.to_dict() for name, counter in self._totals.items()}
        return {**total.to_dict(), "sub_nets": per_sub_net}

    def history(self) -> dict[str, list[dict[str, Any]]]:
        """Return the points over time: ``sparsity`` at mask updates and ``conflicts`` by windows of steps."""
        return {
            "sparsity": [dict(point) for point in self._sparsity],
            "conflicts": [dict(point) for point in self._conflicts],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers."""
        return {
            "window": self.window,
            "extra": self._extra,
            "totals": {name: dataclasses.asdict(counter) for name, counter in self._totals.items()},
            "windows": {name: dataclasses.asdict(counter) for name, counter in self._windows.items()},
            **self.history(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the same sub-nets."""
        self.window = int(state["window"])
        self._extra = int(state.get("extra", 0))
        self._totals = {name: Counter(**state["totals"][name]) for name in self.sub_nets}
        self._windows = {name: Counter(**state["windows"][name]) for name in self.sub_nets}
        self._sparsity = [dict(point) for point in state["sparsity"]]
        self._conflicts = [dict(point) for point in state["conflicts"]]

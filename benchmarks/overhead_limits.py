"""What the figures of `overhead.py` are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ast_plugin.report_text import TextTable
from overhead_contenders import EIGHT_OFF, OURS, SINGLE
from overhead_memory import FINAL
from overhead_tasks import NETWORKS

Results = Mapping[str, Any]

ABSENT = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """What a measure must not exceed.

    Attributes:
        measure: What is measured.
        must: The most that is acceptable.
        aim: What is wished for.
        unit: Of both; ``%`` has figures as shares.
        none: Whether an aim stands for "none": as little as the timers resolve.
    """

    measure: str
    must: float
    aim: float
    unit: str
    none: bool = False

    def shown(self, value: float) -> str:
        """Return a figure with its unit."""
        if self.unit == "%":
            return f"{100 * value:.2f} %"
        if self.unit == "ms":
            return f"{value:.0f} ms"
        return f"{value:.1f} bytes" if self.unit == "bytes" else f"{value:.4f}"

    def verdict(self, value: float) -> str:
        """Return which of the two limits a figure keeps."""
        if value <= self.aim:
            return "aim reached"
        return "must reached" if value <= self.must else "missed"


LIMITS = {
    "ViT-tiny": Limit(measure="added to a step, ViT-tiny", must=0.04, aim=0.02, unit="%"),
    "ResNet-32": Limit(measure="added to a step, ResNet-32", must=0.003, aim=0.001, unit="%"),
    "memory": Limit(measure="extra memory per prunable parameter, N = 3", must=12, aim=9, unit="bytes"),
    "growth": Limit(measure="growth of step cost from N = 1 to N = 8", must=0.005, aim=0.0005, unit="%", none=True),
    "update": Limit(measure="one mask update, ResNet-50 size", must=600, aim=250, unit="ms"),
    "runs": Limit(measure="whole run for 3 sub-nets / for one sparse net", must=1.03, aim=1.01, unit=""),
}


def added(step: Mapping[str, Any], contender: str) -> float:
    """Return the time in a contender's hooks as a share of the plain step."""
    return float(step["contenders"][contender]["hooks_ms"]["all"] / step["plain_ms"])


def growth(step: Mapping[str, Any], many: str = EIGHT_OFF) -> float:
    """Return how much more the hooks take with eight sub-nets than with one, as a share of the plain step."""
    return added(step, many) - added(step, SINGLE)


def measured(results: Results) -> dict[str, float]:
    """Return the figure for each key of `LIMITS` that was measured: the worst over optimizers, networks and states."""
    found: dict[str, float] = {}
    steps = results.get("steps", {})
    for network in NETWORKS:
        mine = [added(step, OURS) for label, step in steps.items() if label.startswith(f"{network},")]
        if mine:
            found[network] = max(mine)
    if steps:
        found["growth"] = max(growth(step) for step in steps.values())
    if "memory" in results:
        found["memory"] = max(states[FINAL]["between"] for states in results["memory"].values())
    if "mask_update" in results:
        found["update"] = max(sum(parts.values()) for parts in results["mask_update"]["ms"].values())
    if "runs" in results:
        found["runs"] = results["runs"]["ratio"]
    return found


def summary(results: Results) -> TextTable:
    """Return the table of all limits with what was measured."""
    found = measured(results)
    rows = []
    for key, limit in LIMITS.items():
        aim = "none" if limit.none else limit.shown(limit.aim)
        value = found.get(key)
        figure = (ABSENT, "not measured") if value is None else (limit.shown(value), limit.verdict(value))
        rows.append((limit.measure, limit.shown(limit.must), aim, *figure))
    return TextTable(title="Limits", columns=("measure", "must", "aim", "measured", ""), rows=tuple(rows))

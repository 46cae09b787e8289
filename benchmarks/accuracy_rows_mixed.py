"""Rows of `accuracy.py` on sub-nets of different patterns in one run: which steps the dense one gets."""

from __future__ import annotations

from typing import Any

from accuracy_runs import SubNet

PATTERNS: tuple[SubNet, ...] = (0.9, "2:4", ("c50", 0.5, "channel"))
WITH_DENSE: tuple[SubNet, ...] = (0.0, *PATTERNS)
PIVOT = {"alternation": "dense_pivot"}
JOINT = {"alternation": "joint"}
EVERY_STEP = {"correction": {"scope": "layer", "first_step": True}}
OFF = {"correction": "off"}

# By name: what it is, the sub-nets, settings of `ASTConfig`, fields of `Row`.
MIXED: dict[str, tuple[str, tuple[SubNet, ...], dict[str, Any], dict[str, Any]]] = {
    "mixed": ("one alternating run, no dense sub-net", PATTERNS, {}, {}),
    "mixed-off": ("the same, correction off", PATTERNS, OFF, {}),
    "mixed-dense": ("the dense one in turn with the others", WITH_DENSE, {}, {}),
    "mixed-pivot": ("`dense_pivot`: the dense one between two others", WITH_DENSE, PIVOT, {}),
    "mixed-pivot-off": ("the same, correction off", WITH_DENSE, {**PIVOT, **OFF}, {}),
    "mixed-pivot-every-step": ("the same, dense steps corrected too", WITH_DENSE, {**PIVOT, **EVERY_STEP}, {}),
    "mixed-dense-2x": ("the dense one in turn, twice the steps", WITH_DENSE, {}, {"share": 2.0}),
    "mixed-pivot-2x": ("`dense_pivot`, twice the steps", WITH_DENSE, PIVOT, {"share": 2.0}),
    "mixed-joint": ("`joint` without the dense one, all the steps", PATTERNS, JOINT, {}),
    "mixed-joint-share": ("`joint` without the dense one, a third of the steps", PATTERNS, JOINT, {"share": None}),
    "mixed-separate": ("trained separately, all the steps each", PATTERNS, {}, {"alone": True}),
}

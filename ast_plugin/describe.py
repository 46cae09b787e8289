"""The table of what is pruned and what is not, before and during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ast_plugin.masks import MaskStore
from ast_plugin.parameters import ParameterChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescriptionRow:
    """One parameter.

    Attributes:
        parameter: Its name in the model.
        shape: Its shape.
        prunable: Whether sub-nets may drop some of its weights.
        reason: Why it is not prunable; empty if it is.
        sparsity: By sub-net, the present fraction of zeros in [0, 1]; empty if it is not prunable.
    """

    parameter: str
    shape: tuple[int, ...]
    prunable: bool
    reason: str
    sparsity: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """All parameters of a model and what becomes of them; ``str()`` of it is a table.

    Attributes:
        sub_nets: Names of the sub-nets.
        rows: One a parameter, in the model's order.
        sparsity: By sub-net, the present fraction of zeros over all prunable weights, in [0, 1].
        prunable_weights: Number of prunable weights.
        total_weights: Number of all weights of the model.
    """

    sub_nets: tuple[str, ...]
    rows: tuple[DescriptionRow, ...]
    sparsity: dict[str, float]
    prunable_weights: int
    total_weights: int

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain containers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return an aligned table: parameter, shape, prunable or why not, sparsity per sub-net."""
        head = ["parameter", "shape", "prunable", *self.sub_nets]
        lines = [head]
        for row in self.rows:
            shape = "x".join(str(size) for size in row.shape) or "scalar"
            figures = [f"{100 * row.sparsity[name]:.2f} %" if row.sparsity else "-" for name in self.sub_nets]
            lines.append([row.parameter, shape, "yes" if row.prunable else f"no: {row.reason}", *figures])
        totals = [f"{100 * self.sparsity[name]:.2f} %" for name in self.sub_nets]
        share = f"{self.prunable_weights:,} of {self.total_weights:,} weights"
        lines.append(["all prunable", share, "", *totals])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def describe(choices: Sequence[ParameterChoice], masks: MaskStore) -> Description:
    """Build the table from what was chosen and the present masks."""
    rows = tuple(
        DescriptionRow(
            parameter=choice.name,
            shape=choice.shape,
            prunable=choice.prunable,
            reason=choice.reason,
            sparsity={name: masks.sparsity(name, choice.name) for name in masks.sub_nets} if choice.prunable else {},
        )
        for choice in choices
    )
    total = 0
    for choice in choices:
        size = 1
        for extent in choice.shape:
            size *= extent
        total += size
    return Description(
        sub_nets=masks.sub_nets,
        rows=rows,
        sparsity={name: masks.sparsity(name) for name in masks.sub_nets},
        prunable_weights=masks.total(),
        total_weights=total,
    )

"""The tables of what is pruned and what is not, before and during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ast_plugin.channels import ChannelGroups
from ast_plugin.masks import MaskStore
from ast_plugin.parameters import ParameterChoice

_NONE: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})


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
class GroupRow:
    """One channel group, or a layer whose channels all sub-nets keep.

    Attributes:
        group: Its name: the path of the module that makes the channels.
        kind: ``channels``, ``hidden`` units or attention ``heads``; empty for a layer that is left whole.
        units: How many there are; 0 for a layer that is left whole.
        kept: By channel sub-net, how many it keeps now.
        reason: Why a layer is left whole; empty for a group.
    """

    group: str
    kind: str
    units: int
    kept: dict[str, int]
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """All parameters of a model and what becomes of them; ``str()`` of it is a table.

    Attributes:
        sub_nets: Names of the sub-nets.
        rows: One a parameter, in the model's order.
        sparsity: By sub-net, the present fraction of zeros over all prunable weights, in [0, 1].
        prunable_weights: Number of prunable weights.
        total_weights: Number of all weights of the model.
        groups: The channel groups and what is left whole, in a run with channel sub-nets.
        computed: How channel sub-nets are computed now, or why not with smaller weights; empty without any.
    """

    sub_nets: tuple[str, ...]
    rows: tuple[DescriptionRow, ...]
    sparsity: dict[str, float]
    prunable_weights: int
    total_weights: int
    groups: tuple[GroupRow, ...] = ()
    computed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain containers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return aligned tables: parameter, shape, prunable or why not, sparsity per sub-net; then channel groups."""
        lines = [["parameter", "shape", "prunable", *self.sub_nets]]
        for row in self.rows:
            shape = "x".join(str(size) for size in row.shape) or "scalar"
            figures = [f"{100 * row.sparsity[name]:.2f} %" if row.sparsity else "-" for name in self.sub_nets]
            lines.append([row.parameter, shape, "yes" if row.prunable else f"no: {row.reason}", *figures])
        totals = [f"{100 * self.sparsity[name]:.2f} %" for name in self.sub_nets]
        share = f"{self.prunable_weights:,} of {self.total_weights:,} weights"
        lines.append(["all prunable", share, "", *totals])
        text = _aligned(lines, last_apart=True)
        if self.groups:
            names = list(dict.fromkeys(name for row in self.groups for name in row.kept))
            found = [row for row in self.groups if not row.reason]
            lines = [["channel group", "kind", "units", *(f"{name} keeps" for name in names)]]
            lines += [[row.group, row.kind, str(row.units), *(str(row.kept[name]) for name in names)] for row in found]
            text += "\n\n" + _aligned(lines)
            if self.computed:
                text += f"\n\nChannel sub-nets are computed {self.computed}."
            whole = [["left whole", "reason"], *([row.group, row.reason] for row in self.groups if row.reason)]
            text += "\n\n" + _aligned(whole) if len(whole) > 1 else ""
        return text


def _aligned(lines: Sequence[Sequence[str]], *, last_apart: bool = False) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths)
    if last_apart:
        text.insert(-1, rule)
    return "\n".join([text[0], rule, *text[1:]])


def describe(
    choices: Sequence[ParameterChoice],
    masks: MaskStore,
    groups: ChannelGroups | None = None,
    kept: Mapping[str, Mapping[str, Tensor]] = _NONE,
    computed: str = "",
) -> Description:
    """Build the tables from what was chosen and the present masks.

    Args:
        choices: The verdict on every parameter.
        masks: The masks.
        groups: The channel groups, where there are any.
        kept: By channel sub-net and group name, which units it keeps, bool (units,).
        computed: How channel sub-nets are computed.
    """
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
        groups=_group_rows(groups, kept) if groups is not None else (),
        computed=computed if groups is not None else "",
    )


def _group_rows(groups: ChannelGroups, kept: Mapping[str, Mapping[str, Tensor]]) -> tuple[GroupRow, ...]:
    found = (
        GroupRow(
            group=group.name,
            kind=group.kind,
            units=group.units,
            kept={name: int(units[group.name].sum()) for name, units in kept.items()},
        )
        for group in groups.groups
    )
    whole = (GroupRow(group=left.name, kind="", units=0, kept={}, reason=left.reason) for left in groups.left_whole)
    return (*found, *whole)

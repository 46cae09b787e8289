"""What each sub-net's masks have to become, and when: settings, patterns and calendars put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ast_plugin.config import ASTConfig
from ast_plugin.patterns import Pattern
from ast_plugin.schedules import MaskCalendar
from ast_plugin.sub_nets import SubNetSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubNetPlan:
    """What one sub-net's masks have to become, and when.

    Attributes:
        name: The sub-net.
        target_sparsity: Sparsity at the end of the schedule, in [0, 1).
        pattern: Which masks are allowed.
        calendar: When updates fall due.
    """

    name: str
    target_sparsity: float
    pattern: Pattern
    calendar: MaskCalendar


def build_plans(
    config: ASTConfig, patterns: Mapping[str, Pattern], calendars: Sequence[MaskCalendar]
) -> tuple[SubNetPlan, ...]:
    """Return one plan a sub-net; a pattern that fixes the sparsity overrides the number given.

    Args:
        config: The run's settings.
        patterns: Pattern by sub-net name.
        calendars: One calendar a sub-net, in the order of the config.
    """
    return tuple(
        SubNetPlan(
            name=spec.name,
            target_sparsity=target_of(spec, patterns[spec.name]),
            pattern=patterns[spec.name],
            calendar=calendar,
        )
        for spec, calendar in zip(config.sub_nets, calendars, strict=True)
    )


def target_of(spec: SubNetSpec, pattern: Pattern) -> float:
    """Return the sparsity that a sub-net is to have at the end, in [0, 1): its pattern's, where that fixes it."""
    return spec.sparsity if pattern.fixed_sparsity is None else pattern.fixed_sparsity

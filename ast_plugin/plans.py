"""What each sub-net's masks have to become, and when: settings, patterns and calendars put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ast_plugin.config import ASTConfig
from ast_plugin.patterns import Pattern
from ast_plugin.schedules import MaskCalendar


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
    plans = []
    for spec, calendar in zip(config.sub_nets, calendars, strict=True):
        fixed = patterns[spec.name].fixed_sparsity
        plans.append(
            SubNetPlan(
                name=spec.name,
                target_sparsity=spec.sparsity if fixed is None else fixed,
                pattern=patterns[spec.name],
                calendar=calendar,
            )
        )
    return tuple(plans)

"""Schedules: sparsity, drop fraction and the calendar of mask updates, as pure functions of the step.

Nothing here keeps state, so a resumed run needs nothing but its step number. Sparsities follow
Zhu and Gupta 2017, equation 1; drop fractions follow Dettmers and Zettlemoyer 2019 and Evci et al. 2020, equation 1.
"""

from __future__ import annotations

import bisect
import dataclasses
import math

from ast_plugin.config import ASTConfig, Moment
from ast_plugin.errors import ConfigError

_LONGEST = 1 << 40  # steps: no run is longer
_TRIED = 100_000  # totals to try one by one for the message of an error


def cubic_sparsity(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Return the sparsity of the cubic ramp (Zhu and Gupta 2017, equation 1): fast at first, then slower.

    Args:
        step: Optimizer step, from 0.
        begin: Last step at which the sparsity is `initial`.
        end: First step at which it is `final`.
        initial: Sparsity before the ramp, in [0, 1].
        final: Sparsity after the ramp, in [0, 1].
    """
    if step >= end:
        return final
    return final + (initial - final) * (1 - _progress(step, begin, end)) ** 3


def constant_sparsity(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Return `final` at every step; the other arguments are there so that schedules can be exchanged."""
    del step, begin, end, initial
    return final


def cosine_drop_fraction(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Return the drop fraction of a half cosine from `initial` at `begin` to `final` at `end`.

    Args:
        step: Optimizer step, from 0.
        begin: Last step at which the fraction is `initial`.
        end: First step at which it is `final`.
        initial: Fraction of the kept weights to replace at first, in [0, 1).
        final: The same at the end, in [0, 1).
    """
    if step >= end:
        return final
    return final + (initial - final) * (1 + math.cos(math.pi * _progress(step, begin, end))) / 2


def constant_drop_fraction(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Return `initial` at every step; the other arguments are there so that schedules can be exchanged."""
    del step, begin, end, final
    return initial


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskCalendar:
    """When the masks of one sub-net are to be updated, in optimizer steps of the whole run.

    Updates fall due at ``begin + offset + k * interval`` for k = 0, 1, ... while that is before `end`, and a last one
    at `end`. A sub-net that is not trained at the step itself makes its update at its next own step; if several
    fell due in between, it makes one. So the interval need not be a multiple of the number of sub-nets, and the
    order of the sub-nets may be random.

    Attributes:
        begin: First step of the schedule, at least 0.
        end: Step of the last update, after `begin`.
        interval: Steps between two updates, at least 1.
        offset: How far this sub-net's updates lag behind `begin`, in [0, interval).

    Raises:
        ConfigError: If a value is outside its range.
    """

    begin: int
    end: int
    interval: int
    offset: int

    def __post_init__(self) -> None:
        if self.begin < 0:
            raise ConfigError(f"begin_step must be at least 0, got {self.begin}")
        if self.end <= self.begin:
            raise ConfigError(
                f"end_step must lie after begin_step, got end_step={self.end} and begin_step={self.begin}"
            )
        if self.interval < 1:
            raise ConfigError(f"update_interval must be at least 1 optimizer step, got {self.interval}")
        if not 0 <= self.offset < self.interval:
            raise ConfigError(
                f"offset must lie in [0, update_interval), got offset={self.offset} and update_interval={self.interval}"
            )

    def updates_until(self, step: int) -> int:
        """Return how many updates fall due at steps up to and including `step`."""
        first = self.begin + self.offset
        last_regular = min(step, self.end - 1)
        regular = 0 if last_regular < first else (last_regular - first) // self.interval + 1
        return regular + (step >= self.end)

    def is_due(self, step: int, last_step: int | None) -> bool:
        """Return whether an update fell due since the sub-net was last trained.

        Args:
            step: The sub-net's present step.
            last_step: Its own step before that; None if it was never trained.
        """
        done = 0 if last_step is None else self.updates_until(last_step)
        return self.updates_until(step) > done


def resolve_calendars(config: ASTConfig, sub_nets: int) -> tuple[MaskCalendar, ...]:
    """Turn the moments of a config into one calendar a sub-net, staggered evenly over the interval.

    Args:
        config: Settings with `begin_step`, `end_step`, `update_interval`, `stagger` and `total_steps`.
        sub_nets: How many sub-nets alternate, at least 1.

    Returns:
        One calendar a sub-net; the offset of the i-th is ``i * interval // sub_nets``, or 0 without stagger.

    Raises:
        ConfigError: If a fraction is given without `total_steps`; if the schedule is empty, shorter than the
            interval, or leaves some sub-net no step of its own for the last update. The message names the
            smallest `total_steps` that works, if some does.
    """
    for name in ("begin_step", "end_step", "update_interval"):
        value = getattr(config, name)
        if config.total_steps is None and isinstance(value, float):
            raise ConfigError(
                f"{name}={value:g} is a fraction of total_steps, which is not given; pass total_steps, "
                f"or give {name} as a whole number of optimizer steps"
            )
    total = config.total_steps
    begin, end, interval = (_steps(moment, total) for moment in _moments(config))
    interval = max(interval, 1)
    problem = _problem(config, sub_nets, total)
    if problem is not None:
        smallest = None if total is None else _smallest_total(config, sub_nets)
        if total is not None and smallest is not None and smallest > total:
            problem += f"; the smallest total_steps that works with these settings is {smallest}"
        raise ConfigError(problem)
    return tuple(
        MaskCalendar(begin=begin, end=end, interval=interval, offset=i * interval // sub_nets if config.stagger else 0)
        for i in range(sub_nets)
    )


def _progress(step: int, begin: int, end: int) -> float:
    return 0.0 if step <= begin else (step - begin) / (end - begin)


def _moments(config: ASTConfig) -> tuple[Moment, Moment, Moment]:
    return config.begin_step, config.end_step, config.update_interval


def _steps(moment: Moment, total: int | None) -> int:
    return round(moment * total) if isinstance(moment, float) and total is not None else int(moment)


def _problem(config: ASTConfig, sub_nets: int, total: int | None) -> str | None:
    """Return what is wrong with the schedule in a run of `total` steps, with the remedy; None if nothing is."""
    begin, end, interval = (_steps(moment, total) for moment in _moments(config))
    interval = max(interval, 1)
    begin_shown = _shown("begin_step", config.begin_step, f"step {begin}")
    end_shown = _shown("end_step", config.end_step, f"step {end}")
    run = "" if total is None else f" with total_steps={total}"
    if end <= begin:
        return (
            f"end_step must lie after begin_step, got {end_shown} and {begin_shown}{run}; "
            "raise end_step or lower begin_step"
        )
    if total is not None and end > total - sub_nets:
        remedy = f"; lower end_step to at most {total - sub_nets}" if total - sub_nets > begin else ""
        return (
            f"total_steps={total} is too small for {end_shown}: after it each of the {sub_nets} sub-nets needs a step "
            f"of its own for its last mask update{remedy}"
        )
    if interval > end - begin:
        return (
            f"{_shown('update_interval', config.update_interval, f'{interval} steps')} is longer than the mask "
            f"schedule from {begin_shown} to {end_shown}{run}; lower update_interval, or move begin_step and "
            "end_step apart"
        )
    return None


def _shown(name: str, moment: Moment, resolved: str) -> str:
    return f"{name}={moment} ({resolved})" if isinstance(moment, float) else f"{name}={moment}"


def _smallest_total(config: ASTConfig, sub_nets: int) -> int | None:
    """Return the smallest `total_steps` without a problem; None if there is none, or none within reach."""
    moments = _moments(config)

    def fits(total: int) -> bool:
        begin, end, interval = (_steps(moment, total) for moment in moments)
        return end > begin and end <= total - sub_nets and max(interval, 1) <= end - begin

    # With every step more, `end` moves by one at most, so once each sub-net has its step after it, it keeps it.
    enough = range(1, _LONGEST + 1)
    low = bisect.bisect_left(enough, True, key=lambda total: _steps(moments[1], total) <= total - sub_nets) + 1
    # The other two conditions may come and go by a step where two moments are rounded, so there every total is tried.
    begin, end, interval = (_line(moment) for moment in moments)
    high = low
    for slope, constant in (
        (end[0] - begin[0], end[1] - begin[1] - 1),
        (end[0] - begin[0] - interval[0], end[1] - begin[1] - interval[1]),
    ):
        # Each reads slope * total + constant >= 0, give or take the rounding to whole steps (below 2 in all).
        if slope > 1e-12:
            low = max(low, math.floor((-constant - 2) / slope))
            high = max(high, math.ceil((2 - constant) / slope))
        elif constant < -2:
            return None
    # A schedule that rounds to nothing (slopes near 0) would make the range huge; nobody trains that long.
    return next((total for total in range(low, min(max(low, high), low + _TRIED) + 1) if fits(total)), None)


def _line(moment: Moment) -> tuple[float, float]:
    return (moment, 0.0) if isinstance(moment, float) else (0.0, float(moment))

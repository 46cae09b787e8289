"""When tickets are made: cycles of equal length at the end of a run, as pure functions of the step.

Source: Yin et al.: "Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training",
UAI 2022, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

from ast_plugin.errors import ConfigError

OWN_STEPS = 3  # of every sub-net in every cycle: its exploration at the low rate, the high rate, the low rate again


@dataclasses.dataclass(frozen=True, kw_only=True)
class TicketCalendar:
    """The last cycles of a run, in optimizer steps of the whole run.

    Steps of the share that the number of cycles does not divide stay with the part before the cycles.

    Attributes:
        begin: First step of the first cycle.
        length: Steps of a cycle.
        cycles: How many there are.
    """

    begin: int
    length: int
    cycles: int

    @classmethod
    def of(cls, total_steps: int | None, *, cycles: int, share: float) -> TicketCalendar:
        """Return the calendar of a run.

        Args:
            total_steps: Optimizer steps of the run.
            cycles: How many cycles there are, at least 1.
            share: Which last part of the run they take, in (0, 1).

        Raises:
            ConfigError: If the run has no known end, or not a step for each cycle.
        """
        if total_steps is None:
            raise ConfigError(
                f"sup_tickets takes the last share of the run (share={share:g}), and total_steps is not given; pass "
                "total_steps"
            )
        length = round(share * total_steps) // cycles
        if length < 1:
            raise ConfigError(_too_short(cycles, share, total_steps, length, "not one for each cycle"))
        return cls(begin=total_steps - cycles * length, length=length, cycles=cycles)

    @property
    def end(self) -> int:
        """The step after the last one of the last cycle: the end of the run."""
        return self.begin + self.cycles * self.length

    def cycle_at(self, step: int) -> int | None:
        """Return which cycle a step belongs to, from 0; None outside of all."""
        return (step - self.begin) // self.length if self.begin <= step < self.end else None

    def height_at(self, step: int) -> float | None:
        """Return how high the rate is, from 0 (low) over 1 (high) to 0 in a straight line; None outside of all cycles.

        The first and the last step of a cycle are low. Where a cycle has an even number of steps, the two in its middle
        are equally high, and a little below 1.
        """
        cycle = self.cycle_at(step)
        if cycle is None:
            return None
        if self.length == 1:
            return 0.0
        position = (step - self.begin - cycle * self.length) / (self.length - 1)
        return 1 - abs(2 * position - 1)

    def ticket_after(self, step: int) -> int | None:
        """Return the number of the ticket, from 1, that is finished when this step is; None if none is."""
        cycle = self.cycle_at(step)
        return None if cycle is None or self.cycle_at(step + 1) == cycle else cycle + 1

    def explores(self, step: int, last_step: int | None) -> bool:
        """Return whether this is a sub-net's first step in its cycle.

        Args:
            step: The sub-net's present step.
            last_step: Its own step before that; None if it was never trained.
        """
        cycle = self.cycle_at(step)
        return cycle is not None and (last_step is None or last_step < self.begin + cycle * self.length)

    def own_steps(
        self, cycle: int, names: Sequence[str], trained_at: Callable[[int], Collection[str]], *, enough: int
    ) -> dict[str, int]:
        """Return how many steps of a cycle train each sub-net, counted until all have enough.

        Args:
            cycle: Which cycle, from 0.
            names: The sub-nets.
            trained_at: Returns the sub-nets that a step trains.
            enough: At which number counting may end.
        """
        first = self.begin + cycle * self.length
        counts = dict.fromkeys(names, 0)
        for step in range(first, first + self.length):
            for name in trained_at(step):
                counts[name] += 1
            if min(counts.values()) >= enough:
                break
        return counts

    def check(
        self,
        names: Sequence[str],
        trained_at: Callable[[int], Collection[str]],
        *,
        share: float,
        schedule_end: int | None,
    ) -> None:
        """Make sure that every sub-net has time for what it has to do before the cycles and in each of them.

        Args:
            names: The sub-nets.
            trained_at: Returns the sub-nets that a step trains.
            share: What the user asked for, for messages.
            schedule_end: First step at which the mask schedule is over; None where masks follow none.

        Raises:
            ConfigError: If a cycle is too short, or the mask schedule reaches into the first.
        """
        for cycle in range(self.cycles):
            counts = self.own_steps(cycle, names, trained_at, enough=OWN_STEPS)
            if min(counts.values()) < OWN_STEPS:
                name = min(counts, key=lambda name: counts[name])
                if not any(name in trained_at(step) for step in range(self.begin, self.end)):
                    raise ConfigError(
                        f"sup_tickets averages every sub-net at the end of each cycle, and the alternation trains "
                        f"sub-net {name!r} at no step of them (share={share:g}, {self.end - self.begin} steps); choose "
                        "another alternation, or train that sub-net in a run of its own"
                    )
                what = f"in cycle {cycle + 1} sub-net {name!r} is trained {counts[name]} times, and needs {OWN_STEPS}"
                raise ConfigError(_too_short(self.cycles, share, self.end, self.length, what))
        if schedule_end is None:
            return
        missing = set(names)
        for step in reversed(range(schedule_end, self.begin)):
            missing.difference_update(trained_at(step))
            if not missing:
                return
        raise ConfigError(
            f"end_step falls on step {schedule_end} of total_steps={self.end}, and the cycles of sup_tickets "
            f"(share={share:g}) begin at step {self.begin}: before that every sub-net needs a step of its own for its "
            f"last scheduled mask update; lower end_step (to .5, for example), or share"
        )


def _too_short(cycles: int, share: float, total_steps: int, length: int, what: str) -> str:
    steps = round(share * total_steps)
    return (
        f"share={share:g} of total_steps={total_steps} is {steps} steps, and leaves no room for cycles={cycles} of "
        f"sup_tickets ({length} steps each): {what}; raise share or total_steps, or lower cycles"
    )

"""What a user can choose of sup-tickets, checked."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import is_number

MOST = 255  # tickets, as a byte counts them


@dataclasses.dataclass(frozen=True, kw_only=True)
class TicketSettings:
    """The settings of `SupTickets`, which describes them.

    Raises:
        ConfigError: If a value is outside its range.
    """

    cycles: int = 3
    share: float = 0.1
    lr: tuple[float, float] | None = None
    explore: float = 0.5

    def __post_init__(self) -> None:
        freeze = object.__setattr__
        if (
            isinstance(self.cycles, bool)
            or not isinstance(self.cycles, numbers.Integral)
            or not 1 <= self.cycles <= MOST
        ):
            raise ConfigError(f"cycles of sup_tickets must be a number of tickets in [1, {MOST}], got {self.cycles!r}")
        freeze(self, "cycles", int(self.cycles))
        if not is_number(self.share) or not 0 < self.share < 1:
            raise ConfigError(f"share of sup_tickets must lie in (0, 1), got {self.share!r}; .1 is the usual one")
        freeze(self, "share", float(self.share))
        freeze(self, "lr", None if self.lr is None else _rates(self.lr))
        if not is_number(self.explore) or not 0 <= self.explore < 1:
            raise ConfigError(f"explore of sup_tickets must lie in [0, 1), got {self.explore!r}")
        freeze(self, "explore", float(self.explore))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain containers."""
        return {**dataclasses.asdict(self), "lr": None if self.lr is None else list(self.lr)}


def _rates(value: Any) -> tuple[float, float]:
    try:
        low, high = value
    except (TypeError, ValueError):
        low = high = None
    legal = is_number(low) and is_number(high) and math.isfinite(high) and 0 < low <= high
    if low is None or high is None or not legal:
        raise ConfigError(
            f"lr of sup_tickets must be two rates, low and high, with 0 < low <= high, got {value!r}; (.001, .005) is "
            "usual in a run at .1, and None takes 1 % and 5 % of the run's own"
        )
    return float(low), float(high)

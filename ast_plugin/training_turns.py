"""What a run says of whose turn it is."""

from __future__ import annotations

from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import is_number
from ast_plugin.training_extension import ExtendedRun


class TurnTakingRun(ExtendedRun):
    """The part of a controller that tells which sub-nets are trained when."""

    @property
    def active(self) -> str:
        """The sub-net chosen by ``with sub_net(...)``, or else the one that the next step trains, the first of several.

        In a closure that runs once for each of several sub-nets it is the one that it runs for.
        """
        return self._events.chosen or self._step.scheduled

    @property
    def chosen(self) -> str | None:
        """The sub-net of the innermost ``with sub_net(...)`` that is open; None outside of any."""
        return self._events.chosen

    @property
    def step(self) -> int:
        """Optimizer steps that have happened."""
        return self._step.number

    @property
    def needs_closure(self) -> bool:
        """Whether steps train several sub-nets, so that each needs ``optimizer.step(closure)``."""
        return self._step.needs_closure

    def sub_nets_at(self, step: int) -> tuple[str, ...]:
        """Return the sub-nets that a step trains: one, or from the densest to the sparsest those it trains together.

        Args:
            step: Optimizer step, from 0.

        Raises:
            ConfigError: If it is no such number.
        """
        if not is_number(step) or step != int(step) or step < 0:
            raise ConfigError(f"step must be a whole number from 0, got {step!r}")
        return self._step.sub_nets_at(int(step))

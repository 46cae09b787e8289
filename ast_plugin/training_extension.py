"""What a run offers to plugins that do more than watch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ast_plugin.errors import ConfigError
from ast_plugin.step_updates import UpdateRule
from ast_plugin.training_sampling import SampledRun


class ExtendedRun(SampledRun):
    """The part of a controller that plugins extend a run by."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._cleanups: list[Callable[[], object]] = []

    def add_cleanup(self, callback: Callable[[], object]) -> None:
        """Have something undone when the run ends: hooks of a plugin's own, settings that it changed.

        Args:
            callback: Called without arguments, once: at the end of `detach`, or where `ast_plugin.wrap` fails after a
                plugin has asked for it. The last that was added is called first; all are, also where one raises.

        Raises:
            ConfigError: If it cannot be called.
        """
        if not callable(callback):
            raise ConfigError(f"callback must be a function without arguments, got {callback!r}")
        self._cleanups.append(callback)

    def add_mask_updates(self, rule: UpdateRule) -> None:
        """Have masks updated at further steps than those of the method's own calendar.

        Such an update is like any other: by the method's scores, to the sparsity that the schedule asks for at that
        step, with the dense gradient where the method grows by it. Rules are part of no saved state: add them again
        where the run is resumed, which a plugin does when it hears of the run's beginning.

        Args:
            rule: Asked before every step with the name of the sub-net that trains, the step from 0, and the step at
                which that sub-net was trained before (None: never). It returns the share of the kept weights of each
                layer to replace, in [0, 1), or None for no update. Where several rules, or a rule and the calendar, ask
                for one, the largest share counts. It must be a pure function of its arguments: it is asked again for a
                step that was skipped, and on every rank. Methods that make no mask updates do not ask it.

        Raises:
            ConfigError: If it cannot be called; in the course of the run, if it returns something else.
        """
        self._step.rules.add(rule)

    @property
    def updates_masks(self) -> bool:
        """Whether the method makes mask updates: on its own calendar, and where `add_mask_updates` asks for more."""
        return self._parts.method.updates

    def trained_at(self, step: int) -> tuple[str, ...]:
        """Return the sub-nets that a step trains: one, or several where the alternation puts them into one step.

        Args:
            step: Optimizer step of the run, from 0; also one that has not come yet.
        """
        alternation, names = self._parts.alternation, self._parts.names
        several = getattr(alternation, "sub_nets_at", None)
        return tuple(names[i] for i in ((alternation.sub_net_at(step),) if several is None else several(step)))

    def _clean_up(self) -> None:
        callbacks, self._cleanups = self._cleanups, []
        with contextlib.ExitStack() as stack:
            for callback in callbacks:
                stack.callback(callback)

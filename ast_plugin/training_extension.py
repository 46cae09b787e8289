"""What a run offers to plugins that do more than watch it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.named_tensors import checked_masks, checked_tensors
from ast_plugin.sharding import full
from ast_plugin.step_updates import UpdateRule
from ast_plugin.sub_nets import check_sub_net
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

    def masks_by_score(
        self, name: str, scores: Mapping[str, Tensor], *, within: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return masks for a sub-net that are chosen by scores from outside; the run stays as it is.

        As many weights are kept as the sub-net keeps now, of a pattern with larger units as many units. Those with the
        highest scores are: one threshold goes for all parameters (for all channel groups), as in the distribution
        ``global``, as far as the pattern leaves the choice. A unit has the mean score of its weights. Equal scores go
        to the lower index, no layer loses its last weight unless ``allow_empty_layers`` says so, and where units differ
        in size, the number of weights is right to within half a unit.

        Args:
            name: One of `sub_nets`.
            scores: By the names of `masks`, floating-point tensors of the weights' shapes, one score a weight. Sharded
                ones are gathered: a collective.
            within: Masks of weights that go before all others, whatever their scores, by the same names: those of a
                denser channel sub-net, for masks that lie in them. None for none.

        Returns:
            By parameter name, bool masks of the weights' shapes, True = kept, on the devices of the scores.

        Raises:
            ConfigError: If there is no such sub-net, or scores or `within` do not fit the parameters, or are NaN.
        """
        check_sub_net(name, self._parts.names)
        shapes = self._parts.masks.shapes
        whole = {key: full(tensor).detach() for key, tensor in checked_tensors("scores", scores, shapes).items()}
        for key, tensor in whole.items():
            if not tensor.is_floating_point() or bool(tensor.isnan().any()):
                found = "NaN among them" if tensor.is_floating_point() else str(tensor.dtype)
                raise ConfigError(f"scores of {key!r} must be floating-point numbers without NaN, got {found}")
        first = None
        if within is not None:
            first = {key: full(mask) for key, mask in checked_masks("within", within, shapes).items()}
        return self._parts.updater.by_score(name, whole, within=first)

    def _clean_up(self) -> None:
        callbacks, self._cleanups = self._cleanups, []
        with contextlib.ExitStack() as stack:
            for callback in callbacks:
                stack.callback(callback)

"""What a run offers where there are other values for its sub-nets than the last ones: versions, and their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import check_sub_net
from ast_plugin.training_turns import TurnTakingRun
from ast_plugin.versions import Provider


class VersionedRun(TurnTakingRun):
    """The part of a controller that knows versions.

    Args:
        *parts: As for the part that this one extends.
        figures: Measured figures by version, by sub-net, by name.
    """

    def __init__(self, *parts: Any) -> None:
        *others, figures = parts
        super().__init__(*others)
        self._figures: dict[str, dict[str, dict[str, float]]] = figures

    def add_version(self, name: str, provider: Provider, *, preferred: bool = False) -> None:
        """Offer other values for the sub-nets of this run, such as an average of what it went through.

        Args:
            name: How the version is asked for.
            provider: Returns the `ast_plugin.versions.Version` as it is now, the same object until there is a newer
                one, or None while there is none. It is asked often.
            preferred: Whether `save` writes this version unless told otherwise; of several the one added last.

        Raises:
            ConfigError: If the name is taken, the provider cannot be called, or parameters are sharded.
        """
        self._events.versions.add(name, provider, preferred=preferred)

    @property
    def versions(self) -> tuple[str, ...]:
        """Names of the versions that there are now: ``last``, which is what is being trained, and those of plugins."""
        return self._events.versions.available

    @property
    def preferred_version(self) -> str:
        """The version that `save` writes unless told otherwise."""
        return self._events.versions.preferred

    @contextlib.contextmanager
    def version(self, name: str) -> Iterator[nn.Module]:
        """Have the model, its masks and private BatchNorm state be a version's for the length of a ``with`` block.

        Everything that looks at the run then finds that version: `sub_net`, `materialize`, `masks`, `private_state`,
        `recalibrate`, `metrics`, `add_report_metric`, exports, reports. Training does not go on inside: steps, training
        forwards, loading, `save_checkpoint` and `detach` are refused. Afterwards weights, masks, BatchNorm, optimizer
        state and the global random generators are what they were, bit for bit, also after an exception. BatchNorm
        statistics that were estimated anew inside stay with the version.

        The state of the run, and so of the optimizer, is that of the run inside, too. Blocks may be nested, in one
        another and with `sub_net`. A backward pass through a forward that came before the block is refused by autograd.

        Args:
            name: One of `versions`.

        Yields:
            The model, dense, of that version.

        Raises:
            ConfigError: If there is no such version now, or it does not fit the run.
            ActivationError: In the middle of a forward or backward pass, or if the model was wrapped anew.
        """
        with self._events.version(name):
            yield self._parts.model

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """What `add_report_metric` was told of the version that is on: by sub-net, by metric name."""
        return self._figures.get(self._events.versions.on) or {name: {} for name in self._parts.names}

    def add_report_metric(self, name: str, value: float, *, sub_net: str) -> None:
        """Note a measured figure for the report and the elastic file; inside ``with version(...)``, of that version.

        Args:
            name: What was measured, for example ``accuracy``.
            value: The figure; a later one replaces an earlier one.
            sub_net: The sub-net that it was measured on.

        Raises:
            ConfigError: If there is no such sub-net, or the value is no number.
        """
        check_sub_net(sub_net, self._parts.names)
        empty: dict[str, dict[str, float]] = {known: {} for known in self._parts.names}
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"value of metric {name!r} must be a number, got {value!r}") from None
        self._figures.setdefault(self._events.versions.on, empty)[sub_net][str(name)] = number

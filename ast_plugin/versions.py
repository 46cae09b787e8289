"""Versions: other values for the sub-nets of a run, put on its model for a while and taken off without a trace.

An average of what the run went through, for example. A version holds weights, masks and private BatchNorm state of its
own. They change places with the run's, tensor by tensor and in place, so that optimizers, compiled graphs and hooks
keep seeing the same tensors, and no second copy of the model is made: as long as a version is on, its tensors hold the
values of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.masks import HeldMasks
from ast_plugin.named_tensors import checked_masks, checked_tensors
from ast_plugin.parts import RunParts
from ast_plugin.tensor_exchange import TensorExchange, WeightExchange, copied

LAST = "last"
"""The version that is always there: what is being trained."""

_ATTEMPTS = 5  # more interrupts than anybody sends in the milliseconds that it takes


@dataclasses.dataclass(eq=False)
class Version:
    """Values for the sub-nets of a run. What is left out is that of the run.

    The tensors may lie on any device. Those of `weights` change places with the model's where they have its dtypes;
    they must not be written to, nor read, while the version is on. What changes on the model meanwhile stays with the
    version: recalibrated BatchNorm statistics are in `private` afterwards, or in `weights` where sub-nets share them.

    Attributes:
        weights: By the names of the bare model, shared parameters and persistent buffers, dense, in the model's shapes.
        masks: By sub-net, the masks of all prunable parameters by name: bool, True = kept.
        private: By sub-net, its BatchNorm tensors, named as `AlternatingSparseTraining.private_state` does.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Mapping[str, Tensor]]
    private: Mapping[str, Mapping[str, Tensor]]


Provider = Callable[[], Version | None]
"""Returns a version as it is now, None while there is none; cheap, because it is asked often."""


class Versions:
    """The versions of one run, and which of them the model has.

    Args:
        parts: The run's components.
    """

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._providers: dict[str, Provider] = {}
        self._preferred: list[str] = []
        self._blocks: list[tuple[str, _Worn | None]] = []

    def add(self, name: str, provider: Provider, *, preferred: bool) -> None:
        """Offer a version.

        Args:
            name: Its name.
            provider: Returns it.
            preferred: Whether it is what is saved when nobody says which; of several the one that was added last.

        Raises:
            ConfigError: If the name is taken, the provider cannot be called, or parameters are sharded.
        """
        if not isinstance(name, str) or not name or name in (LAST, *self._providers):
            taken = ", ".join(map(repr, (LAST, *self._providers)))
            raise ConfigError(f"name of a version must be a non-empty string other than {taken}, got {name!r}")
        if not callable(provider):
            raise ConfigError(f"provider must be a function that returns a Version or None, got {provider!r}")
        if self._parts.sharded:
            raise ConfigError(
                f"version {name!r} would put whole weights on a model of which every rank holds a part; train with "
                "DistributedDataParallel, or without versions"
            )
        self._providers[name] = provider
        if preferred:
            self._preferred.append(name)

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the versions that there are now, the last one first."""
        return (LAST, *(name for name in self._providers if self._asked(name) is not None))

    @property
    def preferred(self) -> str:
        """The one that is saved when nobody says which."""
        return next((name for name in reversed(self._preferred) if self._asked(name) is not None), LAST)

    @property
    def on(self) -> str:
        """The one that the model has now."""
        return self._blocks[-1][0] if self._blocks else LAST

    @property
    def open(self) -> str | None:
        """The one of the innermost block that is open, None outside of any."""
        return self._blocks[-1][0] if self._blocks else None

    def check(self, name: str) -> None:
        """Refuse a name of no version that there is now.

        Raises:
            ConfigError: If there is none; the message has those that there are.
        """
        if name == LAST or (name in self._providers and self._asked(name) is not None):
            return
        later = " yet, or any more" if name in self._providers else ""
        raise ConfigError(f"there is no version {name!r}{later}: {near_names(str(name), self.available)}")

    @contextlib.contextmanager
    def put_on(self, name: str) -> Iterator[None]:
        """Give the model, which is at rest, the values of a version for the length of a block.

        Raises:
            ConfigError: If there is no such version, or it does not fit the run; nothing has changed then.
        """
        self.check(name)
        version = None if name == LAST else self._asked(name)
        with self.off():
            worn = None if version is None else _Worn(self._parts, name, version)
            self._blocks.append((name, worn))
            try:
                if worn is not None:
                    worn.exchange(True)
                yield
            finally:
                try:
                    if worn is not None:
                        worn.take_off()
                finally:
                    self._blocks.pop()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Give the model, which is at rest, the run's own values for a moment."""
        worn = self._blocks[-1][1] if self._blocks else None
        if worn is None:
            yield
            return
        try:
            worn.exchange(False)
            yield
        finally:
            _surely(worn.exchange, True)

    def _asked(self, name: str) -> Version | None:
        version = self._providers[name]()
        if version is not None and not isinstance(version, Version):
            raise ConfigError(
                f"the provider of version {name!r} must return a Version or None, got {type(version).__name__}"
            )
        return version


class _Worn:
    """A version that is on the model, or off it for a moment.

    Args:
        parts: The run's components; the model is at rest and has the run's own values.
        name: The version's name, for messages.
        version: The version.

    Raises:
        ConfigError: If it does not fit the run.
    """

    def __init__(self, parts: RunParts, name: str, version: Version) -> None:
        self._version = version
        self._masks, self._normalization = parts.masks, parts.normalization
        for what in ("masks", "private"):
            _check_sub_nets(f"{what} of version {name!r}", getattr(version, what), parts.names)
        self._their_masks = {
            sub_net: checked_masks(f"masks of {sub_net!r} in version {name!r}", masks, parts.masks.shapes)
            for sub_net, masks in version.masks.items()
        }
        self._own_masks: dict[str, HeldMasks] = {sub_net: parts.masks.held(sub_net) for sub_net in version.masks}
        present = zip(parts.normalization.names, parts.normalization.held(parts.default), strict=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in present}
        self._others: dict[str, list[Tensor]] = {}  # copies: as small as BatchNorm is
        for sub_net in parts.names:
            held = given = parts.normalization.held(sub_net)
            if sub_net in version.private:
                what = f"private tensors of {sub_net!r} in version {name!r}"
                given = list(checked_tensors(what, version.private[sub_net], shapes).values())
            self._others[sub_net] = [copied(tensor, like) for tensor, like in zip(given, held, strict=True)]
        self._private = TensorExchange(
            lambda: [tensor for sub_net in parts.names for tensor in parts.normalization.held(sub_net)],
            [tensor for tensors in self._others.values() for tensor in tensors],
        )
        self._weights = WeightExchange(
            parts.bare, version.weights, f"weights of version {name!r}", private=parts.normalization.names
        )

    def exchange(self, on: bool) -> None:
        """Have the model hold the version's values, or the run's own; may be repeated after an interrupt."""
        with torch.inference_mode(False), torch.no_grad():
            self._weights.exchange(on)
            for sub_net, own in self._own_masks.items():
                if on:
                    self._masks.replace(sub_net, self._their_masks[sub_net])
                else:
                    self._masks.put_back(sub_net, own)
            self._private.exchange(on)
        torch.clear_autocast_cache()  # it has low-precision copies of weights

    def take_off(self) -> None:
        """Give the model the run's own values for good, and the version what has changed meanwhile."""
        try:
            self._hand_back()
        finally:
            _surely(self.exchange, False)

    def _hand_back(self) -> None:
        if not self._private.is_complete:  # an error came before all of it was there
            return
        private = dict(self._version.private)
        for sub_net, own in self._others.items():
            held = self._normalization.held(sub_net)
            if sub_net in private or not all(torch.equal(a.to(b), b) for a, b in zip(held, own, strict=True)):
                private[sub_net] = self._normalization.state(sub_net)
        self._version.private = private
        changed = self._weights.changed()
        if changed:
            self._version.weights = {**self._version.weights, **changed}


def _check_sub_nets(what: str, given: Any, sub_nets: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be a mapping from names of sub-nets, got {type(given).__name__}")
    for name in given:
        if name not in sub_nets:
            raise ConfigError(f"{what} are for {name!r}, which is no sub-net: {near_names(str(name), sub_nets)}")


def _surely(exchange: Callable[[bool], None], on: bool) -> None:
    """Make an exchange, again where interrupts cut it off, and raise the first of them when it is made."""
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            exchange(on)
            break
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first

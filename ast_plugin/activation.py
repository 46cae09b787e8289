"""Puts a sub-net on a model and takes it off again.

Masked today: dropped weights are zeroed in place, the dense values wait in a copy. In place, because compiled graphs,
FSDP and activation checkpointing all keep looking at the same tensor; swapping ``param.data`` fails there without a
word. A channel sub-net that computes with physically smaller weights is another `Activation` with the same
methods.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import Pack
from ast_plugin.sharding import reshard


class Activation(Protocol):
    """A way to make the model compute as one of its sub-nets."""

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""

    def put_on(self, sub_net: str) -> None:
        """Make the model compute as `sub_net`; another one that is on is taken off first."""

    def take_off(self) -> None:
        """Give the model its dense weights back; does nothing when it has them."""

    def release(self) -> None:
        """Take the sub-net off and free what is kept for putting one on."""


class MaskedActivation:
    """Zeros in place of dropped weights, and the sub-net's private normalisation.

    Args:
        masks: The masks and the parameters they belong to.
        normalization: The private normalisation state.
    """

    def __init__(self, masks: PackedMasks, normalization: PrivateNormalization) -> None:
        self._masks = masks
        self._normalization = normalization
        self._covered: list[Pack] = []
        self._worn: str | None = None
        self._complete = False  # nothing of it has been taken off by a call that was cut off

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""
        return self._worn

    def is_on(self, sub_net: str) -> bool:
        """Return whether all of `sub_net` is on the model."""
        return self._worn == sub_net and self._complete

    def put_on(self, sub_net: str) -> None:
        """Zero the weights that `sub_net` drops and bring in its normalisation state, in place."""
        if self.is_on(sub_net):
            return
        self.take_off()
        self._worn = sub_net
        try:
            # Copies made under inference_mode could never take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                for pack in self._masks.refresh():
                    parameters = self._masks.parameters(pack)
                    kept = self._masks.kept(sub_net, pack, parameters)
                    if not kept.everything:
                        pack.set_aside(parameters)
                        self._covered.append(pack)
                        pack.put_masked(kept, parameters)
                self._normalization.carry(sub_net)
            _forget_autocast_copies()
            self._complete = True
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        """Copy the dense weights back in place and bring in the default's normalisation state."""
        if self._worn is None:
            return
        self._complete = False
        with torch.inference_mode(False), torch.no_grad():
            while self._covered:
                pack = self._covered[-1]
                pack.bring_back(self._masks.parameters(pack))
                self._covered.pop()
                pack.let_go()
            self._normalization.carry(self._normalization.default)
        self._worn = None
        _forget_autocast_copies()

    def release(self) -> None:
        """Take the sub-net off and free the copies."""
        self.take_off()
        for pack in self._masks.packs:
            pack.free()


class ShardedActivation(MaskedActivation):
    """The same on the parts of the weights that this rank holds.

    Args:
        masks: The masks of the parts, and the parts they belong to.
        normalization: The private normalisation state.
        model: The model, of which FSDP modules may hold gathered copies of the weights.
    """

    def __init__(self, masks: PackedMasks, normalization: PrivateNormalization, model: nn.Module) -> None:
        super().__init__(masks, normalization)
        self._model = model

    def put_on(self, sub_net: str) -> None:
        """Put a sub-net on; copies that were gathered before are dropped."""
        if not self.is_on(sub_net):
            reshard(self._model)
            super().put_on(sub_net)

    def take_off(self) -> None:
        """Take the sub-net off; copies that were gathered of it are dropped."""
        if self.worn is not None:
            reshard(self._model)
            super().take_off()


def _forget_autocast_copies() -> None:
    # Autocast keeps low-precision copies of weights; within one autocast block they would outlive a switch.
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()

"""Puts a sub-net on a model and takes it off again.

Masked: dropped weights are zeroed in place, the dense values wait in a copy. In place, because compiled graphs,
FSDP and activation checkpointing all keep looking at the same tensor; swapping ``param.data`` fails there without a
word. A channel sub-net that computes with physically smaller weights is another `Activation` with the same
methods, `ast_plugin.sliced_activation`.
"""

from __future__ import annotations

import enum
from typing import Protocol

import torch
from torch import nn

from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import Pack
from ast_plugin.sharding import reshard
from ast_plugin.sliced_probes import ProbeMasks
from ast_plugin.sliced_tensors import Small


class Form(enum.Enum):
    """What a sub-net is put on for.

    Attributes:
        COMPUTE: The model has to compute as the sub-net.
        SHOW: And its parameters have to hold the sub-net's values.
        PROBE: The model has to compute as the sub-net with whole rows, so that gradients at dropped channels are those
            that a mask update compares.
    """

    COMPUTE = "compute"
    SHOW = "show"
    PROBE = "probe"


class Activation(Protocol):
    """A way to make the model compute as one of its sub-nets."""

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""

    @property
    def form(self) -> Form:
        """What it is on for."""

    @property
    def small(self) -> Small | None:
        """Smaller weights that stand in for the model's own, None where none do."""

    def put_on(self, sub_net: str, form: Form = Form.COMPUTE, *, small: Small | None = None) -> None:
        """Make the model compute as `sub_net`; another one that is on is taken off first.

        Args:
            sub_net: A sub-net's name.
            form: What for.
            small: The smaller weights that stood in at an earlier moment that is brought back.
        """

    def is_on(self, sub_net: str, form: Form = Form.COMPUTE) -> bool:
        """Return whether all of `sub_net` is on the model, in a way that serves `form`."""

    def take_off(self) -> None:
        """Give the model its dense weights back; does nothing when it has them."""

    def refresh(self, *, compiling: bool) -> None:
        """A forward is about to run: have what stands in for the model's weights follow them.

        Args:
            compiling: Whether it is compiled or traced, so that nothing may stand in.
        """

    def show(self) -> None:
        """Have the parameters hold the sub-net's values, for whoever reads them, and nothing stand in for them."""

    def hide(self, hidden: bool) -> None:
        """Have nothing stand in for a while, because others stand in for the model's tensors; or have it back."""

    def deliver(self) -> None:
        """Add gradients of what stood in for parameters to the parameters' own."""

    def deliver_at_once(self, small: Small | None) -> None:
        """Do so from now on whenever a gradient of `small` arrives."""

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
        self._form = Form.COMPUTE
        self._complete = False  # nothing of it has been taken off by a call that was cut off

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""
        return self._worn

    @property
    def form(self) -> Form:
        """What the sub-net is on for."""
        return self._form

    @property
    def small(self) -> Small | None:
        """None: nothing stands in for the model's weights."""
        return None

    def is_on(self, sub_net: str, form: Form = Form.COMPUTE) -> bool:
        """Return whether all of `sub_net` is on the model; masked weights serve every purpose."""
        return self._worn == sub_net and self._complete

    def put_on(self, sub_net: str, form: Form = Form.COMPUTE, *, small: Small | None = None) -> None:
        """Zero the weights that `sub_net` drops and bring in its normalisation state, in place."""
        if self.is_on(sub_net, form):
            return
        self.take_off()
        self._worn, self._form = sub_net, form
        try:
            # Copies made under inference_mode could never take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._cover(sub_net, form)
                self._normalization.carry(sub_net)
                self._stand_in(sub_net, form, small)
            _forget_autocast_copies()
            self._complete = True
        except BaseException:
            self.take_off()
            raise

    def _cover(self, sub_net: str, form: Form) -> None:
        """Zero what `sub_net` drops."""
        self._cover_by(self._masks, sub_net)

    def _cover_by(self, masks: PackedMasks, sub_net: str) -> None:
        for pack in masks.refresh():
            parameters = masks.parameters(pack)
            kept = masks.kept(sub_net, pack, parameters)
            if not kept.everything:
                pack.set_aside(parameters)
                self._covered.append(pack)
                pack.put_masked(kept, parameters)

    def _stand_in(self, sub_net: str, form: Form, small: Small | None) -> None:
        """Put other tensors in front of the model's own, now that these are right."""

    def _stand_back(self) -> None:
        """Undo `_stand_in` and what `_cover` did beside masking; may be repeated."""

    def take_off(self) -> None:
        """Copy the dense weights back in place and bring in the default's normalisation state."""
        if self._worn is None:
            return
        self._complete = False
        with torch.inference_mode(False), torch.no_grad():
            self._stand_back()
            while self._covered:
                pack = self._covered[-1]
                pack.bring_back(self._masks.parameters(pack))
                self._covered.pop()
                pack.let_go()
            self._normalization.carry(self._normalization.default)
        self._worn = None
        _forget_autocast_copies()

    def refresh(self, *, compiling: bool) -> None:
        """Do nothing: the model computes with its own weights."""

    def show(self) -> None:
        """Do nothing: parameters hold the sub-net's values."""

    def hide(self, hidden: bool) -> None:
        """Do nothing: nothing stands in for the model's weights."""

    def deliver(self) -> None:
        """Do nothing: gradients arrive at the parameters."""

    def deliver_at_once(self, small: Small | None) -> None:
        """Do nothing: gradients arrive at the parameters."""

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
        probes: The masks for `Form.PROBE`, in a run with channel sub-nets.
    """

    def __init__(
        self,
        masks: PackedMasks,
        normalization: PrivateNormalization,
        model: nn.Module,
        probes: ProbeMasks | None = None,
    ) -> None:
        super().__init__(masks, normalization)
        self._model = model
        self._probes = probes

    def put_on(self, sub_net: str, form: Form = Form.COMPUTE, *, small: Small | None = None) -> None:
        """Put a sub-net on; copies that were gathered before are dropped."""
        if not self.is_on(sub_net, form):
            reshard(self._model)
            super().put_on(sub_net, form)

    def _cover(self, sub_net: str, form: Form) -> None:
        probes = self._probes.of(sub_net) if self._probes is not None and form == Form.PROBE else None
        self._cover_by(self._masks if probes is None else probes, sub_net)

    def take_off(self) -> None:
        """Take the sub-net off; copies that were gathered of it are dropped."""
        if self.worn is not None:
            reshard(self._model)
            super().take_off()


def _forget_autocast_copies() -> None:
    # Autocast keeps low-precision copies of weights; within one autocast block they would outlive a switch.
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()

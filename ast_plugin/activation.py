"""Puts a sub-net on a model and takes it off again.

Masked today: dropped weights are zeroed in place, the dense values wait in a copy. In place, because compiled graphs,
FSDP and activation checkpointing all keep looking at the same tensor; swapping ``param.data`` fails there without a
word. A channel sub-net that computes with physically smaller weights is another `Activation` with the same
methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ast_plugin.masking import copy_inside
from ast_plugin.masks import MaskStore
from ast_plugin.normalization import PrivateNormalization


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
        parameters: The prunable parameters by name, resolved at every use.
        masks: The masks.
        normalization: The private normalisation state.
    """

    def __init__(self, parameters: Mapping[str, Tensor], masks: MaskStore, normalization: PrivateNormalization) -> None:
        self._parameters = parameters
        self._masks = masks
        self._normalization = normalization
        self._saved: dict[str, Tensor] = {}
        self._covered: list[str] = []
        self._worn: str | None = None

    @property
    def worn(self) -> str | None:
        """Name of the sub-net that is on the model, None when the model is dense."""
        return self._worn

    def put_on(self, sub_net: str) -> None:
        """Zero the weights that `sub_net` drops and bring in its normalisation state, in place."""
        if self._worn == sub_net:
            return
        self.take_off()
        self._worn = sub_net
        try:
            # Copies made under inference_mode could never take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                for name, parameter in self._parameters.items():
                    if self._masks.kept(sub_net, name) == parameter.numel():
                        continue
                    saved = self._save(name, parameter)
                    copy_inside(saved, self._mask(sub_net, name, parameter.device), into=parameter)
                self._normalization.carry(sub_net)
            _forget_autocast_copies()
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        """Copy the dense weights back in place and bring in the default's normalisation state."""
        if self._worn is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            while self._covered:
                name = self._covered[-1]
                self._parameters[name].copy_(self._saved[name])
                self._covered.pop()
            self._normalization.carry(self._normalization.default)
        self._worn = None
        _forget_autocast_copies()

    def _save(self, name: str, parameter: Tensor) -> Tensor:
        saved = self._saved.get(name)
        if (
            saved is None
            or saved.shape != parameter.shape
            or saved.device != parameter.device
            or saved.dtype != parameter.dtype
        ):
            saved = self._saved[name] = torch.empty_like(parameter, requires_grad=False)
        saved.copy_(parameter)
        self._covered.append(name)
        return saved

    def _mask(self, sub_net: str, name: str, device: torch.device) -> Tensor:
        """Return the mask where the parameter is: the model may have been moved since."""
        mask = self._masks.get(sub_net, name)
        if mask.device != device:
            mask = mask.to(device)
            self._masks.set(sub_net, name, mask)
        return mask

    def release(self) -> None:
        """Take the sub-net off and free the copies."""
        self.take_off()
        self._saved.clear()


def _forget_autocast_copies() -> None:
    # Autocast keeps low-precision copies of weights; within one autocast block they would outlive a switch.
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()

"""The masks of every sub-net in the form in which steps apply them: pack by pack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ast_plugin.kept import Kept, kept_elements
from ast_plugin.masks import MaskStore
from ast_plugin.packs import MemoryOrder, Pack, build_packs, order_of
from ast_plugin.selection_kernels import count_kept
from ast_plugin.slots import ParameterSlots


class PackedMasks:
    """Packs of the prunable parameters, and for each sub-net which elements of a pack it keeps.

    Args:
        parameters: The prunable parameters by name, resolved at every use.
        masks: The masks; their forms here are made anew when they have changed.
    """

    def __init__(self, parameters: ParameterSlots, masks: MaskStore) -> None:
        self._parameters = parameters
        self._masks = masks
        self._kinds: list[tuple[torch.dtype, torch.device]] = []
        self._packs: tuple[Pack, ...] = ()
        self._kept: dict[tuple[str, Pack, MemoryOrder], tuple[int, Kept]] = {}

    @property
    def packs(self) -> tuple[Pack, ...]:
        """The packs, as `refresh` last found them."""
        return self._packs or self.refresh()

    def refresh(self) -> tuple[Pack, ...]:
        """Return the packs, new ones when parameters have moved to another device or dtype."""
        names = self._masks.parameters
        kinds = [(parameter.dtype, parameter.device) for parameter in self._parameters.of(names)]
        if kinds != self._kinds:
            self._kinds = kinds
            self._packs = tuple(build_packs(self._masks.shapes, dict(zip(names, kinds, strict=True))))
            self._kept.clear()
        return self._packs

    def parameters(self, pack: Pack) -> list[Tensor]:
        """Return the parameters of a pack."""
        return list(self._parameters.of(pack.names))

    def gradients(self, pack: Pack) -> list[Tensor | None]:
        """Return the gradients of a pack's parameters."""
        return [parameter.grad for parameter in self._parameters.of(pack.names)]

    def kept(self, sub_net: str, pack: Pack, tensors: Sequence[Tensor | None]) -> Kept:
        """Return which elements of ``pack.vector(tensors)`` a sub-net keeps."""
        order = pack.order(tensors)
        revision = self._masks.revision(sub_net)
        known = self._kept.get((sub_net, pack, order))
        if known is None or known[0] != revision:
            self._kept[sub_net, pack, order] = known = revision, self._make(sub_net, pack, order)
        return known[1]

    def mask(self, sub_net: str, name: str) -> Tensor:
        """Return the bool mask of one parameter, on its device."""
        device = self._parameters[name].device
        mask = self._masks.get(sub_net, name)
        if mask.device == device:
            return mask
        self._masks.move(sub_net, name, device)
        return self._masks.get(sub_net, name)

    def _make(self, sub_net: str, pack: Pack, order: MemoryOrder) -> Kept:
        parts = [order_of(self.mask(sub_net, name), order) for name in pack.names]
        mask = parts[0] if len(parts) == 1 else torch.cat(parts)
        return kept_elements(mask, count_kept(mask), pack.sizes)

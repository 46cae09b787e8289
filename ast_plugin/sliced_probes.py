"""Masks for the steps whose dense gradient a mask update compares, where ranks hold parts of the weights.

Rows stay whole, and only the columns that read dropped channels are zeroed: the network computes the same, and the
gradient of these columns is the one that they would grow with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ast_plugin.channels import ChannelGroups
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.sharded_masks import ShardedMasks
from ast_plugin.sharding import full
from ast_plugin.slots import ParameterSlots


class ProbeMasks:
    """These masks for every channel sub-net, made anew when its own masks have changed.

    Args:
        groups: The groups.
        masks: The sub-nets' own masks.
        channels: Names of the channel sub-nets.
        parameters: The prunable parameters by name.
        local: The parts of them that this rank holds.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        masks: ShardedMasks,
        channels: Collection[str],
        parameters: Mapping[str, Tensor],
        local: ParameterSlots,
    ) -> None:
        self._groups = groups
        self._masks = masks
        self._channels = frozenset(channels)
        self._store = ShardedMasks(masks.sub_nets, parameters)
        self._packed = PackedMasks(local, self._store.local)
        self._known: dict[str, int] = {}

    def of(self, sub_net: str) -> PackedMasks | None:
        """Return the masks; None if it is no channel sub-net. A collective after its masks have changed."""
        if sub_net not in self._channels:
            return None
        revision = self._masks.revision(sub_net)
        if self._known.get(sub_net) != revision:
            self._store.replace(sub_net, self._made(sub_net))
            self._known[sub_net] = revision
        return self._packed

    def _made(self, sub_net: str) -> dict[str, Tensor]:
        kept = self._groups.kept({name: full(mask) for name, mask in self._masks.of(sub_net).items()})
        probes = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._masks.shapes.items()}
        for group in self._groups.groups:
            dropped = (~kept[group.name]).nonzero().reshape(-1).cpu()
            for axis in group.axes_of("in"):
                probes[axis.tensor].index_fill_(axis.dim, axis.indices(dropped), False)
        return probes

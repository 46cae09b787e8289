"""Masks of sharded parameters: every rank holds its part, and all of them know how many weights are kept in all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.errors import StateError
from ast_plugin.mask_forms import CutMask, as_mask, pack_bits, unpack_bits
from ast_plugin.masks import MaskStore
from ast_plugin.selection_kernels import count_kept
from ast_plugin.sharding import add_over_ranks, full, is_sharded, layout_of, local_part
from ast_plugin.sub_nets import check_sub_net


class ShardedMasks(MaskStore):
    """A `MaskStore` whose masks lie on the ranks as their parameters do.

    Masks that come out are DTensors. Setting whole masks and counting what is kept need no communication; packing,
    unions and overlaps gather or add up, and must be called on all ranks. Masks of parameters that are not sharded
    are as in any store.

    Args:
        sub_nets: Names of the sub-nets, in training order.
        parameters: The prunable parameters by name.

    Attributes:
        local: The parts that this rank holds, a store of its own.
    """

    def __init__(self, sub_nets: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
        self.sub_nets = tuple(sub_nets)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.parameters = tuple(self.shapes)
        self.local = MaskStore(sub_nets, {name: tuple(local_part(p).shape) for name, p in parameters.items()})
        self._layouts = {name: layout_of(name, parameter) for name, parameter in parameters.items()}
        self._counts = {s: {name: math.prod(shape) for name, shape in self.shapes.items()} for s in self.sub_nets}
        self._decided: dict[str, dict[str, str]] = {sub_net: {} for sub_net in self.sub_nets}
        self._units = {}

    def get(self, sub_net: str, parameter: str) -> Tensor:
        """Return the mask: bool, of the parameter's shape, lying on the ranks as the parameter does."""
        part = self.local.get(sub_net, parameter)
        layout = self._layouts[parameter]
        return part if layout is None else layout.join(part)

    def set(self, sub_net: str, parameter: str, mask: Tensor) -> None:
        """Replace a mask.

        Args:
            sub_net: A sub-net's name.
            parameter: A parameter's name.
            mask: Bool, of the parameter's shape: whole and the same on every rank, or a DTensor that lies as the
                parameter does, whose kept weights are counted by a collective.

        Raises:
            ConfigError: If there is no such sub-net or parameter, or `mask` has another dtype or shape.
        """
        self.replace(sub_net, {parameter: mask})

    def replace(self, sub_net: str, masks: Mapping[str, Tensor | CutMask]) -> None:
        """Replace several masks of a sub-net, each as `set` takes it, or as what is kept along its dimensions.

        Raises:
            ConfigError: If there is no such sub-net or parameter, or a mask has another dtype or shape.
        """
        check_sub_net(sub_net, self.sub_nets)
        whole = {name: as_mask(mask) for name, mask in masks.items()}
        for name, mask in whole.items():
            self._check_mask(sub_net, name, mask)
        parts, counts, decided = {}, {}, {}
        for name, mask in whole.items():
            layout = self._layouts[name]
            if layout is not None and is_sharded(mask):
                part = local_part(mask)
                parts[name] = part.clone()
                counts[name] = int(add_over_ranks(torch.tensor([[count_kept(part)]], device=part.device), [layout]))
            else:
                parts[name] = mask if layout is None else layout.part_of(mask)
                counts[name] = count_kept(mask)
            decided[name] = "" if is_sharded(mask) else _digest(mask)
        self.local.replace(sub_net, parts)
        self._counts[sub_net].update(counts)
        self._decided[sub_net].update(decided)

    def of(self, sub_net: str) -> dict[str, Tensor]:
        """Return all masks of a sub-net by parameter name, lying on the ranks as the parameters do."""
        return {name: self.get(sub_net, name) for name in self.parameters}

    def revision(self, sub_net: str) -> int:
        """Return a number that rises whenever a mask of `sub_net` changes, on all ranks alike."""
        return self.local.revision(sub_net)

    def kept(self, sub_net: str, parameter: str | None = None) -> int:
        """Return how many weights a sub-net keeps on all ranks together, of one parameter or of all."""
        check_sub_net(sub_net, self.sub_nets)
        return sum(self._counts[sub_net][name] for name in self._wanted(parameter))

    def total(self, parameter: str | None = None) -> int:
        """Return how many prunable weights there are on all ranks together, in one parameter or in all."""
        return sum(math.prod(self.shapes[name]) for name in self._wanted(parameter))

    def overlap(self, a: str, b: str) -> float:
        """Return the share of the weights kept by `a` that `b` keeps too, in [0, 1]; 0 if `a` keeps none."""
        check_sub_net(b, self.sub_nets)
        kept = self.kept(a)
        if a == b or not kept:
            return float(kept > 0)
        shared = [
            torch.count_nonzero(self.local.get(a, name) & self.local.get(b, name).to(self.local.get(a, name).device))
            for name in self.parameters
        ]
        return float(add_over_ranks(torch.stack(shared)[:, None], self._layouts.values()).sum()) / kept

    def union(self, parameter: str) -> Tensor:
        """Return which weights at least one sub-net keeps: bool, whole, on every rank."""
        part = self.local.union(parameter)
        layout = self._layouts[parameter]
        return part if layout is None else full(layout.join(part))

    def pack(self, sub_net: str) -> dict[str, Tensor]:
        """Return the masks of a sub-net by parameter name, whole, as `pack_bits` makes them; on every rank."""
        return {name: pack_bits(full(self.get(sub_net, name))) for name in self.parameters}

    def unpack(self, sub_net: str, packed: Mapping[str, Tensor]) -> None:
        """Replace all masks of a sub-net by whole ones that were packed, or by those of `of`.

        Raises:
            ConfigError: If there is no such sub-net.
            StateError: If a parameter is missing or unknown, or a mask does not fit. No mask has changed then.
        """
        check_sub_net(sub_net, self.sub_nets)
        if set(packed) != set(self.shapes):
            raise StateError(
                f"masks of sub-net {sub_net!r} are those of {len(packed)} parameters, this model has "
                f"{len(self.shapes)} to prune, or others: they were saved with another model, or with another choice "
                "of include and exclude"
            )
        fresh = {}
        for name, shape in self.shapes.items():
            if is_sharded(packed[name]):
                if packed[name].dtype != torch.bool or tuple(packed[name].shape) != shape:
                    raise StateError(f"mask of {name!r} in sub-net {sub_net!r} does not fit the shape {shape}")
                fresh[name] = packed[name]
            else:
                fresh[name] = unpack_bits(packed[name], shape)
        devices = {name: self.local.get(sub_net, name).device for name in fresh}
        self.replace(sub_net, {n: mask if is_sharded(mask) else mask.to(devices[n]) for n, mask in fresh.items()})

    def adopt(self, other: ShardedMasks) -> None:
        """Take all masks of a store for the same parameters; it must not be used afterwards."""
        for sub_net in self.sub_nets:
            for name in self.parameters:
                self.local.set(sub_net, name, other.local.get(sub_net, name))
        self._counts, self._decided = other._counts, other._decided

    def gathered(self) -> MaskStore:
        """Return an ordinary store of the whole masks, on the CPU of every rank."""
        whole = MaskStore(self.sub_nets, self.shapes)
        for sub_net in self.sub_nets:
            whole.unpack(sub_net, self.pack(sub_net))
        return whole

    def checksum(self, sub_net: str | None = None) -> str:
        """Return a hash of what this rank has decided: the whole masks that were set, before they were divided."""
        digest = hashlib.sha256()
        for name in self.sub_nets if sub_net is None else (sub_net,):
            check_sub_net(name, self.sub_nets)
            for parameter in self.parameters:
                decided = self._decided[name].get(parameter, "")
                digest.update(f"{parameter}\0{self.shapes[parameter]}\0{decided}\0".encode())
        return digest.hexdigest()


def _digest(mask: Tensor) -> str:
    return hashlib.sha256(pack_bits(mask).numpy().tobytes()).hexdigest()

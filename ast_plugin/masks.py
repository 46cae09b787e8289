"""The masks of all sub-nets: one bool tensor per sub-net and parameter, True = kept.

Sparse masks on the CPU are held with eight weights a byte, and unpacked when asked for, which steps do not do: they
apply the forms of `ast_plugin.packed_masks`.
Counts are asked for far more often than masks change (describe, statistics, reports, every mask update), so
they are remembered until the mask is replaced. In files and checkpoints a mask takes one bit a weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, StateError, near_names
from ast_plugin.kept import POSITIONS_UP_TO
from ast_plugin.mask_forms import BitMask, CutMask, HeldMask, as_mask, pack_bits, unpack_bits
from ast_plugin.sub_nets import check_sub_net


@dataclasses.dataclass(frozen=True)
class HeldMasks:
    """All masks of a sub-net at a moment.

    Attributes:
        masks: By parameter name, in the form in which they are held.
        kept: How many weights they keep, as far as it was counted.
        units: What `MaskStore.note_units` was told of them; None for nothing.
    """

    masks: Mapping[str, HeldMask]
    kept: Mapping[str, int]
    units: Mapping[str, Tensor] | None


class MaskStore:
    """Masks by sub-net and parameter name. A new store keeps every weight.

    A mask lives on the device on which it was set. Masks that come out of the store are for reading: they are the
    store's own or made anew, and change through `set` alone.

    Args:
        sub_nets: Names of the sub-nets, in training order.
        shapes: Shape of every prunable parameter, by name.

    Attributes:
        sub_nets: Names of the sub-nets, in training order.
        parameters: Names of the prunable parameters, in the order of `shapes`.
        shapes: Shape of every prunable parameter, by name.
    """

    def __init__(self, sub_nets: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sub_nets: tuple[str, ...] = tuple(sub_nets)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
        self.parameters: tuple[str, ...] = tuple(self.shapes)
        self._masks: dict[str, dict[str, HeldMask]] = {
            sub_net: {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
            for sub_net in self.sub_nets
        }
        self._totals: dict[str, int] = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self._kept: dict[str, dict[str, int]] = {sub_net: dict(self._totals) for sub_net in self.sub_nets}
        self._revisions: dict[str, int] = dict.fromkeys(self.sub_nets, 0)
        self._units: dict[str, tuple[int, Mapping[str, Tensor]]] = {}

    def get(self, sub_net: str, parameter: str) -> Tensor:
        """Return a mask: bool, of the parameter's shape.

        Raises:
            ConfigError: If there is no such sub-net or parameter.
        """
        self._check_parameter(parameter)
        return as_mask(self._of(sub_net)[parameter])

    def set(self, sub_net: str, parameter: str, mask: Tensor) -> None:
        """Replace a mask. The store may keep `mask` itself, on its device; do not write into it afterwards.

        Raises:
            ConfigError: If there is no such sub-net or parameter, or `mask` has another dtype or shape.
        """
        self.replace(sub_net, {parameter: mask})

    def replace(self, sub_net: str, masks: Mapping[str, Tensor | CutMask]) -> None:
        """Replace several masks of a sub-net, all of them or, after an exception or an interrupt, none.

        Args:
            sub_net: A sub-net's name.
            masks: By parameter name, as for `set`; those of whole rows and columns also as what is kept of them, and
                then they are made when they are read.

        Raises:
            ConfigError: If there is no such sub-net or parameter, or a mask has another dtype or shape.
        """
        present = self._of(sub_net)
        for name, mask in masks.items():
            self._check_mask(sub_net, name, mask)
        fresh: dict[str, HeldMask] = {
            n: mask if isinstance(mask, CutMask) else mask.detach() for n, mask in masks.items()
        }
        # Those on other devices are counted when they are asked.
        near = {n: mask for n, mask in fresh.items() if isinstance(mask, Tensor) and mask.device.type == "cpu"}
        counts = dict(zip(near, _count(list(near.values())), strict=True))
        for name, count in counts.items():
            if count <= POSITIONS_UP_TO * near[name].numel():
                fresh[name] = BitMask(pack_bits(near[name]), tuple(near[name].shape))
        counts.update((name, mask.count()) for name, mask in fresh.items() if isinstance(mask, CutMask))
        # Each of these three may be the last one before an interrupt: what is not remembered is counted or made anew.
        self._kept[sub_net] = {name: count for name, count in self._kept[sub_net].items() if name not in fresh}
        self._revisions[sub_net] += 1
        self._masks[sub_net] = {**present, **fresh}
        self._kept[sub_net].update(counts)

    def held(self, sub_net: str) -> HeldMasks:
        """Return the present masks of a sub-net as they are held, for `put_back`.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        return HeldMasks(dict(self._of(sub_net)), dict(self._kept[sub_net]), self.units(sub_net))

    def put_back(self, sub_net: str, held: HeldMasks) -> None:
        """Have a sub-net keep what it kept when `held` was returned."""
        self._kept[sub_net] = {}
        self._revisions[sub_net] += 1
        self._masks[sub_net] = dict(held.masks)
        self._kept[sub_net].update(held.kept)
        if held.units is not None:
            self.note_units(sub_net, held.units)

    def move(self, sub_net: str, parameter: str, device: torch.device) -> None:
        """Move a mask to another device."""
        masks = self._of(sub_net)
        masks[parameter] = as_mask(masks[parameter]).to(device)

    def revision(self, sub_net: str) -> int:
        """Return a number that rises whenever a mask of `sub_net` changes."""
        return self._revisions[sub_net]

    def note_units(self, sub_net: str, units: Mapping[str, Tensor]) -> None:
        """Note which units of the channel groups the present masks keep, all else whole; it holds until one changes."""
        self._units[sub_net] = self.revision(sub_net), units

    def units(self, sub_net: str) -> Mapping[str, Tensor] | None:
        """Return what `note_units` was told of the present masks: by group name, bool (units,); None for nothing."""
        revision, units = self._units.get(sub_net, (None, None))
        return units if revision == self.revision(sub_net) else None

    def of(self, sub_net: str) -> dict[str, Tensor]:
        """Return all masks of a sub-net by parameter name, in a new dict.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        return {name: as_mask(held) for name, held in self._of(sub_net).items()}

    def kept(self, sub_net: str, parameter: str | None = None) -> int:
        """Return how many weights a sub-net keeps, of one parameter or of all.

        Raises:
            ConfigError: If there is no such sub-net or parameter.
        """
        masks, known = self._of(sub_net), self._kept[sub_net]
        wanted = self._wanted(parameter)
        missing = [name for name in wanted if name not in known]
        if missing:
            known.update(zip(missing, _count([as_mask(masks[name]) for name in missing]), strict=True))
        return sum(known[name] for name in wanted)

    def total(self, parameter: str | None = None) -> int:
        """Return how many prunable weights there are, in one parameter or in all.

        Raises:
            ConfigError: If there is no such parameter.
        """
        return sum(self._totals[name] for name in self._wanted(parameter))

    def sparsity(self, sub_net: str, parameter: str | None = None) -> float:
        """Return the fraction of zeros in [0, 1], of one parameter or of all; 0 where there are no weights.

        Raises:
            ConfigError: If there is no such sub-net or parameter.
        """
        total = self.total(parameter)
        return (total - self.kept(sub_net, parameter)) / total if total else 0.0

    def overlap(self, a: str, b: str) -> float:
        """Return the share of the weights kept by `a` that `b` keeps too, in [0, 1]; 0 if `a` keeps none.

        Not symmetric: a dense sub-net may hold all of a sparse one, and the sparse one little of it.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        ours, theirs, kept = self.of(a), self.of(b), self.kept(a)
        if a == b or not kept:
            return float(kept > 0)
        shared = _count([ours[name] & theirs[name].to(ours[name].device) for name in self.parameters])
        return sum(shared) / kept

    def union(self, parameter: str) -> Tensor:
        """Return which weights at least one sub-net keeps: a new bool tensor, on the first sub-net's device.

        Raises:
            ConfigError: If there is no such parameter.
        """
        self._check_parameter(parameter)
        first, *others = (self.get(sub_net, parameter) for sub_net in self.sub_nets)
        union = first.clone()
        for mask in others:
            union |= mask.to(union.device)
        return union

    def pack(self, sub_net: str) -> dict[str, Tensor]:
        """Return the masks of a sub-net by parameter name as `pack_bits` makes them, on the CPU.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        return {
            name: held.packed.clone() if isinstance(held, BitMask) else pack_bits(as_mask(held))
            for name, held in self._of(sub_net).items()
        }

    def unpack(self, sub_net: str, packed: Mapping[str, Tensor]) -> None:
        """Replace all masks of a sub-net by what `pack` returned; each goes to the device of the one it replaces.

        Raises:
            ConfigError: If there is no such sub-net.
            StateError: If a parameter is missing or unknown, or a mask does not fit. No mask has changed then.
        """
        masks = self._of(sub_net)
        for name in packed:
            if name not in self.shapes:
                raise StateError(
                    f"masks of sub-net {sub_net!r} hold {name!r}, which is no prunable parameter of this model: "
                    "they were saved with another model, or with another choice of include and exclude"
                )
        fresh: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name not in packed:
                raise StateError(
                    f"masks of sub-net {sub_net!r} lack the parameter {name!r}: "
                    "they were saved with another model, or with another choice of include and exclude"
                )
            try:
                fresh[name] = unpack_bits(packed[name], shape).to(masks[name].device)
            except StateError as error:
                raise StateError(f"mask of {name!r} in sub-net {sub_net!r}: {error}") from None
        self.replace(sub_net, fresh)

    def checksum(self, sub_net: str | None = None) -> str:
        """Return a hash of parameter names, shapes and masks: the same in every process and on every device.

        Two sub-nets with equal masks have equal checksums; without `sub_net`, the sub-nets' names count too.

        Raises:
            ConfigError: If there is no such sub-net.
        """
        digest = hashlib.sha256()
        if sub_net is None:
            for name in self.sub_nets:
                digest.update(f"{name}\0{self.checksum(name)}\0".encode())
        else:
            for name, packed in self.pack(sub_net).items():
                digest.update(f"{name}\0{self.shapes[name]}\0".encode())
                digest.update(packed.numpy().tobytes())
        return digest.hexdigest()

    def _of(self, sub_net: str) -> dict[str, HeldMask]:
        check_sub_net(sub_net, self.sub_nets)
        return self._masks[sub_net]

    def _wanted(self, parameter: str | None) -> tuple[str, ...]:
        if parameter is None:
            return self.parameters
        self._check_parameter(parameter)
        return (parameter,)

    def _check_mask(self, sub_net: str, parameter: str, mask: Tensor | CutMask) -> None:
        self._check_parameter(parameter)
        if isinstance(mask, CutMask) and mask.shape == self.shapes[parameter]:
            return
        if isinstance(mask, CutMask) or mask.dtype != torch.bool or tuple(mask.shape) != self.shapes[parameter]:
            raise ConfigError(
                f"mask of {parameter!r} in sub-net {sub_net!r} must be bool of shape {self.shapes[parameter]}, "
                f"got {getattr(mask, 'dtype', torch.bool)} of shape {tuple(mask.shape)}"
            )

    def _check_parameter(self, parameter: str) -> None:
        if parameter not in self.shapes:
            raise ConfigError(
                f"{parameter!r} is no prunable parameter of this run: {near_names(str(parameter), self.parameters)}"
            )


def _count(masks: Sequence[Tensor]) -> list[int]:
    """Return the number of True in each mask; numpy counts bools six times as fast as torch does on a CPU."""
    counts = [0] * len(masks)
    waiting: dict[torch.device, list[int]] = {}
    for i, mask in enumerate(masks):
        if mask.device.type == "cpu":
            counts[i] = int(np.count_nonzero(mask.numpy()))
        else:
            waiting.setdefault(mask.device, []).append(i)
    for indices in waiting.values():  # one synchronisation a device, not one a mask
        on_device = torch.stack([torch.count_nonzero(masks[i]) for i in indices]).tolist()
        for i, count in zip(indices, on_device, strict=True):
            counts[i] = count
    return counts

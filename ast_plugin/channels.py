"""Groups of channels: what has to go from every layer when a hidden channel goes.

A hidden channel is made by the rows of one layer's weights (an output channel of a convolution, a unit of a
feed-forward network, the query, key and value rows of an attention head), may pass through normalization and biases,
and is read by columns of the next layer's weights. Nothing else sees it: groups never touch the residual stream. So a
sub-net that zeroes rows and columns of the same channels computes exactly what a network without these channels
computes, and that one is smaller.

A *unit* is what is kept or dropped as a whole: a channel, a hidden unit, an attention head with all of its rows. How
units lie along the dimensions of tensors is described by a `GroupAxis` each. `ast_plugin.channel_search` finds the
groups of a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ast_plugin.errors import StateError
from ast_plugin.mask_forms import CutMask

Role = Literal["out", "in", "state"]
Kind = Literal["channels", "hidden", "heads"]

_ROLES = ("out", "in", "state")
_KINDS = ("channels", "hidden", "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupAxis:
    """How the units of a group lie along one dimension of one tensor.

    The dimension consists of parts, one after the other. In a part that begins at `offset` with blocks of `block`, unit
    u has the indices ``offset + u * block`` to ``offset + (u + 1) * block - 1``. Most dimensions are one part with
    blocks of one; the rows of a fused query-key-value weight are three parts with blocks of the head's size.

    Attributes:
        tensor: Name of a parameter or buffer, as in the bare model's ``named_parameters()`` or ``named_buffers()``.
        dim: The dimension, from 0.
        role: ``out``: the rows of a weight that make the units; ``in``: the columns of a weight that read them;
            ``state``: one value or more a unit in between (biases, normalization, running statistics, depthwise
            weights), without effect once what reads the unit is gone.
        parts: Offset and block of each part, ascending; together they fill the dimension.
    """

    tensor: str
    dim: int
    role: Role
    parts: tuple[tuple[int, int], ...] = ((0, 1),)

    def indices(self, numbers: Tensor) -> Tensor:
        """Return the indices of units along the dimension, ascending.

        Args:
            numbers: Which units, int64 (count,), ascending.

        Returns:
            int64 (count * sum of the blocks,), on the device of `numbers`.
        """
        if self.parts == ((0, 1),):
            return numbers
        found = []
        for offset, block in self.parts:
            steps = torch.arange(offset, offset + block, device=numbers.device)
            found.append((numbers[:, None] * block + steps).reshape(-1))
        return torch.cat(found)

    def flags(self, along: Tensor) -> Tensor:
        """Return which units have anything, bool (units,), from one flag an index, bool (size of the dimension,)."""
        total = sum(block for _, block in self.parts)
        units = along.numel() // total
        found = [along[offset : offset + units * block].view(units, block).any(1) for offset, block in self.parts]
        return torch.stack(found).any(0)

    def check(self, units: int, shape: Sequence[int]) -> None:
        """Make sure that the units fill the dimension exactly.

        Raises:
            StateError: If the tensor has no such dimension, or indices are left out, doubled or out of range.
        """
        end = 0
        for offset, block in self.parts:
            if offset != end or block < 1:
                end = -1
                break
            end += units * block
        if not 0 <= self.dim < len(shape) or end != shape[self.dim]:
            raise StateError(
                f"{units} units in parts {self.parts} do not fill dimension {self.dim} of {self.tensor}, which has "
                f"shape {tuple(shape)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupAttribute:
    """A whole number that a module keeps beside its weights and that counts units: heads, groups, hidden sizes.

    Attributes:
        module: Path of the module, empty for the model itself.
        name: The attribute.
        per_unit: Its value divided by the number of units, at least 1.
    """

    module: str
    name: str
    per_unit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Units that are dropped together in all of their tensors.

    Attributes:
        name: Path of the module that makes them; the first one where there are several.
        kind: ``channels`` of a convolution, ``hidden`` units of linear layers, attention ``heads``.
        units: How many, at least 2.
        axes: Where they lie; at least one with role ``out`` and one with ``in``.
        attributes: Numbers of modules that follow the number of units.
    """

    name: str
    kind: Kind
    units: int
    axes: tuple[GroupAxis, ...]
    attributes: tuple[GroupAttribute, ...] = ()

    def axes_of(self, *roles: Role) -> tuple[GroupAxis, ...]:
        """Return the axes that have one of these roles."""
        return tuple(axis for axis in self.axes if axis.role in roles)

    def misfit(self, shapes: Mapping[str, Sequence[int]], modules: Mapping[str, object]) -> str | None:
        """Return why the group is none of a model, in words that follow its name; None where it is one.

        Args:
            shapes: The shapes of the model's parameters and buffers, by name.
            modules: Its modules by path, empty for the model itself.
        """
        for axis in self.axes:
            if axis.tensor not in shapes:
                return f"concerns {axis.tensor!r}, which the model lacks"
            try:
                axis.check(self.units, shapes[axis.tensor])
            except StateError as error:
                return f"does not fit: {error}"
        for number in self.attributes:
            found = getattr(modules.get(number.module), number.name, None)
            if found != number.per_unit * self.units:
                module = repr(number.module) if number.module else "the model"
                wanted = number.per_unit * self.units
                return f"expects {number.name} of {module} to be {wanted}, and it is {found!r}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the group as plain containers, for files."""
        group = dataclasses.asdict(self)
        group["axes"] = [{**axis, "parts": [list(part) for part in axis["parts"]]} for axis in group["axes"]]
        group["attributes"] = list(group["attributes"])
        return group

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChannelGroup:
        """Return the group that `to_dict` described.

        Raises:
            StateError: If something is missing, unknown or of another kind.
        """
        try:
            axes = tuple(
                GroupAxis(**{**axis, "parts": tuple((offset, block) for offset, block in axis["parts"])})
                for axis in values["axes"]
            )
            attributes = tuple(GroupAttribute(**attribute) for attribute in values["attributes"])
            group = cls(**{**values, "axes": axes, "attributes": attributes})
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the description of a channel group is damaged: {error}") from None
        numbers = [group.units, *(n for axis in axes for n in (axis.dim, *(m for part in axis.parts for m in part)))]
        numbers += [attribute.per_unit for attribute in attributes]
        names = [group.name, *(axis.tensor for axis in axes), *(n for a in attributes for n in (a.module, a.name))]
        if (
            not all(isinstance(name, str) for name in names)
            or group.kind not in _KINDS
            or any(axis.role not in _ROLES for axis in axes)
            or not all(type(number) is int and number >= 0 for number in numbers)
        ):
            raise StateError(f"the description of channel group {group.name!r} is damaged")
        return group


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftWhole:
    """A layer whose channels all sub-nets keep.

    Attributes:
        name: Path of the module.
        reason: Why, for the table that `describe` prints.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelGroups:
    """What a search has found in a model.

    Attributes:
        groups: In the order in which the model runs.
        left_whole: Layers with weights to prune whose channels cannot be dropped, or must not.
    """

    groups: tuple[ChannelGroup, ...]
    left_whole: tuple[LeftWhole, ...] = ()

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.groups)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that are sliced, each once, in order."""
        return tuple(dict.fromkeys(axis.tensor for group in self.groups for axis in group.axes))

    def masks(self, kept: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the masks of weights: a weight is kept if its row and its column are.

        Args:
            kept: By group name, bool (units,), True = kept.
            shapes: Shapes of the prunable parameters, by name. Those in no group are kept whole.

        Returns:
            By parameter name, bool in the parameter's shape, on the device of the flags.
        """
        devices = {flags.device for flags in kept.values()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        cut = self.cut_masks({name: flags.to(device) for name, flags in kept.items()}, shapes)
        return {name: mask.tensor().to(device) for name, mask in cut.items()}

    def cut_masks(self, kept: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, CutMask]:
        """Return the same masks as what is kept along their dimensions, without making them."""
        flags: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
        for group in self.groups:
            units = kept[group.name]
            for axis in group.axes if not bool(units.all()) else ():
                if axis.tensor in flags:
                    along = torch.zeros(shapes[axis.tensor][axis.dim], dtype=torch.bool, device=units.device)
                    along[axis.indices(units.nonzero().reshape(-1))] = True
                    flags[axis.tensor].append((axis.dim, along))
        return {name: CutMask(tuple(shapes[name]), tuple(cuts)) for name, cuts in flags.items()}

    def kept(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which units masks of weights keep: those with a kept weight in what reads them.

        Args:
            masks: By parameter name, bool.

        Returns:
            By group name, bool (units,).
        """
        found = {}
        for group in self.groups:
            flags: Tensor | None = None
            for axis in group.axes_of("in"):
                units = axis.flags(masks[axis.tensor].movedim(axis.dim, 0).flatten(1).any(1))
                flags = units if flags is None else flags | units
            if flags is None:
                raise StateError(f"channel group {group.name!r} is read by no weight")
            found[group.name] = flags
        return found

    def share_dropped(self, kept: Mapping[str, Tensor]) -> float:
        """Return the fraction of all units that is dropped, in [0, 1]; 0 without groups."""
        total = sum(group.units for group in self.groups)
        held = sum(int(kept[group.name].sum()) for group in self.groups)
        return (total - held) / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """What of one tensor is left.

    Attributes:
        tensor: Its name.
        dims: Dimension and kept indices along it, int64 and ascending, for each dimension that is cut.
    """

    tensor: str
    dims: tuple[tuple[int, Tensor], ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that is left of `whole`."""
        sizes = list(whole)
        for dim, indices in self.dims:
            sizes[dim] = len(indices)
        return tuple(sizes)

    def take(self, whole: Tensor) -> Tensor:
        """Return the smaller tensor, contiguous; differentiable."""
        for dim, indices in self.dims:
            whole = whole.index_select(dim, indices)
        return whole

    def put_(self, part: Tensor, whole: Tensor) -> Tensor:
        """Write the smaller tensor to its places in `whole`, in place; the rest of `whole` stays. Returns `whole`."""
        if len(self.dims) == 1:
            dim, indices = self.dims[0]
            return whole.index_copy_(dim, indices, part)
        places: list[Any] = [slice(None)] * whole.dim()
        for position, (dim, indices) in enumerate(self.dims):
            places[dim] = indices.view(-1, *[1] * (len(self.dims) - 1 - position))
        whole[tuple(places)] = part  # adjacent dimensions, which rows and columns are
        return whole


def slices(groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]) -> dict[str, Slice]:
    """Return what is left of every tensor of the groups of which something is dropped.

    Args:
        groups: The groups.
        kept: By group name, bool (units,), True = kept.

    Returns:
        By tensor name; tensors that stay whole are left out. The dimension with the smallest share comes first.
    """
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for group in groups:
        flags = kept[group.name]
        if bool(flags.all()):
            continue
        numbers = flags.nonzero().reshape(-1)
        for axis in group.axes:
            cuts.setdefault(axis.tensor, []).append((axis.dim, axis.indices(numbers)))
    return {name: Slice(name, tuple(sorted(dims, key=lambda cut: cut[0]))) for name, dims in cuts.items()}


def attribute_values(groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]) -> dict[tuple[str, str], int]:
    """Return the numbers that modules need for the units that are left, by module path and attribute name."""
    return {
        (attribute.module, attribute.name): attribute.per_unit * int(kept[group.name].sum())
        for group in groups
        for attribute in group.attributes
    }

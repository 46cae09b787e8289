"""Several tensors handled as one vector.

Putting a sub-net on takes a handful of calls for every tensor, and in a network of many small layers the calls take
ten times as long as the work. So small tensors are copied into one vector, worked on together, and copied back. A
large tensor is a pack of its own, and is worked on where it is.

The memory of that vector also holds the dense weights while a sub-net is on: gradients are worked on at other times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ast_plugin.kept import Kept

# Below this many elements a tensor is packed: two copies of 65 thousand floats cost less than a dozen calls.
_SMALL = 1 << 16
_PACK = 1 << 20  # elements of a pack at most: four megabytes of float32 stay in a processor's cache

# How the elements of a vector are ordered: None is row-major, anything else the strides of the one tensor.
MemoryOrder = tuple[int, ...] | None


class Pack:
    """Some tensors as one vector.

    Args:
        shapes: Their shapes by name.

    Attributes:
        names: Their names, in the order of the vector.
        sizes: Their numbers of elements.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.names = tuple(shapes)
        self.sizes = tuple(math.prod(shape) for shape in shapes.values())
        self._shapes = tuple(shapes.values())
        self._buffer = torch.empty(0)
        self._views: list[Tensor] = []
        self._aside: list[Tensor] = []
        self._holding = False
        self._last: list[Tensor] = []

    @property
    def total(self) -> int:
        """Elements of the vector."""
        return sum(self.sizes)

    @property
    def buffered(self) -> bool:
        """Whether there are several tensors, so that vectors are copies."""
        return len(self.names) > 1

    def is_buffer(self, vector: Tensor) -> bool:
        """Return whether a vector is the buffer that `vector` fills."""
        return vector is self._buffer

    def order(self, tensors: Sequence[Tensor | None]) -> MemoryOrder:
        """Return how the vector of these tensors is ordered."""
        only = tensors[0]
        if len(tensors) > 1 or only is None or only.is_contiguous() or _in_memory_order(only) is None:
            return None
        return tuple(only.stride())

    def vector(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the elements as one vector.

        Args:
            tensors: One a name, None standing for zeros. Any memory layout.

        Returns:
            Shape (`total`,). The memory of a single tensor itself, where it has no gaps; otherwise a buffer, valid
            until the next call.
        """
        shared = self._shared(tensors)
        if shared is not None:
            return shared
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        dtype = functools.reduce(torch.promote_types, dtypes)
        device = next(tensor.device for tensor in tensors if tensor is not None)
        if self._holding:
            vector = torch.empty(self.total, dtype=dtype, device=device)
            self._last = self.tensors(vector, None)
        else:
            vector, self._last = self._memory(dtype, device), self._views
        for view, tensor in zip(self._last, tensors, strict=True):
            if tensor is None:
                view.zero_()
        pairs = [(view, t.detach()) for view, t in zip(self._last, tensors, strict=True) if t is not None]
        torch._foreach_copy_([view for view, _ in pairs], [tensor for _, tensor in pairs])
        return vector

    def write(self, tensors: Sequence[Tensor | None]) -> None:
        """Copy what `vector` last returned back into the tensors; does nothing where it is their memory."""
        if self._shared(tensors) is None:
            self._spread(self._last, tensors)
            self._last = self._last if not self._holding else []

    def set_aside(self, tensors: list[Tensor]) -> None:
        """Copy the tensors, for `bring_back`; until `let_go`, vectors are other memory than the copy's."""
        if self.buffered:
            self._memory(tensors[0].dtype, tensors[0].device)
            self._aside = self._views
        elif not self._aside:
            self._aside = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
        self._holding = self.buffered
        torch._foreach_copy_(self._aside, tensors)

    def put_masked(self, kept: Kept, tensors: Sequence[Tensor]) -> None:
        """Zero what is not kept in tensors that were set aside."""
        if self.buffered:
            self._spread(self.tensors(kept.only(self._buffer), None), tensors)
        else:
            kept.keep_only_(self.vector(tensors))
            self.write(tensors)

    def bring_back(self, tensors: list[Tensor]) -> None:
        """Copy what was set aside back into the tensors; may be repeated until `let_go`."""
        torch._foreach_copy_(tensors, self._aside)

    def let_go(self) -> None:
        """Have the memory of what was set aside for vectors again."""
        self._holding = False

    def free(self) -> None:
        """Free all memory."""
        self._buffer = torch.empty(0)
        self._views, self._aside, self._last = [], [], []
        self._holding = False

    def _memory(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not self._views or self._buffer.dtype != dtype or self._buffer.device != device:
            self._buffer = torch.empty(self.total, dtype=dtype, device=device)
            self._views = self.tensors(self._buffer, None)
        return self._buffer

    def _spread(self, parts: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
        pairs = [(t.detach(), part) for t, part in zip(tensors, parts, strict=True) if t is not None]
        torch._foreach_copy_([tensor for tensor, _ in pairs], [part for _, part in pairs])

    def tensors(self, vector: Tensor, order: MemoryOrder) -> list[Tensor]:
        """Return the parts of a vector in memory order `order` as views in the shapes of the tensors."""
        if order is not None:
            return [vector.as_strided(self._shapes[0], order)]
        return [part.view(shape) for part, shape in zip(vector.split(self.sizes), self._shapes, strict=True)]

    def _shared(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        if len(tensors) > 1 or tensors[0] is None:
            return None
        return _in_memory_order(tensors[0])


def build_packs(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, object]) -> list[Pack]:
    """Return packs of all tensors: large ones alone, small ones together with others of their kind.

    Args:
        shapes: Shapes by name.
        kinds: What must be the same within a pack, by name: dtype and device.
    """
    packs: list[Pack] = []
    open_packs: dict[object, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if math.prod(shape) >= _SMALL:
            packs.append(Pack({name: shape}))
            continue
        members = open_packs.setdefault(kinds[name], {})
        if members and sum(math.prod(s) for s in members.values()) + math.prod(shape) > _PACK:
            packs.append(Pack(members))
            members = open_packs[kinds[name]] = {}
        members[name] = shape
    return packs + [Pack(members) for members in open_packs.values()]


def order_of(tensor: Tensor, order: MemoryOrder) -> Tensor:
    """Return a tensor, such as a mask, as a vector in that order; shares its memory where it can."""
    if order is None:
        return tensor.reshape(-1)
    return tensor.permute(_by_stride(order)).reshape(-1)


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """Return a vector view of the elements as they lie in memory; None if they have gaps or overlap."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    by_stride = tensor.permute(_by_stride(tensor.stride()))
    return by_stride.view(-1) if by_stride.is_contiguous() else None


def _by_stride(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda axis: strides[axis], reverse=True)

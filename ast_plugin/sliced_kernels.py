"""Taking the kept rows and columns out of a tensor, and bringing the smaller tensor back to its places, fast.

Both work in the order in which the elements lie in memory, outermost dimension first, so that taking rows copies whole
rows and the columns are picked from what is left. The result has the memory format of the whole tensor. Bringing back
adds into zeros: on a CPU, `index_add_` along the first dimension is three times as fast as `index_copy_`, and
indexing with two index tensors is slower than one dimension after the other (256 x 256 x 3 x 3, half of both kept:
190 µs against 460 and 280).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Cuts = Sequence[tuple[int, Tensor]]


def take(whole: Tensor, cuts: Cuts) -> Tensor:
    """Return what is left of a tensor: memory of its own, dense, in the memory format of `whole`; not differentiable.

    Args:
        whole: Any dtype and memory layout.
        cuts: Dimension and kept indices along it, int64 and ascending, at least one pair.
    """
    if whole.dim() == 1:  # most tensors are: norms and biases
        return whole.detach().index_select(0, cuts[0][1])
    order = _memory_order(whole)
    part = whole.detach().permute(order)
    *others, last = _placed(cuts, order)
    for axis, indices in others:
        flat, dim, sizes = _flattened(part, axis, len(indices))
        part = flat.index_select(dim, indices).view(sizes)
    axis, indices = last
    flat, dim, sizes = _flattened(part, axis, len(indices))
    taken = _empty(sizes, order, whole)
    torch.index_select(flat, dim, indices, out=_flattened(taken.permute(order), axis, len(indices))[0])
    return taken


def spread(part: Tensor, cuts: Cuts, like: Tensor, into: Tensor | None = None) -> Tensor:
    """Return a tensor of full size with `part` at its places; the inverse of `take`; not differentiable.

    Args:
        part: What `take` would return of the result.
        cuts: As for `take`.
        like: Shape and memory format of the result, which has the dtype and device of `part`.
        into: Added to in place and returned where it is given; otherwise everything outside the places is zero.
    """
    if like.dim() == 1:
        whole = torch.zeros_like(like, dtype=part.dtype, requires_grad=False) if into is None else into
        whole.detach().index_add_(0, cuts[0][1], part.detach())
        return whole
    order = _memory_order(like)
    filled = part.detach().permute(order).contiguous()
    whole = torch.zeros_like(like, dtype=part.dtype, requires_grad=False) if into is None else into.detach()
    target = whole.permute(order)
    if not target.is_contiguous():  # strides of its own, which somebody gave a gradient
        target = torch.zeros_like(target, memory_format=torch.contiguous_format)
    first, *others = _placed(cuts, order)
    for axis, indices in reversed(others):
        sizes = list(filled.shape)
        sizes[axis] = target.shape[axis]
        filled = _added(filled.new_zeros(sizes), axis, indices, filled)
    _added(target, *first, filled)
    if target.data_ptr() != whole.data_ptr():
        whole.add_(target.permute(_inverse(order)))
    return whole if into is None else into


def gather(whole: Tensor, cuts: Cuts) -> Tensor:
    """Return the same as `take`, differentiable any number of times, through the same graph as often as asked for."""
    part: Tensor = _Take.apply(whole, cuts)
    return part


class _Take(torch.autograd.Function):
    """`take`, whose derivative is `spread`. Nothing is saved that going through the graph would free."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, cuts: Cuts) -> Tensor:
        ctx.cuts, ctx.like = cuts, whole.detach()
        return take(whole, cuts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Spread.apply(gradients[0], ctx.cuts, ctx.like), None


class _Spread(torch.autograd.Function):
    """`spread`, whose derivative is `take`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cuts: Cuts, like: Tensor) -> Tensor:
        ctx.cuts = cuts
        return spread(part, cuts, like)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Take.apply(gradients[0], ctx.cuts), None, None


def spread_differentiably(part: Tensor, cuts: Cuts, like: Tensor) -> Tensor:
    """Return the same as `spread`, differentiable any number of times."""
    whole: Tensor = _Spread.apply(part, cuts, like)
    return whole


def _added(target: Tensor, axis: int, indices: Tensor, part: Tensor) -> Tensor:
    flat, dim, _ = _flattened(target, axis, len(indices))
    flat.index_add_(dim, indices, _flattened(part, axis, len(indices))[0])
    return target


def _flattened(tensor: Tensor, axis: int, size: int) -> tuple[Tensor, int, list[int]]:
    """Return a view with as few dimensions as there can be around `axis`, where `axis` is in it, and a shape.

    The shape is the tensor's own with `size` along `axis`. Kernels are several times faster with two dimensions.
    """
    shape = tensor.shape
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    sizes = [*shape[:axis], size, *shape[axis + 1 :]]
    if before == 1:
        return tensor.reshape(shape[axis], after), 0, sizes
    if after == 1:
        return tensor.reshape(before, shape[axis]), 1, sizes
    return tensor.reshape(before, shape[axis], after), 1, sizes


def _memory_order(tensor: Tensor) -> list[int]:
    """Return the dimensions from the outermost in memory to the innermost; as they are named if that is no order."""
    plain = list(range(tensor.dim()))
    if tensor.is_contiguous():
        return plain
    order = sorted(plain, key=lambda dim: tensor.stride(dim), reverse=True)
    return order if tensor.permute(order).is_contiguous() else plain


def _empty(sizes: Sequence[int], order: Sequence[int], like: Tensor) -> Tensor:
    """Return memory for a tensor with these sizes from the outermost dimension in memory to the innermost.

    No view: autograd does not let views made inside a function be written to.
    """
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    places = _inverse(order)
    return torch.empty_strided(
        [sizes[place] for place in places],
        [strides[place] for place in places],
        dtype=like.dtype,
        device=like.device,
    )


def _inverse(order: Sequence[int]) -> list[int]:
    places = [0] * len(order)
    for place, dim in enumerate(order):
        places[dim] = place
    return places


def _placed(cuts: Cuts, order: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return the cuts by place in memory, outermost first."""
    return sorted(((order.index(dim), indices) for dim, indices in cuts), key=lambda cut: cut[0])

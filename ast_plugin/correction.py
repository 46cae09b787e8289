"""Gradient correction: the projection that keeps a gradient from opposing the previous sub-net's.

With g the gradient of the current sub-net and r the previous sub-net's, restricted to the current mask: if
<g, r> < 0 then g <- g - (<g, r> / <r, r>) r, so that <g, r> = 0 (Yang et al. 2022, section 3.3). Pure tensor
functions; which tensors are compared, and when, is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError

# Below this a sum of squares in float32 has lost digits to underflow; such pairs are measured again in float64.
_LEAST_SAFE_SQUARE = 1e-30
_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Correction:
    """What one call of `correct` found.

    Attributes:
        checks: Pairs compared: one a parameter, or one in all for the scope ``global``.
        conflicts: Those with a negative inner product, which were corrected.
        cosines: Cosine of the angle between gradient and reference before the correction, one a check, in [-1, 1].
    """

    checks: int = 0
    conflicts: int = 0
    cosines: list[float] = dataclasses.field(default_factory=list)


AddUp = Callable[[Tensor, Sequence[int]], Tensor]


@torch.no_grad()
def correct(
    gradients: Sequence[Tensor],
    references: Sequence[Tensor],
    *,
    scope: Literal["layer", "global"],
    add_up: AddUp | None = None,
) -> Correction:
    """Project gradients that oppose their references, in place.

    Args:
        gradients: Gradients of the current sub-net, floating point, zero outside its masks. Changed in place
            where they conflict; otherwise untouched, bit for bit.
        references: The previous sub-net's gradients, restricted to the current masks; shapes as `gradients`.
            Not changed.
        scope: ``layer`` treats every pair on its own, ``global`` all of them as one long vector.
        add_up: Where the tensors are parts of larger ones, adds the inner products of all parts: called with those of
            some pairs, shape (pairs, 3), and with the positions of these pairs. None: the tensors are whole.

    Returns:
        Counts and cosines. A pair with a zero or a non-finite member is left alone and not counted; in the scope
        ``global``, a non-finite value anywhere leaves everything alone.

    Raises:
        ConfigError: If the scope is unknown, or gradients and references differ in number or shape.
    """
    if len(gradients) != len(references):
        raise ConfigError(f"correction got {len(gradients)} gradients but {len(references)} references; give pairs")
    for gradient, reference in zip(gradients, references, strict=True):
        if gradient.shape != reference.shape:
            raise ConfigError(
                f"correction got a gradient of shape {tuple(gradient.shape)} with a reference of shape "
                f"{tuple(reference.shape)}; a reference must have its gradient's shape"
            )
    if scope not in ("layer", "global"):
        raise ConfigError(f"correction must be one of layer, global, got {scope!r}")
    result = Correction()
    pairs = list(zip(gradients, references, strict=True))
    products = _measure(pairs, range(len(pairs)), add_up)
    again = [i for i, found in enumerate(products) if not found.precise]
    if again:
        for i, found in zip(again, _measure([_widened(pairs[i]) for i in again], again, add_up), strict=True):
            products[i] = found
    if scope == "global":
        products = [_total(products)] * len(pairs)
    for pair, found in zip(pairs, products, strict=True):
        if scope == "layer" or result.checks == 0:
            _count(found, result)
        if found.usable and found.inner < 0:
            _subtract(*pair, found.inner / found.reference)
    return result


class _Products(NamedTuple):
    """Inner products of a gradient g and its reference r: <g, r>, <r, r>, <g, g>."""

    inner: float
    reference: float
    gradient: float

    @property
    def usable(self) -> bool:
        """Whether all is finite and neither vector is zero."""
        finite = math.isfinite(self.inner) and math.isfinite(self.reference) and math.isfinite(self.gradient)
        return finite and self.reference > 0 and self.gradient > 0

    @property
    def precise(self) -> bool:
        """Whether float32 held the squares without overflow and underflow."""
        return _LEAST_SAFE_SQUARE < self.reference < math.inf and _LEAST_SAFE_SQUARE < self.gradient < math.inf


def _count(products: _Products, result: Correction) -> None:
    if not products.usable:
        return
    cosine = products.inner / (math.sqrt(products.reference) * math.sqrt(products.gradient))
    result.checks += 1
    result.conflicts += products.inner < 0
    result.cosines.append(max(-1.0, min(1.0, cosine)))


def _total(products: Sequence[_Products]) -> _Products:
    return _Products(
        sum(p.inner for p in products), sum(p.reference for p in products), sum(p.gradient for p in products)
    )


def _measure(pairs: Sequence[tuple[Tensor, Tensor]], positions: Sequence[int], add_up: AddUp | None) -> list[_Products]:
    dots: list[Tensor] = []
    for gradient, reference in pairs:
        g, r = _flat(gradient, reference)
        dots += [torch.dot(g, r), torch.dot(r, r), torch.dot(g, g)]
    if not dots:
        return []
    if add_up is not None:
        widest = functools.reduce(torch.promote_types, (dot.dtype for dot in dots))
        numbers = add_up(torch.stack([dot.to(widest) for dot in dots]).view(-1, 3), positions).view(-1).tolist()
    elif len({(dot.device, dot.dtype) for dot in dots}) == 1:
        # One transfer for all of them: an accelerator would otherwise be waited for at every parameter.
        numbers = torch.stack(dots).tolist()
    else:
        numbers = [dot.item() for dot in dots]
    return [_Products(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)]


def _widened(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pair in float64: float32 was too narrow for its products (very small or very large gradients)."""
    # Apple's accelerator has no float64.
    gradient, reference = (t.to("cpu" if t.device.type == "mps" else t.device, torch.float64) for t in pair)
    return gradient, reference


def _subtract(gradient: Tensor, reference: Tensor, coefficient: float) -> None:
    """Do g -= coefficient * r in place, in at least float32."""
    if gradient.dtype in _HALVES:
        gradient.copy_(gradient.float().sub_(reference.float(), alpha=coefficient))
    else:
        gradient.sub_(reference, alpha=coefficient)


def _flat(gradient: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors as vectors with their elements in the same order: views where the memory layout allows.

    A dot product does not care which order it is, so channels_last tensors are walked as they lie in memory.
    """
    if gradient.dim() != 1:
        by_stride = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
        gradient, reference = (t.permute(by_stride).reshape(-1) for t in (gradient, reference))
    if gradient.dtype == reference.dtype and gradient.dtype not in _HALVES:
        return gradient, reference
    dtype = torch.promote_types(gradient.dtype, reference.dtype)
    dtype = torch.float32 if dtype in _HALVES else dtype
    return gradient.to(dtype), reference.to(dtype)

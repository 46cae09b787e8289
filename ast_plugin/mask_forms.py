"""The forms in which a mask is held: as it is, with eight weights a byte, or as what is kept along its dimensions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ast_plugin.errors import StateError


@dataclasses.dataclass(frozen=True)
class BitMask:
    """A mask as `pack_bits` makes it.

    Attributes:
        packed: The bits.
        shape: Shape of the mask.
    """

    packed: Tensor
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.packed.device

    def tensor(self) -> Tensor:
        """Return the mask: bool, on the CPU."""
        return unpack_bits(self.packed, self.shape)


@dataclasses.dataclass(frozen=True)
class CutMask:
    """A mask that keeps what is kept along each of some dimensions: whole rows and columns. Made when it is read.

    Attributes:
        shape: Shape of the mask.
        flags: Dimension, and which indices along it are kept, bool (size,), for each dimension that is cut.
    """

    shape: tuple[int, ...]
    flags: tuple[tuple[int, Tensor], ...]

    @property
    def device(self) -> torch.device:
        """Where the mask is made."""
        return self.flags[0][1].device if self.flags else torch.device("cpu")

    def count(self) -> int:
        """Return how many weights are kept."""
        sizes = list(self.shape)
        for dim, kept in self.flags:
            sizes[dim] = int(kept.sum())
        return math.prod(sizes)

    def tensor(self) -> Tensor:
        """Return the mask: bool, contiguous."""
        mask = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        for dim, kept in self.flags:
            mask &= kept.view(-1, *[1] * (len(self.shape) - 1 - dim))
        return mask


HeldMask = Tensor | BitMask | CutMask


def as_mask(held: HeldMask) -> Tensor:
    """Return a mask as a bool tensor, whatever it is held as."""
    return held if isinstance(held, Tensor) else held.tensor()


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask with eight weights a byte.

    Args:
        mask: Bool, any shape, device and memory format.

    Returns:
        uint8, shape (ceil(numel / 8),), on the CPU. In row-major order weight i is bit i % 8 of byte i // 8, the
        least significant bit first; spare bits of the last byte are 0.
    """
    flat = mask.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that `pack_bits` packed: bool, of `shape`, on the CPU.

    Args:
        packed: uint8, shape (ceil(numel / 8),).
        shape: Shape of the mask.

    Raises:
        StateError: If dtype or length do not fit `shape`, or spare bits are set, which `pack_bits` never does.
    """
    count = math.prod(shape)
    size = (count + 7) // 8
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise StateError(
            f"packed mask for shape {tuple(shape)} must be {size} bytes of torch.uint8, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    data = packed.detach().cpu().contiguous().numpy()
    if count % 8 and data[-1] >> (count % 8):
        raise StateError(f"packed mask for shape {tuple(shape)} is damaged: bits are set past its last weight")
    bits = np.unpackbits(data, count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))

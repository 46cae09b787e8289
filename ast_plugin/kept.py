"""Which elements of a vector are kept, in the form that is cheapest to apply.

At 90 % sparsity and more, a list of positions is quicker to use than a mask: zero everything, write the few kept
values back. Below that a mask is smaller and as quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ast_plugin.masking import zero_outside_

# Share of kept weights up to which positions (8 bytes each) take no more memory than a mask (1 byte a weight), and
# are faster to apply: 17 against 21 microseconds on 147 thousand float32 weights of which one in ten is kept.
POSITIONS_UP_TO = 1 / 8


class Kept(Protocol):
    """Which elements of a vector are kept. Vectors are 1-D, contiguous and where the positions or the mask are."""

    @property
    def everything(self) -> bool:
        """Whether all elements are kept."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many elements of `values` belong to each segment of the vector."""

    def keep_only_(self, vector: Tensor) -> Tensor:
        """Zero the other elements of `vector`, in place, and return `values`."""

    def only(self, vector: Tensor) -> Tensor:
        """Return a new vector with zeros where an element is not kept."""

    def values(self, vector: Tensor) -> Tensor:
        """Return the kept elements of a vector whose others are zero; may share its memory."""

    def values_of_dense(self, vector: Tensor) -> Tensor:
        """Return a new vector of the kept elements of any vector."""

    def write(self, values: Tensor, vector: Tensor) -> None:
        """Write what `values` returned to a vector whose other elements are zero."""


class KeptByPosition:
    """The positions of the kept elements; `values` are theirs alone.

    Args:
        mask: Bool vector, True = kept; not held.
        segments: Lengths of the parts that `mask` is made of.
    """

    def __init__(self, mask: Tensor, segments: Sequence[int]) -> None:
        self.positions = mask.nonzero().view(-1)
        ends = np.cumsum(segments)
        found = np.searchsorted(self.positions.numpy(), ends)
        self._lengths = tuple(int(length) for length in np.diff(found, prepend=0))

    @property
    def everything(self) -> bool:
        """False."""
        return False

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many elements each segment keeps."""
        return self._lengths

    def keep_only_(self, vector: Tensor) -> Tensor:
        """Zero the other elements, in place, and return the kept ones as a new vector."""
        kept = vector.index_select(0, self.positions)
        vector.zero_().scatter_(0, self.positions, kept)
        return kept

    def only(self, vector: Tensor) -> Tensor:
        """Return a new vector with zeros where an element is not kept."""
        return torch.zeros_like(vector).scatter_(0, self.positions, vector.index_select(0, self.positions))

    def values(self, vector: Tensor) -> Tensor:
        """Return the kept elements as a new vector."""
        return vector.index_select(0, self.positions)

    def values_of_dense(self, vector: Tensor) -> Tensor:
        """Return the kept elements as a new vector."""
        return vector.index_select(0, self.positions)

    def write(self, values: Tensor, vector: Tensor) -> None:
        """Write the kept elements."""
        vector.scatter_(0, self.positions, values)


class KeptByMask:
    """A bool mask; `values` are the whole vector, zero where an element is not kept.

    Args:
        mask: Bool vector, True = kept; held as it is. None keeps everything.
        segments: Lengths of the parts that it is made of.
    """

    def __init__(self, mask: Tensor | None, segments: Sequence[int]) -> None:
        self._mask = mask
        self._lengths = tuple(segments)

    @property
    def everything(self) -> bool:
        """Whether there is no mask."""
        return self._mask is None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the segments."""
        return self._lengths

    def keep_only_(self, vector: Tensor) -> Tensor:
        """Zero the other elements, in place, and return the vector itself."""
        return vector if self._mask is None else zero_outside_(vector, self._mask)

    def only(self, vector: Tensor) -> Tensor:
        """Return a copy with zeros where an element is not kept."""
        return self.keep_only_(vector.clone())

    def values(self, vector: Tensor) -> Tensor:
        """Return the vector itself."""
        return vector

    def values_of_dense(self, vector: Tensor) -> Tensor:
        """Return a copy with zeros where an element is not kept."""
        return self.only(vector)

    def write(self, values: Tensor, vector: Tensor) -> None:
        """Copy the whole vector, unless it is `values` itself."""
        if values.data_ptr() != vector.data_ptr():
            vector.copy_(values)


def kept_elements(mask: Tensor, count: int, segments: Sequence[int]) -> Kept:
    """Return the cheapest form of a mask.

    Args:
        mask: Bool vector, True = kept. May be held by what is returned: do not write into it afterwards.
        count: Number of True.
        segments: Lengths of the parts that it is made of.
    """
    # Accelerators pay by the kernel, and a product with a mask is a single one.
    if mask.device.type == "cpu" and count <= POSITIONS_UP_TO * mask.numel():
        return KeptByPosition(mask, segments)
    return KeptByMask(None if count == mask.numel() else mask, segments)

"""Patterns of larger units: blocks of the weight matrix, and whole output channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.patterns_base import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPattern(Pattern):
    """Blocks of the weight seen as a matrix (outputs, inputs times kernel places); those at the edges may be smaller.

    Attributes:
        rows: Outputs in a block, at least 1.
        columns: Columns of the matrix in a block, at least 1.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(
                f"pattern {self.name!r} has empty blocks; give at least 1 row and 1 column, such as '4x4'"
            )

    @property
    def name(self) -> str:
        """For example ``4x4``."""
        return f"{self.rows}x{self.columns}"

    def unit_count(self, shape: Sequence[int]) -> int:
        """Return the number of blocks, partial ones included."""
        down, across = self._grid(shape)
        return down * across

    def unit_sizes(self, shape: Sequence[int]) -> Tensor | None:
        """Return the weights in each block; None where no block is cut off at an edge."""
        length = math.prod(shape[1:])
        if shape[0] % self.rows == 0 and length % self.columns == 0:
            return None
        down, across = self._grid(shape)
        device = torch.device("cpu")
        heights = _edge_sizes(shape[0], self.rows, down, device)
        widths = _edge_sizes(length, self.columns, across, device)
        return (heights.unsqueeze(1) * widths).reshape(-1).long()

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the mean score of each block over the weights that it really has, float32 or float64."""
        wide = scores if scores.dtype == torch.float64 else scores.float()
        down, across = self._grid(scores.shape)
        # Rows first and columns after: summing both at once is several times slower.
        sums = self._padded(wide).view(down, self.rows, -1).sum(1).view(down, across, self.columns).sum(2)
        heights = _edge_sizes(scores.shape[0], self.rows, down, scores.device)
        widths = _edge_sizes(math.prod(scores.shape[1:]), self.columns, across, scores.device)
        return (sums / (heights.unsqueeze(1) * widths)).reshape(-1)

    def expand(self, unit_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the mask of the weights, bool in `shape`."""
        down, across = self._grid(shape)
        whole = unit_mask.view(down, 1, across, 1).expand(down, self.rows, across, self.columns)
        matrix = whole.reshape(down * self.rows, across * self.columns)
        # A single block is one flag seen from everywhere until it is copied.
        return matrix[: shape[0], : math.prod(shape[1:])].reshape(tuple(shape)).contiguous()

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """Return one flag a block: whether any of its weights is kept."""
        down, across = self._grid(mask.shape)
        by_row = self._padded(mask).view(down, self.rows, -1).any(1)
        return by_row.view(down, across, self.columns).any(2).reshape(-1)

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        return -(-shape[0] // self.rows), -(-math.prod(shape[1:]) // self.columns)

    def _padded(self, values: Tensor) -> Tensor:
        """Return the values as a contiguous matrix of whole blocks, filled up with zeros."""
        down, across = self._grid(values.shape)
        matrix = values.reshape(values.shape[0], -1)
        short_down, short_across = down * self.rows - matrix.shape[0], across * self.columns - matrix.shape[1]
        if short_down or short_across:
            matrix = torch.nn.functional.pad(matrix, (0, short_across, 0, short_down))
        return matrix.contiguous()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelPattern(Pattern):
    """Whole channels, in all parameters that they go through: a mask is rows and columns (`ast_plugin.channels`).

    What is said here of units holds within one parameter: all weights of an index of dimension 0.
    """

    @property
    def name(self) -> str:
        """``channel``."""
        return "channel"

    @property
    def by_groups(self) -> bool:
        """True."""
        return True

    def unit_count(self, shape: Sequence[int]) -> int:
        """Return the number of outputs."""
        return shape[0]

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the mean score of each output, float32 or float64."""
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return wide.reshape(scores.shape[0], -1).mean(1)

    def expand(self, unit_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the mask of the weights, bool in `shape`."""
        return unit_mask.view(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).contiguous()

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """Return one flag an output: whether any of its weights is kept."""
        return mask.reshape(mask.shape[0], -1).any(1)


def _edge_sizes(length: int, size: int, blocks: int, device: torch.device) -> Tensor:
    sizes = torch.full((blocks,), float(size), device=device)
    sizes[-1] = length - (blocks - 1) * size
    return sizes

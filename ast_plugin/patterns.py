"""Patterns: which masks are allowed, and how scores become one of them with an exact count.

A *unit* is the smallest thing that is kept or dropped: a weight, a block of weights, an output channel. Scores and
masks of a parameter are turned into one number or flag a unit, selection happens among units, and the result is
spread out again. Weights are laid out as PyTorch does: (out, in) for linear, (out, in, height, width) and the like for
convolutions; dimension 0 counts as the outputs and dimension 1 as the inputs, whatever the layer makes of them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, near_names
from ast_plugin.selection_kernels import count_kept, keep_largest, ordered_keys
from ast_plugin.sub_nets import is_n_of_m, parse_n_of_m

_BLOCK_FORM = re.compile(r"^(\d+)x(\d+)$")


class Pattern(ABC):
    """Which masks are allowed, and how a mask is chosen by scores."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How users ask for the pattern, for example ``2:4``."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern dictates, in (0, 1); None if any will do."""
        return None

    def check(self, parameter: str, shape: Sequence[int]) -> None:
        """Make sure that a parameter can carry the pattern.

        Args:
            parameter: Its name, for the message.
            shape: Its shape.

        Raises:
            ConfigError: If it has fewer than two dimensions, or no elements.
        """
        if len(shape) < 2 or math.prod(shape) == 0:
            raise ConfigError(
                f"pattern {self.name!r} needs a weight with outputs and inputs, but {parameter} has shape "
                f"{tuple(shape)}; leave it out with exclude=({parameter!r},)"
            )

    @abstractmethod
    def unit_count(self, shape: Sequence[int]) -> int:
        """Return the number of units of a weight of this shape."""

    @abstractmethod
    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return one score a unit: the mean over the weights of the unit.

        Args:
            scores: One a weight, in the shape of the weight, any floating dtype. Not changed.

        Returns:
            1-D (units,); a view of `scores` where units are weights and the memory layout allows it.
        """

    @abstractmethod
    def expand(self, unit_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the mask of the weights, bool in `shape`, from one flag a unit, bool (units,)."""

    @abstractmethod
    def reduce_mask(self, mask: Tensor) -> Tensor:
        """Return one flag a unit, bool (units,), from a mask of the weights: a unit is kept if any of it is."""

    def kept_units(self, shape: Sequence[int], sparsity: float) -> int:
        """Return how many units are kept at `sparsity` (in [0, 1]): the nearest count, halves upwards."""
        return nearest_count(self.unit_count(shape), sparsity)

    def keep_top(self, unit_scores: Tensor, count: int, shape: Sequence[int]) -> Tensor:
        """Choose the units with the highest scores.

        Args:
            unit_scores: 1-D (units,), any floating dtype; equal scores go to the lower index, NaN is worse than -inf.
            count: How many units to keep, in [0, units].
            shape: Shape of the weight.

        Returns:
            Bool (units,), exactly `count` True; an N:M pattern keeps the nearest count that it allows.

        Raises:
            ConfigError: If `count` is out of range.
        """
        del shape
        return keep_largest(unit_scores, count)

    def regrow(
        self, kept: Tensor, drop_scores: Tensor, grow_scores: Tensor, count: int, shape: Sequence[int]
    ) -> Tensor:
        """Drop the kept units with the lowest scores, then grow as many with the highest (Evci et al. 2020, section 3).

        Args:
            kept: Bool (units,). Not changed.
            drop_scores: 1-D (units,); among equals the higher index is dropped first, and NaN before all.
            grow_scores: 1-D (units,); every unit that is not kept after the drop is a candidate, those just dropped
                included; among equals the lower index grows first, and NaN last.
            count: How many to replace; more than there are kept means all of them.
            shape: Shape of the weight.

        Returns:
            Bool (units,), as many True as in `kept`.
        """
        del shape
        total = count_kept(kept)
        count = min(count, total)
        if count <= 0 or total == kept.numel():
            return kept.clone()  # nothing to drop, or nothing to grow but what was dropped
        survivors = keep_largest(drop_scores, total - count, among=kept)
        return survivors | keep_largest(grow_scores, count, among=~survivors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnstructuredPattern(Pattern):
    """Every weight on its own."""

    @property
    def name(self) -> str:
        """``unstructured``."""
        return "unstructured"

    def check(self, parameter: str, shape: Sequence[int]) -> None:
        """Make sure that a parameter has elements.

        Args:
            parameter: Its name, for the message.
            shape: Its shape.

        Raises:
            ConfigError: If it has none.
        """
        if math.prod(shape) == 0:
            raise ConfigError(
                f"pattern {self.name!r} needs at least one weight, but {parameter} has shape {tuple(shape)}; "
                f"leave it out with exclude=({parameter!r},)"
            )

    def unit_count(self, shape: Sequence[int]) -> int:
        """Return the number of weights."""
        return math.prod(shape)

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the scores as a vector; a view where the memory layout allows it."""
        return scores.reshape(-1)

    def expand(self, unit_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the flags in `shape`, a view."""
        return unit_mask.view(tuple(shape))

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """Return the mask as a vector; a view where the memory layout allows it."""
        return mask.reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NMPattern(UnstructuredPattern):
    """N of every M consecutive weights along the inputs, in each output and each place of a convolution kernel.

    The last group of a row may be shorter: of r < M weights it keeps r N / M, rounded up. While a ramp asks for less
    sparsity than 1 - N / M, more of each M are kept, the same number everywhere.

    Attributes:
        n: Weights kept of every group, in [1, m).
        m: Weights in a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        parse_n_of_m("pattern", self.name)

    @property
    def name(self) -> str:
        """For example ``2:4``."""
        return f"{self.n}:{self.m}"

    @property
    def fixed_sparsity(self) -> float:
        """1 - N / M."""
        return 1 - self.n / self.m

    def check(self, parameter: str, shape: Sequence[int]) -> None:
        """Make sure that a parameter has inputs to group; see `Pattern.check`."""
        Pattern.check(self, parameter, shape)

    def kept_units(self, shape: Sequence[int], sparsity: float) -> int:
        """Return how many weights are kept at `sparsity`, never fewer than the pattern's own number."""
        return self._total(shape, max(self.n, nearest_count(self.m, sparsity)))

    def keep_top(self, unit_scores: Tensor, count: int, shape: Sequence[int]) -> Tensor:
        """Choose the best weights of every group.

        Args:
            unit_scores: 1-D (weights,), any floating dtype; ties and NaN as in `Pattern.keep_top`.
            count: How many weights to keep in all, in [0, weights]; the nearest count that an equal number in every
                group gives is taken, at least N of every M.
            shape: Shape of the weight.

        Returns:
            Bool (weights,).

        Raises:
            ConfigError: If `count` is out of range.
        """
        units = self.unit_count(shape)
        if not 0 <= count <= units:
            raise ConfigError(f"count must lie in [0, {units}], the number of weights to choose from, got {count}")
        per_group = min(range(self.n, self.m + 1), key=lambda k: abs(self._total(shape, k) - count))
        if per_group == self.m:
            return torch.ones(units, dtype=torch.bool, device=unit_scores.device)
        keys = self._grouped(ordered_keys(unit_scores), shape)
        quota = self._quota(shape, per_group, keys.device)
        return self._ungrouped(_ranks(keys) < quota, shape)

    def regrow(
        self, kept: Tensor, drop_scores: Tensor, grow_scores: Tensor, count: int, shape: Sequence[int]
    ) -> Tensor:
        """Drop the lowest of all kept weights, then grow in each group as many as it lost.

        Args:
            kept: Bool (weights,). Not changed.
            drop_scores: 1-D (weights,); ties and NaN as in `Pattern.regrow`.
            grow_scores: 1-D (weights,); ties and NaN as in `Pattern.regrow`.
            count: How many to replace; more than there are kept means all of them.
            shape: Shape of the weight.

        Returns:
            Bool (weights,), in every group as many True as in `kept`.
        """
        total = count_kept(kept)
        count = min(count, total)
        if count <= 0 or total == kept.numel():
            return kept.clone()
        survivors = keep_largest(drop_scores, total - count, among=kept)
        lost = self._grouped(kept & ~survivors, shape).sum(0, keepdim=True)
        keys = ordered_keys(grow_scores)
        keys.masked_fill_(survivors, torch.iinfo(keys.dtype).min)
        grown = _ranks(self._grouped(keys, shape)) < lost
        return survivors | self._ungrouped(grown, shape)

    def _total(self, shape: Sequence[int], per_group: int) -> int:
        inputs = shape[1]
        of_row = inputs // self.m * per_group + self._of_rest(inputs % self.m, per_group)
        return math.prod(shape) // inputs * of_row

    def _of_rest(self, rest: int, per_group: int) -> int:
        return -(-rest * per_group // self.m)

    def _quota(self, shape: Sequence[int], per_group: int, device: torch.device) -> Tensor:
        """Return how many of each group to keep, shape (1, groups)."""
        whole, rest = divmod(shape[1], self.m)
        row = [per_group] * whole + ([self._of_rest(rest, per_group)] if rest else [])
        return torch.tensor(row, device=device).repeat(math.prod(shape) // shape[1]).unsqueeze(0)

    def _grouped(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values as (m, groups), short groups filled with the least value, which nothing ranks below."""
        rows = flat.view(tuple(shape)).movedim(1, -1)
        short = -shape[1] % self.m
        if short:
            least = 0 if flat.dtype == torch.bool else torch.iinfo(flat.dtype).min
            rows = torch.nn.functional.pad(rows, (0, short), value=least)
        return rows.reshape(-1, self.m).t().contiguous()

    def _ungrouped(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        rows = grouped.t().reshape(shape[0], *shape[2:], -1)[..., : shape[1]]
        return rows.movedim(-1, 1).reshape(-1)


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

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the mean score of each block over the weights that it really has, float32 or float64."""
        wide = scores if scores.dtype == torch.float64 else scores.float()
        sums = self._blocks(wide, scores.shape).sum((1, 3))
        down, across = self._grid(scores.shape)
        heights = _edge_sizes(scores.shape[0], self.rows, down, scores.device)
        widths = _edge_sizes(math.prod(scores.shape[1:]), self.columns, across, scores.device)
        return (sums / (heights.unsqueeze(1) * widths)).reshape(-1)

    def expand(self, unit_mask: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the mask of the weights, bool in `shape`."""
        down, across = self._grid(shape)
        whole = unit_mask.view(down, 1, across, 1).expand(down, self.rows, across, self.columns)
        matrix = whole.reshape(down * self.rows, across * self.columns)
        return matrix[: shape[0], : math.prod(shape[1:])].reshape(tuple(shape))

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """Return one flag a block: whether any of its weights is kept."""
        return self._blocks(mask, mask.shape).any(3).any(1).reshape(-1)

    def _grid(self, shape: Sequence[int]) -> tuple[int, int]:
        return -(-shape[0] // self.rows), -(-math.prod(shape[1:]) // self.columns)

    def _blocks(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values as (down, rows, across, columns), filled up with zeros."""
        down, across = self._grid(shape)
        matrix = values.reshape(shape[0], -1)
        short_down, short_across = down * self.rows - matrix.shape[0], across * self.columns - matrix.shape[1]
        if short_down or short_across:
            matrix = torch.nn.functional.pad(matrix, (0, short_across, 0, short_down))
        return matrix.reshape(down, self.rows, across, self.columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelPattern(Pattern):
    """Whole output channels: all weights of an index of dimension 0."""

    @property
    def name(self) -> str:
        """``channel``."""
        return "channel"

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


def parse_pattern(text: str) -> Pattern:
    """Build a pattern from its name.

    Args:
        text: ``unstructured``, ``channel``, ``"N:M"`` such as ``2:4``, or ``"RxC"`` such as ``4x4``.

    Raises:
        ConfigError: If the name is none of these, or its numbers are out of range; the message offers near names.
    """
    if text == "unstructured":
        return UnstructuredPattern()
    if text == "channel":
        return ChannelPattern()
    if is_n_of_m(text):
        n, m = parse_n_of_m("pattern", text)
        return NMPattern(n=n, m=m)
    block = _BLOCK_FORM.match(text)
    if block:
        return BlockPattern(rows=int(block[1]), columns=int(block[2]))
    raise ConfigError(
        f"unknown pattern {text!r}: {near_names(text, ['unstructured', 'channel', '2:4', '4x4'])}, "
        "with any numbers for N:M and rows x columns"
    )


def nearest_count(total: int, sparsity: float) -> int:
    """Return how many of `total` things are kept at `sparsity` (in [0, 1]): the nearest whole number, halves upwards.

    The product is rounded first, so that 0.95 of 10 leaves a true half although 1 - 0.95 is not quite 0.05 in binary.
    """
    return math.floor(round((1 - sparsity) * total, 6) + 0.5)


def _edge_sizes(length: int, size: int, blocks: int, device: torch.device) -> Tensor:
    sizes = torch.full((blocks,), float(size), device=device)
    sizes[-1] = length - (blocks - 1) * size
    return sizes


def _ranks(keys: Tensor) -> Tensor:
    """Return the rank of each key in its column (0 = largest; equal keys by row), for integer keys (m, groups)."""
    m = keys.shape[0]
    if m > 32:
        order = torch.sort(keys, dim=0, descending=True, stable=True).indices
        places = torch.arange(m, device=keys.device).unsqueeze(1).expand_as(order)
        return torch.empty_like(order).scatter_(0, order, places)
    # For small groups comparing every pair is several times faster than sorting many short columns.
    ranks = torch.arange(m, dtype=torch.uint8, device=keys.device).unsqueeze(1).repeat(1, keys.shape[1])
    for lower in range(m - 1):
        wins = (keys[lower + 1 :] > keys[lower]).view(torch.uint8)
        ranks[lower + 1 :] -= wins
        ranks[lower] += wins.sum(0, dtype=torch.uint8)
    return ranks

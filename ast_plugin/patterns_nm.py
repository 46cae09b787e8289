"""N:M patterns: N of every M consecutive weights along the inputs are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.patterns_base import Pattern, UnstructuredPattern, nearest_count
from ast_plugin.selection_kernels import count_kept, keep_largest, ordered_keys
from ast_plugin.sub_nets import parse_n_of_m


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
        groups = self._grouped(_comparable(unit_scores), shape)
        chosen = _ranks(groups) < self._quota(shape, per_group, groups.device)
        return self._ungrouped(chosen, shape)

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
        lost = self._grouped(kept ^ survivors, shape).sum(0, dtype=torch.uint8 if self.m < 256 else torch.int64)
        scores = _comparable(grow_scores)
        candidates = torch.where(survivors, _least(scores), scores)
        grown = _ranks(self._grouped(candidates, shape)) < lost
        return survivors | self._ungrouped(grown, shape)

    def _total(self, shape: Sequence[int], per_group: int) -> int:
        inputs = shape[1]
        of_row = inputs // self.m * per_group + self._of_rest(inputs % self.m, per_group)
        return math.prod(shape) // inputs * of_row

    def _of_rest(self, rest: int, per_group: int) -> int:
        return -(-rest * per_group // self.m)

    def _quota(self, shape: Sequence[int], per_group: int, device: torch.device) -> Tensor:
        """Return how many of each group to keep, in the order of `_grouped`, shape (groups,)."""
        outputs, across, places = self._layout(shape)
        quota = torch.full((outputs, across, places), per_group, device=device)
        if shape[1] % self.m:
            quota[:, -1] = self._of_rest(shape[1] % self.m, per_group)
        return quota.reshape(-1)

    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return outputs, groups along the inputs, and places of the kernel."""
        return shape[0], -(-shape[1] // self.m), math.prod(shape[2:])

    def _grouped(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values as (m, groups), short groups filled with the least value, which nothing ranks below."""
        outputs, across, places = self._layout(shape)
        values = flat.reshape(outputs, shape[1], places)
        short = across * self.m - shape[1]
        if short:
            values = torch.nn.functional.pad(values, (0, 0, 0, short), value=_least(flat))
        return values.view(outputs, across, self.m, places).permute(2, 0, 1, 3).reshape(self.m, -1).contiguous()

    def _ungrouped(self, grouped: Tensor, shape: Sequence[int]) -> Tensor:
        outputs, across, places = self._layout(shape)
        values = grouped.view(self.m, outputs, across, places).permute(1, 2, 0, 3)
        return values.reshape(outputs, across * self.m, places)[:, : shape[1]].reshape(-1)


def _comparable(scores: Tensor) -> Tensor:
    """Return scores that plain comparisons order rightly, with a value to spare below them all; see `_least`."""
    scores = scores.detach()
    # The minimum is NaN if any score is. Integers cost more, so they are for such scores only.
    if math.isfinite(float(scores.min())):
        return scores
    return ordered_keys(scores)


def _least(values: Tensor) -> float:
    if values.dtype == torch.bool:
        return False
    return -math.inf if values.is_floating_point() else torch.iinfo(values.dtype).min


def _ranks(keys: Tensor) -> Tensor:
    """Return the rank of each key in its column (0 = largest; equal keys by row), for keys (m, groups) without NaN."""
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

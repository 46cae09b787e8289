"""The contract of a pattern, and the simplest one: every weight on its own."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ast_plugin.errors import ConfigError
from ast_plugin.selection_kernels import count_kept, keep_largest


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

    @property
    def by_groups(self) -> bool:
        """Whether units go through several parameters and are chosen group by group (`ast_plugin.channels`)."""
        return False

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

    def unit_sizes(self, shape: Sequence[int]) -> Tensor | None:
        """Return the weights in each unit, int64 (units,), on the CPU; None where all units have as many."""
        del shape
        return None

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


def nearest_count(total: int, sparsity: float) -> int:
    """Return how many of `total` things are kept at `sparsity` (in [0, 1]): the nearest whole number, halves upwards.

    The product is rounded first, so that 0.95 of 10 leaves a true half although 1 - 0.95 is not quite 0.05 in binary.
    """
    return math.floor(round((1 - sparsity) * total, 6) + 0.5)

"""Orders of sub-nets for families that differ in more than their sparsity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from ast_plugin.errors import ConfigError, near_names

DENSE_PIVOT = "dense_pivot"
JOINT = "joint"


@dataclasses.dataclass(frozen=True)
class DensePivotOrder:
    """A step of the dense sub-net before each step of another one, which go round in turn.

    Sub-nets of different patterns keep very different weights, and trained in plain turn each undoes what another one
    learned (Li et al. 2024, "Sparse Cocktail"). Here every one of them starts from weights that were just trained
    all together. A dense step and the one after it are a group: the dense gradient is not corrected, and the sparse one
    is kept from opposing it.

    Attributes:
        count: Number of sub-nets N, at least 2.
        pivot: Index of the dense one, in [0, N). It gets half of the steps, each other one 1 / (2N - 2).

    Raises:
        ConfigError: If a number is out of range.
    """

    count: int
    pivot: int
    name: ClassVar[str] = DENSE_PIVOT

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(
                f"alternation {DENSE_PIVOT!r} trains a dense sub-net in turn with others, and count is {self.count!r}; "
                "add sub-nets to sparsities, or use alternation='alternating'"
            )
        if not 0 <= self.pivot < self.count:
            raise ConfigError(f"pivot must be the index of one of {self.count} sub-nets, from 0, got {self.pivot!r}")

    def sub_net_at(self, step: int) -> int:
        """Return the dense one's index at even steps, and the others' in turn at odd ones."""
        turn, other = divmod(step, 2)
        if not other:
            return self.pivot
        index = turn % (self.count - 1)
        return index + (index >= self.pivot)

    def is_group_start(self, step: int) -> bool:
        """Return whether `step` trains the dense one."""
        return step % 2 == 0


@dataclasses.dataclass(frozen=True)
class JointOrder:
    """Every step trains all sub-nets on its batch: N forward and backward passes, gradients added up, one step.

    The baseline that alternating training is compared with, at N times its cost a step (Yu et al. 2019, "Slimmable
    Neural Networks", algorithm 1). Needs ``optimizer.step(closure)``.

    Attributes:
        count: Number of sub-nets N, at least 1.

    Raises:
        ConfigError: If it is smaller.
    """

    count: int
    name: ClassVar[str] = JOINT

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count of sub-nets to train together must be at least 1, got {self.count!r}")

    def sub_nets_at(self, step: int) -> Sequence[int]:
        """Return the indices of all sub-nets."""
        del step
        return range(self.count)

    def sub_net_at(self, step: int) -> int:
        """Return the index of the first sub-net."""
        del step
        return 0

    def is_group_start(self, step: int) -> bool:
        """Return True: a step is a group of its own."""
        del step
        return True


def build_dense_pivot(*, names: Sequence[str], sparsities: Sequence[float], argument: str | None) -> DensePivotOrder:
    """Return the order around the dense sub-net of a run.

    Args:
        names: The sub-nets, in order.
        sparsities: Their target sparsities, in [0, 1).
        argument: Name of the dense one; None takes the only one there is.

    Raises:
        ConfigError: If there is none, several and no name, or the name is not a dense one's.
    """
    dense = [name for name, sparsity in zip(names, sparsities, strict=True) if sparsity == 0]
    if argument is not None and argument not in names:
        raise ConfigError(
            f"alternation '{DENSE_PIVOT}:{argument}' names no sub-net of this run: {near_names(argument, names)}"
        )
    if argument is not None and argument not in dense:
        raise ConfigError(
            f"alternation '{DENSE_PIVOT}:{argument}' names a sub-net of sparsity "
            f"{sparsities[list(names).index(argument)]:g}; the step "
            "between two sparse ones is to be dense: name one of sparsity 0"
        )
    if not dense:
        raise ConfigError(
            f"alternation {DENSE_PIVOT!r} needs a dense sub-net for the steps between two sparse ones, and the lowest "
            f"sparsity is {min(sparsities):g}; add 0.0 to sparsities"
        )
    if argument is None and len(dense) > 1:
        raise ConfigError(
            f"alternation {DENSE_PIVOT!r} needs one dense sub-net, and {', '.join(map(repr, dense))} have sparsity 0; "
            f"choose one with alternation='{DENSE_PIVOT}:{dense[0]}'"
        )
    return DensePivotOrder(len(names), list(names).index(argument or dense[0]))

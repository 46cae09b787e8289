"""Alternation: which sub-net is trained at a step, and where a group of steps begins.

An order is a pure function of the step: nothing to save, nothing to restore, and every process of a distributed run
answers alike. The first step of a group is not corrected by default (see `CorrectionOptions.first_step`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeGuard

from ast_plugin.errors import ConfigError


class Alternation(Protocol):
    """What an order of sub-nets has to answer."""

    @property
    def name(self) -> str:
        """How users ask for the order, for example ``alternating``."""

    def sub_net_at(self, step: int) -> int:
        """Return the index of the sub-net that is trained at `step` (from 0)."""

    def is_group_start(self, step: int) -> bool:
        """Return whether `step` opens a group, so that the step before it belongs to another one."""


class SeveralAtOnce(Alternation, Protocol):
    """An order whose steps may train several sub-nets, by ``optimizer.step(closure)``.

    The closure runs once for each of them, their gradients are added up, and the optimizer steps once. Such a step is
    not corrected: no sub-net's gradient is left out of it.
    """

    def sub_nets_at(self, step: int) -> Sequence[int]:
        """Return the indices of the sub-nets that are trained at `step`, one or more, each once.

        It is asked instead of `sub_net_at`.
        """


def trains_several(alternation: Alternation) -> TypeGuard[SeveralAtOnce]:
    """Return whether steps of this order may train several sub-nets."""
    return hasattr(alternation, "sub_nets_at")


@dataclasses.dataclass(frozen=True)
class AlternatingOrder:
    """Step t trains sub-net t mod N (Yang et al. 2022): every group trains each of them once.

    Attributes:
        count: Number of sub-nets N, at least 1.
    """

    count: int
    name: ClassVar[str] = "alternating"

    def __post_init__(self) -> None:
        _check_count(self.count)

    def sub_net_at(self, step: int) -> int:
        """Return the index of the sub-net that is trained at `step`."""
        return step % self.count

    def is_group_start(self, step: int) -> bool:
        """Return whether `step` trains the first sub-net."""
        return step % self.count == 0


@dataclasses.dataclass(frozen=True)
class RandomOrder:
    """Every step draws its sub-net independently and evenly; groups are N steps long, as in `AlternatingOrder`.

    Attributes:
        count: Number of sub-nets N, at least 1.
        seed: Together with the step it decides the draw; no random generator is touched.
    """

    count: int
    seed: int
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        _check_count(self.count)

    def sub_net_at(self, step: int) -> int:
        """Return the index of the sub-net that is trained at `step`."""
        digest = hashlib.blake2b(f"{self.seed}/{step}".encode(), digest_size=8).digest()
        # 64 random bits over a handful of sub-nets: the remainder is even to 1 part in 10^18.
        return int.from_bytes(digest, "big") % self.count

    def is_group_start(self, step: int) -> bool:
        """Return whether `step` is a multiple of the number of sub-nets."""
        return step % self.count == 0


@dataclasses.dataclass(frozen=True)
class SinglePathOrder:
    """Epoch e trains sub-net e mod N throughout: the single-path baseline.

    A group of steps that trains each sub-net once does not exist here, so every step opens one.

    Attributes:
        count: Number of sub-nets N, at least 1.
        steps_per_epoch: Optimizer steps of an epoch, at least 1.
    """

    count: int
    steps_per_epoch: int
    name: ClassVar[str] = "single_path"

    def __post_init__(self) -> None:
        _check_count(self.count)
        if self.steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1, got {self.steps_per_epoch!r}")

    def sub_net_at(self, step: int) -> int:
        """Return the index of the sub-net that is trained at `step`."""
        return step // self.steps_per_epoch % self.count

    def is_group_start(self, step: int) -> bool:
        """Return True."""
        del step
        return True


@dataclasses.dataclass(frozen=True)
class FixedOrder:
    """Every step trains the same sub-net, and is a group of its own.

    Attributes:
        index: Which sub-net, from 0.
    """

    index: int
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ConfigError(f"index of the fixed sub-net must be at least 0, got {self.index!r}")

    def sub_net_at(self, step: int) -> int:
        """Return the index that was fixed."""
        del step
        return self.index

    def is_group_start(self, step: int) -> bool:
        """Return True."""
        del step
        return True


def _check_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"count of sub-nets to alternate must be at least 1, got {count!r}")

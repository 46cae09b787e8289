"""Learned probabilities of channels: sampling, the two-forward gradient, the projection onto the budget.

Every unit i has a probability s_i, and a mask is drawn as m_i ~ Bernoulli(s_i). The expected loss is minimised over s,
with the probabilities of all units adding up to no more than the budget. Its gradient needs losses alone, no backward:
that of several masks on the same batch. Everything here is plain arithmetic on vectors over all units of all groups,
one group after the other, float64 on the CPU, so that every process computes the same.

**At least one unit of a group stays.** A group without a unit would cut the network through, so masks are drawn on the
condition that no group is empty, by drawing an empty group anew. The condition changes the log-probability of a mask by
a term that depends on s alone; it is the same for all masks of a step and falls out where losses are compared with
their mean. So the estimate is that of the expected loss over the masks which are really drawn. Its variance stays
bounded because the probabilities of a group add up to 1 at least, which `project` sees to: a group is then drawn empty
with probability 1/e at most.

Source: Zhou, Zhang, Chen, Diao, Zhang: "Efficient Neural Network Training via Forward and Backward Propagation
Sparsification", NeurIPS 2021, arXiv 2111.05685.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, StateError

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_HALVINGS = 2000  # more than the exponents of float64; a bisection ends long before


def draw(probabilities: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw a mask of units in which no group is empty.

    Args:
        probabilities: s of every unit, float64 (units,), in [0, 1]; of each group one above 0 at least.
        sizes: How many units each group has, in order.
        generator: The only source of chance; it is advanced.

    Returns:
        bool (units,), True = kept.

    Raises:
        StateError: If all units of a group have probability 0.
    """
    kept = torch.rand(len(probabilities), dtype=torch.float64, generator=generator) < probabilities
    for flags, chances in zip(kept.split(list(sizes)), probabilities.split(list(sizes)), strict=True):
        if not bool((chances > 0).any()):
            raise StateError("all units of a channel group have probability 0, so no mask can keep one of them")
        while not bool(flags.any()):
            flags.copy_(torch.rand(len(chances), dtype=torch.float64, generator=generator) < chances)
    return kept


def gradient(kept: Tensor, losses: Tensor, probabilities: Tensor) -> Tensor:
    """Estimate the preconditioned gradient of the expected loss by the probabilities.

    Its expectation is ``sqrt(s (1 - s)) dE[loss]/ds``, exactly: the sum over the samples is divided by one less than
    their number, because the mean that is subtracted holds every loss itself; with two samples that is 1. The plain
    score (m - s) / (s (1 - s)) has a variance that grows without bound as s approaches 0 or 1. Where s has arrived
    there, the mask says nothing about it and the estimate is 0.

    Args:
        kept: The masks, bool (samples, units), of two samples at least, drawn by `draw`.
        losses: The loss with each, float64 (samples,).
        probabilities: s, float64 (units,).

    Returns:
        float64 (units,).
    """
    deviation = (probabilities * (1 - probabilities)).sqrt()
    score = torch.where(deviation > 0, (kept.to(torch.float64) - probabilities) / deviation, 0)
    return (losses - losses.mean()) @ score / (len(losses) - 1)


def project(values: Tensor, budget: float, sizes: Sequence[int] = ()) -> Tensor:
    """Return the nearest probabilities within the budget: ``clamp(values - v, 0, 1)`` with one v >= 0 for all units.

    v is found by bisection and is 0 where the budget is kept already. With `sizes`, the probabilities of each group add
    up to 1 at least, too: a group that would fall below has a smaller v of its own.

    Args:
        values: float64 (units,), any finite numbers.
        budget: What the probabilities may add up to, from 0, or from the number of groups, to infinity.
        sizes: How many units each group has, in order; empty for the budget alone.

    Returns:
        float64 (units,) in [0, 1]. Where v is not 0, they add up to `budget`, up to the rounding of a sum.

    Raises:
        ConfigError: If the budget is smaller than 0 or the number of groups, or a group has no unit.
    """
    if not budget >= len(sizes) or any(size < 1 for size in sizes):
        raise ConfigError(
            f"a budget of {budget:g} units cannot leave one in each of {len(sizes)} channel groups; use a larger one"
        )
    most = torch.full_like(values, math.inf)
    found = _lowered(values, _amount(values, most, budget))
    if any(float(part.sum()) < 1 for part in (found.split(list(sizes)) if sizes else ())):
        for part, own in zip(values.split(list(sizes)), most.split(list(sizes)), strict=True):
            own.fill_(_amount(part, torch.full_like(part, math.inf), 1.0, least=float(part.min()) - 1))
        found = _lowered(values, most.clamp(max=_amount(values, most, budget)))
    return found


def _lowered(values: Tensor, amount: Tensor | float) -> Tensor:
    return (values - amount).clamp(0, 1)


def _amount(values: Tensor, most: Tensor, budget: float, *, least: float = 0.0) -> float:
    """Return the smallest v from `least` on with which the probabilities add up to `budget` at most.

    `most` is how far each unit may be lowered. Where even that leaves more than the budget, it is by rounding.
    """

    def total(amount: float) -> float:
        return float(_lowered(values, most.clamp(max=amount)).sum())

    low, high = least, max(least, float(values.max()))
    if total(low) <= budget:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if total(middle) > budget:
            low = middle
        else:
            high = middle
    return high


def largest(values: Tensor, count: int, sizes: Sequence[int]) -> Tensor:
    """Return which units to keep: the largest of each group, then the largest of all others.

    Args:
        values: A score of every unit, float64 (units,).
        count: How many units, from the number of groups to all of them.
        sizes: How many units each group has, in order.

    Returns:
        bool (units,) with exactly `count` True; of equal units the first ones.
    """
    kept = torch.zeros(len(values), dtype=torch.bool)
    for part, flags in zip(values.split(list(sizes)), kept.split(list(sizes)), strict=True):
        flags[int(part.argmax())] = True
    order = torch.where(kept, math.inf, values).argsort(descending=True, stable=True)
    kept[order[:count]] = True
    return kept


@dataclasses.dataclass(frozen=True)
class Probabilities:
    """The probabilities of all units, and what Adam remembers of their gradients. A value: steps return a new one.

    Attributes:
        values: s, float64 (units,), in [0, 1].
        first: Mean of the gradients, float64 (units,).
        second: Mean of their squares, float64 (units,).
        count: How many steps of Adam have been made.
    """

    values: Tensor
    first: Tensor
    second: Tensor
    count: int = 0

    @classmethod
    def start(cls, budget: float, sizes: Sequence[int]) -> Probabilities:
        """Return the same probability for all units, as far as each group's add up to 1 at least.

        Args:
            budget: As for `project`.
            sizes: As for `project`.
        """
        zeros = torch.zeros(sum(sizes), dtype=torch.float64)
        return cls(project(torch.full_like(zeros, budget / len(zeros)), budget, sizes), zeros, zeros)

    def moved(self, slope: Tensor, rate: float, budget: float, sizes: Sequence[int]) -> Probabilities:
        """Return them after one step of Adam against `slope`, projected onto the budget.

        Args:
            slope: What `gradient` returned.
            rate: Learning rate, from 0.
            budget: As for `project`.
            sizes: As for `project`.
        """
        count = self.count + 1
        first = self.first.lerp(slope, 1 - _BETAS[0])
        second = self.second.lerp(slope.square(), 1 - _BETAS[1])
        mean, square = first / (1 - _BETAS[0] ** count), second / (1 - _BETAS[1] ** count)
        step = rate * mean / (square.sqrt() + _EPSILON)
        return Probabilities(project(self.values - step, budget, sizes), first, second, count)

    def state_dict(self) -> dict[str, Any]:
        """Return copies as tensors and plain containers."""
        tensors = {"values": self.values, "first": self.first, "second": self.second}
        return {**{name: tensor.clone() for name, tensor in tensors.items()}, "count": self.count}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], units: int) -> Probabilities:
        """Return what `state_dict` described.

        Raises:
            StateError: If it is damaged, or of another number of units.
        """
        try:
            tensors = [state[name].detach().cpu() for name in ("values", "first", "second")]
            count = int(state["count"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StateError(f"saved probabilities of channels are damaged: {type(error).__name__}: {error}") from None
        if any(tensor.dtype != torch.float64 or tuple(tensor.shape) != (units,) for tensor in tensors):
            found = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
            raise StateError(
                f"saved probabilities of channels are {found}, this run needs float64 of {units} units; load a "
                "checkpoint of the same model and groups"
            )
        if not bool(((tensors[0] >= 0) & (tensors[0] <= 1)).all()):
            raise StateError("saved probabilities of channels leave [0, 1]; load another checkpoint")
        values, first, second = (tensor.clone() for tensor in tensors)
        return cls(values, first, second, count)


def cosine_rate(step: int, *, begin: int, end: int, rate: float) -> float:
    """Return the learning rate of the probabilities at `step`: a half cosine from `rate` at `begin` to 0 at `end`."""
    share = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
    return rate * (1 + math.cos(math.pi * share)) / 2

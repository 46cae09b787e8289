"""Time against memory: the ways to hold masks, each timed inside real steps with nothing else around it.

Every way does the least that alternating training on shared weights needs: keep the dense weights aside, mask, give
them back after backward, mask the gradients. BatchNorm, the correction and mask updates are left out, so these figures
show where a mask's form leads, not what a whole package costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ast_plugin.masking import zero_outside_
from overhead_contenders import PLAIN, SPARSITIES, Contender, magnitude_masks, plain, prunable, zeros
from overhead_tasks import Batch, Task
from overhead_timing import HookTimer, hook_times, measure


class Form(Protocol):
    """One mask in some form."""

    def __init__(self, mask: Tensor) -> None: ...

    @property
    def bytes(self) -> int:
        """Memory that it takes."""

    def apply_(self, tensor: Tensor) -> None:
        """Zero the elements that it drops, in place."""


class FloatMask:
    """As research code has it: a product with zeros and ones of the weights' own type."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask.float()

    @property
    def bytes(self) -> int:
        """Four bytes a weight."""
        return self._mask.nbytes

    def apply_(self, tensor: Tensor) -> None:
        """Multiply."""
        tensor.mul_(self._mask)


class ByteMask:
    """A bool mask, multiplied as integers."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    @property
    def bytes(self) -> int:
        """One byte a weight."""
        return self._mask.nbytes

    def apply_(self, tensor: Tensor) -> None:
        """Multiply."""
        zero_outside_(tensor, self._mask)


class BitMask:
    """One bit a weight, unpacked at every use."""

    def __init__(self, mask: Tensor) -> None:
        self._bits = np.packbits(mask.numpy())
        self._shape = mask.shape

    @property
    def bytes(self) -> int:
        """An eighth of a byte a weight."""
        return self._bits.nbytes

    def apply_(self, tensor: Tensor) -> None:
        """Unpack and multiply."""
        mask = torch.from_numpy(np.unpackbits(self._bits, count=self._shape.numel()).view(np.bool_))
        zero_outside_(tensor, mask.view(self._shape))


class Positions:
    """The positions of the kept weights: zero everything, write those back."""

    def __init__(self, mask: Tensor) -> None:
        self._positions = mask.reshape(-1).nonzero().view(-1)

    @property
    def bytes(self) -> int:
        """Eight bytes a kept weight."""
        return self._positions.nbytes

    def apply_(self, tensor: Tensor) -> None:
        """Take the kept values, zero all, write them back."""
        vector = tensor.view(-1)
        kept = vector.index_select(0, self._positions)
        vector.zero_().scatter_(0, self._positions, kept)


FORMS: dict[str, type[Form]] = {
    "float masks": FloatMask,
    "bytes": ByteMask,
    "bits, unpacked at every use": BitMask,
    "positions of kept weights": Positions,
}


def masking(task: Task, name: str, sparsities: Sequence[float] = SPARSITIES) -> tuple[Contender, float]:
    """Return a contender that trains sub-nets in turn with masks of one form.

    Args:
        task: What is trained.
        name: Of the form.
        sparsities: One a sub-net.

    Returns:
        The contender, and the bytes that it holds between steps for each prunable parameter.
    """
    model = task.model()
    weights = [model.get_parameter(weight) for weight in prunable(task)]
    chosen = [magnitude_masks(model, prunable(task), sparsity) for sparsity in sparsities]
    nets = [[FORMS[name](mask) for mask in masks.values()] for masks in chosen]
    optimizer, timer = task.optimizer_of(model), HookTimer()
    dense = [torch.empty_like(weight, requires_grad=False) for weight in weights]
    made = [0]

    @torch.no_grad()
    def put_on(net: Sequence[Form]) -> None:
        torch._foreach_copy_(dense, weights)
        for form, weight in zip(net, weights, strict=True):
            form.apply_(weight)

    @torch.no_grad()
    def take_off(net: Sequence[Form]) -> None:
        torch._foreach_copy_(weights, dense)
        for form, weight in zip(net, weights, strict=True):
            if weight.grad is not None:
                form.apply_(weight.grad)

    before, after = timer.timed("before_forward", put_on), timer.timed("after_backward", take_off)

    def step(batch: Batch) -> None:
        net = nets[made[0] % len(nets)]
        optimizer.zero_grad()
        before(net)
        cross_entropy(model(batch.images), batch.labels).backward()
        after(net)
        optimizer.step()
        made[0] += 1

    def reached() -> list[float]:
        found = []
        for net in nets:
            put_on(net)
            found.append(zeros(weights))
            take_off(net)
        return found

    held = sum(form.bytes for net in nets for form in net) + sum(copy.nbytes for copy in dense)
    contender = Contender(name=name, one_step=step, sparsities=reached, timer=timer)
    return contender, held / sum(weight.numel() for weight in weights)


def measure_forms(task: Task, *, rounds: int) -> dict[str, dict[str, float]]:
    """Return by form ``added``, the share of a plain step that it adds, and ``bytes`` a prunable parameter."""
    made = {name: masking(task, name) for name in FORMS}
    for contender, _ in made.values():
        found = contender.sparsities()
        if any(abs(f - s) > 0.005 for f, s in zip(found, SPARSITIES, strict=True)):
            raise RuntimeError(f"{contender.name} has sparsities {found}, so its time means nothing")
    samples = measure([plain(task), *(contender for contender, _ in made.values())], task.batch, rounds=rounds)
    step = np.median([sample.cpu for sample in samples[PLAIN]])
    return {
        name: {"added": float(hook_times(samples[name])["all"] / step), "bytes": held}
        for name, (_, held) in made.items()
    }

"""Other ways to train with masks, for `overhead.py`: torch's own tools, joint training, and two packages.

Networks are 90 % sparse; joint training has all three sub-nets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize, prune

from overhead_contenders import ONE, SPARSITIES, Contender, magnitude_masks, prunable, zeros
from overhead_tasks import Batch, Task, train_step

JOINT = "joint training of 3"

_FAR = 10**9


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _single(
    task: Task, name: str, model: nn.Module, places: Sequence[tuple[nn.Module, str]], **calls: Any
) -> Contender:
    optimizer = task.optimizer_of(model)
    train_step(model, optimizer, task.small_batch)
    return Contender(
        name=name,
        one_step=lambda batch: train_step(model, optimizer, batch, **calls),
        sparsities=lambda: [zeros([getattr(module, attribute) for module, attribute in places])],
    )


def pruned(task: Task) -> Contender:
    """torch.nn.utils.prune: a forward pre-hook multiplies every weight by its mask."""
    model, names = task.model(), prunable(task)
    masks = magnitude_masks(model, names, ONE)
    places = [owner_of(model, name) for name in names]
    for (module, attribute), mask in zip(places, masks.values(), strict=True):
        prune.custom_from_mask(module, attribute, mask)
    return _single(task, "torch.nn.utils.prune", model, places)


class Masked(nn.Module):
    """A parametrization: the weight times one of some masks.

    Args:
        masks: The masks, as floats.

    Attributes:
        current: Which of them is in use.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.masks = list(masks)
        self.current = 0

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight * self.masks[self.current]


def _parametrize(
    task: Task, sparsities: Sequence[float]
) -> tuple[nn.Module, list[tuple[nn.Module, str]], list[Masked]]:
    model, names = task.model(), prunable(task)
    choices = [magnitude_masks(model, names, sparsity) for sparsity in sparsities]
    places = [owner_of(model, name) for name in names]
    made = [Masked([masks[name].float() for masks in choices]) for name in names]
    for (module, attribute), masked in zip(places, made, strict=True):
        parametrize.register_parametrization(module, attribute, masked)
    return model, places, made


def parametrized(task: Task) -> Contender:
    """torch.nn.utils.parametrize with a product of weight and mask."""
    model, places, _ = _parametrize(task, (ONE,))
    return _single(task, "parametrize with a mask", model, places)


def joint(task: Task) -> Contender:
    """Joint training: one batch through all sub-nets, gradients added, one step. BatchNorm is shared here."""
    model, places, made = _parametrize(task, SPARSITIES)
    optimizer = task.optimizer_of(model)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        add_joint_gradients(model, made, batch)
        optimizer.step()

    def reached() -> list[float]:
        found = []
        for index in range(len(SPARSITIES)):
            _choose(made, index)
            found.append(zeros([getattr(module, attribute) for module, attribute in places]))
        return found

    step(task.small_batch)
    return Contender(name=JOINT, one_step=step, sparsities=reached)


def add_joint_gradients(model: nn.Module, made: Sequence[Masked], batch: Batch) -> None:
    """Run forward and backward for every sub-net; the gradients add up."""
    for index in range(len(made[0].masks)):
        _choose(made, index)
        cross_entropy(model(batch.images), batch.labels).backward()


def _choose(made: Sequence[Masked], index: int) -> None:
    for masked in made:
        masked.current = index


def rigl_torch_static(task: Task) -> Contender:
    """The package rigl-torch with a static topology; it prunes what it finds, norms included."""
    from rigl_torch.RigL import RigLScheduler

    model = task.model()
    optimizer = task.optimizer_of(model)
    pruner = RigLScheduler(
        model, optimizer, dense_allocation=1 - ONE, T_end=_FAR, delta=_FAR, static_topo=True, ignore_linear_layers=False
    )
    train_step(model, optimizer, task.small_batch, before_step=(pruner,))
    masked = [weight for weight, sparsity in zip(pruner.W, pruner.S, strict=True) if sparsity > 0]
    return Contender(
        name="rigl-torch, static",
        one_step=lambda batch: train_step(model, optimizer, batch, before_step=(pruner,)),
        sparsities=lambda: [zeros(masked)],
    )


def sparsimony(task: Task, method: str) -> Contender:
    """The package sparsimony, after its first mask update, with none in sight.

    Args:
        task: What is trained.
        method: ``SET`` or ``RigL``.
    """
    from sparsimony.distributions.base import UniformDistribution
    from sparsimony.dst.rigl import RigL
    from sparsimony.dst.set import SET
    from sparsimony.schedulers.base import ConstantScheduler

    model, names = task.model(), prunable(task)
    optimizer = task.optimizer_of(model)
    scheduler = ConstantScheduler(pruning_ratio=0.1, t_end=_FAR, delta_t=_FAR)
    pruner = {"SET": SET, "RigL": RigL}[method](
        scheduler, UniformDistribution(), optimizer, sparsity=ONE, init_method=None
    )
    logging.getLogger("sparsimony").setLevel(logging.ERROR)
    pruner.prepare(model, [{"tensor_fqn": name} for name in names])
    places = [owner_of(model, name) for name in names]

    def step(batch: Batch) -> None:
        train_step(model, optimizer, batch)
        pruner.step()

    step(task.small_batch)
    if method == "RigL":
        # Until its first update it adds up dense gradients at every step.
        pruner._step_count = _FAR - 1
        pruner.step()
    step(task.small_batch)
    return Contender(
        name=f"sparsimony, {method}",
        one_step=step,
        sparsities=lambda: [zeros([getattr(module, attribute) for module, attribute in places])],
    )

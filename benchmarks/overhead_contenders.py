"""What `overhead.py` compares others with: plain training, and this package with several settings.

Every contender has a model of its own, with the same first weights, and steps on the same batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ast_plugin
from ast_plugin import AlternatingSparseTraining, SubNetSpec
from ast_plugin.selection_kernels import keep_largest
from overhead_tasks import Batch, Task, train_step
from overhead_timing import HookTimer

SPARSITIES = (0.90, 0.95, 0.98)
ONE = 0.90  # the sparsity of those who train a single sparse network
PLAIN, PLAIN_CLIPPED = "plain", "plain, clipped"
OURS = "ours, 3 sub-nets"
OFF, FREEZE, CLIPPED = f"{OURS}, correction off", f"{OURS}, freeze", f"{OURS}, clipped"
SINGLE, EIGHT, EIGHT_OFF = "ours, 1 sub-net", "ours, 8 sub-nets", "ours, 8 sub-nets, correction off"

_RAMP = 4  # steps of the mask schedule, all of them over before anything is measured
_FAR = 10**9


@dataclasses.dataclass(kw_only=True)
class Contender:
    """Somebody who makes training steps.

    Attributes:
        name: How it is called in tables.
        reference: Name of the contender that it is compared with.
        one_step: Makes a step.
        sparsities: Returns the zeros among the prunable weights that forward really uses, one figure a network.
        timer: Time in hooks; None where there are none to time.
        ast: The controller, where there is one.
    """

    name: str
    reference: str = PLAIN
    one_step: Callable[[Batch], None]
    sparsities: Callable[[], list[float]]
    timer: HookTimer | None = None
    ast: AlternatingSparseTraining | None = None

    @property
    def phase(self) -> str:
        """The sub-net that the next step trains."""
        return self.ast.active if self.ast is not None else ""

    def step(self, batch: Batch) -> None:
        """Make one training step."""
        self.one_step(batch)


def alike(count: int) -> list[SubNetSpec]:
    """Return sub-nets of one sparsity, so that nothing but their number tells the runs apart."""
    return [SubNetSpec(name=f"net{index}", sparsity=ONE) for index in range(count)]


def plain(task: Task, *, clip: bool = False) -> Contender:
    """Dense training."""
    model = task.model()
    optimizer = task.optimizer_of(model)
    name = PLAIN_CLIPPED if clip else PLAIN
    return Contender(
        name=name,
        reference=name,
        one_step=lambda batch: train_step(model, optimizer, batch, clip=clip),
        sparsities=list,
    )


def settled(
    task: Task, sparsities: Sequence[float | SubNetSpec], **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, AlternatingSparseTraining]:
    """Return a model trained by GraNet whose short ramp is over: masks are final, by magnitude over all layers."""
    model = task.model()
    optimizer = task.optimizer_of(model)
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=sparsities, total_steps=_FAR, update_interval=1, end_step=_RAMP, **options
    )
    # After the last update two turns of all sub-nets: in the first one what belongs to the final masks is made.
    for _ in range(_RAMP + 3 * len(sparsities)):
        train_step(model, optimizer, task.small_batch)
    return model, optimizer, ast


def ours(
    task: Task, name: str, sparsities: Sequence[float | SubNetSpec], *, clip: bool = False, **options: Any
) -> Contender:
    """This package, past the ramp."""
    model, optimizer, ast = settled(task, sparsities, **options)
    timer = HookTimer()
    timer.attach(ast)

    def reached() -> list[float]:
        found = []
        for sub_net in ast.sub_nets:
            with ast.sub_net(sub_net):
                found.append(zeros([model.get_parameter(weight) for weight in ast.masks.parameters]))
        return found

    return Contender(
        name=name,
        reference=PLAIN_CLIPPED if clip else PLAIN,
        one_step=lambda batch: train_step(model, optimizer, batch, clip=clip),
        sparsities=reached,
        timer=timer,
        ast=ast,
    )


def zeros(weights: Sequence[Tensor]) -> float:
    """Return the share of zeros among all elements."""
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def prunable(task: Task) -> tuple[str, ...]:
    """Return the names of the parameters that this package prunes by default: for all who can be told."""
    model = task.model()
    ast = ast_plugin.wrap(task.optimizer_of(model), model, sparsities=(ONE,), method="static", total_steps=_FAR)
    names = ast.masks.parameters
    ast.detach()
    return names


def magnitude_masks(model: nn.Module, names: Sequence[str], sparsity: float) -> dict[str, Tensor]:
    """Return bool masks that keep the largest weights over all layers."""
    weights = [model.get_parameter(name).detach() for name in names]
    together = torch.cat([weight.abs().reshape(-1) for weight in weights])
    kept = keep_largest(together, round((1 - sparsity) * together.numel()))
    parts = kept.split([weight.numel() for weight in weights])
    return {name: part.view(w.shape).clone() for name, part, w in zip(names, parts, weights, strict=True)}

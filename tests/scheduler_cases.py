"""Every learning rate scheduler of torch and timm, and what must hold for each on a wrapped optimizer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import optimizer_checks as checks
import torch
from networks import assert_same, image_batch, snapshot
from optimizer_cases import tiny_net
from torch import nn
from torch.optim import lr_scheduler

import ast_plugin

Advance = Callable[[int], Any]

_STEPS = 20
_OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@dataclasses.dataclass(frozen=True)
class SchedulerCase:
    """One scheduler.

    Attributes:
        source: ``torch.optim.lr_scheduler`` or ``timm.scheduler``.
        name: Class.
        make: Makes it for an optimizer and returns what is called with the step's number after each step.
    """

    source: str
    name: str
    make: Callable[[torch.optim.Optimizer], Advance]


def _half_then_double(optimizer: torch.optim.Optimizer) -> list[lr_scheduler.LRScheduler]:
    return [lr_scheduler.ConstantLR(optimizer, 0.5, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]


_TORCH: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(_half_then_double(o)),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=4, cycle_momentum=True),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=_STEPS + 1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=15, power=2.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, _half_then_double(o), milestones=[6]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4),
}
_TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"t_initial": 12, "warmup_t": 3, "warmup_lr_init": 1e-4, "cycle_limit": 2},
    "MultiStepLRScheduler": {"decay_t": [4, 9], "decay_rate": 0.5, "warmup_t": 2, "warmup_lr_init": 1e-4},
    "PolyLRScheduler": {"t_initial": 15, "warmup_t": 3, "warmup_lr_init": 0.0},
    "StepLRScheduler": {"decay_t": 5, "decay_rate": 0.5, "warmup_t": 2, "warmup_lr_init": 1e-4},
    "TanhLRScheduler": {"t_initial": 12, "noise_range_t": (2, 9)},
    "WSDLRScheduler": {"t_initial": 16, "decay_t": 6, "warmup_t": 3},
}


def torch_schedulers() -> list[SchedulerCase]:
    """Return every scheduler class of torch; one that is new and takes the optimizer alone is made with that."""
    bases = (lr_scheduler.LRScheduler, lr_scheduler._LRScheduler)
    found = []
    for name, kind in sorted(vars(lr_scheduler).items()):
        if not (inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)) or kind in bases:
            continue
        if kind is lr_scheduler.ReduceLROnPlateau:
            found.append(SchedulerCase("torch.optim.lr_scheduler", name, _plateau))
        elif name in _TORCH or _optimizer_alone(kind):
            make = _TORCH.get(name, kind)
            found.append(SchedulerCase("torch.optim.lr_scheduler", name, lambda o, make=make: _every_step(make(o))))
    return found


def timm_schedulers() -> list[SchedulerCase]:
    """Return every scheduler class of timm, stepped by updates where it can be and by epochs of two steps."""
    import timm.scheduler

    found = []
    for name, kind in sorted(vars(timm.scheduler).items()):
        if not inspect.isclass(kind):
            continue
        if name == "PlateauLRScheduler":
            found.append(SchedulerCase("timm.scheduler", name, _timm_plateau))
        elif name in _TIMM_OPTIONS or _optimizer_alone(kind):
            for epochs in (False, True):
                options = {**_TIMM_OPTIONS.get(name, {}), "t_in_epochs": epochs}
                found.append(
                    SchedulerCase(
                        "timm.scheduler",
                        f"{name} ({'step' if epochs else 'step_update'})",
                        lambda o, kind=kind, options=options: _timm_advance(kind(o, **options), options["t_in_epochs"]),
                    )
                )
    return found


def _optimizer_alone(kind: type) -> bool:
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    return all(parameter.default is not inspect.Parameter.empty for parameter in parameters)


def _every_step(scheduler: Any) -> Advance:
    return lambda step: scheduler.step()


def _plateau(optimizer: torch.optim.Optimizer) -> Advance:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    return lambda step: scheduler.step(1.0)


def _timm_plateau(optimizer: torch.optim.Optimizer) -> Advance:
    from timm.scheduler import PlateauLRScheduler

    scheduler = PlateauLRScheduler(optimizer, patience_t=2, decay_rate=0.5, warmup_t=2, warmup_lr_init=1e-4)
    return lambda step: scheduler.step(step + 1, metric=1.0)


def _timm_advance(scheduler: Any, epochs: bool) -> Advance:
    def advance(step: int) -> None:
        scheduler.step_update(step + 1)
        if step % 2:
            scheduler.step((step + 1) // 2)

    return advance


def check_scheduler(case: SchedulerCase, kind: str, *, wrapped_first: bool) -> None:
    """Check that a scheduler drives a wrapped optimizer as it drives the bare one, groups and weights, bit for bit."""
    runs = []
    for wrapped in (False, True):
        model = tiny_net()
        optimizer = _OPTIMIZERS[kind](model)
        if wrapped and wrapped_first:
            ast_plugin.wrap(optimizer, model, sparsities=(0.0,), total_steps=_STEPS, correction="off")
        advance = case.make(optimizer)
        if wrapped and not wrapped_first:
            ast_plugin.wrap(optimizer, model, sparsities=(0.0,), total_steps=_STEPS, correction="off")
        groups = []
        for step in range(_STEPS):
            checks.train(model, optimizer, range(step, step + 1), image_batch)
            advance(step)
            groups.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
        runs.append((groups, snapshot(model)))
    (bare_groups, bare), (groups, tracked) = runs
    assert len({group["lr"] for group in groups}) > 1  # it did something
    assert groups == bare_groups
    assert_same(bare, tracked)

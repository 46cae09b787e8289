"""One training run of `accuracy.py`: from plain settings to figures for every sub-net.

The loop is that of an ordinary script. What is tried beyond the settings of `ast_plugin` comes in as plugins
(`accuracy_mechanisms.py`). A run is measured in several ways at its end, which cost next to nothing: as it is, with
BatchNorm statistics estimated anew, and with the weights averaged over its last steps; with sup-tickets also as its
superposed sub-nets. Averaging does not touch the training, so one run serves all of these rows, for separate training
as well as for alternating.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ast_plugin
from accuracy_forks import AT_THE_END, Fork
from accuracy_gradients import SharedBackward
from accuracy_joint import JointTraining
from accuracy_mechanisms import LateAverage, PrivateParameters, build_mechanism
from accuracy_tasks import TASKS, Batch, Task
from ast_plugin.config import CorrectionOptions
from ast_plugin.integrations.family import plugin as family
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.training import AlternatingSparseTraining

FINAL = "final"
RECALIBRATED = "recalibrated"
AVERAGE = "average 0.2"
SUPERPOSED = "superposed"
SUPERPOSED_RECALIBRATED = "superposed, recalibrated"
SubNet = float | str | tuple[str, float, str]
WINDOWS = (0.2,)
RECALIBRATION_BATCHES = 16
WARMUP_STEPS = 50
LATE = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes.

    Attributes:
        task: Name of the task.
        seed: Of the initial weights, the batches and the masks.
        sparsities: One sub-net each; with a pattern of its own, its name, sparsity and pattern.
        steps: Optimizer steps of the whole run.
        optimizer: ``sgd`` (momentum) or ``adamw`` (with a short warm-up).
        learning_rate: At its highest.
        schedule: How it falls: ``cosine``, half of one over the run; ``late``, after `LATE` of the run, in a line.
        weight_decay: On all parameters.
        momentum: Of SGD; the first of AdamW's two decay rates.
        options: Further settings of `ASTConfig`; `method` may be a mapping with the class of an ``importance`` of
            torch-pruning and a ``base``.
        mechanisms: Names of plugins with their arguments.
        joint: Whether every step trains all sub-nets, their gradients added up.
    """

    task: str
    seed: int
    sparsities: tuple[SubNet, ...]
    steps: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: str = "cosine"
    momentum: float = 0.9
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mechanisms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    joint: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON keeps them."""
        return {**dataclasses.asdict(self), "sparsities": list(self.sparsities)}

    def sub_nets(self) -> tuple[float | str | SubNetSpec, ...]:
        """Return the sparsities as `ast_plugin.wrap` takes them."""
        return tuple(
            SubNetSpec(name=s[0], sparsity=s[1], pattern=s[2]) if isinstance(s, (tuple, list)) else s
            for s in self.sparsities
        )

    def ast_options(self) -> dict[str, Any]:
        """Return what `ast_plugin.wrap` is told beside sparsities, steps and seed."""
        options = dict(self.options)
        if isinstance(options.get("correction"), Mapping):
            options["correction"] = CorrectionOptions(**options["correction"])
        if isinstance(options.get("method"), Mapping):
            import torch_pruning

            from ast_plugin.integrations.frameworks import from_importance

            importance = getattr(torch_pruning.importance, options["method"]["importance"])()
            options["method"] = from_importance(importance, base=options["method"]["base"])
        return options

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS) if self.optimizer == "adamw" else 1.0
        if self.schedule == "late":
            return self.learning_rate * warmup * min(1.0, (1 - step / self.steps) / (1 - LATE))
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def run(settings: Settings, forks: Path | None = None) -> dict[str, Any]:
    """Train on one thread, measure; returns what goes into the JSON file.

    Args:
        settings: Of the run.
        forks: Where states are kept from which other runs go on; None for none.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    task = TASKS[settings.task]()
    model = task.model()
    found = _run_joint(settings, task, model) if settings.joint else _run_alternating(settings, task, model, forks)
    return {"settings": settings.to_dict(), **found}


def _run_alternating(settings: Settings, task: Task, model: nn.Module, forks: Path | None) -> dict[str, Any]:
    optimizer = make_optimizer(settings, model.parameters())
    average = LateAverage(settings.steps, WINDOWS)
    mechanisms = [build_mechanism(name, argument, settings) for name, argument in settings.mechanisms.items()]
    around = [m for m in mechanisms if isinstance(m, SharedBackward)]
    for mechanism in around:
        mechanism.before_wrap(model)
    controller = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=settings.sub_nets(),
        total_steps=settings.steps,
        seed=settings.seed,
        plugins=[family, *mechanisms, average],
        example_inputs=task.batch(0, seed=0)[0][:1],
        **settings.ast_options(),
    )
    for mechanism in around:
        mechanism.after_wrap(controller)
    model.train()

    def backward(batch: Batch, step: int) -> None:
        task.loss(model, batch).backward()

    closure = controller.needs_closure
    fork, seconds, first = Fork.of(settings, forks), 0.0, 0
    shared = fork is not None and AT_THE_END in settings.mechanisms and fork.path.exists()
    if fork is not None and shared:
        seconds, first = fork.load(model, optimizer), fork.step
    elif fork is not None:
        seconds, first = _loop(settings, task, optimizer, backward, range(fork.step), closure=closure), fork.step
        fork.save(model, optimizer, seconds)
    seconds += _loop(settings, task, optimizer, backward, range(first, settings.steps), closure=closure)
    statistics = controller.statistics()
    return {
        "figures": readouts(controller, task, settings, average, mechanisms, windows=() if shared else WINDOWS),
        "sparsity": {name: controller.masks.sparsity(name) for name in controller.sub_nets},
        "steps": {name: statistics["sub_nets"][name]["steps"] for name in controller.sub_nets},
        "conflicts": statistics["conflicts"] / statistics["checks"] if statistics["checks"] else None,
        "seconds": seconds,
    }


def _run_joint(settings: Settings, task: Task, model: nn.Module) -> dict[str, Any]:
    training = JointTraining(
        model,
        sparsities=settings.sparsities,
        steps=settings.steps,
        seed=settings.seed,
        options=settings.ast_options(),
    )
    optimizer = make_optimizer(settings, training.parameters)
    steps = range(settings.steps)
    seconds = _loop(settings, task, optimizer, lambda batch, step: training.backward(task, batch, step), steps)
    return {
        "figures": {FINAL: training.measure(task)},
        "sparsity": {name: training.masks.sparsity(name) for name in training.sub_nets},
        "steps": dict.fromkeys(training.sub_nets, settings.steps),
        "conflicts": None,
        "seconds": seconds,
    }


def _loop(
    settings: Settings,
    task: Task,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Batch, int], None],
    steps: Iterable[int],
    *,
    closure: bool = False,
) -> float:
    """Train; returns processor time, which does not depend on what else the machine does, as one thread computes."""
    started = time.process_time()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step) * group.get("rate", 1.0)
        batch = task.batch(step, seed=settings.seed)

        def clear_and_go_back(batch: Batch = batch, step: int = step) -> None:
            optimizer.zero_grad()
            backward(batch, step)

        if closure:
            optimizer.step(clear_and_go_back)
        else:
            clear_and_go_back()
            optimizer.step()
    return time.process_time() - started


def make_optimizer(settings: Settings, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of a run."""
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **common)
    return torch.optim.AdamW(parameters, betas=(settings.momentum, 0.99), **common)


def readouts(
    controller: AlternatingSparseTraining,
    task: Task,
    settings: Settings,
    average: LateAverage,
    mechanisms: Sequence[object],
    *,
    windows: Sequence[float] = WINDOWS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures by way of measuring, by sub-net, by measure. The model's weights are changed on the way."""
    model = controller.model
    loader = [task.batch(settings.steps + i, seed=settings.seed) for i in range(RECALIBRATION_BATCHES)]
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    private = [m for m in mechanisms if isinstance(m, PrivateParameters)]

    def measured() -> dict[str, dict[str, float]]:
        model.eval()
        figures = {}
        for name in controller.sub_nets:
            for bank in private:
                bank.put(controller, name)
            with controller.sub_net(name):
                figures[name] = task.measure(model)
        return figures

    found = {FINAL: measured()}
    if has_batch_norm:
        controller.recalibrate(loader)
        found[RECALIBRATED] = measured()
    if SUPERPOSED in controller.versions:
        with controller.version(SUPERPOSED):
            found[SUPERPOSED] = measured()
            controller.recalibrate(loader)
            found[SUPERPOSED_RECALIBRATED] = measured()
    # Of a run that began at a fork, not all of the last steps are known.
    for window in () if private or AT_THE_END in settings.mechanisms else WINDOWS:
        average.apply(controller, window)
        controller.recalibrate(loader)
        found[f"average {window:g}"] = measured()
    return found

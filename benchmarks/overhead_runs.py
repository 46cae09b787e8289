"""Whole runs beside each other, and one mask update of a network of ResNet-50's size, for `overhead.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

import ast_plugin
from ast_plugin.config import ASTConfig
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.schedules import resolve_calendars
from ast_plugin.slots import ParameterSlots
from ast_plugin.updates import MaskUpdater
from mask_update import make_weights, resnet50_shapes
from overhead_contenders import ONE, SPARSITIES, Contender, plain
from overhead_tasks import Task, train_step
from overhead_timing import HookTimer, Sample, hook_times, measure

ALTERNATING, SINGLE_RUN = "three sub-nets", "one sparse net"
PARTS = ("update", "forms")
LONG_RUN = 10_000  # steps; a short one for CIFAR


def whole_run(task: Task, name: str, sparsities: Sequence[float], steps: int) -> Contender:
    """Return a run from its first step on, with the package's default schedule of mask updates."""
    model = task.model()
    optimizer = task.optimizer_of(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=sparsities, total_steps=steps)
    timer = HookTimer()
    timer.attach(ast)
    return Contender(
        name=name,
        one_step=lambda batch: train_step(model, optimizer, batch),
        sparsities=lambda: [ast.masks.sparsity(sub_net) for sub_net in ast.sub_nets],
        timer=timer,
        ast=ast,
    )


def measure_runs(task: Task, *, steps: int) -> dict[str, float]:
    """Train three sub-nets, one sparse net and the dense one for equally many steps, in turn.

    Returns:
        ``ratio``: processor time of the first run by the second's; ``by_hooks``: the same from the time in hooks, on
        equal plain steps; ``to_dense``: that of the first by the third's; ``long``: the first computed for `LONG_RUN`
        steps; ``updates`` of either; ``steps``; ``batch``.

    Raises:
        RuntimeError: If a run does not end at its sparsities.
    """
    runs = [
        plain(task),
        whole_run(task, SINGLE_RUN, (ONE,), steps),
        whole_run(task, ALTERNATING, SPARSITIES, steps),
    ]
    samples = measure(runs, task.batch, rounds=steps, warmup=0)
    for run, wanted in zip(runs[1:], ((ONE,), SPARSITIES), strict=True):
        if any(abs(r - w) > 0.005 for r, w in zip(run.sparsities(), wanted, strict=True)):
            raise RuntimeError(f"the run of {run.name} ended at {run.sparsities()}, so its time means nothing")
    dense, single, alternating = (sum(sample.cpu for sample in samples[run.name]) for run in runs)
    single_hooks, hooks = (sum(sum(s.hooks.values()) for s in samples[run.name]) for run in runs[1:])
    updates = [len(run.ast.history["sparsity"]) if run.ast is not None else 0 for run in runs]
    lengthened = [dense / steps * LONG_RUN + hooks_of_run(samples[run.name], steps=LONG_RUN) for run in runs]
    return {
        "ratio": alternating / single,
        "by_hooks": (dense + hooks) / (dense + single_hooks),
        "to_dense": alternating / dense,
        "long": lengthened[2] / lengthened[1],
        "updates_single": updates[1],
        "updates": updates[2],
        "steps": steps,
        "batch": len(task.batch.labels),
    }


def hooks_of_run(samples: Sequence[Sample], *, steps: int) -> float:
    """Return the seconds that a run of another length spends in hooks, with as many mask updates.

    Args:
        samples: All steps of a measured run. Those with an update due see gradients accumulate.
        steps: Length of the other run.
    """
    ordinary = [sample for sample in samples if sample.hooks and "accumulated" not in sample.hooks]
    if not ordinary:
        return 0.0
    usual = hook_times(ordinary)["all"]
    by_updates = sum(sum(sample.hooks.values()) for sample in samples) - usual * len(samples)
    return steps * usual + by_updates


def measure_mask_updates(*, repeats: int, shapes: Sequence[tuple[int, ...]] | None = None) -> dict[str, object]:
    """Time one update of the 90 % sub-net by the default method at several points of its ramp.

    Args:
        repeats: Updates that count at each point.
        shapes: Of the weights; None takes ResNet-50's.

    Returns:
        ``weights``: how many; ``ms``: by the sparsity that the update reached, ``update`` (new masks) and ``forms``
        (what the next steps apply: positions or bytes), in ms of processor time.
    """
    shapes = resnet50_shapes(10) if shapes is None else shapes
    weights = {str(index): weight for index, weight in enumerate(make_weights(shapes, 0))}
    gradients = dict(zip(weights, make_weights(shapes, 1), strict=True))
    config = ASTConfig(sparsities=SPARSITIES, total_steps=10_000)
    registry = PluginRegistry(())
    patterns = {spec.name: registry.pattern(config.pattern) for spec in config.sub_nets}
    calendars = resolve_calendars(config, len(SPARSITIES))
    method = registry.method(config.method)
    masks = MaskStore(list(patterns), {name: tuple(weight.shape) for name, weight in weights.items()})
    distribution = registry.distribution(config.distribution or method.distribution)
    plans = build_plans(config, patterns, calendars)
    updater = MaskUpdater(config, plans, method=method, distribution=distribution, masks=masks)
    updater.initialize(weights)
    holder = nn.ParameterDict({key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()})
    packed = PackedMasks(ParameterSlots(holder, weights), masks)
    name, calendar = plans[0].name, plans[0].calendar
    times: dict[str, dict[str, float]] = {}
    for share in (0.02, 0.2, 0.5, 0.8, 1.0):
        step = calendar.begin + round(share * (calendar.end - calendar.begin))
        laps: dict[str, list[float]] = {part: [] for part in PARTS}
        for number in range(1 + repeats):
            started = time.process_time()
            reached = updater.update(name, step, weights, gradients).achieved
            updated = time.process_time()
            with torch.no_grad():
                for pack in packed.packs:
                    packed.kept(name, pack, packed.parameters(pack))
            if number:
                laps["update"].append(1000 * (updated - started))
                laps["forms"].append(1000 * (time.process_time() - updated))
        times[f"{reached:.0%}"] = {part: statistics.median(found) for part, found in laps.items()}
    return {"weights": masks.total(), "repeats": repeats, "ms": times}

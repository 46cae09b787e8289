"""Reports and a training to make reports from, shared by the tests of the report modules."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.config import ASTConfig
from ast_plugin.report import Report
from ast_plugin.report_records import ConflictPoint, LayerRecord, SparsityPoint, SubNetRecord
from ast_plugin.schedules import cubic_sparsity


class ListedMasks:
    """Masks given as tensors, answering as `MaskStore` does."""

    def __init__(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.tensors = masks
        self.sub_nets = tuple(masks)
        self.shapes = {name: tuple(mask.shape) for name, mask in next(iter(masks.values())).items()}

    def kept(self, sub_net: str, parameter: str | None = None) -> int:
        masks = self.tensors[sub_net]
        return sum(int(masks[name].sum()) for name in ([parameter] if parameter else masks))

    def total(self, parameter: str | None = None) -> int:
        return sum(math.prod(self.shapes[name]) for name in ([parameter] if parameter else self.shapes))

    def overlap(self, a: str, b: str) -> float:
        both = sum(int((self.tensors[a][name] & self.tensors[b][name]).sum()) for name in self.shapes)
        return both / self.kept(a)


class ListedTraining:
    """What `Report.from_training` reads of a controller, given as plain values."""

    def __init__(self, model: nn.Module, masks: ListedMasks, config: ASTConfig, **values: Any) -> None:
        self.model = model
        self.masks = masks
        self.config = config
        self.step = values.get("step", 0)
        self.history: Mapping[str, Sequence[Mapping[str, Any]]] = values.get("history", {})
        self.metrics: Mapping[str, Mapping[str, float]] = values.get("metrics", {})
        self.counts: Mapping[str, Any] = values.get("statistics", {})

    def statistics(self) -> Mapping[str, Any]:
        return self.counts


def small_training(**values: Any) -> ListedTraining:
    """A network of two linear layers, 8 x 4 and 2 x 8, with sub-nets that keep the first half and the first quarter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = {}
    for name, share in (("s50", 2), ("s75", 4)):
        masks[name] = {
            "0.weight": (torch.arange(32) < 32 // share).view(8, 4),
            "2.weight": (torch.arange(16) < 16 // share).view(2, 8),
        }
    config = ASTConfig(sparsities=(0.5, 0.75), total_steps=100)
    return ListedTraining(model, ListedMasks(masks), config, **values)


def run_report(
    sparsities: Sequence[float | str] = (0.9, 0.95, 0.98),
    *,
    blocks: int = 20,
    steps: int = 1200,
    window: int = 10,
    metrics: Sequence[str] = ("accuracy",),
    history: bool = True,
    title: str = "ResNet on digits",
    seed: int = 1,
) -> Report:
    """A run that never happened, with figures like those of a ResNet: noisy conflicts, uneven layers."""
    draw = random.Random(seed)
    config = ASTConfig(sparsities=tuple(sparsities), total_steps=steps, update_interval=40, drop_fraction=0.1)
    specs = config.sub_nets
    shapes = {}
    for block in range(blocks):
        width = 16 * 2 ** (3 * block // blocks)
        name = f"layer{3 * block // blocks + 1}.{block // 2 % 8}.conv{block % 2 + 1}.weight"
        shapes[name if name not in shapes else f"extra.{block}.{name}"] = (width, width, 3, 3)
    shapes["fc.weight"] = (10, 64)
    total = sum(math.prod(shape) for shape in shapes.values())
    layers = []
    for i, (name, shape) in enumerate(shapes.items()):
        ease = math.exp(draw.gauss(0, 0.25)) * (2.2 if i < 3 or name == "fc.weight" else 0.9)
        layers.append(
            LayerRecord(
                name=name,
                shape=shape,
                flops=2 * math.prod(shape) * 64,
                sparsity={s.name: max(0.0, 1 - min(1.0, (1 - s.sparsity) * ease)) for s in specs},
            )
        )
    dense_flops = sum(layer.flops or 0 for layer in layers) + 55_296
    sub_nets, conflicts, ramps = [], [], []
    for i, spec in enumerate(specs):
        checks = 0 if i == 0 and len(specs) > 1 else steps // len(specs) * len(layers)
        rate = 0.0
        for step in range(window, steps + 1, window) if history and checks else ():
            rate = 0.36 - 0.1 * step / steps + draw.gauss(0, 0.05) + 0.02 * i
            rate = min(1.0, max(0.0, rate))
            here = max(1, checks * window // steps)
            conflicts.append(
                ConflictPoint(
                    step=step,
                    sub_net=spec.name,
                    checks=here,
                    conflicts=round(rate * here),
                    mean_cosine=0.12 - 0.2 * rate + draw.gauss(0, 0.02),
                )
            )
        for step in range(13 * i, steps * 7 // 10 + 1, 40) if history else ():
            target = cubic_sparsity(step, begin=0, end=steps * 7 // 10, initial=0.0, final=spec.sparsity)
            ramps.append(SparsityPoint(step=step, sub_net=spec.name, target=target, achieved=target))
        kept = round((1 - spec.sparsity) * total)
        density = 1 - spec.sparsity
        sub_nets.append(
            SubNetRecord(
                name=spec.name,
                pattern=spec.pattern or "unstructured",
                target_sparsity=spec.sparsity,
                achieved_sparsity=1 - kept / total,
                kept_weights=kept,
                prunable_weights=total,
                parameters=kept + 2_000,
                flops=round(dense_flops * density * 1.2),
                metrics={
                    m: 0.945 - 0.15 * spec.sparsity**20 - 0.01 * j + draw.gauss(0, 0.001) for j, m in enumerate(metrics)
                },
                steps=steps // len(specs),
                checks=checks,
                conflicts=round(checks * 0.31),
                mean_cosine=0.052 if checks else None,
            )
        )
    overlap = []
    for a in specs:
        row = []
        for b in specs:
            densest = min(1.0, (1 - b.sparsity) / (1 - a.sparsity))
            row.append(1.0 if a is b else 0.93 * densest)
        overlap.append(tuple(row))
    return Report(
        title=title,
        sub_nets=tuple(sub_nets),
        layers=tuple(layers),
        overlap=tuple(overlap),
        sparsity_history=tuple(sorted(ramps, key=lambda point: point.step)),
        conflict_history=tuple(sorted(conflicts, key=lambda point: point.step)),
        settings=config.to_dict(),
        steps=steps,
        elapsed_seconds=151.3,
        dense_parameters=total + 2_000,
        dense_flops=dense_flops,
        example_input="1 x 1 x 8 x 8",
        versions={"ast_plugin": "0.1.0", "torch": "2.15.0"},
    )

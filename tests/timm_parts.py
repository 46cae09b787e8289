"""A small network of timm, ready to be trained step by step, for tests of the parts of a run."""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from networks import assert_same, snapshot
from timm.task import ClassificationTask
from torch import nn

from ast_plugin.integrations.timm.flags import Settings
from ast_plugin.integrations.timm.run import TimmRun

STEPS_PER_EPOCH = 4


def network(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=10, **options)


def arguments(**values: Any) -> argparse.Namespace:
    given = {"model": "test_resnet", "device": "cpu", "eval_metric": "top1", "resume": "", "img_size": 32}
    return argparse.Namespace(**{**given, **values})


def timm_run(
    sparsities: tuple[float, ...] = (0.5, 0.8), args: argparse.Namespace | None = None, **options: Any
) -> TimmRun:
    settings = Settings(options={"sparsities": list(sparsities), **options}, report=False)
    return TimmRun(settings, arguments() if args is None else args)


def task_of(model: nn.Module) -> ClassificationTask:
    return ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), verbose=False)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(task: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Train on one batch of noise; the same batch for the same number."""
    generator = torch.Generator().manual_seed(number)
    pictures, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator)
    task.train()
    task(pictures, labels)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


__all__ = ["STEPS_PER_EPOCH", "arguments", "assert_same", "network", "sgd", "snapshot", "step", "task_of", "timm_run"]

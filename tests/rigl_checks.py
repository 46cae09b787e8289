"""What `test_frameworks_rigl_ranks.py` runs on two ranks: rigl-torch under DDP goes on as one process does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from global_batches import close, mine
from networks import mlp, sgd, vector_batch
from rigl_torch.RigL import RigLScheduler
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.integrations.frameworks import take_over

TAKEN, STEPS = 4, 20  # before the first update: its own look at the magnitudes of each rank's gradients


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, numbers: range, *, whole: bool) -> None:
    for number in numbers:
        inputs, labels = (tensor if whole else mine(tensor) for tensor in vector_batch(number))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        if scheduler():
            optimizer.step()


def trained(model: nn.Module, *, whole: bool) -> ast_plugin.AlternatingSparseTraining:
    """Return the controller of a run that rigl-torch began."""
    optimizer = sgd(model)
    torch.manual_seed(1)
    scheduler = RigLScheduler(
        model, optimizer, dense_allocation=0.4, T_end=18, delta=5, alpha=0.5, ignore_linear_layers=False
    )
    steps(model, optimizer, scheduler, range(TAKEN), whole=whole)
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler, sparser=(0.8,)), total_steps=60)
    steps(model, optimizer, scheduler, range(TAKEN, STEPS), whole=whole)
    return ast


def two_ranks_go_on_as_one_process(folder: Path) -> Iterator[None]:
    alone = trained(mlp(), whole=True)
    yield
    model = DistributedDataParallel(mlp())
    ast = trained(model, whole=False)  # masks that differ between ranks would have been noticed
    assert ast.masks.parameters == ("2.weight", "4.weight")
    for name in ast.sub_nets:
        for parameter, mask in ast.masks.of(name).items():
            assert torch.equal(mask, alone.masks.get(name, parameter)), (name, parameter)
    close(model.module, alone.model)


CHECKS = {check.__name__: check for check in (two_ranks_go_on_as_one_process,)}

"""What `test_frameworks_ranks.py` runs on two ranks: other frameworks' decisions are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from channel_networks import mlp_groups
from fsdp_checks import start, train
from global_batches import STEPS, close, mine, same_masks, single
from networks import mlp, sgd, vector_batch
from rigl_torch.RigL import RigLScheduler
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.integrations.frameworks import from_importance, take_over

TAKEN, ENOUGH = 4, 20  # before the first update: its own look at the magnitudes of each rank's gradients


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
    steps(model, optimizer, scheduler, range(TAKEN, ENOUGH), whole=whole)
    return ast


def a_run_of_rigl_torch_goes_on(folder: Path) -> Iterator[None]:
    alone = trained(mlp(), whole=True)
    yield
    model = DistributedDataParallel(mlp())
    ast = trained(model, whole=False)  # masks that differ between ranks would have been noticed
    assert ast.masks.parameters == ("2.weight", "4.weight")
    for name in ast.sub_nets:
        for parameter, mask in ast.masks.of(name).items():
            assert torch.equal(mask, alone.masks.get(name, parameter)), (name, parameter)
    close(model.module, alone.model)


def importances_see_whole_weights(folder: Path) -> Iterator[None]:
    options = {"pattern": "channel", "groups": mlp_groups(), "sparsities": (0.25, 0.5, 0.75)}
    importances = (tp.importance.TaylorImportance(), tp.importance.MagnitudeImportance(p=1, bias=True))
    expected = [
        single(mlp, vector_batch, slicing="leaves", method=from_importance(importance), **options)
        for importance in importances
    ]
    yield
    for importance, (one, its_ast) in zip(importances, expected, strict=True):
        model, optimizer, ast = start(mlp, method=from_importance(importance), **options)
        train(model, optimizer, range(STEPS), vector_batch)
        same_masks(ast, its_ast)
        close(model, one)


CHECKS = {check.__name__: check for check in (a_run_of_rigl_torch_goes_on, importances_see_whole_weights)}

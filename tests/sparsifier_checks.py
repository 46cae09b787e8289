"""What `test_frameworks_ranks.py` runs on two ranks: sparsifiers that decide the masks of a data-parallel run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from global_batches import mine
from networks import mlp, sgd, vector_batch
from sparsimony.distributions.base import UniformDistribution
from sparsimony.dst.rigl import RigL
from sparsimony.dst.set import SET
from sparsimony.schedulers.base import ConstantScheduler
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.integrations.frameworks import from_sparsifier

STEPS = 14
CONFIG = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}]


def run(kind: Any, *, parallel: bool, inside: bool = True) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """Train on the global batches, a rank on its share of each; return the model and the masks."""
    model = mlp()
    optimizer = sgd(model, momentum=0)
    if kind is WeightNormSparsifier:
        sparsifier = kind(sparse_block_shape=(1, 1))
        options: dict[str, Any] = {"total_steps": 40, "update_interval": 4}
    else:
        sparsifier = kind(ConstantScheduler(0.3, 100, 4), UniformDistribution(), optimizer, init_method=None)
        options = {}
    torch.manual_seed(0)  # which draws the first masks
    sparsifier.prepare(model, copy.deepcopy(CONFIG))
    called = DistributedDataParallel(model) if parallel and inside else model
    ast = ast_plugin.wrap(
        optimizer, called, sparsities=(0.5, 0.8), method=from_sparsifier(sparsifier, **seeing(kind)), **options
    )
    called = DistributedDataParallel(model) if parallel and not inside else called
    for step in range(STEPS):
        batch = vector_batch(step)
        inputs, labels = (mine(tensor) if parallel else tensor for tensor in batch)
        optimizer.zero_grad()
        functional.cross_entropy(called(inputs), labels).backward()
        optimizer.step()
    return model, {name: ast.masks.of(name) for name in ast.sub_nets}


def seeing(kind: Any) -> dict[str, Any]:
    return {"see": "all"} if kind is WeightNormSparsifier else {}


def two_ranks_are_one_process_on_the_global_batch(folder: Path) -> Iterator[None]:
    kinds = (WeightNormSparsifier, RigL, SET)
    expected = [run(kind, parallel=False) for kind in kinds]
    yield
    assert dist.get_world_size() == 2
    for kind, (model, masks) in zip(kinds, expected, strict=True):
        for inside in (True, False):
            found, own = run(kind, parallel=True, inside=inside)
            for name, of in masks.items():
                for parameter, mask in of.items():
                    assert torch.equal(own[name][parameter], mask), (kind, name, parameter)
            for name, parameter in found.named_parameters():
                assert torch.allclose(parameter, model.get_parameter(name), atol=1e-5), (kind, name)


CHECKS = {check.__name__: check for check in (two_ranks_are_one_process_on_the_global_batch,)}

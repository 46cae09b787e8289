"""What `test_step_together_ranks.py` runs on two ranks: steps that train several sub-nets, under data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_checks import same_on_all_ranks
from global_batches import OPTIONS, STEPS, Batch, close, mine, same_masks
from networks import adamw, conv_net, image_batch, mlp, sgd, vector_batch, wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.integrations.family import plugin

TOGETHER: dict[str, Any] = {**OPTIONS, "alternation": "joint", "plugins": [plugin]}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    parts: int,
    before: Callable[[bool], None] = lambda last: None,
) -> None:
    """Train with closures that accumulate `parts` micro-batches; `before` is told of each whether it is the last."""
    model.train()
    for step in range(STEPS):
        micro = list(zip(*(tensor.chunk(parts) for tensor in batch(step)), strict=True))

        def closure(micro: Any = micro) -> Tensor:
            optimizer.zero_grad()
            losses = []
            for index, (part, target) in enumerate(micro):
                before(index == len(micro) - 1)
                losses.append(functional.cross_entropy(model(part), target) / len(micro))
                losses[-1].backward()
            return torch.stack(losses).sum().detach()

        optimizer.step(closure)


def single(make: Callable[[], nn.Module], batch: Batch, parts: int, optimizer: Callable, **options: Any) -> Any:
    model = make()
    _, optimizer, ast = wrapped(model, optimizer(model), **{**TOGETHER, **options})
    train(model, optimizer, batch, parts)
    return model, ast


CASES: dict[str, tuple[Callable, Batch, int, Callable, dict[str, Any], dict[str, Any]]] = {
    "mlp": (mlp, vector_batch, 1, sgd, {}, {}),
    "adamw, freeze": (mlp, vector_batch, 1, adamw, {"inactive": "freeze", "method": "rigl"}, {}),
    "bucket views": (mlp, vector_batch, 1, sgd, {"method": "rigl"}, {"gradient_as_bucket_view": True}),
    "micro-batches": (mlp, vector_batch, 2, sgd, {"method": "rigl"}, {"gradient_as_bucket_view": True}),
    "find unused": (mlp, vector_batch, 1, sgd, {}, {"find_unused_parameters": True}),
    "static graph": (mlp, vector_batch, 1, sgd, {}, {"static_graph": True}),
}


def two_ranks_equal_one_process(folder: Path) -> Iterator[None]:
    expected = {
        label: single(make, batch, parts, optimizer, **options)
        for label, (make, batch, parts, optimizer, options, _) in CASES.items()
    }
    yield
    for label, (make, batch, parts, optimizer, options, ddp) in CASES.items():
        bare = make()
        optimizer = optimizer(bare)
        _, _, ast = wrapped(bare, optimizer, **{**TOGETHER, **options})
        module = DistributedDataParallel(bare, **ddp)

        def synchronise(last: bool, module: Any = module) -> None:
            module.require_backward_grad_sync = last

        def halves(step: int, batch: Batch = batch) -> tuple[Tensor, ...]:
            return tuple(mine(tensor) for tensor in batch(step))

        train(module, optimizer, halves, parts, synchronise)
        same_masks(ast, expected[label][1])
        close(bare, expected[label][0])
        same_on_all_ranks(bare, ast)
        assert ast.step == STEPS


def batch_norm_of_every_sub_net_is_the_same_on_both(folder: Path) -> Iterator[None]:
    # BatchNorm normalises each rank's part by itself, as it does with micro-batches.
    expected, expected_ast = single(conv_net, image_batch, 2, adamw, method="static")
    yield
    bare = conv_net()
    optimizer = adamw(bare)
    _, _, ast = wrapped(bare, optimizer, **{**TOGETHER, "method": "static"})
    train(DistributedDataParallel(bare), optimizer, lambda step: tuple(mine(tensor) for tensor in image_batch(step)), 1)
    close(bare, expected)
    same_on_all_ranks(bare, ast)
    for name in ast.sub_nets:
        theirs = expected_ast.private_state(name)
        for key, tensor in ast.private_state(name).items():
            if key in dict(bare.named_parameters()):
                torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-4)


def sharded_parameters_are_refused(folder: Path) -> Iterator[None]:
    yield
    model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = sgd(model)
    with pytest.raises(ast_plugin.WrapError, match="'joint' trains several sub-nets in one step, and adds up"):
        wrapped(model, optimizer, **TOGETHER)
    assert wrapped(model, optimizer, **OPTIONS)[2].step == 0


CHECKS = {
    check.__name__: check
    for check in (
        two_ranks_equal_one_process,
        batch_norm_of_every_sub_net_is_the_same_on_both,
        sharded_parameters_are_refused,
    )
}

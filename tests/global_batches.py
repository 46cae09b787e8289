"""What the checks of several ranks share: one process on the same global batches, and how to compare with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from networks import sgd, wrapped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import ast_plugin

STEPS = 24
CLIP = 0.2  # low enough to clip most gradients
OPTIONS: dict[str, Any] = {"total_steps": STEPS, "update_interval": 4, "sparsities": (0.5, 0.8, 0.9)}

Batch = Callable[[int], tuple[Tensor, Tensor]]


def mine(tensor: Tensor) -> Tensor:
    """Return this rank's half of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def clipped_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    parts: int = 1,
    before: Callable[[bool], None] = lambda last: None,
) -> None:
    """Do one step on `parts` micro-batches; `before` runs before each and is told whether it is the last."""
    optimizer.zero_grad()
    micro = list(zip(*(tensor.chunk(parts) for tensor in batch), strict=True))
    for index, (part, target) in enumerate(micro):
        before(index == len(micro) - 1)
        (functional.cross_entropy(model(part), target) / parts).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


def single(
    make: Callable[[], nn.Module], batch: Batch, *, parts: int = 1, optimizer: Callable = sgd, **options: Any
) -> tuple[nn.Module, ast_plugin.AlternatingSparseTraining]:
    """Train one process on global batches, `parts` micro-batches a step."""
    assert not dist.is_initialized()
    model = make()
    _, optimizer, ast = wrapped(model, optimizer(model), **{**OPTIONS, **options})
    for step in range(STEPS):
        clipped_step(model, optimizer, batch(step), parts)
    return model, ast


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without graph, gathered where ranks hold parts of it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def close(one: nn.Module, other: nn.Module) -> None:
    """Compare the parameters of two models; the first may be compiled, both may be sharded."""
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        name = name.removeprefix("_orig_mod.")
        torch.testing.assert_close(
            whole(parameter), whole(others[name]), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def same_masks(one: ast_plugin.AlternatingSparseTraining, other: ast_plugin.AlternatingSparseTraining) -> None:
    """Compare the masks of two runs bit for bit, and what is counted of them; the first may be sharded."""
    for name in other.sub_nets:
        for parameter in other.masks.parameters:
            mask = one.masks.get(name, parameter)
            assert torch.equal(whole(mask), other.masks.get(name, parameter)), (name, parameter)
            assert one.masks.kept(name, parameter) == other.masks.kept(name, parameter)
        assert one.masks.sparsity(name) == other.masks.sparsity(name)

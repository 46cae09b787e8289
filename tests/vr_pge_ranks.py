"""What `test_vr_pge_ranks.py` runs on two ranks: VR-PGE under DDP against one process on the same global batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vr_pge_runs as runs
from global_batches import close, mine, same_masks
from networks import image_batch, plain_conv_net, sgd
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import ast_plugin
from ast_plugin.distributed import check_same_on_all_ranks
from ast_plugin.errors import StateError

STEPS = 30


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ast: ast_plugin.AlternatingSparseTraining,
    step: int,
    batch: tuple[Tensor, Tensor],
) -> None:
    """Make a step, odd ones with a closure, even ones with `explore`."""

    def loss() -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    if step % 2:
        optimizer.step(closure)
    else:
        ast.explore(loss)
        closure()
        optimizer.step()


def learned(ast: ast_plugin.AlternatingSparseTraining) -> Tensor:
    return torch.cat(list(ast.sampler.probabilities.values()))  # type: ignore[union-attr]


def two_ranks_learn_what_one_process_learns_on_their_batches_together(folder: Path) -> Iterator[None]:
    model, optimizer, ast = runs.wrapped(plain_conv_net(), groups=runs.PLAIN_GROUPS)
    for step in range(STEPS):
        train(model, optimizer, ast, step, image_batch(step))
    yield
    bare = plain_conv_net()
    module = DistributedDataParallel(bare)
    _, other, both = runs.wrapped(module, sgd(bare), groups=runs.PLAIN_GROUPS)
    for step in range(STEPS):
        images, labels = image_batch(step)
        train(module, other, both, step, (mine(images), mine(labels)))
        check_same_on_all_ranks("probabilities", lambda: learned(both).numpy().tobytes().hex())
    same_masks(both, ast)
    torch.testing.assert_close(learned(both), learned(ast), rtol=1e-4, atol=1e-6)
    close(bare, model)
    assert both.at_target
    assert both.sampler is not None
    both.sampler._final[0] ^= torch.distributed.get_rank() == 0  # type: ignore[attr-defined]
    with pytest.raises(StateError, match="final masks of sub-net 's50' differ between ranks"):
        both._parts.sampled._settled(both.sampler)


CHECKS = {check.__name__: check for check in (two_ranks_learn_what_one_process_learns_on_their_batches_together,)}

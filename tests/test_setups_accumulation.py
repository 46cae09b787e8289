"""Gradient accumulation: k micro-batches are one batch of k times the size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import adamw, image_batch, mlp, sgd, wrapped
from reference_run import Loss
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for
from torch import nn
from torch.nn import functional

PARTS = 4


def accumulating_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    for part, part_labels in zip(inputs.chunk(PARTS), labels.chunk(PARTS), strict=True):
        (functional.cross_entropy(model(part), part_labels) / PARTS).backward()
    optimizer.step()


def micro_batches(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)

    def loss(part: torch.Tensor, part_labels: torch.Tensor) -> Loss:
        return lambda network: functional.cross_entropy(network(part), part_labels) / PARTS

    return [loss(*pair) for pair in zip(inputs.chunk(PARTS), labels.chunk(PARTS), strict=True)]


def test_accumulation_is_bit_identical_to_plain_accumulation() -> None:
    assert_as_plain(accumulating_step)


@pytest.mark.parametrize("build", [sgd, adamw])
def test_accumulation_with_sub_nets_is_the_run_written_by_hand(build: Any) -> None:
    assert_as_reference(accumulating_step, losses=micro_batches, build=build)


def test_micro_batches_are_one_batch_of_their_size() -> None:
    # Without BatchNorm, which sees the micro-batches. The masks are equal bit for bit: updates see the summed gradient.
    assert_as_reference(accumulating_step, net=mlp, rtol=1e-4, atol=1e-5)


def test_all_micro_batches_see_one_sub_net_and_the_next_step_the_next() -> None:
    model, optimizer, ast = wrapped(method="static")
    seen: list[int] = []
    handle = model.head.register_forward_hook(lambda *_: seen.append(int(model.conv2.weight.count_nonzero())))
    expected = []
    for step in range(6):
        expected += [ast.masks.kept(ast.active, "conv2.weight")] * PARTS
        accumulating_step(model, optimizer, step)
    handle.remove()
    assert seen == expected
    assert len(set(seen)) == 3


def test_a_batch_without_a_step_is_part_of_the_next_step() -> None:
    # An epoch whose last micro-batches make no full step: the gradients stay, as in the plain loop.
    model, optimizer, ast = wrapped(**BUSY)
    inputs, labels = image_batch(0)
    functional.cross_entropy(model(inputs), labels).backward()
    first = model.conv1.weight.grad.clone()
    model.eval()
    with torch.no_grad():
        model(inputs)
    model.train()
    functional.cross_entropy(model(inputs), labels).backward()
    torch.testing.assert_close(model.conv1.weight.grad, 2 * first)
    optimizer.step()
    assert ast.step == 1

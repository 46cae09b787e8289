"""Clipping sees the active sub-net's gradient, and nothing of the inactive weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import image_batch, train, wrapped
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

CLIPS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.2),
    "infinity norm": lambda parameters: clip_grad_norm_(parameters, 0.01, norm_type=float("inf")),
    "value": lambda parameters: clip_grad_value_(parameters, 0.005),
}


def clipping_step(kind: str) -> Callable[[nn.Module, torch.optim.Optimizer, int], None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        before = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        CLIPS[kind](model.parameters())
        assert not torch.equal(before, torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()

    return step


@pytest.mark.parametrize("kind", sorted(CLIPS))
def test_clipping_is_bit_identical_to_plain_clipping(kind: str) -> None:
    assert_as_plain(clipping_step(kind))


@pytest.mark.parametrize("kind", sorted(CLIPS))
def test_clipping_with_sub_nets_is_the_run_written_by_hand(kind: str) -> None:
    assert_as_reference(clipping_step(kind), clip=CLIPS[kind])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_the_norm_is_that_of_a_network_that_has_the_kept_weights_alone(norm_type: float) -> None:
    model, optimizer, ast = wrapped(**BUSY)
    train(model, optimizer, range(7))
    name = ast.active
    alone = copy.deepcopy(model)
    alone.load_state_dict(ast.materialize(name))
    images, labels = image_batch(7)
    optimizer.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    alone.train()
    functional.cross_entropy(alone(images), labels).backward()
    kept = []
    for parameter_name, parameter in alone.named_parameters():
        gradient = parameter.grad
        if parameter_name in ast.masks.parameters:
            gradient = gradient[ast.masks.get(name, parameter_name)]
        kept.append(gradient.flatten().double())
    expected = torch.linalg.vector_norm(torch.cat(kept), norm_type)
    norm = clip_grad_norm_(model.parameters(), 1e9, norm_type=norm_type)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0.0)
    everything = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in alone.parameters()]), norm_type)
    if norm_type != float("inf"):
        assert everything > 1.05 * expected

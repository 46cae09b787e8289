"""The dense gradient kept aside for growth: micro-batches add up, skipped steps leave nothing."""

from __future__ import annotations

import torch
from torch import nn

from ast_plugin.gradients import GradientMasks
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.slots import ParameterSlots

FIRST = [[1.0, 2.0], [3.0, 4.0]]


def setting() -> tuple[nn.Parameter, GradientMasks]:
    """One weight of 2 x 2; sub-net b keeps the diagonal."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    slots = ParameterSlots(model, ["0.weight"])
    masks = MaskStore(("a", "b"), {"0.weight": (2, 2)})
    masks.set("b", "0.weight", torch.eye(2, dtype=torch.bool))
    return model[0].weight, GradientMasks(slots, masks, PackedMasks(slots, masks))


def backward(gradients: GradientMasks, weight: nn.Parameter, gradient: list[list[float]]) -> None:
    """Accumulate a gradient; `gradients` is told of beginning and end as it is in training."""
    gradients.begin("b", capture=True)
    gradients.forget_cleared()
    (weight * torch.tensor(gradient)).sum().backward()
    gradients.mask("b")


def test_it_is_the_sum_over_micro_batches() -> None:
    weight, gradients = setting()
    backward(gradients, weight, FIRST)
    backward(gradients, weight, [[10.0, 20.0], [30.0, 40.0]])
    assert weight.grad.tolist() == [[11.0, 0.0], [0.0, 44.0]]
    assert gradients.dense()["0.weight"].tolist() == [[11.0, 22.0], [33.0, 44.0]]


def test_a_data_parallel_module_may_write_over_the_gradient_between_micro_batches() -> None:
    weight, gradients = setting()
    bucket = torch.zeros(2, 4)
    for _ in range(2):
        gradients.begin("b", capture=True)
        gradients.forget_cleared()
        (weight * torch.tensor(FIRST)).sum().backward()
        bucket[1].fill_(7.0)  # a neighbour in the bucket shares its version counter
        view = bucket[0].view(2, 2)
        view.copy_(weight.grad)
        weight.grad = view
        gradients.mask("b")
    assert weight.grad.tolist() == [[2.0, 0.0], [0.0, 8.0]]
    assert gradients.dense()["0.weight"].tolist() == [[2.0, 4.0], [6.0, 8.0]]


def test_it_is_taken_before_clipping() -> None:
    weight, gradients = setting()
    backward(gradients, weight, FIRST)
    weight.grad.mul_(0.1)
    assert gradients.dense()["0.weight"].tolist() == FIRST


def test_a_skipped_step_leaves_nothing() -> None:
    weight, gradients = setting()
    for cleared in (None, torch.zeros(2, 2)):
        backward(gradients, weight, [[9.0, 9.0], [9.0, 9.0]])
        weight.grad = cleared
    backward(gradients, weight, FIRST)
    assert gradients.dense()["0.weight"].tolist() == FIRST


def test_gradients_may_be_cleared_between_forward_and_backward() -> None:
    weight, gradients = setting()
    backward(gradients, weight, [[9.0, 9.0], [9.0, 9.0]])
    gradients.begin("b", capture=True)
    weight.grad.zero_()
    gradients.forget_cleared()
    (weight * torch.tensor(FIRST)).sum().backward()
    assert gradients.dense()["0.weight"].tolist() == FIRST

"""Gradient masks, the dense gradient kept aside, and the reference of the correction."""

from __future__ import annotations

import gc
from typing import Any

import torch
from networks import mlp
from torch import nn

from ast_plugin.correction import Correction
from ast_plugin.gradients import GradientMasks, GradientReference
from ast_plugin.masks import MaskStore
from ast_plugin.slots import ParameterSlots


def setting() -> tuple[nn.Parameter, GradientMasks, GradientReference, MaskStore]:
    """One weight of 2 x 2; sub-net b keeps the diagonal."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    slots = ParameterSlots(model, ["0.weight"])
    masks = MaskStore(("a", "b"), {"0.weight": (2, 2)})
    masks.set("b", "0.weight", torch.eye(2, dtype=torch.bool))
    gradients = GradientMasks(slots, masks)
    gradients.attach()
    return model[0].weight, gradients, GradientReference(slots, masks), masks


def backward(weight: nn.Parameter, gradient: list[list[float]]) -> None:
    (weight * torch.tensor(gradient)).sum().backward()


def test_gradients_are_masked_as_they_accumulate() -> None:
    weight, gradients, _, _ = setting()
    gradients.begin("b", capture=False)
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    backward(weight, [[10.0, 20.0], [30.0, 40.0]])
    assert weight.grad.tolist() == [[11.0, 0.0], [0.0, 44.0]]
    assert gradients.dense() == {}


def test_the_dense_gradient_is_the_sum_over_micro_batches() -> None:
    weight, gradients, _, _ = setting()
    for _ in range(2):
        gradients.begin("b", capture=True)
        backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert weight.grad.tolist() == [[2.0, 0.0], [0.0, 8.0]]
    assert gradients.dense()["0.weight"].tolist() == [[2.0, 4.0], [6.0, 8.0]]


def test_the_dense_gradient_is_taken_before_clipping() -> None:
    weight, gradients, _, _ = setting()
    gradients.begin("b", capture=True)
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    weight.grad.mul_(0.1)
    assert gradients.dense()["0.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_skipped_step_leaves_nothing_in_the_dense_gradient() -> None:
    weight, gradients, _, _ = setting()
    for cleared in (None, torch.zeros(2, 2)):
        gradients.begin("b", capture=True)
        backward(weight, [[9.0, 9.0], [9.0, 9.0]])
        weight.grad = cleared
    gradients.begin("b", capture=True)
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert gradients.dense()["0.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_sub_net_that_keeps_all_has_its_whole_gradient_as_the_dense_one() -> None:
    weight, gradients, _, _ = setting()
    gradients.begin("a", capture=True)
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert gradients.dense()["0.weight"].tolist() == weight.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert gradients.dense()["0.weight"] is not weight.grad


def test_nothing_is_masked_after_the_end_or_after_detaching() -> None:
    weight, gradients, _, masks = setting()
    gradients.begin("b", capture=False)
    gradients.end()
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert weight.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    masks.set("b", "0.weight", torch.tensor([[False, True], [True, False]]))
    gradients.mask_now("b")
    assert weight.grad.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    gradients.begin("b", capture=False)
    gradients.detach()
    backward(weight, [[1.0, 1.0], [1.0, 1.0]])
    assert weight.grad.tolist() == [[1.0, 3.0], [4.0, 1.0]]


def test_attaching_again_follows_a_replaced_parameter() -> None:
    model = mlp()
    slots = ParameterSlots(model, ["0.weight"])
    masks = MaskStore(("a", "b"), {"0.weight": (16, 12)})
    masks.set("b", "0.weight", torch.zeros(16, 12, dtype=torch.bool))
    gradients = GradientMasks(slots, masks)
    gradients.attach()
    gradients.attach()
    assert len(model[0].weight._post_accumulate_grad_hooks) == 1
    model[0].weight = nn.Parameter(torch.ones(16, 12))
    gradients.attach()
    gradients.begin("b", capture=False)
    model(torch.ones(1, 12)).sum().backward()
    assert not model[0].weight.grad.any()


def test_hooks_do_not_keep_their_owner_alive() -> None:
    weight, gradients, _, _ = setting()
    gradients.begin("b", capture=False)
    del gradients
    gc.collect()
    backward(weight, [[1.0, 2.0], [3.0, 4.0]])
    assert weight.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_reference_is_restricted_to_the_mask_and_renewed_before_correction() -> None:
    weight, _, reference, _ = setting()
    weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    reference.take("a")
    weight.grad = torch.tensor([[5.0, 0.0], [0.0, 6.0]])
    seen: dict[str, Any] = {}

    def correct(*, gradients: list[torch.Tensor], references: list[torch.Tensor], **rest: Any) -> Correction:
        seen.update(rest, references=[r.clone() for r in references])
        gradients[0].zero_()
        return Correction(checks=1, conflicts=1, cosines=[-1.0])

    found = reference.correct("b", correct, keep=True)
    assert found is not None
    assert found.conflicts == 1
    assert seen["names"] == ["0.weight"]
    assert seen["sub_net"] == "b"
    assert seen["references"][0].tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert not weight.grad.any()
    kept = reference.state_dict()
    assert kept["sub_net"] == "b"
    assert kept["gradients"]["0.weight"].tolist() == [[5.0, 0.0], [0.0, 6.0]]
    reference.correct("b", correct, keep=False)
    assert reference.state_dict() == {"sub_net": None, "gradients": {}}

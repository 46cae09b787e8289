"""Gradient masks and the dense gradient kept aside."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from networks import mlp
from torch import nn

from ast_plugin import packs
from ast_plugin.gradients import GradientMasks
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.slots import ParameterSlots

ONE = [[1.0, 2.0], [3.0, 4.0]]


def setting() -> tuple[nn.Parameter, GradientMasks, MaskStore]:
    """One weight of 2 x 2; sub-net b keeps the diagonal."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    slots = ParameterSlots(model, ["0.weight"])
    masks = MaskStore(("a", "b"), {"0.weight": (2, 2)})
    masks.set("b", "0.weight", torch.eye(2, dtype=torch.bool))
    return model[0].weight, GradientMasks(slots, masks, PackedMasks(slots, masks)), masks


def backward(weight: nn.Parameter, gradient: list[list[float]]) -> None:
    (weight * torch.tensor(gradient)).sum().backward()


class Several:
    """Weights of 4 x 4 and 6 numbers, packed together; `few` keeps so little that it is held as positions.

    `few` keeps the first and the last of w and the fifth of v, `half` the first two rows of w and all of v.
    """

    def __init__(self) -> None:
        self.model = nn.Module()
        self.w = self.model.w = nn.Parameter(torch.zeros(4, 4))
        self.v = self.model.v = nn.Parameter(torch.zeros(6))
        slots = ParameterSlots(self.model, ["w", "v"])
        self.masks = MaskStore(("few", "half"), {"w": (4, 4), "v": (6,)})
        self.keep("few", w=[0, 15], v=[])
        self.keep("half", w=[0, 1, 2, 3, 4, 5, 6, 7], v=[0, 1, 2, 3, 4, 5])
        self.packed = PackedMasks(slots, self.masks)
        self.gradients = GradientMasks(slots, self.masks, self.packed)

    def keep(self, sub_net: str, **positions: list[int]) -> None:
        for name, kept in positions.items():
            mask = torch.zeros(self.masks.shapes[name], dtype=torch.bool)
            mask.view(-1)[kept] = True
            self.masks.set(sub_net, name, mask)

    def arrive(self) -> None:
        """Have backward leave 1 .. 16 in w and 1 .. 6 in v."""
        self.w.grad = torch.arange(1.0, 17.0).view(4, 4)
        self.v.grad = torch.arange(1.0, 7.0)

    def versions(self) -> list[int]:
        return [self.w.grad._version, self.v.grad._version]

    def values(self, sub_net: str) -> list[torch.Tensor]:
        found = []
        for pack in self.packed.packs:
            gradients = self.packed.gradients(pack)
            found.append(self.gradients.values(pack, gradients, self.packed.kept(sub_net, pack, gradients)))
        return found


@pytest.fixture(params=["together", "alone"])
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Several:
    if request.param == "alone":
        monkeypatch.setattr(packs, "_SMALL", 1)
    made = Several()
    assert len(made.packed.packs) == (1 if request.param == "together" else 2)
    return made


def test_gradients_are_masked_where_backward_has_left_them() -> None:
    weight, gradients, _ = setting()
    gradients.begin("b", capture=False)
    backward(weight, ONE)
    assert weight.grad.tolist() == ONE
    gradients.mask("b")
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    backward(weight, [[10.0, 20.0], [30.0, 40.0]])
    gradients.mask("b")
    assert weight.grad.tolist() == [[11.0, 0.0], [0.0, 44.0]]
    assert gradients.dense() == {}


@pytest.mark.parametrize(
    ("sub_net", "w", "v"),
    [
        ("few", [1.0] + [0.0] * 14 + [16.0], [0.0] * 6),
        ("half", [float(i) for i in range(1, 9)] + [0.0] * 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    ],
)
def test_all_gradients_are_masked(several: Several, sub_net: str, w: list[float], v: list[float]) -> None:
    several.arrive()
    tensors = several.w.grad, several.v.grad
    several.gradients.mask(sub_net)
    assert several.w.grad.flatten().tolist() == w
    assert several.v.grad.tolist() == v
    assert several.w.grad is tensors[0]
    assert several.v.grad is tensors[1]


@pytest.mark.parametrize("sub_net", ["few", "half"])
def test_infinities_and_nan_outside_the_mask_are_gone(several: Several, sub_net: str) -> None:
    several.arrive()
    several.w.grad[3, 1], several.w.grad[2, 2] = float("nan"), float("inf")
    several.gradients.mask(sub_net)
    assert several.w.grad[2:, :3].tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("sub_net", ["few", "half"])
def test_what_was_masked_is_not_masked_again(several: Several, sub_net: str) -> None:
    several.arrive()
    several.gradients.mask(sub_net)
    versions = several.versions()
    several.gradients.mask(sub_net)
    assert several.versions() == versions


@pytest.mark.parametrize("sub_net", ["few", "half"])
def test_noise_and_clipping_in_place_are_masked_again(several: Several, sub_net: str) -> None:
    several.arrive()
    several.gradients.mask(sub_net)
    several.w.grad.mul_(0.5).add_(1)
    several.gradients.mask(sub_net)
    mask = several.masks.get(sub_net, "w")
    assert torch.equal(several.w.grad, torch.arange(1.0, 17.0).view(4, 4).mul(0.5).add(1) * mask)
    assert 1.5 in torch.cat(several.values(sub_net)).tolist()


@pytest.mark.parametrize("sub_net", ["few", "half"])
def test_an_assigned_gradient_is_masked(several: Several, sub_net: str) -> None:
    several.arrive()
    several.gradients.mask(sub_net)
    mask = several.masks.get(sub_net, "w")
    fresh = torch.full((4, 4), 7.0)
    while fresh._version < several.w.grad._version:  # its counter tells nothing
        fresh.mul_(1)
    several.w.grad = fresh
    several.gradients.mask(sub_net)
    assert several.w.grad is fresh
    assert torch.equal(fresh, 7.0 * mask)


def test_a_gradient_that_comes_later_is_masked(several: Several) -> None:
    several.arrive()
    late, several.v.grad = several.v.grad, None
    several.gradients.mask("few")
    assert several.v.grad is None
    assert several.w.grad.flatten().nonzero().flatten().tolist() == [0, 15]
    several.v.grad = late
    several.gradients.mask("few")
    assert not late.any()
    several.w.grad = None
    several.gradients.mask("few")
    assert several.w.grad is None


def test_no_gradients_are_no_work(several: Several) -> None:
    several.gradients.mask("few")
    assert several.w.grad is None
    assert several.v.grad is None


def test_masks_that_changed_are_applied(several: Several) -> None:
    several.arrive()
    several.gradients.mask("half")
    several.keep("half", w=[0, 5, 9], v=[2])
    several.gradients.masks_changed()
    several.gradients.mask("half")
    # The tenth weight was outside before: what it had is gone.
    assert several.w.grad.flatten().tolist() == [1, 0, 0, 0, 0, 6] + [0] * 10
    assert several.v.grad.tolist() == [0, 0, 3, 0, 0, 0]


@pytest.mark.parametrize("sub_net", ["few", "half"])
def test_a_new_step_masks_for_its_own_sub_net(several: Several, sub_net: str) -> None:
    several.arrive()
    several.gradients.begin("few", capture=False)
    several.gradients.mask("few")
    several.gradients.end()
    several.w.grad.fill_(1)
    several.v.grad.fill_(1)
    several.gradients.mask(sub_net)
    assert several.w.grad.bool().equal(several.masks.get(sub_net, "w"))
    assert several.v.grad.bool().equal(several.masks.get(sub_net, "v"))


def test_the_same_untouched_gradients_are_masked_for_another_sub_net_after_the_end(several: Several) -> None:
    several.arrive()
    several.gradients.mask("half")
    several.gradients.end()
    several.gradients.mask("few")
    assert several.w.grad.flatten().tolist() == [1] + [0] * 15


def test_values_follow_whatever_is_done_to_the_gradients(several: Several) -> None:
    several.arrive()
    several.gradients.mask("few")
    assert torch.cat(several.values("few")).tolist() == [1, 16]
    several.w.grad.mul_(2)
    assert torch.cat(several.values("few")).tolist() == [2, 32]
    several.w.grad.data.mul_(2)  # raises no version counter
    assert torch.cat(several.values("few")).tolist() == [4, 64]
    several.w.grad = torch.ones(4, 4)
    assert torch.cat(several.values("few")).tolist() == [1, 1]


def test_values_are_those_of_masks_that_changed(several: Several) -> None:
    several.arrive()
    several.gradients.mask("few")
    several.keep("few", w=[3, 15])
    assert torch.cat(several.values("few")).tolist() == [0, 16]


def test_values_may_be_another_sub_nets(several: Several) -> None:
    several.arrive()
    several.gradients.mask("few")
    assert torch.cat(several.values("half")).tolist() == [1] + [0] * 14 + [16] + [0] * 6


def test_values_outlive_the_next_use_of_a_buffer(several: Several) -> None:
    several.arrive()
    several.gradients.mask("half")
    values = torch.cat([v.clone() for v in several.values("half")])
    held = several.values("half")
    for pack in several.packed.packs:
        if pack.buffered:
            pack.vector([torch.full_like(p, 99) for p in several.packed.parameters(pack)])
    assert torch.equal(torch.cat(held), values)


def test_masking_does_not_keep_gradients_alive(several: Several) -> None:
    several.arrive()
    several.gradients.mask("half")
    known = weakref.ref(several.w.grad)
    several.w.grad = several.v.grad = None
    gc.collect()
    assert known() is None
    several.arrive()
    several.gradients.mask("half")
    assert not several.w.grad[2:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_other_dtypes_are_masked(several: Several, dtype: torch.dtype) -> None:
    several.model.to(dtype)
    several.packed.refresh()
    several.model.w.grad = torch.arange(1, 17).view(4, 4).to(dtype)
    several.model.v.grad = torch.arange(1, 7).to(dtype)
    several.gradients.mask("few")
    assert several.model.w.grad.flatten().tolist() == [1] + [0] * 14 + [16]
    assert several.model.w.grad.dtype == dtype


def test_hooks_mask_gradients_as_they_accumulate() -> None:
    weight, gradients, _ = setting()
    gradients.attach()
    gradients.begin("b", capture=False)
    backward(weight, ONE)
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    backward(weight, [[10.0, 20.0], [30.0, 40.0]])
    assert weight.grad.tolist() == [[11.0, 0.0], [0.0, 44.0]]
    assert gradients.dense() == {}


@pytest.mark.parametrize("masked_between", [False, True])
def test_the_dense_gradient_is_the_sum_over_micro_batches(masked_between: bool) -> None:
    weight, gradients, _ = setting()
    for i in (1, 2, 3):
        gradients.begin("b", capture=True)
        backward(weight, ONE)
        if masked_between:  # as at the end of every micro-batch's backward
            gradients.mask("b")
        assert weight.grad.tolist() == [[1.0 * i, 0.0], [0.0, 4.0 * i]]
    assert gradients.dense()["0.weight"].tolist() == [[3.0, 6.0], [9.0, 12.0]]


def test_the_dense_gradients_of_packed_parameters_add_up_too(several: Several) -> None:
    w, v = torch.arange(1.0, 17.0).view(4, 4), torch.arange(1.0, 7.0)
    for _ in range(2):
        several.gradients.begin("few", capture=True)
        ((several.w * w).sum() + (several.v * v).sum()).backward()
        several.gradients.mask("few")
    dense = several.gradients.dense()
    assert torch.equal(dense["w"], 2 * w)
    assert torch.equal(dense["v"], 2 * v)
    assert several.w.grad.flatten().tolist() == [2] + [0] * 14 + [32]
    assert not several.v.grad.any()


def test_the_dense_gradient_is_taken_before_clipping() -> None:
    weight, gradients, _ = setting()
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    gradients.mask("b")
    weight.grad.mul_(0.1)
    gradients.mask("b")
    assert gradients.dense()["0.weight"].tolist() == ONE


def test_a_skipped_step_leaves_nothing_in_the_dense_gradient() -> None:
    weight, gradients, _ = setting()
    for cleared in (None, torch.zeros(2, 2)):
        gradients.begin("b", capture=True)
        backward(weight, [[9.0, 9.0], [9.0, 9.0]])
        gradients.mask("b")
        weight.grad = cleared
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    gradients.mask("b")
    assert gradients.dense()["0.weight"].tolist() == ONE


def test_an_assigned_gradient_begins_a_new_dense_one_whatever_its_counter_tells() -> None:
    weight, gradients, _ = setting()
    gradients.begin("b", capture=True)
    backward(weight, [[9.0, 9.0], [9.0, 9.0]])
    gradients.mask("b")
    assigned = torch.zeros(2, 2)
    while assigned._version < weight.grad._version:
        assigned.mul_(1)
    weight.grad = assigned
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    assert weight.grad is assigned
    assert gradients.dense()["0.weight"].tolist() == ONE


def test_a_gradient_zeroed_in_place_leaves_nothing_in_the_dense_gradient() -> None:
    weight, gradients, _ = setting()
    gradients.begin("b", capture=True)
    backward(weight, [[9.0, 9.0], [9.0, 9.0]])
    gradients.mask("b")
    weight.grad.zero_()
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    assert gradients.dense()["0.weight"].tolist() == ONE


def test_a_gradient_zeroed_without_a_trace_leaves_nothing_in_the_dense_gradient(several: Several) -> None:
    w, v = torch.arange(1.0, 17.0).view(4, 4), torch.arange(1.0, 7.0)
    for factor in (9, 1):
        several.gradients.begin("few", capture=True)
        (factor * ((several.w * w).sum() + (several.v * v).sum())).backward()
        several.gradients.mask("few")
        dense = several.gradients.dense()
        for parameter in (several.w, several.v):  # of v, nothing is kept: it is zero before and after
            parameter.grad.data.zero_()
    assert torch.equal(dense["w"], w)
    assert torch.equal(dense["v"], v)


def test_a_sub_net_that_keeps_all_has_its_whole_gradient_as_the_dense_one() -> None:
    weight, gradients, _ = setting()
    gradients.begin("a", capture=True)
    backward(weight, ONE)
    gradients.mask("a")
    assert gradients.dense()["0.weight"].tolist() == weight.grad.tolist() == ONE
    assert gradients.dense()["0.weight"] is not weight.grad


def test_a_step_that_does_not_capture_forgets_what_was_captured() -> None:
    weight, gradients, _ = setting()
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    gradients.begin("b", capture=False)
    assert gradients.dense() == {}
    backward(weight, ONE)
    assert gradients.dense() == {}


def test_nothing_is_masked_after_the_end_or_after_detaching() -> None:
    weight, gradients, masks = setting()
    gradients.begin("b", capture=True)
    assert weight._post_accumulate_grad_hooks
    gradients.end()
    assert gradients.sub_net is None
    assert not weight._post_accumulate_grad_hooks
    backward(weight, ONE)
    assert weight.grad.tolist() == ONE
    assert gradients.dense() == {}
    masks.set("b", "0.weight", torch.tensor([[False, True], [True, False]]))
    gradients.mask("b")
    assert weight.grad.tolist() == [[0.0, 2.0], [3.0, 0.0]]
    gradients.attach()
    gradients.begin("b", capture=False)
    gradients.detach()
    backward(weight, [[1.0, 1.0], [1.0, 1.0]])
    assert weight.grad.tolist() == [[1.0, 3.0], [4.0, 1.0]]


def test_hooks_between_steps_mask_nothing() -> None:
    weight, gradients, _ = setting()
    gradients.attach()
    backward(weight, ONE)
    assert weight.grad.tolist() == ONE


def test_attaching_again_follows_a_replaced_parameter() -> None:
    model = mlp()
    slots = ParameterSlots(model, ["0.weight"])
    masks = MaskStore(("a", "b"), {"0.weight": (16, 12)})
    masks.set("b", "0.weight", torch.zeros(16, 12, dtype=torch.bool))
    gradients = GradientMasks(slots, masks, PackedMasks(slots, masks))
    gradients.attach()
    gradients.attach()
    assert len(model[0].weight._post_accumulate_grad_hooks) == 1
    first = model[0].weight
    model[0].weight = nn.Parameter(torch.ones(16, 12))
    gradients.attach()
    assert not first._post_accumulate_grad_hooks
    gradients.begin("b", capture=False)
    model(torch.ones(1, 12)).sum().backward()
    assert not model[0].weight.grad.any()


def test_a_parameter_that_is_frozen_for_a_while_gets_its_hook_later() -> None:
    weight, gradients, _ = setting()
    weight.requires_grad_(False)
    gradients.begin("b", capture=True)
    assert not weight._post_accumulate_grad_hooks
    weight.requires_grad_(True)
    gradients.begin("b", capture=True)
    backward(weight, ONE)
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert gradients.dense()["0.weight"].tolist() == ONE


def test_hooks_do_not_keep_their_owner_alive() -> None:
    weight, gradients, _ = setting()
    gradients.attach()
    gradients.begin("b", capture=False)
    owner = weakref.ref(gradients)
    del gradients
    gc.collect()
    assert owner() is None
    backward(weight, ONE)
    assert weight.grad.tolist() == ONE

"""Putting sub-nets on and taking them off, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from networks import conv_net, mlp, snapshot
from torch import nn

from ast_plugin.activation import MaskedActivation
from ast_plugin.masks import MaskStore
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.slots import ParameterSlots


def activation(model: nn.Module, names: list[str]) -> tuple[MaskedActivation, MaskStore]:
    masks = MaskStore(("a", "b"), {name: tuple(model.get_parameter(name).shape) for name in names})
    normalization = PrivateNormalization(model, ("a", "b"), "a")
    return MaskedActivation(PackedMasks(ParameterSlots(model, names), masks), normalization), masks


def test_a_hand_worked_mask_zeroes_and_restores_in_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    weight = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    put, masks = activation(model, ["0.weight"])
    masks.set("b", "0.weight", torch.tensor([[True, False], [False, True]]))
    address = weight.data_ptr()
    put.put_on("b")
    assert put.worn == "b"
    assert torch.equal(weight, torch.tensor([[1.0, 0.0], [0.0, -4.0]]))
    assert weight.data_ptr() == address
    put.put_on("a")  # all kept
    assert torch.equal(weight, torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    put.put_on("b")
    put.take_off()
    put.take_off()
    assert put.worn is None
    assert torch.equal(weight, torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    assert model[0].weight is weight


def test_private_normalization_comes_and_goes_with_the_sub_net() -> None:
    model = conv_net()
    put, _ = activation(model, ["conv1.weight"])
    put.put_on("b")
    with torch.no_grad():
        model.norm0.running_mean.fill_(7.0)
    put.take_off()
    assert not model.norm0.running_mean.any()
    put.put_on("b")
    assert torch.equal(model.norm0.running_mean, torch.full((8,), 7.0))


def test_a_failure_halfway_leaves_every_weight_dense() -> None:
    model = mlp()
    before = snapshot(model)
    put, masks = activation(model, ["0.weight", "2.weight"])
    masks.set("b", "0.weight", torch.zeros(16, 12, dtype=torch.bool))
    masks.set("b", "2.weight", torch.zeros(16, 16, dtype=torch.bool))
    layer = model[2]
    original, layer.weight = layer.weight, None
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        put.put_on("b")
    layer.weight = original
    assert put.worn is None
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_type_is_masked_exactly(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    put, masks = activation(model, ["0.weight"])
    mask = torch.rand(16, 12) < 0.3
    masks.set("b", "0.weight", mask)
    weight = model[0].weight
    dense = weight.detach().clone()
    put.put_on("b")
    assert torch.equal(weight, dense * mask)
    put.take_off()
    assert torch.equal(weight, dense)


def test_channels_last_weights_are_masked_in_their_layout() -> None:
    model = conv_net().to(memory_format=torch.channels_last)
    put, masks = activation(model, ["conv1.weight"])
    mask = torch.rand(16, 8, 3, 3) < 0.3
    masks.set("b", "conv1.weight", mask)
    dense = model.conv1.weight.detach().clone()
    put.put_on("b")
    assert torch.equal(model.conv1.weight, dense * mask)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    put.take_off()
    assert torch.equal(model.conv1.weight, dense)


def test_release_takes_off_and_frees_the_copies() -> None:
    model = mlp()
    put, masks = activation(model, ["0.weight"])
    masks.set("b", "0.weight", torch.zeros(16, 12, dtype=torch.bool))
    put.put_on("b")
    put.release()
    assert put.worn is None
    assert model[0].weight.count_nonzero() == 16 * 12

"""Parametrizations taken off and put back: the same objects, the same order of names, the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ast_plugin.errors import WrapError
from ast_plugin.integrations.frameworks.parametrizations import TakenOff


class Halved(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor / 2


def parametrized() -> tuple[nn.Sequential, nn.Parameter]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(4, 2, 1))
    weight = model[0].weight
    parametrize.register_parametrization(model[0], "weight", Halved())
    return model, weight


def test_the_parameter_is_the_one_that_it_was_at_its_old_place() -> None:
    model, weight = parametrized()
    before = weight.detach().clone()
    TakenOff([(model[0], "weight")], owner="Test")
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert model[0].weight is weight
    assert torch.equal(weight, before)
    assert type(model[0]) is nn.Linear
    assert not parametrize.is_parametrized(model[0])


def test_what_is_put_back_is_what_was_there() -> None:
    model, weight = parametrized()
    inputs = torch.randn(2, 3)
    output, names, kind = model[0](inputs), [name for name, _ in model.named_parameters()], type(model[0])
    lists = model[0].parametrizations
    taken = TakenOff([(model[0], "weight")], owner="Test")
    assert not torch.equal(model[0](inputs), output)
    taken.put_back()
    assert torch.equal(model[0](inputs), output)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model[0]) is kind
    assert model[0].parametrizations is lists
    assert lists.weight.original is weight
    taken.put_back()  # once is enough
    assert torch.equal(model[0](inputs), output)


def test_two_tensors_of_a_module_come_off_together() -> None:
    model, _ = parametrized()
    parametrize.register_parametrization(model[0], "bias", Halved())
    taken = TakenOff([(model[0], "weight"), (model[0], "bias")], owner="Test")
    assert [name for name, _ in model[0].named_parameters()] == ["weight", "bias"]
    taken.put_back()
    assert parametrize.is_parametrized(model[0], "bias")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("bias", "'bias' of a ParametrizedLinear carries no parametrization of Test"),
        ("weight", r"'weight' of a ParametrizedLinear carries several parametrizations \(Halved, Halved\)"),
    ],
)
def test_what_is_not_one_of_the_owners_alone_is_refused_before_anything_is_touched(tensor: str, message: str) -> None:
    model, _ = parametrized()
    if tensor == "weight":
        parametrize.register_parametrization(model[0], "weight", Halved())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(WrapError, match=message):
        TakenOff([(model[0], tensor)], owner="Test")
    assert [name for name, _ in model.named_parameters()] == names


def test_parametrizations_of_others_on_the_same_module_are_refused() -> None:
    model, _ = parametrized()
    parametrize.register_parametrization(model[0], "bias", Halved())
    with pytest.raises(
        WrapError, match="'bias' of a ParametrizedLinear carries a parametrization which is not of Test"
    ):
        TakenOff([(model[0], "weight")], owner="Test")
    assert parametrize.is_parametrized(model[0], "weight")


def test_a_tensor_made_of_several_is_refused() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    with pytest.raises(WrapError, match="'weight' of a ParametrizedLinear is no parameter"):
        TakenOff([(layer, "weight")], owner="Test")


def test_a_buffer_is_refused() -> None:
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_mean", Halved())
    with pytest.raises(WrapError, match="'running_mean' of a ParametrizedBatchNorm1d is no parameter"):
        TakenOff([(layer, "running_mean")], owner="Test")

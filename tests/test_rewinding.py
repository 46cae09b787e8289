"""Bringing back what was on a model when a graph was recorded, apart from any training run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import mlp
from torch import Tensor

from ast_plugin.activation import MaskedActivation
from ast_plugin.errors import ActivationError
from ast_plugin.masks import MaskStore
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.rewinding import RewindableActivation
from ast_plugin.slots import ParameterSlots, tensor_slots

NAMES = ("0.weight", "2.weight")


@pytest.fixture
def parts() -> tuple[Any, MaskStore, RewindableActivation]:
    model = mlp()
    parameters = ParameterSlots(model, NAMES)
    masks = MaskStore(("a", "b"), {name: tuple(parameters[name].shape) for name in NAMES})
    for sub_net in ("a", "b"):
        for name in NAMES:
            masks.set(sub_net, name, torch.rand(parameters[name].shape) < 0.5)
    inner = MaskedActivation(PackedMasks(parameters, masks), PrivateNormalization(model, ("a", "b"), "a"))
    return model, masks, RewindableActivation(inner, tensor_slots(model, NAMES), len(NAMES), masks.revision)


def versions(model: Any) -> list[int]:
    return [model.get_parameter(name)._version for name in NAMES]


def values(model: Any) -> list[Tensor]:
    return [model.get_parameter(name).detach().clone() for name in NAMES]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rewinding_brings_back_values_and_versions_and_leaves_no_trace(parts: Any) -> None:
    model, _, activation = parts
    dense = values(model)
    activation.put_on("a")
    mark, worn = activation.mark(), values(model)
    recorded = versions(model)
    activation.put_on("b")
    activation.take_off()
    rest = versions(model)
    activation.rewind(mark)
    assert activation.worn == "a"
    assert same(values(model), worn)
    assert versions(model) == recorded != rest
    activation.take_off()
    assert same(values(model), dense)
    assert versions(model) == rest


def test_what_is_still_on_is_left_as_it_is_whatever_its_tensors_are(parts: Any) -> None:
    # Sharded training swaps whole and sharded parameters in and out between forward and backward.
    model, _, activation = parts
    activation.put_on("a")
    mark = activation.mark()
    own = model[2].weight
    model[2].weight = torch.nn.Parameter(torch.zeros_like(own))
    model[2].weight.device_mesh = "sharded"
    activation.rewind(mark)
    assert activation.worn == "a"
    model[2].weight = own
    activation.take_off()


def test_sharded_parameters_are_not_brought_back(parts: Any) -> None:
    model, _, activation = parts
    activation.put_on("a")
    mark = activation.mark()
    activation.take_off()
    model[0].weight.device_mesh = "sharded"
    with pytest.raises(ActivationError, match="run backward right after its forward, and once"):
        activation.rewind(mark)
    assert activation.worn is None


@pytest.mark.parametrize("change", ["weight at rest", "weight while on", "mask"])
def test_nothing_is_brought_back_after_a_change(parts: Any, change: str) -> None:
    model, masks, activation = parts
    activation.put_on("a")
    mark = activation.mark()
    if change == "weight while on":
        with torch.no_grad():
            model[0].weight.mul_(2)
    activation.take_off()
    if change == "weight at rest":
        with torch.no_grad():
            model[0].weight.mul_(2)
    elif change == "mask":
        masks.set("a", "0.weight", masks.get("a", "0.weight").clone())
    dense = values(model)
    activation.put_on("b")
    activation.rewind(mark)
    assert activation.worn is None
    assert same(values(model), dense)


def test_a_dense_model_has_no_mark(parts: Any) -> None:
    assert parts[2].mark() is None

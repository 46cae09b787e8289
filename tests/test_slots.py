"""Parameters are found by name at every use."""

from __future__ import annotations

import pytest
import torch
from networks import mlp
from torch import nn

from ast_plugin.errors import ActivationError
from ast_plugin.slots import ParameterSlots


def test_a_replaced_parameter_is_found() -> None:
    model = mlp()
    slots = ParameterSlots(model, ["0.weight", "4.weight"])
    assert slots["0.weight"] is model[0].weight
    model[0].weight = nn.Parameter(torch.zeros(16, 12))
    assert slots["0.weight"] is model[0].weight
    assert list(slots) == ["0.weight", "4.weight"]
    assert len(slots) == 2


def test_a_top_level_parameter_has_a_place_too() -> None:
    module = nn.Linear(2, 2)
    assert ParameterSlots(module, ["weight"])["weight"] is module.weight


def test_unknown_and_vanished_parameters_are_errors() -> None:
    model = mlp()
    for name in ("9.weight", "0.weigth"):
        with pytest.raises(KeyError, match=name):
            ParameterSlots(model, [name])
    slots = ParameterSlots(model, ["0.bias"])
    model[0].bias = None
    with pytest.raises(ActivationError, match=r"'0\.bias' is gone"):
        slots["0.bias"]

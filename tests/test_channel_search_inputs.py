"""Example inputs: what the search takes, what it refuses, and what models say of themselves."""

from __future__ import annotations

import sys

import pytest
import torch
from networks import mlp
from torch import nn

from ast_plugin.channel_search import example_inputs_of, find_groups
from ast_plugin.channel_search_copy import example_call, of_one_example
from ast_plugin.errors import ConfigError, MissingExtraError


class Described(nn.Module):
    """A model that says what it is run with."""

    def __init__(self, **known):
        super().__init__()
        for name, value in known.items():
            setattr(self, name, value)


class Broken(nn.Module):
    @property
    def dummy_inputs(self):
        raise NotImplementedError


def test_a_model_may_know_its_own_inputs():
    images = torch.ones(2, 3, 4, 4)
    assert example_inputs_of(Described(example_input_array=images)) is images
    tokens = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert example_inputs_of(Described(dummy_inputs=tokens)) is tokens


@pytest.mark.parametrize("name", ["pretrained_cfg", "default_cfg"])
def test_an_input_size_becomes_one_image(name):
    made = example_inputs_of(Described(**{name: {"input_size": (3, 8, 6)}}))
    assert made.shape == (1, 3, 8, 6)
    assert made.dtype == torch.float32


@pytest.mark.parametrize(
    "model",
    [mlp(), Described(example_input_array=None), Described(dummy_inputs="no"), Broken()]
    + [Described(pretrained_cfg=settings) for settings in ({}, {"input_size": None}, {"input_size": (3, "x")})],
)
def test_others_know_none(model):
    assert example_inputs_of(model) is None


def test_inputs_without_the_models_main_one_are_none_of_its_own():
    tokens = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert example_inputs_of(Described(dummy_inputs=tokens, main_input_name="pixel_values")) is None
    assert example_inputs_of(Described(dummy_inputs=tokens, main_input_name="input_ids")) is tokens


def test_inputs_are_copies_in_float32_on_the_cpu():
    half, ids = torch.ones(2, 3, dtype=torch.float16), torch.arange(4)
    call = example_call({"x": half, "more": [ids, {"deep": half}], "flag": True})
    assert call.args == ()
    assert call.kwargs["x"].dtype == torch.float32
    assert call.kwargs["more"][0].dtype == torch.int64
    assert call.kwargs["more"][0].data_ptr() != ids.data_ptr()
    assert call.kwargs["more"][1]["deep"].dtype == torch.float32
    assert call.kwargs["flag"] is True


def test_the_first_example_is_enough_where_all_inputs_have_as_many():
    call = of_one_example(example_call((torch.ones(4, 3), {"y": torch.ones(4)})))
    assert call.args[0].shape == (1, 3)
    assert call.args[1]["y"].shape == (1,)
    mixed = example_call((torch.ones(4, 3), torch.ones(5)))
    assert of_one_example(mixed) is mixed


@pytest.mark.parametrize("wrong", [None, 3, "x", (), {}, (1, 2), {1: torch.ones(1)}])
def test_what_is_no_input_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"example_inputs .*pass a tensor, a tuple of positional arguments or a dict"):
        find_groups(mlp(), wrong)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"torch-pruning.*ast-plugin\[channels\]"):
        find_groups(mlp(), torch.ones(1, 12))


def test_a_model_that_cannot_be_copied_is_named():
    model = mlp()
    model.generator = (number for number in range(3))
    with pytest.raises(ConfigError, match=r"Sequential cannot be copied.*pass groups="):
        find_groups(model, torch.ones(1, 12))

"""Settings: checked when constructed, plain dicts in and out."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy
import pytest
import torch

from ast_plugin.config import ASTConfig, CorrectionOptions
from ast_plugin.errors import ConfigError
from ast_plugin.sub_nets import SubNetSpec


def test_every_setting_survives_plain_containers_json_and_weights_only_loading() -> None:
    config = ASTConfig(
        sparsities=(0.5, "2:4", SubNetSpec(name="tiny", sparsity=0.99)),
        total_steps=1000,
        method="rigl",
        pattern="unstructured",
        distribution={"head.*": 0.5, "body.*": {"s50": 0.4, "tiny": 0.9}},
        alternation="fixed:tiny",
        steps_per_epoch=10,
        correction=CorrectionOptions(scope="global", first_step=True),
        inactive="freeze",
        update_interval=7,
        stagger=False,
        drop_fraction=0.3,
        drop_fraction_end=0.1,
        drop_schedule="constant",
        slicing="off",
        begin_step=0.1,
        end_step=900,
        grow_initialization="zero",
        allow_empty_layers=True,
        include=("a*",),
        exclude=("b*", "c"),
        private_normalization=False,
        default_sub_net="tiny",
        seed=5,
    )
    at_default = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) == field.default}
    assert at_default == {"pattern", "initial_sparsity"}
    assert ASTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    buffer = io.BytesIO()
    torch.save(config.to_dict(), buffer)
    buffer.seek(0)
    assert ASTConfig.from_dict(torch.load(buffer, weights_only=True)) == config


def test_settings_are_frozen_and_lists_become_tuples() -> None:
    config = ASTConfig(sparsities=[0.5, 0.9], include="head.*")
    assert config.sparsities == (0.5, 0.9)
    assert config.include == ("head.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert dataclasses.replace(config, seed=3).seed == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("begin_step", -1, r"begin_step must be a number of optimizer steps \(int\) or a fraction.*got -1"),
        ("begin_step", 1.5, "got 1.5"),
        ("end_step", 0, r"\(0, 1\]\), got 0"),
        ("update_interval", 0, "update_interval must be"),
        ("update_interval", True, "update_interval must be"),
        ("total_steps", 10.5, "total_steps must be a positive number of optimizer steps, got 10.5"),
        ("steps_per_epoch", 0, "steps_per_epoch must be a positive"),
        ("stagger", 1, "stagger must be True or False, got 1"),
        ("drop_schedule", "linear", "drop_schedule must be one of cosine, constant, got 'linear'"),
        ("grow_initialization", "one", "grow_initialization must be one of keep, zero, got 'one'"),
        ("method", 3, "method must be a name, got 3"),
        ("distribution", {}, "distribution must be a name, or a mapping"),
        ("distribution", {"a": 2}, r"distribution\['a'\] must hold fractions"),
        ("distribution", 0.5, "distribution must be a name"),
        ("include", (3,), "include must hold glob patterns"),
        ("pattern", "4:2", "did you mean '2:4'"),
        ("initial_sparsity", 1, r"initial_sparsity must lie in \[0, 1\)"),
        ("sparsities", {"a", 3}, "sparsities"),
        ("sparsities", None, "sparsities must be a list or tuple, got None"),
    ],
)
def test_values_out_of_range_name_parameter_value_and_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ASTConfig(**{"sparsities": (0.9,), field: value})


def test_unknown_and_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'totalsteps': did you mean 'total_steps'"):
        ASTConfig.from_dict({"sparsities": (0.9,), "totalsteps": 5})
    with pytest.raises(ConfigError, match="sparsities is missing"):
        ASTConfig.from_dict({"total_steps": 5})


def test_a_bare_correction_name_stands_for_its_options() -> None:
    assert ASTConfig(sparsities=(0.9,), correction="global").correction_options == CorrectionOptions(scope="global")
    with pytest.raises(ConfigError, match=r"correction\.first_step must be True or False"):
        CorrectionOptions(first_step="yes")  # type: ignore[arg-type]  # what a careless caller passes


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "100", 0.5])
def test_total_steps_that_are_no_number_of_steps_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="total_steps must be a positive number of optimizer steps"):
        ASTConfig(sparsities=(0.9,), total_steps=value)


def test_numbers_of_numpy_are_numbers() -> None:
    config = ASTConfig(
        sparsities=(numpy.float32(0.9),), total_steps=numpy.int64(100), end_step=numpy.float64(0.5), seed=numpy.int64(3)
    )
    assert json.loads(json.dumps(config.to_dict()))["end_step"] == 0.5
    assert (type(config.total_steps), type(config.end_step), type(config.seed)) == (int, float, int)
    assert config.sub_nets[0].name == "s90"


def test_misspelt_parts_of_nested_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'sparsty' in sparsities: did you mean 'sparsity'"):
        ASTConfig.from_dict({"sparsities": [{"name": "a", "sparsty": 0.5}]})
    with pytest.raises(ConfigError, match="sparsities lacks sparsity"):
        ASTConfig.from_dict({"sparsities": [{"name": "a"}]})
    with pytest.raises(ConfigError, match="unknown setting 'scoop' in correction: did you mean 'scope'"):
        ASTConfig.from_dict({"sparsities": (0.5,), "correction": {"scoop": "layer"}})
    with pytest.raises(ConfigError, match="default_sub_net names no sub-net of this run: 5"):
        ASTConfig(sparsities=(0.5,), default_sub_net=5)  # type: ignore[arg-type]  # a careless caller
    with pytest.raises(ConfigError, match="pattern of sub-net 'a' must be a name"):
        SubNetSpec(name="a", sparsity=0.5, pattern=3)  # type: ignore[arg-type]  # a careless caller
    with pytest.raises(ConfigError, match="got the key 3"):
        ASTConfig(sparsities=(0.5,), distribution={3: 0.5})  # type: ignore[dict-item]  # a careless caller


def test_a_drop_fraction_below_the_default_end_is_not_raised_to_it() -> None:
    assert ASTConfig(sparsities=(0.9,), drop_fraction=0.001).drop_fraction_end == 0.001


def test_equal_configs_have_equal_hashes_also_with_a_mapping() -> None:
    def config(first: float, second: float) -> ASTConfig:
        spread = {"a.*": {"s50": first, "s90": 0.9}, "b": second}
        return ASTConfig(sparsities=(0.5, 0.9), distribution=dict(reversed(spread.items())) if first == 0 else spread)

    assert config(0, 0.0) == config(0.0, 0)
    assert hash(config(0, 0.0)) == hash(config(0.0, 0))
    assert len({config(0, 0.1), config(0, 0.1), config(0, 0.2), ASTConfig(sparsities=(0.5, 0.9))}) == 3

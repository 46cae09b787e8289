"""Modules and tensors that are taken out of a wrapped model, or replaced: a clear error, and a dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_networks import conv_groups, mlp_groups
from networks import conv_net, image_batch, mlp, sgd, train, vector_batch
from torch import nn

import ast_plugin
from ast_plugin.anchors import Anchors
from ast_plugin.errors import ActivationError

SETTINGS: dict[str, dict[str, Any]] = {
    "masked": {},
    "channels": {"pattern": "channel"},
    "channels, masked": {"pattern": "channel", "slicing": "off"},
    "channels, gathered": {"pattern": "channel", "slicing": "gather"},
}


def run(network: str, setting: str) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    model = conv_net() if network == "conv" else mlp()
    optimizer = sgd(model)
    options = dict(SETTINGS[setting])
    if "pattern" in options:
        options["groups"] = conv_groups() if network == "conv" else mlp_groups()
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=(0.25, 0.5), total_steps=20, method="static", private_normalization=True, **options
    )
    train(model, optimizer, range(2), image_batch if network == "conv" else vector_batch)
    return model, optimizer, ast


def replace_linear(model: Any) -> None:
    model[0] = nn.Linear(12, 16)


def replace_by_larger(model: Any) -> None:
    model[0] = nn.Linear(12, 20)


def replace_norm(model: Any) -> None:
    model.norm1 = nn.BatchNorm2d(16)


def take_norm_out(model: Any) -> None:
    model.norm1 = nn.Identity()


def replace_convolution(model: Any) -> None:
    model.conv1 = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False)


CHANGES = [
    ("mlp", replace_linear, "module '0', which held '0.weight'"),
    ("mlp", replace_by_larger, "module '0', which held '0.weight'"),
    ("conv", replace_norm, "module 'norm1', which held 'norm1."),
    ("conv", take_norm_out, "module 'norm1', which held 'norm1."),
    ("conv", replace_convolution, "module 'conv1', which held 'conv1.weight'"),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("network", "change", "message"), CHANGES)
def test_a_module_that_is_replaced_is_named_wherever_it_shows(
    network: str, change: Callable[[Any], None], message: str, setting: str, tmp_path: Path
) -> None:
    model, optimizer, ast = run(network, setting)
    batch = image_batch if network == "conv" else vector_batch
    change(model)
    for attempt in (
        lambda: train(model, optimizer, range(2, 3), batch),
        lambda: model.eval()(batch(0)[0]),
        lambda: ast.materialize("s50"),
        lambda: ast.save(tmp_path / "elastic.safetensors"),
    ):
        with pytest.raises(ActivationError, match=f"{message}.* is no longer in the model; call detach"):
            attempt()
    assert not list(tmp_path.iterdir())
    assert all(bool((model.get_parameter(name) != 0).all()) for name in ast.masks.parameters if "bias" not in name)
    ast.detach()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_a_bias_that_is_taken_away_from_a_channel_group_is_named(setting: str, tmp_path: Path) -> None:
    model, optimizer, ast = run("mlp", setting)
    model[0].bias = None
    for attempt in (
        lambda: train(model, optimizer, range(2, 3), vector_batch),
        lambda: ast.materialize("s50"),
        lambda: ast.save(tmp_path / "elastic.safetensors"),
    ):
        with pytest.raises(
            ActivationError, match=r"'0\.bias' is gone: it was .* call detach\(\) before taking tensors"
        ):
            attempt()


def test_a_bias_that_no_sub_net_is_made_of_may_go() -> None:
    model, optimizer, ast = run("mlp", "masked")
    model[0].bias = None
    train(model, optimizer, range(2, 6), vector_batch)
    assert ast.step == 6


def test_modules_that_hold_nothing_of_the_run_may_be_replaced() -> None:
    model, optimizer, ast = run("mlp", "masked")
    model[1] = nn.GELU()
    train(model, optimizer, range(2, 6), vector_batch)
    assert ast.step == 6


def test_a_module_that_is_wrapped_in_place_is_still_there() -> None:
    model, optimizer, ast = run("mlp", "masked")
    inner = model[0]
    model[0] = nn.Sequential(inner, nn.Identity())
    train(model, optimizer, range(2, 6), vector_batch)
    assert ast.step == 6
    model.eval()
    with ast.sub_net("s50"):
        assert int((inner.weight == 0).sum()) == inner.weight.numel() - ast.masks.kept("s50", "0.weight")


def test_a_part_above_it_counts_too() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "head": nn.Linear(3, 2)})
    anchors = Anchors(model, ["body.0.weight", "body.0.bias", "head.weight"])
    anchors.check()
    model["body"] = nn.Sequential(*model["body"])  # another container around the same layers
    anchors.check()
    anchors.check_tensors()
    model["body"] = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with pytest.raises(ActivationError, match=r"module 'body\.0', which held 'body\.0\.weight'"):
        anchors.check()
    with pytest.raises(ActivationError, match=r"module 'body\.0'"):  # again, and not only once
        anchors.check()


def test_tensors_of_the_model_itself_have_nothing_above_them() -> None:
    model = nn.Linear(2, 3)
    anchors = Anchors(model, ["weight"])
    anchors.check_tensors()
    del model.weight
    anchors.check()
    with pytest.raises(ActivationError, match="'weight' is gone"):
        anchors.check_tensors()

"""Masks of torch.nn.utils.prune: into a run, with the same parameters, and back onto a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, vector_batch
from torch import Tensor, nn
from torch.nn.utils import prune

import ast_plugin
from ast_plugin.elastic_file import read_elastic
from ast_plugin.errors import ActivationError, ConfigError, SelectionError, WrapError
from ast_plugin.integrations.frameworks import from_masks, from_pruned, take_masks, write_masks

LAYERS = ("0", "2", "4")


def pruned(model: nn.Module | None = None, *, biases: bool = True, amount: float = 0.6) -> nn.Module:
    """Prune weights globally and, on top, one layer at random; biases each by itself."""
    model = mlp() if model is None else model
    prune.global_unstructured(
        [(model[int(layer)], "weight") for layer in LAYERS], pruning_method=prune.L1Unstructured, amount=amount
    )
    prune.random_unstructured(model[2], "weight", amount=0.3)
    if biases:
        prune.l1_unstructured(model[0], "bias", amount=0.5)
    return model


def masks_in(model: nn.Module) -> dict[str, Tensor]:
    return {name.removesuffix("_mask"): buffer != 0 for name, buffer in model.named_buffers() if name.endswith("_mask")}


def wrapped(model: nn.Module, optimizer: Any = None, *, more: tuple[float, ...] = (0.9,), **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("then", "fixed", "name") if name in options}
    method = from_pruned(model, **given)
    settings = {"sparsities": (*method.sub_nets, *more), "total_steps": 40, "update_interval": 4, **options}
    return ast_plugin.wrap(sgd(model) if optimizer is None else optimizer, model, method=method, **settings)


@pytest.mark.parametrize("early", [True, False], ids=["optimizer first", "optimizer last"])
def test_a_pruned_model_becomes_a_sub_net_with_its_masks_and_its_very_parameters(early: bool) -> None:
    model = mlp()
    plain, parameters = snapshot(model), dict(model.named_parameters())
    optimizer = sgd(model) if early else None
    pruned(model)
    masks = masks_in(model)
    outputs = model(vector_batch(0)[0]).detach()
    ast = wrapped(model, optimizer)
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert_same(snapshot(model), plain)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not model[0]._forward_pre_hooks
    assert not model[2]._forward_pre_hooks
    assert set(ast.masks.parameters) == set(masks) == {"0.weight", "0.bias", "2.weight", "4.weight"}
    assert_same(ast.masks.of("pruned"), {name: masks[name] for name in ast.masks.parameters})
    with ast.sub_net("pruned"):
        assert torch.equal(model(vector_batch(0)[0]), outputs)


@pytest.mark.parametrize(("fixed", "then"), [(True, "granet"), (True, "rigl"), (False, "rigl"), (False, "set")])
def test_its_masks_stay_or_go_on_by_the_method_of_the_others(fixed: bool, then: str) -> None:
    model = pruned()
    masks = masks_in(model)
    ast = wrapped(model, fixed=fixed, then=then, drop_fraction=0.3)
    other = ast.masks.checksum("s90")
    train(model, ast.optimizer, range(40), vector_batch)
    after = ast.masks.of("pruned")
    assert all(torch.equal(masks[name], after[name]) for name in masks) is fixed
    assert sum(int(mask.sum()) for mask in after.values()) == sum(int(mask.sum()) for mask in masks.values())
    assert ast.masks.checksum("s90") != other
    assert ast.masks.sparsity("s90") == pytest.approx(0.9, abs=0.005)


def test_a_run_is_a_round_trip_with_every_mask_and_value() -> None:
    model = pruned()
    masks = masks_in(model)
    ast = wrapped(model)
    fresh = mlp(seed=1)
    write_masks(ast, "pruned", fresh)
    assert_same(masks_in(fresh), {name: masks[name] for name in masks_in(fresh)})
    for name in masks:
        layer, tensor = name.split(".")
        assert torch.equal(getattr(fresh[int(layer)], f"{tensor}_orig"), model.get_parameter(name))
    again = take_masks(fresh)
    assert_same(again, {name: masks[name] for name in again})
    assert_same(snapshot(fresh), snapshot(model))
    assert list(fresh.state_dict()) == list(model.state_dict())


def test_a_sub_net_of_a_file_is_written_with_its_own_normalization(tmp_path: Path) -> None:
    model = conv_net()
    prune.l1_unstructured(model.conv1, "weight", amount=0.5)
    prune.l1_unstructured(model.conv2, "weight", amount=0.7)
    ast = wrapped(model, then="rigl")
    train(model, ast.optimizer, range(8), image_batch)
    ast.save(tmp_path / "elastic.safetensors")
    inputs = image_batch(100)[0]
    with ast.sub_net("s90"):
        expected = model.eval()(inputs).detach()
    contents = read_elastic(tmp_path / "elastic.safetensors")
    for source in (ast, contents, ast_plugin.load(tmp_path / "elastic.safetensors", conv_net())):
        fresh = conv_net(seed=3)
        write_masks(source, "s90", fresh)
        assert torch.equal(fresh.eval()(inputs), expected)
        assert_same(masks_in(fresh), ast.masks.of("s90"))
        for name in ast.masks.parameters:
            layer = fresh.get_submodule(name.partition(".")[0])
            kept = ast.masks.get("pruned", name) | ast.masks.get("s90", name)
            original, dense = layer.weight_orig, model.get_parameter(name)
            assert torch.equal(original[kept], dense[kept])
            assert torch.equal(original, dense) is (source is ast)
        again = take_masks(fresh)
        assert torch.equal(again["conv1.weight"], ast.masks.get("s90", "conv1.weight"))


def test_every_kind_of_layer_and_of_pruning_comes_off_and_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 5, batch_first=True)
            self.norm = nn.LayerNorm(5)
            self.head = nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.norm(self.lstm(inputs)[0][:, -1]))

    torch.manual_seed(0)
    model, inputs = Net(), torch.randn(2, 4, 6)
    dense, names = model(inputs).detach(), sorted(model.state_dict())
    prune.ln_structured(model.head, "weight", amount=1, n=2, dim=0)
    prune.identity(model.head, "bias")
    prune.l1_unstructured(model.lstm, "weight_hh_l0", amount=0.5)
    prune.l1_unstructured(model.norm, "weight", amount=2)
    expected = model(inputs).detach()
    assert not torch.equal(expected, dense)
    masks = take_masks(model)
    assert sorted(model.state_dict()) == names
    assert torch.equal(model(inputs), dense)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert set(masks) == {"head.weight", "head.bias", "lstm.weight_hh_l0", "norm.weight"}
    for name, mask in masks.items():
        module, _, tensor = name.rpartition(".")
        prune.custom_from_mask(fresh.get_submodule(module), tensor, mask)
    assert torch.equal(fresh(inputs), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsities": (0.5, 0.9)}, ConfigError, "masks are given for sub-net 'pruned', which sparsities has not"),
        ({"include": ("0.*",)}, SelectionError, r"the given masks are for; missing: 2\.weight, 4\.weight; leave both"),
        (
            {"then": "gmp", "fixed": False},
            ConfigError,
            "then='gmp' ramps the sparsity up from 0.*choose 'rigl' or 'set'",
        ),
        ({"then": "vr-pge"}, ConfigError, "then='vr-pge' has a sampler of its own"),
        ({"then": "grannet"}, ConfigError, "did you mean 'granet'"),
        ({"name": "my net"}, ConfigError, "white space"),
        ({"total_steps": 2}, ConfigError, "total_steps"),
    ],
)
def test_a_failing_wrap_leaves_the_pruned_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = pruned()
    before, names = snapshot(model), list(model.state_dict())
    hooks = [list(module._forward_pre_hooks.values()) for module in model.modules()]
    computed, output = model[0].weight, model(vector_batch(0)[0]).detach()
    computed = model[0].weight
    with pytest.raises(error, match=message):
        wrapped(model, **options)
    assert list(model.state_dict()) == names
    assert_same(snapshot(model), before)
    assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == hooks
    assert model[0].weight is computed
    assert torch.equal(model(vector_batch(0)[0]), output)
    prune.remove(model[0], "bias")  # which needs all that pruning keeps
    ast = wrapped(model)
    assert "0.bias" not in ast.masks.parameters


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing of this Sequential is pruned with torch\.nn\.utils\.prune"):
        from_pruned(mlp())
    method = from_pruned(pruned())
    for model in (pruned(biases=False), mlp()):
        with pytest.raises(ConfigError, match=r"is not pruned as the one|nothing of this Sequential is pruned"):
            ast_plugin.wrap(sgd(model), model, sparsities=method.sub_nets, method=method, total_steps=40)
    tied = mlp()
    tied[4] = nn.Linear(16, 16)
    tied[4].weight = tied[2].weight
    prune.l1_unstructured(tied[2], "weight", amount=0.5)
    with pytest.raises(ConfigError, match=r"'2\.weight' is pruned, and '4\.weight', the same parameter, is not"):
        take_masks(tied)
    prune.random_unstructured(tied[4], "weight", amount=0.5)
    with pytest.raises(ConfigError, match="are one parameter with two masks"):
        take_masks(tied)


def test_a_model_that_was_pruned_further_is_refused() -> None:
    model = pruned()
    method = from_pruned(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="call from_pruned after the last pruning"):
        ast_plugin.wrap(sgd(model), model, sparsities=method.sub_nets, method=method, total_steps=40)
    assert_same(snapshot(model), before)


def test_what_is_no_model_or_no_method_is_refused() -> None:
    ast = wrapped(pruned())
    for call in (lambda: from_pruned("mlp"), lambda: take_masks("mlp"), lambda: write_masks(ast, "s90", "mlp")):
        with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got str"):
            call()
    with pytest.raises(ConfigError, match="then must be the name of a method or a Method, got 3"):
        from_pruned(pruned(), then=3)


def test_a_batch_norm_that_was_pruned_is_refused() -> None:
    model = conv_net()
    prune.l1_unstructured(model.conv1, "weight", amount=0.5)
    prune.l1_unstructured(model.norm1, "weight", amount=0.5)
    with pytest.raises(SelectionError, match=r"'norm1\.weight', which cannot be pruned: BatchNorm"):
        wrapped(model)


def test_masks_are_not_written_where_they_cannot_be() -> None:
    model = pruned()
    ast = wrapped(model)
    with pytest.raises(WrapError, match="the model is wrapped; give a copy of it"):
        write_masks(ast, "pruned", model)
    with pytest.raises(WrapError, match="the model is wrapped"):
        take_masks(model)
    with pytest.raises(ConfigError, match="s90"):
        write_masks(ast, "s91", mlp())
    with pytest.raises(ConfigError, match=r"is pruned already; call take_masks\(model\) first"):
        write_masks(ast, "s90", pruned())
    other = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    before = snapshot(other)
    with pytest.raises(ConfigError, match=r"'2\.bias' is \(8,\) in it, and \(16,\) in the sub-net"):
        write_masks(ast, "s90", other)
    assert_same(snapshot(other), before)
    with pytest.raises(ConfigError, match="source must be a run, a loaded elastic file"):
        write_masks("elastic.safetensors", "s90", mlp())
    with ast.sub_net("s90"), pytest.raises(ActivationError, match="call write_masks outside of its block"):
        write_masks(ast, "s90", mlp())


def test_masks_from_elsewhere_begin_several_sub_nets() -> None:
    model = mlp()
    kept = {name: torch.rand(model.get_parameter(name).shape) for name in ("0.weight", "2.weight")}
    masks = {f"share{share}": {name: one > share / 10 for name, one in kept.items()} for share in (4, 7)}
    method = from_masks(masks, then="rigl", fixed=False)
    ast = ast_plugin.wrap(sgd(model), model, sparsities=method.sub_nets, method=method, total_steps=40)
    for name, given in masks.items():
        assert_same(ast.masks.of(name), given)
    assert "no mask is given for it" in str(ast.describe())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "masks must be a mapping of sub-net names"),
        ({"0.weight": torch.ones(2, 2, dtype=torch.bool)}, "masks must be a mapping of sub-net names"),
        ({"a": {}}, "are of no parameter"),
        ({"a": {"x": torch.ones(2)}}, r"mask of 'x' in sub-net 'a' must be a torch\.bool tensor, got torch\.float32"),
        ({"a": {"x": torch.zeros(2, dtype=torch.bool)}}, "masks of sub-net 'a' keep nothing at all"),
        ({"a": {"x": torch.ones(2).bool()}, "b": {"y": torch.ones(2).bool()}}, "'b' are of y; give each sub-net masks"),
    ],
)
def test_masks_that_are_none_are_refused(masks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_masks(masks)


def test_masks_of_another_model_are_refused_with_the_nearest_name() -> None:
    model = mlp()
    method = from_masks({"a": {"0.wait": torch.ones(16, 12) > 0}})
    with pytest.raises(
        SelectionError, match=r"'0\.wait', which is no parameter of this Sequential; did you mean '0\.weight'"
    ):
        ast_plugin.wrap(sgd(model), model, sparsities=method.sub_nets, method=method, total_steps=40)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    whole = wrapped(pruned())
    train(whole.model, whole.optimizer, range(20), vector_batch)
    half = wrapped(pruned())
    train(half.model, half.optimizer, range(9), vector_batch)
    rest = wrapped(pruned())
    rest.model.load_state_dict(copy.deepcopy(half.model.state_dict()))
    rest.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    train(rest.model, rest.optimizer, range(9, 20), vector_batch)
    assert_same(snapshot(rest.model), snapshot(whole.model))
    for name in whole.sub_nets:
        assert_same(rest.masks.of(name), whole.masks.of(name))

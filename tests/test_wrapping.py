"""Bad input to `wrap`: a message that names parameter, value and remedy, on an untouched model."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, train_step, vector_batch, wrapped
from torch import Tensor, nn

import ast_plugin
from ast_plugin.attachment import is_attached
from ast_plugin.wrapping import ASTOptions


def refused(error: type[Exception], message: str, model: nn.Module | None = None, **options: Any) -> None:
    """Assert that wrap refuses, and that the model is dense, unhooked and trains as if nothing had happened."""
    model = conv_net() if model is None else model
    optimizer = sgd(model)
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        ast_plugin.wrap(optimizer, model, **{"sparsities": (0.5, 0.9), "total_steps": 100, **options})
    assert isinstance(caught.value, ast_plugin.ASTError)
    assert_same(before, snapshot(model))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert "ast_plugin" not in optimizer.state_dict()
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (1.0,)}, r"sparsities must hold fractions of zeros in \[0, 1\), got 1.0"),
        ({"sparsities": (-0.1,)}, r"got -0.1"),
        ({"sparsities": (90,)}, r"got 90; for 90 % write 0.9"),
        ({"sparsities": (0.9, 0.9)}, r"names the sub-net 's90' twice; remove the duplicate"),
        ({"sparsities": ()}, r"sparsities is empty: give at least one sub-net"),
        ({"sparsities": ("4:2",)}, r"entry '4:2' keeps 4 of every 2 weights.*did you mean '2:4'"),
        ({"sparsities": ("0.9",)}, r"write the number 0.9 without quotes"),
        ({"sparsities": 0.9}, r"sparsities must be a list or tuple, got 0.9; write \(0.9,\)"),
        ({"method": "granett"}, r"granett.*did you mean 'granet'"),
        ({"pattern": "unstructred"}, r"unstructred.*did you mean 'unstructured'"),
        ({"distribution": "erkk"}, r"erkk.*did you mean 'erk'"),
        ({"alternation": "alternate"}, r"alternate.*did you mean 'alternating'"),
        ({"alternation": "single_path"}, r"steps_per_epoch"),
        ({"alternation": "fixed:s95"}, r"s95"),
        ({"correction": "layers"}, r"correction must be one of layer, global, off, got 'layers'"),
        ({"inactive": "drop"}, r"inactive must be one of coast, freeze, got 'drop'"),
        ({"total_steps": 0}, r"total_steps must be a positive number of optimizer steps, got 0"),
        ({"total_steps": 2}, r"total_steps"),
        ({"total_steps": None}, r"total_steps"),
        ({"begin_step": 90, "end_step": 20}, r"begin_step"),
        ({"end_step": 100}, r"end_step"),
        ({"update_interval": 99}, r"update_interval"),
        ({"drop_fraction": 1.5}, r"drop_fraction must lie in \[0, 1\), got 1.5"),
        ({"initial_sparsity": 0.3, "method": "rigl"}, r"initial_sparsity=0.3 has no meaning for method 'rigl'"),
        ({"default_sub_net": "s95"}, r"default_sub_net names no sub-net.*s90"),
        ({"distribution": {"conv*.weight": {"s95": 0.5}}}, r"names no sub-net: 's95'"),
        ({"distribution": {"con1.weight": 0.5}}, r"con1.weight"),
        ({"sparsity": 0.9}, r"unknown setting 'sparsity': did you mean 'sparsities'"),
        ({"seed": "x"}, r"seed must be an int, got 'x'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_with_the_value_and_a_remedy(options: dict[str, Any], message: str) -> None:
    refused(ast_plugin.ConfigError, message, **options)


def test_too_many_zeros_for_the_number_of_layers_are_refused() -> None:
    refused(ast_plugin.ConfigError, "allow_empty_layers", mlp(), sparsities=(0.5, 0.999))


def test_nothing_prunable_is_refused_with_what_was_seen() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8))
    with pytest.raises(ast_plugin.SelectionError, match=r"(?s)0\.weight.*embedding"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.9,), total_steps=100)


def test_a_glob_that_matches_nothing_is_refused() -> None:
    refused(ast_plugin.SelectionError, r"conv9", include=("conv9.*",))
    refused(ast_plugin.SelectionError, r"haed", exclude=("haed.weight",))


def test_prunable_parameters_missing_from_the_optimizer_are_refused_by_name() -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.conv1.parameters(), lr=0.1)
    with pytest.raises(
        ast_plugin.SelectionError, match=r"does not train 2 of 3 prunable parameters: conv2.weight, head.weight"
    ):
        ast_plugin.wrap(optimizer, model, sparsities=(0.9,), total_steps=100)
    assert not model._forward_pre_hooks


def test_a_model_or_optimizer_is_wrapped_once_until_detached() -> None:
    model, optimizer, ast = wrapped()
    with pytest.raises(ast_plugin.WrapError, match=r"the model is wrapped already; call detach\(\)"):
        ast_plugin.wrap(sgd(model), model, sparsities=(0.9,), total_steps=100)
    outer = nn.Sequential(model)
    with pytest.raises(ast_plugin.WrapError, match="the model is wrapped already"):
        ast_plugin.wrap(sgd(outer), outer, sparsities=(0.9,), total_steps=100)
    other = conv_net()
    optimizer.add_param_group({"params": list(other.parameters())})
    with pytest.raises(ast_plugin.WrapError, match="the optimizer is wrapped already"):
        ast_plugin.wrap(optimizer, other, sparsities=(0.9,), total_steps=100)
    ast.detach()
    assert ast_plugin.wrap(sgd(model), model, sparsities=(0.9,), total_steps=100).attached


def test_a_part_of_a_wrapped_model_or_another_container_of_its_layers_is_refused() -> None:
    model, _, _ = wrapped()
    part = nn.Sequential(model.conv1, model.conv2)
    for other in (part, nn.Sequential(nn.Identity(), model.head), model.conv1):
        with pytest.raises(ast_plugin.WrapError, match="the model is wrapped already"):
            ast_plugin.wrap(sgd(other), other, sparsities=(0.5,), total_steps=100)


def test_batch_norm_trained_by_another_optimizer_is_refused_unless_shared_or_frozen() -> None:
    def split(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for n, p in model.named_parameters() if "norm" not in n], lr=0.1)

    model = conv_net()
    with pytest.raises(ast_plugin.SelectionError, match=r"'norm0\.weight', a BatchNorm.*private_normalization=False"):
        ast_plugin.wrap(split(model), model, sparsities=(0.5, 0.9), total_steps=100)
    ast_plugin.wrap(split(model), model, sparsities=(0.5, 0.9), total_steps=100, private_normalization=False).detach()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    assert ast_plugin.wrap(split(model), model, sparsities=(0.5, 0.9), total_steps=100).attached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: (m, m), r"optimizer must be a torch\.optim\.Optimizer, got ConvNet; call wrap\(optimizer, model"),
        (
            lambda m: (sgd(m), list(m.parameters())),
            r"model must be a torch\.nn\.Module, got list; call wrap",
        ),
    ],
)
def test_things_that_are_no_model_or_optimizer_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ast_plugin.WrapError, match=message):
        ast_plugin.wrap(*arguments(conv_net()), sparsities=(0.9,), total_steps=100)


def test_deepspeed_second_order_and_uninitialised_models_are_refused_with_a_reason() -> None:
    model = conv_net()
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(ast_plugin.WrapError, match="DeepSpeed's: its engine steps inside backward"):
        ast_plugin.wrap(sgd(model), engine, sparsities=(0.9,), total_steps=100)
    second = sgd(model)
    second.is_second_order = True
    with pytest.raises(ast_plugin.WrapError, match="second derivatives"):
        ast_plugin.wrap(second, model, sparsities=(0.9,), total_steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions of torch warn of lazy modules
        lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ast_plugin.WrapError, match="run one forward pass before"):
        ast_plugin.wrap(sgd(conv_net()), lazy, sparsities=(0.9,), total_steps=100)


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_a_scripted_part_is_refused_before_anything_is_touched(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch warn of TorchScript itself
        scripted = torch.jit.script(nn.Linear(8, 4))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), scripted, nn.Linear(4, 2))
    with pytest.raises(ast_plugin.WrapError, match="2 is a module of TorchScript, which takes none of the hooks"):
        ast_plugin.wrap(
            sgd(model), model, sparsities=(0.5,), total_steps=100, pattern=pattern, example_inputs=torch.zeros(1, 4)
        )
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_settings_may_come_as_a_config_but_not_both_ways() -> None:
    config = ast_plugin.ASTConfig(sparsities=(0.5, 0.9), total_steps=60)
    model = conv_net()
    with pytest.raises(ast_plugin.ConfigError, match=r"config and single settings \(seed\) exclude each other"):
        ast_plugin.wrap(sgd(model), model, config, seed=1)
    with pytest.raises(ast_plugin.ConfigError, match="config must be an ASTConfig, got dict"):
        ast_plugin.wrap(sgd(model), model, {"sparsities": (0.9,)})
    ast = ast_plugin.wrap(sgd(model), model, config)
    assert ast.config is config


def test_a_config_and_the_same_options_train_alike() -> None:
    results = []
    for as_config in (True, False):
        model = conv_net()
        optimizer = sgd(model)
        settings = {"sparsities": (0.5, 0.9), "total_steps": 30, "update_interval": 5}
        if as_config:
            ast_plugin.wrap(optimizer, model, ast_plugin.ASTConfig(**settings))
        else:
            ast_plugin.wrap(optimizer, model, **settings)
        train(model, optimizer, range(10))
        results.append(snapshot(model))
    assert_same(*results)


def test_the_options_of_wrap_are_the_settings_of_the_config() -> None:
    assert set(ASTOptions.__annotations__) == {field.name for field in dataclasses.fields(ast_plugin.ASTConfig)}


def test_a_method_may_be_an_object_of_ones_own() -> None:
    from ast_plugin.methods import magnitude

    method = ast_plugin.Method(name="mine", description="magnitude once", drop_score=magnitude, reselect=True)
    model, optimizer, ast = wrapped(method=method)
    train(model, optimizer, range(60))
    assert ast.config.method == "mine"
    assert ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)


def test_an_optimizer_inside_a_wrapper_is_found() -> None:
    model = conv_net()
    inner = sgd(model)

    class Holder:
        def __init__(self) -> None:
            self.optimizer = inner

    ast = ast_plugin.wrap(Holder(), model, sparsities=(0.5, 0.9), total_steps=60)
    assert ast.optimizer is inner
    train_step(model, inner, image_batch(0))
    assert ast.step == 1


def test_a_forgotten_controller_goes_on_working_and_is_freed_with_its_model() -> None:
    model = conv_net()
    optimizer = sgd(model)
    controller = weakref.ref(ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60))
    gc.collect()
    train_step(model, optimizer, image_batch(0))
    assert optimizer.state_dict()["ast_plugin"]["step"] == 1
    freed = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert freed() is None
    assert controller() is None


def test_masks_that_never_change_need_no_total_steps() -> None:
    model = mlp()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), method="static")
    before = {name: ast.masks.of(name) for name in ast.sub_nets}
    train(model, optimizer, range(4), vector_batch)
    assert_same(before, {name: ast.masks.of(name) for name in ast.sub_nets})
    assert ast.masks.sparsity("s80") == pytest.approx(0.8, abs=0.002)


def test_what_is_no_twin_is_not_saved(tmp_path: Path) -> None:
    model, _, ast = wrapped(mlp())
    with pytest.raises(ast_plugin.ConfigError, match=r"twin must be what twin\(\) of this controller returned"):
        ast.save(tmp_path / "elastic.safetensors", twin=model)  # type: ignore[arg-type]  # what users do
    assert not list(tmp_path.iterdir())


class WithLoss(nn.Module):
    """A module around the network that returns the loss, as training tasks do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.network(images)
        return {"loss": nn.functional.cross_entropy(output, labels), "output": output}


def test_outermost_trains_as_the_network_itself_does_and_names_stay_the_network_s() -> None:
    plain, inner = conv_net(), conv_net()
    optimizer, inner_optimizer = sgd(plain), sgd(inner)
    task = WithLoss(inner)
    options: ASTOptions = {"sparsities": (0.5, 0.9), "total_steps": 20, "seed": 3}
    expected = ast_plugin.wrap(optimizer, plain, **options)
    ast = ast_plugin.wrap(inner_optimizer, inner, outermost=task, **options)
    for step in range(12):
        train_step(plain, optimizer, image_batch(step))
        inner_optimizer.zero_grad()
        task(*image_batch(step))["loss"].backward()
        inner_optimizer.step()
    assert_same(snapshot(plain), snapshot(inner))
    for name in ast.sub_nets:
        assert_same(expected.materialize(name), ast.materialize(name))
    assert [row.parameter for row in ast.describe().rows] == [row.parameter for row in expected.describe().rows]


def test_a_network_inside_outermost_is_evaluated_by_itself_as_the_default_sub_net() -> None:
    network = conv_net()
    task = WithLoss(network)
    ast = ast_plugin.wrap(sgd(network), network, outermost=task, sparsities=(0.5, 0.9), method="static")
    task.eval()
    images, labels = image_batch(0)
    before = snapshot(network)
    with torch.no_grad():
        alone, inside = network(images), task(images, labels)["output"]
        with ast.sub_net("s50"):
            expected = network(images)
    assert torch.equal(alone, expected)
    assert torch.equal(inside, expected)
    assert_same(before, snapshot(network))


def test_outermost_that_does_not_hold_the_model_is_refused() -> None:
    refused(ast_plugin.WrapError, "outermost, a WithLoss, does not hold the model", outermost=WithLoss(conv_net()))
    refused(ast_plugin.WrapError, "outermost must be a torch.nn.Module around the model", outermost="task")


def test_outermost_that_is_wrapped_already_is_refused_and_free_again_after_detach() -> None:
    network = conv_net()
    task = WithLoss(network)
    optimizer = sgd(network)
    ast = ast_plugin.wrap(optimizer, network, outermost=task, sparsities=(0.5,), method="static")
    with pytest.raises(ast_plugin.WrapError, match="wrapped already"):
        ast_plugin.wrap(sgd(network), network, outermost=task, sparsities=(0.5,), method="static")
    ast.detach()
    assert not task._forward_pre_hooks
    assert not network._forward_pre_hooks
    ast_plugin.wrap(optimizer, network, outermost=task, sparsities=(0.5,), method="static")


def test_a_copy_that_outermost_holds_beside_the_network_may_be_its_twin() -> None:
    network = conv_net()
    task = WithLoss(network)
    task.average = copy.deepcopy(network)
    ast = ast_plugin.wrap(sgd(network), network, outermost=task, sparsities=(0.5, 0.9), method="static")
    with ast.twin(task.average).sub_net("s90") as average, ast.sub_net("s90"):
        assert_same(snapshot(network), snapshot(average))


@pytest.mark.parametrize(("fused", "dampening"), [(True, 0.1), (True, 0.0), (False, 0.1)])
def test_a_fused_step_that_would_damp_the_first_momentum_of_batch_norm_is_refused(
    fused: bool, dampening: float
) -> None:
    model = conv_net()
    optimizer = sgd(model, fused=fused, dampening=dampening)
    if fused and dampening:
        with pytest.raises(ast_plugin.WrapError, match=r"fused=True and dampening=0\.1 would damp the first step"):
            wrapped(model, optimizer)
        assert not is_attached(model)
        wrapped(model, optimizer, private_normalization=False)
    else:
        wrapped(model, optimizer)

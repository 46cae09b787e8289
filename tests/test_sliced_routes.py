"""Which way channel sub-nets are computed: what is chosen by itself, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from channel_networks import conv_groups, sliced_run
from networks import conv_net, mlp, sgd, vector_batch
from torch import nn

import ast_plugin
from ast_plugin.errors import ActivationError
from ast_plugin.sliced_routes import route_for, way_of


def with_compiled_forward() -> nn.Module:
    model = mlp()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def with_a_compiled_part() -> nn.Module:
    model = mlp()
    model[2].compile(backend="eager")
    return model


COMPILED: dict[str, Any] = {
    "around": lambda: torch.compile(mlp(), backend="eager"),
    "inside": lambda: nn.Sequential(torch.compile(mlp(), backend="eager")),
    "a part": with_a_compiled_part,
    "forward": with_compiled_forward,
}


def test_one_process_takes_leaves_and_several_gather() -> None:
    assert route_for("auto", mlp()) == "leaves"
    assert route_for("gather", mlp()) == "gather"
    assert route_for("off", mlp()) == "off"
    with mock.patch("torch.distributed.is_initialized", return_value=True):
        assert route_for("auto", mlp()) == "gather"
        with pytest.raises(ActivationError, match="ranks would drift apart"):
            route_for("leaves", mlp())


@pytest.mark.parametrize("how", sorted(COMPILED))
def test_compiled_models_are_masked(how: str) -> None:
    model = COMPILED[how]()
    assert route_for("auto", model) == "off"
    for slicing in ("leaves", "gather"):
        with pytest.raises(ActivationError, match=f'slicing="{slicing}" cannot be used in compiled or traced code'):
            route_for(slicing, model)  # type: ignore[arg-type]
    assert route_for("off", model) == "off"


@pytest.mark.parametrize("slicing", ["leaves", "gather"])
def test_what_cannot_be_sliced_is_masked_or_refused(slicing: Any) -> None:
    parallel = nn.DataParallel(mlp())
    parallel.device_ids = [0, 1]
    for model, more, reason in (
        (mlp(), {"compiling": True}, "compiled or traced"),
        (mlp(), {"sharded": True}, "every rank holds a part"),
        (parallel, {}, "DataParallel over several devices"),
    ):
        assert route_for("auto", model, **more) == "off"
        with pytest.raises(ActivationError, match=reason):
            route_for(slicing, model, **more)


def test_wrap_refuses_what_cannot_work_and_leaves_the_model_alone() -> None:
    model = conv_net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    options = {"groups": conv_groups(), "sparsities": (0.25, 0.5), "pattern": "channel", "total_steps": 9}
    with pytest.raises(ActivationError, match="compiled or traced"):
        ast_plugin.wrap(optimizer, compiled, slicing="leaves", **options)
    assert not model._forward_pre_hooks
    ast_plugin.wrap(optimizer, compiled, slicing="auto", **options).detach()
    # Without a channel sub-net, the setting has no meaning.
    ast_plugin.wrap(optimizer, compiled, slicing="leaves", sparsities=(0.5,), total_steps=9)


def test_the_description_says_how_channel_sub_nets_are_computed() -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "auto", method="static")
    assert "\n\nChannel sub-nets are computed with smaller weights." in str(ast.describe())
    model.compile(backend="eager")
    assert ast.describe().computed.startswith("with masked weights, because smaller ones cannot be used in compiled")
    assert way_of("off", mlp()) == "with masked weights"
    assert way_of("gather", mlp()) == "with smaller weights, gathered by autograd"
    assert way_of("auto", mlp(), sharded=True).endswith("cannot cut weights of which every rank holds a part")
    plain = mlp()
    assert ast_plugin.wrap(sgd(plain), plain, sparsities=(0.5,), total_steps=9).describe().computed == ""


@pytest.mark.skipif(
    tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 9),
    reason="earlier exporters warn of lifted constants and cannot run what they export; the extra onnx asks for 2.9",
)
def test_a_traced_forward_computes_with_masked_weights() -> None:
    model = conv_net()
    ast = sliced_run(model, sgd(model), "auto", method="static")
    inputs = torch.randn(2, 1, 8, 8)
    model.eval()
    with ast.sub_net("s50"), torch.no_grad():
        expected = model(inputs)
        shapes: list[torch.Size] = []
        handle = model.conv2.register_forward_pre_hook(lambda module, _: shapes.append(module.weight.shape))
        exported = torch.export.export(model, (inputs,), strict=False)
        handle.remove()
        assert set(shapes) == {torch.Size((16, 16, 3, 3))}
        torch.testing.assert_close(exported.module()(inputs), expected)
        assert torch.equal(model(inputs), expected)
        assert model.conv2.weight.shape == (8, 8, 3, 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_table_says_how_the_last_forward_was_computed() -> None:
    model = mlp()
    ast = sliced_run(model, sgd(model), "auto", method="static")
    torch._dynamo.reset()
    assert ast.describe().computed == "with smaller weights"
    compiled = torch.compile(model, backend="eager")  # around the wrapped model, which does not know of it
    compiled(vector_batch(0)[0]).sum().backward()
    assert ast.describe().computed.startswith("with masked weights, because smaller ones cannot be used in compiled")
    model(vector_batch(0)[0]).sum().backward()
    assert ast.describe().computed == "with smaller weights"

"""torch.compile: one graph for all sub-nets, and the results of the uncompiled run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from networks import SETTINGS, conv_net, mlp, sgd
from reference_run import ReferenceRun, assert_runs_agree
from setup_runs import BUSY, assert_as_plain, batch_for, plain_step, whole_batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ast_plugin

pytestmark = [
    pytest.mark.slow,
    # The compiler looks at outputs that it hands to a hook, and warns of its own doing.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

TOLERANCE = {"aot_eager": {}, "inductor": {"rtol": 1e-4, "atol": 1e-5}}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("net", "how", "backend"),
    [
        (conv_net, "compile, then wrap", "aot_eager"),
        (conv_net, "wrap, then compile", "aot_eager"),
        (conv_net, "model.compile()", "aot_eager"),
        (mlp, "compile, then wrap", "aot_eager"),
        (mlp, "wrap, then compile", "aot_eager"),
        (conv_net, "compile, then wrap", "inductor"),
        (mlp, "wrap, then compile", "inductor"),
    ],
)
def test_all_sub_nets_run_in_one_graph_as_without_compiling(
    net: Callable[[], nn.Module], how: str, backend: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    model: Any = net()
    reference = ReferenceRun(model, sgd, **BUSY)
    optimizer = sgd(model)
    called: Any = model
    if how == "compile, then wrap":
        called = torch.compile(model, backend=counter)
    ast = ast_plugin.wrap(optimizer, called, **{**SETTINGS, **BUSY})
    if how == "wrap, then compile":
        called = torch.compile(model, backend=counter)
    elif how == "model.compile()":
        model.compile(backend=counter)
    for step in range(15):
        plain_step(called, optimizer, step)
        reference.step(whole_batch(model, step))
    assert counter.frame_count == 1  # every sub-net, several mask updates
    assert_runs_agree(ast, reference, **TOLERANCE[backend])

    called.eval()
    inputs = batch_for(model, 99)[0]
    outputs = []
    with torch.no_grad():
        for name in ast.sub_nets:
            with ast.sub_net(name):
                outputs.append(called(inputs))
        default = called(inputs)
    assert counter.frame_count == 2  # one more for evaluation
    torch.testing.assert_close(default, outputs[0], rtol=0.0, atol=0.0)
    for name, output in zip(ast.sub_nets, outputs, strict=True):
        alone = net()
        alone.load_state_dict(ast.materialize(name))
        torch.testing.assert_close(output, alone.eval()(inputs).detach(), rtol=1e-4, atol=1e-5)
    called.train()
    for step in range(15, 18):
        plain_step(called, optimizer, step)
    assert counter.frame_count == 2


def test_compiling_is_bit_identical_to_plain_compiling() -> None:
    assert_as_plain(plain_step, prepare=lambda model: torch.compile(model, backend="aot_eager"))


def test_two_compiled_forwards_with_a_backward_each() -> None:
    model = conv_net()
    reference = ReferenceRun(model, sgd, **BUSY)
    optimizer = sgd(model)
    called: Any = torch.compile(model, backend="aot_eager")
    ast = ast_plugin.wrap(optimizer, called, **{**SETTINGS, **BUSY})
    for step in range(9):
        (loss,), (other,) = whole_batch(model, step), whole_batch(model, step + 100)
        optimizer.zero_grad()
        losses = [loss(called), other(called)]
        for each in losses:
            each.backward()
        optimizer.step()
        reference.step([loss, other])
    assert_runs_agree(ast, reference)


@pytest.mark.parametrize("around", [lambda model: model, nn.DataParallel])
def test_the_network_inside_a_compiled_one_evaluates_as_the_default_and_leaves_no_trace_in_the_graph(
    around: Callable[[nn.Module], nn.Module],
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = mlp()
    optimizer = sgd(model)
    called: Any = torch.compile(around(model), backend=counter)
    ast = ast_plugin.wrap(optimizer, model, outermost=called, **{**SETTINGS, **BUSY})
    for step in range(4):
        plain_step(called, optimizer, step)
    graphs = counter.frame_count
    inputs = batch_for(model, 99)[0]
    alone = mlp()
    alone.load_state_dict(ast.materialize(ast.default_sub_net))
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs), alone.eval()(inputs))
    model.train()
    plain_step(called, optimizer, 4)
    assert counter.frame_count == graphs == 1

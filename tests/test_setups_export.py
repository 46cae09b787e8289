"""torch.export and torch.jit.trace of a wrapped model: in a block they see the sub-net, elsewhere they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from channel_networks import conv_groups
from networks import assert_same, conv_net, image_batch, sgd, snapshot, train
from torch import Tensor, nn

import ast_plugin
from ast_plugin.errors import ActivationError
from ast_plugin.export_graph import export_program

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
PATTERNS = ("unstructured", "1:2", "4x4", "channel")


def run(pattern: str) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    model = conv_net()
    optimizer = sgd(model)
    sparsities: Any = ("1:2", 0.0) if pattern == "1:2" else (0.5, 0.75)
    options = {"groups": conv_groups()} if pattern == "channel" else {}
    pattern = "unstructured" if pattern == "1:2" else pattern
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=sparsities, pattern=pattern, method="static", total_steps=20, **options
    )
    train(model, optimizer, range(3))
    return model, optimizer, ast


REFUSED = r"cannot be exported or traced as it is.*export_program\(ast, name, model"


@pytest.mark.skipif(VERSION < (2, 7), reason="earlier versions do not tell that they export")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("training", [False, True])
def test_outside_a_block_an_export_is_refused_and_nothing_is_left(pattern: str, training: bool) -> None:
    model, optimizer, ast = run(pattern)
    model.train(training)
    before, inputs = snapshot(model), image_batch(0)[0]
    with pytest.raises(ActivationError, match=REFUSED):
        torch.export.export(model, (inputs,), strict=False)
    assert_same(snapshot(model), before)
    train(model, optimizer, range(3, 6))
    assert ast.step == 6


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated")
def test_outside_a_block_a_trace_is_refused_and_nothing_is_left() -> None:
    model, optimizer, ast = run("unstructured")
    before = snapshot(model.eval())
    with pytest.raises(ActivationError, match=REFUSED):
        torch.jit.trace(model, image_batch(0)[0])
    assert_same(snapshot(model), before)
    train(model, optimizer, range(3, 6))
    assert ast.step == 6


@pytest.mark.slow
@pytest.mark.skipif(
    VERSION < (2, 9),
    reason="earlier exporters warn of lifted constants and cannot run what they export; the extra onnx asks for 2.9",
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_inside_a_block_the_program_is_the_sub_net(pattern: str) -> None:
    model, optimizer, ast = run(pattern)
    model.eval()
    inputs = image_batch(0)[0]
    with ast.sub_net(ast.sub_nets[0]), torch.no_grad():
        expected: Tensor = model(inputs)
        program = torch.export.export(model, (inputs,), strict=False)
        torch.testing.assert_close(program.module()(inputs), expected)
    train(model, optimizer, range(3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_the_message_offers_works(pattern: str, tmp_path: Path) -> None:
    model, optimizer, ast = run(pattern)
    model.eval()
    inputs, name = image_batch(0)[0], ast.sub_nets[0]
    with ast.sub_net(name), torch.no_grad():
        expected = model(inputs)
    export_program(ast, name, model, inputs, tmp_path / "small.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(inputs), expected)
    train(model, optimizer, range(3, 5))


@pytest.mark.slow
@pytest.mark.skipif(
    VERSION < (2, 8),
    reason="earlier compilers do not pass the reason on",
)
@pytest.mark.parametrize("how", ["export", "compile"])
def test_where_the_compiler_may_leave_nothing_out_it_says_what_to_do(how: str) -> None:
    model, optimizer, _ = run("unstructured")
    model.eval()
    inputs = image_batch(0)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    attempt = compiled if how == "compile" else lambda inputs: torch.export.export(model, (inputs,), strict=True)
    with pytest.raises(Exception, match="ast_plugin puts sub-nets on outside of graphs: with fullgraph=True compile"):
        attempt(inputs)
    torch._dynamo.reset()
    train(model, optimizer, range(3, 5))

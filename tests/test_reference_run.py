"""The library against the same run written by hand (reference_run.py): the whole order of events, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from networks import OPTIMIZERS, conv_net, mlp
from reference_run import ReferenceRun, assert_runs_agree, project_by_hand
from setup_runs import assert_as_reference, plain_step, whole_batch

import ast_plugin


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sgd", {}),
        ("adamw", {"inactive": "freeze"}),
        ("sgd", {"method": "set", "inactive": "freeze"}),
        ("adamw", {"method": "granet", "total_steps": 45}),
        ("sgd", {"method": "granet", "total_steps": 45, "private_normalization": False}),
        ("sgd", {"sparsities": (0.9, 0.5), "grow_initialization": "keep"}),
    ],
    ids=["rigl", "rigl-freeze-adamw", "set-freeze", "granet-adamw", "granet-shared", "densest-last"],
)
def test_a_run_is_the_run_written_by_hand(kind: str, options: dict[str, Any]) -> None:
    assert_as_reference(
        plain_step, build=OPTIMIZERS[kind], steps=33 if options.get("method") == "granet" else 18, **options
    )


@pytest.mark.parametrize("net", [conv_net, mlp])
def test_the_projection_is_the_one_of_the_paper_in_double_precision(net: Any) -> None:
    options: dict[str, Any] = {"method": "static", "sparsities": (0.5, 0.8, 0.9), "total_steps": 60}
    model = net()
    reference = ReferenceRun(model, OPTIMIZERS["sgd"], project=project_by_hand, **options)
    optimizer = OPTIMIZERS["sgd"](model)
    ast = ast_plugin.wrap(optimizer, model, **options)
    for step in range(15):
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
    assert ast.statistics()["conflicts"] == reference.conflicts > 0
    assert_runs_agree(ast, reference, rtol=1e-4, atol=1e-5)

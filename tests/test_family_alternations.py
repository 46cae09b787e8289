"""Orders of the family plugin: the dense sub-net in turn with every other one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import conv_net, mlp, sgd, snapshot, train, vector_batch

import ast_plugin
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family import DensePivotOrder, plugin
from ast_plugin.preview import check_run


def wrapped(alternation: str = "dense_pivot", **options: Any) -> Any:
    model = mlp()
    optimizer = sgd(model)
    settings = {"sparsities": (0.5, 0.0, 0.8, 0.9), "total_steps": 60, "update_interval": 6}
    ast = ast_plugin.wrap(optimizer, model, alternation=alternation, plugins=[plugin], **{**settings, **options})
    return model, optimizer, ast


@pytest.mark.parametrize(
    ("order", "first"),
    [
        (DensePivotOrder(4, 0), [0, 1, 0, 2, 0, 3, 0, 1, 0, 2]),
        (DensePivotOrder(4, 1), [1, 0, 1, 2, 1, 3, 1, 0, 1, 2]),
        (DensePivotOrder(4, 3), [3, 0, 3, 1, 3, 2, 3, 0, 3, 1]),
        (DensePivotOrder(2, 1), [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_a_dense_step_stands_before_each_step_of_another_one(order: DensePivotOrder, first: list[int]) -> None:
    assert [order.sub_net_at(step) for step in range(10)] == first
    assert [order.is_group_start(step) for step in range(4)] == [True, False, True, False]
    steps = [order.sub_net_at(step) for step in range(12 * (order.count - 1))]
    assert [steps.count(index) for index in range(order.count)] == [
        12 * (order.count - 1) // 2 if index == order.pivot else 6 for index in range(order.count)
    ]


def test_the_dense_one_is_found_among_the_sparsities() -> None:
    model, optimizer, ast = wrapped()
    trained = []
    for step in range(60):
        trained.append(ast.active)
        train(model, optimizer, range(step, step + 1), vector_batch)
    assert trained[:8] == ["s0", "s50", "s0", "s80", "s0", "s90", "s0", "s50"]
    assert {name: trained.count(name) for name in ast.sub_nets} == {"s50": 10, "s0": 30, "s80": 10, "s90": 10}
    assert ast.at_target
    assert [ast.masks.sparsity(name) for name in ast.sub_nets] == pytest.approx([0.5, 0, 0.8, 0.9], abs=2e-3)


def test_the_dense_gradient_is_free_and_every_other_one_is_compared_with_it() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(60), vector_batch)
    figures = ast.statistics()["sub_nets"]
    layers = len(ast.masks.parameters)
    assert figures["s0"]["checks"] == 0
    assert {name: figures[name]["checks"] for name in ("s50", "s80", "s90")} == dict.fromkeys(
        ("s50", "s80", "s90"), 10 * layers
    )
    model, optimizer, ast = wrapped(method="static", correction=ast_plugin.CorrectionOptions(first_step=True))
    train(model, optimizer, range(60), vector_batch)
    assert ast.statistics()["sub_nets"]["s0"]["checks"] == 29 * layers  # all but the first step of the run


def test_no_gradient_of_a_sparse_step_opposes_the_dense_step_before_it() -> None:
    model, optimizer, ast = wrapped(method="static", sparsities=(0.0, 0.5, 0.8))
    conflicts, dense = 0, {}
    for step in range(24):
        name = ast.active
        model.train()
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        before = {n: model.get_parameter(n).grad.clone() for n in ast.masks.parameters}
        optimizer.step()
        after = {n: model.get_parameter(n).grad for n in ast.masks.parameters}
        for parameter, gradient in after.items():
            if name == "s0":
                assert torch.equal(gradient, before[parameter])
            else:
                reference = dense[parameter] * ast.masks.get(name, parameter)
                opposed = (before[parameter] * reference).sum() < 0
                conflicts += int(opposed)
                assert (gradient * reference).sum() >= -1e-6
                assert opposed or torch.equal(gradient, before[parameter])
        dense = before if name == "s0" else dense
    assert conflicts > 0


def test_one_of_several_dense_ones_is_chosen_by_name() -> None:
    other = ast_plugin.SubNetSpec(name="dense", sparsity=0.0)
    with pytest.raises(
        ConfigError, match="'s0', 'dense' have sparsity 0; choose one with alternation='dense_pivot:s0'"
    ):
        wrapped(sparsities=(0.0, 0.5, other))
    _, _, ast = wrapped("dense_pivot:dense", sparsities=(0.0, 0.5, other))
    assert ast.active == "dense"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (0.5, 0.9)}, r"the lowest sparsity is 0\.5; add 0\.0 to sparsities"),
        ({"sparsities": ("2:4", 0.9)}, r"the lowest sparsity is 0\.5; add 0\.0 to sparsities"),
        ({"sparsities": (0.0,)}, "trains a dense sub-net in turn with others, and count is 1; add sub-nets"),
        ({"alternation": "dense_pivot:s5"}, "'dense_pivot:s5' names no sub-net of this run: did you mean 's50'"),
        ({"alternation": "dense_pivot:s90"}, r"names a sub-net of sparsity 0\.9; .* name one of sparsity 0"),
    ],
)
def test_a_run_without_a_dense_sub_net_is_refused_and_the_model_is_untouched(
    options: dict[str, Any], message: str
) -> None:
    model = conv_net()
    optimizer = sgd(model)
    before = snapshot(model)
    settings: dict[str, Any] = {"sparsities": (0.0, 0.5, 0.9), "alternation": "dense_pivot", "total_steps": 20}
    with pytest.raises(ConfigError, match=message):
        ast_plugin.wrap(optimizer, model, plugins=[plugin], **{**settings, **options})
    with pytest.raises(ConfigError, match=message):
        check_run(ast_plugin.ASTConfig(**{**settings, **options}), model, plugins=[plugin])
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert not model._forward_pre_hooks


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="pivot must be the index of one of 3 sub-nets, from 0, got 3"):
        DensePivotOrder(3, 3)
    with pytest.raises(ConfigError, match="from 0, got -1"):
        DensePivotOrder(3, -1)

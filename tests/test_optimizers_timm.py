"""Every optimizer that timm's factory makes, with its parameter groups, and Lookahead around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import optimizer_checks as checks
import pytest
import torch
from networks import assert_same, image_batch, snapshot
from optimizer_cases import Case, timm_cases, tiny_net
from timm.optim import create_optimizer_v2, get_optimizer_info

import ast_plugin

pytestmark = pytest.mark.extra("timm")

AVAILABLE = [case for case in timm_cases() if not case.missing]
SECOND_ORDER = [c for c in AVAILABLE if not c.name.startswith("look") and get_optimizer_info(c.name).second_order]
WORKING = [case for case in AVAILABLE if case not in SECOND_ORDER]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It is highly recommended to have 'opt_einsum'")
        yield


@pytest.mark.parametrize("case", WORKING, ids=lambda case: case.name)
@pytest.mark.parametrize("check", sorted(checks.CHECKS))
def test_optimizer_of_timm(case: Case, check: str) -> None:
    checks.CHECKS[check](case)


@pytest.mark.parametrize("name", [*(case.name for case in SECOND_ORDER), "lookahead_adahessian"])
def test_second_order_optimizers_are_refused(name: str) -> None:
    model = tiny_net()
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01)
    with pytest.raises(ast_plugin.WrapError, match="second derivatives"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.9), total_steps=60)


def lookahead(**options: Any) -> tuple[Any, Any, ast_plugin.AlternatingSparseTraining]:
    model = tiny_net()
    optimizer = create_optimizer_v2(model, opt="lookahead_sgd", lr=0.05, weight_decay=0.01, momentum=0.9)
    settings = {"sparsities": (0.3, 0.6, 0.8), "total_steps": 30, "method": "static", **options}
    return model, optimizer, ast_plugin.wrap(optimizer, model, **settings)


def test_lookahead_is_dense_at_rest_before_and_after_it_synchronises() -> None:
    model, optimizer, ast = lookahead()
    slow = None
    for step in range(13):
        checks.train(model, optimizer, range(step, step + 1), image_batch)
        assert all(bool(model.get_parameter(name).all()) for name in ast.masks.parameters)
        if (step + 1) % 6 == 0:
            slow = checks.state_of(optimizer)[model.conv.weight]["lookahead_slow_buff"]
            assert torch.equal(slow, model.conv.weight)
            assert bool(slow.all())
    assert slow is not None


def test_lookahead_under_freeze_moves_inactive_weights_when_it_synchronises_and_at_no_other_step() -> None:
    model, optimizer, ast = lookahead(inactive="freeze")
    moved = []
    for step in range(12):
        mask = ast.masks.get(ast.active, "conv.weight")
        before = model.conv.weight.detach().clone()
        checks.train(model, optimizer, range(step, step + 1), image_batch)
        moved.append(bool((model.conv.weight != before)[~mask].any()))
    assert moved == [step == 11 for step in range(12)]  # the first synchronisation makes the slow weights


def test_lookahead_synchronised_by_hand_leaves_the_run_intact() -> None:
    model, optimizer, ast = lookahead()
    checks.train(model, optimizer, range(7), image_batch)
    with ast.sub_net("s80"):
        before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    optimizer.sync_lookahead()  # as timm's training script does after each epoch
    assert all(bool(model.get_parameter(name).all()) for name in ast.masks.parameters)
    with ast.sub_net("s80"):
        assert_same(before, dict(model.named_buffers()))
    checks.train(model, optimizer, range(7, 9), image_batch)
    assert ast.step == 9


def test_lookahead_may_be_wrapped_by_its_inner_optimizer_as_well() -> None:
    results = []
    for inside in (False, True):
        model = tiny_net()
        optimizer = create_optimizer_v2(model, opt="lookahead_sgd", lr=0.05, momentum=0.9)
        given = optimizer._base_optimizer if inside else optimizer
        ast_plugin.wrap(given, model, sparsities=(0.3, 0.6), total_steps=30)
        checks.train(model, optimizer, range(8), image_batch)
        results.append(snapshot(model))
    assert_same(*results)

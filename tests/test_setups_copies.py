"""Copies and pickles: of the model ordinary dense ones, of model and optimizer together a run that can be wrapped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from networks import SETTINGS, adamw, assert_same, conv_net, image_batch, sgd, snapshot, train, wrapped
from reference_run import ReferenceRun, assert_runs_agree
from setup_runs import BUSY, plain_step, whole_batch
from torch.nn import functional

import ast_plugin


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("build", [sgd, adamw])
def test_a_copied_run_wrapped_anew_goes_on_as_the_original(how: str, build: Any) -> None:
    model = conv_net()
    reference = ReferenceRun(model, build, **BUSY)
    _, optimizer, ast = wrapped(model, build(model), **BUSY)
    for step in range(15):
        reference.step(whole_batch(model, step))
    for step in range(7):
        plain_step(model, optimizer, step)
    pair = (model, optimizer)
    copies = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    again = ast_plugin.wrap(copies[1], copies[0], **{**SETTINGS, **BUSY})
    again.load_state_dict(ast.state_dict())
    before = snapshot(model)
    for step in range(7, 15):
        plain_step(copies[0], copies[1], step)
    assert_runs_agree(again, reference)
    assert_same(before, snapshot(model))
    for step in range(7, 15):
        plain_step(model, optimizer, step)
    assert_runs_agree(ast, reference)


def test_copies_of_model_and_optimizer_are_an_ordinary_training_run() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(4))
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    plain = conv_net()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = sgd(plain)
    plain_optimizer.load_state_dict(optimizer.state_dict())
    before = snapshot(model)
    train(twin, its_optimizer, range(4, 8))
    train(plain, plain_optimizer, range(4, 8))
    assert_same(snapshot(plain), snapshot(twin))
    assert "ast_plugin" not in its_optimizer.state_dict()
    assert_same(before, snapshot(model))
    assert ast.step == 4


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_controller_is_neither_copied_nor_pickled(how: Any) -> None:
    _, _, ast = wrapped()
    with pytest.raises(ast_plugin.WrapError, match=r"copy.deepcopy\(\(model, optimizer\)\)"):
        how(ast)


def test_copying_and_saving_between_forward_and_backward_does_not_disturb_the_step() -> None:
    model = conv_net()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(9):
        images, labels = image_batch(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        state, twin = model.state_dict(), copy.deepcopy(model)
        for name in ast.masks.parameters:
            assert torch.equal(state[name], twin.get_parameter(name))
            assert torch.equal(state[name], reference.parameters[name])
        pickle.dumps(model)
        loss.backward()
        optimizer.step()
        reference.step(whole_batch(model, step))
    assert_runs_agree(ast, reference)

"""What plugins extend a run by: clean-ups, and the call at its beginning that they ask for them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, nonzero, sgd, snapshot, train, wrapped

import ast_plugin
from ast_plugin.attachment import is_attached
from ast_plugin.errors import ConfigError, PluginError, SaveError, WrapError


class Beginner:
    """Does something when the run begins."""

    def __init__(self, act: Callable[[ast_plugin.AlternatingSparseTraining], object]) -> None:
        self.act = act
        self.begun = False

    @ast_plugin.hookimpl
    def ast_sub_net_switched(self, training: ast_plugin.AlternatingSparseTraining, sub_net: str) -> None:
        if not self.begun:
            self.begun = True
            self.act(training)


def untouched(model: torch.nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    assert_same(before, snapshot(model))
    assert not is_attached(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_state_dict_post_hooks
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks


def test_a_plugin_hears_of_the_beginning_when_all_is_built_and_nothing_attached() -> None:
    seen: list[Any] = []

    def look(training: ast_plugin.AlternatingSparseTraining) -> None:
        seen.extend([training, training.attached, training.step, training.active, training.masks.sparsity("s90")])
        assert not training.model._forward_pre_hooks

    model, _, ast = wrapped(plugins=[Beginner(look)], method="static", distribution="uniform")
    assert seen[:4] == [ast, False, 0, "s50"]
    assert seen[4] == ast.masks.sparsity("s90")
    assert ast.attached
    assert nonzero(model, ast) == ast.masks.total()


def test_a_run_that_is_resumed_brings_no_further_call() -> None:
    calls: list[str] = []

    class Counter:
        @ast_plugin.hookimpl
        def ast_sub_net_switched(self, sub_net: str) -> None:
            calls.append(sub_net)

    model, optimizer, ast = wrapped(plugins=[Counter()])
    train(model, optimizer, range(2))
    assert calls == ["s50", "s80", "s90"]
    state = ast.state_dict()
    calls.clear()
    wrapped(plugins=[Counter()])[2].load_state_dict(state)
    assert calls == ["s50"]


@pytest.mark.parametrize("error", [ConfigError("too few steps for it"), WrapError("this optimizer cannot")])
def test_what_a_plugin_refuses_at_the_beginning_reaches_the_user_as_it_is(error: Exception) -> None:
    def refuse(training: ast_plugin.AlternatingSparseTraining) -> None:
        raise error

    model = conv_net()
    optimizer, before = sgd(model), snapshot(model)
    with pytest.raises(type(error)) as caught:
        wrapped(model, optimizer, plugins=[Beginner(refuse)])
    assert caught.value is error
    untouched(model, optimizer, before)
    wrapped(model, optimizer)  # nothing is left that would be in the way


@pytest.mark.parametrize("error", [ValueError("odd"), SaveError("full")])
def test_every_other_error_at_the_beginning_names_the_plugin(error: Exception) -> None:
    def fail(training: ast_plugin.AlternatingSparseTraining) -> None:
        raise error

    model = conv_net()
    optimizer, before = sgd(model), snapshot(model)
    with pytest.raises(PluginError, match="plugin 'Beginner' failed in ast_sub_net_switched"):
        wrapped(model, optimizer, plugins=[Beginner(fail)])
    untouched(model, optimizer, before)


def test_a_config_error_in_the_course_of_the_run_names_the_plugin() -> None:
    class Late:
        @ast_plugin.hookimpl
        def ast_sub_net_switched(self, training: ast_plugin.AlternatingSparseTraining) -> None:
            if training.step:
                raise ConfigError("too late")

    model, optimizer, _ = wrapped(plugins=[Late()])
    with pytest.raises(PluginError, match="plugin 'Late' failed in ast_sub_net_switched: ConfigError: too late"):
        train(model, optimizer, range(2))


def test_clean_ups_are_made_when_another_plugin_then_refuses_the_run() -> None:
    done: list[str] = []

    def refuse(training: ast_plugin.AlternatingSparseTraining) -> None:
        raise ConfigError("no")

    first = Beginner(lambda training: training.add_cleanup(lambda: done.append("undone")))
    with pytest.raises(ConfigError, match="no"):
        wrapped(plugins=[Beginner(refuse), first])  # the last is called first
    assert done == ["undone"]


def test_clean_ups_are_made_once_the_last_first_and_all_of_them_when_the_run_is_detached() -> None:
    done: list[str] = []
    model, _, ast = wrapped()

    def fail() -> None:
        done.append("fails")
        raise ValueError("cannot be undone")

    for callback in (lambda: done.append("first"), fail, lambda: done.append(f"attached: {ast.attached}")):
        ast.add_cleanup(callback)
    with pytest.raises(ValueError, match="cannot be undone"):
        ast.detach()
    assert done == ["attached: False", "fails", "first"]
    assert not is_attached(model)
    ast.detach()
    assert len(done) == 3


def test_what_cannot_be_called_is_no_clean_up() -> None:
    _, _, ast = wrapped()
    with pytest.raises(ConfigError, match="callback must be a function without arguments, got None"):
        ast.add_cleanup(None)

"""The state of plugins in the state of a run: where it travels, and what is refused."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, snapshot, train, wrapped

import ast_plugin
from ast_plugin.errors import PluginError, StateError


class Counter:
    """Counts the steps of every sub-net, and keeps a tensor."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.total = torch.zeros(2)

    @ast_plugin.hookimpl
    def ast_step_finished(self, sub_net: str) -> None:
        self.steps[sub_net] = self.steps.get(sub_net, 0) + 1
        self.total = self.total + 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": dict(self.steps), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.total = dict(state["steps"]), state["total"].clone()


class Careful(Counter):
    """Says whether a state fits before it is loaded; fails in loading it where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def check_state(self, state: dict[str, Any]) -> None:
        if set(state["steps"]) - {"s50", "s80", "s90"}:
            raise StateError("it counted other sub-nets")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        error, self.error = self.error, None
        if error is not None:
            raise error


def loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_plugin_goes_on_from_what_it_had(tmp_path: Path) -> None:
    model, optimizer, ast = wrapped(counter=Counter())
    train(model, optimizer, range(5))
    ast.save_checkpoint(tmp_path / "run.pt")
    states = [
        lambda run: run[1].load_state_dict(loaded(optimizer.state_dict())),
        lambda run: run[2].load_state_dict(loaded(ast.state_dict())),
        lambda run: run[2].load_state_dict(loaded(ast.state_dict(full=True))),
        lambda run: run[2].load_checkpoint(tmp_path / "run.pt"),
    ]
    for load in states:
        counter = Counter()
        other = wrapped(counter=counter)
        load(other)
        assert counter.steps == {"s50": 2, "s80": 2, "s90": 1}
        assert counter.total.tolist() == [5.0, 5.0]
        assert other[2].step == 5


def test_the_entry_has_the_keyword_as_its_name_and_is_there_only_where_a_plugin_has_a_state() -> None:
    class Printer:
        @ast_plugin.hookimpl
        def ast_training_finished(self) -> None:
            """Only watches."""

    _, optimizer, _ = wrapped(plugins=[Printer()])
    assert "plugins" not in optimizer.state_dict()["ast_plugin"]
    _, optimizer, _ = wrapped(plugins=[Printer(), Counter()], tally=Careful())
    assert set(optimizer.state_dict()["ast_plugin"]["plugins"]) == {"Counter", "tally"}


def test_a_state_without_the_plugin_leaves_it_alone() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(3))
    counter = Counter()
    counter.load_state_dict = lambda state: pytest.fail("called")
    _, _, other = wrapped(counter=counter)
    other.load_state_dict(ast.state_dict())
    assert other.step == 3


def test_a_state_of_a_plugin_that_is_not_there_is_named_and_left_out() -> None:
    model, optimizer, ast = wrapped(counter=Counter())
    train(model, optimizer, range(3))
    _, _, other = wrapped()
    with pytest.warns(UserWarning, match=r"a state of plugin 'counter', .* wrap with counter=\.\.\. or plugins="):
        other.load_state_dict(ast.state_dict())
    assert other.step == 3


def test_a_warning_that_is_made_an_error_changes_nothing() -> None:
    model, optimizer, ast = wrapped(counter=Counter(), more=Counter())
    train(model, optimizer, range(3))
    counter = Counter()
    _, _, other = wrapped(more=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'counter'"):
            other.load_state_dict(ast.state_dict())
    assert (other.step, counter.steps) == (0, {})


def refused(error: type[Exception], match: str, counter: Careful, state: dict[str, Any]) -> None:
    """Have a run refuse a state, and find that it and its plugins are as before."""
    other = Counter()
    model, optimizer, ast = wrapped(other=other, counter=counter)
    train(model, optimizer, range(2))
    before = snapshot(model), loaded(ast.state_dict(full=True))
    with pytest.raises(error, match=match):
        ast.load_state_dict(state)
    assert_same(before[0], snapshot(model))
    assert_same(before[1], ast.state_dict(full=True))
    assert counter.steps == other.steps == {"s50": 1, "s80": 1}
    assert ast.step == 2


def state_of_five_steps() -> dict[str, Any]:
    model, optimizer, _ast = wrapped(other=Counter(), counter=Counter())
    train(model, optimizer, range(5))
    return dict(optimizer.state_dict()["ast_plugin"])


def test_what_a_plugin_refuses_changes_nothing() -> None:
    state = state_of_five_steps()
    state["plugins"]["counter"]["steps"]["s98"] = 3
    refused(StateError, "it counted other sub-nets", Careful(), state)


def test_a_state_that_a_plugin_fails_to_check_names_it() -> None:
    state = state_of_five_steps()
    state["plugins"]["counter"] = {}
    refused(PluginError, "plugin 'counter' failed in check_state: KeyError: 'steps'", Careful(), state)


@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        (StateError("of another kind"), StateError, "^of another kind"),
        (ValueError("odd"), PluginError, "plugin 'counter' failed in load_state_dict: ValueError: odd"),
    ],
)
def test_a_state_that_a_plugin_fails_to_load_is_loaded_by_nobody(
    error: Exception, expected: type[Exception], match: str
) -> None:
    refused(expected, match, Careful(error), state_of_five_steps())


def test_a_damaged_entry_is_refused() -> None:
    refused(StateError, "has list under 'plugins'", Careful(), {**state_of_five_steps(), "plugins": []})


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"steps": {"s50": object()}}, r"there is a object at \['steps'\]\['s50'\]"),
        ([1, {2.5: 1}], r"the key 2\.5 at \[1\] is a float"),
        (Counter(), "there is a Counter at the top"),
    ],
)
def test_a_state_that_no_checkpoint_brings_back_names_the_plugin(state: Any, where: str) -> None:
    counter = Counter()
    counter.state_dict = lambda: state
    _, optimizer, _ = wrapped(counter=counter)
    with pytest.raises(PluginError, match=f"plugin 'counter' must return tensors and plain containers .*; {where}"):
        optimizer.state_dict()


def test_a_plugin_that_fails_to_say_its_state_is_named() -> None:
    counter = Counter()
    counter.state_dict = lambda: 1 / 0
    _, _, ast = wrapped(counter=counter)
    with pytest.raises(PluginError, match="plugin 'counter' failed in state_dict: ZeroDivisionError"):
        ast.state_dict()

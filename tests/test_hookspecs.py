"""The hook specifications: which there are, how they are documented, and that the built-ins fit them."""

from __future__ import annotations

import inspect
import typing
from types import FunctionType

import pluggy
import pytest

import ast_plugin
from ast_plugin import defaults, hookspecs
from ast_plugin.hookspecs import AlternationRecord, DistributionRecord, MethodRecord, PatternRecord
from ast_plugin.methods import BUILT_IN_METHODS
from ast_plugin.plugins_host import CHOICE_HOOKS, COLLECT_HOOKS, HOOKS, OBSERVER_HOOKS

SPECIFIED = {
    name: function
    for name, function in vars(hookspecs).items()
    if isinstance(function, FunctionType) and hasattr(function, "ast_plugin_spec")
}


def test_there_are_ten_hooks_and_the_host_knows_their_kinds() -> None:
    assert tuple(SPECIFIED) == HOOKS
    assert len(HOOKS) == 10
    assert all(name.startswith("ast_") for name in HOOKS)
    first_result = {name for name, function in SPECIFIED.items() if function.ast_plugin_spec["firstresult"]}
    assert first_result == set(CHOICE_HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_loop_in_the_module_docstring_shows_the_hook_with_its_arguments(hook: str) -> None:
    arguments = ", ".join(inspect.signature(SPECIFIED[hook]).parameters)
    assert f"{hook}({arguments})" in str(hookspecs.__doc__)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_argument_is_documented(hook: str) -> None:
    text = str(SPECIFIED[hook].__doc__)
    kind = {**dict.fromkeys(COLLECT_HOOKS, "Collect: "), **dict.fromkeys(OBSERVER_HOOKS, "Observe: ")}
    assert text.startswith(kind.get(hook, "First result: "))
    for name in inspect.signature(SPECIFIED[hook]).parameters:
        assert f"\n        {name}: " in text


def test_annotations_can_be_resolved() -> None:
    controller = {"AlternatingSparseTraining": ast_plugin.AlternatingSparseTraining}
    for function in SPECIFIED.values():
        assert "return" in typing.get_type_hints(function, localns=controller)


def test_hooks_are_called_by_pluggy_under_the_public_project_name() -> None:
    class Plugin:
        @ast_plugin.hookimpl
        def ast_step_finished(self, step: int) -> None:
            seen.append(step)

    seen: list[int] = []
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(Plugin())
    manager.check_pending()
    manager.hook.ast_step_finished(training=None, step=3, sub_net="s90")
    assert seen == [3]


def test_the_built_ins_fit_the_specifications() -> None:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(defaults)
    manager.check_pending()
    implemented = {caller.name for caller in manager.get_hookcallers(defaults) or []}
    assert implemented == {*COLLECT_HOOKS, *CHOICE_HOOKS}


def test_a_record_is_made_of_a_method() -> None:
    for method in BUILT_IN_METHODS:
        record = MethodRecord.of(method)
        assert (record.name, record.description) == (method.name, method.description)
        assert record.build() is method


@pytest.mark.parametrize(
    ("offer", "kind"),
    [
        (defaults.ast_methods, MethodRecord),
        (defaults.ast_patterns, PatternRecord),
        (defaults.ast_distributions, DistributionRecord),
        (defaults.ast_alternations, AlternationRecord),
    ],
)
def test_every_built_in_record_describes_itself_in_one_line(
    offer: typing.Callable[[], typing.Sequence[hookspecs.Record]], kind: type[hookspecs.Record]
) -> None:
    records = offer()
    assert len({record.name for record in records}) == len(records) > 0
    for record in records:
        assert isinstance(record, kind)
        assert 10 < len(record.description) < 110
        assert "\n" not in record.description

"""Plugins: where they come from, what they may offer, and who is blamed when one fails."""

from __future__ import annotations

import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import adamw, snapshot, train
from torch import Tensor, nn

import ast_plugin
from ast_plugin.alternation import FixedOrder
from ast_plugin.config import CorrectionOptions
from ast_plugin.correction import Correction
from ast_plugin.distributions import DistributionRequest, LayerRequest, uniform
from ast_plugin.errors import ConfigError, PluginError, SelectionError
from ast_plugin.hookspecs import AlternationRecord, DistributionRecord, MethodRecord, PatternRecord, hookimpl
from ast_plugin.methods import RIGL, STATIC, Method, ScoreInputs, magnitude
from ast_plugin.parameters import ParameterChoice, select_parameters
from ast_plugin.patterns import UnstructuredPattern
from ast_plugin.plugins import PluginRegistry
from ast_plugin.plugins_discovery import AUTOLOAD_VARIABLE, BLOCK_VARIABLE
from ast_plugin.plugins_host import PluginHost
from ast_plugin.version import __version__

ORDER = {
    "count": 3,
    "seed": 0,
    "steps_per_epoch": None,
    "names": ("s50", "s90", "2:4"),
    "default": "s90",
    "sparsities": (0.5, 0.9, 0.5),
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTOLOAD_VARIABLE, raising=False)
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that lays out an installed distribution, as an installer would."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)

    def install(distribution: str, name: str, source: str, *, target: str | None = None) -> Path:
        module = distribution.replace("-", "_")
        path = tmp_path / f"{module}.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[ast_plugin]\n{name} = {target or module}\n")
        return path

    yield install
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


METHOD_PLUGIN = """
    from ast_plugin import Method, hookimpl
    from ast_plugin.hookspecs import MethodRecord
    from ast_plugin.methods import magnitude

    @hookimpl
    def ast_methods():
        return [MethodRecord.of(Method(name="{name}", description="for a test", drop_score=magnitude))]
"""


class Offers:
    """A plugin that offers what it is given, by hook name without the prefix."""

    def __init__(self, **offers: Any) -> None:
        self.offers = offers

    @hookimpl
    def ast_methods(self) -> Any:
        return self.offers.get("methods", [])

    @hookimpl
    def ast_patterns(self) -> Any:
        return self.offers.get("patterns", [])

    @hookimpl
    def ast_distributions(self) -> Any:
        return self.offers.get("distributions", [])

    @hookimpl
    def ast_alternations(self) -> Any:
        return self.offers.get("alternations", [])


class Watcher:
    """Writes down what the observer hooks are told; fails where it is told to."""

    def __init__(self, fails_in: str = "", error: BaseException | None = None) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.fails_in = fails_in
        self.error = error or ValueError("no reason")

    def _note(self, hook: str, *values: object) -> None:
        self.seen.append((hook, *values))
        if hook == self.fails_in:
            raise self.error

    @hookimpl
    def ast_sub_net_switched(self, sub_net: str) -> None:
        self._note("ast_sub_net_switched", sub_net)

    @hookimpl
    def ast_masks_updated(self, sub_net: str, step: int) -> None:
        self._note("ast_masks_updated", sub_net, step)

    @hookimpl
    def ast_step_finished(self, step: int, sub_net: str) -> None:
        self._note("ast_step_finished", step, sub_net)

    @hookimpl
    def ast_training_finished(self, training: object) -> None:
        self._note("ast_training_finished", training)


def method(name: str, **fields: Any) -> Method:
    return Method(name=name, description="for a test", **{"drop_score": magnitude, **fields})


def alone(*plugins: object, **options: Any) -> PluginRegistry:
    return PluginRegistry(plugins, autoload=False, **options)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def layer(name: str) -> LayerRequest:
    return LayerRequest(name=name, shape=(4, 4), units=16)


# ---------------------------------------------------------------- the built-ins


def test_the_built_ins_are_a_plugin_like_any_other() -> None:
    (built_in,) = alone().loaded()
    assert built_in.name == "built-in"
    assert built_in.version == __version__
    assert built_in.origin.startswith("ast-plugin, ")
    assert built_in.origin.endswith("defaults.py")
    assert built_in.hooks == (
        "ast_alternations",
        "ast_correct_gradients",
        "ast_distributions",
        "ast_methods",
        "ast_patterns",
        "ast_select_parameters",
    )


@pytest.mark.parametrize("name", sorted(alone().methods()))
def test_every_method_is_built_by_name(name: str) -> None:
    assert alone().method(name).name == name


def test_the_built_in_names() -> None:
    registry = alone()
    assert sorted(registry.methods()) == ["gmp", "granet", "rigl", "set", "static", "vr-pge"]
    assert sorted(registry.patterns()) == ["N:M", "RxC", "channel", "unstructured"]
    assert sorted(registry.distributions()) == ["erk", "global", "uniform"]
    assert sorted(registry.alternations()) == ["alternating", "fixed", "random", "single_path"]


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:16", "4x4", "1x32", "channel"])
def test_patterns_are_parsed_by_the_record_that_knows_the_form(text: str) -> None:
    assert alone().pattern(text).name == text


@pytest.mark.parametrize("name", ["uniform", "erk", "global"])
def test_distributions_answer(name: str) -> None:
    request = DistributionRequest(
        layers=(layer("a"), layer("b")),
        sparsity=0.5,
        target_sparsity=0.5,
        sub_net="s50",
        unit_scores=lambda: [torch.rand(16), torch.rand(16)],
    )
    assert sum(alone().distribution(name)(request)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("spec", "options", "first_six"),
    [
        ("alternating", {}, [0, 1, 2, 0, 1, 2]),
        ("single_path", {"steps_per_epoch": 2}, [0, 0, 1, 1, 2, 2]),
        ("fixed", {}, [1] * 6),  # the default sub-net is "s90"
        ("fixed:s50", {}, [0] * 6),
        ("fixed:2:4", {}, [2] * 6),  # only the first colon divides
    ],
)
def test_orders_of_sub_nets(spec: str, options: dict[str, Any], first_six: list[int]) -> None:
    order = alone().alternation(spec, **{**ORDER, **options})
    assert [order.sub_net_at(step) for step in range(6)] == first_six


def test_the_random_order_takes_the_seed() -> None:
    one, same, other = (alone().alternation("random", **{**ORDER, "seed": seed}) for seed in (1, 1, 2))
    draws = [[order.sub_net_at(step) for step in range(40)] for order in (one, same, other)]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == {0, 1, 2}


def test_selection_and_correction_are_the_built_in_ones() -> None:
    registry, model = alone(), net()
    assert registry.select_parameters(model) == select_parameters(model)
    # <g, r> = -2, <r, r> = 2, so g <- g + r
    gradient, reference = torch.tensor([[-2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = registry.correct_gradients([gradient], [reference], CorrectionOptions(), ["w"], "s90")
    assert gradient.tolist() == [[-1.0, 0.0], [1.0, 1.0]]
    assert (found.checks, found.conflicts) == (1, 1)


def test_no_correction_when_it_is_off() -> None:
    gradient = torch.tensor([-1.0])
    found = alone().correct_gradients([gradient], [torch.ones(1)], CorrectionOptions(scope="off"), ["w"], "s90")
    assert found == Correction()
    assert gradient.item() == -1


# ---------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.method("granett"), "unknown method 'granett': did you mean 'granet'? Known: gmp, granet, rigl"),
        (lambda r: r.method("lottery"), "unknown method 'lottery': Known: gmp, granet, rigl, set, static, vr-pge"),
        (lambda r: r.pattern("chanel"), "unknown pattern 'chanel': did you mean 'channel'? Known: N:M, RxC, channel"),
        (lambda r: r.pattern("4:2"), "did you mean '2:4'?"),
        (lambda r: r.distribution("Uniform"), "unknown distribution 'Uniform': did you mean 'uniform'?"),
        (lambda r: r.alternation("alternate", **ORDER), "unknown alternation 'alternate': did you mean 'alternating'?"),
        (
            lambda r: r.alternation("fixed:s91", **ORDER),
            "alternation 'fixed:s91' names no sub-net of this run: did you",
        ),
        (lambda r: r.alternation("random:3", **ORDER), "alternation 'random' takes no argument, got 'random:3'"),
        (lambda r: r.alternation("single_path", **ORDER), "give steps_per_epoch=len(loader)"),
    ],
)
def test_what_nobody_offers_is_answered_with_the_near_names(
    ask: Callable[[PluginRegistry], object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(alone())
    assert message in str(caught.value)


# ---------------------------------------------------------------- passed plugins


def test_an_object_and_a_module_take_part() -> None:
    module = types.ModuleType("my_plugin")
    module.__version__ = "3"
    module.ast_step_finished = hookimpl(lambda step: None)
    registry = alone(module, Watcher(), Watcher())
    loaded = {plugin.name: plugin for plugin in registry.loaded()[1:]}
    assert list(loaded) == ["my_plugin", "Watcher", "Watcher-2"]
    assert loaded["my_plugin"].version == "3"
    assert loaded["my_plugin"].origin == "passed in"  # a module made on the fly has no file
    assert loaded["my_plugin"].hooks == ("ast_step_finished",)
    assert loaded["Watcher"].origin.endswith("test_plugins.py")


def test_the_same_object_twice_takes_part_once() -> None:
    watcher = Watcher()
    registry = alone(watcher, watcher)
    registry.notify("ast_step_finished", training=None, step=0, sub_net="s90")
    assert len(watcher.seen) == 1


def test_a_plugin_that_cannot_be_hashed_takes_part() -> None:
    class Equal(Watcher):
        def __eq__(self, other: object) -> bool:
            return self is other

        __hash__ = None  # type: ignore[assignment]  # what a plain dataclass does too

    watcher = Equal()
    alone(watcher).notify("ast_step_finished", training=None, step=0, sub_net="s90")
    assert watcher.seen == [("ast_step_finished", 0, "s90")]


def test_everything_can_be_offered() -> None:
    plugin = Offers(
        methods=[MethodRecord.of(method("mine"))],
        patterns=[
            PatternRecord(
                name="every", description="d", parse=lambda text: UnstructuredPattern() if text == "every" else None
            )
        ],
        distributions=[DistributionRecord(name="flat", description="d", function=lambda r: uniform(r))],
        alternations=[
            AlternationRecord(
                name="last",
                description="d",
                build=lambda *, names, argument, **_: FixedOrder(len(names) - int(argument or 1)),
                takes_argument=True,
            )
        ],
    )
    registry = alone(plugin)
    assert registry.method("mine").name == "mine"
    assert registry.pattern("every").name == "unstructured"
    assert callable(registry.distribution("flat"))
    assert registry.alternation("last", **ORDER).sub_net_at(0) == 2
    assert registry.alternation("last:2", **ORDER).sub_net_at(0) == 1


def test_an_order_is_given_what_it_asks_for() -> None:
    given: dict[str, Any] = {}

    def none() -> FixedOrder:
        return FixedOrder(0)

    def some(*, names: Any, sparsities: Any) -> FixedOrder:
        given.update(some=(names, sparsities))
        return FixedOrder(1)

    def everything(**arguments: Any) -> FixedOrder:
        given.update(everything=arguments)
        return FixedOrder(2)

    builds = (none, some, everything)
    records = [AlternationRecord(name=build.__name__, description="d", build=build) for build in builds]
    registry = alone(Offers(alternations=records))
    assert [registry.alternation(record.name, **ORDER).sub_net_at(0) for record in records] == [0, 1, 2]
    assert given == {
        "some": (("s50", "s90", "2:4"), (0.5, 0.9, 0.5)),
        "everything": {**ORDER, "argument": None},
    }


def test_the_last_registered_plugin_is_asked_first_and_may_pass() -> None:
    class Chooses:
        def __init__(self, only: str | None) -> None:
            self.only = only

        @hookimpl
        def ast_select_parameters(self, model: nn.Module) -> list[ParameterChoice] | None:
            if self.only is None:
                return None
            return [
                ParameterChoice(
                    name=n, shape=tuple(p.shape), prunable=n == self.only, reason="" if n == self.only else "not mine"
                )
                for n, p in model.named_parameters()
            ]

    def chosen(*plugins: object) -> list[str]:
        return [c.name for c in alone(*plugins).select_parameters(net()) if c.prunable]

    assert chosen(Chooses("0.weight"), Chooses("1.weight")) == ["1.weight"]
    assert chosen(Chooses("0.weight"), Chooses(None)) == ["0.weight"]
    assert chosen(Chooses(None)) == ["0.weight", "1.weight"]


def test_a_choice_can_be_wrapped() -> None:
    class Narrows:
        @hookimpl(wrapper=True)
        def ast_select_parameters(self) -> Any:
            choices = yield
            return [ParameterChoice(name=c.name, shape=c.shape, prunable=c.name == "0.weight") for c in choices]

    assert [c.prunable for c in alone(Narrows()).select_parameters(net())] == [True, False, False, False]


def test_a_plugin_corrects_gradients_its_own_way() -> None:
    class Halves:
        @hookimpl
        def ast_correct_gradients(self, gradients: Sequence[Tensor], names: Sequence[str]) -> Correction:
            for gradient in gradients:
                gradient.mul_(0.5)
            return Correction(checks=len(names), conflicts=0, cosines=[0.0] * len(names))

    gradient = torch.ones(2)
    found = alone(Halves()).correct_gradients([gradient], [-gradient], CorrectionOptions(), ["w"], "s90")
    assert gradient.tolist() == [0.5, 0.5]
    assert found.checks == 1


def test_observers_get_the_arguments_that_they_ask_for() -> None:
    watcher, other = Watcher(), Watcher()
    registry = alone(watcher, other)
    registry.notify("ast_masks_updated", training="t", sub_net="s90", step=4)
    registry.notify("ast_training_finished", training="t")
    assert watcher.seen == other.seen == [("ast_masks_updated", "s90", 4), ("ast_training_finished", "t")]


def test_notifying_nobody_does_not_call_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(PluginHost, "call", lambda _, hook, **__: called.append(hook))
    idle, watched = alone(Offers()), alone(Watcher())
    for registry in (idle, watched):
        registry.notify("ast_masks_updated", training=None, step=0, sub_net="s90")
    assert called == ["ast_masks_updated"]  # the watched one's


# ---------------------------------------------------------------- plugins that do not fit


class Misspelt:
    @hookimpl
    def ast_step_finish(self, step: int) -> None: ...


class Unmarked:
    def ast_step_finished(self, step: int) -> None: ...


class PartlyUnmarked:
    @hookimpl
    def ast_methods(self) -> list[MethodRecord]: ...

    def ast_masks_updated(self, step: int) -> None: ...


class UnknownArgument:
    @hookimpl
    def ast_step_finished(self, epoch: int) -> None: ...


class WrapsCollection:
    @hookimpl(wrapper=True)
    def ast_methods(self) -> Any:
        return (yield)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Misspelt(), "implements the unknown hook 'ast_step_finish': did you mean 'ast_step_finished' or"),
        (
            Unmarked(),
            "has an unmarked function 'ast_step_finished': mark every hook function with @ast_plugin.hookspec",
        ),
        (PartlyUnmarked(), "has an unmarked function 'ast_masks_updated'"),
        (UnknownArgument(), "does not fit its hook: Plugin 'UnknownArgument' for hook 'ast_step_finished'"),
        (UnknownArgument(), "Argument(s) {'epoch'} are declared in the hookimpl but can not be found in the hookspec"),
        (WrapsCollection(), "wraps the collect hook 'ast_methods'; only the other hooks can be wrapped"),
        (Watcher, "is the class Watcher: give an object of it, Watcher()"),
        ("my_module", "implements no hook"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_by_name(plugin: object, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        alone(plugin)
    assert message in str(caught.value)
    name = getattr(plugin, "__name__", type(plugin).__name__)
    assert str(caught.value).startswith(f"plugin {name!r} (passed in")


def test_a_hook_of_a_later_version_may_be_optional() -> None:
    class Ahead(Watcher):
        @hookimpl(optionalhook=True)
        def ast_epoch_finished(self, epoch: int) -> None: ...

    assert "ast_epoch_finished" not in alone(Ahead()).loaded()[1].hooks


def test_equal_plugins_cannot_be_told_apart() -> None:
    class Equal(Watcher):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        def __hash__(self) -> int:
            return 0

    with pytest.raises(PluginError, match=r"plugin 'Equal-2' \(passed in.*\) cannot be registered: "):
        alone(Equal(), Equal())


@pytest.mark.parametrize("plugins", [Watcher(), "my_module", types.ModuleType("m")])
def test_plugins_are_given_as_a_list(plugins: Any) -> None:
    with pytest.raises(ConfigError, match="plugins must be a list or tuple of modules and objects, got"):
        PluginRegistry(plugins)


@pytest.mark.parametrize(
    ("offers", "ask", "message"),
    [
        (
            {"methods": [MethodRecord.of(method("granet"))]},
            lambda r: r.method("granet"),
            "'granet' is offered by plugin 'built-in' and by plugin 'Offers' (ast_methods); rename it in one of them",
        ),
        (
            {"patterns": [PatternRecord(name="all", description="d", parse=lambda text: UnstructuredPattern())]},
            lambda r: r.pattern("2:4"),
            "pattern '2:4' is offered by plugin 'built-in' and by plugin 'Offers'; leave one of them out",
        ),
        ({"methods": None}, lambda r: r.method("set"), "plugin 'Offers' failed in ast_methods: TypeError: 'NoneType'"),
        (
            {"methods": [method("mine")]},
            lambda r: r.method("set"),
            "plugin 'Offers' must return a list of MethodRecord from ast_methods, got Method(name='mine'",
        ),
        (
            {"methods": [MethodRecord(name="mine", description="d", build=lambda: 1 / 0)]},
            lambda r: r.method("mine"),
            "plugin 'Offers' failed in method 'mine': ZeroDivisionError: division by zero",
        ),
        (
            {"methods": [MethodRecord(name="mine", description="d", build=lambda: STATIC)]},
            lambda r: r.method("mine"),
            "plugin 'Offers' must build the Method named 'mine', got Method(name='static'",
        ),
        (
            {"patterns": [PatternRecord(name="odd", description="d", parse=lambda text: 3 if text == "odd" else None)]},
            lambda r: r.pattern("odd"),
            "plugin 'Offers' must parse 'odd' to a Pattern or None, got 3",
        ),
        (
            {"patterns": [PatternRecord(name="odd", description="d", parse=lambda text: int(text))]},
            lambda r: r.pattern("2:4"),
            "plugin 'Offers' failed in pattern 'odd': ValueError: invalid literal",
        ),
        (
            {"distributions": [DistributionRecord(name="flat", description="d", function=lambda request: 1 / 0)]},
            lambda r: r.distribution("flat")(None),
            "plugin 'Offers' failed in distribution 'flat': ZeroDivisionError",
        ),
        (
            {"alternations": [AlternationRecord(name="odd", description="d", build=lambda **_: 1 / 0)]},
            lambda r: r.alternation("odd", **ORDER),
            "plugin 'Offers' failed in alternation 'odd': ZeroDivisionError",
        ),
        (
            {"alternations": [AlternationRecord(name="odd", description="d", build=lambda **_: 7)]},
            lambda r: r.alternation("odd", **ORDER),
            "plugin 'Offers' must build an Alternation for 'odd', got 7",
        ),
    ],
)
def test_a_bad_offer_is_refused_with_the_name_of_the_plugin(
    offers: dict[str, Any], ask: Callable[[PluginRegistry], object], message: str
) -> None:
    registry = alone(Offers(**offers))
    with pytest.raises(PluginError) as caught:
        ask(registry)
    assert message in str(caught.value)


def test_two_plugins_with_one_name_are_both_named() -> None:
    one, other = (Offers(methods=[MethodRecord.of(method("mine"))]) for _ in range(2))
    with pytest.raises(PluginError, match="'mine' is offered by plugin 'Offers' and by plugin 'Offers-2'"):
        alone(one, other).method("mine")
    assert alone(one, other, block=["Offers-2"]).method("mine").name == "mine"


@pytest.mark.parametrize("score", ["drop_score", "grow_score"])
def test_a_score_that_fails_later_is_still_blamed_on_its_plugin(score: str) -> None:
    def fails(inputs: ScoreInputs) -> Tensor:
        raise RuntimeError("no gradient today")

    built = alone(Offers(methods=[MethodRecord.of(method("mine", **{score: fails}))])).method("mine")
    with pytest.raises(PluginError) as caught:
        getattr(built, score)(None)
    assert str(caught.value) == (
        f"plugin 'Offers' failed in the {score.replace('_', ' ')} of method 'mine': RuntimeError: no gradient today"
    )


def test_a_user_error_of_a_plugin_reaches_the_user_as_it_is() -> None:
    class Refuses:
        @hookimpl
        def ast_select_parameters(self) -> None:
            raise SelectionError("give include")

    def build(**_: object) -> FixedOrder:
        raise ConfigError("give a seed")

    offers = Offers(alternations=[AlternationRecord(name="odd", description="d", build=build)])
    with pytest.raises(ConfigError, match=r"^give a seed$"):
        alone(offers).alternation("odd", **ORDER)
    with pytest.raises(SelectionError, match=r"^give include$"):
        alone(Refuses()).select_parameters(net())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "plugin 'Answers' must return one ParameterChoice for every entry of model.named_parameters(), in order"),
        ([1, 2, 3, 4], "must return one ParameterChoice for every entry"),
        ("all", "must return one ParameterChoice for every entry"),
        (
            [ParameterChoice(name=n, shape=(), prunable=False, reason="no") for n, _ in net().named_parameters()],
            "plugin 'Answers' must return at least one prunable parameter, from ast_select_parameters",
        ),
    ],
)
def test_a_selection_that_does_not_fit_the_model_is_refused(answer: Any, message: str) -> None:
    class Answers:
        @hookimpl
        def ast_select_parameters(self) -> Any:
            return answer

    with pytest.raises(PluginError) as caught:
        alone(Answers()).select_parameters(net())
    assert message in str(caught.value)


def test_a_correction_of_another_kind_is_refused() -> None:
    class Answers:
        @hookimpl
        def ast_correct_gradients(self) -> int:
            return 3

    with pytest.raises(PluginError, match="plugin 'Answers' must return a Correction or None, not 3, from ast_correct"):
        alone(Answers()).correct_gradients([], [], CorrectionOptions(), [], "s90")


# ---------------------------------------------------------------- plugins that raise


def test_a_failing_observer_is_named_with_its_hook_and_reason() -> None:
    reason = ValueError("no reason")
    calm, failing = Watcher(), Watcher("ast_step_finished", reason)
    with pytest.raises(PluginError) as caught:
        alone(calm, failing).notify("ast_step_finished", training=None, step=0, sub_net="s90")
    # both are objects of one class: the name tells which
    assert str(caught.value) == "plugin 'Watcher-2' failed in ast_step_finished: ValueError: no reason"
    assert caught.value.__cause__ is reason
    with pytest.raises(PluginError, match=r"^plugin 'Watcher' failed"):
        alone(failing, calm).notify("ast_step_finished", training=None, step=0, sub_net="s90")


def test_a_module_that_fails_is_named() -> None:
    module = types.ModuleType("my_plugin")
    module.ast_step_finished = hookimpl(lambda step: 1 // step)
    with pytest.raises(PluginError, match=r"^plugin 'my_plugin' failed in ast_step_finished: ZeroDivisionError"):
        alone(module).notify("ast_step_finished", training=None, step=0, sub_net="s90")


def test_a_failure_under_a_wrapper_is_blamed_on_the_innermost_plugin() -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def ast_step_finished(self) -> Any:
            return (yield)

    with pytest.raises(PluginError, match=r"^plugin 'Watcher' failed"):
        alone(Wraps(), Watcher("ast_step_finished")).notify("ast_step_finished", training=None, step=0, sub_net="s90")


def test_an_error_of_the_built_in_is_not_blamed_on_a_plugin() -> None:
    with pytest.raises(SelectionError, match="include glob 'x' matches no parameter"):
        alone(Watcher()).select_parameters(net(), include=("x",))
    with pytest.raises(ConfigError, match="2 gradients but 0 references"):
        alone().correct_gradients([torch.ones(1)] * 2, [], CorrectionOptions(), [], "s90")


def test_a_wrong_call_of_our_own_is_not_blamed_on_a_plugin() -> None:
    with pytest.raises(Exception, match="training") as caught, pytest.warns(UserWarning, match="training"):
        alone(Watcher()).notify("ast_training_finished")
    assert not isinstance(caught.value, PluginError)
    with pytest.raises(KeyError):
        alone().notify("ast_no_such_hook")


def test_an_interrupt_passes() -> None:
    watcher = Watcher("ast_step_finished", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        alone(watcher).notify("ast_step_finished", training=None, step=0, sub_net="s90")


@pytest.mark.parametrize("hook", ["ast_sub_net_switched", "ast_masks_updated", "ast_step_finished"])
def test_a_plugin_that_raises_in_training_leaves_dense_weights(hook: str) -> None:
    model = PlainNet()
    optimizer = adamw(model)
    watcher = Watcher()
    training = ast_plugin.wrap(
        optimizer, model, sparsities=(0.5, 0.9), total_steps=40, update_interval=2, plugins=[watcher]
    )
    watcher.fails_in = hook
    with pytest.raises(PluginError, match=f"^plugin 'Watcher' failed in {hook}: ValueError: no reason"):
        train(model, optimizer, range(40))
    for name in training.masks.parameters:
        assert model.get_parameter(name).count_nonzero() == training.masks.total(name)
    before = snapshot(model)
    with training.sub_net("s90"):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())


class PlainNet(nn.Sequential):
    """A small net without BatchNorm, so that a snapshot is nothing but weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))


# ---------------------------------------------------------------- plugins by keyword


def test_a_keyword_that_is_no_setting_names_a_plugin() -> None:
    seen = Watcher()
    model = net()
    ast_plugin.wrap(adamw(model), model, sparsities=(0.5,), total_steps=4, method="static", watcher=seen)
    assert seen.seen == [("ast_sub_net_switched", "s50")]
    names = [plugin.name for plugin in alone(Watcher(), keywords={"watcher": seen}).loaded()]
    assert names == ["built-in", "Watcher", "watcher"]


def test_a_plugin_by_keyword_goes_with_settings_in_one_object_and_is_asked_before_others() -> None:
    model = net()
    config = ast_plugin.ASTConfig(sparsities=(0.5,), total_steps=4, method="static")
    order: list[str] = []

    class Chooser:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def ast_select_parameters(self) -> None:
            order.append(self.name)

    ast_plugin.wrap(adamw(model), model, config, plugins=[Chooser("passed")], chooser=Chooser("keyword"))
    assert order == ["keyword", "passed"]


def test_a_plugin_given_in_both_ways_takes_part_once_under_its_keyword() -> None:
    seen = Watcher()
    loaded = alone(seen, Watcher(), keywords={"watcher": seen}).loaded()
    assert [plugin.name for plugin in loaded] == ["built-in", "Watcher", "watcher"]


def test_a_keyword_that_is_the_name_of_an_installed_plugin_is_numbered(site: Callable[..., Path]) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    loaded = PluginRegistry([Watcher()], keywords={"zeal": Watcher()}).loaded()
    assert {"zeal", "zeal-2", "Watcher"} <= {plugin.name for plugin in loaded}


@pytest.mark.parametrize("value", [3, None, "static", net])
def test_a_keyword_with_anything_else_is_an_unknown_setting(value: Any) -> None:
    model = net()
    with pytest.raises(ConfigError, match="unknown setting 'watcher'"):
        ast_plugin.wrap(adamw(model), model, sparsities=(0.5,), total_steps=4, watcher=value)


def test_a_keyword_with_a_class_or_with_unmarked_functions_says_what_is_missing() -> None:
    class Unmarked:
        def ast_step_finished(self) -> None:
            """Lacks its mark."""

    model = net()
    for value, message in (
        (Watcher, r"'watcher' .* is the class Watcher: give an object of it, Watcher\(\)"),
        (Unmarked(), "'watcher' .* has an unmarked function 'ast_step_finished'"),
    ):
        with pytest.raises(PluginError, match=message):
            ast_plugin.wrap(adamw(model), model, sparsities=(0.5,), total_steps=4, watcher=value)
    assert not model._forward_pre_hooks


# ---------------------------------------------------------------- installed plugins


def test_an_installed_plugin_is_found_and_says_where_it_is_from(site: Callable[..., Path]) -> None:
    path = site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    registry = PluginRegistry()
    assert registry.method("zeal").name == "zeal"
    loaded = {plugin.name: plugin for plugin in registry.loaded()}["zeal"]
    assert (loaded.origin, loaded.version, loaded.hooks) == (f"my-methods, {path}", "1.5", ("ast_methods",))


def test_an_entry_point_may_name_an_object(site: Callable[..., Path]) -> None:
    source = """
        from ast_plugin import hookimpl

        class Plugin:
            @hookimpl
            def ast_step_finished(self, step):
                steps.append(step)

        steps = []
        plugin = Plugin()
    """
    site("my-objects", "watch", source, target="my_objects:plugin")
    registry = PluginRegistry()
    registry.notify("ast_step_finished", training=None, step=5, sub_net="s90")
    assert sys.modules["my_objects"].steps == [5]


def test_an_installed_plugin_that_is_passed_too_takes_part_once(site: Callable[..., Path]) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    import my_methods

    assert [p.name for p in PluginRegistry([my_methods]).loaded()].count("zeal") == 1
    assert PluginRegistry([my_methods]).method("zeal").name == "zeal"
    assert [p.name for p in alone(my_methods).loaded()] == ["built-in", "my_methods"]


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_autoload_is_switched_off_by_a_variable(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    monkeypatch.setenv(AUTOLOAD_VARIABLE, value)
    assert [plugin.name for plugin in PluginRegistry().loaded()] == ["built-in"]
    with pytest.raises(ConfigError, match="unknown method 'zeal'"):
        PluginRegistry().method("zeal")
    assert PluginRegistry(autoload=True).method("zeal").name == "zeal"


@pytest.mark.parametrize("value", ["", "0", "False"])
def test_autoload_stays_on(site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    monkeypatch.setenv(AUTOLOAD_VARIABLE, value)
    assert PluginRegistry().method("zeal").name == "zeal"


def test_a_variable_that_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUTOLOAD_VARIABLE, "maybe")
    with pytest.raises(ConfigError, match="AST_PLUGIN_DISABLE_AUTOLOAD must be 1 or 0, got 'maybe'"):
        PluginRegistry()


def test_one_plugin_is_blocked_by_name(site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    site("my-others", "calm", METHOD_PLUGIN.format(name="calm"))
    assert "zeal" not in PluginRegistry(block=["zeal"]).methods()
    monkeypatch.setenv(BLOCK_VARIABLE, " zeal ,")
    registry = PluginRegistry()
    assert "zeal" not in registry.methods()
    assert "calm" in registry.methods()
    monkeypatch.setenv(BLOCK_VARIABLE, "zeal,calm")
    assert not {"zeal", "calm"} & set(PluginRegistry().methods())


def test_a_passed_plugin_is_blocked_by_name() -> None:
    assert [plugin.name for plugin in alone(Watcher(), block=["Watcher"]).loaded()] == ["built-in"]


def test_blocking_an_unknown_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"block names the unknown plugin 'Watch': did you mean 'Watcher'\?"):
        alone(Watcher(), block=["Watch"])
    with pytest.raises(ConfigError, match=r"block must be a list of plugin names, got 'zeal'; write \['zeal'\]"):
        alone(block="zeal")
    with pytest.raises(ConfigError, match="plugin 'built-in' cannot be blocked"):
        alone(block=["built-in"])
    # One environment variable may serve several environments, so there it is no error.
    monkeypatch.setenv(BLOCK_VARIABLE, "elsewhere")
    with pytest.warns(UserWarning, match="AST_PLUGIN_BLOCK names the unknown plugin 'elsewhere'"):
        alone()


def test_a_misspelt_name_in_the_variable_blocks_nothing_and_is_pointed_out(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    monkeypatch.setenv(BLOCK_VARIABLE, "zeel")
    with pytest.warns(UserWarning, match=r"the unknown plugin 'zeel': did you mean 'zeal'\? Known: .*zeal"):
        registry = PluginRegistry()
    assert "zeal" in registry.methods()


def test_a_plugin_that_cannot_be_imported_is_named_with_its_distribution(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("my-methods", "zeal", "import no_such_module_anywhere")
    with pytest.raises(PluginError) as caught:
        PluginRegistry()
    assert str(caught.value) == (
        "plugin 'zeal' of my-methods 1.5 could not be imported from 'my_methods': ModuleNotFoundError: No module named "
        "'no_such_module_anywhere'; repair or uninstall it, or leave it out with AST_PLUGIN_BLOCK=zeal"
    )
    monkeypatch.setenv(BLOCK_VARIABLE, "zeal")
    PluginRegistry()


def test_an_installed_plugin_that_does_not_fit_is_named_with_its_distribution(site: Callable[..., Path]) -> None:
    site("my-methods", "zeal", "def ast_methods(): ...")
    with pytest.raises(PluginError, match=r"^plugin 'zeal' \(my-methods, .*\) has an unmarked function 'ast_methods'"):
        PluginRegistry()


def test_two_distributions_with_one_plugin_name_are_both_named(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("my-methods", "zeal", METHOD_PLUGIN.format(name="zeal"))
    site("my-others", "zeal", METHOD_PLUGIN.format(name="zeal"))
    with pytest.raises(PluginError) as caught:
        PluginRegistry()
    assert "plugin 'zeal' is offered by " in str(caught.value)
    assert "my-methods 1.5" in str(caught.value)
    assert "my-others 1.5" in str(caught.value)
    monkeypatch.setenv(BLOCK_VARIABLE, "zeal")
    assert "zeal" not in PluginRegistry().methods()


def test_a_built_in_method_is_handed_out_as_it_is() -> None:
    assert alone().method("rigl") is RIGL


class Brittle:
    """A plugin whose pattern, order of sub-nets and sparsity schedule break when they are used."""

    class BrokenPattern(UnstructuredPattern):
        @property
        def name(self) -> str:
            return "brittle"

        def keep_top(self, *_: object) -> torch.Tensor:
            raise ZeroDivisionError("in keep_top")

    class BrokenOrder:
        name = "brittle"

        def sub_net_at(self, step: int) -> int:
            raise ZeroDivisionError("in sub_net_at")

        def is_group_start(self, step: int) -> bool:
            return True

    @hookimpl
    def ast_patterns(self) -> list[PatternRecord]:
        return [
            PatternRecord(
                name="brittle",
                description="breaks",
                parse=lambda text: self.BrokenPattern() if text == "brittle" else None,
            )
        ]

    @hookimpl
    def ast_alternations(self) -> list[AlternationRecord]:
        return [AlternationRecord(name="brittle", description="breaks", build=lambda **_: self.BrokenOrder())]

    @hookimpl
    def ast_methods(self) -> list[MethodRecord]:
        def schedule(step: int, **_: object) -> float:
            raise ZeroDivisionError("in schedule")

        method = Method(name="brittle", description="breaks", drop_score=magnitude, sparsity_schedule=schedule)
        return [MethodRecord.of(method)]


def test_what_breaks_only_when_it_is_used_names_the_plugin_too() -> None:
    registry = PluginRegistry([Brittle()], autoload=False)
    pattern = registry.pattern("brittle")
    assert pattern.name == "brittle"
    assert pattern.unit_count((2, 3)) == 6
    with pytest.raises(PluginError, match=r"keep_top of pattern 'brittle'.*in keep_top"):
        pattern.keep_top(torch.ones(6), 3, (2, 3))
    order = registry.alternation("brittle", **ORDER)
    with pytest.raises(PluginError, match=r"sub_net_at of alternation 'brittle'.*in sub_net_at"):
        order.sub_net_at(0)
    with pytest.raises(PluginError, match=r"the sparsity schedule of method 'brittle'.*in schedule"):
        registry.method("brittle").sparsity_schedule(0, begin=0, end=1, initial=0.0, final=0.5)

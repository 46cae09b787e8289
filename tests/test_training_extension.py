"""What plugins extend a run by: clean-ups, and the call at its beginning that they ask for them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channel_networks import conv_groups
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


# ---------------------------------------------------------------- masks by scores from outside


def hand_worked() -> ast_plugin.AlternatingSparseTraining:
    """A run over two weights of 2 x 4 and 2 x 2, of which a half is kept: six of twelve."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    return wrapped(model, method="static", sparsities=(0.5,), include=("*",))[2]


def test_the_highest_scores_of_all_layers_are_kept_and_nothing_changes() -> None:
    ast = hand_worked()
    before, revision = ast.masks.of("s50"), ast.masks.revision("s50")
    # Six of: 12 11 10 9 | 1 1 1 1 and 8 7 | 1 1. The global threshold lies at 7: four and two.
    scores = {
        "0.weight": torch.tensor([[12.0, 1.0, 11.0, 1.0], [10.0, 1.0, 9.0, 1.0]]),
        "1.weight": torch.tensor([[8.0, 1.0], [7.0, 1.0]]),
    }
    masks = ast.masks_by_score("s50", scores)
    assert masks["0.weight"].int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert masks["1.weight"].int().tolist() == [[1, 0], [1, 0]]
    assert ast.masks.revision("s50") == revision
    assert_same(before, ast.masks.of("s50"))


def test_equal_scores_go_to_the_lower_index_and_no_layer_is_left_empty() -> None:
    ast = hand_worked()
    masks = ast.masks_by_score("s50", {"0.weight": torch.ones(2, 4), "1.weight": torch.zeros(2, 2)})
    assert masks["0.weight"].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert masks["1.weight"].int().tolist() == [[1, 0], [0, 0]]
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    _, _, empty = wrapped(model, method="static", sparsities=(0.5,), include=("*",), allow_empty_layers=True)
    masks = empty.masks_by_score("s50", {"0.weight": torch.ones(2, 4), "1.weight": torch.zeros(2, 2)})
    assert masks["1.weight"].int().tolist() == [[0, 0], [0, 0]]


def test_weights_of_other_masks_go_before_all_others() -> None:
    ast = hand_worked()
    scores = {"0.weight": torch.arange(8.0).view(2, 4), "1.weight": torch.arange(4.0).view(2, 2)}
    first = {"0.weight": torch.zeros(2, 4, dtype=torch.bool), "1.weight": torch.ones(2, 2, dtype=torch.bool)}
    first["0.weight"][0] = True
    masks = ast.masks_by_score("s50", scores, within=first)
    # Of the eight that go first the six best: 3 2 1 and 3 2 1; ties 0 and 0 are left out.
    assert masks["0.weight"].int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert masks["1.weight"].int().tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    "options",
    [
        {"sparsities": (0.5, 0.8, 0.9)},
        {"sparsities": ("2:4", "1:4"), "pattern": "2:4"},
        {"sparsities": (0.5, 0.75), "pattern": "4x4"},
        {"sparsities": (0.5, 0.75), "pattern": "3x5"},
        {"sparsities": (0.25, 0.5), "pattern": "channel", "groups": conv_groups()},
    ],
    ids=["unstructured", "n:m", "blocks", "other blocks", "channels"],
)
def test_every_pattern_keeps_as_many_as_it_keeps_now(options: dict[str, object]) -> None:
    model, optimizer, ast = wrapped(method="gmp", **options)
    train(model, optimizer, range(20))  # in the middle of the ramp
    generator = torch.Generator().manual_seed(3)
    for name in ast.sub_nets:
        scores = {key: torch.rand(shape, generator=generator) for key, shape in ast.masks.shapes.items()}
        before = ast.masks.kept(name)
        masks = ast.masks_by_score(name, scores)
        kept = sum(int(mask.sum()) for mask in masks.values())
        if options.get("pattern") == "channel":
            units, now = ast.groups.kept(masks), ast.kept_channels(name)
            assert sum(int(f.sum()) for f in units.values()) == sum(int(f.sum()) for f in now.values())
            assert_same(masks, ast.groups.masks(units, ast.masks.shapes))
        else:
            # Blocks that are cut off at an edge differ in size.
            largest = {"4x4": 16, "3x5": 15}.get(str(options.get("pattern")), 0)
            assert abs(kept - before) <= largest / 2
        assert all(int(mask.sum()) > 0 for mask in masks.values())
        ast.masks.replace(name, masks)  # what the pattern refuses would show in the next update
    train(model, optimizer, range(20, 60))


def test_masks_of_a_sparser_channel_sub_net_lie_in_those_of_a_denser_one() -> None:
    _, _, ast = wrapped(method="static", sparsities=(0.25, 0.5), pattern="channel", groups=conv_groups())
    generator = torch.Generator().manual_seed(3)
    shapes = ast.masks.shapes
    dense, sparse = ({key: torch.rand(shape, generator=generator) for key, shape in shapes.items()} for _ in range(2))
    outer = ast.masks_by_score("s25", dense)
    inner = ast.masks_by_score("s50", sparse, within=outer)
    for name, mask in inner.items():
        assert not bool((mask & ~outer[name]).any())
    alone = ast.masks_by_score("s50", sparse)
    assert any(bool((mask & ~outer[name]).any()) for name, mask in alone.items())


def test_scores_that_do_not_fit_are_refused() -> None:
    ast = hand_worked()
    scores = {"0.weight": torch.rand(2, 4), "1.weight": torch.rand(2, 2)}
    with pytest.raises(ConfigError, match="there is no sub-net 's90'"):
        ast.masks_by_score("s90", scores)
    with pytest.raises(ConfigError, match=r"scores lacks '1\.weight'"):
        ast.masks_by_score("s50", {"0.weight": scores["0.weight"]})
    with pytest.raises(ConfigError, match=r"scores of '0\.weight' must be floating-point .*, got torch\.int64"):
        ast.masks_by_score("s50", {**scores, "0.weight": torch.ones(2, 4, dtype=torch.int64)})
    with pytest.raises(ConfigError, match=r"scores of '0\.weight' must be .*, got NaN among them"):
        ast.masks_by_score("s50", {**scores, "0.weight": torch.full((2, 4), float("nan"))})
    with pytest.raises(ConfigError, match=r"within\['0\.weight'\] must be bool"):
        ast.masks_by_score("s50", scores, within=scores)

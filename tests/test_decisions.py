"""A method that decides whole masks: what it is given, what is taken, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from networks import assert_same, mlp, sgd, snapshot, train, vector_batch
from torch import Tensor, nn

import ast_plugin
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.hookspecs import MethodRecord, hookimpl
from ast_plugin.methods import RIGL, MaskDecision, MaskInputs, Method
from ast_plugin.random_state import seeded_generator
from ast_plugin.schedules import cubic_sparsity

Decide = Callable[[MaskInputs], MaskDecision | Mapping[str, Tensor]]


def smallest_go(inputs: MaskInputs) -> dict[str, Tensor]:
    """Keep the largest magnitudes of each layer, as many as the distribution leaves it."""
    masks = {}
    for name, weight in inputs.weights.items():
        count = round((1 - inputs.layer_sparsities[name]) * weight.numel())
        kept = weight.abs().flatten().topk(count).indices
        masks[name] = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, kept, True).view_as(weight)
    return masks


def deciding(decide: Decide = smallest_go, **options: Any) -> Method:
    return Method(name="decided", description="for tests", decide=decide, distribution="uniform", **options)


def wrapped(method: Method, model: nn.Module | None = None, **options: Any) -> Any:
    model = mlp() if model is None else model
    settings = {"sparsities": (0.5, 0.75), "total_steps": 40, "update_interval": 4, **options}
    return ast_plugin.wrap(sgd(model), model, method=method, **settings)


def test_the_masks_of_every_sub_net_are_those_that_the_method_decides() -> None:
    ast = wrapped(deciding())
    weights = dict(ast.model.named_parameters())
    for name, sparsity in (("s50", 0.5), ("s75", 0.75)):
        for parameter, mask in ast.masks.of(name).items():
            size = weights[parameter].abs()
            assert int(mask.sum()) == round((1 - sparsity) * mask.numel())
            assert size[mask].min() >= size[~mask].max()


def test_it_is_asked_for_first_masks_and_at_each_update_with_all_that_it_may_look_at() -> None:
    seen: list[MaskInputs] = []

    def decide(inputs: MaskInputs) -> Mapping[str, Tensor]:
        seen.append(inputs)
        return smallest_go(inputs)

    ast = wrapped(deciding(decide, needs_gradient=True), end_step=20, drop_fraction=0.4)
    assert [(one.sub_net, one.step, one.sparsity, one.drop_fraction) for one in seen] == [
        ("s50", -1, 0.5, 0),
        ("s75", -1, 0.75, 0),
    ]
    assert all(one.masks is None and one.gradients is None for one in seen)
    before = {name: mask.clone() for name, mask in ast.masks.of("s50").items()}
    train(ast.model, ast.optimizer, range(1), vector_batch)
    update = seen[2]
    assert (update.sub_net, update.step, update.drop_fraction) == ("s50", 0, 0.4)
    assert update.gradients is not None
    assert update.masks is not None
    assert set(update.weights) == set(update.gradients) == set(update.layer_sparsities) == set(ast.masks.parameters)
    for name, gradient in update.gradients.items():
        assert gradient[~before[name]].any(), name  # dense
        assert torch.equal(update.masks[name], before[name])
    again = seeded_generator(0, "s50", 0, "decided")
    assert torch.equal(torch.rand(3, generator=update.generator), torch.rand(3, generator=again))


def test_without_need_of_gradients_none_are_kept() -> None:
    seen: list[MaskInputs] = []
    ast = wrapped(deciding(lambda inputs: (seen.append(inputs), smallest_go(inputs))[1]))
    train(ast.model, ast.optimizer, range(2), vector_batch)
    assert len(seen) == 3  # the first masks, and one update
    assert all(one.gradients is None for one in seen)


def test_layers_are_told_their_share_by_the_distribution() -> None:
    seen: dict[str, Mapping[str, float]] = {}
    wrapped(
        deciding(lambda inputs: (seen.update({inputs.sub_net: inputs.layer_sparsities}), smallest_go(inputs))[1]),
        distribution={"0.weight": 0.25, "2.weight": 0.75},
        sparsities=(0.5,),
    )
    assert seen["s50"] == pytest.approx({"0.weight": 0.25, "2.weight": 0.75, "4.weight": 0.25}, abs=0.02)


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_what_begins_anew_starts_at_zero_with_clean_optimizer_state(told: bool) -> None:
    def decide(inputs: MaskInputs) -> MaskDecision:
        masks = smallest_go(inputs)
        if inputs.step != 3:
            return MaskDecision(masks=masks)
        return MaskDecision(masks=masks, restarted={"0.weight": masks["0.weight"]} if told else None)

    method = deciding(decide, grow_initialization="zero", is_due=lambda step, last_step: step == 3)
    ast = wrapped(method, sparsities=(0.5,), total_steps=None)
    train(ast.model, ast.optimizer, range(3), vector_batch)
    kept = ast.masks.get("s50", "0.weight").clone()
    first = ast.model[0].weight
    seen: list[Tensor] = []
    # Inside the step, after the update and before the arithmetic.
    handle = ast.optimizer.register_step_pre_hook(lambda *_: seen.append(first.detach().clone()))
    train(ast.model, ast.optimizer, range(3, 4), vector_batch)
    handle.remove()
    now = ast.masks.get("s50", "0.weight")
    if told:
        assert not seen[0][now].any()
    else:
        assert seen[0][now & kept].all()
        assert not seen[0][now & ~kept].any()


def test_the_method_says_when_and_no_schedule_is_needed() -> None:
    steps: list[int] = []

    def decide(inputs: MaskInputs) -> Mapping[str, Tensor]:
        steps.append(inputs.step)
        return smallest_go(inputs)

    def is_due(step: int, last_step: int | None) -> bool:
        return any(count % 5 == 4 for count in range(0 if last_step is None else last_step + 1, step + 1))

    ast = wrapped(deciding(decide, is_due=is_due), total_steps=None)
    train(ast.model, ast.optimizer, range(16), vector_batch)
    # s50 trains at even steps, s75 at odd ones; each makes up for what fell due between two of its own.
    assert steps == [-1, -1, 4, 5, 9, 10, 14, 15]


def test_a_ramp_that_ends_between_steps_is_completed() -> None:
    method = deciding(initial_sparsity=0.0, sparsity_schedule=cubic_sparsity)
    ast = wrapped(method, total_steps=20, end_step=18, update_interval=9)
    assert ast.masks.sparsity("s75") == 0
    train(ast.model, ast.optimizer, range(20), vector_batch)
    assert ast.masks.sparsity("s50") == pytest.approx(0.5, abs=0.01)
    assert ast.masks.sparsity("s75") == pytest.approx(0.75, abs=0.01)


def test_what_it_leaves_to_the_scores_goes_by_them() -> None:
    def decide(inputs: MaskInputs) -> Mapping[str, Tensor] | None:
        return smallest_go(inputs) if inputs.sub_net == "s75" and inputs.step < 0 else None

    ast = wrapped(dataclasses.replace(RIGL, decide=decide))
    other = wrapped(RIGL)
    assert_same(ast.masks.of("s50"), other.masks.of("s50"))
    assert ast.masks.checksum("s75") != other.masks.checksum("s75")
    before = ast.masks.checksum("s75")
    train(ast.model, ast.optimizer, range(8), vector_batch)
    assert ast.masks.checksum("s75") != before
    assert ast.masks.sparsity("s75") == pytest.approx(0.75, abs=0.01)


def test_masks_may_be_ahead_of_the_ramp_and_not_beyond_its_end() -> None:
    ramp = {"initial_sparsity": 0.0, "sparsity_schedule": cubic_sparsity}
    ahead = wrapped(deciding(lambda inputs: at_share(inputs, 0.4), **ramp), sparsities=(0.5,))
    assert ahead.masks.sparsity("s50") == pytest.approx(0.4, abs=0.01)
    refused(
        deciding(lambda inputs: at_share(inputs, 0.6), **ramp), "sparsity of 0.5996, and 0 was asked", sparsities=(0.5,)
    )


def at_share(inputs: MaskInputs, sparsity: float) -> dict[str, Tensor]:
    return smallest_go(dataclasses.replace(inputs, layer_sparsities=dict.fromkeys(inputs.weights, sparsity)))


def test_a_pattern_is_held_against_the_masks() -> None:
    def two_of_four(inputs: MaskInputs) -> dict[str, Tensor]:
        groups = torch.tensor([True, False, False, True])
        return {name: groups.repeat(weight.numel() // 4).view_as(weight) for name, weight in inputs.weights.items()}

    ast = wrapped(deciding(two_of_four), sparsities=("2:4",))
    assert ast.masks.sparsity("2:4") == 0.5
    refused(deciding(smallest_go), r"not of its pattern '2:4' in '0\.weight'", sparsities=("2:4",))


def refused(method: Method, message: str, **options: Any) -> None:
    """Assert that wrap refuses what a method decides, on an untouched model."""
    model = mlp()
    before = snapshot(model)
    with pytest.raises(PluginError, match=message):
        wrapped(method, model, **options)
    assert_same(before, snapshot(model))
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: [*masks.values()], "must decide a mapping of parameter names to masks, got list"),
        (lambda masks: {name: masks[name] for name in ("0.weight", "4.weight")}, "its answer has none for '2.weight'"),
        (
            lambda masks: {**masks, "2.bias": torch.ones(16, dtype=torch.bool)},
            "names '2.bias', which is not pruned",
        ),
        (lambda masks: {**masks, "0.weight": masks["0.weight"].float()}, r"are torch\.float32 \(16, 12\)"),
        (lambda masks: {**masks, "0.weight": masks["0.weight"][0]}, r"are torch\.bool \(12,\).*shape \(16, 12\)"),
        (lambda masks: {**masks, "0.weight": None}, "are NoneType"),
        (
            lambda masks: {**masks, "4.weight": ~torch.ones_like(masks["4.weight"])},
            "keep nothing of '4.weight'; lower the sparsity",
        ),
        (
            lambda masks: {**masks, "0.weight": torch.ones_like(masks["0.weight"])},
            r"sparsity of 0\.3125, and 0\.5 was asked for",
        ),
    ],
)
def test_answers_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    refused(deciding(lambda inputs: change(smallest_go(inputs))), message)


def test_what_begins_anew_is_checked_like_masks() -> None:
    def decide(inputs: MaskInputs) -> MaskDecision:
        return MaskDecision(masks=smallest_go(inputs), restarted={"0.weight": inputs.weights["0.weight"]})

    refused(deciding(decide), r"decided restarted of '0\.weight' that are torch\.float32")


def test_an_error_in_the_middle_of_a_run_leaves_dense_weights() -> None:
    def decide(inputs: MaskInputs) -> Mapping[str, Tensor]:
        masks = smallest_go(inputs)
        return masks if inputs.step < 4 else {}

    ast = wrapped(deciding(decide))
    before = ast.masks.checksum()
    with pytest.raises(PluginError, match="has none for '0"):
        train(ast.model, ast.optimizer, range(8), vector_batch)
    assert ast.step == 4
    assert all(parameter.all() for name, parameter in ast.model.named_parameters() if name in ast.masks.parameters)
    assert ast.masks.checksum() != ""
    assert before


class TakingOver:
    """Gives a model a name, and takes it away again."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[str] = []

    def __call__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Callable[[], None]:
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert isinstance(model, nn.Sequential)
        self.calls.append("take over")
        return lambda: self.calls.append("undo")


def test_a_method_takes_over_the_bare_model_first_and_gives_it_back_if_wrap_fails() -> None:
    taking = TakingOver()
    ast = wrapped(deciding(take_over=taking), nn.DataParallel(mlp()))
    ast.detach()
    assert taking.calls == ["take over"]
    for options in ({"sparsities": (0.5, 0.9999)}, {"include": ("none",)}, {"total_steps": 2}):
        taking.calls.clear()
        with pytest.raises(ast_plugin.ASTError):
            wrapped(deciding(take_over=taking), **options)
        assert taking.calls == ["take over", "undo"]
    taking.calls.clear()
    with pytest.raises(ConfigError, match=r"unknown setting"):
        wrapped(deciding(take_over=taking), sparsity=0.5)
    assert taking.calls == []


def test_a_take_over_that_does_not_say_how_to_undo_it_is_refused() -> None:
    with pytest.raises(PluginError, match=r"take_over of method .* must return a function that undoes it, got None"):
        wrapped(deciding(take_over=lambda optimizer, model: None))


def fails(*_: Any) -> Any:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("options", "where"),
    [({"decide": fails}, "the decision"), ({"is_due": fails}, "the calendar")],
    ids=["masks", "when"],
)
def test_a_plugins_method_that_fails_is_named_with_the_place(options: dict[str, Any], where: str) -> None:
    class Failing:
        @hookimpl
        def ast_methods(self) -> list[MethodRecord]:
            return [MethodRecord.of(dataclasses.replace(deciding(), name="failing", **options))]

    def run() -> None:
        model = mlp()
        settings = {"sparsities": (0.5,), "total_steps": 40, "method": "failing", "plugins": [Failing()]}
        train(model, ast_plugin.wrap(sgd(model), model, **settings).optimizer, range(2), vector_batch)

    with pytest.raises(PluginError, match=f"plugin 'Failing' failed in {where} of method 'failing': ValueError"):
        run()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Counting(Method):
    """A method that is a plugin too, with a state."""

    count: list[int]

    @hookimpl
    def ast_step_finished(self, step: int) -> None:
        self.count[0] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count[0] = state["count"]


def test_a_method_with_hooks_takes_part_as_a_plugin_and_keeps_its_state_in_the_run() -> None:
    def counting() -> Counting:
        return Counting(name="counting", description="", decide=smallest_go, distribution="uniform", count=[0])

    method = counting()
    ast = wrapped(method)
    train(ast.model, ast.optimizer, range(3), vector_batch)
    assert method.count == [3]
    state = ast.optimizer.state_dict()
    assert state["ast_plugin"]["plugins"] == {"method": {"count": 3}}
    again = counting()
    resumed = wrapped(again)
    resumed.optimizer.load_state_dict(state)
    assert again.count == [3]

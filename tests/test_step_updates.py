"""When masks are updated beside the method's own calendar: rules of `add_mask_updates`, in every kind of loop."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from channel_networks import conv_groups
from networks import assert_same, conv_net, image_batch, sgd, snapshot, train, wrapped
from torch import nn
from torch.nn import functional

import ast_plugin
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.schedules import MaskCalendar, cosine_drop_fraction

STEPS = 36
CALENDAR = MaskCalendar(begin=0, end=24, interval=4, offset=0)
# The first and the last update are the calendar's own, all between them those of a rule.
SELDOM: dict[str, Any] = {"total_steps": STEPS, "end_step": 24, "stagger": False, "update_interval": 24}
OFTEN = {**SELDOM, "update_interval": 4}

Run = tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]
Loop = Callable[[nn.Module, torch.optim.Optimizer, range], None]


def as_the_calendar(sub_net: str, step: int, last_step: int | None) -> float | None:
    """Ask for what a calendar with an interval of four steps would bring."""
    if not CALENDAR.is_due(step, last_step):
        return None
    return cosine_drop_fraction(step, begin=0, end=24, initial=0.1, final=0.005)


def halves(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Accumulate the gradients of two micro-batches a step."""
    for step in steps:
        optimizer.zero_grad()
        images, labels = image_batch(step)
        for part, target in zip(images.chunk(2), labels.chunk(2), strict=True):
            (functional.cross_entropy(model(part), target) / 2).backward()
        optimizer.step()


def closures(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Give the optimizer a closure that computes the gradients."""
    for step in steps:
        images, labels = image_batch(step)

        def closure(images: Any = images, labels: Any = labels) -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def skipped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Have every other attempt at a step fail, as a gradient scaler does after an overflow."""
    for step in steps:
        for overflow in (1.0, 0.0):
            optimizer.zero_grad()
            images, labels = image_batch(step if not overflow else 1000 + step)
            functional.cross_entropy(model(images), labels).backward()
            if not overflow:
                optimizer.step()
            else:
                optimizer.found_inf = torch.tensor(overflow)
                optimizer.step = _passed_over(optimizer)
                optimizer.step()
                del optimizer.step, optimizer.found_inf


def _passed_over(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: None  # GradScaler does not call the optimizer's step after an overflow


def compare(first: Run, second: Run) -> None:
    assert_same(snapshot(first[0]), snapshot(second[0]))
    for name in first[2].sub_nets:
        assert_same(first[2].masks.of(name), second[2].masks.of(name))


@pytest.mark.parametrize("loop", [train, halves, closures, skipped])
@pytest.mark.parametrize("method", ["rigl", "granet", "set"])
def test_a_rule_that_asks_as_a_calendar_does_gives_the_same_run(loop: Loop, method: str) -> None:
    often = wrapped(method=method, **OFTEN)
    loop(*often[:2], range(STEPS))
    seldom = wrapped(method=method, **SELDOM)
    seldom[2].add_mask_updates(as_the_calendar)
    loop(*seldom[:2], range(STEPS))
    compare(often, seldom)
    updates = [point["step"] for point in seldom[2].history["sparsity"]]
    assert updates == [point["step"] for point in often[2].history["sparsity"]]
    assert len(updates) > 6  # more than the calendar's own


def test_so_it_does_with_channels_and_with_a_fixed_pattern() -> None:
    for options in (
        {"pattern": "channel", "groups": conv_groups(), "sparsities": (0.25, 0.5), "method": "rigl"},
        {"pattern": "2:4", "sparsities": ("2:4", "1:4"), "method": "rigl"},
    ):
        often = wrapped(**OFTEN, **options)
        train(*often[:2], range(STEPS))
        seldom = wrapped(**SELDOM, **options)
        seldom[2].add_mask_updates(as_the_calendar)
        train(*seldom[:2], range(STEPS))
        compare(often, seldom)


def test_so_it_does_where_the_run_is_resumed_just_before_an_update() -> None:
    often = wrapped(method="rigl", **OFTEN)
    train(*often[:2], range(STEPS))
    first = wrapped(method="rigl", **SELDOM)
    first[2].add_mask_updates(as_the_calendar)
    train(*first[:2], range(8))
    buffer = io.BytesIO()
    torch.save({"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    second = wrapped(method="rigl", **SELDOM)
    second[2].add_mask_updates(as_the_calendar)
    second[0].load_state_dict(state["model"])
    second[1].load_state_dict(state["optimizer"])
    train(*second[:2], range(8, STEPS))
    compare(often, second)


def test_an_update_after_the_end_of_the_calendar_replaces_the_share_that_was_asked_for() -> None:
    model, optimizer, ast = wrapped(method="set", sparsities=(0.5,), distribution="uniform", **SELDOM)
    ast.add_mask_updates(lambda sub_net, step, last_step: 0.4 if step == 30 else None)
    train(model, optimizer, range(30))
    before = ast.masks.of("s50")
    train(model, optimizer, range(30, 31))
    for name, mask in ast.masks.of("s50").items():
        kept = int(before[name].sum())
        assert int(mask.sum()) == kept
        # Others grow in place of those dropped, by chance, and some of the same.
        assert 0.1 * kept < int((before[name] & ~mask).sum()) <= int(0.4 * kept)


@pytest.mark.parametrize("shares", [(0.1, 0.6), (0.6, 0.1)])
def test_of_several_rules_the_largest_share_counts(shares: tuple[float, float]) -> None:
    runs = []
    for rules in (shares, (0.6,)):
        model, optimizer, ast = wrapped(method="rigl", **SELDOM)
        for share in rules:
            ast.add_mask_updates(lambda sub_net, step, last_step, share=share: share if step == 7 else None)
        train(model, optimizer, range(10))
        runs.append((model, optimizer, ast))
    compare(*runs)


def test_a_rule_is_asked_with_the_sub_net_the_step_and_when_that_was_trained_before() -> None:
    asked = []

    def rule(sub_net: str, step: int, last_step: int | None) -> None:
        asked.append((sub_net, step, last_step))

    model, optimizer, ast = wrapped(method="rigl")
    ast.add_mask_updates(rule)
    train(model, optimizer, range(5))
    # Each step is asked for beforehand, too: what is remembered of a gradient depends on the masks of the next.
    assert sorted(set(asked), key=lambda question: question[1]) == [
        *(("s50", 0, None), ("s80", 1, None), ("s90", 2, None), ("s50", 3, 0), ("s80", 4, 1), ("s90", 5, 2)),
    ]


def test_a_method_that_makes_no_updates_asks_no_rule() -> None:
    model, optimizer, ast = wrapped(method="static")
    ast.add_mask_updates(lambda *_: pytest.fail("asked"))
    train(model, optimizer, range(3))
    assert ast.step == 3


def test_what_is_no_rule_is_refused() -> None:
    _, _, ast = wrapped()
    with pytest.raises(ConfigError, match=r"rule must be a function of \(sub_net, step, last_step\), got 0\.5"):
        ast.add_mask_updates(0.5)


@pytest.mark.parametrize("answer", [1.0, -0.1, float("nan"), True, "0.5"])
def test_an_answer_that_is_no_share_names_the_rule_and_leaves_dense_weights(answer: Any) -> None:
    model, optimizer, ast = wrapped()
    ast.add_mask_updates(lambda *_: answer)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"the rule .*<lambda> of add_mask_updates\(\) must return a drop fraction"):
        train(model, optimizer, range(1))
    assert_same(before, snapshot(model))


def test_a_rule_that_fails_is_named_and_leaves_dense_weights() -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("no share")

    model = conv_net()
    optimizer = sgd(model)
    _, _, ast = wrapped(model, optimizer)
    before = snapshot(model)
    ast.add_mask_updates(broken)
    with pytest.raises(PluginError, match=r"the rule .*broken of add_mask_updates\(\) failed at step 0: ZeroDivision"):
        train(model, optimizer, range(1))
    assert_same(before, snapshot(model))

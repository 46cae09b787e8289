"""A run with sup-tickets that is interrupted, and goes on: bit for bit, and all or nothing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import OPTIMIZERS, assert_same, conv_net, image_batch, snapshot, train, train_step, wrapped
from test_resume import through_disk
from torch import nn

import ast_plugin
from ast_plugin.errors import StateError
from ast_plugin.integrations.family import SupTickets

pytestmark = pytest.mark.matrix

OPTIONS: dict[str, Any] = {"end_step": 0.4}


def start(
    kind: str = "sgd", seed: int = 0, tickets: SupTickets | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    model = conv_net(seed)
    tickets = SupTickets(3, share=0.5) if tickets is None else tickets
    return wrapped(model, OPTIMIZERS[kind](model), sup_tickets=tickets, **{**OPTIONS, **options})


def saved(stop: int, **options: Any) -> Any:
    model, optimizer, _ = start(**options)
    train(model, optimizer, range(stop))
    return through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def same_runs(one: ast_plugin.AlternatingSparseTraining, other: ast_plugin.AlternatingSparseTraining) -> None:
    assert_same(snapshot(one.model), snapshot(other.model))
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert one.versions == other.versions
    for version in one.versions:
        for name in one.sub_nets:
            with one.version(version), other.version(version):
                assert_same(one.materialize(name), other.materialize(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_statistics_that_were_estimated_anew_travel_and_leave_earlier_states_alone(dtype: torch.dtype) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, SupTickets, ast_plugin.AlternatingSparseTraining]:
        model, tickets = conv_net().to(dtype), SupTickets(3, share=0.5)
        shared: dict[str, Any] = {"private_normalization": False, "sparsities": (0.8,), "total_steps": 24, **OPTIONS}
        model, optimizer, ast = wrapped(model, sup_tickets=tickets, **shared)
        return model, optimizer, tickets, ast

    model, optimizer, tickets, ast = begin()
    for step in range(24):
        images, labels = image_batch(step)
        train_step(model, optimizer, (images.to(dtype), labels))
    early = optimizer.state_dict()["ast_plugin"]["plugins"]["sup_tickets"]
    copied = copy.deepcopy(early)
    tickets.recompute([image_batch(80)[0].to(dtype)])
    assert_same(early, copied)
    checkpoint = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer, _, other_ast = begin()
    other.load_state_dict(checkpoint["model"])
    other_optimizer.load_state_dict(checkpoint["optimizer"])
    same_runs(ast, other_ast)


CASES: dict[str, dict[str, Any]] = {
    "granet": {},
    "random": {"alternation": "random", "method": "set", "sparsities": (0.5, 0.8)},
    "one-freeze": {"sparsities": (0.8,), "inactive": "freeze", "method": "rigl"},
}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("stop", [30, 31, 45, 59])
def test_a_run_that_was_interrupted_anywhere_ends_as_the_uninterrupted_one(case: str, stop: int) -> None:
    kind = "adamw" if stop % 2 else "sgd"
    straight, optimizer, straight_ast = start(kind, **CASES[case])
    train(straight, optimizer, range(60))
    checkpoint = saved(stop, kind=kind, **CASES[case])
    second, second_optimizer, second_ast = start(kind, seed=9, **CASES[case])
    second_optimizer.param_groups[0]["lr"] = 0.0  # a warm-up that is long over
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    train(second, second_optimizer, range(stop, 60))
    same_runs(straight_ast, second_ast)


def test_batch_norm_that_was_estimated_from_data_travels(tmp_path: Path) -> None:
    tickets = SupTickets(3, share=0.5)
    model, optimizer, ast = start(tickets=tickets)
    train(model, optimizer, range(60))
    tickets.recompute([image_batch(200 + index) for index in range(4)])
    ast.save_checkpoint(tmp_path / "run.pt")
    again = SupTickets(3, share=0.5)
    other_ast = start(seed=4, tickets=again)[2]
    other_ast.load_checkpoint(tmp_path / "run.pt")
    same_runs(ast, other_ast)
    assert again.recomputed


def test_the_highest_rates_travel_so_that_the_cycles_are_those_of_the_whole_run() -> None:
    model, optimizer, _ = start()
    optimizer.param_groups[0]["lr"] = 0.3
    train(model, optimizer, range(20))
    optimizer.param_groups[0]["lr"] = 0.01
    checkpoint = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    tickets = SupTickets(3, share=0.5)
    second, second_optimizer, _ = start(seed=4, tickets=tickets)
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    train(second, second_optimizer, range(20, 30))
    assert tickets.rate == pytest.approx(0.003)


def test_a_damaged_or_foreign_state_changes_nothing() -> None:
    checkpoint = saved(45)
    _, optimizer, ast = start(seed=4)
    tickets = ast.state_dict()
    for damage in (
        lambda state: state.update(highest=[0.1, 0.1]),
        lambda state: state.update(tickets="two"),
        lambda state: state.pop("settings"),
        lambda state: state["weights"].pop("head.bias"),
        lambda state: state["kept"].pop("s80"),
        lambda state: state["private"]["s80"].pop("norm1.weight"),
    ):
        broken = through_disk(checkpoint)
        damage(broken["optimizer"]["ast_plugin"]["plugins"]["sup_tickets"])
        with pytest.raises(StateError, match="sup_tickets"):
            optimizer.load_state_dict(broken["optimizer"])
        assert_same(tickets, ast.state_dict())
    assert ast.step == 0


def test_a_run_that_goes_on_without_tickets_is_warned_about_and_one_that_begins_them_late_is_not() -> None:
    checkpoint = saved(20)
    model, optimizer, _ = wrapped(conv_net(4), **OPTIONS)
    with pytest.warns(UserWarning, match="sup_tickets"):
        optimizer.load_state_dict(checkpoint["optimizer"])
    train(model, optimizer, range(20, 24))
    late = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    second, second_optimizer, second_ast = start(seed=5)
    second.load_state_dict(late["model"])
    second_optimizer.load_state_dict(late["optimizer"])
    train(second, second_optimizer, range(24, 60))
    assert second_ast.versions == ("last", "superposed")


def test_other_settings_than_those_of_the_saved_run_are_warned_about() -> None:
    checkpoint = saved(45)
    _, optimizer, _ = start(seed=4, tickets=SupTickets(2, share=0.5))
    with pytest.warns(UserWarning, match=r"sup_tickets goes on with other settings.*'cycles': 2.*'cycles': 3"):
        optimizer.load_state_dict(checkpoint["optimizer"])


def test_a_run_that_is_made_longer_begins_its_tickets_anew() -> None:
    checkpoint = saved(60)
    tickets = SupTickets(3, share=0.5)
    model, optimizer, ast = start(seed=4, tickets=tickets, total_steps=120)
    with pytest.warns(UserWarning, match="total_steps=120"):
        optimizer.load_state_dict(checkpoint["optimizer"])
    model.load_state_dict(checkpoint["model"])
    assert ast.versions == ("last",)
    train(model, optimizer, range(60, 120))
    assert tickets.tickets == 3
    assert ast.versions == ("last", "superposed")


@pytest.mark.parametrize(("explore", "total_steps", "said"), [(0.3, 60, True), (0.0, 60, False), (0.3, 3600, False)])
def test_cycles_that_are_too_short_for_what_they_exchange_are_warned_about(
    explore: float, total_steps: int, said: bool
) -> None:
    model = conv_net()
    tickets = SupTickets(cycles=3, share=0.5, explore=explore)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ast_plugin.wrap(
            OPTIMIZERS["sgd"](model),
            model,
            sparsities=(0.8, 0.9),
            total_steps=total_steps,
            end_step=0.3,
            sup_tickets=tickets,
        )
    texts = [str(warning.message) for warning in caught]
    assert any("exchanges 30% of the weights" in text and "5 steps of its own" in text for text in texts) == said
    assert len(texts) == int(said)

"""What must hold in every run, each checked on real training steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import (
    OPTIMIZERS,
    adamw,
    assert_same,
    conv_net,
    image_batch,
    mlp,
    sgd,
    snapshot,
    train,
    train_step,
    vector_batch,
    wrapped,
)
from torch import nn

import ast_plugin

METHODS = ("static", "set", "rigl", "gmp", "granet")


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("method", METHODS)
def test_one_sub_net_without_zeros_is_bit_identical_to_the_bare_optimizer(kind: str, method: str) -> None:
    bare, tracked = conv_net(), conv_net()
    bare_optimizer, optimizer = OPTIMIZERS[kind](bare), OPTIMIZERS[kind](tracked)
    ast_plugin.wrap(optimizer, tracked, sparsities=(0.0,), total_steps=20, correction="off", method=method)
    train(bare, bare_optimizer, range(20))
    train(tracked, optimizer, range(20))
    assert_same(snapshot(bare), snapshot(tracked))
    extended = optimizer.state_dict()
    extended.pop("ast_plugin")
    assert_same(bare_optimizer.state_dict(), extended)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("inactive", ["coast", "freeze"])
def test_the_model_is_dense_after_every_step_and_sparsity_is_exact(kind: str, inactive: str) -> None:
    model = conv_net()
    _, optimizer, ast = wrapped(model, OPTIMIZERS[kind](model), inactive=inactive)
    for step in range(60):
        train_step(model, optimizer, image_batch(step))
        for name in ast.masks.parameters:
            assert model.get_parameter(name).count_nonzero() == ast.masks.total(name), (step, name)
    for name, sparsity in zip(ast.sub_nets, (0.5, 0.8, 0.9), strict=True):
        assert abs(ast.masks.kept(name) - (1 - sparsity) * ast.masks.total()) <= 1
        with ast.sub_net(name):
            nonzero = sum(int(model.get_parameter(p).count_nonzero()) for p in ast.masks.parameters)
        assert nonzero == ast.masks.kept(name)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_freeze_leaves_inactive_weights_and_their_state_bit_identical(kind: str) -> None:
    model = conv_net()
    _, optimizer, ast = wrapped(model, OPTIMIZERS[kind](model), inactive="freeze", method="static")
    train(model, optimizer, range(6))
    for step in range(6, 15):
        name = ast.active
        before = _weights_and_state(model, optimizer, ast)
        train_step(model, optimizer, image_batch(step))
        moved = 0
        for key, old in before.items():
            mask = ast.masks.get(name, key[0])
            new = _weights_and_state(model, optimizer, ast)[key]
            assert torch.equal(old[~mask], new[~mask]), key
            moved += int((old[mask] != new[mask]).sum())
        assert moved > 0


def test_coast_lets_momentum_move_inactive_weights() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(3))
    name = ast.active
    before = {p: model.get_parameter(p).detach().clone() for p in ast.masks.parameters}
    train_step(model, optimizer, image_batch(3))
    moved = sum(int((before[p] != model.get_parameter(p))[~ast.masks.get(name, p)].sum()) for p in ast.masks.parameters)
    assert moved > 0


def _weights_and_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ast: ast_plugin.AlternatingSparseTraining
) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for name in ast.masks.parameters:
        parameter = model.get_parameter(name)
        found[name, "weight"] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                found[name, key] = value.clone()
    assert len(found) > len(ast.masks.parameters)
    return found


def test_opposed_gradients_are_projected_to_zero_inner_product_within_the_mask() -> None:
    # One linear layer, loss = <w, c>: the gradient is c masked. The second sub-net's c is the first's negated, so
    # within the second mask the two gradients are exactly opposed and nothing of the second may remain.
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.25, 0.5), total_steps=40, method="static")
    seen: list[torch.Tensor] = []
    weight = model[0].weight
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    direction = torch.randn(8, 8)
    for sign in (1.0, -1.0):
        optimizer.zero_grad()
        (sign * (model(torch.eye(8)).T * direction).sum()).backward()
        optimizer.step()
    first, second = seen
    mask = ast.masks.get("s50", "0.weight")
    assert torch.equal(second[~mask], torch.zeros_like(second[~mask]))
    assert abs(float((second * first).sum())) < 1e-4 * float((first * first).sum())
    # Where the first sub-net had no weight, there was nothing to oppose: that part of the gradient is left.
    own = mask & ~ast.masks.get("s25", "0.weight")
    assert torch.equal(second[own], -direction[own])
    figures = ast.statistics()["sub_nets"]["s50"]
    assert (figures["checks"], figures["conflicts"]) == (1, 1)


def test_agreeing_gradients_are_left_untouched() -> None:
    results = []
    for correction in ("layer", "off"):
        model = mlp()
        optimizer = sgd(model)
        ast = ast_plugin.wrap(
            optimizer, model, sparsities=(0.25, 0.5), total_steps=40, method="static", correction=correction
        )
        train_step(model, optimizer, vector_batch(0))
        train_step(model, optimizer, vector_batch(0))  # the same batch again: the gradients agree
        results.append((snapshot(model), ast.statistics()["conflicts"]))
    assert results[0][1] == 0
    assert_same(results[0][0], results[1][0])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_corrections_fire_on_a_real_run_and_gradients_stay_in_the_mask(scope: str) -> None:
    model, optimizer, ast = wrapped(correction=scope)

    def inside(*_: Any) -> None:
        for name in ast.masks.parameters:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert not gradient[~ast.masks.get(ast.active, name)].any()

    optimizer.register_step_pre_hook(inside)
    train(model, optimizer, range(60))
    figures = ast.statistics()
    # Two of every three steps are checked, in three layers, or once over all of them.
    assert figures["checks"] == 40 * (3 if scope == "layer" else 1)
    assert 0 < figures["conflicts"] < figures["checks"]
    assert -1 <= figures["mean_cosine"] <= 1
    assert ast.statistics()["sub_nets"]["s50"]["checks"] == 0  # the group's first step is not corrected


def test_the_first_step_of_a_group_is_corrected_on_request() -> None:
    model, optimizer, ast = wrapped(correction=ast_plugin.CorrectionOptions(first_step=True))
    train(model, optimizer, range(30))
    assert ast.statistics()["sub_nets"]["s50"]["checks"] == 9 * 3  # all its ten steps but the run's first


@pytest.mark.parametrize("method", ["rigl", "granet"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_growth_finds_a_planted_weight_with_the_largest_dense_gradient(method: str, micro_batches: int) -> None:
    # The planted weight is tiny, so magnitude drops it, and its input is a hundred times larger than the others.
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1.0)
        model[0].weight[7, 3] = 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    ast = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=(0.5, 0.75),
        total_steps=40,
        method=method,
        begin_step=0,
        end_step=20,
        update_interval=10,
        drop_fraction=0.1,
        drop_schedule="constant",
        seed=4,
    )
    for name in ast.sub_nets:
        mask = ast.masks.get(name, "0.weight").clone()
        mask[7, 3] = False
        ast.masks.set(name, "0.weight", mask)
    inputs = torch.ones(4, 32)
    inputs[:, 3] = 100.0
    for _ in range(40):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            (model(inputs)[:, 7].sum() / micro_batches).backward()
        optimizer.step()
    for name in ast.sub_nets:
        assert ast.masks.get(name, "0.weight")[7, 3], name


def test_regrown_weights_start_at_zero_unless_another_sub_net_keeps_them() -> None:
    model = mlp()
    _, optimizer, ast = wrapped(model, adamw(model), method="rigl", sparsities=(0.5, 0.9), grow_initialization="zero")
    at_update: dict[str, Any] = {}

    class Watch:
        @ast_plugin.hookimpl
        def ast_masks_updated(self, training: Any, sub_net: str, step: int) -> None:
            at_update["masks"] = {p: training.masks.get(sub_net, p).clone() for p in training.masks.parameters}
            at_update["weights"] = {p: model.get_parameter(p).detach().clone() for p in training.masks.parameters}
            at_update["state"] = {
                p: optimizer.state[model.get_parameter(p)]["exp_avg"].clone() for p in training.masks.parameters
            }

    ast.detach()
    ast = ast_plugin.wrap(
        optimizer,
        model,
        sparsities=(0.5, 0.9),
        total_steps=60,
        update_interval=6,
        begin_step=3,
        method="rigl",
        grow_initialization="zero",
        plugins=[Watch()],
    )
    zeroed = kept = 0
    for step in range(40):
        at_update.clear()
        name = ast.active
        other = next(n for n in ast.sub_nets if n != name)
        before = {p: ast.masks.get(name, p).clone() for p in ast.masks.parameters}
        train_step(model, optimizer, vector_batch(step))
        for parameter, masks in at_update.get("masks", {}).items():
            grown = masks & ~before[parameter]
            free = grown & ~ast.masks.get(other, parameter)
            assert not at_update["weights"][parameter][free].any()
            assert not at_update["state"][parameter][free].any()
            zeroed += int(free.sum())
            kept += int(at_update["weights"][parameter][grown & ~free].count_nonzero())
    assert zeroed > 0
    assert kept > 0


def test_every_alternation_trains_whom_it_says() -> None:
    expected = {
        "alternating": ["s50", "s80", "s90"] * 4,
        "fixed:s80": ["s80"] * 12,
        "single_path": ["s50"] * 4 + ["s80"] * 4 + ["s90"] * 4,
    }
    for alternation, order in expected.items():
        model, optimizer, ast = wrapped(alternation=alternation, steps_per_epoch=4, total_steps=60)
        seen = []
        for step in range(12):
            seen.append(ast.active)
            train_step(model, optimizer, image_batch(step))
        assert seen == order
    model, optimizer, ast = wrapped(alternation="random", seed=3)
    train(model, optimizer, range(60))
    steps = {name: figures["steps"] for name, figures in ast.statistics()["sub_nets"].items()}
    assert sum(steps.values()) == 60
    assert min(steps.values()) > 5


def test_sub_nets_never_trained_after_the_ramp_still_reach_their_target() -> None:
    model, optimizer, ast = wrapped(alternation="fixed:s50")
    train(model, optimizer, range(60))
    for name, sparsity in zip(ast.sub_nets, (0.5, 0.8, 0.9), strict=True):
        assert abs(ast.masks.kept(name) - (1 - sparsity) * ast.masks.total()) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"sparsities": (0.5, 0.9, "2:4")},
        {"pattern": "4x4", "sparsities": (0.5, 0.8)},
        {"distribution": "erk", "method": "set"},
        {"distribution": "uniform"},
        {"distribution": {"head.weight": 0.25}, "method": "rigl"},
    ],
    ids=str,
)
def test_patterns_and_distributions_train_and_end_exact(options: dict[str, Any]) -> None:
    model, optimizer, ast = wrapped(**options)
    train(model, optimizer, range(60))
    for spec in ast.config.sub_nets:
        largest_unit = 16 if spec.pattern == "4x4" else 1
        assert abs(ast.masks.kept(spec.name) - (1 - spec.sparsity) * ast.masks.total()) <= largest_unit
    if "2:4" in ast.sub_nets:
        groups = ast.masks.get("2:4", "conv2.weight").permute(0, 2, 3, 1).reshape(-1, 4)
        assert torch.equal(groups.sum(dim=1), torch.full((groups.shape[0],), 2))
    if "head.weight" in options.get("distribution", ()):
        assert all(abs(ast.masks.sparsity(name, "head.weight") - 0.25) < 0.01 for name in ast.sub_nets)

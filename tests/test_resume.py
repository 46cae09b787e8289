"""N steps = k steps, save, a new process, resume, N - k steps: bit for bit, in the raw loop."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import OPTIMIZERS, assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, wrapped

import ast_plugin

CASES: dict[str, dict[str, Any]] = {
    "granet": {},
    "rigl-zero": {"method": "rigl"},
    "set-random": {"method": "set", "alternation": "random"},
    "gmp-freeze": {"method": "gmp", "inactive": "freeze"},
    "static-global": {"method": "static", "correction": "global"},
    "mixed": {"sparsities": (0.5, 0.9, "2:4"), "correction": ast_plugin.CorrectionOptions(first_step=True)},
    "shared-norm": {"private_normalization": False},
}


def through_disk(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("stop", [7, 31])
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, case: str, stop: int) -> None:
    straight = conv_net()
    _, straight_optimizer, straight_ast = wrapped(straight, OPTIMIZERS[kind](straight), **CASES[case])
    train(straight, straight_optimizer, range(60))

    first = conv_net()
    _, first_optimizer, _ = wrapped(first, OPTIMIZERS[kind](first), **CASES[case])
    train(first, first_optimizer, range(stop))
    checkpoint = through_disk({"model": first.state_dict(), "optimizer": first_optimizer.state_dict()})

    second = conv_net(seed=99)
    _, second_optimizer, second_ast = wrapped(second, OPTIMIZERS[kind](second), **CASES[case])
    second.load_state_dict(checkpoint["model"])
    second_optimizer.load_state_dict(checkpoint["optimizer"])
    assert second_ast.step == stop
    train(second, second_optimizer, range(stop, 60))

    assert_same(snapshot(straight), snapshot(second))
    assert_same(straight_optimizer.state_dict(), second_optimizer.state_dict())
    for name in straight_ast.sub_nets:
        assert_same(straight_ast.masks.of(name), second_ast.masks.of(name))
        assert_same(straight_ast.private_state(name), second_ast.private_state(name))


@pytest.mark.slow
def test_resume_in_a_new_process_is_bit_identical(tmp_path: Path) -> None:
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from networks import train, wrapped
torch.set_num_threads(1)
model, optimizer, ast = wrapped()
state = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
train(model, optimizer, range(25, 60))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, sys.argv[3])
"""
    straight, straight_optimizer, _ = wrapped()
    train(straight, straight_optimizer, range(60))
    half, half_optimizer, _ = wrapped()
    train(half, half_optimizer, range(25))
    torch.save({"model": half.state_dict(), "optimizer": half_optimizer.state_dict()}, tmp_path / "half.pt")
    files = [str(Path(__file__).parent), str(tmp_path / "half.pt"), str(tmp_path / "resumed.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert_same(resumed, {"model": straight.state_dict(), "optimizer": straight_optimizer.state_dict()})


def test_state_kept_elsewhere_resumes_as_well() -> None:
    straight, straight_optimizer, _ = wrapped()
    train(straight, straight_optimizer, range(40))
    first, first_optimizer, first_ast = wrapped()
    train(first, first_optimizer, range(20))
    kept = through_disk(first_ast.state_dict())
    plain_optimizer_state = first_optimizer.state_dict()
    del plain_optimizer_state["ast_plugin"]

    second, second_optimizer, second_ast = wrapped(conv_net(seed=9))
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(plain_optimizer_state)
    assert second_ast.step == 0
    second_ast.load_state_dict(kept)
    train(second, second_optimizer, range(20, 40))
    assert_same(snapshot(straight), snapshot(second))


def test_loading_does_not_change_the_callers_state_dict() -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    keys = set(state)
    optimizer.load_state_dict(state)
    assert set(state) == keys
    assert "ast_plugin" in state


def test_a_checkpoint_loads_into_a_plain_optimizer() -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(3))
    plain = conv_net()
    plain_optimizer = sgd(plain)
    plain.load_state_dict(model.state_dict())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    assert "ast_plugin" not in plain_optimizer.state_dict()
    before = snapshot(plain)
    train(plain, plain_optimizer, range(3, 5))
    moved = [name for name, parameter in plain.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == [name for name, _ in plain.named_parameters()]


def test_a_plain_checkpoint_starts_a_run() -> None:
    plain = conv_net()
    plain_optimizer = sgd(plain)
    train(plain, plain_optimizer, range(3))
    model, optimizer, ast = wrapped()
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(plain_optimizer.state_dict())
    assert ast.step == 0
    train(model, optimizer, range(3))
    assert ast.step == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (0.5, 0.9)}, r"saved state has the sub-nets s50, s80, s90, this run has s50, s90; resume with"),
        ({"exclude": ("head.*",)}, r"head.weight: saved \(5, 16\), here not prunable"),
        ({"default_sub_net": "s90"}, r"default sub-net 's50', this run has 's90'; pass default_sub_net='s50'"),
        ({"private_normalization": False}, r"private BatchNorm tensors \(15 saved, 0 here\)"),
    ],
    ids=str,
)
def test_a_state_of_another_run_is_refused_with_the_difference(options: dict[str, Any], message: str) -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    other, other_optimizer, other_ast = wrapped(**options)
    train(other, other_optimizer, range(1))
    before = snapshot(other)
    with pytest.raises(ast_plugin.StateError, match=message):
        other_optimizer.load_state_dict(state)
    assert other_ast.step == 1
    assert_same(before, snapshot(other))


def test_a_state_of_another_model_or_format_is_refused() -> None:
    _, _, ast = wrapped()
    state = ast.state_dict()
    model = mlp()
    other = ast_plugin.wrap(sgd(model), model, sparsities=(0.5, 0.8, 0.9), total_steps=60)
    with pytest.raises(ast_plugin.StateError, match="other prunable parameters"):
        other.load_state_dict(state)
    with pytest.raises(ast_plugin.StateError, match="format 3, this version reads 2"):
        ast.load_state_dict({**state, "format": 3})


@pytest.mark.parametrize(
    ("state", "got"),
    [
        ({"foo": 1}, "got dict with 'foo'; pass that"),
        ({}, "got dict; pass"),
        ([1, 2], "got list; pass that"),
        (3, "got int; pass that"),
    ],
    ids=repr,
)
def test_what_is_no_state_is_refused_with_what_is_wanted(state: Any, got: str) -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(2))
    before = snapshot(model)
    with pytest.raises(ast_plugin.StateError, match=r"must be what state_dict\(\) of the") as caught:
        ast.load_state_dict(state)
    assert got in str(caught.value)
    assert "what the optimizer's state dict has under 'ast_plugin'" in str(caught.value)
    with pytest.raises(ast_plugin.StateError, match=r"must be what state_dict\(\) of the controller returned"):
        optimizer.load_state_dict({**optimizer.state_dict(), "ast_plugin": state})
    assert ast.step == 2
    assert_same(before, snapshot(model))


def test_a_whole_optimizer_state_is_no_state_of_the_controller() -> None:
    _, optimizer, ast = wrapped()
    with pytest.raises(ast_plugin.StateError, match=r"got dict with 'state', 'param_groups', 'ast_plugin'; pass"):
        ast.load_state_dict(optimizer.state_dict())


def test_a_damaged_state_changes_nothing() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(20))
    good = through_disk(optimizer.state_dict()["ast_plugin"])
    masks = {name: {p: m.clone() for p, m in ast.masks.of(name).items()} for name in ast.sub_nets}

    def damaged(change: Callable[[Any], Any]) -> Any:
        state = copy.deepcopy(good)
        change(state)
        for packed in state.get("masks", {}).get("s50", {}).values():
            packed.bitwise_not_()  # what a half-done restore would leave behind
        return state

    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda s: s["masks"]["s90"].pop("conv1.weight"), "conv1.weight"),
        (lambda s: s.pop("normalization"), "damaged or none of this package.*normalization"),
        (lambda s: s.pop("statistics"), "damaged or none of this package.*statistics"),
        (lambda s: s["reference"]["gradients"].update(nope=torch.ones(2)), "reference gradient 'nope'"),
        (
            lambda s: s["normalization"]["tensors"]["s90"].update({"norm0.weight": torch.ones(3)}),
            r"private BatchNorm tensor 'norm0.weight' of shape \(3,\), this run has \(8,\)",
        ),
        (lambda s: s["normalization"]["tensors"].pop("s80"), "tensors of s90, and needs them of s80, s90"),
        (lambda s: s["normalization"]["optimizer"].pop("s80"), "it is damaged, load another checkpoint"),
        (lambda s: s["normalization"]["tensors"]["s80"].pop("norm0.bias"), r"\(14 saved, 15 here\)"),
        (lambda s: s["normalization"]["optimizer"]["s80"].update(nope={}), "optimizer state of 'nope'"),
        (lambda s: s["reference"].update(sub_net="s99"), "reference gradient of 's99', which is no sub-net"),
    ]
    for change, message in cases:
        with pytest.raises(ast_plugin.StateError, match=message):
            ast.load_state_dict(damaged(change))
        assert ast.step == 20
        for name in ast.sub_nets:
            assert_same(masks[name], ast.masks.of(name))
    fixed = ast.state_dict()
    for rest in (fixed["rest"][:-100], b"", 3):
        with pytest.raises(ast_plugin.StateError, match="the saved state is damaged"):
            ast.load_state_dict({**fixed, "rest": rest})
    with pytest.raises(ast_plugin.StateError, match="damaged or none of this package"):
        ast.load_state_dict({"format": 2})


def test_an_optimizer_state_that_torch_refuses_does_not_move_the_run() -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(9))
    state = optimizer.state_dict()
    other = conv_net()
    groups = [{"params": [p]} for p in other.parameters()]
    other_optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    _, _, other_ast = wrapped(other, other_optimizer)
    with pytest.raises(ValueError, match="param"):
        other_optimizer.load_state_dict(state)
    assert other_ast.step == 0


def test_going_on_with_other_settings_is_pointed_out() -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(9))
    other, other_optimizer, other_ast = wrapped(total_steps=90, inactive="freeze")
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"total_steps=90 \(saved: 60\), inactive='freeze' \(saved: 'coast'\)"):
        other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_ast.step == 9


@pytest.mark.parametrize("total", [24, 25, 33])
def test_a_run_that_is_cut_short_reaches_its_sparsities_all_the_same(total: int) -> None:
    model, optimizer, _ = wrapped()  # the masks reach their targets at step 30 of 60
    train(model, optimizer, range(24))
    other, other_optimizer, ast = wrapped(total_steps=total)
    other.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=f"total_steps={total}"):
        other_optimizer.load_state_dict(optimizer.state_dict())
    sparsest = ast.sub_nets[-1]
    target = ast.config.sub_nets[-1].sparsity
    assert ast.masks.sparsity(sparsest) < target - 0.002
    train(other, other_optimizer, range(24, total))
    ast.finish()
    assert ast.step == total
    for spec in ast.config.sub_nets:
        assert abs(ast.masks.sparsity(spec.name) - spec.sparsity) * ast.masks.total() < 1


def test_a_run_that_is_broken_off_on_its_way_keeps_the_sparsities_that_it_has() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(26))  # an update of s80 is due, and the last one comes at step 30
    before = {name: ast.masks.sparsity(name) for name in ast.sub_nets}
    ast.finish()
    assert {name: ast.masks.sparsity(name) for name in ast.sub_nets} == before
    assert before["s80"] < 0.8 - 0.001


def test_a_warning_made_an_error_changes_nothing() -> None:
    model, optimizer, _ = wrapped()
    train(model, optimizer, range(9))
    other, other_optimizer, other_ast = wrapped(total_steps=90)
    before = snapshot(other), through_disk(other_optimizer.state_dict())
    with pytest.raises(UserWarning, match="other settings"):
        other_optimizer.load_state_dict(optimizer.state_dict())
    assert other_ast.step == 0
    assert_same(before[0], snapshot(other))
    assert_same(before[1], through_disk(other_optimizer.state_dict()))


def test_the_state_is_a_copy_that_later_training_does_not_change() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(10))
    state = ast.state_dict()
    kept = through_disk(state)
    train(model, optimizer, range(10, 20))
    assert_same(kept, through_disk(state))


def test_a_batch_of_images_is_a_pure_function_of_the_step() -> None:
    for one, other in zip(image_batch(3), image_batch(3), strict=True):
        assert torch.equal(one, other)

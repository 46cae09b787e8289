"""A run of rigl-torch goes on under `ast_plugin.wrap` with the masks, the momentum and the schedule that it had."""

from __future__ import annotations

import copy
import dataclasses
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import adamw, assert_same, conv_net, image_batch, sgd, snapshot, train
from rigl_torch.RigL import RigLScheduler
from test_docs import ROOT, blocks_of, run_blocks
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.attachment import is_attached
from ast_plugin.errors import ConfigError, MissingExtraError, SelectionError, StateError, WrapError
from ast_plugin.integrations.frameworks import take_over
from ast_plugin.sub_nets import SubNetSpec

pytestmark = pytest.mark.extra("frameworks")

DELTA, END = 10, 60
MASKED = ("conv1.weight", "conv2.weight", "head.weight")


def begun(
    calls: int,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    before: Callable[[torch.optim.Optimizer], Any] = lambda _: None,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, RigLScheduler]:
    """Return a model, its optimizer and the scheduler after so many calls, all of them a function of the arguments."""
    model = conv_net()
    made = optimizer(model)
    before(made)
    torch.manual_seed(1)
    settings = {"dense_allocation": 0.3, "T_end": END, "delta": DELTA, "alpha": 0.3, "ignore_linear_layers": False}
    scheduler = RigLScheduler(model, made, **{**settings, **options})
    run(model, made, scheduler, range(calls))
    return model, made, scheduler


def run(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    """Train as rigl-torch's page says: the optimizer steps where the scheduler has not changed masks."""
    model.train()
    for step in steps:
        images, labels = image_batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        if scheduler():
            optimizer.step()


def masks_of(scheduler: RigLScheduler) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in scheduler.model.named_parameters()}
    pairs = zip(scheduler.W, scheduler.backward_masks, strict=True)
    return {names[id(weight)]: mask.clone() for weight, mask in pairs if mask is not None}


def same(ours: Any, theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[name], mask) for name, mask in theirs.items())


@pytest.mark.parametrize("calls", [0, 4, 9, 10, 23])
@pytest.mark.parametrize("ignore_linear_layers", [False, True])
def test_the_next_mask_update_is_the_one_that_rigl_torch_would_make(calls: int, ignore_linear_layers: bool) -> None:
    options = {"ignore_linear_layers": ignore_linear_layers}
    next_update = (calls // DELTA + 1) * DELTA
    theirs, their_optimizer, their_scheduler = begun(calls, **options)
    model, optimizer, scheduler = begun(calls, **options)
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    (name,) = ast.sub_nets
    present = masks_of(their_scheduler)
    assert set(present) == set(MASKED[: 2 if ignore_linear_layers else 3])
    assert same(ast.masks.of(name), present)

    train(model, optimizer, range(calls, next_update - 1))
    run(theirs, their_optimizer, their_scheduler, range(calls, next_update - 1))
    assert_same(snapshot(model), snapshot(theirs))  # the same weights, bit by bit, until the update
    assert same(ast.masks.of(name), present)
    train(model, optimizer, range(next_update - 1, next_update))
    run(theirs, their_optimizer, their_scheduler, range(next_update - 1, next_update))
    assert same(ast.masks.of(name), masks_of(their_scheduler))
    assert not same(present, masks_of(their_scheduler))
    if next_update == DELTA:
        # their optimizer does not step at that call, ours does: with the momentum of the weights that stay
        stays = {n: masks_of(their_scheduler)[n] & mask for n, mask in present.items()}
        assert any(not torch.equal(model.get_parameter(n)[m], theirs.get_parameter(n)[m]) for n, m in stays.items())


def test_updates_come_at_the_multiples_of_delta_until_the_end_and_grow_from_zero() -> None:
    model, optimizer, scheduler = begun(14)
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    before, counts, zeros = dict(ast.masks.of("s70")), [], []
    for step in range(14, 80):
        train(model, optimizer, range(step, step + 1))
        present = dict(ast.masks.of("s70"))
        if not same(before, present):
            counts.append(step + 1)
            grown = {name: mask & ~before[name] for name, mask in present.items()}
            buffers = {n: optimizer.state[model.get_parameter(n)]["momentum_buffer"] for n in present}
            # one step from zero, with a fresh momentum buffer and weight decay of nothing: minus rate times gradient
            zeros += [torch.allclose(model.get_parameter(n)[m], -0.1 * buffers[n][m]) for n, m in grown.items()]
        assert [int(mask.sum()) for mask in present.values()] == [int(mask.sum()) for mask in before.values()]
        before = present
    assert counts == [20, 30, 40, 50]
    assert all(zeros)


def test_rigl_torch_leaves_model_and_optimizer_and_a_call_that_stays_in_the_loop_does_nothing() -> None:
    model, optimizer, scheduler = begun(14)
    buffer = optimizer.state[model.get_parameter("conv1.weight")]["momentum_buffer"]
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    assert optimizer.state[model.get_parameter("conv1.weight")]["momentum_buffer"] is buffer
    assert "step" not in vars(optimizer)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any(hasattr(parameter, "_has_rigl_backward_hook") for parameter in model.parameters())

    other, other_optimizer, other_scheduler = begun(14)
    other_ast = ast_plugin.wrap(other_optimizer, other, **take_over(other_scheduler))
    train(model, optimizer, range(14, 32))
    run(other, other_optimizer, other_scheduler, range(14, 32))
    assert_same(snapshot(model), snapshot(other))
    assert same(ast.masks.of("s70"), other_ast.masks.of("s70"))


def test_a_learning_rate_scheduler_made_before_keeps_working() -> None:
    made: list[Any] = []
    model, optimizer, scheduler = begun(
        3, before=lambda optimizer: made.append(torch.optim.lr_scheduler.StepLR(optimizer, 2))
    )
    ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    train(model, optimizer, range(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it sees no optimizer step before its own
        made[0].step()
        made[0].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_after_a_wrap_that_fails_rigl_torch_goes_on_as_if_nothing_had_been() -> None:
    theirs, _, their_scheduler = begun(25)
    model, optimizer, scheduler = begun(14)
    settings = take_over(scheduler)
    with pytest.raises(ConfigError, match="no_such"):
        ast_plugin.wrap(optimizer, model, **settings, distribution="no_such")
    with pytest.raises(SelectionError, match="include and exclude have no use"):
        ast_plugin.wrap(optimizer, model, **settings, exclude=("head.*",))
    assert not is_attached(model)
    run(model, optimizer, scheduler, range(14, 25))
    assert_same(snapshot(model), snapshot(theirs))
    assert same(masks_of(scheduler), masks_of(their_scheduler))


def test_sparser_sub_nets_alternate_with_the_one_that_was_taken_over() -> None:
    model, optimizer, scheduler = begun(14)
    present = masks_of(scheduler)
    settings = take_over(scheduler, sparser=(0.9, SubNetSpec(name="least", sparsity=0.95)))
    ast = ast_plugin.wrap(optimizer, model, **settings, total_steps=60)
    assert ast.sub_nets == ("s70", "s90", "least")
    assert ast.default_sub_net == "s70"
    assert same(ast.masks.of("s70"), present)
    for name, mask in ast.masks.of("s90").items():  # the largest weights, as many of each layer
        weight = model.get_parameter(name).detach().abs()
        assert float(weight[mask].min()) >= float(weight[~mask].max())
        assert 1 - float(mask.float().mean()) == pytest.approx(0.9, abs=0.01)
        assert not (mask & ~present[name]).any()
    changes: dict[str, list[int]] = {name: [] for name in ast.sub_nets}
    for step in range(14, 74):
        before = {name: dict(ast.masks.of(name)) for name in ast.sub_nets}
        train(model, optimizer, range(step, step + 1))
        for name in ast.sub_nets:
            if not same(before[name], dict(ast.masks.of(name))):
                changes[name].append(step + 1)
    # calls 15, 18, ... train s70, 16, 19, ... s90 and 17, 20, ... the last one: each at its first after a multiple
    assert changes == {"s70": [21, 30, 42, 51], "s90": [22, 31, 40, 52], "least": [20, 32, 41, 50]}
    assert [round(ast.masks.sparsity(name), 2) for name in ast.sub_nets] == [0.7, 0.9, 0.95]


def test_a_saved_state_is_taken_over_as_the_scheduler_itself() -> None:
    model, optimizer, scheduler = begun(14)
    file = io.BytesIO()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rigl": scheduler.state_dict()}
    torch.save(saved, file)
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    train(model, optimizer, range(14, 33))

    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = conv_net()
    other = sgd(again)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    resumed = ast_plugin.wrap(other, again, **take_over(loaded["rigl"], model=again))
    train(again, other, range(14, 33))
    assert_same(snapshot(again), snapshot(model))
    assert same(resumed.masks.of("s70"), ast.masks.of("s70"))


def test_a_continued_run_resumes_bit_by_bit_and_only_where_it_went_on_from() -> None:
    model, optimizer, scheduler = begun(14)
    rigl = copy.deepcopy(scheduler.state_dict())
    ast_plugin.wrap(optimizer, model, **take_over(scheduler, sparser=(0.9,)), total_steps=60)
    train(model, optimizer, range(14, 33))
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(33, 60))

    again = conv_net(seed=3)
    other = sgd(again)
    ast_plugin.wrap(other, again, **take_over(rigl, model=again, sparser=(0.9,)), total_steps=60)
    again.load_state_dict(state["model"])
    other.load_state_dict(copy.deepcopy(state["optimizer"]))
    train(again, other, range(33, 60))
    assert_same(snapshot(again), snapshot(model))

    third = conv_net()
    wrong = sgd(third)
    ast_plugin.wrap(wrong, third, **take_over({**rigl, "step": 15}, model=third, sparser=(0.9,)), total_steps=60)
    with pytest.raises(StateError, match="went on from rigl-torch with count=14, and this one has 15"):
        wrong.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("options", [{"static_topo": True}, {"T_end": 12}])
def test_masks_that_are_not_to_change_any_more_stay(options: dict[str, Any]) -> None:
    model, optimizer, scheduler = begun(14, **options)
    present = masks_of(scheduler)
    settings = take_over(scheduler)
    assert not settings["method"].updates
    ast = ast_plugin.wrap(optimizer, model, **settings)
    train(model, optimizer, range(14, 36))
    assert same(ast.masks.of("s70"), present)


def test_an_update_that_a_plugin_asks_for_replaces_as_much_as_it_says() -> None:
    model, optimizer, scheduler = begun(14)
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    ast.add_mask_updates(lambda sub_net, step, last_step: 0.6 if step in (2, 50) else None)
    for step in range(14, 66):
        before = dict(ast.masks.of("s70"))
        train(model, optimizer, range(step, step + 1))
        changed = {n: (mask & ~before[n]).sum() / mask.sum() for n, mask in ast.masks.of("s70").items()}
        if step - 14 in (2, 50):  # the latter after T_end
            assert all(0.1 < float(share) <= 0.6 for share in changed.values())
        elif (step + 1) % DELTA or step + 1 >= END:
            assert not any(changed.values())


def test_adam_keeps_its_state_and_starts_grown_weights_afresh() -> None:
    model, optimizer, scheduler = begun(14, optimizer=adamw)
    moments = {name: optimizer.state[model.get_parameter(name)]["exp_avg"].clone() for name in MASKED}
    ast = ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    for name in MASKED:
        assert torch.equal(optimizer.state[model.get_parameter(name)]["exp_avg"], moments[name])
    before = dict(ast.masks.of("s70"))
    train(model, optimizer, range(14, 20))
    grown = ast.masks.of("s70")["conv2.weight"] & ~before["conv2.weight"]
    assert grown.any()
    state = optimizer.state[model.get_parameter("conv2.weight")]
    assert torch.allclose(state["exp_avg_sq"][grown] * 10, state["exp_avg"][grown] ** 2, rtol=1e-3)  # of one step


def test_layers_that_are_never_pruned_here_stay_whole_with_a_warning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4))
    scheduler = RigLScheduler(model, sgd(model), dense_allocation=0.5, T_end=40, delta=5, ignore_linear_layers=False)
    assert "1.weight" in masks_of(scheduler)
    with pytest.warns(UserWarning, match=r"also has masks of 1\.weight \(bias or norm \(1-D\)\); they stay whole"):
        settings = take_over(scheduler)
    ast = ast_plugin.wrap(scheduler.optimizer, model, **settings)
    assert set(ast.masks.parameters) == {"2.weight", "3.weight"}


def test_what_is_no_run_of_rigl_torch_is_refused() -> None:
    model, _, scheduler = begun(2)
    state = scheduler.state_dict()
    with pytest.raises(ConfigError, match=r"must be a RigLScheduler of rigl-torch, .* got object"):
        take_over(object())
    with pytest.raises(ConfigError, match="without 'backward_masks', and so no state of a RigLScheduler"):
        take_over({"S": [], "N": [], "step": 1}, model=model)
    with pytest.raises(ConfigError, match="without 'delta_T', and so no state of a RigLScheduler"):
        take_over({**state, "hyperparams": {}}, model=model)
    with pytest.raises(ConfigError, match="masks without names; pass model="):
        take_over(state)
    with pytest.raises(ConfigError, match="model is for a saved state alone"):
        take_over(scheduler, model=model)
    with pytest.raises(ConfigError, match="no mask at all: dense_allocation=1"):
        take_over(begun(0, dense_allocation=1)[2])
    with pytest.raises(ConfigError, match="T_end=None"):
        take_over(begun(0, T_end=None)[2])
    for sparser in ((0.5,), (1.0,), ("0.9",)):
        with pytest.raises(ConfigError, match=r"sparser must hold fractions of zeros above .* 0\.699661, and below 1"):
            take_over(scheduler, sparser=sparser)
    with pytest.raises(ConfigError, match=r"sparser must be a sequence .* got 0\.9"):
        take_over(scheduler, sparser=0.9)


def test_masks_that_do_not_fit_the_model_are_refused() -> None:
    state = begun(2)[2].state_dict()
    narrow = conv_net()
    narrow.conv2 = nn.Conv2d(16, 12, 3)
    with pytest.raises(
        StateError, match=r"mask of 'conv2\.weight' has shape \(16, 16, 3, 3\), and the weight \(12, 16"
    ):
        take_over(state, model=narrow)
    with pytest.raises(StateError, match="has masks of 4 layers, and finds 1 in this Linear"):
        take_over(state, model=nn.Linear(3, 3))
    model, _, scheduler = begun(2)
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach())
    with pytest.raises(StateError, match=r"masks a weight of shape .* that is no parameter of ConvNet"):
        take_over(scheduler)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    tied[2].weight = tied[1].weight
    state = {**state, "S": [0, 0.5, 0.5], "backward_masks": [None, *[torch.ones(6, 6) > 0] * 2]}
    with pytest.raises(StateError, match=r"two masks of '1\.weight', which several layers share"):
        take_over(state, model=tied)


def test_a_scheduler_that_cannot_be_taken_off_is_refused_and_the_model_stays() -> None:
    model, optimizer, scheduler = begun(4)
    settings = take_over(scheduler)
    other, other_optimizer, _ = begun(4)
    with pytest.raises(ConfigError, match="registered on another model"):
        ast_plugin.wrap(other_optimizer, other, **settings)
    with pytest.raises(ConfigError, match="steps another optimizer"):
        ast_plugin.wrap(sgd(model), model, **settings)
    with pytest.raises(ConfigError, match="at work on this model; give take_over that scheduler itself"):
        ast_plugin.wrap(optimizer, model, **take_over(scheduler.state_dict(), model=model))
    with pytest.raises(ConfigError, match=r"sub-net 's50' is the densest .* give wrap the sparsities that take_over"):
        ast_plugin.wrap(optimizer, model, method=settings["method"], sparsities=(0.5,))
    run(model, optimizer, scheduler, range(4, 5))
    with pytest.raises(ConfigError, match="went on from call 4 to 5 since"):
        ast_plugin.wrap(optimizer, model, **settings)
    inner = optimizer.step
    optimizer.step = lambda: inner()  # type: ignore[method-assign]
    with pytest.raises(WrapError, match=r"optimizer\.step was replaced once more"):
        ast_plugin.wrap(optimizer, model, **take_over(scheduler))
    optimizer.step = inner  # type: ignore[method-assign]
    ast_plugin.wrap(optimizer, model, **take_over(scheduler)).detach()
    with pytest.raises(WrapError, match="has lost its hooks"):
        ast_plugin.wrap(optimizer, model, **take_over(scheduler))


def test_another_version_and_a_missing_package_are_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, scheduler = begun(2)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "0.6.0" if name == "rigl-torch" else "1")
        with pytest.raises(
            MissingExtraError, match=r"rigl-torch 0\.6\.0 is installed, .* --no-deps rigl-torch==0\.5\.2"
        ):
            take_over(scheduler)
    with monkeypatch.context() as patch:
        patch.delattr(scheduler, "backward_hook_objects")
        with pytest.raises(MissingExtraError, match="has no 'backward_hook_objects'"):
            take_over(scheduler)
    state = scheduler.state_dict()
    monkeypatch.setitem(sys.modules, "rigl_torch", None)
    monkeypatch.setitem(sys.modules, "rigl_torch.util", None)
    with pytest.raises(
        MissingExtraError, match=r"that cannot be imported \(.*\); install it with: pip install --no-deps rigl-torch"
    ):
        take_over(state, model=model)


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (b for b in blocks_of((ROOT / "docs" / "torch_pruning.md").read_text(), "python") if b.reason)
    made = run_blocks([dataclasses.replace(block, reason=None)], "docs/torch_pruning.md")
    assert made["ast"].sub_nets == ("s70", "s90")
    assert "rigl-torch has no mask of it" in capsys.readouterr().out

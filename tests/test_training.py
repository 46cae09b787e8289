"""The controller: the order of events in a step, choosing sub-nets, and what happens when something breaks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import (
    assert_same,
    conv_net,
    image_batch,
    mlp,
    nonzero,
    sgd,
    snapshot,
    train,
    train_step,
    vector_batch,
    wrapped,
)
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.correction import Correction
from ast_plugin.hookspecs import AlternationRecord
from ast_plugin.training_exchange import with_plain_entries


def test_the_sub_net_is_on_during_forward_and_backward_and_off_afterwards() -> None:
    model, optimizer, ast = wrapped(method="static")
    seen: list[tuple[str, int]] = []
    model.head.register_forward_hook(lambda *_: seen.append(("forward", nonzero(model, ast))))
    model.conv1.register_full_backward_hook(lambda *_: seen.append(("backward", nonzero(model, ast))))
    for step in range(3):
        name = ast.active
        loss = functional.cross_entropy(model(image_batch(step)[0]), image_batch(step)[1])
        loss.backward()
        assert seen == [("forward", ast.masks.kept(name)), ("backward", ast.masks.kept(name))]
        assert nonzero(model, ast) == ast.masks.total()
        optimizer.step()
        optimizer.zero_grad()
        seen.clear()


@pytest.mark.parametrize("given", ["the network", "what is around it"])
def test_the_network_inside_a_wrapper_evaluates_by_itself_as_the_default(given: str) -> None:
    model = conv_net()
    optimizer, around = sgd(model), nn.DataParallel(model)
    options: dict[str, Any] = {"sparsities": (0.5, 0.8), "method": "static"}
    if given == "the network":
        ast = ast_plugin.wrap(optimizer, model, outermost=around, **options)
    else:
        ast = ast_plugin.wrap(optimizer, around, **options)
    train_step(around, optimizer, image_batch(0))
    plain = conv_net()
    plain.load_state_dict(ast.materialize("s50"))
    images, _ = image_batch(1)
    model.eval()  # and not what is around it, as a loop does that evaluates the network alone
    with torch.no_grad():
        assert torch.equal(model(images), plain.eval()(images))
        assert torch.equal(around(images), plain(images))
    assert nonzero(model, ast) == ast.masks.total()
    model.train()
    train_step(around, optimizer, image_batch(1))
    assert ast.step == 2


def test_the_chosen_sub_net_is_that_of_the_innermost_block() -> None:
    _, _, ast = wrapped(method="static")
    assert ast.chosen is None
    with ast.sub_net("s50"):
        with ast.sub_net("s90"):
            assert ast.chosen == "s90"
        assert ast.chosen == "s50"
    assert ast.chosen is None


def test_a_state_that_is_kept_elsewhere_is_not_in_the_optimizers() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(3))
    carried = optimizer.state_dict()
    ast.keep_state_elsewhere()
    state = optimizer.state_dict()
    assert set(carried) - set(state) == {"ast_plugin"}
    train(model, optimizer, range(3, 4))
    optimizer.load_state_dict(carried)  # one that carries it is still taken
    assert ast.step == 3


def test_a_sub_net_is_near_its_target_when_its_ramp_is_over() -> None:
    model, optimizer, ast = wrapped(sparsities=(0.0, 0.9), total_steps=20)
    assert ast.is_near_target("s0")
    assert not ast.is_near_target("s90")
    train(model, optimizer, range(20))
    assert ast.is_near_target("s90")
    with pytest.raises(ast_plugin.ConfigError, match="no sub-net"):
        ast.is_near_target("s95")


def test_an_n_of_m_sub_net_whose_groups_do_not_all_fit_is_at_its_target(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))  # 3 of every 5 are kept, so 40 % are zeros
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=("2:4",), total_steps=8, update_interval=2)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    assert ast.masks.sparsity("2:4") == pytest.approx(0.4)
    assert ast.is_near_target("2:4")
    ast.save(tmp_path / "elastic.safetensors")  # and does not warn


def test_the_target_is_reached_when_every_trained_sub_net_has_made_its_last_update() -> None:
    model, optimizer, ast = wrapped(sparsities=(0.5, 0.9), total_steps=20)
    reached = []
    for step in range(20):
        reached.append(ast.at_target)
        train(model, optimizer, range(step, step + 1))
    assert reached == [step > 11 for step in range(20)]  # steps 10 and 11 are the first at the end of the schedule
    for name, sparsity in (("s50", 0.5), ("s90", 0.9)):
        assert abs(ast.masks.sparsity(name) - sparsity) * ast.masks.total() < 1
    assert wrapped(method="rigl")[2].at_target  # as sparse from the beginning
    model, optimizer, ast = wrapped(sparsities=(0.5, 0.9), total_steps=20, alternation="fixed:s90")
    train(model, optimizer, range(11))
    assert ast.at_target  # the other is never trained


def test_training_that_is_refused_raises_in_the_forward_pass_and_leaves_evaluation_alone() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(2))
    before = snapshot(model)
    ast.refuse_training("not now")
    with pytest.raises(ast_plugin.ActivationError, match="not now"):
        model(image_batch(2)[0])
    assert_same(snapshot(model), before)
    model.eval()
    model(image_batch(2)[0])
    model.train()
    ast.refuse_training(None)
    train(model, optimizer, range(2, 3))
    assert ast.step == 3


def test_training_that_is_refused_raises_where_a_loop_calls_the_network_alone() -> None:
    model = conv_net()
    around = nn.Sequential(model, nn.LogSoftmax(dim=1))
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, outermost=around, sparsities=(0.5, 0.9), method="static")
    ast.refuse_training("not now")
    for module in (model, around):
        with pytest.raises(ast_plugin.ActivationError, match="not now"):
            module(image_batch(0)[0])
    with ast.sub_net("s90"):
        model(image_batch(0)[0])  # to look at it
    for module in (model.eval(), around.eval()):
        module(image_batch(0)[0])
    model.train()
    ast.refuse_training(None)
    around(image_batch(0)[0]).sum().backward()
    optimizer.step()
    assert ast.step == 1


def test_gradients_are_those_of_the_masked_network() -> None:
    model, _, ast = wrapped(method="static", sparsities=(0.5,))
    plain = conv_net()
    plain.load_state_dict(ast.materialize("s50"))
    images, labels = image_batch(0)
    for net in (model, plain):
        net.train()
        functional.cross_entropy(net(images), labels).backward()
    for name, parameter in plain.named_parameters():
        gradient = parameter.grad
        if name in ast.masks.parameters:
            gradient = gradient * ast.masks.get("s50", name)
        assert torch.equal(gradient, model.get_parameter(name).grad), name


def test_micro_batches_see_one_sub_net_and_add_up() -> None:
    whole, halves = conv_net(), conv_net()
    for model, parts in ((whole, 1), (halves, 2)):
        model.norm0, model.norm1, model.norm2 = nn.Identity(), nn.Identity(), nn.Identity()
        optimizer = sgd(model)
        ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), total_steps=60, update_interval=4)
        for step in range(12):
            optimizer.zero_grad()
            images, labels = image_batch(step)
            for part_images, part_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
                (functional.cross_entropy(model(part_images), part_labels) / parts).backward()
            optimizer.step()
        assert ast.step == 12
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_clipping_sees_the_active_sub_nets_gradient_only() -> None:
    model, _, ast = wrapped(method="static", sparsities=(0.9, 0.95))
    functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()
    squares = 0.0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name in ast.masks.parameters:
            gradient = gradient * ast.masks.get("s90", name)
        squares += float(gradient.double().square().sum())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_evaluation_without_a_choice_uses_the_default_sub_net() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(60))
    images = image_batch(100)[0]
    model.eval()
    dense = snapshot(model)
    with torch.no_grad():
        output = model(images)
    assert_same(dense, snapshot(model))
    with ast.sub_net("s50"), torch.no_grad():
        assert torch.equal(model(images), output)
    with ast.sub_net("s90"), torch.no_grad():
        assert not torch.equal(model(images), output)
    assert ast.default_sub_net == "s50"


def test_the_default_sub_net_is_the_densest_unless_set() -> None:
    assert wrapped(sparsities=(0.9, 0.5, 0.8))[2].default_sub_net == "s50"
    assert wrapped(default_sub_net="s90")[2].default_sub_net == "s90"


def test_sub_net_blocks_nest_and_restore_also_after_an_exception() -> None:
    model, _, ast = wrapped(method="static")
    dense = snapshot(model)
    with ast.sub_net("s80") as inside:
        assert inside is model
        assert ast.active == "s80"
        with ast.sub_net("s90"):
            assert nonzero(model, ast) == ast.masks.kept("s90")
        assert nonzero(model, ast) == ast.masks.kept("s80")
        with pytest.raises(KeyError), ast.sub_net("s50"):
            raise KeyError("inside")
        assert nonzero(model, ast) == ast.masks.kept("s80")
    assert_same(dense, snapshot(model))
    with pytest.raises(ast_plugin.ConfigError, match=r"no sub-net 's91'.*did you mean 's90'"), ast.sub_net("s91"):
        pass


def test_two_sub_nets_within_one_autocast_block_do_not_mix() -> None:
    model, _, ast = wrapped(method="static")
    images = image_batch(0)[0]
    model.eval()

    def evaluate(name: str) -> Tensor:
        with ast.sub_net(name):
            return model(images)

    with torch.no_grad():
        apart = []
        for name in ("s50", "s90"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                apart.append(evaluate(name))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            together = [evaluate("s50"), evaluate("s90")]
    assert torch.equal(apart[0], together[0])
    assert torch.equal(apart[1], together[1])
    assert not torch.equal(*together)


def test_evaluation_under_inference_mode_first_leaves_the_model_trainable() -> None:
    model, optimizer, ast = wrapped()
    model.eval()
    with torch.inference_mode():
        model(image_batch(0)[0])
        with ast.sub_net("s90"):
            model(image_batch(0)[0])
    train(model, optimizer, range(6))
    assert ast.step == 6


def test_what_is_saved_inside_a_sub_net_block_is_the_whole_run(tmp_path: Any) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(9))
    ast.save(tmp_path / "outside.safetensors")
    outside = optimizer.state_dict()["ast_plugin"]
    with ast.sub_net("s90"):
        ast.save(tmp_path / "inside.safetensors")
        assert_same(outside, with_plain_entries(ast.state_dict()))
        assert_same(outside, optimizer.state_dict()["ast_plugin"])
        assert nonzero(model, ast) == ast.masks.kept("s90")
        # The model's own state dict is what the user chose to look at.
        assert int(model.state_dict()["conv1.weight"].count_nonzero()) == ast.masks.kept("s90", "conv1.weight")
    assert (tmp_path / "inside.safetensors").read_bytes() == (tmp_path / "outside.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["model", "optimizer", "controller"])
def test_loading_inside_a_sub_net_block_is_refused(what: str) -> None:
    model, optimizer, ast = wrapped(method="static")
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "controller": ast.state_dict()}
    loads = {"model": model.load_state_dict, "optimizer": optimizer.load_state_dict, "controller": ast.load_state_dict}
    with ast.sub_net("s90"), pytest.raises(ast_plugin.ActivationError, match="leave the block first"):
        loads[what](states[what])


def test_a_model_converted_after_wrapping_trains_on() -> None:
    model, _, ast = wrapped(method="static", private_normalization=False)
    train_step(model, ast.optimizer, image_batch(0))
    model.double()
    for parameter, state in ast.optimizer.state.items():
        state["momentum_buffer"] = state["momentum_buffer"].to(parameter.dtype)
    images, labels = image_batch(1)
    train_step(model, ast.optimizer, (images.double(), labels))
    assert ast.step == 2
    assert nonzero(model, ast) == ast.masks.total()


def test_a_backward_inside_a_sub_net_block_masks_gradients_and_leaves_the_dense_weights_alone() -> None:
    model, optimizer, ast = wrapped(method="static")
    before = snapshot(model)
    loss = functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1])
    model.norm0.eval(), model.norm1.eval(), model.norm2.eval()
    with ast.sub_net(ast.active):
        loss.backward()
    for name in ast.masks.parameters:
        assert torch.equal(model.get_parameter(name), before[name])
        assert not model.get_parameter(name).grad[~ast.masks.get("s50", name)].any()
    optimizer.step()
    assert ast.step == 1


def test_stepping_inside_a_sub_net_block_is_refused() -> None:
    model, optimizer, ast = wrapped()
    with ast.sub_net("s90"):
        functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()
        with pytest.raises(ast_plugin.ActivationError, match=r"inside `with sub_net\('s90'\)`; leave the block"):
            optimizer.step()
    assert ast.step == 0


def test_gradients_without_a_training_forward_are_refused() -> None:
    model, optimizer, ast = wrapped()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    with pytest.raises(ast_plugin.ActivationError, match="forward did not run in training mode"):
        optimizer.step()
    assert_same(before, snapshot(model))
    optimizer.zero_grad()
    optimizer.step()
    assert ast.step == 0


def test_a_step_with_zero_gradients_before_any_forward_counts_for_nothing() -> None:
    model, optimizer, ast = wrapped()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert ast.step == 0


def test_a_step_skipped_by_a_gradient_scaler_runs_the_same_sub_net_again() -> None:
    model, optimizer, ast = wrapped(begin_step=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train_names = []
    for step in range(9):
        train_names.append(ast.active)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(image_batch(step)[0]), image_batch(step)[1])
        if step in (2, 3):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert train_names == ["s50", "s80", "s90", "s90", "s90", "s50", "s80", "s90", "s50"]
    assert ast.step == 7
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_fused_step_that_found_an_overflow_counts_for_nothing() -> None:
    model = conv_net()
    _, optimizer, ast = wrapped(model, sgd(model, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(image_batch(step)[0]), image_batch(step)[1])
        scaler.scale(loss * float("inf") if step == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert ast.step == 5
    assert ast.statistics()["sub_nets"]["s90"]["steps"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_a_closure_trains_as_the_plain_loop_does(kind: str) -> None:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return sgd(model) if kind == "sgd" else torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    model = mlp()
    optimizer = build(model)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), total_steps=60, update_interval=6)
    losses = []
    for step in range(30):
        inputs, labels = vector_batch(0 if kind == "lbfgs" else step, size=64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)  # noqa: B023  # called within this turn
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        assert nonzero(model, ast) == ast.masks.total()
    assert ast.step == 30
    assert min(losses[-6:]) < 0.9 * losses[0]
    if kind == "sgd":
        plain = mlp()
        plain_optimizer = build(plain)
        ast_plugin.wrap(plain_optimizer, plain, sparsities=(0.5, 0.8), total_steps=60, update_interval=6)
        for step in range(30):
            train_step(plain, plain_optimizer, vector_batch(step, size=64))
        assert_same(snapshot(model), snapshot(plain))


def test_private_batch_norm_is_the_sub_nets_own_with_its_optimizer_state() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(9))
    states = {name: ast.private_state(name) for name in ast.sub_nets}
    assert set(states["s50"]) == {
        f"norm{i}.{key}"
        for i in range(3)
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    for name in ast.sub_nets:
        assert int(states[name]["norm0.num_batches_tracked"]) == 3
    assert not torch.equal(states["s50"]["norm1.weight"], states["s90"]["norm1.weight"])
    # Training s80 leaves the others' state alone, and at rest the model carries the default's.
    while ast.active != "s80":
        train_step(model, optimizer, image_batch(ast.step))
    before = {name: ast.private_state(name) for name in ("s50", "s90")}
    momentum = optimizer.state[model.norm1.weight]["momentum_buffer"].clone()
    train_step(model, optimizer, image_batch(ast.step))
    for name in ("s50", "s90"):
        assert_same(before[name], ast.private_state(name))
    assert_same(before["s50"], {k: v for k, v in model.state_dict().items() if k in before["s50"]})
    assert torch.equal(momentum, optimizer.state[model.norm1.weight]["momentum_buffer"])


def test_shared_normalization_on_request() -> None:
    model, optimizer, ast = wrapped(private_normalization=False)
    train(model, optimizer, range(6))
    assert ast.private_state("s90") == {}
    assert int(model.norm0.num_batches_tracked) == 6
    with pytest.raises(ast_plugin.ConfigError, match="share one set of BatchNorm statistics"):
        ast.recalibrate([image_batch(0)])
    ast.recalibrate([image_batch(0)], sub_nets=["s90"])


def test_recalibrate_estimates_each_sub_nets_statistics_from_data() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(9))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = [image_batch(step) for step in range(4)]
    model.train()
    ast.recalibrate(loader)
    assert model.training
    assert_same(weights, {name: parameter.detach() for name, parameter in model.named_parameters()})
    stem = torch.cat([model.stem(images) for images, _ in loader])
    for name in ast.sub_nets:
        # The stem is dense, so every sub-net sees the same mean over equally sized batches there ...
        torch.testing.assert_close(ast.private_state(name)["norm0.running_mean"], stem.mean(dim=(0, 2, 3)))
    # ... and its own further in.
    assert not torch.allclose(
        ast.private_state("s50")["norm1.running_mean"], ast.private_state("s90")["norm1.running_mean"]
    )
    with pytest.raises(ast_plugin.ConfigError, match="loader gave no batch"):
        ast.recalibrate([])
    with pytest.raises(ast_plugin.ConfigError, match="a generator is used up after one"):
        ast.recalibrate(batch for batch in loader)


def test_statistics_are_a_plain_mapping_and_metrics_are_kept() -> None:
    model, optimizer, ast = wrapped()
    assert ast.statistics()["mean_cosine"] is None
    train(model, optimizer, range(60))
    figures = ast.statistics()
    assert figures["steps"] == 60
    assert {k: v["steps"] for k, v in figures["sub_nets"].items()} == {"s50": 20, "s80": 20, "s90": 20}
    assert figures["checks"] == sum(v["checks"] for v in figures["sub_nets"].values())
    assert figures["sub_nets"]["s90"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    history = ast.history
    last = {point["sub_net"]: point for point in history["sparsity"]}
    assert {k: round(v["achieved"], 2) for k, v in last.items()} == {"s50": 0.5, "s80": 0.8, "s90": 0.9}
    assert sum(point["checks"] for point in history["conflicts"]) <= figures["checks"]
    assert history["conflicts"]
    ast.add_report_metric("accuracy", 0.5, sub_net="s90")
    assert ast.metrics["s90"] == {"accuracy": 0.5}
    with pytest.raises(ast_plugin.ConfigError, match="no sub-net 's99'"):
        ast.add_report_metric("accuracy", 0.5, sub_net="s99")
    with pytest.raises(ast_plugin.ConfigError, match="value of metric 'accuracy' must be a number, got 'high'"):
        ast.add_report_metric("accuracy", "high", sub_net="s90")  # type: ignore[arg-type]  # a careless caller


def test_describe_lists_every_parameter_before_any_training() -> None:
    model, _, ast = wrapped()
    table = ast.describe()
    rows = {row.parameter: row for row in table.rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["stem.weight"].reason == "input stem"
    assert not rows["norm0.weight"].prunable
    assert rows["conv1.weight"].sparsity == {"s50": 0.0, "s80": 0.0, "s90": 0.0}
    text = str(table)
    assert "conv2.weight" in text
    assert "16x16x3x3" in text
    assert "no: input stem" in text
    assert table.total_weights == sum(p.numel() for p in model.parameters())
    assert table.to_dict()["prunable_weights"] == ast.masks.total()


def test_detach_leaves_an_ordinary_dense_model() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(6))
    functional.cross_entropy(model(image_batch(6)[0]), image_batch(6)[1])  # a forward whose backward never comes
    assert ast.detach() is model
    assert not ast.attached
    assert nonzero(model, ast) == ast.masks.total()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._state_dict_pre_hooks
    assert not model._load_state_dict_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert "ast_plugin" not in optimizer.state_dict()
    ast.detach()


def test_after_detaching_sub_nets_can_be_looked_at_and_saved_until_the_model_belongs_to_another_run(
    tmp_path: Any,
) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(6))
    images, _ = image_batch(0)

    def outputs() -> dict[str, Any]:
        found = {}
        model.eval()
        for name in ast.sub_nets:
            with ast.sub_net(name), torch.no_grad():
                found[name] = model(images)
        return found

    before, weights = outputs(), snapshot(model)
    ast.detach()
    assert_same(before, outputs())
    assert_same(weights, snapshot(model))
    ast.save(tmp_path / "after.safetensors")
    elastic = ast_plugin.load(tmp_path / "after.safetensors", conv_net().eval())
    for name in ast.sub_nets:
        with torch.no_grad():
            elastic.switch(name)
            torch.testing.assert_close(elastic.model(images), before[name])
    _, _, other = wrapped(model, sgd(model), method="static")
    for call in (
        lambda: ast.sub_net("s90").__enter__(),
        lambda: ast.save(tmp_path / "x"),
        lambda: ast.materialize("s90"),
    ):
        with pytest.raises(ast_plugin.ActivationError, match="wrapped anew"):
            call()
    with other.sub_net("s90"):
        assert nonzero(model, other) < other.masks.total()


def test_state_dicts_are_dense_even_between_forward_and_backward() -> None:
    model, _optimizer, ast = wrapped(method="static")
    before = snapshot(model)
    model.norm0.eval(), model.norm1.eval(), model.norm2.eval()
    model(image_batch(0)[0])
    state = model.state_dict()
    for name in ast.masks.parameters:
        assert torch.equal(state[name], before[name])
    assert nonzero(model, ast) == ast.masks.total()


def test_loading_weights_while_a_sub_net_is_on_keeps_what_was_loaded() -> None:
    model, optimizer, ast = wrapped(method="static")
    model(image_batch(0)[0])
    other = conv_net(seed=5).state_dict()
    model.load_state_dict(other)
    assert_same(dict(other), dict(model.state_dict()))
    train(model, optimizer, range(3))
    assert ast.step == 3


def test_parameters_replaced_by_assignment_are_trained_as_before() -> None:
    model, _, ast = wrapped(method="static")
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]).backward()
    for name in ast.masks.parameters:
        assert not model.get_parameter(name).grad[~ast.masks.get("s50", name)].any()


def test_a_copy_between_forward_and_backward_is_dense_too() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(image_batch(0)[0])
    twin = copy.deepcopy(model)
    assert_same(before, {name: p.detach() for name, p in twin.named_parameters()})
    assert nonzero(model, ast) == ast.masks.total()


class Staged(nn.Module):
    """A `conv_net` inside a container, as networks have their stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = conv_net()

    def forward(self, images: Tensor) -> Tensor:
        return self.stage(images)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_part_of_the_model_is_dense_too_between_forward_and_backward(how: str) -> None:
    model, optimizer, ast = wrapped(Staged())
    train(model, optimizer, range(4))
    images, labels = image_batch(4)
    before = snapshot(model.stage)
    model.apply(lambda module: setattr(module, "momentum", 0.0) if isinstance(module, nn.BatchNorm2d) else None)
    loss = functional.cross_entropy(model(images), labels)
    if how == "state_dict":
        seen = {name: tensor.clone() for name, tensor in model.stage.state_dict().items()}
    else:
        twin = copy.deepcopy(model.stage) if how == "deepcopy" else pickle.loads(pickle.dumps(model.stage))
        seen = snapshot(twin)
    assert {n: t for n, t in seen.items() if "batches" not in n}.keys() >= set(dict(model.stage.named_parameters()))
    for name, tensor in before.items():
        assert torch.equal(seen[name], tensor), name
    loss.backward()  # goes through the sub-net that its forward had on
    optimizer.step()
    assert ast.step == 5


def test_loading_into_a_part_while_a_sub_net_is_on_keeps_what_was_loaded() -> None:
    model, _, ast = wrapped(Staged(), method="static")
    held = model(image_batch(0)[0])
    other = conv_net(seed=5).conv1.state_dict()
    model.stage.conv1.load_state_dict(other)
    assert_same(dict(other), dict(model.stage.conv1.state_dict()))
    assert held.requires_grad
    with ast.sub_net("s90"), pytest.raises(ast_plugin.ActivationError, match="leave the block first"):
        model.stage.conv1.load_state_dict(other)


@pytest.mark.parametrize("into", ["model", "part"])
def test_a_plain_checkpoint_loaded_before_the_first_step_is_where_every_sub_net_starts(into: str) -> None:
    trained = conv_net(seed=3)
    train(trained, sgd(trained), range(4))
    model, _, ast = wrapped(Staged())
    if into == "model":
        model.load_state_dict({f"stage.{name}": tensor for name, tensor in trained.state_dict().items()})
    else:
        model.stage.load_state_dict(trained.state_dict())
    state = model.state_dict()
    for sub_net in ast.sub_nets:
        assert_same(ast.private_state(sub_net), {name: state[name] for name in ast.private_state(sub_net)})
        assert torch.equal(ast.private_state(sub_net)["stage.norm1.running_var"], trained.norm1.running_var)


def test_weights_loaded_later_or_beside_the_state_of_a_run_leave_the_sub_nets_their_own_batch_norm() -> None:
    other = conv_net(seed=3).state_dict()
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(3))
    before = {name: ast.private_state(name) for name in ast.sub_nets[1:]}
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(other)
    assert_same(before, {name: ast.private_state(name) for name in ast.sub_nets[1:]})
    model, optimizer, ast = wrapped()
    optimizer.load_state_dict(checkpoint[1])
    model.load_state_dict(checkpoint[0])
    assert_same(before, {name: ast.private_state(name) for name in ast.sub_nets[1:]})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_are_ordinary_dense_models(how: str) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(6))
    twin: Any
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_same(snapshot(model), snapshot(twin))
    before = snapshot(model)
    train(twin, sgd(twin), range(3))
    assert_same(before, snapshot(model))
    assert ast.step == 6
    twin.eval()
    seen = []
    twin.head.register_forward_hook(lambda *_: seen.append(nonzero(twin, ast)))
    twin(image_batch(0)[0])
    assert seen[0] > ast.masks.kept("s50")


class Boom(torch.autograd.Function):
    """Passes its input on, and raises in backward what it was told to."""

    error: type[BaseException] = RuntimeError

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Boom.error("in backward")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_backward_that_raises_leaves_dense_weights_at_once(error: type[BaseException]) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Boom.error = error
    handle = model.norm1.register_forward_hook(lambda _, __, output: Boom.apply(output))
    with pytest.raises(error, match="in backward"):
        functional.cross_entropy(model(image_batch(3)[0]), image_batch(3)[1]).backward()
    assert_same(before, {name: p.detach() for name, p in model.named_parameters()})
    handle.remove()
    name = ast.active
    train_step(model, optimizer, image_batch(3))
    assert ast.statistics()["sub_nets"][name]["steps"] == 2


def test_a_forward_that_raises_midway_leaves_dense_weights_at_once() -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(3))
    for training in (True, False):
        model.train(training)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 3, 8, 8))
        assert_same(before, {name: p.detach() for name, p in model.named_parameters()})
    train(model, optimizer, range(3, 6))
    assert ast.step == 6


@pytest.mark.parametrize("touch", ["state_dict", "optimizer", "save", "forward", "detach"])
def test_an_interrupt_inside_forward_is_mended_at_the_next_touch(touch: str, tmp_path: Any) -> None:
    model, optimizer, ast = wrapped(method="static", default_sub_net="s80")
    train(model, optimizer, range(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.conv2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(image_batch(3)[0])
    handle.remove()
    touches: dict[str, Callable[[], Any]] = {
        "state_dict": model.state_dict,
        "optimizer": optimizer.state_dict,
        "save": lambda: ast.save(tmp_path / "elastic.safetensors"),
        "forward": lambda: model.eval()(image_batch(3)[0]),
        "detach": ast.detach,
    }
    touches[touch]()
    assert_same(before, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_gradients_leave_the_masks_valid(value: float) -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(5))
    for step in range(5, 60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(image_batch(step)[0]), image_batch(step)[1])
        (loss * value if step in (6, 7, 8, 20) else loss).backward()
        if step in (6, 7, 8, 20):
            weights = snapshot(model)
        optimizer.step()
        if step in (6, 7, 8, 20):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
                for state in optimizer.state.values():
                    state["momentum_buffer"].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    for name, sparsity in zip(ast.sub_nets, (0.5, 0.8, 0.9), strict=True):
        assert abs(ast.masks.kept(name) - (1 - sparsity) * ast.masks.total()) <= 1
    assert -1 <= ast.statistics()["mean_cosine"] <= 1
    assert {point["step"] for point in ast.history["sparsity"]} & {6, 7, 8, 20}  # growth really saw such a gradient


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_outside_the_mask_does_not_reach_the_sub_net(value: float) -> None:
    model, optimizer, ast = wrapped(method="static", sparsities=(0.5, 0.8))
    outside = ~ast.masks.get("s50", "conv1.weight")
    with torch.no_grad():
        model.conv1.weight[outside] = value
    loss = functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1])
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    assert not torch.isfinite(model.conv1.weight.detach()[outside]).any()


def test_gradients_that_come_without_accumulation_are_masked_before_the_step() -> None:
    model, optimizer, ast = wrapped(method="static", inactive="freeze")
    names = [name for name, _ in model.named_parameters()]
    loss = functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1])
    for name, gradient in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        model.get_parameter(name).grad = gradient
    optimizer.step()
    for name in ast.masks.parameters:
        assert not model.get_parameter(name).grad[~ast.masks.get("s50", name)].any()


def test_a_plugin_correction_cannot_leave_the_mask() -> None:
    class Careless:
        @ast_plugin.hookimpl
        def ast_correct_gradients(self, gradients: list[Tensor]) -> Any:
            for gradient in gradients:
                gradient.add_(1.0)
            return Correction(checks=len(gradients), conflicts=0, cosines=[0.0] * len(gradients))

    model, optimizer, ast = wrapped(method="static", plugins=[Careless()])
    train_step(model, optimizer, image_batch(0))
    train_step(model, optimizer, image_batch(1))
    for name in ast.masks.parameters:
        gradient = model.get_parameter(name).grad
        mask = ast.masks.get("s80", name)
        assert not gradient[~mask].any()
        assert gradient[mask].all()


def test_a_scaler_skip_with_gradients_cleared_after_forward_leaves_nothing_for_growth() -> None:
    results = []
    for overflow in (True, False):
        model, optimizer, ast = wrapped(update_interval=3, stagger=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        for step in (0, 0, 1, 2, 3, 3, 4, 5) if overflow else (0, 1, 2, 3, 4, 5):
            output = model(image_batch(step)[0])
            optimizer.zero_grad()
            loss = functional.cross_entropy(output, image_batch(step)[1])
            bad = overflow and step == ast.step and step in (0, 3) and float(scaler.get_scale()) == 2.0**10
            scaler.scale(loss * float("inf") if bad else loss).backward()
            scaler.step(optimizer)
            scaler.update(2.0**9 if bad else 2.0**10)
        results.append((ast.step, {n: ast.masks.of(n) for n in ast.sub_nets}))
    assert results[0][0] == 6
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "found",
    [
        Correction(checks=1, conflicts=2, cosines=[0.0]),
        Correction(checks=1, conflicts=0, cosines=[0.5, 0.5]),
        Correction(checks=1, conflicts=0, cosines=[float("nan")]),
    ],
    ids=["conflicts", "cosines", "nan"],
)
def test_figures_of_a_correction_that_cannot_be_are_refused(found: Correction) -> None:
    class Wrong:
        @ast_plugin.hookimpl
        def ast_correct_gradients(self) -> Correction:
            return found

    model, optimizer, _ = wrapped(plugins=[Wrong()])
    train_step(model, optimizer, image_batch(0))
    with pytest.raises(ast_plugin.PluginError, match="no more conflicts than checks"):
        train_step(model, optimizer, image_batch(1))


def test_detaching_inside_a_sub_net_block_is_refused() -> None:
    _, _, ast = wrapped()
    with ast.sub_net("s80"):
        with pytest.raises(ast_plugin.ActivationError, match=r"detach\(\) was called inside"):
            ast.detach()
        assert ast.attached
    ast.detach()


def test_an_alternation_that_chooses_nobody_is_named() -> None:
    class Astray:
        name = "astray"

        def sub_net_at(self, step: int) -> int:
            return -1

        def is_group_start(self, step: int) -> bool:
            return False

    class Plugin:
        @ast_plugin.hookimpl
        def ast_alternations(self) -> Any:
            return [AlternationRecord(name="astray", description="lost", build=lambda **_: Astray())]

    model = conv_net()
    with pytest.raises(ast_plugin.PluginError, match="alternation 'astray' chose -1 for step 0"):
        wrapped(model, alternation="astray", plugins=[Plugin()])
    assert not model._forward_pre_hooks


def test_saving_before_the_targets_are_reached_warns(tmp_path: Any) -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(6))
    with pytest.warns(UserWarning, match=r"sub-net 's\d0' is saved with sparsity 0.*reach at step 30 \(now 6\)"):
        ast.save(tmp_path / "early.safetensors")
    train(model, optimizer, range(6, 60))
    ast.save(tmp_path / "late.safetensors")


def test_weights_gone_to_nan_leave_the_masks_exact() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(5))
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    train(model, optimizer, range(5, 60))
    for name, sparsity in zip(ast.sub_nets, (0.5, 0.8, 0.9), strict=True):
        assert abs(ast.masks.kept(name) - (1 - sparsity) * ast.masks.total()) <= 1


class Failing:
    """A plugin whose one hook raises, after as many calls as it is to bear."""

    def __init__(self, hook: str, calls: int = 0) -> None:
        left = iter(range(calls))

        def fail() -> None:
            if next(left, None) is None:
                raise ZeroDivisionError("plugin bug")

        self.__dict__[hook] = ast_plugin.hookimpl(fail, specname=hook)


@pytest.mark.parametrize(
    "hook",
    [
        "ast_correct_gradients",
        "ast_sub_net_switched",
        "ast_masks_updated",
        "ast_step_finished",
        "ast_training_finished",
    ],
)
def test_a_plugin_that_raises_is_named_and_leaves_dense_weights(hook: str) -> None:
    model, optimizer, ast = wrapped(plugins=[Failing(hook, calls=hook == "ast_sub_net_switched")])
    with pytest.raises(ast_plugin.PluginError, match=hook):
        train(model, optimizer, range(60))
    assert nonzero(model, ast) == ast.masks.total()
    assert_same({k: v for k, v in snapshot(model).items() if k in ast.private_state("s50")}, ast.private_state("s50"))


@pytest.mark.parametrize("hook", ["ast_methods", "ast_select_parameters", "ast_sub_net_switched"])
def test_a_plugin_that_raises_in_wrap_is_named_and_nothing_is_attached(hook: str) -> None:
    model = conv_net()
    before = snapshot(model)
    with pytest.raises(ast_plugin.PluginError, match=hook):
        wrapped(model, plugins=[Failing(hook)])
    assert_same(before, snapshot(model))
    assert not model._forward_pre_hooks


def test_observers_hear_of_every_event_in_order() -> None:
    heard: list[tuple[Any, ...]] = []

    class Listener:
        @ast_plugin.hookimpl
        def ast_sub_net_switched(self, sub_net: str) -> None:
            heard.append(("switched", sub_net))

        @ast_plugin.hookimpl
        def ast_masks_updated(self, sub_net: str, step: int) -> None:
            heard.append(("updated", sub_net, step))

        @ast_plugin.hookimpl
        def ast_step_finished(self, step: int, sub_net: str) -> None:
            heard.append(("finished", step, sub_net))

        @ast_plugin.hookimpl
        def ast_training_finished(self) -> None:
            heard.append(("done",))

    model, optimizer, _ast = wrapped(plugins=[Listener()], total_steps=12, update_interval=3, stagger=False)
    train(model, optimizer, range(12))
    beginning = [("switched", "s50"), ("updated", "s50", 0), ("finished", 0, "s50"), ("switched", "s80")]
    assert heard[:4] == beginning
    assert heard[-1] == ("done",)
    assert [event for event in heard if event[0] == "finished"] == [
        ("finished", step, ("s50", "s80", "s90")[step % 3]) for step in range(12)
    ]


def test_an_optimizer_step_that_raises_is_mended_at_the_next_touch() -> None:
    model, optimizer, ast = wrapped()
    train(model, optimizer, range(4))
    before = ast.private_state("s50")
    functional.cross_entropy(model(image_batch(4)[0]), image_batch(4)[1]).backward()
    assert ast.active == "s80"

    def fail(*_: Any) -> None:
        raise RuntimeError("in step")

    handle = optimizer.register_step_pre_hook(fail)  # runs after ours, when s80's BatchNorm state is in the model
    with pytest.raises(RuntimeError, match="in step"):
        optimizer.step()
    handle.remove()
    state = model.state_dict()
    assert_same(before, {k: v for k, v in state.items() if k in before})
    train_step(model, optimizer, image_batch(4))
    assert ast.step == 5


@pytest.mark.parametrize("method", ["set", "rigl", "granet"])
def test_a_step_that_was_broken_off_updates_its_masks_once(method: str) -> None:
    runs = []
    for broken_off in (True, False):
        model, optimizer, ast = wrapped(method=method, update_interval=3, stagger=False, correction="off")
        updated = []

        def interrupt(*_: Any, ast: Any = ast, updated: list[int] = updated) -> None:
            updated.append(ast.step)
            if updated.count(ast.step) == 1:
                raise KeyboardInterrupt

        if broken_off:
            optimizer.register_step_pre_hook(interrupt)  # runs after ours, which has updated the masks
        for step in range(9):
            if broken_off:
                with pytest.raises(KeyboardInterrupt):
                    train_step(model, optimizer, image_batch(step))
                optimizer.step()
            else:
                train_step(model, optimizer, image_batch(step))
        masks = {name: ast.masks.of(name) for name in ast.sub_nets}
        runs.append({"masks": masks, "weights": snapshot(model), "history": ast.history["sparsity"]})
    assert_same(runs[0], runs[1])
    assert len({point["step"] for point in runs[0]["history"]}) > 3


@pytest.mark.parametrize("wrapper", ["DataParallel", "compiled", "both"])
def test_names_are_those_of_the_model_inside_wrappers(wrapper: str, tmp_path: Any) -> None:
    def outer(model: nn.Module) -> nn.Module:
        if wrapper != "DataParallel":
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]  # a module comes out
        return model if wrapper == "compiled" else nn.DataParallel(model)

    plain, plain_optimizer, plain_ast = wrapped(method="set")
    train(plain, plain_optimizer, range(12))
    inner = conv_net()
    model = outer(inner)
    _, optimizer, ast = wrapped(model, sgd(inner), method="set")
    assert [row.parameter for row in ast.describe().rows] == [name for name, _ in inner.named_parameters()]
    train(model, optimizer, range(12))
    # The same names give the same random masks, so it is the same run.
    assert_same(snapshot(plain), snapshot(inner))
    assert_same(plain_ast.materialize("s80"), ast.materialize("s80"))
    ast.save(tmp_path / "elastic.safetensors")
    state = ast.state_dict()
    plain_ast.load_state_dict(state)
    fresh = conv_net(seed=3)
    fresh.load_state_dict(ast.materialize("s90"))
    ast.detach()
    images = image_batch(0)[0]
    fresh.eval()
    for target in (conv_net(seed=4), outer(conv_net(seed=4))):
        elastic = ast_plugin.load(tmp_path / "elastic.safetensors", target)
        elastic.switch("s90")
        with torch.no_grad():
            assert torch.equal(target.eval()(images), fresh(images))


def test_the_inner_models_state_dict_is_dense_too() -> None:
    inner = conv_net()
    model, _, ast = wrapped(nn.DataParallel(inner), sgd(inner), method="static")
    before = snapshot(inner)
    model(image_batch(0)[0])
    for name, value in inner.state_dict().items():
        if name in ast.masks.parameters:
            assert torch.equal(value, before[name])


def test_plugins_see_the_completed_masks_after_the_last_step() -> None:
    seen = []

    class Observer:
        @ast_plugin.hookimpl
        def ast_step_finished(self, training: Any, step: int) -> None:
            if step == 29:
                seen.append({name: round(training.masks.sparsity(name), 2) for name in training.sub_nets})

    model = conv_net()
    optimizer = sgd(model)
    ast_plugin.wrap(
        *(optimizer, model),
        sparsities=(0.5, 0.8, 0.9),
        total_steps=30,
        alternation="fixed:s80",
        plugins=[Observer()],
    )
    train(model, optimizer, range(30))
    assert seen == [{"s50": 0.5, "s80": 0.8, "s90": 0.9}]


@pytest.mark.parametrize("inactive", ["coast", "freeze"])
def test_a_state_dict_read_by_a_step_hook_does_not_disturb_the_step(inactive: str) -> None:
    results = []
    for read in (False, True):
        model, optimizer, ast = wrapped(inactive=inactive)
        if read:
            optimizer.register_step_pre_hook(lambda *_, model=model: model.state_dict() and None)
            optimizer.register_step_pre_hook(lambda given, *_: given.state_dict() and None)
        train(model, optimizer, range(9))
        results.append({"model": model.state_dict(), "run": ast.materialize("s90")})
    assert_same(*results)


def test_frozen_weights_come_back_when_the_optimizer_is_broken_off() -> None:
    model, optimizer, ast = wrapped(inactive="freeze", method="static")
    train(model, optimizer, range(2))
    before = snapshot(model)
    mask = ast.masks.get(ast.active, "conv1.weight")

    def break_off(*_: Any) -> None:
        raise RuntimeError("broken off")

    handle = optimizer.register_step_post_hook(break_off)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    with pytest.raises(RuntimeError, match="broken off"):
        train(model, optimizer, range(2, 3))
    after = model.state_dict()["conv1.weight"]
    assert torch.equal(after[~mask], before["conv1.weight"][~mask])
    assert not torch.equal(after[mask], before["conv1.weight"][mask])

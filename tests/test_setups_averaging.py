"""Averages of weights: dense whenever they are taken, and evaluated as each sub-net through a twin."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, nonzero, sgd, snapshot, train, wrapped
from reference_run import ReferenceRun, assert_runs_agree
from setup_runs import BUSY, batch_for, plain_step, whole_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_swa_avg_fn, update_bn

import ast_plugin

AVERAGES: dict[str, Callable[[], Any]] = {"ema": lambda: get_ema_avg_fn(0.9), "swa": get_swa_avg_fn}
LOADER = [image_batch(step) for step in range(50, 54)]


def averaged_by_hand(history: list[Tensor], kind: str) -> Tensor:
    if kind == "swa":
        return torch.stack([t.double() for t in history]).mean(dim=0)
    average = history[0].double()
    for tensor in history[1:]:
        average = 0.9 * average + 0.1 * tensor.double()
    return average


@pytest.mark.parametrize("kind", sorted(AVERAGES))
def test_averages_are_of_dense_weights_and_of_each_sub_nets_batch_norm(kind: str) -> None:
    model, optimizer, ast = wrapped(**BUSY)
    average = AveragedModel(model, avg_fn=AVERAGES[kind](), use_buffers=True)
    twin = ast.twin(average)
    dense: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    private: dict[tuple[str, str], list[Tensor]] = {}
    for step in range(12):
        plain_step(model, optimizer, step)
        if step % 2:
            with ast.sub_net("s90"), torch.no_grad():
                model.eval()(image_batch(0)[0])
            model.train()
        average.update_parameters(model)
        twin.update(AVERAGES[kind]())
        for name, parameter in model.named_parameters():
            dense[name].append(parameter.detach().clone())
        for sub_net in ast.sub_nets:
            for name, tensor in ast.private_state(sub_net).items():
                if tensor.is_floating_point():
                    private.setdefault((sub_net, name), []).append(tensor)
    for name, history in dense.items():
        expected = averaged_by_hand(history, kind)
        torch.testing.assert_close(average.module.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-6)
    for (sub_net, name), history in private.items():
        expected = averaged_by_hand(history, kind)
        torch.testing.assert_close(twin.private_state(sub_net)[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", ["after the step", "before the step", "after a skipped step", "between evaluations"])
def test_whenever_an_average_is_taken_it_sees_dense_weights(moment: str) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(4))
    average = AveragedModel(model)
    before = snapshot(model)
    images, labels = image_batch(4)
    if moment in ("before the step", "after a skipped step"):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        if moment == "after a skipped step":
            scaler = torch.amp.GradScaler("cpu")
            functional.cross_entropy(model(images), labels).mul(float("inf")).backward()
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
    elif moment == "between evaluations":
        model.eval()
        with torch.no_grad():
            model(images)
        with ast.sub_net("s90"), torch.no_grad():
            model(images)
    else:
        plain_step(model, optimizer, 4)
        before = snapshot(model)
    average.update_parameters(model)
    for name in ast.masks.parameters:
        assert torch.equal(average.module.get_parameter(name), before[name]), name


@pytest.mark.parametrize("graphs", [1, 2])
def test_weights_exchanged_by_hand_after_a_batch_without_backward_are_dense_both_times(graphs: int) -> None:
    model, optimizer, ast = wrapped(method="static")
    train(model, optimizer, range(4))
    average = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def skipped_batch() -> None:
        losses = [model(image_batch(4 + i)[0]).sum() for i in range(graphs)]
        assert nonzero(model, ast) < ast.masks.total()
        assert all(torch.isfinite(loss) for loss in losses)

    def evaluated() -> torch.Tensor:
        model.eval()
        with torch.no_grad(), ast.sub_net("s50"):
            found = model(image_batch(0)[0])
        model.train()
        return found

    skipped_batch()
    stored = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_same(stored, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    assert_same(average, {name: p.detach() for name, p in model.named_parameters()})
    evaluated()
    assert_same(average, {name: p.detach() for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[name])
    assert_same(before, {name: p.detach() for name, p in model.named_parameters()})


def test_an_output_that_is_let_go_leaves_the_sub_net_on_for_the_backward_of_another() -> None:
    model = mlp()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(9):
        inputs, labels = batch_for(model, step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        model(inputs)  # let go at once
        assert nonzero(model, ast) <= ast.masks.kept(ast.active)
        loss.backward()
        optimizer.step()
        reference.step(whole_batch(model, step))
    assert_runs_agree(ast, reference)


def test_taking_averages_does_not_change_the_run() -> None:
    results = []
    for averaging in (False, True):
        model, optimizer, ast = wrapped(**BUSY)
        average = AveragedModel(model)
        twin = ast.twin(average)
        for step in range(9):
            plain_step(model, optimizer, step)
            if averaging:
                average.update_parameters(model)
                twin.update()
                twin.recalibrate(LOADER)
                with twin.sub_net("s80"), torch.no_grad():
                    average(image_batch(0)[0])
        results.append({"model": snapshot(model), "state": optimizer.state_dict()["state"], "run": ast.state_dict()})
    assert_same(*results)


def trained_twin(net: Callable[[], nn.Module] = conv_net) -> tuple[Any, Any, Any, Any]:
    model, optimizer, ast = wrapped(net(), **BUSY)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.8))
    twin = ast.twin(average)
    for step in range(12):
        plain_step(model, optimizer, step)
        average.update_parameters(model)
        twin.update(get_ema_avg_fn(0.8))
    return model, ast, average, twin


@pytest.mark.parametrize("net", [conv_net, mlp])
def test_an_average_computes_as_each_sub_net(net: Any) -> None:
    model, ast, average, twin = trained_twin(net)
    dense = snapshot(average)
    inputs = batch_for(model, 70)[0]
    outputs = {}
    for name in twin.sub_nets:
        alone = copy.deepcopy(average.module)
        state = {**average.module.state_dict(), **twin.private_state(name)}
        alone.load_state_dict({n: t * ast.masks.get(name, n) if n in ast.masks.parameters else t
                               for n, t in state.items()})  # fmt: skip
        with twin.sub_net(name) as network, torch.no_grad():
            assert network is average
            outputs[name] = network.eval()(inputs)
        assert torch.equal(outputs[name], alone.eval()(inputs)), name
        assert_same(dict(alone.state_dict()), twin.materialize(name))
        assert_same(dense, snapshot(average))
    assert not torch.equal(outputs["s50"], outputs["s90"])


def test_statistics_of_an_average_are_estimated_for_each_sub_net() -> None:
    _, ast, average, twin = trained_twin()
    before = {name: ast.private_state(name) for name in ast.sub_nets}
    twin.recalibrate(LOADER)
    for name in twin.sub_nets:
        alone = copy.deepcopy(average.module)
        alone.load_state_dict(twin.materialize(name))
        update_bn(LOADER, alone.train())
        for key, tensor in twin.private_state(name).items():
            torch.testing.assert_close(tensor, alone.state_dict()[key], rtol=1e-5, atol=1e-6)
        assert_same(before[name], ast.private_state(name))


def test_torchs_own_update_bn_estimates_the_default_of_an_average() -> None:
    _, _, average, twin = trained_twin()
    others = {name: twin.private_state(name) for name in ("s80", "s90")}
    with twin.sub_net("s50"):
        update_bn(LOADER, average)
    alone = copy.deepcopy(average.module)
    alone.load_state_dict(twin.materialize("s50"))
    update_bn(LOADER, alone.train())
    torch.testing.assert_close(twin.private_state("s50")["norm1.running_mean"], alone.norm1.running_mean)
    assert_same(others, {name: twin.private_state(name) for name in ("s80", "s90")})


def test_an_average_is_saved_and_loaded_as_an_elastic_file(tmp_path: Any) -> None:
    model, optimizer, ast = wrapped(**BUSY)
    average = AveragedModel(model)
    twin = ast.twin(average)
    for step in range(12):
        plain_step(model, optimizer, step)
        average.update_parameters(model)
        twin.update(get_swa_avg_fn())
    alone = {name: twin.private_state(name) for name in twin.sub_nets}
    twin.recalibrate(LOADER, sub_nets="s90")
    statistics = "norm1.running_mean"
    moved = [n for n in twin.sub_nets if not torch.equal(alone[n][statistics], twin.private_state(n)[statistics])]
    assert moved == ["s90"]
    twin.recalibrate(LOADER)
    ast.add_report_metric("accuracy", 0.5, sub_net="s90")
    ast.save(tmp_path / "average.safetensors", twin=twin)
    elastic = ast_plugin.load(tmp_path / "average.safetensors", conv_net(seed=9).eval())
    inputs = image_batch(70)[0]
    for name in twin.sub_nets:
        elastic.switch(name)
        with twin.sub_net(name), torch.no_grad():
            assert torch.equal(elastic.model(inputs), average.eval()(inputs)), name
    assert elastic.metrics["s90"] == {}  # measured on the model, not on its average
    with twin.sub_net("s80"), pytest.raises(ast_plugin.ActivationError, match="leave `with sub_net"):
        ast.save(tmp_path / "average.safetensors", twin=twin)


def test_a_twin_resumes_with_its_average() -> None:
    _, ast, average, twin = trained_twin()
    buffer = io.BytesIO()
    torch.save({"average": average.state_dict(), "twin": twin.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = AveragedModel(conv_net(seed=3), avg_fn=get_ema_avg_fn(0.8))
    again = ast.twin(other)
    other.load_state_dict(saved["average"])
    again.load_state_dict(saved["twin"])
    for _ in range(2):
        for one in (twin, again):
            one.update(get_ema_avg_fn(0.8))
    for name in ast.sub_nets:
        assert_same(twin.materialize(name), again.materialize(name))
    with pytest.raises(ast_plugin.StateError, match="no state of a twin"):
        again.load_state_dict({"private": {"s70": {}}, "updates": 1})
    saved["twin"]["private"]["s90"]["norm1.weight"] = torch.ones(3)
    with pytest.raises(ast_plugin.StateError, match="other shapes"):
        again.load_state_dict(saved["twin"])


def test_blocks_of_a_twin_nest_and_end_dense_after_an_exception() -> None:
    _, ast, average, twin = trained_twin()
    dense = snapshot(average)
    layer = average.module.conv2

    def zeros() -> int:
        return int((layer.weight == 0).sum())

    with twin.sub_net("s90"):
        sparse = zeros()
        with pytest.raises(ZeroDivisionError), twin.sub_net("s50"):
            raise ZeroDivisionError(zeros())
        assert zeros() == sparse > 0
        with twin.sub_net("s50"):
            assert 0 < zeros() < sparse
    assert_same(dense, snapshot(average))
    with ast.sub_net("s50"), twin.sub_net("s90"):
        assert int((ast.model.conv2.weight == 0).sum()) < zeros()


def test_a_twin_of_a_copy_starts_as_the_run_is_and_follows_it_on_request() -> None:
    model, optimizer, ast = wrapped(**BUSY)
    for step in range(6):
        plain_step(model, optimizer, step)
    twin = ast.twin(copy.deepcopy(model))
    for name in ast.sub_nets:
        assert_same(ast.materialize(name), twin.materialize(name))
    kept = {name: twin.private_state(name) for name in ("s80", "s90")}
    for step in range(6, 12):
        plain_step(model, optimizer, step)
    assert_same(kept, {name: twin.private_state(name) for name in ("s80", "s90")})
    twin.update(get_ema_avg_fn(0.9))  # the first call takes over
    for name in ("s80", "s90"):
        assert_same(ast.private_state(name), twin.private_state(name))


def test_what_is_no_twin_is_refused() -> None:
    model, _, ast = wrapped(**BUSY)
    with pytest.raises(ast_plugin.WrapError, match="being trained by a run itself"):
        ast.twin(model)
    with pytest.raises(ast_plugin.WrapError, match=r"no parameter 'conv1.weight' of shape \(16, 8, 3, 3\)"):
        ast.twin(mlp())
    with pytest.raises(ast_plugin.WrapError, match=r"must be a torch\.nn\.Module"):
        ast.twin(model.state_dict())  # type: ignore[arg-type]
    twin = ast.twin(copy.deepcopy(model))
    with pytest.raises(ast_plugin.ConfigError, match="no sub-net 's91'"), twin.sub_net("s91"):
        pass


@pytest.mark.extra("timm")
def test_timms_moving_average_is_dense_and_computes_as_each_sub_net() -> None:
    from timm.utils import ModelEmaV3

    model, optimizer, ast = wrapped(**BUSY)
    average = ModelEmaV3(model, decay=0.8)
    twin = ast.twin(average)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(9):
        plain_step(model, optimizer, step)
        average.update(model)
        twin.update(lambda kept, present, _: kept.lerp(present, 0.2))
        for name, parameter in model.named_parameters():
            expected[name] = expected[name].lerp(parameter.detach(), 0.2)
    for name, tensor in expected.items():
        torch.testing.assert_close(average.module.get_parameter(name).detach(), tensor, rtol=1e-5, atol=1e-6)
    outputs = {}
    for name in ast.sub_nets:
        alone = conv_net()
        alone.load_state_dict(twin.materialize(name))
        assert int((alone.conv2.weight == 0).sum()) >= ast.masks.total("conv2.weight") - ast.masks.kept(
            name, "conv2.weight"
        )
        with twin.sub_net(name), torch.no_grad():
            outputs[name] = average.eval()(image_batch(3)[0])
        assert torch.equal(outputs[name], alone.eval()(image_batch(3)[0]))
    assert not torch.equal(outputs["s50"], outputs["s90"])

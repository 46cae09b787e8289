"""Sparsifiers of the real package sparsimony as methods: masks as in the framework alone, its moments, its faults."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, mlp, sgd, snapshot, train, train_step, vector_batch
from sparsimony.distributions.base import ERKDistribution, UniformDistribution
from sparsimony.dst.local_overparametrization import LocalOverParametrization
from sparsimony.dst.rigl import RigL
from sparsimony.dst.set import SET
from sparsimony.schedulers.base import ConstantScheduler, CosineDecayScheduler, SoftMemoryBoundScheduler
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.errors import ConfigError, MissingExtraError
from ast_plugin.integrations.frameworks import from_sparsifier

pytestmark = pytest.mark.extra("frameworks")

LAYERS = ["0.weight", "2.weight"]
CONFIG = [{"tensor_fqn": name} for name in LAYERS]


def prepared(kind: Any = RigL, *, interval: int = 5, end: int = 25, lr: float = 0.1, **options: Any) -> Any:
    """Return a model, its optimizer (without momentum) and a sparsifier on it, with updates every `interval` steps."""
    model = mlp()
    optimizer = sgd(model, lr=lr, momentum=options.pop("momentum", 0))
    settings = {"sparsity": 0.5, "distribution": UniformDistribution(), **options}
    sparsifier = kind(CosineDecayScheduler(0.4, end, interval), optimizer=optimizer, **settings)
    sparsifier.prepare(model, copy.deepcopy(CONFIG))
    return model, optimizer, sparsifier


def wrapped(kind: Any = RigL, **options: Any) -> Any:
    given = {name: options.pop(name) for name in list(options) if name in _PREPARED}
    model, optimizer, sparsifier = prepared(kind, **given)
    settings = {"sparsities": (0.5, 0.8), "inactive": "freeze", **options}
    return ast_plugin.wrap(optimizer, model, method=from_sparsifier(sparsifier), **settings)


_PREPARED = ("interval", "end", "lr", "distribution", "sparsity", "momentum", "init_method")


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name[0]).parametrizations.weight[0].mask != 0 for name in LAYERS}


def alone(steps: int, **options: Any) -> tuple[list[dict[str, Tensor]], nn.Module]:
    """Train with RigL as the framework does; return the masks after each step, and the model.

    Its ``step()`` stands after backward, as a run's mask updates do, from the second step on: so its n-th call meets
    the weights that it would have met after the n-th ``optimizer.step()``. The dense gradient is that of one step: at
    its first update the framework has added up those of all steps before, later ones not.
    """
    model, optimizer, sparsifier = prepared(**options)
    for group in sparsifier.groups:
        group["module"].parametrizations.weight[0].accumulate = False
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        functional.cross_entropy(model(inputs), labels).backward()
        if step:
            sparsifier.step()
        optimizer.step()
        found.append(masks_of(model))
    return found, model


@pytest.mark.parametrize("distribution", [UniformDistribution, ERKDistribution])
def test_masks_and_weights_are_bit_for_bit_those_of_rigl_alone(distribution: Any) -> None:
    expected, model = alone(30, distribution=distribution())
    ast = wrapped(sparsities=(0.5,), correction="off", distribution=distribution())
    changes = 0
    for step, masks in enumerate(expected):
        changes += step > 0 and any(not torch.equal(masks[name], expected[step - 1][name]) for name in LAYERS)
        train(ast.model, ast.optimizer, range(step, step + 1), vector_batch)
        assert_same(ast.masks.of("s50"), masks)
    assert changes == 4  # at 5, 10, 15 and 20; at 25 the fraction has come down to zero
    with ast.sub_net("s50"):
        for name in LAYERS:
            layer = name[0]
            assert torch.equal(ast.model.get_submodule(layer).weight, model.get_submodule(layer).weight)


def test_with_momentum_masks_are_those_of_rigl_alone_until_a_dropped_weight_has_returned() -> None:
    # Both start such a weight at zero; here its momentum begins anew, too, and there it goes on.
    expected, _ = alone(10, momentum=0.9)
    ast = wrapped(sparsities=(0.5,), correction="off", momentum=0.9)
    for step, masks in enumerate(expected):
        train(ast.model, ast.optimizer, range(step, step + 1), vector_batch)
        assert_same(ast.masks.of("s50"), masks)


def updates_of(ast: Any, steps: int) -> list[tuple[int, str]]:
    """Train, and return when which sub-net's masks changed."""
    found = []
    for step in range(steps):
        before = {name: ast.masks.checksum(name) for name in ast.sub_nets}
        train(ast.model, ast.optimizer, range(step, step + 1), vector_batch)
        found += [(step, name) for name in ast.sub_nets if ast.masks.checksum(name) != before[name]]
    return found


@pytest.mark.parametrize("kind", [RigL, SET])
def test_updates_come_by_the_sparsifiers_own_schedule(kind: Any) -> None:
    # s50 trains at even steps, s80 at odd ones: each at its first step from a multiple of five on.
    ast = wrapped(kind, end=20)
    assert updates_of(ast, 30) == [(5, "s80"), (6, "s50"), (10, "s50"), (11, "s80"), (15, "s80"), (16, "s50")]
    for name, sparsity in (("s50", 0.5), ("s80", 0.8)):
        assert ast.masks.sparsity(name) == pytest.approx(sparsity, abs=0.01)


def test_what_set_drops_is_the_smallest_and_what_it_grows_is_drawn_by_the_runs_seed() -> None:
    masks = []
    for seed in (0, 0, 1):
        ast = wrapped(SET, sparsities=(0.8,), seed=seed)
        before = ast.masks.of("s80")
        train(ast.model, ast.optimizer, range(5), vector_batch)
        torch.rand(3)  # the global generator has no part in it
        weights = {name: ast.model.get_parameter(name).detach().clone().abs() for name in LAYERS}
        train(ast.model, ast.optimizer, range(5, 6), vector_batch)
        after = ast.masks.of("s80")
        for name in LAYERS:
            gone, kept = before[name] & ~after[name], before[name] & after[name]
            assert gone.any()
            assert weights[name][gone].max() <= weights[name][kept].max()
            # It rounds the number of first masks up, and that of updates down.
            assert int(before[name].sum()) - int(after[name].sum()) in (0, 1)
        masks.append(after)
    assert_same(masks[0], masks[1])
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in LAYERS)


def test_a_sub_net_of_the_sparsifiers_own_sparsity_starts_with_its_masks_and_others_with_masks_like_them() -> None:
    model, optimizer, sparsifier = prepared()
    present, weights = (
        masks_of(model),
        {name: model.get_submodule(name[0]).parametrizations.weight.original.clone() for name in LAYERS},
    )
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.8, 0.5), method=from_sparsifier(sparsifier))
    assert_same(ast.masks.of("s50"), present)
    assert ast.masks.sparsity("s80") == pytest.approx(0.8, abs=0.01)
    for name in LAYERS:
        assert torch.equal(model.get_parameter(name), weights[name])


def test_the_distribution_is_the_sparsifiers() -> None:
    ast = wrapped(distribution=ERKDistribution(), sparsities=(0.8,))
    assert ast.masks.sparsity("s80", "0.weight") < 0.8 < ast.masks.sparsity("s80", "2.weight")


def test_a_sparsifier_that_has_stepped_already_goes_on_from_there() -> None:
    model, optimizer, sparsifier = prepared()
    for step in range(7):
        train(model, optimizer, range(step, step + 1), vector_batch)
        sparsifier.step()
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5,), method=from_sparsifier(sparsifier))
    assert [step for step, _ in updates_of(ast, 10)] == [3, 8]  # its calls 10 and 15


def test_grown_weights_start_at_zero() -> None:
    ast = wrapped(sparsities=(0.5,))
    train(ast.model, ast.optimizer, range(5), vector_batch)
    before = ast.masks.of("s50")
    seen: list[Tensor] = []
    handle = ast.optimizer.register_step_pre_hook(lambda *_: seen.append(ast.model[0].weight.detach().clone()))
    train(ast.model, ast.optimizer, range(5, 6), vector_batch)
    handle.remove()
    grown = ast.masks.get("s50", "0.weight") & ~before["0.weight"]
    assert grown.any()
    assert not seen[0][grown].any()


def test_an_update_that_a_plugin_asks_for_has_its_drop_fraction() -> None:
    ast = wrapped(sparsities=(0.5,), end=4, interval=50)
    ast.add_mask_updates(lambda sub_net, step, last_step: 0.25 if step == 3 else None)
    before = ast.masks.of("s50")
    assert [step for step, _ in updates_of(ast, 6)] == [3]
    for name in LAYERS:
        lost = int((before[name] & ~ast.masks.get("s50", name)).sum())
        assert 0 < lost <= int(0.25 * int(before[name].sum()))


def test_the_optimizers_step_is_its_own_again() -> None:
    ast = wrapped()
    assert "step" not in vars(ast.optimizer)
    torch.optim.lr_scheduler.StepLR(ast.optimizer, 10)  # which fails on the step that sparsimony makes
    ast.optimizer.step(lambda: torch.zeros(()))  # and so does a closure
    model, optimizer, sparsifier = prepared()
    wrapper = vars(optimizer)["step"]
    with pytest.raises(ConfigError, match="unknown alternation"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.5,), method=from_sparsifier(sparsifier), alternation="none")
    assert vars(optimizer)["step"] is wrapper
    before = masks_of(model)
    train(model, optimizer, range(1), vector_batch)
    assert_same(masks_of(model), before)


def test_a_step_that_a_learning_rate_scheduler_had_wrapped_before_stays_so() -> None:
    model = mlp()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    counted = vars(optimizer)["step"]
    sparsifier = RigL(ConstantScheduler(0.3, 20, 5), UniformDistribution(), optimizer)
    sparsifier.prepare(model, copy.deepcopy(CONFIG))
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5,), method=from_sparsifier(sparsifier))
    assert vars(optimizer)["step"] is counted
    train(model, optimizer, range(2), vector_batch)
    scheduler.step()
    assert ast.step == 2


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    for kind in (RigL, SET):
        whole = wrapped(kind)
        train(whole.model, whole.optimizer, range(24), vector_batch)
        half = wrapped(kind)
        train(half.model, half.optimizer, range(13), vector_batch)
        saved = copy.deepcopy({"model": half.model.state_dict(), "optimizer": half.optimizer.state_dict()})
        counts = {
            name: state["attributes"]["_step_count"]
            for name, state in saved["optimizer"]["ast_plugin"]["plugins"]["method"]["sub_nets"].items()
        }
        assert counts == {"s50": 10, "s80": 10}
        rest = wrapped(kind)
        rest.model.load_state_dict(saved["model"])
        rest.optimizer.load_state_dict(saved["optimizer"])
        train(rest.model, rest.optimizer, range(13, 24), vector_batch)
        assert_same(snapshot(rest.model), snapshot(whole.model))
        assert_same(rest.optimizer.state_dict(), whole.optimizer.state_dict())


def test_a_model_in_half_precision_has_masks_of_the_right_counts() -> None:
    model = conv_net().bfloat16()
    optimizer = sgd(model)
    sparsifier = RigL(ConstantScheduler(0.3, 50, 4), UniformDistribution(), optimizer, init_method=None)
    sparsifier.prepare(model, [{"tensor_fqn": "conv1.weight"}, {"tensor_fqn": "conv2.weight"}])
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, 0.8), method=from_sparsifier(sparsifier))
    for step in range(10):
        images, labels = image_batch(step)
        train_step(model, optimizer, (images.bfloat16(), labels))
    for name in ("conv1.weight", "conv2.weight"):
        assert ast.masks.kept("s80", name) == int(ast.masks.total(name) * (1 - 0.8))


def test_what_the_page_says_of_the_package_alone_is_so() -> None:
    _, optimizer, sparsifier = prepared(SET, sparsity=0.8, interval=5)
    for _ in range(2):
        sparsifier.step()
    with pytest.raises(AssertionError):
        sparsifier.step()  # which it counts as the fifth
    with pytest.raises(TypeError, match="takes 0 positional arguments"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(AttributeError, match="__func__"):
        torch.optim.lr_scheduler.StepLR(optimizer, 10)


def test_sparsifiers_that_need_more_or_start_elsewhere_are_refused() -> None:
    sparsifier = prepared(grown_weights_init=0.1)[2]
    with pytest.raises(ConfigError, match=r"grown_weights_init=0\.1; here they start at zero"):
        from_sparsifier(sparsifier)
    model = mlp()
    history = LocalOverParametrization(
        SoftMemoryBoundScheduler(0.3, 20, 5, 2), UniformDistribution(), sgd(model), init_method=None
    )
    with contextlib.redirect_stdout(io.StringIO()):
        history.prepare(model, copy.deepcopy(CONFIG))
    with pytest.raises(ConfigError, match="learns from a history of weights and gradients"):
        from_sparsifier(history)
    with pytest.raises(ConfigError, match="see is not for sparsimony's RigL"):
        from_sparsifier(prepared()[2], see="all")


def test_one_that_was_squashed_is_refused_with_a_remedy() -> None:
    sparsifier = prepared()[2]
    sparsifier.squash_mask()
    with pytest.raises(ConfigError, match=r"RigL is on '0\.weight' no more: its masks were squashed.*prepare a new"):
        from_sparsifier(sparsifier)


def test_another_version_is_refused_with_the_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsifier = prepared()[2]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(
        MissingExtraError, match=r"sparsimony 0\.2\.0 is installed.*--no-deps --ignore-requires-python sparsimony==0\.1"
    ):
        from_sparsifier(sparsifier)

"""Mask updates: hand-worked cases, then every method over every pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import BUILT_IN_METHODS, GMP, GRANET, RIGL, SET, STATIC, Method
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.random_state import seeded_generator
from ast_plugin.schedules import resolve_calendars
from ast_plugin.updates import MaskUpdater


def updater(method: Method, weights: dict[str, Tensor], **options: Any) -> MaskUpdater:
    settings: dict[str, Any] = {
        "sparsities": (0.5,),
        "total_steps": 20,
        "end_step": 10,
        "update_interval": 5,
        **options,
    }
    config = ASTConfig(**settings)
    registry = PluginRegistry(autoload=False)
    patterns = {spec.name: registry.pattern(spec.pattern or config.pattern) for spec in config.sub_nets}
    plans = build_plans(config, patterns, resolve_calendars(config, len(config.sub_nets)))
    masks = MaskStore([p.name for p in plans], {name: tuple(w.shape) for name, w in weights.items()})
    distribution = registry.distribution(config.distribution or method.distribution)
    made = MaskUpdater(config, plans, method=method, distribution=distribution, masks=masks)
    made.initialize(weights)
    return made


# Magnitudes 8 7 6 5 4 3 2 1 by index.
EIGHT = {"w": torch.tensor([[8.0, -7.0, 6.0, -5.0], [4.0, -3.0, 2.0, -1.0]])}


def test_gmp_keeps_the_largest_magnitudes_at_the_end_of_its_ramp() -> None:
    made = updater(GMP, EIGHT)
    assert made.masks.kept("s50") == 8
    update = made.update("s50", 10, EIGHT, None)
    assert (update.target, update.achieved, update.grown) == (0.5, 0.5, {})
    assert made.masks.get("s50", "w").int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_granet_drops_the_smallest_kept_and_grows_the_largest_gradient() -> None:
    made = updater(GRANET, EIGHT, drop_fraction=0.25, drop_schedule="constant")
    gradient = {"w": torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -9.0, 1.0, 0.0]])}
    # Threshold keeps 8 7 6 5; a quarter of four is one: 5 goes, index 5 (gradient 9) comes.
    made.update("s50", 10, EIGHT, gradient)
    assert made.masks.get("s50", "w").int().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]


def test_rigl_keeps_its_counts_and_reports_what_grew() -> None:
    made = updater(RIGL, EIGHT, drop_fraction=0.5, drop_schedule="constant")
    made.masks.set("s50", "w", torch.tensor([[True, True, False, False], [False, False, True, True]]))
    gradient = {"w": torch.tensor([[0.0, 0.0, 5.0, 4.0], [3.0, 2.0, 1.0, 0.0]])}
    # Of 8 7 2 1 the two smallest go (2, 1); gradients 5 and 4 come.
    update = made.update("s50", 5, EIGHT, gradient)
    assert made.masks.get("s50", "w").int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert update.grown["w"].int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("method", [RIGL, GRANET], ids=lambda method: method.name)
def test_an_interrupted_update_leaves_every_mask_as_it_was(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(6, 6) for name in "abc"}
    gradients = {name: torch.randn(6, 6) for name in "abc"}
    made, other = (updater(method, weights, drop_fraction=0.5) for _ in range(2))
    before, revision = made.masks.of("s50"), made.masks.revision("s50")
    expand = type(made.plans["s50"].pattern).expand
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return expand(*args)

    with monkeypatch.context() as patched:
        patched.setattr(type(made.plans["s50"].pattern), "expand", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.update("s50", 5, weights, gradients)
    assert calls == 3
    assert made.masks.revision("s50") == revision
    for name, mask in made.masks.of("s50").items():
        assert torch.equal(mask, before[name]), name
    made.update("s50", 5, weights, gradients)
    other.update("s50", 5, weights, gradients)
    assert made.masks.checksum() == other.masks.checksum()
    assert any(not torch.equal(mask, before[name]) for name, mask in made.masks.of("s50").items())


def test_set_grows_the_same_weights_for_the_same_seed_and_step_only() -> None:
    weights = {"w": torch.randn(16, 16)}

    def masks(seed: int, step: int) -> Tensor:
        made = updater(SET, weights, seed=seed, drop_fraction=0.5)
        first = made.masks.get("s50", "w").clone()
        made.update("s50", step, weights, None)
        assert not torch.equal(first, made.masks.get("s50", "w"))
        return made.masks.get("s50", "w")

    assert torch.equal(masks(0, 5), masks(0, 5))
    assert not torch.equal(masks(0, 5), masks(1, 5))


def test_a_method_that_decides_masks_decides_none_of_channels() -> None:
    method = Method(name="decided", description="", decide=lambda inputs: {})
    with pytest.raises(ConfigError, match="pattern 'channel', and method 'decided' decides masks weight by weight"):
        updater(method, EIGHT, pattern="channel")


def test_static_is_never_due_and_random_by_seed() -> None:
    weights = {"w": torch.randn(16, 16)}
    made = updater(STATIC, weights)
    assert not any(made.is_due("s50", step, None) for step in range(20))
    assert made.masks.kept("s50") == 128
    assert torch.equal(made.masks.get("s50", "w"), updater(STATIC, weights).masks.get("s50", "w"))
    assert not torch.equal(made.masks.get("s50", "w"), updater(STATIC, weights, seed=1).masks.get("s50", "w"))


def test_the_ramp_starts_where_it_is_told_and_never_above_the_target() -> None:
    weights = {"w": torch.randn(20, 20)}
    made = updater(GRANET, weights, sparsities=(0.3, 0.9), initial_sparsity=0.5)
    assert made.masks.sparsity("s30") == pytest.approx(0.3)
    assert made.masks.sparsity("s90") == pytest.approx(0.5)
    assert made.sparsity_at("s90", 10) == pytest.approx(0.9)
    assert 0.5 < made.sparsity_at("s90", 5) < 0.9
    assert made.sparsity_at("s30", 5) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match=r"initial_sparsity=0\.2 has no meaning for method 'set'"):
        updater(SET, weights, initial_sparsity=0.2)


def test_the_drop_fraction_decays_by_cosine_between_begin_and_end() -> None:
    made = updater(GRANET, EIGHT, drop_fraction=0.5, drop_fraction_end=0.1)
    assert made.drop_fraction_at("s50", 0) == pytest.approx(0.5)
    assert made.drop_fraction_at("s50", 5) == pytest.approx(0.3)
    assert made.drop_fraction_at("s50", 10) == pytest.approx(0.1)


def test_an_emptied_layer_keeps_its_best_weight_unless_allowed() -> None:
    weights = {"big": torch.ones(10, 10) + torch.rand(10, 10), "small": torch.full((4, 4), 1e-3)}
    weights["small"][2, 1] = 2e-3
    made = updater(GMP, weights)
    made.update("s50", 10, weights, None)
    assert made.masks.kept("s50", "small") == 1
    assert made.masks.get("s50", "small")[2, 1]
    assert made.masks.kept("s50") == 58
    made = updater(GMP, weights, allow_empty_layers=True)
    made.update("s50", 10, weights, None)
    assert made.masks.kept("s50", "small") == 0
    assert made.masks.kept("s50") == 58
    # An empty layer stays empty at the next update instead of turning dense.
    made.update("s50", 12, weights, None)
    assert made.masks.kept("s50", "small") == 0


@pytest.mark.parametrize("method", BUILT_IN_METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:3", "4x2"])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_every_method_over_every_pattern_keeps_exact_counts(method: Method, pattern: str, distribution: str) -> None:
    weights = {"conv": torch.randn(16, 12, 3, 3), "linear": torch.randn(24, 36), "odd": torch.randn(6, 7)}
    fixed = {"2:4": 0.5, "1:3": 2 / 3}.get(pattern)
    sparsities: Any = (pattern,) if fixed else (0.6, 0.8)
    made = updater(method, weights, sparsities=sparsities, pattern=pattern, distribution=distribution)
    before = {name: w.clone() for name, w in weights.items()}
    units = {"4x2": 8}.get(pattern, 1)
    for step in (0, 5, 10):
        gradients = {name: torch.randn_like(w) for name, w in weights.items()}
        for plan in made.plans.values():
            if method.updates:
                made.update(plan.name, step, weights, gradients)
            for name in weights:
                assert made.masks.kept(plan.name, name) > 0
            if fixed is None:
                expected = made.sparsity_at(plan.name, step)
                assert abs(made.masks.sparsity(plan.name) - expected) * made.masks.total() <= units + 0.5
    for plan in made.plans.values():
        if fixed is not None:
            n, m = (int(part) for part in pattern.split(":"))
            mask = made.masks.get(plan.name, "conv").permute(0, 2, 3, 1).reshape(-1, m)
            assert torch.equal(mask.sum(dim=1), torch.full((mask.shape[0],), n))
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])


def test_finalizing_reaches_the_target_without_gradients() -> None:
    made = updater(GRANET, EIGHT)
    update = made.finalize("s50", 20, EIGHT)
    assert update.achieved == 0.5
    assert made.masks.get("s50", "w").int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    made = updater(SET, EIGHT)
    before = made.masks.get("s50", "w").clone()
    assert made.finalize("s50", 20, EIGHT).achieved == 0.5
    assert torch.equal(before, made.masks.get("s50", "w"))


def test_an_unreachable_target_is_refused_before_training() -> None:
    weights = {f"w{i}": torch.randn(4, 4) for i in range(8)}
    with pytest.raises(ConfigError, match="allow_empty_layers"):
        updater(GRANET, weights, sparsities=(0.97,))


def test_seeded_generators_differ_by_every_argument() -> None:
    arguments: list[tuple[Any, ...]] = [
        (0, "a", 1, "w"),
        (1, "a", 1, "w"),
        (0, "b", 1, "w"),
        (0, "a", 2, "w"),
        (0, "a", 1, "v"),
    ]
    drawn = {float(torch.rand((), generator=seeded_generator(*a))) for a in arguments}
    assert len(drawn) == len(arguments)


@pytest.mark.parametrize("method", [SET, RIGL, GMP, GRANET], ids=lambda m: m.name)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("pattern", ["4x4", "8x8", "32x1"])
def test_blocks_cut_off_at_an_edge_do_not_bend_the_sparsity(method: Method, distribution: str, pattern: str) -> None:
    shapes = {"a": (64, 33), "b": (100, 64), "c": (33, 100), "d": (10, 33)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    made = updater(
        method, weights, sparsities=(0.6, 0.9), pattern=pattern, distribution=distribution, update_interval=1
    )
    rows, columns = (int(size) for size in pattern.split("x"))
    for step in range(11):
        gradients = {name: torch.randn_like(w) for name, w in weights.items()}
        for plan in made.plans.values():
            made.update(plan.name, step, weights, gradients)
            wanted = (1 - made.sparsity_at(plan.name, step)) * made.masks.total()
            assert abs(made.masks.kept(plan.name) - wanted) <= rows * columns, (plan.name, step)


@pytest.mark.parametrize(
    "score",
    [lambda i: None, lambda i: i.weight.numpy(), lambda i: i.weight[:1], lambda i: i.weight > 0],
    ids=["none", "numpy", "shape", "bool"],
)
def test_a_score_that_is_no_score_names_the_method(score: Any) -> None:
    method = Method(name="odd", description="returns rubbish", drop_score=score, reselect=True, initial_sparsity=0.0)
    made = updater(method, EIGHT, distribution="uniform")
    with pytest.raises(PluginError, match="a score of method 'odd' returned"):
        made.update("s50", 10, EIGHT, None)

"""Mask updates of channel sub-nets: exact counts, nesting, scores of units, by hand and over every method."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, PluginError
from ast_plugin.masks import MaskStore
from ast_plugin.methods import BUILT_IN_METHODS, GMP, GRANET, RIGL, SET, STATIC, ChannelScoreInputs, Method
from ast_plugin.plans import build_plans
from ast_plugin.plugins import PluginRegistry
from ast_plugin.schedules import resolve_calendars
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.updates import MaskUpdater


def chain(*widths: int) -> tuple[ChannelGroups, dict[str, tuple[int, int]]]:
    """Return the groups and shapes of linear layers w0, w1 ... of these widths, inputs and outputs included."""
    shapes = {f"w{i}": (widths[i + 1], widths[i]) for i in range(len(widths) - 1)}
    groups = [
        ChannelGroup(
            name=f"g{i}",
            kind="hidden",
            units=widths[i],
            axes=(
                GroupAxis(tensor=f"w{i - 1}", dim=0, role="out"),
                GroupAxis(tensor=f"w{i}", dim=1, role="in"),
            ),
        )
        for i in range(1, len(widths) - 1)
    ]
    return ChannelGroups(groups=tuple(groups)), shapes


GROUPS, SHAPES = chain(6, 16, 12, 8, 5)


def updater(method: Method, weights: dict[str, Tensor], groups: ChannelGroups = GROUPS, **options: Any) -> MaskUpdater:
    settings: dict[str, Any] = {
        "sparsities": (0.25, 0.5, 0.75),
        "pattern": "channel",
        "total_steps": 24,
        "end_step": 12,
        "update_interval": 6,
        **options,
    }
    config = ASTConfig(**settings)
    registry = PluginRegistry(autoload=False)
    patterns = {spec.name: registry.pattern(spec.pattern or config.pattern) for spec in config.sub_nets}
    plans = build_plans(config, patterns, resolve_calendars(config, len(config.sub_nets)))
    masks = MaskStore([p.name for p in plans], {name: tuple(w.shape) for name, w in weights.items()})
    distribution = registry.distribution(config.distribution or "uniform")  # type: ignore[arg-type]
    made = MaskUpdater(
        config,
        plans,
        method=method,
        distribution=distribution,
        masks=masks,
        groups=groups,
        group_distribution=distribution,
    )
    made.initialize(weights)
    return made


def random_weights(shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def units_of(made: MaskUpdater, sub_net: str) -> dict[str, list[int]]:
    return {name: flags.nonzero().reshape(-1).tolist() for name, flags in made.kept_units(sub_net).items()}


def test_the_units_with_the_largest_mean_magnitude_of_rows_and_columns_stay() -> None:
    groups, shapes = chain(2, 4, 2)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights["w0"] = torch.tensor([[3.0, 3.0], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    weights["w1"] = torch.tensor([[0.0, 4.0, 0.0, 0.0], [0.0, 4.0, 0.0, 1.0]])
    # Means over the four weights of each unit: 6/4, 10/4, 0, 5/4.
    made = updater(GMP, weights, groups, sparsities=(0.5, 0.75), initial_sparsity=0.0)
    made.update("s50", 12, weights, None)
    assert units_of(made, "s50") == {"g1": [0, 1]}
    made.update("s75", 12, weights, None)
    assert units_of(made, "s75") == {"g1": [1]}
    assert made.masks.get("s75", "w0").tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert made.masks.get("s75", "w1").tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("method", BUILT_IN_METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("order", [(0.25, 0.5, 0.75), (0.75, 0.25, 0.5)])
def test_every_method_keeps_exact_shares_of_units_and_nests_them(
    method: Method, distribution: str, order: tuple[float, ...]
) -> None:
    weights = random_weights()
    made = updater(method, weights, sparsities=order, distribution=distribution, drop_fraction=0.4)
    before = {name: w.clone() for name, w in weights.items()}
    generator = torch.Generator().manual_seed(1)
    changed = False
    for step in (0, 6, 12, 18):
        gradients = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        for plan in made.plans.values():
            if method.updates:
                units = units_of(made, plan.name)
                update = made.update(plan.name, step, weights, gradients)
                assert update.achieved == made.achieved(plan.name)
                changed |= units != units_of(made, plan.name)
            assert_nested(made)
            weights = {name: w + torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    assert changed == method.updates
    for name, sparsity in (("s25", 0.25), ("s50", 0.5), ("s75", 0.75)):
        assert made.achieved(name) == pytest.approx(sparsity, abs=0.5 / 36)
        if distribution != "global":
            shares = [len(units) for units in units_of(made, name).values()]
            assert shares == [round((1 - sparsity) * width) for width in (16, 12, 8)]
    assert set(before) == set(weights)


def assert_nested(made: MaskUpdater) -> None:
    order = sorted(made.plans.values(), key=lambda plan: plan.target_sparsity)
    for denser, sparser in itertools.pairwise(order):
        wide, narrow = units_of(made, denser.name), units_of(made, sparser.name)
        assert all(set(narrow[name]) <= set(wide[name]) for name in wide)
        for name in made.masks.parameters:
            assert not (made.masks.get(sparser.name, name) & ~made.masks.get(denser.name, name)).any()


def test_a_denser_sub_net_that_overtakes_a_sparser_one_takes_units_from_it() -> None:
    weights = random_weights()
    made = updater(GMP, weights, sparsities=(0.5, 0.6), initial_sparsity=0.0)
    made.update("s60", 3, weights, None)
    held = sum(len(units) for units in units_of(made, "s60").values())
    update = made.update("s50", 12, weights, None)
    assert update.trimmed == ("s60",)
    assert sum(len(units) for units in units_of(made, "s50").values()) == 18
    assert sum(len(units) for units in units_of(made, "s60").values()) <= 18 < held
    assert_nested(made)


def test_what_a_sparser_sub_net_keeps_is_not_dropped_by_a_denser_one() -> None:
    weights = random_weights()
    made = updater(GRANET, weights, initial_sparsity=0.0, drop_fraction=0.5, drop_schedule="constant")
    for name in ("s25", "s50", "s75"):
        made.update(name, 12, weights, None)
    inner = units_of(made, "s75")
    turned = {name: -1 / w for name, w in weights.items()}  # what was large is small now
    made.update("s50", 12, turned, {name: torch.ones_like(w) for name, w in weights.items()})
    assert units_of(made, "s75") == inner
    assert_nested(made)


def test_growth_finds_the_unit_with_the_largest_gradient() -> None:
    weights = random_weights()
    made = updater(RIGL, weights, sparsities=(0.5,), drop_fraction=0.3)
    outside = next(unit for unit in range(16) if unit not in units_of(made, "s50")["g1"])
    gradients = {name: torch.zeros_like(w) for name, w in weights.items()}
    gradients["w1"][:, outside] = 5.0
    made.update("s50", 6, weights, gradients)
    assert outside in units_of(made, "s50")["g1"]
    assert len(units_of(made, "s50")["g1"]) == 8


def test_a_method_may_score_whole_units() -> None:
    seen: list[ChannelScoreInputs] = []

    def last_first(inputs: ChannelScoreInputs) -> Tensor:
        seen.append(inputs)
        return torch.arange(inputs.group.units, dtype=torch.float32)

    method = dataclasses.replace(GMP, name="last_first", channel_score=last_first, initial_sparsity=None)
    made = updater(method, random_weights())
    assert units_of(made, "s75") == {"g1": [12, 13, 14, 15], "g2": [9, 10, 11], "g3": [6, 7]}
    assert set(seen[0].weights) == {"w0", "w1"}
    assert seen[0].kept.tolist() == [True] * 16

    for wrong in (lambda _: torch.zeros(3), lambda i: torch.zeros(i.group.units, dtype=torch.int64), lambda _: None):
        with pytest.raises(PluginError, match=r"channel score of method 'wrong' returned .* for group 'g1'"):
            updater(dataclasses.replace(method, name="wrong", channel_score=wrong), random_weights())


@pytest.mark.parametrize("base", [GMP, SET])
def test_a_score_of_units_is_asked_before_the_first_step_even_where_nothing_is_chosen_by_it(base: Method) -> None:
    seen: list[str] = []

    def only_narrow(inputs: ChannelScoreInputs) -> Tensor:
        seen.append(inputs.group.name)
        assert inputs.gradients is None
        if inputs.group.units > 12:
            raise ConfigError(f"{inputs.group.units} units are too many")
        return torch.zeros(inputs.group.units)

    method = dataclasses.replace(base, name="narrow", channel_score=only_narrow)
    with pytest.raises(ConfigError, match="16 units are too many"):
        updater(method, random_weights())
    groups, shapes = chain(6, 12, 8, 5)
    seen.clear()
    updater(method, random_weights(shapes), groups=groups, sparsities=(0.5,))
    assert seen == ["g1", "g2"]


def test_a_method_for_channels_alone_is_refused_where_no_sub_net_drops_any() -> None:
    method = dataclasses.replace(GMP, name="units", needs_channels=True)
    with pytest.raises(
        ConfigError, match=r"'units' scores whole channels, .*: their patterns are 2:4, unstructured; add"
    ):
        updater(method, random_weights(), sparsities=(0.9, "2:4"), pattern="unstructured")
    mixed = (0.5, SubNetSpec(name="single", sparsity=0.9, pattern="unstructured"))
    assert updater(method, random_weights(), sparsities=mixed).plans.keys() == {"s50", "single"}


def test_a_target_that_leaves_a_group_empty_is_refused_and_says_which() -> None:
    with pytest.raises(
        ConfigError, match=r"sparsity 0\.95 of sub-net 's95' leaves nothing of channel group 'g3', which has 8 hidden"
    ):
        updater(GMP, random_weights(), sparsities=(0.5, 0.95))


@pytest.mark.parametrize(
    "options", [{"distribution": "global"}, {"distribution": "global", "allow_empty_layers": True}]
)
def test_fewer_units_than_groups_are_refused_in_words_for_channels(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"sub-net 's95' keeps 2 of 36 units.* one in each of the 3 channel groups"
    ) as e:
        updater(GMP, random_weights(), sparsities=(0.5, 0.95), **options)
    assert "allow_empty_layers" not in str(e.value)  # which means layers of weights, and would not help


def test_counts_stay_exact_where_the_denser_sub_net_was_chosen_by_other_scores() -> None:
    weights = random_weights()
    made = updater(GMP, weights, sparsities=(0.5, 0.55), distribution="global", initial_sparsity=0.0)
    made.update("s50", 12, weights, None)
    turned = {name: weight.flip(0, 1).contiguous() ** 3 for name, weight in weights.items()}
    turned["w0"], turned["w1"] = turned["w0"] * 100, turned["w1"] * 100  # all of g1 is ahead of all others now
    made.update("s55", 12, turned, None)
    kept = made.kept_units("s55")
    assert sum(int(flags.sum()) for flags in kept.values()) == 16  # of 36
    assert all(bool((made.kept_units("s50")[name] >= flags).all()) for name, flags in kept.items())


def test_one_threshold_over_all_groups_leaves_a_unit_in_each() -> None:
    weights = random_weights()
    weights["w2"] *= 1e-3
    weights["w3"] *= 1e-3
    made = updater(GMP, weights, sparsities=(0.75,), distribution="global", initial_sparsity=None)
    made.update("s75", 12, weights, None)
    widths = {name: len(units) for name, units in units_of(made, "s75").items()}
    assert widths["g3"] == 1
    assert sum(widths.values()) == 9


def test_groups_may_have_sparsities_of_their_own() -> None:
    from ast_plugin.distributions import ExplicitDistribution

    weights = random_weights()
    explicit = ExplicitDistribution(sparsities={"g1": 0.25})
    made = updater(STATIC, weights, sparsities=(0.5,))
    again = MaskUpdater(
        made.config,
        list(made.plans.values()),
        method=STATIC,
        distribution=explicit,
        masks=made.masks,
        groups=GROUPS,
        group_distribution=explicit,
    )
    again.initialize(weights)
    widths = {name: len(units) for name, units in units_of(again, "s50").items()}
    assert widths["g1"] == 12
    assert sum(widths.values()) == 18


def test_without_groups_a_channel_sub_net_is_refused() -> None:
    with pytest.raises(ConfigError, match="sub-net 's25' has pattern 'channel', and there is no channel group"):
        updater(GMP, random_weights(), ChannelGroups(groups=()))
    weights = random_weights()
    plain = updater(GMP, weights, sparsities=(0.5,), pattern="unstructured")
    with pytest.raises(ConfigError, match="no channel groups"):
        plain.kept_units("s50")
    assert plain.achieved("s50") == plain.masks.sparsity("s50")


def test_beside_channel_sub_nets_others_drop_single_weights() -> None:
    weights = random_weights()
    from ast_plugin.sub_nets import SubNetSpec

    mixed = (SubNetSpec(sparsity=0.5, name="narrow"), SubNetSpec(sparsity=0.5, name="sparse", pattern="unstructured"))
    made = updater(GMP, weights, sparsities=mixed, initial_sparsity=None)
    for name in ("narrow", "sparse"):
        made.update(name, 12, weights, None)
    assert made.achieved("narrow") == 0.5
    assert made.masks.sparsity("narrow") > 0.6  # rows and columns
    assert made.masks.sparsity("sparse") == pytest.approx(0.5, abs=0.01)
    assert not made.masks.get("sparse", "w0").all(1).any()

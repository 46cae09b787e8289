"""Distributions: small networks by hand, exact sums over a grid, and what cannot be met."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_plugin.distributions import (
    DistributionRequest,
    ExplicitDistribution,
    LayerRequest,
    erk,
    global_magnitude,
    kept_units,
    uniform,
)
from ast_plugin.errors import ConfigError
from ast_plugin.patterns import parse_pattern

NETWORK = {"stem.weight": (16, 3, 3, 3), "block.conv.weight": (32, 16, 3, 3), "block.short.weight": (32, 16, 1, 1)}
NETWORK |= {"neck.weight": (64, 32), "head.weight": (10, 64)}
SPARSITIES = (0.0, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99)


def request_for(shapes, sparsity, *, pattern="unstructured", scores=None, target=None, sub_net="s90"):
    """Return a request for layers of these shapes; scores by layer, or random ones."""
    units_of = parse_pattern(pattern)
    names = list(shapes) if isinstance(shapes, dict) else [f"layer{i}.weight" for i in range(len(shapes))]
    sizes = list(shapes.values()) if isinstance(shapes, dict) else list(shapes)
    generator = torch.Generator().manual_seed(0)
    layers = [LayerRequest(name=n, shape=s, units=units_of.unit_count(s)) for n, s in zip(names, sizes, strict=True)]
    given = scores or [torch.rand(layer.units, generator=generator) for layer in layers]
    return DistributionRequest(
        layers=tuple(layers),
        sparsity=sparsity,
        target_sparsity=sparsity if target is None else target,
        sub_net=sub_net,
        unit_scores=lambda: given,
    )


def no_scores():
    raise AssertionError("this distribution must not look at scores")


def overall(request, sparsities):
    return sum(s * layer.weights for s, layer in zip(sparsities, request.layers, strict=True)) / request.weights


def test_uniform_is_the_same_everywhere():
    assert uniform(request_for([(4, 4), (2, 3)], 0.9)) == [0.9, 0.9]


def test_erk_by_hand():
    # Shapes (2, 8) and (8, 8), 16 and 64 weights; raw densities (2 + 8) / 16 = 5/8 and 16 / 64 = 1/4. Kept in all at
    # 0.75: 20. Scale: 20 / (16 * 5/8 + 64 * 1/4) = 20 / 26 = 10/13; densities 50/104 and 10/52.
    assert erk(request_for([(2, 8), (8, 8)], 0.75)) == pytest.approx([1 - 50 / 104, 1 - 10 / 52])


def test_erk_makes_full_layers_dense_and_solves_the_rest_again():
    # Raw 3/2 (two weights), 5/8 (16), 1/4 (64); kept at 0.5: 41 of 82. The first scale, 41 / 29, would make layer 0
    # 2.1 dense; without it 39 / 26 = 1.5 gives layer 1 15/16 and layer 2 3/8.
    assert erk(request_for([(1, 2), (2, 8), (8, 8)], 0.5)) == pytest.approx([0.0, 1 / 16, 5 / 8])


def test_erk_counts_the_kernel_dimensions():
    # (8, 4, 3, 3): 18 / 288; (8, 4): 12 / 32. Kept 32: scale 32 / 30.
    sparsities = erk(request_for([(8, 4, 3, 3), (8, 4)], 0.9))
    assert sparsities == pytest.approx([1 - 18 / 288 * 32 / 30, 1 - 12 / 32 * 32 / 30])


@pytest.mark.parametrize("shapes", [[(1, 1)], [(3, 4)], [(1, 1), (1, 1), (1, 1)], list(NETWORK.values())])
@pytest.mark.parametrize("sparsity", [0.0, 1e-12, 0.3, 0.5, 1 - 1e-9, 1.0])
def test_erk_on_tiny_and_dense_networks(shapes, sparsity):
    request = request_for(shapes, sparsity)
    sparsities = erk(request)
    assert all(0 <= s <= 1 for s in sparsities)
    assert overall(request, sparsities) == pytest.approx(sparsity, abs=1e-9)


def test_global_magnitude_by_hand():
    # Four of nine are kept, the best four: 9, 8, 7, and of the two fives that of the earlier layer.
    scores = [torch.tensor([9.0, 5.0, 1.0]), torch.tensor([8.0, 7.0, 5.0, 2.0, 1.0, 0.0])]
    request = request_for([(1, 3), (2, 3)], 5 / 9, scores=scores)
    assert global_magnitude(request) == pytest.approx([1 / 3, 4 / 6])
    assert kept_units(request, global_magnitude(request), allow_empty_layers=True) == [2, 2]


def test_global_magnitude_weighs_channels_by_their_size():
    # Channels of 4 and of 1 weights, 12 weights in all, 6 wanted. By score: 4 (layer 0), 1 and 1 (layer 1): 6 reached.
    scores = [torch.tensor([9.0, 1.0]), torch.tensor([8.0, 7.0, 0.5, 0.4])]
    request = request_for([(2, 4), (4, 1)], 0.5, pattern="channel", scores=scores)
    assert kept_units(request, global_magnitude(request), allow_empty_layers=True) == [1, 2]
    # 10 wanted: 4 + 1 + 1 = 6, and 4 more are exactly 10.
    request = request_for([(2, 4), (4, 1)], 2 / 12, pattern="channel", scores=scores)
    assert kept_units(request, global_magnitude(request), allow_empty_layers=True) == [2, 2]


def test_only_global_magnitude_looks_at_scores():
    request = request_for(NETWORK, 0.9)
    object.__setattr__(request, "unit_scores", no_scores)
    for distribution in (uniform, erk, ExplicitDistribution({"head*": 0.5})):
        distribution(request)
    with pytest.raises(AssertionError, match="must not look at scores"):
        global_magnitude(request)


@pytest.mark.parametrize(
    "distribution",
    [uniform, erk, global_magnitude, ExplicitDistribution({"head.*": 0.985, "stem*": {"s90": 0.97}})],
    ids=["uniform", "erk", "global", "explicit"],
)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("allow_empty_layers", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "channel"])
def test_kept_counts_are_exact(distribution, sparsity, allow_empty_layers, pattern):
    request = request_for(NETWORK, sparsity, pattern=pattern, target=0.99)
    sizes = [layer.unit_size for layer in request.layers]
    if not allow_empty_layers and sum(sizes) > request.kept_weights + max(sizes) / 2:
        with pytest.raises(ConfigError, match="allow_empty_layers=True"):
            kept_units(request, distribution(request), allow_empty_layers=allow_empty_layers)
        return
    sparsities = distribution(request)
    kept = kept_units(request, sparsities, allow_empty_layers=allow_empty_layers)
    reached = sum(count * size for count, size in zip(kept, sizes, strict=True))
    assert abs(reached - request.kept_weights) <= (0 if pattern == "unstructured" else max(sizes) / 2 + 1e-6)
    assert all(
        (0 if allow_empty_layers else 1) <= c <= layer.units for c, layer in zip(kept, request.layers, strict=True)
    )
    if pattern == "unstructured" and distribution is not global_magnitude:
        # Largest remainders: nobody is further from the share than one unit, but for layers saved from being empty.
        assert all(
            abs(count - (1 - s) * layer.units) < 1 + len(kept)
            for count, s, layer in zip(kept, sparsities, request.layers, strict=True)
        )


def test_largest_remainders_by_hand():
    # Shares 0.3 * 5 = 1.5, 0.3 * 7 = 2.1, 0.3 * 8 = 2.4, sum 6: whole parts 1, 2, 2, and the one missing goes to .5.
    request = request_for([(1, 5), (1, 7), (1, 8)], 0.7)
    assert kept_units(request, [0.7] * 3, allow_empty_layers=True) == [2, 2, 2]


def test_equal_remainders_go_to_the_earlier_layers():
    # Four shares of 0.5, two to give.
    request = request_for([(1, 5)] * 4, 0.9)
    assert kept_units(request, [0.9] * 4, allow_empty_layers=True) == [1, 1, 0, 0]


def test_a_layer_that_would_be_emptied_takes_a_weight_from_a_fuller_one():
    # Shares 10, 0.05 and 9.95: the second keeps one, and the sum stays 20.
    request = request_for([(10, 10), (1, 2), (10, 10)], 1 - 20 / 202)
    assert kept_units(request, [0.9, 0.975, 0.9005], allow_empty_layers=True) == [10, 0, 10]
    assert sum(kept_units(request, [0.9, 0.975, 0.9005], allow_empty_layers=False)) == 20
    assert kept_units(request, [0.9, 0.975, 0.9005], allow_empty_layers=False)[1] == 1


def test_more_layers_than_weights_to_keep_is_refused():
    request = request_for([(2, 5)] * 4, 0.95)  # 2 of 40
    with pytest.raises(
        ConfigError, match=r"sparsity 0.95 of sub-net 's90' keeps 2 of 40 weights.* each of the 4 layers"
    ):
        kept_units(request, uniform(request), allow_empty_layers=False)
    assert kept_units(request, uniform(request), allow_empty_layers=True) == [1, 1, 0, 0]


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8),
    sparsity=st.floats(0, 0.999),
    allow_empty_layers=st.booleans(),
)
def test_sums_are_exact_for_any_network(shapes, sparsity, allow_empty_layers):
    request = request_for(shapes, sparsity)
    for distribution in (uniform, erk, global_magnitude):
        if not allow_empty_layers and request.kept_weights < len(shapes):
            with pytest.raises(ConfigError, match="is not one weight in each of the"):
                kept_units(request, distribution(request), allow_empty_layers=False)
            continue
        kept = kept_units(request, distribution(request), allow_empty_layers=allow_empty_layers)
        assert sum(kept) == request.kept_weights
        assert all(0 <= count <= math.prod(shape) for count, shape in zip(kept, shapes, strict=True))


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        ([0.5], "gave 1 sparsities for 2 layers"),
        ([0.5, 1.5], "gave layer1.weight the sparsity 1.5; it must lie in"),
        ([0.5, math.nan], "gave layer1.weight the sparsity nan"),
        ([0.1, 0.1], "are 0.1 overall, but sub-net 's90' asks for 0.5"),
    ],
)
def test_what_a_distribution_may_not_answer(sparsities, message):
    with pytest.raises(ConfigError, match=message):
        kept_units(request_for([(8, 8), (8, 8)], 0.5), sparsities, allow_empty_layers=True)


def test_explicit_by_hand():
    # 100 + 100 + 200 weights at 0.9: 360 zeros. 85 are in a and 95 in b, so c has the other 180 of its 200.
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10), "c.weight": (10, 20)}
    request = request_for(shapes, 0.9)
    assert ExplicitDistribution({"a.*": 0.85, "b.*": 0.95})(request) == pytest.approx([0.85, 0.95, 0.9])


def test_explicit_scales_along_the_ramp():
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    # Half-way to 0.9, half of a's 0.8; b takes the rest: (0.9 - 0.4).
    request = request_for(shapes, 0.45, target=0.9)
    assert ExplicitDistribution({"a.*": 0.8})(request) == pytest.approx([0.4, 0.5])
    assert ExplicitDistribution({"a.*": 0.8})(request_for(shapes, 0.0, target=0.9)) == [0.0, 0.0]


def test_explicit_values_may_differ_between_sub_nets():
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    distribution = ExplicitDistribution({"a.*": {"s90": 0.85, "s95": 0.93}})
    assert distribution(request_for(shapes, 0.9)) == pytest.approx([0.85, 0.95])
    assert distribution(request_for(shapes, 0.95, sub_net="s95")) == pytest.approx([0.93, 0.97])
    assert distribution(request_for(shapes, 0.98, sub_net="s98")) == pytest.approx([0.98, 0.98])


def test_the_first_glob_that_matches_decides():
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    distribution = ExplicitDistribution({"a.*": 0.7, "*": {"s50": 0.5}})
    assert distribution(request_for(shapes, 0.8)) == pytest.approx([0.7, 0.9])


def test_explicit_for_every_layer_must_agree_with_the_sub_net():
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    assert ExplicitDistribution({"*": 0.9})(request_for(shapes, 0.9)) == [0.9, 0.9]
    with pytest.raises(ConfigError, match=r"every layer a sparsity, 0.8 overall, but sub-net 's90' has sparsity 0.9"):
        ExplicitDistribution({"*": 0.8})(request_for(shapes, 0.9))


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        # 180 zeros wanted of 200; a at 0.5 leaves 130 for the 100 of b.
        ({"a.*": 0.5}, r"would need sparsity 1.3, outside \[0, 1\]; raise the sparsities it gives"),
        ({"a.*": 0.1, "b.*": {"s95": 0.5}}, "would need sparsity 1.7"),
        ({"c.*": 0.5}, r"distribution\['c.\*'\] matches no pruned parameter: .*Known: a.weight, b.weight"),
        ({"a.wight": 0.5}, "did you mean 'a.weight'"),
    ],
)
def test_explicit_sparsities_that_cannot_be_met(sparsities, message):
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    with pytest.raises(ConfigError, match=message):
        ExplicitDistribution(sparsities)(request_for(shapes, 0.9))


def test_explicit_sparsities_above_the_sub_nets_own():
    # 20 zeros wanted of 200; a at 0.9 has 90 already.
    shapes = {"a.weight": (10, 10), "b.weight": (10, 10)}
    with pytest.raises(ConfigError, match=r"would need sparsity -0.7, outside \[0, 1\]; lower the sparsities it gives"):
        ExplicitDistribution({"a.*": 0.9})(request_for(shapes, 0.1))


@pytest.mark.parametrize("value", [1.0, -0.1, {"s90": 1.5}, math.nan])
def test_explicit_sparsities_out_of_range_are_refused(value):
    with pytest.raises(ConfigError, match=r"distribution\['a'\] must hold fractions of zeros in \[0, 1\)"):
        ExplicitDistribution({"a": value})


@pytest.mark.parametrize("answer", [None, ["0.5"], (x for x in [0.5]), 0.5])
def test_an_answer_that_is_no_list_of_sparsities_is_refused(answer: Any) -> None:
    layer = LayerRequest(name="w", shape=(4, 4), units=16)
    request = DistributionRequest(
        layers=(layer,), sparsity=0.5, target_sparsity=0.5, sub_net="s50", unit_scores=lambda: []
    )
    with pytest.raises(ConfigError, match="it must give a list of one sparsity a layer"):
        kept_units(request, answer, allow_empty_layers=False)

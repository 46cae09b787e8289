"""What every pattern promises, tried on all of them; and unstructured masks and names by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_plugin.errors import ConfigError
from ast_plugin.patterns import (
    BlockPattern,
    ChannelPattern,
    NMPattern,
    UnstructuredPattern,
    nearest_count,
    parse_pattern,
)

NAMES = ["unstructured", "2:4", "1:4", "1:8", "3:37", "2:40", "4x4", "2x3", "1x1", "16x16", "channel"]
SHAPES = [(4, 6), (3, 5, 3, 3), (8, 1, 3, 3), (1, 1), (5, 64, 1, 1), (2, 37, 3)]


def scores_of(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=NAMES)
def pattern(request):
    return parse_pattern(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def test_one_score_a_unit_and_masks_there_and_back(pattern, shape):
    units = pattern.unit_count(shape)
    assert pattern.unit_scores(scores_of(shape)).shape == (units,)
    flags = scores_of((units,), seed=1) > 0
    mask = pattern.expand(flags, shape)
    assert mask.shape == torch.Size(shape)
    assert mask.dtype == torch.bool
    assert torch.equal(pattern.reduce_mask(mask), flags)


def test_keeps_what_it_says_it_keeps(pattern, shape):
    unit_scores = pattern.unit_scores(scores_of(shape))
    for sparsity in (0.0, 0.1, 0.5, 0.75, 0.9, 1.0):
        count = pattern.kept_units(shape, sparsity)
        assert int(pattern.keep_top(unit_scores, count, shape).sum()) == count
    assert pattern.kept_units(shape, 0.0) == pattern.unit_count(shape)


def test_regrowth_keeps_the_count_and_its_input(pattern, shape):
    unit_scores = pattern.unit_scores(scores_of(shape))
    grow_scores = scores_of(unit_scores.shape, seed=2)
    for sparsity in (0.0, 0.5, 0.9):
        kept = pattern.keep_top(unit_scores, pattern.kept_units(shape, sparsity), shape)
        before = kept.clone()
        for count in (-1, 0, 1, int(kept.sum()) // 2, int(kept.sum()), 10_000):
            regrown = pattern.regrow(kept, unit_scores, grow_scores, count, shape)
            assert int(regrown.sum()) == int(kept.sum())
            assert int((regrown & ~kept).sum()) <= max(count, 0)
            assert torch.equal(kept, before)
            regrown.logical_not_()  # shares no memory with the input
            assert torch.equal(kept, before)


def test_scores_of_any_kind_are_safe(pattern, shape):
    clean = scores_of(shape)
    for value in (math.nan, math.inf, -math.inf, 0.0):
        scores = clean.masked_fill(scores_of(shape, seed=3) > 0.3, value)
        unit_scores = pattern.unit_scores(scores)
        count = pattern.kept_units(shape, 0.6)
        kept = pattern.keep_top(unit_scores, count, shape)
        assert int(kept.sum()) == count
        assert int(pattern.regrow(kept, unit_scores, unit_scores, count // 2, shape).sum()) == count


def test_half_precision_and_memory_layout_make_no_difference(pattern, shape):
    scores = (scores_of(shape) * 8).round() / 8  # the same numbers in every dtype, with ties
    expected = pattern.unit_scores(scores)
    count = pattern.kept_units(shape, 0.6)
    kept = pattern.keep_top(expected, count, shape)
    dims = list(range(len(shape)))
    reversed_layout = scores.permute(dims[::-1]).contiguous().permute(dims[::-1])
    for other in (scores.half(), scores.bfloat16(), scores.double(), reversed_layout):
        unit_scores = pattern.unit_scores(other)
        assert torch.allclose(unit_scores.double(), expected.double(), rtol=1e-6, atol=1e-6)
        assert torch.equal(pattern.keep_top(unit_scores.to(expected.dtype), count, shape).sum(), kept.sum())
    mask = pattern.expand(kept, shape)
    reversed_mask = mask.permute(dims[::-1]).contiguous().permute(dims[::-1])
    assert torch.equal(pattern.reduce_mask(reversed_mask), kept)


def test_the_same_scores_give_the_same_mask(pattern, shape):
    unit_scores = pattern.unit_scores(scores_of(shape).round())
    count = pattern.kept_units(shape, 0.5)
    first, again = (pattern.keep_top(unit_scores.clone(), count, shape) for _ in range(2))
    assert torch.equal(first, again)


def test_impossible_counts_are_refused(pattern, shape):
    unit_scores = pattern.unit_scores(scores_of(shape))
    for count in (-1, unit_scores.numel() + 1):
        with pytest.raises(ConfigError, match=rf"count must lie in \[0, {unit_scores.numel()}\].* got {count}"):
            pattern.keep_top(unit_scores, count, shape)


def test_weights_without_outputs_and_inputs_are_refused(pattern):
    if pattern.name != "unstructured":
        with pytest.raises(
            ConfigError, match=rf"pattern '{pattern.name}' needs a weight.* but fc.bias has shape \(4,\)"
        ):
            pattern.check("fc.bias", (4,))
    with pytest.raises(ConfigError, match=r"but empty has shape \(0, 4\); leave it out with exclude=\('empty',\)"):
        pattern.check("empty", (0, 4))
    pattern.check("fc.weight", (4, 6))


def test_unstructured_takes_the_weights_as_they_lie():
    pattern = UnstructuredPattern()
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    unit_scores = pattern.unit_scores(scores)
    assert unit_scores.data_ptr() == scores.data_ptr()
    # 0.9 first, and of the two halves the lower index.
    assert pattern.expand(pattern.keep_top(unit_scores, 2, (2, 2)), (2, 2)).tolist() == [[False, True], [True, False]]
    pattern.check("vector", (4,))


def test_regrowth_by_hand():
    # Kept 0-3. Dropped: the lowest two of 5, 1, 2, 4, so 1 and 2. Candidates to grow: 1 (7), 2 (0), 4 (9), 5 (3).
    kept = torch.tensor([True, True, True, True, False, False])
    drop_scores = torch.tensor([5.0, 1.0, 2.0, 4.0, 100.0, 100.0])
    grow_scores = torch.tensor([50.0, 7.0, 0.0, 50.0, 9.0, 3.0])
    regrown = UnstructuredPattern().regrow(kept, drop_scores, grow_scores, 2, (6, 1))
    assert regrown.tolist() == [True, True, False, True, True, False]


def test_regrowth_breaks_ties_by_index_and_drops_nan_first():
    kept = torch.tensor([True, True, True, False, False])
    # Dropped: NaN first, then of the equal 0 and 1 the higher index. Grown: of the equal candidates 1-4 the first two.
    drop_scores = torch.tensor([1.0, 1.0, math.nan, 0.0, 0.0])
    regrown = UnstructuredPattern().regrow(kept, drop_scores, torch.zeros(5), 2, (5, 1))
    assert regrown.tolist() == [True, True, True, False, False]
    regrown = UnstructuredPattern().regrow(kept, drop_scores, torch.tensor([0.0, -1.0, -1.0, 2.0, 2.0]), 2, (5, 1))
    assert regrown.tolist() == [True, False, False, True, True]


def test_a_planted_weight_with_the_largest_gradient_is_grown():
    weight, gradient = scores_of((20, 30)).abs(), scores_of((20, 30), seed=1).abs()
    pattern = UnstructuredPattern()
    kept = pattern.keep_top(weight.view(-1), 60, (20, 30))
    planted = int((~kept).nonzero()[100])
    gradient.view(-1)[planted] = 1000.0
    assert pattern.regrow(kept, weight.view(-1), gradient.view(-1), 1, (20, 30))[planted]


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 10**8), sparsity=st.floats(0, 1))
def test_the_nearest_count_is_the_nearest(total, sparsity):
    count = nearest_count(total, sparsity)
    assert 0 <= count <= total
    assert abs(count - (1 - sparsity) * total) <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("total", "sparsity", "count"),
    # The third and fourth are true halves, whatever binary fractions make of them.
    [(10, 0.9, 1), (1000, 0.98, 20), (10, 0.95, 1), (5, 0.9, 1), (7, 0.0, 7), (7, 1.0, 0), (4, 0.6, 2)],
)
def test_halves_are_rounded_up(total, sparsity, count):
    assert nearest_count(total, sparsity) == count


def test_names_give_patterns_and_patterns_names():
    assert parse_pattern("unstructured") == UnstructuredPattern()
    assert parse_pattern("channel") == ChannelPattern()
    assert parse_pattern("2:4") == NMPattern(n=2, m=4)
    assert parse_pattern("8x1") == BlockPattern(rows=8, columns=1)
    assert [parse_pattern(name).name for name in NAMES] == NAMES
    fixed = {name: parse_pattern(name).fixed_sparsity for name in NAMES}
    assert fixed["2:4"] == 0.5
    assert fixed["1:8"] == 0.875
    assert fixed["unstructured"] is fixed["4x4"] is fixed["channel"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructerd", "unknown pattern 'unstructerd': did you mean 'unstructured'?"),
        ("chanel", "unknown pattern 'chanel': did you mean 'channel'?"),
        ("4 x 4", "unknown pattern '4 x 4'.*rows x columns"),
        ("", "unknown pattern ''.*Known: 2:4, 4x4, channel, unstructured"),
        ("4:2", "pattern entry '4:2' keeps 4 of every 2 weights.*did you mean '2:4'?"),
        ("0:4", "N must be at least 1"),
        ("0x4", "pattern '0x4' has empty blocks; give at least 1 row and 1 column"),
        ("4x0", "pattern '4x0' has empty blocks"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (0, 4), (-1, 4), (5, 4)])
def test_n_of_m_must_leave_something_and_drop_something(n, m):
    with pytest.raises(ConfigError, match="pattern entry"):
        NMPattern(n=n, m=m)

"""Exact selection, compared with a plain sort of (is a number, score, -index) on every kind of score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_plugin import selection_kernels
from ast_plugin.errors import ConfigError
from ast_plugin.selection_kernels import (
    count_kept,
    counts_above_global_threshold,
    keep_largest,
    kth_largest,
    ordered_keys,
)

KINDS = ("normal", "few values", "half zeros", "constant", "nan", "all nan", "infinite", "signed zeros")


@pytest.fixture(params=["gathered", "bracketed"])
def small_blocks(request, monkeypatch):
    """Run twice: as vectors of this size do, and with samples, brackets and blocks as millions of scores have them."""
    if request.param == "bracketed":
        monkeypatch.setattr(selection_kernels, "_GATHER_ALL", 10)
        monkeypatch.setattr(selection_kernels, "_LEAST_SAMPLE", 8)
        monkeypatch.setattr(selection_kernels, "_BLOCK", 64)


def make(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores, dice = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    if kind == "few values":
        return (2 * scores).round()
    if kind == "half zeros":
        return scores.clamp(min=0)
    if kind == "constant":
        return torch.ones(size)
    if kind == "nan":
        return scores.masked_fill(dice < 0.3, math.nan)
    if kind == "all nan":
        return torch.full((size,), math.nan)
    if kind == "infinite":
        scores = scores.masked_fill(dice < 0.3, math.inf).masked_fill(dice > 0.7, -math.inf)
        return scores.masked_fill((dice > 0.4) & (dice < 0.5), math.nan)
    if kind == "signed zeros":
        return torch.where(dice < 0.5, -0.0, 0.0)
    return scores


def by_sorting(scores, count, among=None):
    """Return what `keep_largest` promises, the slow and plain way."""
    values = scores.double().tolist()
    indices = [i for i in range(len(values)) if among is None or among[i]]
    indices.sort(key=lambda i: (math.isnan(values[i]), 0.0 if math.isnan(values[i]) else -values[i], i))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[indices[:count]] = True
    return mask


def test_the_largest_by_hand():
    # Descending: 9 (index 3), 5 (index 0), 5 (index 4), 2, 1. Of the two fives the lower index goes first.
    scores = torch.tensor([5.0, 1.0, 2.0, 9.0, 5.0])
    assert keep_largest(scores, 2).tolist() == [True, False, False, True, False]
    assert keep_largest(scores, 3).tolist() == [True, False, False, True, True]


def test_nan_is_worse_than_minus_infinity():
    scores = torch.tensor([math.nan, -math.inf, math.nan, 0.0])
    assert keep_largest(scores, 2).tolist() == [False, True, False, True]
    assert keep_largest(scores, 3).tolist() == [True, True, False, True]


def test_only_those_among_are_chosen():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0])
    among = torch.tensor([False, True, False, True])
    assert keep_largest(scores, 1, among=among).tolist() == [False, True, False, False]
    assert keep_largest(scores, 2, among=among).tolist() == among.tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_exact_count_and_order_for_every_kind_of_score(kind, dtype):
    for size in (1, 2, 65, 400):
        scores = make(kind, size).to(dtype)
        for among in (None, torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.4):
            total = size if among is None else int(among.sum())
            for count in {0, min(1, total), total // 10, total // 2, max(total - 1, 0), total}:
                mask = keep_largest(scores, count, among=among)
                assert mask.dtype == torch.bool
                assert torch.equal(mask, by_sorting(scores, count, among))
                if count:
                    assert torch.equal(selection_kernels._keep_largest_sorted(scores, count, among), mask)


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=60),
    share=st.floats(0, 1),
    flags=st.none() | st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_any_scores_are_selected_as_by_sorting(scores, share, flags):
    values = torch.tensor(scores, dtype=torch.float32)
    among = None if flags is None else torch.tensor(flags[: len(scores)])
    count = round(share * (len(scores) if among is None else int(among.sum())))
    assert torch.equal(keep_largest(values, count, among=among), by_sorting(values, count, among))


@pytest.mark.parametrize(
    ("low", "high"), [(5.0, 9.0), (-9.0, -5.0), (0.0, 0.0), (math.inf, math.inf), (-math.inf, -math.inf)]
)
def test_a_bracket_that_misses_costs_time_but_not_exactness(monkeypatch, low, high):
    scores = make("normal", 500)
    honest = selection_kernels._bracket
    monkeypatch.setattr(selection_kernels, "_GATHER_ALL", 10)
    monkeypatch.setattr(
        selection_kernels,
        "_bracket",
        lambda arrays, share, width, *rest: (low, high) if width < 10 else honest(arrays, share, width, *rest),
    )
    for count in (1, 50, 250, 499):
        assert torch.equal(keep_largest(scores, count), by_sorting(scores, count))


def test_scores_in_step_with_the_sample_are_selected_exactly(monkeypatch):
    monkeypatch.setattr(selection_kernels, "_GATHER_ALL", 10)
    monkeypatch.setattr(selection_kernels, "_LEAST_SAMPLE", 8)
    for period in (2, 3, 9, 64):
        scores = (torch.arange(3000) % period).float()
        for count in (10, 1000, 2990):
            assert torch.equal(keep_largest(scores, count), by_sorting(scores, count))


def test_a_sample_that_meets_none_of_those_among(monkeypatch):
    monkeypatch.setattr(selection_kernels, "_GATHER_ALL", 10)
    monkeypatch.setattr(selection_kernels, "_LEAST_SAMPLE", 8)
    monkeypatch.setattr(selection_kernels, "_SAMPLE_SCALE", 0.0)
    scores = make("normal", 4000)
    among = torch.zeros(4000, dtype=torch.bool)
    among[1:100:4] = True  # 25 in one corner
    for count in (1, 12, 24):
        assert torch.equal(keep_largest(scores, count, among=among), by_sorting(scores, count, among))


def test_large_vector_has_the_exact_threshold():
    scores = make("normal", 300_000).abs()
    for count in (30, 30_000, 150_000, 299_000):
        mask = keep_largest(scores, count)
        assert int(mask.sum()) == count
        assert scores[mask].min() >= scores[~mask].max()


def test_non_contiguous_scores_and_scores_with_a_graph():
    scores = make("normal", 200)
    strided = torch.stack([scores, -scores], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(keep_largest(strided, 50), keep_largest(scores, 50))
    assert torch.equal(keep_largest(scores.clone().requires_grad_(), 50), keep_largest(scores, 50))


def test_input_is_left_alone_and_results_share_no_memory():
    scores, among = make("infinite", 300), torch.ones(300, dtype=torch.bool)
    before = scores.clone()
    keep_largest(scores, 300, among=among).fill_(False)
    keep_largest(scores, 20, among=among).fill_(False)
    assert torch.equal(scores.nan_to_num(7), before.nan_to_num(7))
    assert bool(among.all())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_a_global_threshold_are_those_of_one_long_vector(kind):
    sizes = [5, 0, 300, 33, 1]
    chunks = [make(kind, size, seed) for seed, size in enumerate(sizes)]
    together = torch.cat(chunks)
    for count in (0, 1, 5, 100, 170, 338, 339):
        expected = [int(part.sum()) for part in by_sorting(together, count).split(sizes)]
        assert counts_above_global_threshold(chunks, count) == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_and_how_many_are_better(kind):
    chunks = [make(kind, size, seed) for seed, size in enumerate((40, 300))]
    together = torch.cat(chunks)
    for count in (1, 7, 170, 340):
        value, better = kth_largest(chunks, count)
        expected = float(together[by_sorting(together, count) ^ by_sorting(together, count - 1)])
        assert value == expected or (math.isnan(value) and math.isnan(expected))
        if math.isnan(expected):
            assert better == int((~together.isnan()).sum())
        else:
            assert better == int((together > expected).sum())
        sorted_cut = selection_kernels._cut_sorted(chunks, count)
        quick_cut = selection_kernels._cut([chunk.numpy() for chunk in chunks], count, 340)
        assert (sorted_cut.better, sorted_cut.equal) == (quick_cut.better, quick_cut.equal)
        assert sorted_cut.value == value or math.isnan(value)


def test_equal_scores_go_to_the_earlier_chunk():
    # Four ones among three chunks; of the best three, two lie in the first chunk and one in the second.
    chunks = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0]), torch.tensor([1.0])]
    assert counts_above_global_threshold(chunks, 3) == [2, 1, 0]


def test_chunks_of_different_dtypes_are_compared_by_value():
    # 1/3 is 0.33325 in float16, 0.333333333333 in float64 and 0.33333334 in float32.
    chunks = [torch.tensor([1 / 3], dtype=dtype) for dtype in (torch.float16, torch.float64, torch.float32)]
    assert counts_above_global_threshold(chunks, 1) == [0, 0, 1]
    assert counts_above_global_threshold(chunks, 2) == [0, 1, 1]
    cut = selection_kernels._cut_sorted(chunks, 2)
    assert (cut.better, cut.equal) == ([0, 0, 1], [0, 1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_keys_are_ordered_as_the_scores(dtype):
    scores = torch.tensor([math.nan, -math.inf, -2.0, -1e-3, -0.0, 0.0, 1e-3, 2.0, math.inf], dtype=dtype)
    keys = ordered_keys(scores)
    assert keys.dtype == (torch.int64 if dtype == torch.float64 else torch.int32)
    assert keys[4] == keys[5]
    kept = torch.cat([keys[:5], keys[6:]])
    assert torch.equal(kept, kept.sort().values)
    assert len(kept.unique()) == len(kept)
    assert keys[0] == torch.iinfo(keys.dtype).min + 1


def test_negative_nan_has_the_key_of_nan():
    negative = torch.from_numpy(np.array([0xFFC00000], dtype=np.uint32).view(np.float32))
    assert torch.equal(ordered_keys(negative), ordered_keys(torch.tensor([math.nan])))


def test_count_kept_counts_any_shape():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, ::2] = True
    assert count_kept(mask) == 2
    assert count_kept(mask.t()) == 2
    assert count_kept(mask[:0]) == 0


@pytest.mark.parametrize("count", [-1, 4])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ConfigError, match=rf"count must lie in \[0, 3\].* got {count}"):
        keep_largest(torch.ones(3), count)
    with pytest.raises(ConfigError, match=r"count must lie in \[0, 3\]"):
        counts_above_global_threshold([torch.ones(1), torch.ones(2)], count)
    with pytest.raises(ConfigError, match=r"count must lie in \[1, 3\]"):
        kth_largest([torch.ones(3)], 0)
    with pytest.raises(ConfigError, match=r"count must lie in \[0, 2\]"):
        keep_largest(torch.ones(3), 3, among=torch.tensor([True, False, True]))


@pytest.mark.parametrize("scores", [torch.ones(2, 2), torch.ones(3, dtype=torch.int64), torch.tensor(1.0)])
def test_what_is_no_vector_of_scores_is_refused(scores):
    with pytest.raises(ConfigError, match="scores must be a floating-point vector, got dtype torch"):
        keep_largest(scores, 1)
    with pytest.raises(ConfigError, match="scores must be a floating-point vector"):
        kth_largest([scores], 1)

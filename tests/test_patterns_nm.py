"""N:M masks: groups by hand along the inputs of linear and convolution weights, short groups, ramps, regrowth."""

from __future__ import annotations

import math

import pytest
import torch

from ast_plugin.patterns import NMPattern


def groups_of(mask, m):
    """Return (count kept, size) of every group along dimension 1, the plain way."""
    rows = mask.movedim(1, -1).reshape(-1, mask.shape[1])
    return [(int(part.sum()), part.shape[0]) for row in rows for part in row.split(m)]


def test_linear_by_hand():
    # Groups (1 4 2 3), (5 5 5 0): 4 and 3; of three equal fives the first two.
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0])
    mask = NMPattern(n=2, m=4).keep_top(scores, 4, (1, 8))
    assert mask.tolist() == [False, True, False, True, True, True, False, False]


def test_convolution_groups_run_along_the_inputs():
    # One output, 4 inputs, kernel 1x2. At place 0 inputs 0 and 1 are best, at place 1 inputs 2 and 3.
    scores = torch.tensor([[[[9.0, 1.0]], [[8.0, 2.0]], [[1.0, 9.0]], [[2.0, 8.0]]]])
    pattern = NMPattern(n=2, m=4)
    mask = pattern.expand(pattern.keep_top(pattern.unit_scores(scores), 4, (1, 4, 1, 2)), (1, 4, 1, 2))
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


def test_a_short_last_group_keeps_its_share_rounded_up():
    # 6 inputs at 1:4: one of the first four, and of the other two 2 * 1 / 4, rounded up to 1.
    pattern = NMPattern(n=1, m=4)
    assert pattern.kept_units((1, 6), 0.75) == 2
    mask = pattern.keep_top(torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 6.0]), 2, (1, 6))
    assert mask.tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 3, 3), (4, 1, 3, 3), (2, 41, 1), (3, 8, 2, 2)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (5, 40), (1, 300)])
def test_every_group_keeps_n_of_m(n, m, shape):
    pattern = NMPattern(n=n, m=m)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).round()
    count = pattern.kept_units(shape, pattern.fixed_sparsity)
    flags = pattern.keep_top(pattern.unit_scores(scores), count, shape)
    mask = pattern.expand(flags, shape)
    for kept, size in groups_of(mask, m):
        assert kept == math.ceil(size * n / m)
    # The best of each group, ties by index: compared with a stable sort of each group.
    for row, row_mask in zip(
        scores.movedim(1, -1).reshape(-1, shape[1]), mask.movedim(1, -1).reshape(-1, shape[1]), strict=True
    ):
        for part, part_mask in zip(row.split(m), row_mask.split(m), strict=True):
            order = sorted(range(len(part)), key=lambda i: (-float(part[i]), i))
            assert sorted(order[: int(part_mask.sum())]) == part_mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", [(2, 16), (3, 6, 2, 2)])
def test_a_ramp_goes_down_to_n_of_m_and_no_further(shape):
    pattern = NMPattern(n=2, m=8)
    scores = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(1))
    # m (1 - s) = 8, 6, 4, 2.8, 2 and then 0.4: the nearest whole number, at least 2.
    for sparsity, per_group in [(0.0, 8), (0.25, 6), (0.5, 4), (0.65, 3), (0.75, 2), (0.95, 2)]:
        mask = pattern.expand(pattern.keep_top(scores, pattern.kept_units(shape, sparsity), shape), shape)
        assert all(kept == math.ceil(size * per_group / 8) for kept, size in groups_of(mask, 8))


def test_a_count_in_between_takes_the_nearest_that_all_groups_can_share():
    pattern = NMPattern(n=1, m=4)
    scores = torch.arange(16.0)
    for count, kept in [(0, 4), (5, 4), (7, 8), (8, 8), (11, 12), (15, 16), (16, 16)]:
        assert int(pattern.keep_top(scores, count, (2, 8)).sum()) == kept


def test_regrowth_stays_within_the_group_by_hand():
    # 2:4, kept 0, 1 | 4, 5. The two lowest of all kept (1.0 at 0, 2.0 at 1) both go from the first group, so two grow
    # there: the best of 0-3 by grow score are 3 and 2, although 6 and 7 score higher.
    kept = torch.tensor([True, True, False, False, True, True, False, False])
    drop_scores = torch.tensor([1.0, 2.0, 0.0, 0.0, 8.0, 9.0, 0.0, 0.0])
    grow_scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 9.0, 9.0])
    regrown = NMPattern(n=2, m=4).regrow(kept, drop_scores, grow_scores, 2, (1, 8))
    assert regrown.tolist() == [False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 16), (2, 6, 3, 3), (5, 37)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 36)])
def test_regrowth_keeps_every_group_legal(n, m, shape, bad):
    pattern = NMPattern(n=n, m=m)
    generator = torch.Generator().manual_seed(2)
    drop_scores, grow_scores, dice = torch.rand(3, math.prod(shape), generator=generator)
    if bad is not None:
        drop_scores, grow_scores = (scores.masked_fill(dice < 0.4, bad) for scores in (drop_scores, grow_scores))
    kept = pattern.keep_top(drop_scores, pattern.kept_units(shape, pattern.fixed_sparsity), shape)
    before = groups_of(pattern.expand(kept, shape), m)
    for count in (1, int(kept.sum()) // 2, int(kept.sum())):
        regrown = pattern.regrow(kept, drop_scores, grow_scores, count, shape)
        assert groups_of(pattern.expand(regrown, shape), m) == before


def test_regrowth_prefers_any_number_to_nan_and_never_grows_a_survivor_twice():
    # 1:4. Weight 0 is dropped; among candidates NaN, -inf, NaN, NaN the -inf is the best.
    kept = torch.tensor([True, False, False, False])
    grow_scores = torch.tensor([math.nan, math.nan, -math.inf, math.nan])
    regrown = NMPattern(n=1, m=4).regrow(kept, torch.ones(4), grow_scores, 1, (1, 4))
    assert regrown.tolist() == [False, False, True, False]
    # 2:4 with all candidates at -inf: the survivor 1 is not counted again, the lowest index grows.
    kept = torch.tensor([False, True, True, False])
    regrown = NMPattern(n=2, m=4).regrow(kept, torch.tensor([0, 2.0, 1, 0]), torch.full((4,), -math.inf), 1, (1, 4))
    assert regrown.tolist() == [True, True, False, False]

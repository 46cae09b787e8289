"""Units of unequal size."""

from __future__ import annotations

import torch

from ast_plugin.patterns import BlockPattern, ChannelPattern, NMPattern, UnstructuredPattern
from ast_plugin.patterns_sizes import level, weights_in

# Blocks of 2 x 2 over a 3 x 5 weight: 4 4 2 above, 2 2 1 below.
SIZES = torch.tensor([4, 4, 2, 2, 2, 1])
SCORES = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])


def test_only_blocks_that_an_edge_cuts_off_have_unequal_sizes() -> None:
    assert BlockPattern(rows=2, columns=2).unit_sizes((3, 5)).tolist() == SIZES.tolist()
    assert BlockPattern(rows=2, columns=2).unit_sizes((4, 3, 2, 2)) is None
    for pattern in (UnstructuredPattern(), NMPattern(n=2, m=4), ChannelPattern()):
        assert pattern.unit_sizes((3, 5)) is None


def test_the_best_dropped_units_come_until_the_count_is_nearest() -> None:
    kept = torch.tensor([True, False, False, False, False, False])
    assert weights_in(kept, SIZES) == 4
    # 4 held; 6 more: 4 is 2 short, 4 + 2 meets it.
    assert level(kept, SIZES, SCORES, 10).tolist() == [True, True, True, False, False, False]
    # 1 more: adding 4 would be worse than adding nothing.
    assert level(kept, SIZES, SCORES, 5).tolist() == kept.tolist()
    assert kept.tolist() == [True, False, False, False, False, False]


def test_the_worst_kept_units_go_but_one_stays() -> None:
    kept = torch.tensor([True, True, True, True, True, True])
    # 15 held; 3 fewer: the worst are 1, then 2.
    assert level(kept, SIZES, SCORES, 12).tolist() == [True, True, True, True, False, False]
    assert level(kept, SIZES, SCORES, 0).tolist() == [True, False, False, False, False, False]
    nothing = torch.zeros(6, dtype=torch.bool)
    assert level(nothing, SIZES, SCORES, 0).tolist() == nothing.tolist()


def test_ties_and_nan_are_in_the_order_of_selection() -> None:
    sizes = torch.ones(4, dtype=torch.int64)
    scores = torch.tensor([1.0, float("nan"), 1.0, float("-inf")])
    nothing = torch.zeros(4, dtype=torch.bool)
    assert level(nothing, sizes, scores, 1).tolist() == [True, False, False, False]
    assert level(nothing, sizes, scores, 3).tolist() == [True, False, True, True]
    assert level(~nothing, sizes, scores, 2).tolist() == [True, False, True, False]

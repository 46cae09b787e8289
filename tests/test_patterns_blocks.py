"""Blocks and channels: unit scores, masks and edges by hand."""

from __future__ import annotations

import pytest
import torch

from ast_plugin.patterns import BlockPattern, ChannelPattern


def test_block_scores_are_means_over_the_weights_there_are():
    # 3x3 in blocks of 2x2: the last row and column make partial blocks of 2, 2 and 1 weights.
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    unit_scores = BlockPattern(rows=2, columns=2).unit_scores(scores)
    assert unit_scores.tolist() == [3.0, 4.5, 7.5, 9.0]


def test_block_mask_by_hand():
    pattern = BlockPattern(rows=2, columns=2)
    mask = pattern.expand(torch.tensor([True, False, False, True]), (3, 3))
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    # One weight is enough for its block to count as kept.
    lone = torch.zeros(3, 3, dtype=torch.bool)
    lone[2, 1] = True
    assert pattern.reduce_mask(lone).tolist() == [False, False, True, False]


def test_blocks_of_a_convolution_run_over_inputs_and_kernel():
    # (2, 2, 1, 3) is the matrix (2, 6): blocks of 2 x 4 are columns 0-3 and the partial 4-5.
    pattern = BlockPattern(rows=2, columns=4)
    assert pattern.unit_count((2, 2, 1, 3)) == 2
    mask = pattern.expand(torch.tensor([False, True]), (2, 2, 1, 3))
    assert mask.view(2, 6).int().tolist() == [[0, 0, 0, 0, 1, 1]] * 2


@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (3, 4, 3, 3), (1, 1), (20, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (2, 3), (16, 1), (1, 50)])
def test_block_masks_are_whole_blocks(rows, columns, shape):
    pattern = BlockPattern(rows=rows, columns=columns)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    unit_scores = pattern.unit_scores(scores)
    mask = pattern.expand(pattern.keep_top(unit_scores, (len(unit_scores) + 1) // 2, shape), shape)
    matrix, values = mask.view(shape[0], -1), scores.view(shape[0], -1)
    blocks = [
        (part.mean(), flags)
        for some_rows, some_flags in zip(values.split(rows), matrix.split(rows), strict=True)
        for part, flags in zip(some_rows.split(columns, 1), some_flags.split(columns, 1), strict=True)
    ]
    assert torch.allclose(unit_scores, torch.stack([mean for mean, _ in blocks]))
    assert all(bool(flags.all()) or not bool(flags.any()) for _, flags in blocks)


def test_channel_scores_and_masks_by_hand():
    pattern = ChannelPattern()
    scores = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, 1.0]])
    assert pattern.unit_scores(scores).tolist() == [2.0, 5.0, 0.5]
    mask = pattern.expand(torch.tensor([True, False, True]), (3, 2))
    assert mask.tolist() == [[True, True], [False, False], [True, True]]
    assert pattern.unit_count((3, 2, 5, 5)) == 3


def test_an_expanded_mask_can_be_written_to():
    for pattern, flags in ((ChannelPattern(), 3), (BlockPattern(rows=3, columns=2), 1)):
        mask = pattern.expand(torch.ones(flags, dtype=torch.bool), (3, 2))
        mask[0, 0] = False
        assert int(mask.sum()) == 5


def test_low_precision_sums_do_not_overflow():
    scores = torch.full((4, 4096), 60000.0, dtype=torch.float16)
    assert ChannelPattern().unit_scores(scores).tolist() == [60000.0] * 4
    assert BlockPattern(rows=4, columns=4096).unit_scores(scores).tolist() == [60000.0]

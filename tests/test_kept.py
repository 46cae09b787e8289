"""Which elements of a vector are kept: positions, masks, everything, and what two sets have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ast_plugin.kept import POSITIONS_UP_TO, Kept, KeptByMask, KeptByPosition, kept_elements

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BOTH_FORMS = pytest.mark.parametrize("form", [KeptByPosition, KeptByMask])

Form = Callable[[Tensor, list[int]], Kept]


def bools(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit, so that -0.0 differs from 0.0; any NaN equals any other, as copying may change bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    bits = [torch.where(t.isnan(), torch.full_like(t, math.nan), t).view(integers) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def test_positions_hand_out_the_kept_values_alone() -> None:
    kept = KeptByPosition(bools(0, 1, 0, 0, 1, 1), [6])
    vector = torch.tensor([10.0, 11.0, 12.0, 13.0, 14.0, 15.0])
    assert kept.positions.tolist() == [1, 4, 5]
    assert not kept.everything
    assert kept.values_of_dense(vector).tolist() == [11, 14, 15]
    assert vector.tolist() == [10, 11, 12, 13, 14, 15]
    assert kept.keep_only_(vector).tolist() == [11, 14, 15]
    assert vector.tolist() == [0, 11, 0, 0, 14, 15]
    assert kept.values(vector).tolist() == [11, 14, 15]
    kept.write(torch.tensor([1.0, 2.0, 3.0]), vector)
    assert vector.tolist() == [0, 1, 0, 0, 2, 3]


def test_a_mask_hands_out_the_whole_vector() -> None:
    mask = bools(0, 1, 0, 0, 1, 1)
    kept = KeptByMask(mask, [6])
    vector = torch.tensor([10.0, 11.0, 12.0, 13.0, 14.0, 15.0])
    assert not kept.everything
    assert kept.values_of_dense(vector).tolist() == [0, 11, 0, 0, 14, 15]
    assert vector.tolist() == [10, 11, 12, 13, 14, 15]
    assert kept.keep_only_(vector) is vector
    assert vector.tolist() == [0, 11, 0, 0, 14, 15]
    assert kept.values(vector) is vector
    kept.write(torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 3.0]), vector)
    assert vector.tolist() == [0, 1, 0, 0, 2, 3]
    assert mask.tolist() == [False, True, False, False, True, True]


def test_everything_leaves_the_vector_alone() -> None:
    kept = KeptByMask(None, [2, 1])
    vector = torch.tensor([1.0, -0.0, math.nan])
    before, version = vector.clone(), vector._version
    assert kept.everything
    assert kept.lengths == (2, 1)
    assert kept.keep_only_(vector) is vector
    assert kept.values(vector) is vector
    kept.write(vector, vector)
    assert vector._version == version
    copy = kept.values_of_dense(vector)
    assert same_bits(copy, before)
    copy.zero_()
    assert same_bits(vector, before)
    kept.write(torch.tensor([7.0, 8.0, 9.0]), vector)
    assert vector.tolist() == [7, 8, 9]


@BOTH_FORMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_kept_values_stays_and_all_others_become_plus_zero(form: Form, dtype: torch.dtype) -> None:
    special = [math.inf, -math.inf, math.nan, -0.0, 0.0, 1.5, torch.finfo(dtype).tiny, torch.finfo(dtype).max]
    # Every special value once inside and once outside.
    mask = bools(*[1] * 8, *[0] * 8)
    vector = torch.tensor(special * 2, dtype=dtype)
    expected = torch.cat([vector[:8], torch.zeros(8, dtype=dtype)])
    kept = form(mask, [16])
    from_dense = kept.values_of_dense(vector)
    values = kept.keep_only_(vector)
    assert same_bits(vector, expected)
    assert same_bits(values, from_dense)
    assert same_bits(kept.values(vector), from_dense)
    target = torch.zeros(16, dtype=dtype)
    kept.write(values, target)
    assert same_bits(target, expected)


def test_values_by_position_are_memory_of_their_own() -> None:
    kept = KeptByPosition(bools(1, 0, 1), [3])
    vector = torch.tensor([1.0, 2.0, 3.0])
    for values in (kept.values(vector), kept.values_of_dense(vector), kept.keep_only_(vector)):
        values.fill_(9)
        assert vector[0] == 1
        assert vector[2] == 3


def test_writing_through_a_mask_to_the_same_memory_does_nothing() -> None:
    # The values of a pack of one tensor are the gradient itself: a needless copy would count as a change of it.
    vector = torch.tensor([1.0, 0.0, 3.0])
    version = vector._version
    KeptByMask(bools(1, 0, 1), [3]).write(vector.detach(), vector)
    assert vector._version == version
    assert vector.tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("mask", "segments", "lengths"),
    [
        (bools(0, 1, 0, 0, 1, 1), [2, 4], (1, 2)),
        (bools(0, 1, 0, 0, 1, 1), [1, 1, 2, 2], (0, 1, 0, 2)),
        (bools(0, 1, 1), [0, 1, 0, 2, 0], (0, 0, 0, 2, 0)),
        (bools(1, 0, 0, 1), [1, 2, 1], (1, 0, 1)),
        (bools(0, 0, 0), [1, 2], (0, 0)),
        (bools(1, 1, 1), [1, 2], (1, 2)),
        (bools(), [0, 0], (0, 0)),
        (bools(), [], ()),
    ],
)
def test_lengths_by_position_count_what_each_segment_keeps(
    mask: Tensor, segments: list[int], lengths: tuple[int, ...]
) -> None:
    kept = KeptByPosition(mask, segments)
    assert kept.lengths == lengths
    assert all(type(length) is int for length in kept.lengths)
    parts = kept.values(torch.arange(float(len(mask)))).split(kept.lengths) if segments else ()
    assert len(parts) == len(segments)


def test_lengths_by_mask_are_the_segments() -> None:
    assert KeptByMask(bools(0, 1, 0, 0, 1, 1), [0, 2, 4]).lengths == (0, 2, 4)


@BOTH_FORMS
def test_nothing_kept_zeroes_everything(form: Form) -> None:
    kept = form(bools(0, 0, 0), [1, 2])
    assert not kept.everything
    vector = torch.tensor([math.inf, math.nan, -1.0])
    assert not kept.values_of_dense(vector).any()
    values = kept.keep_only_(vector)
    assert same_bits(vector, torch.zeros(3))
    kept.write(values, vector)
    assert same_bits(vector, torch.zeros(3))


@BOTH_FORMS
def test_an_empty_vector_has_no_values(form: Form) -> None:
    kept = form(bools(), [0])
    vector = torch.empty(0)
    assert kept.keep_only_(vector).shape == kept.values(vector).shape == kept.values_of_dense(vector).shape == (0,)
    kept.write(torch.empty(0), vector)


@settings(max_examples=60)
@given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_positions_and_masks_agree_segment_by_segment(data: st.DataObject, lengths: list[int]) -> None:
    total = sum(lengths)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    dense = torch.arange(1.0, total + 1)
    by_position, by_mask = KeptByPosition(mask, lengths), KeptByMask(mask, lengths)
    few = by_position.values_of_dense(dense).split(by_position.lengths)
    all_of_them = by_mask.values_of_dense(dense).split(by_mask.lengths)
    for short, long, part in zip(few, all_of_them, mask.split(lengths), strict=True):
        assert short.tolist() == long[part].tolist()
        assert not long[~part].any()
    one, other = dense.clone(), dense.clone()
    by_position.keep_only_(one)
    by_mask.keep_only_(other)
    assert torch.equal(one, other)


def test_one_in_eight_is_the_most_that_positions_are_used_for() -> None:
    assert POSITIONS_UP_TO == 1 / 8
    mask = torch.zeros(16, dtype=torch.bool)
    for count, form in [(0, KeptByPosition), (1, KeptByPosition), (2, KeptByPosition), (3, KeptByMask)]:
        mask[:count] = True
        kept = kept_elements(mask.clone(), count, [10, 6])
        assert type(kept) is form
        assert not kept.everything
        assert kept.values_of_dense(torch.ones(16)).sum() == count
        assert kept.lengths == ((count, 0) if form is KeptByPosition else (10, 6))


def test_a_mask_that_keeps_all_is_everything() -> None:
    kept = kept_elements(torch.ones(4, dtype=torch.bool), 4, [4])
    assert kept.everything
    assert kept.values_of_dense(torch.arange(4.0)).tolist() == [0, 1, 2, 3]


def test_masks_on_accelerators_stay_masks() -> None:
    kept = kept_elements(torch.zeros(16, dtype=torch.bool, device="meta"), 1, [16])
    assert isinstance(kept, KeptByMask)
    assert not kept.everything


def test_an_empty_mask_has_a_form_too() -> None:
    kept = kept_elements(bools(), 0, [0, 0])
    assert kept.lengths == (0, 0)
    assert kept.keep_only_(torch.empty(0)).shape == (0,)

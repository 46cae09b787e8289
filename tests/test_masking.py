"""Zeroing outside a mask, exactly, for every value, type and layout."""

from __future__ import annotations

import pytest
import torch

from ast_plugin.masking import put_back_outside_, zero_outside_

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def special(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([1.5, -2.0, float("inf"), float("-inf"), float("nan"), -0.0, 1e-7, 6e4], dtype=dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_kept_values_keep_their_bits_and_dropped_ones_become_zero(dtype: torch.dtype) -> None:
    values = special(dtype)
    for mask in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool), torch.arange(8) % 2 == 0):
        result = zero_outside_(values.clone(), mask)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        assert torch.equal(result.view(bits), torch.where(mask, values, torch.zeros_like(values)).view(bits))


def test_the_tensor_itself_is_changed_and_returned() -> None:
    values = torch.ones(2)
    assert zero_outside_(values, torch.tensor([True, False])) is values
    assert values.tolist() == [1.0, 0.0]


def test_autograd_notices_the_change() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    before = weight._version
    with torch.no_grad():
        zero_outside_(weight, torch.tensor([True, False]))
    assert weight._version > before
    assert weight.tolist() == [1.0, 0.0]


def test_memory_layout_is_kept() -> None:
    values = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 3, 4, 4) < 0.5
    expected = values * mask
    zero_outside_(values, mask)
    assert torch.equal(values, expected)
    assert values.is_contiguous(memory_format=torch.channels_last)
    columns = torch.randn(4, 6).t()
    assert torch.equal(zero_outside_(columns.clone(), mask[0, 0, :1].expand(6, 4)), columns * mask[0, 0, :1])


@pytest.mark.parametrize("dtype", TYPES)
def test_earlier_values_come_back_outside_the_mask_bit_for_bit(dtype: torch.dtype) -> None:
    earlier, present = special(dtype), special(dtype).flip(0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[earlier.element_size()]
    for mask in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool), torch.arange(8) % 3 == 0):
        expected = torch.where(mask, present.view(bits), earlier.view(bits))
        result = present.clone()
        assert put_back_outside_(result, earlier.clone(), mask) is result
        assert torch.equal(result.view(bits), expected)


def test_earlier_values_come_back_whatever_the_layouts() -> None:
    earlier, mask = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) < 0.5
    present = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    expected = torch.where(mask, present, earlier)
    assert torch.equal(put_back_outside_(present, earlier, mask), expected)

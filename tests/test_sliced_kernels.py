"""Taking rows and columns out of tensors and bringing them back: by indexing, in every layout, twice differentiable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ast_plugin.sliced_kernels import gather, spread, spread_differentiably, take

ROWS, COLUMNS = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 6, 7])
CUTS = {
    "rows": ((0, ROWS),),
    "columns": ((1, COLUMNS),),
    "both": ((0, ROWS), (1, COLUMNS)),
}


def indexed(whole: Tensor, cuts: tuple[tuple[int, Tensor], ...]) -> Tensor:
    for dim, indices in cuts:
        whole = whole[(slice(None),) * dim + (indices,)]
    return whole


def layouts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    image = torch.randn(5, 8, 3, 3)
    return {
        "linear": torch.randn(5, 8),
        "convolution": image,
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "1 x 1": torch.randn(5, 8, 1, 1).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(8, 5).t(),
        "strided": torch.randn(10, 16)[::2, ::2],
        "bfloat16": torch.randn(5, 8, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("cuts", sorted(CUTS))
@pytest.mark.parametrize("layout", sorted(layouts()))
def test_what_is_left_is_what_indexing_gives_and_goes_back_to_its_places(layout: str, cuts: str) -> None:
    whole, places = layouts()[layout], CUTS[cuts]
    part = take(whole, places)
    assert torch.equal(part, indexed(whole, places))
    assert part.dtype == whole.dtype
    assert part._base is None
    if layout == "channels_last":
        assert part.is_contiguous(memory_format=torch.channels_last)
    kept = indexed(torch.arange(whole.numel()).view(whole.shape), places).flatten()
    expected = torch.zeros(whole.shape, dtype=whole.dtype)
    expected.view(-1)[kept] = part.reshape(-1)
    back = spread(part, places, whole)
    assert torch.equal(back, expected)
    assert back.stride() == torch.zeros_like(whole).stride()
    earlier = torch.ones_like(whole)
    assert spread(part, places, whole, earlier) is earlier
    assert torch.equal(earlier, expected + 1)


def test_a_gradient_with_strides_of_its_own_is_added_to() -> None:
    whole = torch.zeros(5, 8)
    earlier = torch.ones(10, 8)[::2]
    part = torch.full((3, 4), 2.0)
    spread(part, CUTS["both"], whole, earlier)
    assert earlier.sum() == 5 * 8 + 12 * 2


def test_infinities_stay_where_they_are() -> None:
    whole = torch.zeros(5, 8)
    part = torch.full((3, 8), float("inf"))
    assert spread(part, CUTS["rows"], whole)[1].eq(0).all()


def test_the_gather_is_differentiable_twice_and_again_through_one_graph() -> None:
    whole = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gather(w, CUTS["both"]), whole)
    assert torch.autograd.gradgradcheck(lambda w: gather(w, CUTS["both"]).square(), whole)
    part = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: spread_differentiably(p, CUTS["both"], whole), part)
    small = gather(whole, CUTS["rows"])
    for _ in range(2):  # two forwards through one smaller weight, a backward each
        small.square().sum().backward()
    torch.testing.assert_close(whole.grad[ROWS], 4 * whole[ROWS].detach())


def test_what_is_gathered_may_be_written_to_without_a_trace_in_the_whole() -> None:
    whole = torch.ones(5, 8, requires_grad=True)
    small = gather(whole, CUTS["rows"])
    with torch.no_grad():
        small.mul_(3)
    assert whole.eq(1).all()

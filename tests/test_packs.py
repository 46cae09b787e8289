"""Several tensors as one vector: every memory layout, and back into the tensors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ast_plugin import packs
from ast_plugin.kept import kept_elements
from ast_plugin.packs import Pack, build_packs, order_of

SMALL, FULL = 1 << 16, 1 << 20


def numbers(*shape: int) -> Tensor:
    """Return 1, 2, 3 ... in row-major order."""
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def with_gaps(values: Tensor) -> Tensor:
    """Return equal values of which every second one in memory belongs to something else, a 99."""
    wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 99.0)
    wide[..., ::2] = values
    return wide[..., ::2]


def within(values: Tensor) -> Tensor:
    """Return equal values that start in the middle of some memory."""
    return torch.cat([torch.full((5,), 99.0), values.flatten(), torch.full((3,), 99.0)])[5:-3].view(values.shape)


# How the values of a 4-axis tensor may lie in memory, and whether they lie there without gaps.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (torch.clone, True),
    "channels_last": (lambda t: t.to(memory_format=torch.channels_last), True),
    "transposed": (lambda t: t.transpose(0, 3).contiguous().transpose(0, 3), True),
    "permuted": (lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2), True),
    "within": (within, True),
    "gaps": (with_gaps, False),
    "gaps within channels_last": (lambda t: with_gaps(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), False),
}
EVERY_LAYOUT = pytest.mark.parametrize(
    ("lay", "dense"), [pytest.param(*case, id=name) for name, case in LAYOUTS.items()]
)


def test_the_layouts_of_these_tests_hold_the_same_values() -> None:
    values = numbers(2, 3, 4, 5)
    strides = set()
    for lay, _ in LAYOUTS.values():
        laid = lay(values)
        strides.add(laid.stride())
        assert torch.equal(laid, values)
    assert len(strides) == len(LAYOUTS) - 1  # `within` has the strides of `contiguous`


def test_several_tensors_are_one_after_the_other_in_row_major_order() -> None:
    pack = Pack({"a": (2, 2), "b": (3,), "c": (1, 2)})
    assert pack.names == ("a", "b", "c")
    assert pack.sizes == (4, 3, 2)
    assert pack.total == 9
    assert pack.buffered
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0, 7.0]), torch.tensor([[8.0, 9.0]])]
    assert pack.order(tensors) is None
    vector = pack.vector(tensors)
    assert vector.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    vector.mul_(10)
    assert tensors[0].tolist() == [[1, 2], [3, 4]]
    pack.write(tensors)
    assert [t.tolist() for t in tensors] == [[[10, 20], [30, 40]], [50, 60, 70], [[80, 90]]]


def test_tensors_of_every_layout_go_into_one_vector_and_back() -> None:
    shape = (2, 3, 4, 5)
    tensors = [lay(numbers(*shape) + 1000 * i) for i, (lay, _) in enumerate(LAYOUTS.values())]
    strides = [t.stride() for t in tensors]
    pack = Pack(dict.fromkeys(LAYOUTS, shape))
    vector = pack.vector(tensors)
    assert torch.equal(vector.view(-1, *shape), torch.stack([numbers(*shape) + 1000 * i for i in range(len(tensors))]))
    vector.neg_()
    pack.write(tensors)
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, -numbers(*shape) - 1000 * i)
    assert [t.stride() for t in tensors] == strides


@EVERY_LAYOUT
def test_a_tensor_alone_is_worked_on_where_it_is_unless_it_has_gaps(
    lay: Callable[[Tensor], Tensor], dense: bool
) -> None:
    tensor = lay(numbers(2, 3, 4, 5))
    pack = Pack({"w": (2, 3, 4, 5)})
    assert not pack.buffered
    vector = pack.vector([tensor])
    assert vector.shape == (120,)
    assert vector.is_contiguous()
    assert sorted(vector.tolist()) == list(range(1, 121))
    assert (vector.data_ptr() == tensor.data_ptr()) is dense
    vector.neg_()
    assert torch.equal(tensor, (-1.0 if dense else 1.0) * numbers(2, 3, 4, 5))
    pack.write([tensor])
    assert torch.equal(tensor, -numbers(2, 3, 4, 5))


@EVERY_LAYOUT
def test_a_vector_is_ordered_as_its_layout_says(lay: Callable[[Tensor], Tensor], dense: bool) -> None:
    tensor, mask = lay(numbers(2, 3, 4, 5)), numbers(2, 3, 4, 5) % 3 == 0
    pack = Pack({"w": (2, 3, 4, 5)})
    layout, vector = pack.order([tensor]), pack.vector([tensor])
    assert (layout is None) == (tensor.is_contiguous() or not dense)
    (back,) = pack.tensors(vector, layout)
    assert torch.equal(back, tensor)
    assert back.data_ptr() == vector.data_ptr()
    # The order of the mask's own memory makes no difference.
    for other in (mask, mask.to(memory_format=torch.channels_last), lay(mask.float()).bool()):
        in_order = order_of(other, layout)
        assert in_order.shape == (120,)
        assert torch.equal(vector[in_order].sort().values, torch.arange(3.0, 121.0, 3.0))
    # A copy of the vector, as the reference holds it, has the same parts.
    (copy,) = pack.tensors(vector.clone(), layout)
    assert torch.equal(copy, tensor)
    assert copy.stride() == (tensor.stride() if dense else tensor.contiguous().stride())


def test_gaps_are_left_alone() -> None:
    tensor = with_gaps(numbers(2, 3))
    pack = Pack({"w": (2, 3)})
    pack.vector([tensor]).zero_()
    pack.write([tensor])
    assert not tensor.any()
    assert torch.equal(tensor.as_strided((12,), (1,)), torch.tensor([0.0, 99.0] * 6))


def test_memory_used_twice_is_read_element_by_element() -> None:
    expanded = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    pack = Pack({"w": (2, 3)})
    assert pack.order([expanded]) is None
    vector = pack.vector([expanded])
    assert vector.tolist() == [1, 1, 1, 2, 2, 2]
    vector.zero_()
    assert expanded.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert Pack({"w": (2, 3), "v": (1,)}).vector([expanded, torch.zeros(1)]).tolist() == [1, 1, 1, 2, 2, 2, 0]


def test_axes_of_one_do_not_make_a_gap() -> None:
    # The stride of an axis of length one says nothing, and may be anything.
    tensor = torch.arange(12.0).as_strided((4, 1, 3, 1), (1, 77, 4, 12))
    pack = Pack({"w": (4, 1, 3, 1)})
    vector = pack.vector([tensor])
    assert vector.tolist() == list(range(12))
    assert vector.data_ptr() == tensor.data_ptr()
    assert torch.equal(pack.tensors(vector, pack.order([tensor]))[0], tensor)


def test_none_stands_for_zeros() -> None:
    pack = Pack({"a": (2,), "b": (1, 2), "c": (1,)})
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])]
    assert pack.vector(tensors).tolist() == [1, 2, 3, 4, 5]
    fewer = [None, tensors[1], None]
    assert pack.order(fewer) is None
    vector = pack.vector(fewer)
    assert vector.tolist() == [0, 0, 3, 4, 0]
    vector.fill_(7)
    pack.write(fewer)
    assert [t.tolist() for t in tensors] == [[1, 2], [[7, 7]], [5]]
    # What was written where there is no tensor is not there the next time.
    assert pack.vector([tensors[0], None, None]).tolist() == [1, 2, 0, 0, 0]


def test_a_missing_tensor_alone_has_no_layout() -> None:
    assert Pack({"w": (2, 3)}).order([None]) is None


def test_a_buffer_serves_one_vector_after_another() -> None:
    pack = Pack({"a": (2,), "b": (1,)})
    first = pack.vector([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    second = pack.vector([torch.tensor([4.0, 5.0]), torch.tensor([6.0])])
    assert first.data_ptr() == second.data_ptr()
    assert first.tolist() == [4, 5, 6]


def test_the_buffer_follows_the_dtype() -> None:
    pack = Pack({"a": (2,), "b": (1,)})
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        tensors = [torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([math.nan], dtype=dtype)]
        vector = pack.vector(tensors)
        assert vector.dtype == dtype
        assert vector[:2].tolist() == [1, 2]
        assert vector[2].isnan()
        vector.fill_(3)
        pack.write(tensors)
        assert tensors[0].tolist() == [3, 3]
        assert tensors[1].tolist() == [3]


def test_gradients_of_several_dtypes_keep_their_digits() -> None:
    # A parameter's ``grad_dtype`` may differ from its dtype, by which packs are made.
    pack = Pack({"a": (2,), "b": (2,)})
    tensors = [torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0001, 3.0])]
    pack.vector(tensors)
    pack.write(tensors)
    assert torch.equal(tensors[1], torch.tensor([1.0001, 3.0]))


def test_parameters_are_written_without_a_graph() -> None:
    shapes = {"a": (2,), "b": (2, 2)}
    for names in (["a"], ["a", "b"]):
        parameters = [nn.Parameter(torch.ones(shapes[name])) for name in names]
        pack = Pack({name: shapes[name] for name in names})
        vector = pack.vector(parameters)
        assert not vector.requires_grad
        vector.mul_(2)
        pack.write(parameters)
        assert all(p.is_leaf and p.requires_grad and (p == 2).all() for p in parameters)


def test_writing_counts_as_a_change_of_the_tensor() -> None:
    # What was masked is recognised by version counters.
    alone, gapped, first, second = torch.ones(3), with_gaps(torch.ones(3)), torch.ones(2), torch.ones(1)
    for pack, tensors in [
        (Pack({"w": (3,)}), [alone]),
        (Pack({"w": (3,)}), [gapped]),
        (Pack({"a": (2,), "b": (1,)}), [first, second]),
    ]:
        before = [t._version for t in tensors]
        vector = pack.vector(tensors)
        assert [t._version for t in tensors] == before
        vector.mul_(2)
        pack.write(tensors)
        assert all(t._version > v for t, v in zip(tensors, before, strict=True))


def test_tensors_are_views_of_the_vector() -> None:
    pack = Pack({"a": (2, 2), "b": (0, 3), "c": (1,)})
    vector = torch.zeros(5)
    a, b, c = pack.tensors(vector, None)
    a[1, 0] = 1
    c[0] = 2
    assert b.shape == (0, 3)
    assert vector.tolist() == [0, 0, 1, 0, 2]


def test_empty_tensors_and_scalars_have_their_place() -> None:
    pack = Pack({"empty": (0, 3), "scalar": (), "w": (2,)})
    assert pack.sizes == (0, 1, 2)
    tensors = [torch.empty(0, 3), torch.tensor(4.0), torch.tensor([5.0, 6.0])]
    vector = pack.vector(tensors)
    assert vector.tolist() == [4, 5, 6]
    vector.add_(1)
    pack.write(tensors)
    assert tensors[1].item() == 5
    alone = Pack({"empty": (0, 3)})
    assert alone.vector([tensors[0]]).shape == (0,)
    alone.write([tensors[0]])


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 2),
)
def test_any_order_of_axes_round_trips(shape: list[int], order: object, step: int) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)  # type: ignore[attr-defined]
    back = [axes.index(axis) for axis in range(len(shape))]
    wide = [shape[axis] for axis in axes]
    memory = torch.zeros(*wide[:-1], wide[-1] * step)
    tensor = memory[..., ::step].permute(back)
    tensor.copy_(numbers(*shape))
    pack = Pack({"w": tuple(shape)})
    layout, vector = pack.order([tensor]), pack.vector([tensor])
    assert torch.equal(pack.tensors(vector, layout)[0], numbers(*shape))
    assert torch.equal(order_of(numbers(*shape), layout), vector)
    vector.neg_()
    pack.write([tensor])
    assert torch.equal(tensor, -numbers(*shape))


def test_large_tensors_are_alone_and_small_ones_together() -> None:
    shapes = {"a": (10,), "big": (256, 256), "b": (5, 5), "bigger": (SMALL + 1,), "c": (255, 256), "none": (0,)}
    built = build_packs(shapes, dict.fromkeys(shapes, "kind"))
    assert {pack.names for pack in built} == {("big",), ("bigger",), ("a", "b", "c", "none")}
    (together,) = (pack for pack in built if pack.buffered)
    assert together.sizes == (10, 25, SMALL - 256, 0)


def test_a_pack_holds_one_kind() -> None:
    shapes = {"a": (3,), "b": (4,), "c": (5,), "d": (6,), "big": (SMALL,)}
    kinds = {"a": "x", "b": "y", "c": "x", "d": "z", "big": "x"}
    built = build_packs(shapes, kinds)
    assert {pack.names for pack in built} == {("a", "c"), ("b",), ("d",), ("big",)}
    assert sorted(pack.total for pack in built) == [4, 6, 8, SMALL]


def test_a_pack_is_closed_before_it_is_too_large() -> None:
    shapes = {str(i): (SMALL - 1,) for i in range(40)}
    built = build_packs(shapes, dict.fromkeys(shapes, "kind"))
    # 16 of 65535 are 2**20 - 16, and a seventeenth is too much.
    assert [len(pack.names) for pack in built] == [16, 16, 8]
    assert all(pack.total <= FULL for pack in built)
    assert [name for pack in built for name in pack.names] == list(shapes)


def test_a_pack_may_be_exactly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_SMALL", 5)
    monkeypatch.setattr(packs, "_PACK", 8)
    shapes = {"a": (4,), "b": (4,), "c": (1,), "d": (5,), "e": (4,), "f": (4,)}
    built = build_packs(shapes, dict.fromkeys(shapes, "kind"))
    assert {pack.names for pack in built} == {("a", "b"), ("c", "e"), ("f",), ("d",)}


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 2 * SMALL), max_size=40),
    kinds=st.lists(st.integers(0, 2), min_size=40, max_size=40),
)
def test_every_tensor_is_in_one_pack(sizes: list[int], kinds: list[int]) -> None:
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    kind_of = {name: kinds[i] for i, name in enumerate(shapes)}
    built = build_packs(shapes, kind_of)
    assert sorted(name for pack in built for name in pack.names) == sorted(shapes)
    for pack in built:
        assert len({kind_of[name] for name in pack.names}) == 1
        assert pack.sizes == tuple(shapes[name][0] for name in pack.names)
        assert pack.total <= FULL
        assert not pack.buffered or max(pack.sizes) < SMALL


def test_no_tensors_make_no_packs() -> None:
    assert build_packs({}, {}) == []


def test_a_row_major_mask_is_not_copied() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert order_of(mask, None).data_ptr() == mask.data_ptr()
    last = torch.ones(2, 3, 4, 5, dtype=torch.bool).to(memory_format=torch.channels_last)
    assert order_of(last, tuple(last.stride())).data_ptr() == last.data_ptr()


@pytest.mark.parametrize("lay", [pytest.param(lay, id=name) for name, (lay, _) in LAYOUTS.items()])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_is_set_aside_comes_back_whatever_is_done_with_vectors_meanwhile(
    lay: Callable[[Tensor], Tensor], several: bool, share: float
) -> None:
    tensors = [lay(torch.randn(4, 3, 2, 2)), torch.randn(5)][: 1 + several]
    pack = Pack({str(i): tuple(tensor.shape) for i, tensor in enumerate(tensors)})
    dense = [tensor.clone() for tensor in tensors]
    mask = torch.rand(pack.total) < share
    kept = kept_elements(mask, int(mask.sum()), pack.sizes)
    masks = pack.tensors(mask, pack.order(tensors))
    for _ in range(2):
        pack.set_aside(tensors)
        pack.put_masked(kept, tensors)
        for tensor, value, one in zip(tensors, dense, masks, strict=True):
            assert torch.equal(tensor, value * one)
        others = [torch.ones_like(tensor) for tensor in tensors]
        pack.vector(others).mul_(2)
        pack.write(others)
        assert all(bool((other == 2).all()) for other in others)
        pack.bring_back(tensors)
        pack.let_go()
        for tensor, value in zip(tensors, dense, strict=True):
            assert torch.equal(tensor, value)
        pack.vector(others).zero_()


def test_several_tensors_are_set_aside_in_the_memory_of_their_vectors() -> None:
    tensors = [torch.randn(3), torch.randn(2, 2)]
    pack = Pack({"a": (3,), "b": (2, 2)})
    address = pack.vector(tensors).data_ptr()
    pack.set_aside(tensors)
    assert pack.vector(tensors).data_ptr() != address
    pack.let_go()
    assert pack.vector(tensors).data_ptr() == address
    memory = weakref.ref(pack.vector(tensors))
    pack.free()
    assert memory() is None

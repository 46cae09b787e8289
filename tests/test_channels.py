"""Groups of channels: where units lie, masks from units and units from masks, and what is left of a tensor."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis, Slice, attribute_values, slices
from ast_plugin.errors import ConfigError, StateError
from ast_plugin.masks import MaskStore

# Four heads of three rows each: 12 rows of queries, keys and values one after the other, read by 12 columns.
HEADS = ChannelGroup(
    name="attn",
    kind="heads",
    units=4,
    axes=(
        GroupAxis(tensor="qkv.weight", dim=0, role="out", parts=((0, 3), (12, 3), (24, 3))),
        GroupAxis(tensor="qkv.bias", dim=0, role="state", parts=((0, 3), (12, 3), (24, 3))),
        GroupAxis(tensor="proj.weight", dim=1, role="in", parts=((0, 3),)),
    ),
    attributes=(GroupAttribute(module="attn", name="num_heads", per_unit=1),),
)
CHAIN = ChannelGroups(
    groups=(
        ChannelGroup(
            name="a",
            kind="channels",
            units=3,
            axes=(
                GroupAxis(tensor="a.weight", dim=0, role="out"),
                GroupAxis(tensor="a.bias", dim=0, role="state"),
                GroupAxis(tensor="b.weight", dim=1, role="in"),
            ),
        ),
        ChannelGroup(
            name="b",
            kind="channels",
            units=4,
            axes=(
                GroupAxis(tensor="b.weight", dim=0, role="out"),
                GroupAxis(tensor="c.weight", dim=1, role="in", parts=((0, 2),)),
            ),
        ),
    )
)
SHAPES = {"a.weight": (3, 2), "b.weight": (4, 3, 1, 1), "c.weight": (5, 8), "d.weight": (2, 2)}
KEPT = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True, False, True])}


def test_units_of_a_fused_weight_lie_in_every_part():
    rows, _, columns = HEADS.axes
    expected = [start + row for start in (3, 9, 15, 21, 27, 33) for row in range(3)]
    assert rows.indices(torch.tensor([1, 3])).tolist() == expected
    assert columns.indices(torch.tensor([0])).tolist() == [0, 1, 2]


def test_parts_may_have_blocks_of_different_size():
    axis = GroupAxis(tensor="qkv.weight", dim=0, role="out", parts=((0, 4), (8, 2), (12, 2)))  # two query heads a unit
    axis.check(2, (16, 5))
    assert axis.indices(torch.tensor([1])).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    flags = torch.zeros(16, dtype=torch.bool)
    flags[10] = True
    assert axis.flags(flags).tolist() == [False, True]


@pytest.mark.parametrize(
    ("parts", "shape"),
    [(((0, 1),), (5, 2)), (((1, 1),), (4, 2)), (((0, 1), (4, 1)), (4, 2)), (((0, 0),), (4, 2)), (((0, 1),), ())],
)
def test_units_that_do_not_fill_a_dimension_are_refused(parts: tuple[tuple[int, int], ...], shape: tuple[int, ...]):
    with pytest.raises(StateError, match="fill dimension 0 of w"):
        GroupAxis(tensor="w", dim=0, role="out", parts=parts).check(4, shape)


def test_a_weight_is_kept_where_its_row_and_its_column_are():
    masks = CHAIN.masks(KEPT, SHAPES)
    assert masks["a.weight"].tolist() == [[True, True], [False, False], [True, True]]
    assert masks["b.weight"][:, :, 0, 0].int().tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert masks["c.weight"].int()[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert masks["d.weight"].all()
    found = CHAIN.kept(masks)
    assert {name: flags.tolist() for name, flags in found.items()} == {n: f.tolist() for n, f in KEPT.items()}
    assert CHAIN.share_dropped(found) == 3 / 7


def test_masks_of_rows_and_columns_are_made_when_they_are_read():
    whole, cut = CHAIN.masks(KEPT, SHAPES), CHAIN.cut_masks(KEPT, SHAPES)
    assert list(cut) == list(SHAPES)
    store = MaskStore(("narrow",), SHAPES)
    store.replace("narrow", cut)
    for name, mask in whole.items():
        assert torch.equal(cut[name].tensor(), mask)
        assert cut[name].count() == store.kept("narrow", name) == int(mask.sum())
        assert torch.equal(store.get("narrow", name), mask)
    other = MaskStore(("narrow",), SHAPES)
    other.unpack("narrow", store.pack("narrow"))
    assert other.checksum() == store.checksum()
    with pytest.raises(ConfigError, match=r"mask of 'd\.weight' in sub-net 'narrow' must be bool of shape \(2, 2\)"):
        store.replace("narrow", {"d.weight": cut["a.weight"]})


def test_what_is_left_of_tensors_and_where_it_goes_back():
    cuts = slices(CHAIN.groups, KEPT)
    assert list(cuts) == ["a.weight", "a.bias", "b.weight", "c.weight"]
    assert {name: cut.shape(SHAPES.get(name, (3,))) for name, cut in cuts.items()} == {
        "a.weight": (2, 2),
        "a.bias": (2,),
        "b.weight": (2, 2, 1, 1),
        "c.weight": (5, 4),
    }
    whole = torch.arange(12.0).reshape(4, 3, 1, 1) + 1
    part = cuts["b.weight"].take(whole)
    assert part.flatten().tolist() == [4.0, 6.0, 10.0, 12.0]
    assert torch.equal(
        cuts["b.weight"].put_(part, torch.zeros_like(whole)), whole * CHAIN.masks(KEPT, SHAPES)["b.weight"]
    )
    columns = cuts["c.weight"].take(torch.arange(8.0).expand(5, 8))
    assert columns[0].tolist() == [2.0, 3.0, 6.0, 7.0]
    assert cuts["c.weight"].put_(columns, torch.zeros(5, 8))[4].tolist() == [0, 0, 2.0, 3.0, 0, 0, 6.0, 7.0]


def test_the_gradient_of_what_is_left_comes_back_to_its_places():
    whole = torch.ones(4, 3, requires_grad=True)
    cut = Slice("w", ((0, torch.tensor([1, 3])), (1, torch.tensor([0]))))
    (cut.take(whole) * torch.tensor([[2.0], [5.0]])).sum().backward()
    assert whole.grad is not None
    assert whole.grad.tolist() == [[0, 0, 0], [2, 0, 0], [0, 0, 0], [5, 0, 0]]


def test_nothing_is_cut_where_every_unit_is_kept():
    everything = {name: torch.ones_like(flags) for name, flags in KEPT.items()}
    assert slices(CHAIN.groups, everything) == {}
    assert all(mask.all() for mask in CHAIN.masks(everything, SHAPES).values())


def test_modules_are_told_how_many_units_are_left():
    kept = {"attn": torch.tensor([True, False, False, True])}
    assert attribute_values([HEADS], kept) == {("attn", "num_heads"): 2}


def test_a_description_in_plain_containers_gives_the_group_back():
    assert ChannelGroup.from_dict(json.loads(json.dumps(HEADS.to_dict()))) == HEADS


@pytest.mark.parametrize(
    "change",
    [
        {"units": -1},
        {"units": "4"},
        {"kind": "rows"},
        {"axes": [{"tensor": "w", "dim": 0, "role": "across", "parts": [[0, 1]]}]},
        {"axes": [{"tensor": "w", "dim": 0, "role": "out", "parts": [[0]]}]},
        {"attributes": [{"module": "attn", "name": "num_heads"}]},
        {"colour": "red"},
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, object]):
    with pytest.raises(StateError, match="damaged"):
        ChannelGroup.from_dict({**HEADS.to_dict(), **change})


def test_a_group_says_what_a_model_lacks_of_it() -> None:
    group = ChannelGroup(
        name="a",
        kind="heads",
        units=4,
        axes=(GroupAxis(tensor="w", dim=0, role="out"), GroupAxis(tensor="v", dim=1, role="in", parts=((0, 2),))),
        attributes=(GroupAttribute(module="attn", name="heads", per_unit=1),),
    )
    shapes, modules = {"w": (4, 3), "v": (3, 8)}, {"attn": SimpleNamespace(heads=4)}
    assert group.misfit(shapes, modules) is None
    assert group.misfit({"w": (4, 3)}, modules) == "concerns 'v', which the model lacks"
    assert str(group.misfit({**shapes, "v": (3, 4)}, modules)).startswith("does not fit: 4 units in parts")
    lacking = "expects heads of 'attn' to be 4, and it is "
    assert group.misfit(shapes, {"attn": SimpleNamespace(heads=8)}) == f"{lacking}8"
    assert group.misfit(shapes, {}) == f"{lacking}None"

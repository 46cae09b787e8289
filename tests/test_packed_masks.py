"""Masks in the form in which they are applied: right for every layout, and never those of yesterday."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ast_plugin import packs
from ast_plugin.kept import Kept, KeptByMask, KeptByPosition
from ast_plugin.masks import MaskStore
from ast_plugin.packed_masks import PackedMasks
from ast_plugin.packs import Pack
from ast_plugin.slots import ParameterSlots

SHAPES = {"conv": (4, 3, 3, 3), "fc": (5, 8), "tiny": (1, 2)}
DENSITIES = {"all": 1.0, "half": 0.5, "few": 0.08, "fewer": 0.05, "none": 0.0}


class Net(nn.Module):
    def __init__(self, dtypes: dict[str, torch.dtype] | None = None) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            dtype = (dtypes or {}).get(name, torch.float32)
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))


def random_mask(shape: tuple[int, ...], density: float) -> Tensor:
    """Keep exactly that share, rounded down."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel())[: int(density * mask.numel())]] = True
    return mask


def setting(net: Net | None = None) -> tuple[Net, MaskStore, PackedMasks]:
    net = Net() if net is None else net
    masks = MaskStore(tuple(DENSITIES), SHAPES)
    for sub_net, density in DENSITIES.items():
        for name, shape in SHAPES.items():
            masks.set(sub_net, name, random_mask(shape, density))
    return net, masks, PackedMasks(ParameterSlots(net, SHAPES), masks)


@pytest.fixture
def each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every tensor count as large."""
    monkeypatch.setattr(packs, "_SMALL", 1)


def of_pack(packed: PackedMasks, sub_net: str, pack: Pack, tensors: list[Tensor]) -> list[Tensor]:
    """Return what remains of tensors of ones, in their shapes."""
    ones = [torch.ones_like(t) for t in tensors]
    kept = packed.kept(sub_net, pack, ones)
    vector = pack.vector(ones)
    kept.keep_only_(vector)
    return [part.clone() for part in pack.tensors(vector, pack.order(ones))]


def assert_right(net: Net, masks: MaskStore, packed: PackedMasks) -> None:
    """Compare all sub-nets' forms with their masks."""
    seen = []
    for pack in packed.packs:
        parameters = packed.parameters(pack)
        seen += pack.names
        for sub_net in masks.sub_nets:
            for name, left in zip(pack.names, of_pack(packed, sub_net, pack, parameters), strict=True):
                assert torch.equal(left.bool(), masks.get(sub_net, name)), (sub_net, name)
    assert sorted(seen) == sorted(SHAPES)


def lay_out(net: Net, layout: str) -> None:
    for name, parameter in list(net.named_parameters()):
        value = parameter.detach()
        if layout == "channels_last" and value.dim() == 4:
            value = value.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            value = value.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "gaps":
            value = value.repeat_interleave(2, dim=-1)[..., ::2]
        net.register_parameter(name, nn.Parameter(value))


LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gaps"])


@LAYOUTS
def test_small_parameters_together_keep_what_their_masks_say(layout: str) -> None:
    net, masks, packed = setting()
    lay_out(net, layout)
    assert [pack.names for pack in packed.packs] == [("conv", "fc", "tiny")]
    assert_right(net, masks, packed)


@pytest.mark.usefixtures("each_alone")
@LAYOUTS
def test_parameters_alone_keep_what_their_masks_say(layout: str) -> None:
    net, masks, packed = setting()
    lay_out(net, layout)
    assert len(packed.packs) == 3
    assert_right(net, masks, packed)


@LAYOUTS
def test_masks_of_another_memory_layout_say_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for small in (1, 1 << 16):
        monkeypatch.setattr(packs, "_SMALL", small)
        net, masks, packed = setting()
        lay_out(net, layout)
        for sub_net in masks.sub_nets:
            mask = masks.get(sub_net, "conv")
            masks.set(sub_net, "conv", mask.to(memory_format=torch.channels_last))
            masks.set(sub_net, "fc", masks.get(sub_net, "fc").t().contiguous().t())
        assert_right(net, masks, packed)


def test_the_form_follows_what_the_pack_keeps() -> None:
    _, masks, packed = setting()
    (pack,) = packed.packs
    parameters = packed.parameters(pack)
    forms = {name: packed.kept(name, pack, parameters) for name in masks.sub_nets}
    assert {name: type(kept) for name, kept in forms.items()} == {
        "all": KeptByMask,
        "half": KeptByMask,
        "few": KeptByPosition,
        "fewer": KeptByPosition,
        "none": KeptByPosition,
    }
    assert [name for name, kept in forms.items() if kept.everything] == ["all"]
    assert forms["half"].lengths == (108, 40, 2)
    assert forms["few"].lengths == tuple(int(masks.get("few", name).sum()) for name in SHAPES)
    assert forms["none"].lengths == (0, 0, 0)


def test_one_layer_that_is_dense_does_not_make_the_pack_dense() -> None:
    _, masks, packed = setting()
    masks.set("none", "tiny", torch.ones(1, 2, dtype=torch.bool))
    (pack,) = packed.packs
    kept = packed.kept("none", pack, packed.parameters(pack))
    assert isinstance(kept, KeptByPosition)
    assert kept.positions.tolist() == [148, 149]
    assert kept.lengths == (0, 0, 2)


def test_forms_are_made_once() -> None:
    _, _, packed = setting()
    (pack,) = packed.packs
    parameters = packed.parameters(pack)
    assert packed.packs[0] is pack
    assert packed.refresh()[0] is pack
    for sub_net in DENSITIES:
        assert packed.kept(sub_net, pack, parameters) is packed.kept(sub_net, pack, parameters)


@pytest.mark.usefixtures("each_alone")
def test_every_layout_has_a_form_of_its_own() -> None:
    net, masks, packed = setting()
    rows = packed.kept("few", packed.packs[0], [net.conv])
    columns = packed.kept("few", packed.packs[0], [net.conv.detach().to(memory_format=torch.channels_last)])
    assert rows is not columns
    assert isinstance(columns, KeptByPosition)
    in_memory = masks.get("few", "conv").permute(0, 2, 3, 1).flatten().nonzero().flatten()
    assert columns.positions.tolist() == in_memory.tolist()
    assert packed.kept("few", packed.packs[0], [net.conv]) is rows
    assert packed.kept("few", packed.packs[0], [None]) is rows


@pytest.mark.parametrize("small", [1, 1 << 16])
@pytest.mark.parametrize("how", ["set", "unpack"])
def test_forms_follow_masks_that_change(small: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "_SMALL", small)
    net, masks, packed = setting()
    assert_right(net, masks, packed)
    before = forms(packed, "few"), forms(packed, "half")
    fresh = {name: random_mask(shape, 0.7) for name, shape in SHAPES.items()}
    if how == "set":
        for name, mask in fresh.items():
            masks.set("few", name, mask)
    else:
        source = MaskStore(("x",), SHAPES)
        for name, mask in fresh.items():
            source.set("x", name, mask)
        masks.unpack("few", source.pack("x"))
    assert_right(net, masks, packed)
    assert torch.equal(masks.get("few", "fc"), fresh["fc"])
    assert not any(new is old for new, old in zip(forms(packed, "few"), before[0], strict=True))
    assert all(new is old for new, old in zip(forms(packed, "half"), before[1], strict=True))


def forms(packed: PackedMasks, sub_net: str) -> list[Kept]:
    return [packed.kept(sub_net, pack, packed.parameters(pack)) for pack in packed.packs]


def test_a_mask_put_in_again_after_a_change_is_seen() -> None:
    net, masks, packed = setting()
    first = masks.get("few", "fc")
    masks.set("few", "fc", ~first)
    assert_right(net, masks, packed)
    masks.set("few", "fc", first)
    assert_right(net, masks, packed)


def test_refreshing_finds_another_dtype() -> None:
    net, masks, packed = setting()
    (pack,) = packed.packs
    before = packed.kept("few", pack, packed.parameters(pack))
    net.to(torch.float64)
    (fresh,) = packed.refresh()
    assert fresh is not pack
    assert packed.packs == (fresh,)
    assert packed.kept("few", fresh, packed.parameters(fresh)) is not before
    assert packed.parameters(fresh)[0].dtype == torch.float64
    assert_right(net, masks, packed)
    vector = fresh.vector(packed.parameters(fresh))
    assert vector.dtype == torch.float64
    assert torch.equal(vector[:108], net.conv.detach().flatten())


def test_one_converted_parameter_leaves_the_pack() -> None:
    net, masks, packed = setting()
    assert len(packed.packs) == 1
    net.fc = nn.Parameter(net.fc.detach().to(torch.bfloat16))
    assert [pack.names for pack in packed.refresh()] == [("conv", "tiny"), ("fc",)]
    assert_right(net, masks, packed)
    net.float()
    assert [pack.names for pack in packed.refresh()] == [("conv", "fc", "tiny")]
    assert_right(net, masks, packed)


def test_mixed_dtypes_are_in_packs_of_their_own_from_the_start() -> None:
    net, masks, packed = setting(Net({"conv": torch.bfloat16, "tiny": torch.bfloat16}))
    assert {pack.names for pack in packed.packs} == {("conv", "tiny"), ("fc",)}
    assert_right(net, masks, packed)


def test_a_replaced_parameter_is_found() -> None:
    net, masks, packed = setting()
    (pack,) = packed.packs
    net.fc = nn.Parameter(torch.zeros(5, 8))
    assert packed.parameters(pack)[1] is net.fc
    assert packed.refresh() == (pack,)
    assert_right(net, masks, packed)


def test_gradients_are_those_that_the_parameters_have_now() -> None:
    net, _, packed = setting()
    (pack,) = packed.packs
    assert packed.gradients(pack) == [None, None, None]
    net.fc.grad = torch.ones(5, 8)
    assert packed.gradients(pack)[1] is net.fc.grad
    assert packed.gradients(pack)[::2] == [None, None]


def assert_carries(masks: MaskStore, packed: PackedMasks, pack: Pack, one: str, other: str) -> None:
    dense = [torch.randn(SHAPES[name]) for name in pack.names]
    ours = packed.kept(one, pack, dense)
    overlap = packed.overlap(one, other, pack, dense)
    assert overlap is not None
    carried = overlap.carry(ours.values_of_dense(pack.vector(dense)))
    # What both keep, in the places of those that the other keeps.
    parts = [t * masks.get(one, name) for t, name in zip(dense, pack.names, strict=True)]
    wanted = torch.cat([part[masks.get(other, name)] for part, name in zip(parts, pack.names, strict=True)])
    assert torch.equal(carried, wanted)


def test_a_mask_goes_to_the_device_of_its_parameter_and_stays_there() -> None:
    net, masks, packed = setting()
    mask = masks.get("few", "fc")
    assert torch.equal(packed.mask("few", "fc"), mask)
    revision = masks.revision("few")
    net.fc = nn.Parameter(torch.empty(5, 8, device="meta"))
    moved = packed.mask("few", "fc")
    assert moved.device.type == "meta"
    assert masks.get("few", "fc") is moved
    assert packed.mask("few", "fc") is moved
    assert masks.revision("few") == revision
    assert masks.get("half", "fc").device.type == "cpu"


def test_another_device_makes_new_packs() -> None:
    net, _, packed = setting()
    (pack,) = packed.packs
    net.to("meta")
    (fresh,) = packed.refresh()
    assert fresh is not pack
    assert packed.mask("few", "conv").device.type == "meta"


def test_the_masks_of_the_store_are_not_written_into() -> None:
    _, masks, packed = setting()
    before = masks.checksum()
    for pack in packed.packs:
        parameters = packed.parameters(pack)
        for sub_net in masks.sub_nets:
            packed.kept(sub_net, pack, parameters).keep_only_(torch.ones(pack.total))
    assert masks.checksum() == before


def test_a_store_without_parameters_has_no_packs() -> None:
    packed = PackedMasks(ParameterSlots(Net(), []), MaskStore(("a",), {}))
    assert packed.packs == ()
    assert packed.refresh() == ()

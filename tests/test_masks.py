"""Masks: counts, overlap, one-bit packing and checksums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ast_plugin.errors import ConfigError, StateError
from ast_plugin.mask_forms import pack_bits, unpack_bits
from ast_plugin.masks import MaskStore

SHAPES = {"conv": (4, 3, 3, 3), "fc": (5, 7), "tiny": (1, 1)}


def store() -> MaskStore:
    return MaskStore(["s50", "s90"], SHAPES)


def random_masks(seed: int = 0) -> MaskStore:
    generator = torch.Generator().manual_seed(seed)
    masks = store()
    for sub_net in masks.sub_nets:
        for name, shape in SHAPES.items():
            masks.set(sub_net, name, torch.rand(shape, generator=generator) < 0.4)
    return masks


def test_a_new_store_keeps_every_weight() -> None:
    masks = store()
    assert masks.sub_nets == ("s50", "s90")
    assert masks.parameters == ("conv", "fc", "tiny")
    assert masks.shapes == SHAPES
    assert masks.total() == 108 + 35 + 1
    for sub_net in masks.sub_nets:
        assert masks.kept(sub_net) == masks.total()
        assert masks.sparsity(sub_net) == 0
        assert all(mask.dtype == torch.bool and mask.all() for mask in masks.of(sub_net).values())


def test_counts_of_a_hand_worked_mask() -> None:
    masks = MaskStore(["a", "b"], {"w": (2, 3), "v": (4,)})
    masks.set("a", "w", torch.tensor([[1, 0, 0], [0, 1, 0]]).bool())  # 2 of 6
    masks.set("a", "v", torch.tensor([1, 1, 0, 1]).bool())  # 3 of 4
    masks.set("b", "w", torch.tensor([[1, 1, 1], [0, 0, 0]]).bool())  # 3 of 6, one of them a's
    masks.set("b", "v", torch.tensor([0, 1, 0, 0]).bool())  # 1 of 4, also a's
    assert [masks.kept("a", "w"), masks.kept("a", "v"), masks.kept("a")] == [2, 3, 5]
    assert [masks.total("w"), masks.total("v"), masks.total()] == [6, 4, 10]
    assert masks.sparsity("a", "w") == pytest.approx(4 / 6)
    assert masks.sparsity("a", "v") == 0.25
    assert masks.sparsity("a") == 0.5
    # both keep w[0, 0] and v[1]: 2 of a's 5, 2 of b's 4
    assert masks.overlap("a", "b") == pytest.approx(2 / 5)
    assert masks.overlap("b", "a") == pytest.approx(2 / 4)
    assert masks.overlap("a", "a") == 1
    assert masks.union("w").tolist() == [[True, True, True], [False, True, False]]
    assert masks.union("v").tolist() == [True, True, False, True]


def test_counts_follow_a_replaced_mask() -> None:
    masks = random_masks()
    before = masks.kept("s50"), masks.kept("s50", "fc"), masks.kept("s90")
    masks.set("s50", "fc", torch.zeros(5, 7, dtype=torch.bool))
    assert masks.kept("s50", "fc") == 0
    assert masks.kept("s50") == before[0] - before[1]
    assert masks.kept("s90") == before[2]


def test_the_union_is_a_copy() -> None:
    masks = random_masks()
    before = masks.get("s50", "fc").clone()
    masks.union("fc").fill_(True)
    assert torch.equal(masks.get("s50", "fc"), before)


def test_an_empty_sub_net_overlaps_nothing() -> None:
    masks = MaskStore(["a", "b"], {"w": (3,)})
    masks.set("a", "w", torch.zeros(3, dtype=torch.bool))
    assert masks.overlap("a", "b") == 0
    assert masks.overlap("a", "a") == 0
    assert masks.overlap("b", "a") == 0


def test_a_store_without_weights_has_sparsity_zero() -> None:
    masks = MaskStore(["a"], {"w": (0, 3)})
    assert masks.sparsity("a") == 0
    masks.unpack("a", masks.pack("a"))
    assert masks.get("a", "w").shape == (0, 3)
    assert MaskStore(["a"], {}).sparsity("a") == 0


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 6), min_size=0, max_size=4), seed=st.integers(0, 1000))
def test_packing_and_unpacking_give_the_mask_back(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_bit_order_is_row_major_least_significant_first() -> None:
    # weights 0, 3 and 8 kept: byte 0 = 1 + 8, byte 1 = 1
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 0] = mask[1, 0] = mask[2, 2] = True
    assert pack_bits(mask).tolist() == [9, 1]


def test_packing_ignores_the_memory_format() -> None:
    mask = torch.rand(4, 3, 5, 5) < 0.5
    assert torch.equal(pack_bits(mask.to(memory_format=torch.channels_last)), pack_bits(mask))
    assert torch.equal(pack_bits(mask.transpose(0, 1)), pack_bits(mask.transpose(0, 1).contiguous()))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), "must be 2 bytes of torch.uint8, got torch.uint8 of shape (1,)"),
        (torch.zeros(2, dtype=torch.int8), "must be 2 bytes of torch.uint8, got torch.int8 of shape (2,)"),
        (torch.zeros(2, 1, dtype=torch.uint8), "got torch.uint8 of shape (2, 1)"),
        (torch.tensor([0, 2], dtype=torch.uint8), "bits are set past its last weight"),
    ],
)
def test_unpacking_refuses_what_packing_never_makes(packed: torch.Tensor, message: str) -> None:
    with pytest.raises(StateError) as caught:
        unpack_bits(packed, (3, 3))
    assert message in str(caught.value)


def test_a_store_is_restored_from_packed_masks() -> None:
    source, target = random_masks(), store()
    assert target.kept("s90") == target.total()  # the count is remembered, and has to be forgotten
    for sub_net in source.sub_nets:
        target.unpack(sub_net, source.pack(sub_net))
    for sub_net in source.sub_nets:
        assert target.kept(sub_net) == source.kept(sub_net)
        for name in SHAPES:
            assert torch.equal(target.get(sub_net, name), source.get(sub_net, name))


def test_a_failed_unpack_changes_nothing() -> None:
    masks = random_masks()
    before = masks.checksum()
    good = store().pack("s90")
    for packed, message in [
        ({**good, "other": good["fc"]}, "masks of sub-net 's90' hold 'other', which is no prunable parameter"),
        ({name: good[name] for name in ("conv", "fc")}, "masks of sub-net 's90' lack the parameter 'tiny'"),
        ({**good, "tiny": good["fc"]}, "mask of 'tiny' in sub-net 's90': packed mask for shape (1, 1) must be 1 bytes"),
    ]:
        with pytest.raises(StateError) as caught:
            masks.unpack("s90", packed)
        assert message in str(caught.value)
        assert masks.checksum() == before


def test_a_checksum_sees_every_bit_and_nothing_else() -> None:
    masks, same = random_masks(), random_masks()
    assert masks.checksum() == same.checksum()
    assert masks.checksum("s50") == same.checksum("s50")
    assert masks.checksum("s50") != masks.checksum("s90")
    flipped = same.get("s90", "fc").clone()
    flipped[4, 6] = ~flipped[4, 6]
    same.set("s90", "fc", flipped)
    assert masks.checksum() != same.checksum()
    assert masks.checksum("s90") != same.checksum("s90")
    assert masks.checksum("s50") == same.checksum("s50")


def test_checksums_of_equal_masks_are_equal_whatever_the_sub_net_is_called() -> None:
    masks = store()
    assert masks.checksum("s50") == masks.checksum("s90")
    assert masks.checksum() != MaskStore(["s50", "s95"], SHAPES).checksum()
    # the same bits under another name or in another shape are another mask
    assert MaskStore(["a"], {"v": (6,)}).checksum("a") != MaskStore(["a"], {"w": (6,)}).checksum("a")
    assert MaskStore(["a"], {"w": (2, 3)}).checksum("a") != MaskStore(["a"], {"w": (3, 2)}).checksum("a")


def test_a_checksum_does_not_change_between_versions() -> None:
    # It travels in checkpoints and between processes; a change of it is a change of the format.
    assert MaskStore(["a"], {"w": (3, 3)}).checksum("a") == (
        "28fd571b80a57ebfdafe47ef15c5170b2e3aed995ad9541f44100b90924fa29e"
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(5, 7),
            "mask of 'fc' in sub-net 's50' must be bool of shape (5, 7), got torch.float32 of shape (5, 7)",
        ),
        (torch.ones(7, 5, dtype=torch.bool), "got torch.bool of shape (7, 5)"),
    ],
)
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor, message: str) -> None:
    masks = random_masks()
    before = masks.checksum()
    with pytest.raises(ConfigError) as caught:
        masks.set("s50", "fc", mask)
    assert message in str(caught.value)
    assert masks.checksum() == before


def test_unknown_names_are_answered_with_the_near_ones() -> None:
    masks = store()
    with pytest.raises(ConfigError, match=r"there is no sub-net 's51': did you mean 's50'\? Known: s50, s90"):
        masks.get("s51", "fc")
    with pytest.raises(ConfigError, match=r"'fcc' is no prunable parameter of this run: did you mean 'fc'\?"):
        masks.get("s50", "fcc")
    for ask in (masks.of, masks.kept, masks.sparsity, masks.pack, masks.checksum):
        with pytest.raises(ConfigError, match="there is no sub-net 'x'"):
            ask("x")
    for ask in (masks.total, masks.union, lambda name: masks.kept("s50", name)):
        with pytest.raises(ConfigError, match="'x' is no prunable parameter"):
            ask("x")


@pytest.mark.parametrize("device", [pytest.param("meta", id="other"), "cpu"])
def test_a_mask_stays_on_the_device_on_which_it_was_set(device: str) -> None:
    masks = store()
    masks.set("s50", "fc", torch.ones(5, 7, dtype=torch.bool, device=device))
    assert masks.get("s50", "fc").device.type == device
    assert masks.get("s50", "conv").device.type == "cpu"


def test_several_masks_are_replaced_together_or_not_at_all() -> None:
    store = MaskStore(("a",), {"v": (4,), "w": (2, 2)})
    good = torch.tensor([True, False, False, False])
    with pytest.raises(ConfigError, match=r"mask of 'w' in sub-net 'a' must be bool of shape \(2, 2\)"):
        store.replace("a", {"v": good, "w": torch.ones(3, dtype=torch.bool)})
    assert (store.kept("a"), store.revision("a")) == (8, 0)
    store.replace("a", {"v": good, "w": torch.eye(2, dtype=torch.bool)})
    assert (store.kept("a", "v"), store.kept("a", "w"), store.revision("a")) == (1, 2, 1)
    assert store.get("a", "v").tolist() == good.tolist()

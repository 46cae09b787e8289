"""A network whose dropped units are cut out computes what it computes with zeros in their place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sliced_examples import HYBRID_GROUPS, Hybrid, hybrid, pictures, random_units
from torch import nn

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis
from ast_plugin.errors import ASTError, ConfigError, ElasticFileError
from ast_plugin.sliced_model import ModuleSizes, rounded_up, slice_model, sliced_sizes


def masked(model: Hybrid, share: float) -> tuple[Hybrid, dict[str, torch.Tensor]]:
    kept = random_units(HYBRID_GROUPS, share)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    for name, mask in HYBRID_GROUPS.masks(kept, shapes).items():
        model.get_parameter(name).data.mul_(mask)
    return model, kept


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_outputs_are_those_of_the_masked_network(share: float) -> None:
    model, kept = masked(hybrid(), share)
    expected = model(pictures()).detach()
    slice_model(model, HYBRID_GROUPS, kept)
    torch.testing.assert_close(model(pictures()), expected, rtol=1e-5, atol=1e-5)
    assert model.fc1.weight.shape[0] == max(1, round(32 * share))


@pytest.mark.parametrize("multiple", [1, 4, 16, 100])
def test_units_that_are_added_change_no_output(multiple: int) -> None:
    model, kept = masked(hybrid(), 0.3)
    expected = model(pictures()).detach()
    more = rounded_up(HYBRID_GROUPS, kept, multiple)
    assert all(bool(more[name][flags].all()) for name, flags in kept.items())
    slice_model(model, HYBRID_GROUPS, more)
    torch.testing.assert_close(model(pictures()), expected, rtol=1e-5, atol=1e-5)
    widths = {1: (7, 1, 10), 4: (8, 1, 12), 16: (16, 1, 16), 100: (24, 1, 32)}  # of 24 channels, 4 heads, 32 units
    assert (model.block.expand.out_channels, model.attn.heads, model.fc1.out_features) == widths[multiple]


@pytest.mark.parametrize("multiple", [0, 1.0, "8", True])
def test_multiples_out_of_range_are_refused(multiple: object) -> None:
    with pytest.raises(ConfigError, match="multiple must be a whole number of at least 1, such as 8 or 16, got"):
        rounded_up(HYBRID_GROUPS, random_units(HYBRID_GROUPS, 0.5), multiple)


def test_sizes_by_hand() -> None:
    # Two of three rows; the reader has blocks of two columns a unit.
    groups = ChannelGroups(
        groups=(
            ChannelGroup(
                name="a",
                kind="hidden",
                units=3,
                axes=(
                    GroupAxis(tensor="a.weight", dim=0, role="out"),
                    GroupAxis(tensor="norm.running_mean", dim=0, role="state"),
                    GroupAxis(tensor="scale", dim=0, role="state"),
                    GroupAxis(tensor="b.weight", dim=0, role="in", parts=((0, 2),)),
                ),
                attributes=(GroupAttribute(module="", name="width", per_unit=2),),
            ),
        )
    )
    shapes = {"a.weight": (3, 4), "norm.running_mean": (3,), "scale": (3,), "b.weight": (6, 5)}
    assert sliced_sizes(groups, {"a": torch.tensor([True, False, True])}, shapes) == {
        "a": ModuleSizes(tensors={"weight": (2, 4)}, numbers={"out_features": 2, "out_channels": 2, "nf": 2}),
        "norm": ModuleSizes(tensors={"running_mean": (2,)}, numbers={}),
        "": ModuleSizes(tensors={"scale": (2,)}, numbers={"width": 4}),
        "b": ModuleSizes(tensors={"weight": (4, 5)}, numbers={"in_features": 4, "in_channels": 4, "nx": 4}),
    }
    assert sliced_sizes(groups, {"a": torch.ones(3, dtype=torch.bool)}, shapes) == {}


def test_modules_print_and_behave_as_if_built_smaller() -> None:
    model, kept = masked(hybrid(), 0.25)
    sizes = slice_model(model, HYBRID_GROUPS, kept)
    block = model.block
    assert (block.expand.out_channels, block.norm1.num_features, block.project.in_channels) == (6, 6, 6)
    assert (block.depth.in_channels, block.depth.out_channels, block.depth.groups) == (6, 6, 6)
    assert (model.attn.heads, model.attn.inner, model.attn.qkv.out_features, model.attn.proj.in_features) == (
        *(1, 4, 12),
        4,
    )
    assert (block.norm3.num_features, model.stem.out_channels, model.head.in_features) == (16, 16, 16)
    assert sizes["block.depth"].numbers["groups"] == 6
    assert sizes["attn"].tensors == {}
    assert not hasattr(model.fc1, "out_channels")
    model.train()
    model(pictures(8)).sum().backward()
    assert model.fc2.weight.grad.shape == (16, 8)
    assert block.norm1.running_mean.shape == (6,)


def test_transposed_convolutions_and_conv1d_keep_their_own_names() -> None:
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))

    model = nn.ModuleDict({"up": nn.ConvTranspose2d(3, 6, 2, bias=False), "turned": Conv1D(8, 6)})
    groups = ChannelGroups(
        groups=(
            ChannelGroup(
                name="up",
                kind="channels",
                units=6,
                axes=(
                    GroupAxis(tensor="up.weight", dim=1, role="out"),
                    GroupAxis(tensor="turned.weight", dim=0, role="in"),
                ),
            ),
        )
    )
    slice_model(model, groups, {"up": torch.tensor([True, False, True, False, False, False])})
    assert (model["up"].in_channels, model["up"].out_channels, model["up"].weight.shape[1]) == (3, 2, 2)
    assert (model["turned"].nx, model["turned"].nf, tuple(model["turned"].weight.shape)) == (2, 8, (2, 8))
    assert model["up"](torch.randn(1, 3, 4, 4)).shape == (1, 2, 5, 5)


def test_types_order_and_gradients_stay_as_they_are() -> None:
    model = hybrid().to(memory_format=torch.channels_last).double()
    model.fc1.weight.requires_grad_(False)
    _, kept = masked(model, 0.5)
    slice_model(model, HYBRID_GROUPS, kept)
    assert model.block.depth.weight.dtype == torch.float64
    assert model.block.expand.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.fc1.weight.requires_grad
    assert model.fc2.weight.requires_grad
    assert type(model.fc2.weight) is nn.Parameter
    assert model.fc2.weight.is_leaf


@torch.no_grad()
def test_parts_may_be_compiled() -> None:
    model, kept = masked(hybrid(), 0.5)
    expected = model(pictures())
    model.block = torch.compile(model.block, backend="eager")
    model(pictures())
    slice_model(model, HYBRID_GROUPS, kept)
    assert model.block.depth.groups == 12
    torch.testing.assert_close(model(pictures()), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def changed(**changes: object) -> ChannelGroups:
    """Return the last group, of the feed-forward network, with something changed."""
    return ChannelGroups(groups=(dataclasses.replace(HYBRID_GROUPS.groups[2], **changes),))


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        (
            changed(axes=(GroupAxis(tensor="fc3.weight", dim=1, role="in"),)),
            ElasticFileError,
            "concerns 'fc3.weight', which the model lacks; build the model as it was",
        ),
        (
            changed(axes=(GroupAxis(tensor="fc2.weight", dim=0, role="in"),)),
            ElasticFileError,
            r"do not fill dimension 0 of fc2.weight, which has shape \(16, 32\)",
        ),
        (
            changed(attributes=(GroupAttribute(module="attn", name="heads", per_unit=1),)),
            ElasticFileError,
            "expects heads of 'attn' to be 32, and it is 4",
        ),
        (
            changed(attributes=(GroupAttribute(module="", name="hidden", per_unit=1),)),
            ElasticFileError,
            "expects hidden of the model to be 32, and it is None",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(
    groups: ChannelGroups, kind: type[ASTError], message: str
) -> None:
    model = hybrid()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        slice_model(model, groups, {"fc1": torch.arange(32) < 9})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_refused() -> None:
    model = hybrid()
    model.other = nn.Linear(32, 16)
    model.other.weight = model.fc2.weight
    with pytest.raises(ElasticFileError, match=r"'other\.weight' at the same time: tied weights cannot be sliced"):
        slice_model(model, changed(), {"fc1": torch.arange(32) < 9})

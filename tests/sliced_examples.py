"""A small network with channel groups, and elastic files of its channel sub-nets, as several test files use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis
from ast_plugin.elastic_file import write_elastic
from ast_plugin.masks import MaskStore

SHARES = {"c50": 0.5, "c75": 0.25}  # what is kept of every group's units


class Attention(nn.Module):
    """Self-attention with a fused projection, of 4 heads of 4 features."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.size = size
        self.inner = heads * size
        self.qkv = nn.Linear(width, 3 * self.inner)
        self.proj = nn.Linear(self.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(found.transpose(1, 2).reshape(batch, tokens, self.inner))


class Inverted(nn.Module):
    """A residual block with a depthwise convolution between two pointwise ones, each with BatchNorm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.expand(x)))
        inner = torch.relu(self.norm2(self.depth(inner)))
        return x + self.norm3(self.project(inner))


class Hybrid(nn.Module):
    """A convolutional block, self-attention and a feed-forward network, all residual, for 3 x 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.block = Inverted(16, 24)
        self.attn = Attention(16, 4, 4)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(self.stem(images)).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        x = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        return self.head(x.mean(1))


FUSED = ((0, 4), (16, 4), (32, 4))
HYBRID_GROUPS = ChannelGroups(
    groups=(
        ChannelGroup(
            name="block.expand",
            kind="channels",
            units=24,
            axes=(
                GroupAxis(tensor="block.expand.weight", dim=0, role="out"),
                *(
                    GroupAxis(tensor=f"block.{norm}.{name}", dim=0, role="state")
                    for norm in ("norm1", "norm2")
                    for name in ("weight", "bias", "running_mean", "running_var")
                ),
                GroupAxis(tensor="block.depth.weight", dim=0, role="state"),
                GroupAxis(tensor="block.project.weight", dim=1, role="in"),
            ),
            attributes=(GroupAttribute(module="block.depth", name="groups", per_unit=1),),
        ),
        ChannelGroup(
            name="attn.qkv",
            kind="heads",
            units=4,
            axes=(
                GroupAxis(tensor="attn.qkv.weight", dim=0, role="out", parts=FUSED),
                GroupAxis(tensor="attn.qkv.bias", dim=0, role="state", parts=FUSED),
                GroupAxis(tensor="attn.proj.weight", dim=1, role="in", parts=((0, 4),)),
            ),
            attributes=(
                GroupAttribute(module="attn", name="heads", per_unit=1),
                GroupAttribute(module="attn", name="inner", per_unit=4),
            ),
        ),
        ChannelGroup(
            name="fc1",
            kind="hidden",
            units=32,
            axes=(
                GroupAxis(tensor="fc1.weight", dim=0, role="out"),
                GroupAxis(tensor="fc1.bias", dim=0, role="state"),
                GroupAxis(tensor="fc2.weight", dim=1, role="in"),
            ),
        ),
    )
)


def hybrid(seed: int = 0) -> Hybrid:
    """Return the network in eval mode, with BatchNorm statistics and biases that matter."""
    torch.manual_seed(seed)
    model = Hybrid().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def random_units(groups: ChannelGroups, share: float, seed: int = 1) -> dict[str, Tensor]:
    """Keep the nearest number of units of each group, at least one; sparser choices lie within denser ones."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups.groups:
        order = torch.rand(group.units, generator=generator).argsort()
        kept[group.name] = torch.zeros(group.units, dtype=torch.bool)
        kept[group.name][order[: max(1, round(share * group.units))]] = True
    return kept


def channel_masks(model: nn.Module, groups: ChannelGroups, shares: Mapping[str, float]) -> MaskStore:
    """Return masks of all weights of convolutions and linear layers but the first, by share of units kept."""
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1][1:]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in weights}
    masks = MaskStore(tuple(shares), shapes)
    for sub_net, share in shares.items():
        for name, mask in groups.masks(random_units(groups, share), shapes).items():
            masks.set(sub_net, name, mask)
    return masks


def write_channels(
    path: Path, model: nn.Module, groups: ChannelGroups, shares: Mapping[str, float] = SHARES, **header: Any
) -> Path:
    """Write an elastic file of channel sub-nets as a run does, with BatchNorm statistics a sub-net."""
    state = model.state_dict()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    private = {
        sub_net: {
            name: tensor + 0.1 * (index + 1) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in state.items()
            if name.rpartition(".")[0] in norms
        }
        for index, sub_net in enumerate(shares)
    }
    write_elastic(
        path,
        state=state,
        masks=channel_masks(model, groups, shares),
        private=private,
        header={
            "sub_nets": [
                {"name": name, "target_sparsity": 1 - share, "pattern": "channel"} for name, share in shares.items()
            ],
            "channel_groups": [group.to_dict() for group in groups.groups],
            **header,
        },
    )
    return path

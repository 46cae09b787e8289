"""Small networks with channel groups written by hand, for tests of channel sub-nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis, LeftWhole


class Block(nn.Module):
    """A residual block: two 3x3 convolutions with BatchNorm, of which the inner channels can be dropped."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(inside)))


class ResidualNet(nn.Module):
    """A stem, two residual blocks and a classifier, for 1 x 8 x 8 images of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 16), Block(8, 12))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.norm(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Self-attention with one weight for queries, keys and values, as timm writes it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class AttentionBlock(nn.Module):
    """A pre-norm transformer block: 4 heads of 3, and a feed-forward network with 24 hidden units."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, 4)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 24)
        self.fc2 = nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class TokenNet(nn.Module):
    """Two transformer blocks over the 8 rows of 1 x 8 x 8 images of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.blocks = nn.Sequential(AttentionBlock(), AttentionBlock())
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images[:, 0])).mean(dim=1))


def residual_net(seed: int = 0) -> ResidualNet:
    torch.manual_seed(seed)
    return ResidualNet()


def token_net(seed: int = 0) -> TokenNet:
    torch.manual_seed(seed)
    return TokenNet()


def residual_groups() -> ChannelGroups:
    """Return the groups of `ResidualNet`: 16 and 12 inner channels."""
    return ChannelGroups(
        groups=tuple(
            ChannelGroup(
                name=f"blocks.{i}.conv1",
                kind="channels",
                units=units,
                axes=(
                    GroupAxis(tensor=f"blocks.{i}.conv1.weight", dim=0, role="out"),
                    *(
                        GroupAxis(tensor=f"blocks.{i}.bn1.{name}", dim=0, role="state")
                        for name in ("weight", "bias", "running_mean", "running_var")
                    ),
                    GroupAxis(tensor=f"blocks.{i}.conv2.weight", dim=1, role="in"),
                ),
            )
            for i, units in enumerate((16, 12))
        ),
        left_whole=(LeftWhole(name="head", reason="reaches the output of the model"),),
    )


def token_groups() -> ChannelGroups:
    """Return the groups of `TokenNet`: 4 heads and 24 hidden units a block."""
    thirds = ((0, 3), (12, 3), (24, 3))
    groups = []
    for i in range(2):
        attention, block = f"blocks.{i}.attn", f"blocks.{i}"
        groups.append(
            ChannelGroup(
                name=attention,
                kind="heads",
                units=4,
                axes=(
                    GroupAxis(tensor=f"{attention}.qkv.weight", dim=0, role="out", parts=thirds),
                    GroupAxis(tensor=f"{attention}.qkv.bias", dim=0, role="state", parts=thirds),
                    GroupAxis(tensor=f"{attention}.proj.weight", dim=1, role="in", parts=((0, 3),)),
                ),
                attributes=(GroupAttribute(module=attention, name="num_heads", per_unit=1),),
            )
        )
        groups.append(
            ChannelGroup(
                name=f"{block}.fc1",
                kind="hidden",
                units=24,
                axes=(
                    GroupAxis(tensor=f"{block}.fc1.weight", dim=0, role="out"),
                    GroupAxis(tensor=f"{block}.fc1.bias", dim=0, role="state"),
                    GroupAxis(tensor=f"{block}.fc2.weight", dim=1, role="in"),
                ),
            )
        )
    return ChannelGroups(groups=tuple(groups))

"""Blocks as language models have them: separate or shared queries, keys and values, gated hidden units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis


class SeparateAttention(nn.Module):
    """Self-attention with a layer each for queries, keys and values; several query heads may share keys and values."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, shared, width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, shared * self.head_dim)
        self.v = nn.Linear(width, shared * self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            layer(x).view(batch, tokens, self.num_kv_heads, self.head_dim).transpose(1, 2) for layer in (self.k, self.v)
        )
        times = self.num_heads // self.num_kv_heads
        if times > 1:
            k, v = (
                each[:, :, None].expand(batch, self.num_kv_heads, times, tokens, self.head_dim).flatten(1, 2)
                for each in (k, v)
            )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class Gated(nn.Module):
    """A feed-forward network whose hidden units are products: of two layers, or of the halves of one."""

    def __init__(self, width: int, hidden: int, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.gate = nn.Linear(width, 2 * hidden if fused else hidden)
        self.up = nn.Identity() if fused else nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(functional.silu(gate) * up)


class Around(nn.Module):
    """One block with a residual connection between two linear layers, for 5 numbers a token."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.block = block
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.block(x))


def separate_attention(heads: int = 4, shared: int = 4) -> Around:
    torch.manual_seed(0)
    return Around(SeparateAttention(16, heads, shared), 16)


def separate_attention_groups(heads: int = 4, shared: int = 4) -> ChannelGroups:
    """Return the one group of `separate_attention`: as many units as there are heads of keys and values."""
    blocks = {"q": 16 // heads * (heads // shared), "k": 16 // heads, "v": 16 // heads}
    axes = [GroupAxis(tensor=f"block.{n}.weight", dim=0, role="out", parts=((0, b),)) for n, b in blocks.items()]
    axes += [GroupAxis(tensor=f"block.{n}.bias", dim=0, role="state", parts=((0, b),)) for n, b in blocks.items()]
    axes.append(GroupAxis(tensor="block.proj.weight", dim=1, role="in", parts=((0, 16 // shared),)))
    return ChannelGroups(groups=(ChannelGroup(name="block.q", kind="heads", units=shared, axes=tuple(axes)),))


def gated(*, fused: bool) -> Around:
    torch.manual_seed(0)
    return Around(Gated(12, 20, fused=fused), 12)


def gated_groups(*, fused: bool) -> ChannelGroups:
    """Return the one group of `gated`: 20 hidden units."""
    parts = ((0, 1), (20, 1)) if fused else ((0, 1),)
    makers = ("gate",) if fused else ("gate", "up")
    axes = [GroupAxis(tensor=f"block.{n}.weight", dim=0, role="out", parts=parts) for n in makers]
    axes += [GroupAxis(tensor=f"block.{n}.bias", dim=0, role="state", parts=parts) for n in makers]
    axes.append(GroupAxis(tensor="block.down.weight", dim=1, role="in"))
    return ChannelGroups(groups=(ChannelGroup(name="block.gate", kind="hidden", units=20, axes=tuple(axes)),))

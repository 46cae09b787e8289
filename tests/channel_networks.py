"""Small networks with the groups of their channels, and what tests compare of two runs over channel sub-nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import ConvNet, conv_net, mlp
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis

_NORM = ("weight", "bias", "running_mean", "running_var")


def channel_group(
    maker: str, reader: str, units: int, *states: str, name: str | None = None, columns: int = 1
) -> ChannelGroup:
    """Return a group: rows of `maker`, states of one value a unit, columns of `reader`."""
    return ChannelGroup(
        name=name or maker,
        kind="channels",
        units=units,
        axes=(
            GroupAxis(tensor=f"{maker}.weight", dim=0, role="out"),
            *(GroupAxis(tensor=state, dim=0, role="state") for state in states),
            GroupAxis(tensor=f"{reader}.weight", dim=1, role="in", parts=((0, columns),)),
        ),
    )


def norm_states(name: str) -> list[str]:
    return [f"{name}.{state}" for state in _NORM]


def conv_groups(*, norm: bool = True) -> ChannelGroups:
    """Return the groups of `networks.ConvNet`: all of its convolutions."""
    chain = (("stem", "conv1", 8, "norm0"), ("conv1", "conv2", 16, "norm1"), ("conv2", "head", 16, "norm2"))
    return ChannelGroups(
        groups=tuple(
            channel_group(maker, reader, units, *(norm_states(name) if norm else ()))
            for maker, reader, units, name in chain
        )
    )


def mlp_groups() -> ChannelGroups:
    """Return the groups of `networks.mlp`: both hidden layers, with their biases."""
    return ChannelGroups(
        groups=(channel_group("0", "2", 16, "0.bias", name="a"), channel_group("2", "4", 16, "2.bias", name="b"))
    )


class Attention(nn.Module):
    """Self-attention with fused queries, keys and values, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, self.attn_dim))


class Tokens(nn.Module):
    """Three tokens of four numbers each, attention, and a classifier: for the vectors of `networks.vector_batch`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.norm = nn.LayerNorm(16)
        self.attn = Attention(16, 4)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.embed(vectors.view(len(vectors), 3, 4))
        x = x + self.attn(self.norm(x))
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def tokens() -> Tokens:
    torch.manual_seed(0)
    return Tokens()


def token_groups() -> ChannelGroups:
    """Return the groups of `Tokens`: attention heads with their rows, and hidden units."""
    parts = ((0, 4), (16, 4), (32, 4))
    heads = ChannelGroup(
        name="attn",
        kind="heads",
        units=4,
        axes=(
            GroupAxis(tensor="attn.qkv.weight", dim=0, role="out", parts=parts),
            GroupAxis(tensor="attn.qkv.bias", dim=0, role="state", parts=parts),
            GroupAxis(tensor="attn.proj.weight", dim=1, role="in", parts=((0, 4),)),
        ),
        attributes=(
            GroupAttribute(module="attn", name="num_heads", per_unit=1),
            GroupAttribute(module="attn", name="attn_dim", per_unit=4),
        ),
    )
    return ChannelGroups(groups=(heads, channel_group("up", "down", 24, "up.bias")))


class Depthwise(nn.Module):
    """A depthwise convolution between two ordinary ones: its channels and its number of groups follow."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 12, 1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(functional.relu(self.deep(functional.relu(self.wide(images)))).mean(dim=(2, 3)))


def depthwise() -> Depthwise:
    torch.manual_seed(0)
    return Depthwise()


def depthwise_groups() -> ChannelGroups:
    group = channel_group("wide", "head", 12, "wide.bias", "deep.weight", "deep.bias")
    numbers = tuple(GroupAttribute(module="deep", name=n, per_unit=1) for n in ("groups",))
    return ChannelGroups(groups=(ChannelGroup(**{**vars(group), "attributes": numbers}),))


def groups_of(model: nn.Module) -> ChannelGroups:
    """Return the groups of any network of this file or of `networks`, inside whatever is around it."""
    if isinstance(model, ConvNet):
        return conv_groups(norm=isinstance(model.norm0, nn.BatchNorm2d))
    if isinstance(model, Tokens):
        return token_groups()
    return depthwise_groups() if isinstance(model, Depthwise) else mlp_groups()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv_net": conv_net,
    "mlp": mlp,
    "tokens": tokens,
    "depthwise": depthwise,
}

# Masks change often and units come back; the first ones are of the full sparsity.
BUSY: dict[str, Any] = {
    "sparsities": (0.25, 0.5, 0.75),
    "pattern": "channel",
    "method": "rigl",
    "total_steps": 60,
    "update_interval": 9,
    "drop_fraction": 0.4,
}


def sliced_run(
    model: nn.Module, optimizer: torch.optim.Optimizer, slicing: str, **options: Any
) -> ast_plugin.AlternatingSparseTraining:
    """Wrap a network of this file with three channel sub-nets."""
    settings = {**BUSY, "groups": groups_of(model), **options, "slicing": slicing}
    return ast_plugin.wrap(optimizer, model, **settings)


class Witness:
    """Counts the forwards of a network in which weights were smaller, and those in which none was.

    Args:
        model: The network; its modules get hooks.
        names: The modules to look at.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.sliced = 0
        self.whole = 0
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, _: Any) -> None:
        smaller = module.weight.numel() < module._parameters["weight"].numel()  # type: ignore[union-attr,operator]
        self.sliced += smaller
        self.whole += not smaller

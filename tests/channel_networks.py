<<<<<<< HEAD
"""Small networks with the groups of their channels, and what tests compare of two runs over channel sub-nets."""
=======
"""Small networks whose channel groups are worked out by hand in the tests of the search."""
>>>>>>> search

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import ConvNet, conv_net, mlp
from torch import Tensor, nn
from torch.nn import functional

<<<<<<< HEAD
import ast_plugin
from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis

_NORM = ("weight", "bias", "running_mean", "running_var")
=======
>>>>>>> search

class Residual(nn.Module):
    """A block of the kind of ResNet: x + conv2(relu(norm1(conv1(x)))), of any width inside, with a stem and a head."""

<<<<<<< HEAD
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
=======
    def __init__(self, inner: int = 6, groups: int = 1, bottleneck: bool = False, norm: nn.Module | None = None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, inner, 1, bias=False)
        self.norm1 = norm or nn.BatchNorm2d(inner)
        self.between = nn.Conv2d(inner, inner, 3, padding=1, groups=groups) if bottleneck else nn.Identity()
        self.conv2 = nn.Conv2d(inner, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.conv2(self.between(functional.relu(self.norm1(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """An inverted residual: expansion, depthwise convolution, squeeze-excitation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 2, 1)
        self.restore = nn.Conv2d(2, 8, 1)
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        inner = functional.silu(self.norm(self.depthwise(self.expand(x))))
        gate = self.restore(functional.relu(self.reduce(inner.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x + self.project(inner * gate)).mean((2, 3)))


class Attention(nn.Module):
    """Attention of the kind of timm's: one weight for queries, keys and values."""

    def __init__(self, dim: int = 12, num_heads: int = 3, of_input: bool = False) -> None:
        super().__init__()
        self.num_heads, self.attn_dim, self.of_input = num_heads, dim, of_input
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(batch, tokens, width if self.of_input else self.attn_dim))


class GroupedQueries(nn.Module):
    """Attention of the kind of Llama's: separate layers, several heads of queries to one of keys and values."""

    def __init__(self, dim: int = 16, heads: int = 4, kv_heads: int = 2, head_dim: int = 6) -> None:
        super().__init__()
        self.head_dim, self.ratio = head_dim, heads // kv_heads
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        half = q.shape[-1] // 2
        q = q * 0.8 + torch.cat((-q[..., half:], q[..., :half]), -1) * 0.6  # as rotary embeddings do
        k, v = k.repeat_interleave(self.ratio, 1), v.repeat_interleave(self.ratio, 1)
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Two producers multiplied, or one weight in two parts, as in SwiGLU."""
>>>>>>> search

    def __init__(self, dim: int = 8, inner: int = 10, fused: bool = False) -> None:
        super().__init__()
<<<<<<< HEAD
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
=======
        self.fused = fused
        self.gate = nn.Linear(dim, inner * 2 if fused else inner)
        self.up = nn.Identity() if fused else nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(functional.silu(gate) * up)


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class FeedForward(nn.Module):
    """Two layers with an activation function, or anything else, between them."""

    def __init__(self, between: nn.Module | None = None, dim: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.between = between or nn.GELU()
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


class Stream(nn.Module):
    """Blocks around a residual stream, between an entry and a head."""

    def __init__(self, *blocks: nn.Module, dim: int) -> None:
        super().__init__()
        self.entry = nn.Linear(5, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return self.head(x)


TOKENS = torch.ones(2, 7, 5)
IMAGES = torch.ones(2, 3, 8, 8)
>>>>>>> search

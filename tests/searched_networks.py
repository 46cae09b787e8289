"""Small networks whose channel groups are worked out by hand in the tests of the search."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """A block of the kind of ResNet: x + conv2(relu(norm1(conv1(x)))), of any width inside, with a stem and a head."""

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


class FusedKeys(nn.Module):
    """Attention with queries from one layer, keys and values from another, and softmax written out."""

    def __init__(self, dim: int = 8, heads: int = 2, size: int = 3, value: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.query = nn.Linear(dim, heads * size)
        self.pair = nn.Linear(dim, heads * (size + value))
        self.out = nn.Linear(heads * value, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.pair(x).split((self.heads * self.size, self.pair.weight.shape[0] - self.heads * self.size), -1)
        k, v = (part.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for part in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Two producers multiplied, or one weight in two parts, as in SwiGLU."""

    def __init__(self, dim: int = 8, inner: int = 10, fused: bool = False) -> None:
        super().__init__()
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

"""Linear layers that multiply by a sparse matrix from the left, which is how sparse products pay on a CPU.

``W @ x.T`` with a compressed weight and 32-bit indices, a few tokens at a time, is several times as fast as
``F.linear(x, W)`` with the same weight, and faster than the dense product from 70 to 80 % zeros on (docs/speed.md has
figures).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ast_plugin.errors import ActivationError, ConfigError

Layout = Literal["csr", "bsr"]
DTYPES = (torch.float32, torch.float64)  # of no other types do CPUs have sparse products
# Tokens that a weight of single values is multiplied by at a time, so that what its places reach into at random stays
# in the processor's cache: 768 x 3072 with 90 % zeros is twice as fast for 197 tokens and nearly five times for 1576;
# 16 and 64 at a time are slower. Blocks gain nothing.
_TOKENS = 32


class SparseLinear(nn.Module):
    """A linear layer for inference whose weight is held compressed. Gradients are not supported.

    The compressed weight is kept as three ordinary buffers, so that state dicts, copies and files hold plain tensors
    only; the sparse tensor that is multiplied shares their memory and is made when it is first needed.

    Args:
        weight: Dense, (out, in), float32 or float64.
        bias: (out,) of the same type, or None.
        layout: ``csr``, or ``bsr`` for blocks.
        block_size: Edge of the square blocks of ``bsr``; divides both dimensions.
        contiguous: Whether outputs are laid out like those of `nn.Linear`. Otherwise the features of all tokens lie
            side by side, which saves a copy; code that calls ``view`` may refuse it.

    Raises:
        ConfigError: If the type or the block size does not fit.
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, layout: Layout, block_size: int = 8, contiguous: bool = True
    ) -> None:
        super().__init__()
        if weight.dtype not in DTYPES:
            raise ConfigError(
                f"form {layout!r} multiplies float32 and float64 weights, and this one is {weight.dtype}; convert the "
                "model, for example with model.float(), or choose form='dense'"
            )
        self.out_features, self.in_features = weight.shape
        self.layout: Layout = layout
        self.block_size = block_size
        self.contiguous = contiguous
        self._matrix: tuple[Tensor, Tensor] | None = None
        with torch.inference_mode(False), torch.no_grad():
            rows, columns, values = _compressed(weight.detach(), layout, block_size)
            self.register_buffer("row_starts", rows)
            self.register_buffer("columns", columns)
            self.register_buffer("values", values)
            self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The sparse weight, (out, in); libraries look at its type and device."""
        if self._matrix is None or self._matrix[0] is not self.values:
            self._matrix = (self.values, self._make())
        return self._matrix[1]

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``.

        Args:
            input: (..., in), of the weight's type; under autocast of any floating-point type.

        Returns:
            (..., out), of the weight's type.

        Raises:
            ActivationError: If a gradient would be needed.
            ConfigError: If type or size do not fit.
        """
        if input.requires_grad and torch.is_grad_enabled():
            raise ActivationError(
                f"a layer compiled as {self.layout!r} has no gradients: call the model under torch.inference_mode(), "
                "or compile the sub-net with form='dense' for training"
            )
        device = input.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # it would turn the sparse weight to half precision
                return self._product(input.to(self.values.dtype))
        return self._product(input)

    def extra_repr(self) -> str:
        """Return sizes, layout and the share of zeros, for ``repr``."""
        stored = self.values.numel() / max(1, self.out_features * self.in_features)
        blocks = f" {self.block_size}x{self.block_size}" if self.layout == "bsr" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.layout}{blocks}, {1 - stored:.1%} zeros"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None}

    def _product(self, input: Tensor) -> Tensor:
        matrix = self.weight
        if input.dtype != matrix.dtype or input.shape[-1:] != (self.in_features,):
            raise ConfigError(
                f"a layer compiled as {self.layout!r} takes {matrix.dtype} of shape (..., {self.in_features}), got "
                f"{input.dtype} of shape {tuple(input.shape)}"
            )
        shape = (*input.shape[:-1], self.out_features)
        tokens = input.reshape(-1, self.in_features)
        if not tokens.numel():
            return input.new_empty(shape)
        parts = [tokens] if self.layout == "bsr" or tokens.is_cuda else tokens.split(_TOKENS)
        products = [self._left_product(matrix, part.t()) for part in parts]
        if len(products) == 1:
            output = products[0].t()
            return (output.contiguous() if self.contiguous else output).view(shape)
        if self.contiguous:
            return torch.cat([product.t() for product in products]).view(shape)
        return torch.cat(products, 1).t().view(shape)

    def _left_product(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(matrix, tokens)
        return torch.addmm(self.bias[:, None], matrix, tokens)

    def _make(self) -> Tensor:
        if self.values.dtype not in DTYPES:
            raise ConfigError(
                f"a layer compiled as {self.layout!r} was converted to {self.values.dtype}, of which there are no "
                "sparse products; convert the model before it is compiled, and choose form='dense'"
            )
        parts = (self.row_starts, self.columns, self.values, (self.out_features, self.in_features))
        with warnings.catch_warnings(), torch.inference_mode(False):
            # Torch says once that these layouts are in beta; whoever chooses the form knows.
            warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
            if self.layout == "csr":
                return torch.sparse_csr_tensor(*parts, check_invariants=False)
            return torch.sparse_bsr_tensor(*parts, check_invariants=False)


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model.

    Attributes:
        paths: Where it stands; several where a module is used at several places.
        module: `nn.Linear`, or Hugging Face's ``Conv1D``.
        weight: (out, in), a transposed view for ``Conv1D``.
        bias: (out,) or None.
    """

    paths: tuple[str, ...]
    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weight, in [0, 1]."""
        return 1 - int(torch.count_nonzero(self.weight)) / max(1, self.weight.numel())


def linear_layers(model: nn.Module) -> list[LinearLayer]:
    """Return the linear layers whose forward can be replaced, each once, in the order of the model.

    Left out are subclasses that compute something else, layers with hooks or parametrizations, and those whose weights
    torch's attention and transformer layers read themselves.
    """
    opaque = {id(child) for module in model.modules() if isinstance(module, _FUSED) for child in module.modules()}
    paths: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    return list(_layers(modules, paths, opaque))


def replace(model: nn.Module, layer: LinearLayer, module: nn.Module) -> nn.Module:
    """Put a module in the place of a linear layer, wherever it stands; return the model, or what replaces it."""
    for path in layer.paths:
        if not path:
            return module
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return model


_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _layers(modules: dict[str, nn.Module], paths: dict[int, list[str]], opaque: set[int]) -> Iterator[LinearLayer]:
    seen: set[int] = set()
    for module in modules.values():
        if id(module) in seen or id(module) in opaque:
            continue
        seen.add(id(module))
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or weight.dim() != 2 or module._forward_hooks or module._forward_pre_hooks:
            continue
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            yield LinearLayer(tuple(paths[id(module)]), module, weight.detach(), bias)
        elif type(module).__name__ == "Conv1D":  # by name, so that transformers need not be imported
            yield LinearLayer(tuple(paths[id(module)]), module, weight.detach().t(), bias)


def _compressed(weight: Tensor, layout: Layout, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where rows start, the columns and the values of what is not zero; of blocks, those with a value."""
    edge = 1 if layout == "csr" else block_size
    if edge < 1 or weight.shape[0] % edge or weight.shape[1] % edge:
        raise ConfigError(
            f"blocks of {block_size}x{block_size} do not fill a weight of shape {tuple(weight.shape)}; give a "
            "block_size that divides both"
        )
    blocks = weight.reshape(weight.shape[0] // edge, edge, weight.shape[1] // edge, edge).transpose(1, 2)
    occupied = (blocks != 0).flatten(2).any(2)
    rows = torch.zeros(occupied.shape[0] + 1, dtype=torch.int32, device=weight.device)
    torch.cumsum(occupied.sum(1), dim=0, dtype=torch.int32, out=rows[1:])
    columns = occupied.nonzero()[:, 1].to(torch.int32)
    values = blocks[occupied]
    return rows, columns, values.reshape(-1) if layout == "csr" else values.contiguous()

"""A small network with masks and private BatchNorm state, as the tests of elastic files and exports use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ast_plugin.elastic_file import write_elastic
from ast_plugin.masks import MaskStore

SUB_NETS = ("s50", "s80")
SPARSITY = {"s50": 0.5, "s80": 0.8}


class Network(nn.Module):
    """A convolution with BatchNorm and two linear layers; 5 x 7 = 35 weights do not fill whole bytes of mask."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.hidden = nn.Linear(7, 7)
        self.head = nn.Linear(7, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(features)))


PRUNABLE = ("conv.weight", "hidden.weight", "head.weight")


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().eval()


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def random_masks(model: nn.Module, parameters: Sequence[str] = PRUNABLE, seed: int = 1) -> MaskStore:
    """Keep each weight with the chance that the sub-net's sparsity leaves it; the masks are not nested."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in parameters}
    masks = MaskStore(SUB_NETS, shapes)
    for sub_net in SUB_NETS:
        for name, shape in shapes.items():
            masks.set(sub_net, name, torch.rand(shape, generator=generator) >= SPARSITY[sub_net])
    return masks


def private_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return a BatchNorm state a sub-net, different in every tensor; the model's own is left as it is."""
    norms = {f"{path}.": module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    state = {}
    for index, sub_net in enumerate(SUB_NETS):
        state[sub_net] = {
            path + key: tensor.clone() + index + 1
            for path, module in norms.items()
            for key, tensor in module.state_dict().items()
        }
    return state


def expected(model: nn.Module, masks: MaskStore, private: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Return the sub-net's state dict in the most direct way: where kept the weight, else zero."""
    state = {}
    for key, tensor in model.state_dict().items():
        if key in masks.parameters:
            state[key] = torch.where(masks.get(name, key), tensor, torch.zeros((), dtype=tensor.dtype))
        else:
            state[key] = private[name].get(key, tensor).clone()
    return state


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Tell whether two state dicts agree in names, order, dtypes and every value, NaN included."""
    return list(left) == list(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0))
        for a, b in zip(left.values(), right.values(), strict=True)
    )


def write_example(path: Path, model: nn.Module | None = None, **header: object) -> Path:
    """Write an elastic file of the small network."""
    model = network() if model is None else model
    masks = random_masks(model)
    write_elastic(path, state=model.state_dict(), masks=masks, private=private_state(model), header=header)
    return path

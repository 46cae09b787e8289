"""Small networks, data and loops that several test files train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin


class ConvNet(nn.Module):
    """A stem, two 3x3 convolutions with BatchNorm and a classifier, for 1 x 8 x 8 images of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm0(self.stem(images)))
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def conv_net(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet()


def mlp(seed: int = 0) -> nn.Sequential:
    """Three linear layers without any normalisation: 12 -> 16 -> 16 -> 4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def plain_conv_net() -> ConvNet:
    """Return `conv_net` without BatchNorm."""
    net = conv_net()
    net.norm0, net.norm1, net.norm2 = nn.Identity(), nn.Identity(), nn.Identity()
    return net


BATCH_NORM_FREE: list[Callable[[], nn.Module]] = [plain_conv_net, mlp]


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **options})


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def image_batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy images of class-dependent stripes, a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(5, (size,), generator=generator)
    columns = torch.arange(8).repeat(8, 1)
    images = torch.stack([((columns + int(label)) % 5 < 2).float() for label in labels])[:, None]
    return images + 0.3 * torch.randn(size, 1, 8, 8, generator=generator), labels


def vector_batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Vectors whose class is the largest of four of their sums, a pure function of the step."""
    generator = torch.Generator().manual_seed(2000 + step)
    inputs = torch.randn(size, 12, generator=generator)
    return inputs, inputs.view(size, 4, 3).sum(dim=2).argmax(dim=1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    batch: Callable[[int], tuple[Tensor, Tensor]] = image_batch,
) -> None:
    for step in steps:
        train_step(model, optimizer, batch(step))


SETTINGS: dict[str, Any] = {"sparsities": (0.5, 0.8, 0.9), "total_steps": 60, "update_interval": 6}


def wrapped(
    model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    """Return a model, its optimizer and a controller with three sub-nets and a dense schedule of updates."""
    model = conv_net() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    return model, optimizer, ast_plugin.wrap(optimizer, model, **{**SETTINGS, **options})


def nonzero(model: nn.Module, ast: ast_plugin.AlternatingSparseTraining) -> int:
    """Count the weights that are not zero among those to prune: all of them while the model is dense."""
    return sum(int(model.get_parameter(name).count_nonzero()) for name in ast.masks.parameters)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers without going through ``state_dict``, whose hooks would tidy up first."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare nested containers of tensors bit for bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        _assert_same(key, value, other[key])


def _assert_same(where: object, one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            _assert_same((where, key), value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            _assert_same((where, index), value, other[index])
    else:
        assert one == other, where

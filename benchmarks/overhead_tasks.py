"""What `overhead.py` trains: ResNet-32 on CIFAR shapes and ViT-tiny at 64 pixels, with SGD and with AdamW.

The data are synthetic: a step costs the same whatever the pictures show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

NETWORKS = ("ResNet-32", "ViT-tiny")
OPTIMIZERS = ("SGD", "AdamW")
LEARNING_RATE = 1e-3  # small: what is measured must not run into zeros or infinities

_CLASSES = 10
_SETTLING_BATCH = 2


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters (option A of He et al. 2016).

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: 2 halves the image.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        """Map (count, inputs, height, width) to (count, outputs, height / stride, width / stride)."""
        hidden = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(images)))))
        if self.stride > 1 or self.grown:
            before = self.grown // 2
            images = pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grown - before))
        return torch.relu(hidden + images)


class ResNet32(nn.Module):
    """The CIFAR network of He et al. 2016 with 32 layers: three stages of five blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        width, blocks = 16, []
        for outputs in (16, 32, 64):
            for index in range(5):
                blocks.append(Block(width, outputs, 2 if index == 0 and outputs > 16 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores for images of shape (count, 3, height, width)."""
        hidden = self.blocks(torch.relu(self.norm(self.stem(images))))
        return self.classifier(hidden.mean(dim=(2, 3)))


def vit_tiny() -> nn.Module:
    """Return timm's ``vit_tiny_patch16_224`` for pictures of 64 pixels, with random weights."""
    try:
        import timm
    except ImportError:
        raise SystemExit(
            "ViT-tiny comes from timm, which is not installed: pip install 'ast-plugin[timm]', or leave it out with "
            "--networks ResNet-32"
        ) from None
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=_CLASSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch, used at every step."""

    images: Tensor
    labels: Tensor

    def head(self, count: int) -> Batch:
        """Return its first pictures."""
        return Batch(images=self.images[:count], labels=self.labels[:count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A network, an optimizer and a batch.

    Attributes:
        network: One of `NETWORKS`.
        optimizer: One of `OPTIMIZERS`.
        batch: What every step trains on.
    """

    network: str
    optimizer: str
    batch: Batch

    @property
    def label(self) -> str:
        """How the task is called in tables."""
        return f"{self.network}, {self.optimizer}"

    @property
    def small_batch(self) -> Batch:
        """A part of the batch, for steps whose time does not count."""
        return self.batch.head(_SETTLING_BATCH)

    def model(self) -> nn.Module:
        """Return the network with the same weights at every call."""
        torch.manual_seed(0)
        return (ResNet32() if self.network == "ResNet-32" else vit_tiny()).train()

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a new optimizer for a model."""
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


def make_task(network: str, optimizer: str, *, quick: bool = False, batch_size: int | None = None) -> Task:
    """Return a task with random pictures.

    Args:
        network: One of `NETWORKS`.
        optimizer: One of `OPTIMIZERS`.
        quick: Whether pictures are few (and, for ResNet-32, small): for trying the script out.
        batch_size: Other than the network's own.
    """
    generator = torch.Generator().manual_seed(0)
    if network == "ResNet-32":
        count, side = (4, 8) if quick else (128, 32)
    else:
        count, side = (2, 64) if quick else (32, 64)
    count = batch_size or count
    images = torch.randn(count, 3, side, side, generator=generator)
    labels = torch.randint(_CLASSES, (count,), generator=generator)
    return Task(network=network, optimizer=optimizer, batch=Batch(images=images, labels=labels))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    clip: bool = False,
    before_step: Sequence[Callable[[], object]] = (),
) -> None:
    """Make one training step as an ordinary loop does.

    Args:
        model: In training mode.
        optimizer: Its optimizer.
        batch: What to train on.
        clip: Whether the gradients' norm is limited to 1.
        before_step: Called between backward and the optimizer's step.
    """
    optimizer.zero_grad()
    cross_entropy(model(batch.images), batch.labels).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for call in before_step:
        call()
    optimizer.step()

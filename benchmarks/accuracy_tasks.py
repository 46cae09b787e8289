"""The two real tasks of `accuracy.py`: classifying digits, and predicting the next byte of Python source.

A task makes its network, its batches and its measurements. Every batch is a pure function of (seed, step), and what is
measured on is the same for all seeds, so runs of different settings can be compared seed by seed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ast_plugin.demo_data import load_digits, seeded_generator
from ast_plugin.demo_model import DigitsResNet

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What a benchmark run needs to know of a task.

    Attributes:
        name: How it is asked for.
        defaults: Steps, sparsities, optimizer and `ASTConfig` settings of its reference run.
        measures: What `measure` returns, the main figure first, with its unit.
        decimals: Of the main figure in tables.
    """

    name: str
    defaults: ClassVar[Mapping[str, Any]]
    measures: ClassVar[Mapping[str, str]]
    decimals: int

    def model(self) -> nn.Module:
        """Return a new network, initialized from torch's global generator."""

    def batch(self, step: int, *, seed: int) -> Batch:
        """Return inputs and targets of a training step."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the figures named in `measures` on held-out data; the model is in eval mode."""


class Digits:
    """The demo's task and network: scikit-learn's handwritten digits, augmented; a residual network with BatchNorm."""

    name = "digits"
    decimals = 2
    measures: ClassVar[Mapping[str, str]] = {"accuracy": "%", "loss": "nats"}
    defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 1800,
        "sparsities": (0.90, 0.95, 0.98),
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "options": {"drop_fraction": 0.1, "end_step": 0.5, "update_interval": 0.05},
    }

    def __init__(self) -> None:
        self._digits = load_digits()

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return DigitsResNet()

    def batch(self, step: int, *, seed: int) -> Batch:
        """See `Task.batch`."""
        return self._digits.batch(step, seed=seed, batch_size=64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.loss`."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    def measure(self, model: nn.Module) -> dict[str, float]:
        """See `Task.measure`."""
        images, labels = self._digits.test_images, self._digits.test_labels
        right, loss = 0, 0.0
        with torch.no_grad():
            for chunk, wanted in zip(images.split(797), labels.split(797), strict=True):
                scores = model(chunk)
                right += int((scores.argmax(dim=1) == wanted).sum())
                loss += float(functional.cross_entropy(scores, wanted, reduction="sum"))
        return {"accuracy": 100 * right / len(labels), "loss": loss / len(labels)}


class Bytes:
    """A language model on the source of Python's own standard library: the next byte from the 64 before it.

    Training and held-out data are different files; which is which depends on the file's name alone.
    """

    name = "bytes"
    decimals = 3
    measures: ClassVar[Mapping[str, str]] = {"bits": "bits per byte", "accuracy": "%"}
    context = 64
    batch_size = 8
    defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 1000,
        "sparsities": (0.80, 0.90, 0.95),
        "optimizer": "adamw",
        "learning_rate": 0.024,
        "momentum": 0.8,
        "weight_decay": 0.05,
        "options": {"drop_fraction": 0.1, "end_step": 0.5, "update_interval": 0.05},
    }

    def __init__(self) -> None:
        self.train, self.held_out = standard_library()

    def model(self) -> nn.Module:
        """See `Task.model`."""
        return ByteNet()

    def batch(self, step: int, *, seed: int) -> Batch:
        """See `Task.batch`."""
        generator = seeded_generator("bytes", seed, step)
        starts = torch.randint(len(self.train) - self.context, (self.batch_size,), generator=generator)
        return self._windows(self.train, starts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task.loss`."""
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def measure(self, model: nn.Module) -> dict[str, float]:
        """See `Task.measure`."""
        # Windows evenly spread over the held-out files; of each, the second half is measured, which has context.
        starts = torch.linspace(0, len(self.held_out) - self.context - 1, 1024).long()
        half = self.context // 2
        nats, right, count = 0.0, 0, 0
        with torch.no_grad():
            for chunk in starts.split(64):
                inputs, targets = self._windows(self.held_out, chunk)
                scores, wanted = model(inputs)[:, half:].flatten(0, 1), targets[:, half:].flatten()
                nats += float(functional.cross_entropy(scores, wanted, reduction="sum"))
                right += int((scores.argmax(dim=1) == wanted).sum())
                count += len(wanted)
        return {"bits": nats / count / math.log(2), "accuracy": 100 * right / count}

    def _windows(self, data: Tensor, starts: Tensor) -> Batch:
        rows = data[starts[:, None] + torch.arange(self.context + 1)].long()
        return rows[:, :-1], rows[:, 1:]


class GatedConvolution(nn.Module):
    """A causal convolution with a gate, behind a LayerNorm and beside a shortcut (Dauphin et al. 2017, section 2).

    The convolution is written as a linear layer over shifted copies, which is faster on a CPU.

    Args:
        width: Channels.
        taps: Positions that the convolution reads.
        dilation: Distance between two of them.
    """

    def __init__(self, width: int, taps: int, dilation: int) -> None:
        super().__init__()
        self.taps, self.dilation = taps, dilation
        self.norm = nn.LayerNorm(width)
        self.convolve = nn.Linear(taps * width, 2 * width)
        self.mix = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (count, length, width) to the same shape."""
        length = inputs.shape[1]
        padded = functional.pad(self.norm(inputs), (0, 0, (self.taps - 1) * self.dilation, 0))
        shifted = [padded[:, i * self.dilation : i * self.dilation + length] for i in range(self.taps)]
        return inputs + self.mix(functional.glu(self.convolve(torch.cat(shifted, dim=2)), dim=2))


class ByteNet(nn.Module):
    """A language model over bytes: gated causal convolutions with LayerNorm; each output sees the last 31 bytes.

    Args:
        width: Channels.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*[GatedConvolution(width, 3, dilation) for dilation in (1, 2, 4, 8)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        nn.init.normal_(self.bytes.weight, std=0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scores (count, length, 256) of the byte after each of `inputs` (count, length), int64."""
        return self.head(self.norm(self.blocks(self.bytes(inputs))))  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def standard_library(folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return training and held-out bytes, uint8: the top-level modules of the standard library, one in ten held out.

    Args:
        folder: Where the modules lie; None takes the running interpreter's.
    """
    files = sorted((folder or Path(sysconfig.get_paths()["stdlib"])).glob("*.py"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for file in files:
        held_out = hashlib.blake2b(file.name.encode(), digest_size=2).digest()[0] % 10 == 0
        parts[held_out].append(file.read_bytes())
    train, measured = (torch.frombuffer(bytearray(b"".join(parts[k])), dtype=torch.uint8) for k in (False, True))
    return train, measured


TASKS: dict[str, type[Digits] | type[Bytes]] = {task.name: task for task in (Digits, Bytes)}

"""Tiny LightningModules and Trainers on them; shared by the tests of that integration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from networks import conv_net, image_batch, vector_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ast_plugin.integrations.frameworks.lightning import ASTCallback

SUB_NETS = ("s50", "s80", "s90")
# Masks change often and weights come back, so that every part of a step is at work within a few steps.
BUSY: dict[str, Any] = {"sparsities": (0.5, 0.8, 0.9), "method": "rigl", "update_interval": 3}


def data(batches: int = 8, *, size: int = 8, first: int = 0, images: bool = True, shuffle: bool = False) -> DataLoader:
    """Return a loader of so many batches."""
    make = image_batch if images else vector_batch
    found = [make(first + step, size) for step in range(batches)]
    return DataLoader(
        TensorDataset(*(torch.cat(parts) for parts in zip(*found, strict=True))), batch_size=size, shuffle=shuffle
    )


class Classifier(pl.LightningModule):
    """A network as an attribute, called by its own name; loss and accuracy are logged."""

    def __init__(self, model: nn.Module | None = None, *, rate: float = 0.05, decay: float = 0.8) -> None:
        super().__init__()
        self.model = conv_net(0) if model is None else model
        self.rate, self.decay = rate, decay
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        output = self.model(inputs)
        return functional.cross_entropy(output.float(), labels), (output.argmax(1) == labels).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, accuracy = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True)
        self.log_dict({"val_accuracy": accuracy})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        loss, accuracy = self.loss(batch)
        self.log("test_loss", loss)
        self.log("test_accuracy", accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sparse(**options: Any) -> ASTCallback:
    """Return a callback for three sub-nets whose masks change every third step."""
    return ASTCallback(**{**BUSY, **options})


def trainer_of(folder: Path, *callbacks: pl.Callback, **given: Any) -> pl.Trainer:
    """Return a quiet Trainer for two epochs on the processor."""
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**usual, **given}, callbacks=list(callbacks))

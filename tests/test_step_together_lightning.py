"""Steps that train several sub-nets in Lightning, whose automatic optimization gives the optimizer a closure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from joint_reference import train_jointly
from networks import conv_net, image_batch
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.integrations.family import plugin
from ast_plugin.integrations.frameworks.lightning import ASTCallback

pytestmark = [pytest.mark.extra("lightning")]

OPTIONS: dict[str, Any] = {
    "sparsities": (0.5, 0.8, 0.9),
    "alternation": "joint",
    "plugins": [plugin],
    "update_interval": 4,
    "seed": 0,
}


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = conv_net()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_a_training_is_that_of_a_loop_with_a_closure(tmp_path: Path) -> None:
    callback = ASTCallback(**OPTIONS)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Classifier()
    trainer.fit(module, torch.utils.data.DataLoader([image_batch(step) for step in range(8)], batch_size=None))
    model = Classifier()
    optimizer = adam(model)
    ast = ast_plugin.wrap(optimizer, model, **OPTIONS, total_steps=16)
    train_jointly(model, optimizer, [*range(8), *range(8)])
    assert callback.ast is not None
    assert callback.ast.step == trainer.global_step == 16
    assert callback.ast.masks.checksum() == ast.masks.checksum()
    for name in ast.sub_nets:
        expected = ast.materialize(name)
        for key, tensor in callback.ast.materialize(name).items():
            assert torch.equal(tensor, expected[key]), (name, key)

"""VR-PGE in the Trainer: it has the losses of the networks that are drawn, from the Trainer's own ``compute_loss``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers_loops import assert_as_loop
from transformers_runs import gpt2, sparse, texts, trainer_of

from ast_plugin.vr_pge_method import ChannelSampler

pytestmark = [pytest.mark.extra("hf"), pytest.mark.extra("channels")]

OPTIONS: dict[str, Any] = {"sparsities": (0.5,), "method": "vr-pge", "pattern": "channel", "slicing": "auto"}


def dropping() -> nn.Module:
    return gpt2(dropout=0.1)


@pytest.mark.parametrize("steps", [1, 2])
def test_training_is_that_of_a_loop_with_explore(tmp_path: Path, steps: int) -> None:
    trainer = assert_as_loop(
        tmp_path, model=dropping, train_dataset=texts, options=OPTIONS, gradient_accumulation_steps=steps
    )
    ast = trainer.callback_handler.callbacks[0].ast
    assert isinstance(ast.sampler, ChannelSampler)
    assert ast.sampler.is_final
    kept = torch.cat(list(ast.kept_channels("s50").values()))
    assert int(kept.sum()) == ast.sampler.budget
    values = torch.cat(list(ast.sampler.probabilities.values()))
    assert len(values.unique()) > 10


class Counting(Trainer):
    """Counts how often the loss is computed, in training and in evaluation."""

    calls: tuple[list[bool], list[bool]]

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        self.calls[not model.training].append(torch.is_grad_enabled())
        labels = inputs.pop("labels")  # as with label smoothing
        return super().compute_loss(model, {**inputs, "labels": labels}, *args, **options)


def test_extra_passes_run_while_probabilities_are_learned_and_in_no_evaluation(tmp_path: Path) -> None:
    callback = sparse(**OPTIONS)
    trainer = trainer_of(tmp_path, callback, kind=Counting)
    assert isinstance(trainer, Counting)
    trainer.calls = [], []
    trainer.train()
    training, _ = trainer.calls
    # 8 steps of two extra passes, one of four, and all 16 steps themselves.
    assert training == [False, False, True] * 8 + [False] * 4 + [True] * 8
    trainer.calls = [], []
    trainer.evaluate()
    assert trainer.calls == ([], [False])

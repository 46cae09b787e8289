"""What happens in a step of the Trainer: accumulation, clipping, precision, checkpointing of activations, noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer
from transformers_loops import Batch, Loss, Recording, assert_as_loop, assert_as_plain, mean_loss, text_loss
from transformers_runs import WORDS, gpt2, known, logged, pictures, resnet, sparse, texts, trainer_of

pytestmark = pytest.mark.extra("hf")

CHECKPOINTING = known("activation_checkpointing", "gradient_checkpointing")


def dropping() -> nn.Module:
    return gpt2(dropout=0.1)


@pytest.mark.parametrize("steps", [1, 3], ids=["each batch", "accumulation with a shorter last step"])
@pytest.mark.parametrize(
    ("model", "data", "loss"), [(dropping, texts, text_loss), (resnet, pictures, mean_loss)], ids=["gpt2", "resnet"]
)
def test_training_is_the_plain_trainers_and_the_loops(
    tmp_path: Path, model: Callable[[], nn.Module], data: Any, loss: Loss, steps: int
) -> None:
    # An epoch has eight batches, so that with three to a step the last one has two.
    given = {"model": model, "train_dataset": data, "gradient_accumulation_steps": steps}
    assert_as_plain(tmp_path, **given)
    trainer = assert_as_loop(tmp_path, **given, loss=loss)
    assert [len(batches) for batches in trainer.steps] == ([1] * 16 if steps == 1 else [3, 3, 2] * 2)


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_clipping(tmp_path: Path, limit: float) -> None:
    given = {"max_grad_norm": limit, "gradient_accumulation_steps": 2}
    assert_as_plain(tmp_path, **given)
    trainer = assert_as_loop(tmp_path, **given)
    assert min(logged(trainer, "grad_norm"), default=1.0) > limit


class Norms(Recording):
    """Does each step on a copy of the model as well, where the weights that the sub-net drops are zero."""

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        ast = self.callback_handler.callbacks[0].ast
        if self.state.global_step != self._last:
            self.masks = ast.masks.of(ast.active)
            self.copied = copy.deepcopy(self.model)
            with torch.no_grad():
                for name, mask in self.masks.items():
                    self.copied.get_parameter(name).mul_(mask)
        self.copied(**inputs, num_items_in_batch=num_items_in_batch).loss.backward()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self.steps[-1]) == 2:
            gradients = {name: parameter.grad.double() for name, parameter in self.copied.named_parameters()}
            squares = [(gradient * self.masks.get(name, 1)).square().sum() for name, gradient in gradients.items()]
            self.by_hand.append(sum(squares).sqrt().item())
        return loss


def test_the_logged_norm_is_that_of_the_sub_net_that_trains(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(), kind=Norms, gradient_accumulation_steps=2)
    trainer.by_hand = []
    trainer.train()
    assert len(trainer.by_hand) == trainer.state.global_step == 8
    assert logged(trainer, "grad_norm") == pytest.approx(trainer.by_hand, rel=1e-5)


def test_half_precision(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, bf16=True)
    assert_as_loop(tmp_path, bf16=True, forward=lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_activations(tmp_path: Path, reentrant: bool) -> None:
    # The loop keeps its activations: that must make no difference.
    given = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    assert_as_plain(tmp_path, model=dropping, gradient_accumulation_steps=2, **given)
    trainer = assert_as_loop(tmp_path, model=dropping, gradient_accumulation_steps=2, **given)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


ALPHA = 5.0


def noisy(model: nn.Module) -> nn.Module:
    """Add noise to the embeddings of words in training."""

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        most = float(ALPHA / torch.tensor(output[0].numel()).sqrt())
        return output + torch.zeros_like(output).uniform_(-most, most)

    model.get_input_embeddings().register_forward_hook(add)
    return model


def test_noise_on_embeddings(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, neftune_noise_alpha=ALPHA)
    assert_as_loop(tmp_path, neftune_noise_alpha=ALPHA, prepare=noisy)


SMOOTHING = 0.2


def smoothed_loss(model: Any, batch: Batch, parts: int) -> Tensor:
    inputs, *_ = batch
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    costs = -functional.log_softmax(logits, dim=-1)
    right = costs.gather(-1, inputs["labels"][:, 1:, None])
    number = right.numel()
    return (1 - SMOOTHING) * right.sum() / number + SMOOTHING * costs.sum(dim=-1).sum() / (number * WORDS)


def test_label_smoothing(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, label_smoothing_factor=SMOOTHING)
    assert_as_loop(tmp_path, label_smoothing_factor=SMOOTHING, loss=smoothed_loss, rtol=1e-4)


class NotANumber(Trainer):
    """Loses the value of every other loss, and no gradient."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        return loss + float("nan") if self.state.global_step % 2 else loss


def test_losses_that_are_no_numbers_are_left_out_of_the_log(tmp_path: Path) -> None:
    trainer = assert_as_plain(tmp_path, kind=NotANumber, logging_steps=4)
    assert len(logged(trainer, "loss")) == 4
    trainer = trainer_of(tmp_path, sparse(), kind=NotANumber, logging_steps=4)
    trainer.train()
    assert all(0 < loss < 10 for loss in logged(trainer, "loss"))

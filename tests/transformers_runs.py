"""Tiny models and data for the Hugging Face Trainer, and Trainers on them; shared by the tests of that integration."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configurations

import torch
from networks import image_batch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ast_plugin.integrations.transformers import ASTCallback

gc.freeze()  # every train() collects garbage, and would look through what the imports have made each time
atexit.register(gc.unfreeze)

WORDS = 40
LENGTH = 12
SUB_NETS = ("s50", "s80", "s90")
# Masks change often and weights come back, so that every part of a step is at work within a few steps.
BUSY: dict[str, Any] = {"sparsities": (0.5, 0.8, 0.9), "method": "rigl", "update_interval": 3}
_OF_TRAINER = set(inspect.signature(Trainer.__init__).parameters) - {"self", "args", "callbacks"}


def gpt2(seed: int = 0, *, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Two layers of width 16 with a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=2 * LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which is what it falls back to, with a warning
    return model


def resnet(seed: int = 0) -> ResNetForImageClassification:
    """Two stages of one block each, with BatchNorm, for 1 x 8 x 8 images of 5 classes."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = ResNetForImageClassification(config)
    model.accepts_loss_kwargs = False  # it takes the number of items in a batch, and averages its own all the same
    return model


def texts(count: int = 32, *, seed: int = 0, lengths: tuple[int, int] = (LENGTH, LENGTH)) -> list[dict[str, Tensor]]:
    """Return sequences that go up by a step of their own, with lengths in a range."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        start, step = (int(torch.randint(1, WORDS, (), generator=generator)) for _ in range(2))
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        tokens = (start + step * torch.arange(length)) % WORDS
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def pictures(count: int = 32, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return noisy stripes with their class."""
    images, labels = image_batch(seed, count)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def sparse(**options: Any) -> ASTCallback:
    """Return a callback for three sub-nets whose masks change every third step."""
    return ASTCallback(**{**BUSY, **options})


def arguments_of(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **given: Any) -> TrainingArguments:
    """Return arguments for two short epochs on the processor, every step logged, nothing saved."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 hands it from one Trainer on to the next
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(**{**usual, **given})


def trainer_of(folder: Path, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **given: Any) -> Trainer:
    """Return a Trainer for `gpt2` on `texts`, unless told otherwise.

    Args:
        folder: Where it writes.
        *callbacks: Its callbacks.
        kind: Its class.
        **given: Arguments of its constructor, and of `TrainingArguments`.
    """
    usual: dict[str, Any] = {"train_dataset": texts(), "eval_dataset": texts(8, seed=1)}
    own = usual | {name: value for name, value in given.items() if name in _OF_TRAINER}
    if "model_init" not in own:
        own.setdefault("model", gpt2())
    before = dict(os.environ)
    args = arguments_of(folder, **{name: value for name, value in given.items() if name not in _OF_TRAINER})
    trainer = kind(args=args, callbacks=list(callbacks), **own)
    for name in set(os.environ) - set(before):  # precision and compilation, which the next Trainer would take over
        del os.environ[name]
    return trainer


class Stop(TrainerCallback):
    """Ends training at a step, at its end or between two of its micro-batches."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def known(*names: str) -> str:
    """Return the first of an argument's names, newest first, that this version of transformers knows."""
    return next(name for name in names if name in {field.name for field in dataclasses.fields(TrainingArguments)})


def logged(trainer: Trainer, key: str) -> list[float]:
    """Return the values of one key in the log, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics without those that measure time."""
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}

"""Several calls of ``train()``: twice, with another batch size, with a new model, after an interrupt or an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from networks import assert_same, snapshot
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers_loops import assert_as_loop, assert_as_plain, assert_runs_agree, mean_loss
from transformers_runs import Stop, figures, gpt2, logged, pictures, resnet, sparse, trainer_of

from ast_plugin.integrations.transformers import ASTCallback

pytestmark = pytest.mark.extra("hf")


def assert_agree(callbacks: tuple[ASTCallback, ASTCallback]) -> None:
    one, other = (callback.ast for callback in callbacks)
    assert one is not None
    assert other is not None
    assert_runs_agree(one, other)


def twice(trainer: Trainer) -> None:
    trainer.train()
    trainer.train()


@pytest.mark.parametrize("steps", [1, 3])
def test_training_twice(tmp_path: Path, steps: int) -> None:
    given = {"gradient_accumulation_steps": steps}
    assert_as_plain(tmp_path, train=twice, **given)
    assert_as_loop(tmp_path, trainings=2, **given)


def test_training_twice_keeps_batch_norm_and_masks(tmp_path: Path) -> None:
    given = {"model": resnet, "train_dataset": pictures}
    assert_as_plain(tmp_path, train=twice, **given)
    assert_as_loop(tmp_path, trainings=2, loss=mean_loss, **given)


class OutOfMemory(Trainer):
    """Fails as a device without memory left does, while the batch is larger than two, in the first step's forward."""

    failed = 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Any:
        def fail(*_: Any) -> None:
            self.failed += 1
            raise RuntimeError("CUDA out of memory.")

        if len(inputs["input_ids"]) < 4:
            return super().compute_loss(model, inputs, *args, **options)
        handle = self.model.transformer.h[1].register_forward_pre_hook(fail)
        try:
            return super().compute_loss(model, inputs, *args, **options)
        finally:
            handle.remove()


def test_a_smaller_batch_size_is_found(tmp_path: Path) -> None:
    given = {"kind": OutOfMemory, "auto_find_batch_size": True, "max_steps": 16}
    assert_as_plain(tmp_path, **given)
    callbacks = sparse(), sparse()
    trainer = trainer_of(tmp_path, callbacks[0], **given)
    trainer.train()
    assert trainer.failed == 1
    other = trainer_of(tmp_path, callbacks[1], max_steps=16, per_device_train_batch_size=trainer._train_batch_size)
    other.train()
    assert_agree(callbacks)
    assert logged(trainer, "loss") == logged(other, "loss")


def test_every_training_of_a_model_made_anew_is_a_run_of_its_own(tmp_path: Path) -> None:
    # As a search for settings does: model, optimizer and scheduler are new in every trial.
    given = {"model_init": lambda: gpt2(dropout=0.1)}
    assert_as_plain(tmp_path, train=twice, **given)
    callbacks = sparse(), sparse()
    trainer, other = (trainer_of(tmp_path, callback, **given) for callback in callbacks)
    trainer.args.learning_rate = 0.1
    trainer.train()
    first = callbacks[0].ast
    trainer.args.learning_rate = other.args.learning_rate
    trainer.train()
    other.train()
    assert first is not callbacks[0].ast
    assert_agree(callbacks)
    assert first is not None
    assert not first.attached


STEP = 5


class Interrupt(TrainerCallback):
    """Interrupts training somewhere in a step, once."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.handle: Any = None

    def interrupt(self, *_: Any) -> None:
        self.place = "done"
        if self.handle is not None:
            self.handle.remove()
        raise KeyboardInterrupt

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any) -> None:
        if state.global_step == STEP:
            layer = model.transformer.h[1]
            if self.place == "forward":
                self.handle = layer.register_forward_pre_hook(self.interrupt)
            elif self.place == "backward":
                self.handle = layer.register_full_backward_pre_hook(self.interrupt)
            elif self.place == "optimizer":
                self.handle = optimizer.optimizer.register_step_pre_hook(self.interrupt)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEP and self.place == "between micro-batches":
            self.interrupt()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEP and self.place == "end":
            self.interrupt()


@pytest.mark.parametrize("place", ["forward", "backward", "between micro-batches", "optimizer", "end"])
def test_after_an_interrupt_the_model_is_dense_and_can_be_trained(tmp_path: Path, place: str) -> None:
    given = {"gradient_accumulation_steps": 2}

    def interrupted(trainer: Trainer) -> None:
        trainer.add_callback(Interrupt(place))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    def train(trainer: Trainer) -> None:
        interrupted(trainer)
        trainer.train()

    assert_as_plain(tmp_path, train=train, **given)
    callbacks = sparse(), sparse()
    trainer = trainer_of(tmp_path, callbacks[0], **given)
    interrupted(trainer)
    stopped = trainer_of(tmp_path, sparse(), Stop(STEP), **given)
    stopped.train()
    assert_same(snapshot(trainer.model), snapshot(stopped.model))

    model, optimizer = copy.deepcopy((trainer.model, trainer.optimizer.optimizer))
    other = trainer_of(tmp_path, callbacks[1], model=model, optimizers=(optimizer, None), **given)
    trainer.train()
    other.train()
    assert_agree(callbacks)
    assert figures(trainer.evaluate()) == figures(other.evaluate())

"""A signal to end: the Trainer writes a checkpoint in the middle of a step, and the run goes on from it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from networks import assert_same, snapshot
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers_loops import assert_runs_agree
from transformers_runs import Stop, gpt2, logged, pictures, resnet, sparse, trainer_of

pytestmark = [
    pytest.mark.extra("hf"),
    pytest.mark.skipif(
        "enable_jit_checkpoint" not in {field.name for field in dataclasses.fields(TrainingArguments)},
        reason="this version of transformers has no such checkpoints",
    ),
]

STEP = 5


class Terminated(TrainerCallback):
    """Sends the signal at an event of a step, and waits until the Trainer has taken notice of it."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEP:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.manager.is_checkpoint_requested:
                time.sleep(0.001)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# The event, what is trained, and how many steps the checkpoint holds: a step that was broken off is made again.
EVENTS = {
    "before the optimizer": ("on_substep_end", {}, STEP),
    "after the optimizer": ("on_optimizer_step", {}, STEP + 1),
    "at the end of a step": ("on_step_end", {"model": resnet, "train_dataset": pictures()}, STEP),
}


@pytest.mark.parametrize("where", EVENTS)
def test_a_checkpoint_at_a_signal_is_dense_and_resumes_bit_for_bit(tmp_path: Path, where: str) -> None:
    event, of_trainer, steps = EVENTS[where]
    make = of_trainer.get("model", gpt2)
    given = {**of_trainer, "gradient_accumulation_steps": 2, "num_train_epochs": 4}

    terminated = Terminated(event)
    ended = trainer_of(tmp_path, sparse(), terminated, **{**given, "model": make()}, enable_jit_checkpoint=True)
    terminated.manager = next(c for c in ended.callback_handler.callbacks if hasattr(c, "jit_manager")).jit_manager
    terminated.manager.kill_wait = 0
    ended.train()
    assert ended.state.global_step < ended.state.max_steps
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]

    stopped = trainer_of(tmp_path, sparse(), Stop(steps), **{**given, "model": make()})
    stopped.train()
    saved = make(seed=1)
    saved.load_state_dict(load_file(tmp_path / f"checkpoint-{steps}" / "model.safetensors"), strict=False)
    saved.tie_weights()
    assert_same(snapshot(saved), snapshot(stopped.model))

    callbacks = sparse(), sparse()
    straight, resumed = (
        trainer_of(tmp_path, callback, **{**given, "model": make(seed)}) for seed, callback in enumerate(callbacks)
    )
    straight.train()
    resumed.train(resume_from_checkpoint=True)
    one, other = (callback.ast for callback in callbacks)
    assert one is not None
    assert other is not None
    assert_runs_agree(one, other)
    assert logged(straight, "grad_norm")[steps:] == logged(resumed, "grad_norm")[-(16 - steps) :]

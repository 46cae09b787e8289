"""A training loop on Hugging Face Accelerate: the same numbers as without it, saved and resumed bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, image_batch, sgd, snapshot, wrapped
from ranks import run_checks
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ast_plugin

pytestmark = pytest.mark.extra("hf")

BATCHES = 24  # an epoch, of which two make a step
OPTIONS: dict[str, Any] = {"sparsities": (0.5, 0.8, 0.9), "total_steps": 24, "update_interval": 4}


@pytest.fixture(autouse=True)
def one_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in singletons."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def loader() -> DataLoader:
    batches = [image_batch(step, size=8) for step in range(BATCHES)]
    return DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True))), batch_size=8)


class Run:
    """Model, optimizer, scheduler and controller, prepared by an accelerator; `late` wraps after ``prepare``."""

    def __init__(self, *, precision: str = "no", late: bool, seed: int = 0) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = conv_net(seed)
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        if not late:
            self.ast = ast_plugin.wrap(optimizer, model, **OPTIONS)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader(), scheduler
        )
        if late:
            self.ast = ast_plugin.wrap(self.optimizer, self.model, **OPTIONS)
        self.accelerator.register_for_checkpointing(self.ast)

    def epoch(self) -> None:
        self.model.train()
        for images, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(functional.cross_entropy(self.model(images), labels))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


def plain_epochs(precision: str, epochs: int) -> tuple[nn.Module, Any]:
    """Train without Accelerate."""
    model = conv_net()
    _, optimizer, ast = wrapped(model, sgd(model), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    for _ in range(epochs):
        for index, (images, labels) in enumerate(loader()):
            with half:
                output = model(images)
            (functional.cross_entropy(output.float(), labels) / 2).backward()
            if index % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model, ast


@pytest.mark.parametrize("late", [False, True], ids=["wrap before prepare", "wrap after prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_with_accelerate_equals_one_without(precision: str, late: bool) -> None:
    expected, expected_ast = plain_epochs(precision, 2)
    run = Run(precision=precision, late=late)
    run.epoch()
    run.epoch()
    assert run.ast.step == BATCHES
    assert run.ast.statistics()["conflicts"] > 0
    assert_same(snapshot(expected), snapshot(run.accelerator.unwrap_model(run.model)))
    assert_same(expected_ast.state_dict()["masks"], run.ast.state_dict()["masks"])


@pytest.mark.parametrize("late", [False, True], ids=["wrap before prepare", "wrap after prepare"])
def test_save_state_and_load_state_resume_bit_for_bit(tmp_path: Path, late: bool) -> None:
    straight = Run(precision="bf16", late=late)
    straight.epoch()
    straight.accelerator.save_state(str(tmp_path))
    straight.epoch()

    again = Run(precision="bf16", late=late, seed=9)
    again.accelerator.load_state(str(tmp_path))
    assert again.ast.step == BATCHES // 2
    again.epoch()
    assert_same(snapshot(straight.model), snapshot(again.model))
    assert_same(straight.ast.optimizer.state_dict(), again.ast.optimizer.state_dict())
    assert straight.scheduler.get_last_lr() == again.scheduler.get_last_lr()


def test_the_registered_state_alone_resumes_where_the_optimizer_file_lacks_it(tmp_path: Path) -> None:
    # As with optimizers whose state is saved by other means (FSDP).
    straight = Run(late=True)
    straight.epoch()
    straight.accelerator.save_state(str(tmp_path))
    path = tmp_path / "optimizer.bin"
    state = torch.load(path, weights_only=True)
    del state["ast_plugin"]
    torch.save(state, path)
    again = Run(late=True, seed=9)
    again.accelerator.load_state(str(tmp_path))
    assert again.ast.step == BATCHES // 2
    straight.epoch()
    again.epoch()
    assert_same(snapshot(straight.model), snapshot(again.model))


@pytest.mark.slow
def test_two_ranks_with_accelerate_equal_one_process(tmp_path: Path) -> None:
    assert run_checks("accelerate_checks", tmp_path) == {"two_ranks_equal_one_process_and_resume": "ok"}

"""Trainers compared: with the plain Trainer, and with a loop written by hand on the same batches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from networks import assert_same, snapshot
from torch import Tensor, nn
from transformers import Trainer
from transformers_runs import BUSY, gpt2, logged, sparse, trainer_of

import ast_plugin
from ast_plugin.integrations.transformers import ASTCallback, TransformersSelection

# What a micro-batch has, the number of labels in all of its step where it is counted, and the state of the generator.
Batch = tuple[dict[str, Tensor], Any, Tensor]
Loss = Callable[[Any, Batch, int], Tensor]


class Recording(Trainer):
    """A Trainer that keeps the batches of each step.

    Attributes:
        steps: The micro-batches of every step, of all calls of ``train()``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.steps: list[list[Batch]] = []
        self._last = -1
        super().__init__(*args, **options)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        copied = {name: value.clone() for name, value in inputs.items()}
        if self.state.global_step != self._last:
            self.steps.append([])
            self._last = self.state.global_step
        self.steps[-1].append((copied, num_items_in_batch, torch.get_rng_state()))
        return super().training_step(model, inputs, num_items_in_batch)


def text_loss(model: Any, batch: Batch, parts: int) -> Tensor:
    """Return the loss of a language model, averaged over the labels of all micro-batches of the step."""
    inputs, items, _ = batch
    return model(**inputs, num_items_in_batch=items).loss


def mean_loss(model: Any, batch: Batch, parts: int) -> Tensor:
    """Return the mean of a micro-batch, as its part of the step's."""
    return model(**batch[0]).loss / parts


def assert_as_plain(
    folder: Path,
    *,
    model: Callable[[], nn.Module] = gpt2,
    train: Callable[[Trainer], object] = Trainer.train,
    **given: Any,
) -> Trainer:
    """Train with one sub-net at sparsity 0 without correction, and without this package: bit-identical, as is the log.

    Args:
        folder: Where the Trainers write.
        model: Makes the model.
        train: What is done with the Trainer.
        **given: Arguments of `trainer_of`, where `train_dataset` is a function that makes it, and `optimizers` one that
            makes both for a model.

    Returns:
        The Trainer with the callback.
    """
    found = []
    for callbacks in ((), (ASTCallback(sparsities=(0.0,), correction="off"),)):
        trainer = _trainer(folder, *callbacks, model=model(), given=given)
        train(trainer)
        optimizer = trainer.optimizer.optimizer
        named = {name: dict(optimizer.state.get(p, {})) for name, p in trainer.model.named_parameters()}
        log = {key: logged(trainer, key) for key in ("loss", "grad_norm", "learning_rate", "eval_loss")}
        found.append({"model": snapshot(trainer.model), "optimizer": named, "log": log})
    assert callbacks[0].ast is not None
    assert callbacks[0].ast.step > 0
    assert_same(*found)
    return trainer


def assert_as_loop(
    folder: Path,
    *,
    model: Callable[[], nn.Module] = gpt2,
    loss: Loss = text_loss,
    forward: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    prepare: Callable[[Any], Any] = lambda model: model,
    options: dict[str, Any] | None = None,
    trainings: int = 1,
    rtol: float = 0.0,
    **given: Any,
) -> Recording:
    """Train sub-nets in a Trainer, and by hand with `ast_plugin.wrap` on the batches that it had.

    Model, optimizer and scheduler are made in the same way. Masks are equal bit for bit, and so are weights and the log
    without a tolerance.

    Args:
        folder: Where the Trainers write.
        model: Makes the model.
        loss: From what is called, a batch and the number of micro-batches to the loss.
        forward: A context around each forward pass.
        prepare: What is done to the model by hand, before it is called.
        options: Settings of the run beside `BUSY`.
        trainings: How often ``train()`` is called; the scheduler begins anew each time.
        rtol: Tolerance of weights and log.
        **given: As for `assert_as_plain`.
    """
    settings = {**BUSY, **(options or {})}
    callback = sparse(**settings)
    trainer = _trainer(folder, callback, model=model(), given={"kind": Recording, **given})
    assert isinstance(trainer, Recording)
    norms: list[float] = []
    for _ in range(trainings):
        trainer.train()
        norms += logged(trainer, "grad_norm")
    assert callback.ast is not None
    number = trainer.state.max_steps
    assert len(trainer.steps) == trainings * number

    network = model()
    builder = _trainer(folder, model=network, given=given)
    builder.create_optimizer_and_scheduler(number)
    optimizer, scheduler, limit = builder.optimizer, builder.lr_scheduler, builder.args.max_grad_norm
    ast = ast_plugin.wrap(
        optimizer,
        network,
        plugins=[TransformersSelection()],
        total_steps=number,
        steps_per_epoch=callback.ast.config.steps_per_epoch,
        seed=builder.args.seed,
        **settings,
    )
    called = prepare(network)
    by_hand = []
    network.train()
    if hasattr(optimizer, "train"):  # schedule-free methods
        optimizer.train()
    for index, batches in enumerate(trainer.steps):
        if index and index % number == 0:
            builder.lr_scheduler = None
            scheduler = builder.create_scheduler(number, optimizer)
        for batch in batches:
            torch.set_rng_state(batch[-1])
            with forward():
                ast.explore(functools.partial(loss, called, batch, len(batches)))  # without effect for most methods
                part = loss(called, batch, len(batches))
            part.backward()
        by_hand.append(nn.utils.clip_grad_norm_(network.parameters(), limit if limit > 0 else float("inf")).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    ast.finish()
    assert len(ast.sub_nets) == 1 or ast.statistics()["conflicts"] > 0
    assert_runs_agree(callback.ast, ast, rtol=rtol)
    if limit > 0:  # older versions log none without clipping
        torch.testing.assert_close(norms, by_hand, rtol=rtol, atol=0.0)
    return trainer


def _trainer(folder: Path, *callbacks: ASTCallback, model: nn.Module, given: dict[str, Any]) -> Trainer:
    made = {} if "model_init" in given else {"model": model}
    made |= given
    if "train_dataset" in given:
        made["train_dataset"] = given["train_dataset"]()
    if "optimizers" in given:
        made["optimizers"] = given["optimizers"](model)
    return trainer_of(folder, *callbacks, **made)


def assert_runs_agree(
    one: ast_plugin.AlternatingSparseTraining, other: ast_plugin.AlternatingSparseTraining, *, rtol: float = 0.0
) -> None:
    """Compare dense weights, masks and every sub-net's BatchNorm; masks always bit for bit."""
    assert one.step == other.step
    assert_same(one.state_dict()["masks"], other.state_dict()["masks"])
    for name in ("", *one.sub_nets):
        ours, theirs = (run.private_state(name) if name else snapshot(run.model) for run in (one, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(
                tensor, theirs[key], rtol=rtol, atol=rtol / 10, msg=lambda m, key=key, name=name: f"{name} {key}: {m}"
            )

"""Fits compared: with the plain Trainer, and with a loop written by hand on the same batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning_runs import BUSY, Classifier, data, trainer_of
from networks import assert_same, snapshot
from torch import Tensor, nn

import ast_plugin
from ast_plugin.integrations.frameworks.lightning import ASTCallback


class Losses(nn.Module):
    """What a loop by hand calls: a module whose forward is the loss of a batch."""

    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module.loss(batch)[0]


def assert_as_plain(
    folder: Path,
    *,
    module: Callable[[], Classifier] = Classifier,
    prepare: Callable[[Any], Any] = lambda module: module,
    network: str | None = "model",
    images: bool = True,
    callbacks: Callable[[], list[Any]] = list,
    **given: Any,
) -> None:
    """Train with one sub-net at sparsity 0 without correction, and without this package: bit-identical.

    Args:
        folder: Where the Trainers write.
        module: Makes the LightningModule.
        prepare: What ``fit`` is called with, from the module.
        network: Which part of it is pruned.
        images: Whether it takes images.
        callbacks: Makes other callbacks.
        **given: Arguments of `trainer_of`.
    """
    found = []
    for own in ((), (ASTCallback(sparsities=(0.0,), correction="off", network=network),)):
        trainer, model = trainer_of(folder, *own, *callbacks(), **given), module()
        trainer.fit(prepare(model), data(images=images), data(2, first=50, images=images))
        (optimizer,) = trainer.optimizers
        states = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if not name.endswith("_s0")}
        found.append({"model": snapshot(model), "optimizer": states, "losses": model.losses, "metrics": metrics})
    assert own[0].ast is not None
    assert own[0].ast.step > 0
    assert_same(*found)


def assert_as_loop(
    folder: Path,
    *,
    module: Callable[[], Classifier] = Classifier,
    prepare: Callable[[Any], Any] = lambda module: module,
    network: str | None = "model",
    images: bool = True,
    forward: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    options: dict[str, Any] | None = None,
    rtol: float = 0.0,
    **given: Any,
) -> ASTCallback:
    """Train sub-nets in a Trainer, and by hand with `ast_plugin.wrap` on the same batches.

    Masks are equal bit for bit, and so are weights and losses without a tolerance.

    Args:
        folder: Where the Trainer writes.
        module: Makes the LightningModule.
        prepare: What ``fit`` is called with, from the module.
        network: Which part of it is pruned.
        images: Whether it takes images.
        forward: A context around each forward pass by hand.
        options: Settings of the run beside `BUSY`.
        rtol: Tolerance of weights and losses.
        **given: Arguments of `trainer_of`.

    Returns:
        The callback.
    """
    settings = {**BUSY, **(options or {})}
    callback = ASTCallback(**settings, network=network)
    trainer, trained = trainer_of(folder, callback, **given), module()
    trainer.fit(prepare(trained), data(images=images), data(2, first=50, images=images))
    assert callback.ast is not None

    model = module()
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    pruned = model if network is None else model.get_submodule(network)
    called = Losses(model)
    total = callback.ast.config.total_steps
    ast = ast_plugin.wrap(optimizer, pruned, outermost=called, total_steps=total, **settings)
    accumulated = given.get("accumulate_grad_batches", 1)
    losses = []
    model.train()
    for _ in range(given.get("max_epochs", 2)):
        for index, batch in enumerate(data(images=images), start=1):
            with forward():
                loss = called(batch)
            losses.append(float(loss.detach()))
            (loss / accumulated).backward()
            if index % accumulated and index < 8:
                continue
            if given.get("gradient_clip_val"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), given["gradient_clip_val"])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert callback.ast.step == ast.step == callback.ast.config.total_steps
    assert ast.statistics()["conflicts"] > 0
    assert_same(ast.state_dict()["masks"], callback.ast.state_dict()["masks"])
    if rtol:
        torch.testing.assert_close(snapshot(trained), snapshot(model), rtol=rtol, atol=rtol)
        torch.testing.assert_close(trained.losses, losses, rtol=rtol, atol=rtol)
    else:
        assert_same(snapshot(trained), snapshot(model))
        assert trained.losses == losses
    for name in ast.sub_nets:
        private = ast.private_state(name), callback.ast.private_state(name)
        if rtol:
            torch.testing.assert_close(*private, rtol=rtol, atol=rtol)
        else:
            assert_same(*private)
    return callback

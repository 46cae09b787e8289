"""Runs of one training setup: as the plain loop does, and as the reference without the setup does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import assert_same, conv_net, image_batch, sgd, snapshot, vector_batch, wrapped
from reference_run import Loss, ReferenceRun, assert_runs_agree
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin

# Masks change often and weights come back, so that every part of a step is at work within a few steps.
BUSY: dict[str, Any] = {"method": "rigl", "total_steps": 30, "update_interval": 3}

Step = Callable[[Any, torch.optim.Optimizer, int], None]


def batch_for(net: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    return image_batch(step) if any(isinstance(m, nn.Conv2d) for m in net.modules()) else vector_batch(step)


def plain_step(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def whole_batch(net: nn.Module, step: int) -> list[Loss]:
    """Return the loss of one whole batch, as a reference run takes it."""
    inputs, labels = batch_for(net, step)
    return [lambda network: functional.cross_entropy(network(inputs), labels)]


def assert_as_plain(
    step: Step,
    *,
    net: Callable[[], nn.Module] = conv_net,
    build: Callable[..., torch.optim.Optimizer] = sgd,
    prepare: Callable[[nn.Module], Any] = lambda model: model,
    steps: int = 6,
) -> None:
    """Train with one sub-net at sparsity 0 without correction, and without this package: bit-identical.

    Args:
        step: Makes one optimizer step with what `prepare` returned, the optimizer, and the number of the step.
        net: Makes the model.
        build: Makes its optimizer.
        prepare: What is done to the model after wrapping.
        steps: How many.
    """
    results = []
    for wrap in (False, True):
        model = net()
        optimizer = build(model)
        if wrap:
            ast = ast_plugin.wrap(optimizer, model, sparsities=(0.0,), correction="off", total_steps=60)
        called = prepare(model)
        torch.manual_seed(7)
        for number in range(steps):
            step(called, optimizer, number)
        state = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
        results.append({"model": snapshot(model), "optimizer": state})
    assert ast.step > 0
    assert_same(*results)


def assert_as_reference(
    step: Step,
    *,
    net: Callable[[], nn.Module] = conv_net,
    reference_net: Callable[[], nn.Module] | None = None,
    build: Callable[..., torch.optim.Optimizer] = sgd,
    reference_build: Callable[..., torch.optim.Optimizer] | None = None,
    prepare: Callable[[nn.Module], Any] = lambda model: model,
    losses: Callable[[nn.Module, int], Sequence[Loss]] = whole_batch,
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
    skipped: Sequence[int] = (),
    steps: int = 15,
    rtol: float = 0.0,
    atol: float = 0.0,
    **options: Any,
) -> ast_plugin.AlternatingSparseTraining:
    """Train three sub-nets with mask updates and correction in a setup, and by hand without it.

    Args:
        step: As for `assert_as_plain`.
        net: Makes the model.
        reference_net: Makes the model of the run without the setup, where that is another.
        build: Makes its optimizer.
        reference_build: Makes that of the reference, where it is another.
        prepare: What is done to the model after wrapping.
        losses: The same step for the reference: from model and number to one loss a micro-batch.
        clip: What the reference does to its parameters before the step.
        skipped: Steps that a gradient scaler skips.
        steps: How many.
        rtol: Tolerance; masks are equal bit for bit anyway.
        atol: Tolerance.
        options: Settings beside those of `BUSY`.
    """
    settings = {**BUSY, **options}
    model = net()
    plain = model if reference_net is None else reference_net()
    reference = ReferenceRun(plain, reference_build or build, **settings)
    _, optimizer, ast = wrapped(model, build(model), **settings)
    called = prepare(model)
    for number in range(steps):
        step(called, optimizer, number)
        reference.step(losses(plain, number), clip=clip, happens=number not in skipped)
    assert ast.statistics()["conflicts"] > 0
    assert_runs_agree(ast, reference, rtol=rtol, atol=atol)
    return ast

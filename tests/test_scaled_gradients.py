"""Whatever scales gradients between backward and step is seen by the correction, also without a version counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import assert_same, mlp, sgd, snapshot, vector_batch, wrapped
from torch import nn
from torch.nn import functional

SPARSITIES = (0.5, 0.8, 0.95)  # masks of the last are held as positions


def trained(scale: float, unscale: Callable[[nn.Module], object]) -> nn.Module:
    model = mlp()
    _, optimizer, ast = wrapped(model, sgd(model), total_steps=24, update_interval=4, sparsities=SPARSITIES)
    for step in range(24):
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        (functional.cross_entropy(model(inputs), labels) * scale).backward()
        unscale(model)
        optimizer.step()
    assert ast.statistics()["conflicts"] > 0
    return model


@pytest.mark.parametrize("through", ["data", "in place"])
def test_gradients_may_be_scaled_back_by_hand(through: str) -> None:
    def unscale(model: nn.Module) -> None:
        for parameter in model.parameters():
            (parameter.grad.data if through == "data" else parameter.grad).mul_(0.25)

    assert_same(snapshot(trained(1.0, lambda _: None)), snapshot(trained(4.0, unscale)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused: bool) -> None:
    models = []
    for enabled in (False, True):
        model = mlp()
        _, optimizer, ast = wrapped(
            model, sgd(model, fused=fused), total_steps=24, update_interval=4, sparsities=SPARSITIES
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6, enabled=enabled)
        for step in range(24):
            optimizer.zero_grad()
            inputs, labels = vector_batch(step)
            scaler.scale(functional.cross_entropy(model(inputs), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert ast.statistics()["conflicts"] > 0
        models.append(model)
    assert_same(snapshot(models[0]), snapshot(models[1]))

"""What breaks in the middle of a step leaves dense weights, and the run goes on as if it had not happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import mlp, sgd, vector_batch, wrapped
from reference_run import ReferenceRun, assert_runs_agree
from setup_runs import BUSY, plain_step, whole_batch
from torch import Tensor, nn
from torch.nn import functional


class Planned(Exception):
    """Raised on purpose."""


def raising(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs, labels = vector_batch(step)
    return functional.cross_entropy(model(inputs), labels)


def hook_on_a_weights_gradient(model: Any, step: int, error: type[BaseException]) -> None:
    handle = model[2].weight.register_hook(raising(error))
    try:
        loss_of(model, step).backward()
    finally:
        handle.remove()


def hook_on_a_layers_output(model: Any, step: int, error: type[BaseException]) -> None:
    handle = model[1].register_full_backward_hook(raising(error))
    try:
        loss_of(model, step).backward()
    finally:
        handle.remove()


def hook_after_accumulation(model: Any, step: int, error: type[BaseException]) -> None:
    handle = model[2].weight.register_post_accumulate_grad_hook(raising(error))
    try:
        loss_of(model, step).backward()
    finally:
        handle.remove()


def hook_in_forward(model: Any, step: int, error: type[BaseException]) -> None:
    handle = model[3].register_forward_hook(raising(error))
    try:
        loss_of(model, step).backward()
    finally:
        handle.remove()


BREAKS = {
    "weight's hook": hook_on_a_weights_gradient,
    "layer's backward hook": hook_on_a_layers_output,
    "accumulation hook": hook_after_accumulation,
    "forward hook": hook_in_forward,
}


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("where", sorted(BREAKS))
def test_a_batch_that_raises_leaves_dense_weights_and_no_trace(where: str, error: type[BaseException]) -> None:
    model = mlp()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(15):
        if step in (0, 4, 5, 9):  # among them steps with a mask update
            before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
            with pytest.raises(error):
                BREAKS[where](model, step + 300, error)
            if where == "forward hook" and error is KeyboardInterrupt:
                model.state_dict()  # torch tells hooks of ordinary exceptions only; the next touch mends it
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
    assert_runs_agree(ast, reference)


@pytest.mark.parametrize("touch", ["state_dict", "next step"])
def test_anomaly_mode_that_stops_before_the_model_is_mended_at_the_next_touch(touch: str) -> None:
    # The error comes from the loss, so backward never reaches the model and nothing can report its end.
    model = mlp()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(9):
        if step in (2, 6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that anomaly mode is on
                with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
                    (loss_of(model, step) * torch.tensor(-1.0).sqrt()).backward()
            if touch == "state_dict":
                state = model.state_dict()
                for name in ast.masks.parameters:
                    assert torch.equal(state[name], reference.parameters[name])
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
    assert_runs_agree(ast, reference)


def test_anomaly_mode_inside_the_model_leaves_dense_weights_at_once() -> None:
    model = mlp()
    _, _, ast = wrapped(model, method="static")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = model[1].register_forward_hook(lambda _, __, output: (output - output).sqrt() * output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
            loss_of(model, 0).backward()
    handle.remove()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert ast.step == 0


def test_a_batch_skipped_because_its_loss_is_not_finite_leaves_no_trace() -> None:
    model = mlp()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    for step in range(15):
        if step % 4 == 1:
            loss = loss_of(model, step + 300) * float("nan")
            assert not torch.isfinite(loss)  # the loop goes on to the next batch without backward
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
    assert_runs_agree(ast, reference)


def test_an_error_with_its_traceback_kept_does_not_hold_up_later_steps() -> None:
    model = mlp()
    reference = ReferenceRun(model, sgd, **BUSY)
    _, optimizer, ast = wrapped(model, **BUSY)
    kept = []
    for step in range(9):
        if step in (1, 5):
            with pytest.raises(Planned) as caught:
                hook_on_a_weights_gradient(model, step, Planned)
            kept.append(caught)
        plain_step(model, optimizer, step)
        reference.step(whole_batch(model, step))
    assert len(kept) == 2
    assert_runs_agree(ast, reference)

"""bf16 autocast, and loss scaling as for fp16: overflowed steps count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import adamw, assert_same, conv_net, mlp, sgd, snapshot, vector_batch, wrapped
from reference_run import Loss
from setup_runs import BUSY, assert_as_plain, assert_as_reference, batch_for
from torch import nn
from torch.nn import functional

from ast_plugin.training_exchange import with_plain_entries

OVERFLOWS = (0, 4, 5, 9, 13)  # among them steps with a mask update, the first, and two in a row


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model, fused=True)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05, fused=True)


def autocast_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs, labels = batch_for(model, step)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()


def autocast_loss(net: nn.Module, step: int) -> list[Loss]:
    inputs, labels = batch_for(net, step)

    def loss(network: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(network(inputs), labels)

    return [loss]


def overflows_for(build: Any) -> tuple[int, ...]:
    # torch's fused SGD leaves momentum uninitialised where its very first step overflows, with this package or without.
    return OVERFLOWS[1:] if build is fused_sgd else OVERFLOWS


def scaling_step(
    overflows: tuple[int, ...] = OVERFLOWS, clip: float | None = None
) -> Callable[[nn.Module, torch.optim.Optimizer, int], None]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs, labels = batch_for(model, number)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        scaler.scale(loss * float("inf") if number in overflows else loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

    return step


def test_autocast_is_bit_identical_to_plain_autocast() -> None:
    assert_as_plain(autocast_step)


@pytest.mark.parametrize("net", [conv_net, mlp])
def test_autocast_with_sub_nets_is_the_run_written_by_hand(net: Any) -> None:
    ast = assert_as_reference(autocast_step, net=net, losses=autocast_loss)
    assert all(p.dtype == torch.float32 for p in ast.model.parameters())


def test_one_autocast_block_around_several_steps_never_sees_old_weights() -> None:
    def run(blocks: int) -> dict[str, torch.Tensor]:
        model, optimizer, _ = wrapped(mlp(), **BUSY)
        for first in range(0, 12, 12 // blocks):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for step in range(first, first + 12 // blocks):
                    inputs, labels = vector_batch(step)
                    optimizer.zero_grad()
                    functional.cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    assert_same(run(1), run(12))


@pytest.mark.parametrize("build", [sgd, adamw, fused_sgd, fused_adamw])
def test_loss_scaling_is_bit_identical_to_plain_loss_scaling(build: Any) -> None:
    overflows = overflows_for(build)
    each = {False: scaling_step(overflows), True: scaling_step(overflows)}  # a scaler a run

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        each[bool(model._forward_pre_hooks)](model, optimizer, number)

    assert_as_plain(step, build=build, steps=10)


@pytest.mark.parametrize("net", [conv_net, mlp])
@pytest.mark.parametrize("build", [sgd, adamw, fused_sgd, fused_adamw])
def test_overflowed_steps_count_for_nothing(build: Any, net: Any) -> None:
    # The reference knows of no scale; powers of two leave no rounding behind. It sees the batches that overflow,
    # because running statistics follow those in the plain loop too, and makes no step.
    overflows = overflows_for(build)
    rounding: dict[str, Any] = {}
    if build is fused_sgd:
        # Fused SGD refuses parameters of which some have no momentum yet, such as the reference's further BatchNorms.
        rounding = {"reference_build": sgd, "rtol": 1e-4, "atol": 1e-6}
    ast = assert_as_reference(
        scaling_step(overflows), net=net, build=build, skipped=overflows, steps=20, total_steps=40, **rounding
    )
    assert ast.step == 20 - len(overflows)


def test_without_batch_norm_the_result_is_that_of_the_run_without_the_batches_that_overflow() -> None:
    results = []
    for overflows in (OVERFLOWS, ()):
        model, optimizer, ast = wrapped(mlp(), **BUSY)
        step = scaling_step(overflows)
        for number in range(20):
            if overflows or number not in OVERFLOWS:
                step(model, optimizer, number)
        masks = {name: ast.masks.of(name) for name in ast.sub_nets}
        reference = with_plain_entries(ast.state_dict())["reference"]
        results.append({"weights": model.state_dict(), "masks": masks, "reference": reference, "step": ast.step})
    # The scale of the moment is in the reference gradient where an optimizer unscales by itself; SGD here does not.
    assert_same(*results)


def test_clipping_unscaled_gradients_is_the_run_written_by_hand() -> None:
    assert_as_reference(
        scaling_step(clip=0.2),
        build=adamw,
        clip=lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.2),
        skipped=OVERFLOWS,
        steps=20,
        total_steps=40,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_converted_after_wrapping_trains_saves_and_evaluates(dtype: torch.dtype, tmp_path: Any) -> None:
    model, optimizer, ast = wrapped(conv_net(), **BUSY)
    model.to(dtype)
    for name in ast.sub_nets:
        assert {t.dtype for t in ast.private_state(name).values() if t.is_floating_point()} == {dtype}, name
    ast.save(tmp_path / "converted.safetensors")
    with ast.sub_net("s80"), torch.no_grad():
        inside = model.norm1.weight.div_(3).clone()
    assert torch.equal(ast.private_state("s80")["norm1.weight"], inside)  # not rounded to the dtype of before
    for step in range(6):
        inputs, labels = batch_for(model, step)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs.to(dtype)).float(), labels).backward()
        optimizer.step()
    rest = snapshot(model)
    for name in ast.sub_nets:
        with ast.sub_net(name), torch.no_grad():
            assert model.eval()(batch_for(model, 0)[0].to(dtype)).isfinite().all()
    assert_same(rest, snapshot(model))
    ast.save(tmp_path / "trained.safetensors")

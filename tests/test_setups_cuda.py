"""What needs a CUDA device: real fp16, fused optimizers, CUDA graphs, another device for averages, added time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import SETTINGS, assert_same, conv_net, image_batch, sgd, snapshot
from reference_run import Loss, ReferenceRun, assert_runs_agree
from setup_runs import BUSY, assert_as_plain
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import ast_plugin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def same_kernels_every_time() -> Any:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def cuda_net() -> nn.Module:
    return conv_net().cuda()


def cuda_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = image_batch(step)
    return images.cuda(), labels.cuda()


def fused_adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def capturable_adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True, foreach=True)


BUILDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": sgd,
    "fused adamw": fused_adamw,
    "capturable adamw": capturable_adamw,
}


def loss_of(network: Any, step: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    images, labels = cuda_batch(step)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        return functional.cross_entropy(network(images), labels)


def losses(step: int, dtype: torch.dtype | None = None) -> list[Loss]:
    return [lambda network: loss_of(network, step, dtype)]


@pytest.mark.parametrize("build", sorted(BUILDS))
def test_training_on_the_device_is_bit_identical_to_plain_training(build: str) -> None:
    def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()

    assert_as_plain(step, net=cuda_net, build=BUILDS[build])


@pytest.mark.parametrize("build", sorted(BUILDS))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_sub_nets_on_the_device_are_the_run_written_by_hand(build: str, dtype: torch.dtype | None) -> None:
    model = cuda_net()
    options = {**BUSY, "method": "static"}  # no choice that one rounding could tip
    reference = ReferenceRun(model, BUILDS[build], **options)
    optimizer = BUILDS[build](model)
    ast = ast_plugin.wrap(optimizer, model, **{**SETTINGS, **options})
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    for step in range(15):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        overflow = step in (4, 5) and dtype == torch.float16
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.step(losses(step, dtype), happens=not overflow)
    assert_runs_agree(ast, reference, rtol=2e-2 if dtype else 1e-4, atol=2e-3 if dtype else 1e-5)


@pytest.mark.parametrize("build", sorted(BUILDS))
def test_an_overflow_of_real_fp16_runs_the_same_sub_net_again(build: str) -> None:
    model = cuda_net()
    optimizer = BUILDS[build](model)
    ast = ast_plugin.wrap(optimizer, model, **{**SETTINGS, **BUSY})
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # too large for fp16: the first steps overflow
    skipped = 0
    for step in range(30):
        name, number, scale = ast.active, ast.step, scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, torch.float16)).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert (ast.active, ast.step) == (name, number)
        else:
            assert ast.step == number + 1
    assert 0 < skipped < 25
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_cuda_graphs_replay_every_sub_net_and_its_new_masks() -> None:
    torch._dynamo.reset()
    model = cuda_net()
    options = {**BUSY, "method": "static"}
    reference = ReferenceRun(model, sgd, **options)
    compiled: Any = torch.compile(model, mode="reduce-overhead")
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, compiled, **{**SETTINGS, **options})
    for step in range(15):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=False)
        loss_of(compiled, step).backward()
        optimizer.step()
        reference.step(losses(step))
    assert_runs_agree(ast, reference, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_an_average_on_the_cpu_of_a_model_on_the_device_computes_as_each_sub_net() -> None:
    model = cuda_net()
    optimizer = sgd(model)
    ast = ast_plugin.wrap(optimizer, model, **{**SETTINGS, **BUSY})
    average = AveragedModel(model, device="cpu")
    twin = ast.twin(average)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        average.update_parameters(model)
        twin.update()
        dense = snapshot(average)
        for name in twin.sub_nets:
            with twin.sub_net(name), torch.no_grad():
                assert average.eval()(image_batch(step)[0]).isfinite().all()
        assert_same(dense, snapshot(average))
        assert ast.masks.get("s90", "conv2.weight").device.type == "cuda"


@pytest.mark.slow
@pytest.mark.extra("timm")
@pytest.mark.parametrize(("name", "size"), [("resnet50", 224), ("vit_base_patch16_224", 224)])
def test_time_added_to_a_step_in_bf16(name: str, size: int, record_property: Any) -> None:
    import timm

    def seconds_a_step(wrap: bool) -> float:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if wrap:
            ast_plugin.wrap(optimizer, model, sparsities=(0.9, 0.95, 0.98), total_steps=10_000, method="static")
        images = torch.randn(64, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
        labels = torch.randint(100, (64,), device="cuda")
        times = []
        for step in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            if step >= 12:
                times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    plain, wrapped = seconds_a_step(False), seconds_a_step(True)
    record_property("added", wrapped / plain - 1)  # a figure to read, no limit: machines differ
    assert plain > 0

"""Every norm of timm that keeps running statistics is private to each sub-net, whatever class it derives from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm import layers
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from ast_plugin.integrations.timm import wrap
from ast_plugin.norm_layers import batch_norm_modules
from ast_plugin.normalization import PrivateNormalization
from ast_plugin.recalibration import recalibrate

pytestmark = pytest.mark.extra("timm")

BATCH_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def private_names(module: nn.Module) -> set[str]:
    return {name.removeprefix("0.") for name in PrivateNormalization(nn.Sequential(module), ("a", "b"), "a").names}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: layers.BatchNormAct2d(4), BATCH_NORM),
        (lambda: layers.norm_act.SyncBatchNormAct(4), BATCH_NORM),
        (
            lambda: layers.SplitBatchNorm2d(4, num_splits=3),
            BATCH_NORM | {f"aux_bn.{i}.{name}" for i in range(2) for name in BATCH_NORM},
        ),
        (lambda: layers.EvoNorm2dB0(4), {"weight", "bias", "v", "running_var"}),
        (lambda: layers.EvoNorm2dB1(4), {"weight", "bias", "running_var"}),
        (lambda: layers.EvoNorm2dB2(4), {"weight", "bias", "running_var"}),
        (lambda: layers.norm_act.FrozenBatchNormAct2d(4), set()),
        (lambda: layers.EvoNorm2dS0(4), set()),
        (lambda: layers.FilterResponseNormTlu2d(4), set()),
        (lambda: layers.GroupNormAct(4, num_groups=2), set()),
        (lambda: layers.GroupNorm1(4), set()),
        (lambda: layers.LayerNorm2d(4), set()),
        (lambda: layers.RmsNorm2d(4), set()),
        (lambda: layers.SimpleNorm2d(4), set()),
    ],
)
def test_private_tensors_of_a_norm(make: Callable[[], nn.Module], expected: set[str]) -> None:
    assert private_names(make()) == expected


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "levit_128s"])
@pytest.mark.parametrize(
    ("convert", "tensors"),
    [
        (lambda model: model, 5),
        (lambda model: layers.convert_splitbn_model(model, num_splits=2), 10),
        (layers.convert_sync_batchnorm, 5),
    ],
    ids=["plain", "split", "sync"],
)
def test_all_batch_norms_of_a_network_are_private_however_they_are_converted(
    name: str, convert: Callable[[nn.Module], nn.Module], tensors: int
) -> None:
    model = timm.create_model(name)
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    converted = convert(model)
    names = PrivateNormalization(converted, ("a", "b"), "a").names
    assert len(names) == tensors * len(norms)
    assert {f"{path}.running_var" for path in norms} <= set(names)


def test_frozen_batch_norms_are_shared_and_not_trained() -> None:
    model = freeze_batch_norm_2d(timm.create_model("test_efficientnet"))
    assert batch_norm_modules(model) == {}
    assert not any("bn" in name for name, _ in model.named_parameters())


def trained(model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"sparsities": (0.5, 0.9), "total_steps": 8, "method": "static", **options}
    ast = wrap(optimizer, model, **settings)
    model.train()
    for step in range(8):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return ast


def states(ast: Any) -> list[dict[str, Tensor]]:
    return [ast.materialize(name) for name in ast.sub_nets]


def test_auxiliary_batch_norms_go_with_the_sub_net() -> None:
    model = layers.convert_splitbn_model(timm.create_model("test_efficientnet", num_classes=4), num_splits=2)
    one, other = states(trained(model))
    for name in ("bn1.aux_bn.0", "bn1", "bn2.aux_bn.0"):
        assert not torch.equal(one[f"{name}.running_mean"], other[f"{name}.running_mean"])
        assert not torch.equal(one[f"{name}.weight"], other[f"{name}.weight"])
        assert one[f"{name}.num_batches_tracked"] == other[f"{name}.num_batches_tracked"] == 4


def test_running_variances_of_evo_norms_go_with_the_sub_net() -> None:
    model = timm.create_model("test_resnet", num_classes=4, norm_layer=layers.EvoNorm2dB0)
    names = [name for name, module in model.named_modules() if isinstance(module, layers.EvoNorm2dB0)]
    assert len(names) > 10
    one, other = states(trained(model))
    for name in names:
        assert not torch.equal(one[f"{name}.running_var"], other[f"{name}.running_var"])
        assert not torch.equal(one[f"{name}.weight"], other[f"{name}.weight"])


def test_recalibration_takes_evo_norms_and_batch_norms_with_activation() -> None:
    images = [torch.randn(8, 4, 6, 6) * scale for scale in (1.0, 3.0)]
    for norm, tracked in ((layers.EvoNorm2dB0(4), 1), (layers.BatchNormAct2d(4), 2)):
        with torch.no_grad():
            norm.running_var.fill_(100.0)
        recalibrate(nn.Sequential(norm), images)
        count = images[0].numel() // 4
        wanted = sum(image.var(dim=(0, 2, 3), unbiased=False) * count / (count - 1) for image in images) / 2
        assert torch.allclose(norm.running_var, wanted, rtol=1e-5)
        assert norm.momentum == 0.1
        assert len([buffer for buffer in norm._buffers if buffer.startswith("running")]) == tracked


def test_recalibration_leaves_a_dropout_between_norm_and_activation_asleep() -> None:
    norm = layers.BatchNormAct2d(4, act_layer=nn.Identity, drop_layer=lambda: nn.Dropout(0.5))
    after = nn.BatchNorm2d(4)
    recalibrate(nn.Sequential(norm, after), [torch.randn(64, 4, 6, 6)])
    assert torch.allclose(after.running_var, torch.ones(4), atol=0.01)  # dropping half would have doubled it

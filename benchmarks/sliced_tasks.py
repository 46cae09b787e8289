"""What `sliced_training.py` trains, and which channels belong together in it.

ResNet-50 at 96 pixels, ResNet-32 on CIFAR shapes, and a stack of four ViT-B blocks. The data are synthetic. The groups
are written down here, so that the measurement needs no search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAttribute, GroupAxis
from overhead_tasks import ResNet32

NETWORKS = ("ResNet-50", "ResNet-32", "ViT-B blocks")
CLASSES = 10

_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Task:
    """One network with a batch of its size.

    Attributes:
        network: One of `NETWORKS`.
        build: Makes the network, the same weights every time.
        groups: Which of its channels belong together.
        inputs: A batch.
        labels: Its classes; for blocks without a classifier, of the first outputs of the first token.
    """

    network: str
    build: Callable[[], nn.Module]
    groups: ChannelGroups
    inputs: Tensor
    labels: Tensor

    def loss(self, outputs: Tensor) -> Tensor:
        """Return the loss of the network's outputs."""
        return cross_entropy(outputs if outputs.dim() == 2 else outputs.mean(1)[:, :CLASSES], self.labels)


def make_task(network: str, *, quick: bool = False) -> Task:
    """Return a task; `quick` has tiny batches and pictures.

    Args:
        network: One of `NETWORKS`.
        quick: Whether it is only to be seen that everything runs.
    """
    generator = torch.Generator().manual_seed(0)
    shape: Sequence[int]
    if network == "ResNet-50":
        build, shape = _resnet50, (2, 3, 32, 32) if quick else (8, 3, 96, 96)
    elif network == "ResNet-32":
        build, shape = _resnet32, (4, 3, 32, 32) if quick else (128, 3, 32, 32)
    else:
        build, shape = _vit_blocks, (1, 9, 768) if quick else (8, 197, 768)
    groups = tuple(group for path, module in build().named_modules() for group in _groups_of(path, module))
    inputs = torch.randn(tuple(shape), generator=generator)
    labels = torch.randint(CLASSES, (shape[0],), generator=generator)
    return Task(network, build, ChannelGroups(groups=groups), inputs, labels)


def _resnet50() -> nn.Module:
    torch.manual_seed(0)
    return _timm().create_model("resnet50", num_classes=CLASSES)


def _resnet32() -> nn.Module:
    torch.manual_seed(0)
    return ResNet32()


def _vit_blocks() -> nn.Module:
    torch.manual_seed(0)
    block = _timm().models.vision_transformer.Block
    return nn.Sequential(*(block(768, 12, qkv_bias=True) for _ in range(4)))


def _timm() -> object:
    try:
        import timm
    except ImportError:
        raise SystemExit(
            "ResNet-50 and ViT-B blocks come from timm, which is not installed: pip install 'ast-plugin[timm]', or "
            "leave them out with --networks ResNet-32"
        ) from None
    return timm


def _groups_of(path: str, module: nn.Module) -> list[ChannelGroup]:
    """Return the groups inside a residual block, or none if it is none."""
    kind = type(module).__name__
    if kind == "Block" and hasattr(module, "norm1") and hasattr(module, "conv1"):
        return [_channels(path, "conv1", "norm1", "conv2", module.conv1.out_channels)]
    if kind == "Bottleneck":
        return [
            _channels(path, "conv1", "bn1", "conv2", module.conv1.out_channels),
            _channels(path, "conv2", "bn2", "conv3", module.conv2.out_channels),
        ]
    if kind == "Mlp":
        return [_hidden(path, module.fc1.out_features)]
    return [_heads(path, module.num_heads, module.head_dim)] if kind == "Attention" else []


def _channels(path: str, maker: str, norm: str, reader: str, units: int) -> ChannelGroup:
    states = tuple(GroupAxis(tensor=f"{path}.{norm}.{name}", dim=0, role="state") for name in _NORM)
    return ChannelGroup(
        name=f"{path}.{maker}",
        kind="channels",
        units=units,
        axes=(
            GroupAxis(tensor=f"{path}.{maker}.weight", dim=0, role="out"),
            *states,
            GroupAxis(tensor=f"{path}.{reader}.weight", dim=1, role="in"),
        ),
    )


def _hidden(path: str, units: int) -> ChannelGroup:
    return ChannelGroup(
        name=f"{path}.fc1",
        kind="hidden",
        units=units,
        axes=(
            GroupAxis(tensor=f"{path}.fc1.weight", dim=0, role="out"),
            GroupAxis(tensor=f"{path}.fc1.bias", dim=0, role="state"),
            GroupAxis(tensor=f"{path}.fc2.weight", dim=1, role="in"),
        ),
    )


def _heads(path: str, heads: int, size: int) -> ChannelGroup:
    width = heads * size
    parts = ((0, size), (width, size), (2 * width, size))
    return ChannelGroup(
        name=f"{path}.qkv",
        kind="heads",
        units=heads,
        axes=(
            GroupAxis(tensor=f"{path}.qkv.weight", dim=0, role="out", parts=parts),
            GroupAxis(tensor=f"{path}.qkv.bias", dim=0, role="state", parts=parts),
            GroupAxis(tensor=f"{path}.proj.weight", dim=1, role="in", parts=((0, size),)),
        ),
        attributes=(
            GroupAttribute(module=path, name="num_heads", per_unit=1),
            GroupAttribute(module=path, name="attn_dim", per_unit=size),
        ),
    )

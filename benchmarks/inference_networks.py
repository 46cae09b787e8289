"""The networks of `inference.py`, and elastic files of sub-nets with random masks: shapes alone matter for time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ast_plugin.channel_search import find_groups
from ast_plugin.channels import ChannelGroups
from ast_plugin.elastic import Elastic, load
from ast_plugin.elastic_file import write_elastic
from ast_plugin.masks import MaskStore
from ast_plugin.sub_nets import sparsity_name


def resnet50(*, quick: bool) -> tuple[nn.Module, Tensor]:
    """Return timm's ResNet-50 in eval mode and one picture of 224 pixels; quick: ResNet-18 and 64 pixels."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18" if quick else "resnet50")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm begins with zeros, of which nothing would come out
    return model.eval(), torch.randn(1, 3, *(2 * [64 if quick else 224]))


def vit_b(*, quick: bool) -> tuple[nn.Module, Tensor]:
    """Return timm's ViT-B in eval mode and one picture of 224 pixels; quick: two narrow blocks and 32 pixels."""
    import timm

    torch.manual_seed(0)
    narrow = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 10} if quick else {}
    model = timm.create_model("vit_base_patch16_224", **narrow)
    return model.eval(), torch.randn(1, 3, *(2 * [32 if quick else 224]))


def channel_file(path: Path, model: nn.Module, inputs: Tensor, kept: tuple[float, ...]) -> Elastic:
    """Write a file of sub-nets that keep shares of all channel groups, and load it into the model."""
    groups = find_groups(model, inputs)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in _masked(groups)}
    masks = MaskStore([share_name(share) for share in kept], shapes)
    generator = torch.Generator().manual_seed(0)
    order = {group.name: torch.rand(group.units, generator=generator).argsort() for group in groups.groups}
    for share in kept:
        units = {}
        for group in groups.groups:
            units[group.name] = torch.zeros(group.units, dtype=torch.bool)
            units[group.name][order[group.name][: max(1, round(share * group.units))]] = True
        for name, mask in groups.masks(units, shapes).items():
            masks.set(share_name(share), name, mask)
    header = {
        "sub_nets": [{"name": share_name(s), "target_sparsity": 1 - s, "pattern": "channel"} for s in kept],
        "channel_groups": [group.to_dict() for group in groups.groups],
    }
    write_elastic(path, state=model.state_dict(), masks=masks, private={}, header=header)
    return load(path, model)


def share_name(share: float) -> str:
    """Return the name of the sub-net that keeps a share of all channels."""
    return f"kept {share:g}".replace(" ", "-")


def linear_file(path: Path, model: nn.Module, sub_nets: Mapping[tuple[float, int], str]) -> Elastic:
    """Write a file of sub-nets with zeros in the linear layers of all blocks, and load it into the model.

    Args:
        path: The file.
        model: The network.
        sub_nets: Fraction of zeros and edge of the blocks in which they lie -> name.
    """
    weights = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    masks = MaskStore(list(sub_nets.values()), weights)
    generator = torch.Generator().manual_seed(0)
    for (sparsity, edge), sub_net in sub_nets.items():
        for name, (rows, columns) in weights.items():
            kept = torch.rand(rows // edge, columns // edge, generator=generator) >= sparsity
            masks.set(sub_net, name, kept.repeat_interleave(edge, 0).repeat_interleave(edge, 1))
    header = {
        "sub_nets": [
            {
                "name": name,
                "target_sparsity": sparsity,
                "pattern": "unstructured" if edge == 1 else f"{edge}x{edge}",
            }
            for (sparsity, edge), name in sub_nets.items()
        ]
    }
    write_elastic(path, state=model.state_dict(), masks=masks, private={}, header=header)
    return load(path, model)


def linear_name(sparsity: float, edge: int) -> str:
    """Return the name of a sub-net by its zeros: ``s90``, in blocks ``s90-8x8``."""
    return sparsity_name(sparsity) + ("" if edge == 1 else f"-{edge}x{edge}")


def _masked(groups: ChannelGroups) -> list[str]:
    return list(dict.fromkeys(axis.tensor for group in groups.groups for axis in group.axes if axis.role != "state"))

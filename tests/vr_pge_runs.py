"""Runs of VR-PGE on small networks with groups of channels, shared by several test files."""

from __future__ import annotations

from typing import Any

import networks
import torch
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.channels import ChannelGroup, ChannelGroups, GroupAxis

SETTINGS: dict[str, Any] = {
    "sparsities": (0.5,),
    "method": "vr-pge",
    "pattern": "channel",
    "total_steps": 30,
    "end_step": 20,
    "slicing": "auto",
}


def group(name: str, units: int, made: str, read: str, norm: str = "") -> ChannelGroup:
    """Return the units that the rows of one weight make and the columns of another read."""
    between = ("weight", "bias", "running_mean", "running_var") if norm else ()
    return ChannelGroup(
        name=name,
        kind="channels",
        units=units,
        axes=(
            GroupAxis(tensor=made, dim=0, role="out"),
            *(GroupAxis(tensor=f"{norm}.{tensor}", dim=0, role="state") for tensor in between),
            GroupAxis(tensor=read, dim=1, role="in"),
        ),
    )


CONV_GROUPS = ChannelGroups(
    groups=(
        group("stem", 8, "stem.weight", "conv1.weight", "norm0"),
        group("conv1", 16, "conv1.weight", "conv2.weight", "norm1"),
        group("conv2", 16, "conv2.weight", "head.weight", "norm2"),
    )
)
PLAIN_GROUPS = ChannelGroups(
    groups=tuple(
        group(g.name, g.units, g.axes_of("out")[0].tensor, g.axes_of("in")[0].tensor) for g in CONV_GROUPS.groups
    )
)


class DroppingNet(networks.ConvNet):
    """`networks.ConvNet` with dropout."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.dropout(images, 0.3, self.training))


def wrapped(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    groups: ChannelGroups = CONV_GROUPS,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, ast_plugin.AlternatingSparseTraining]:
    """Return a model with dropout and BatchNorm, its optimizer, and a controller that learns its channels."""
    if model is None:
        torch.manual_seed(0)
        model = DroppingNet()
    optimizer = networks.sgd(model) if optimizer is None else optimizer
    return model, optimizer, ast_plugin.wrap(optimizer, model, groups=groups, **{**SETTINGS, **options})


def loss_of(model: nn.Module, step: int) -> Tensor:
    images, labels = networks.image_batch(step)
    return functional.cross_entropy(model(images), labels)


def explored_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ast: ast_plugin.AlternatingSparseTraining, step: int
) -> None:
    """Make a step with a call of explore."""
    model.train()
    optimizer.zero_grad()
    ast.explore(lambda: loss_of(model, step))
    loss_of(model, step).backward()
    optimizer.step()


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make a step with an ordinary closure."""
    model.train()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    optimizer.step(closure)

"""The network inside what a timm script trains, evaluates or averages."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ast_plugin.slots import bare_model


def network_in(module: nn.Module) -> nn.Module:
    """Return the network that was created by name, whose parameter names checkpoints and exports have.

    Args:
        module: The network itself, inside wrappers for compilation, data-parallel use or averaging; or the student with
            its projection, which is what timm trains when features are distilled.
    """
    while True:
        module = bare_model(module)
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def picture_for(network: nn.Module, args: argparse.Namespace) -> Tensor:
    """Return a black picture of the size that a script trains on, (1, channels, height, width), as the network is.

    Args:
        network: The network.
        args: The script's arguments.
    """
    from timm.data import resolve_data_config

    size = resolve_data_config(vars(args), model=network)["input_size"]
    like = next(network.parameters())
    return torch.zeros(1, *size, dtype=like.dtype, device=like.device)


def _inside(module: nn.Module) -> nn.Module | None:
    # By name: the package has to be importable without timm, and old versions of timm lack some of these classes.
    kind = type(module).__name__
    if kind == "FeatureDistillationTrainableModule":
        return module.get_submodule("student")
    if kind.startswith("ModelEma"):
        return module.get_submodule("module")
    return None

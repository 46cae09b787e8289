"""One call for people who train a network of timm in a loop of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import nn

import ast_plugin
from ast_plugin.config import ASTConfig
from ast_plugin.errors import WrapError
from ast_plugin.integrations.timm.selection import TimmSelection, timm_networks
from ast_plugin.slots import bare_model
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.wrapping import ASTOptions


def wrap(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    config: ASTConfig | None = None,
    *,
    outermost: nn.Module | None = None,
    plugins: Sequence[object] = (),
    **options: Unpack[ASTOptions],
) -> AlternatingSparseTraining:
    """Attach alternating sparse training to a network of timm and its optimizer.

    As `ast_plugin.wrap`, with the choice of weights that `TimmSelection` makes. A model without a network of timm in it
    is refused, so that nobody gets the general rules by mistake.

    Args:
        optimizer: The optimizer that trains `model`, for example from ``timm.optim.create_optimizer_v2``.
        model: The network from ``timm.create_model``, or a model with one inside; not timm's training task around it.
        config: All settings as one object, instead of `options`.
        outermost: The training task or other module that the loop calls, where that is not the network itself.
        plugins: Further plugin objects for this run; they are asked before `TimmSelection`.
        **options: The settings of `ASTConfig` by name, for example ``sparsities=(0.9, 0.95)``, ``total_steps=1000``.

    Returns:
        The controller: sub-nets to switch, figures to read, files to save.

    Raises:
        WrapError: If `model` has no network of timm inside or is a training task, and as from `ast_plugin.wrap`.
        ConfigError: As from `ast_plugin.wrap`.
        SelectionError: As from `ast_plugin.wrap`.
        PluginError: As from `ast_plugin.wrap`.

    Example:
        >>> model = timm.create_model("resnet18", num_classes=10)
        >>> optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
        >>> ast = wrap(optimizer, model, sparsities=(0.9, 0.95, 0.98), total_steps=1000)
    """
    if isinstance(model, nn.Module):
        _check_model(bare_model(model))
    if isinstance(plugins, (list, tuple)) and not any(isinstance(plugin, TimmSelection) for plugin in plugins):
        plugins = [TimmSelection(), *plugins]  # the last is asked first
    return ast_plugin.wrap(optimizer, model, config, outermost=outermost, plugins=plugins, **options)


def _check_model(model: nn.Module) -> None:
    if any(f"{kind.__module__}.".startswith("timm.task.") for kind in type(model).__mro__):
        raise WrapError(
            f"model is timm's {type(model).__name__}, and files would carry its names; give the network inside, and "
            "the task as outermost: wrap(optimizer, task.trainable_module, outermost=task, ...)"
        )
    if next(timm_networks(model), None) is None:
        raise WrapError(
            f"no network of timm is inside model, a {type(model).__name__}; give what timm.create_model returned, or "
            "use ast_plugin.wrap, which chooses by layer alone"
        )

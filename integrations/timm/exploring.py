"""Losses of the networks that a method draws at every step (`vr-pge`): those of timm's training task on the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ast_plugin.errors import ConfigError
from ast_plugin.training import AlternatingSparseTraining


def explore_with(task: nn.Module | None, ast: AlternatingSparseTraining) -> None:
    """Have every training forward of a task compute these losses first; does nothing where the method needs none.

    Args:
        task: What the script calls, which returns the loss under ``loss``; None for scripts that compute it themselves.
        ast: The run.

    Raises:
        ConfigError: If the method needs losses, and there is no task.
    """
    if ast.sampler is None:
        return
    if task is None:
        raise ConfigError(
            f"--ast-method {ast.config.method}: it needs the loss of several networks on each batch, and this script "
            "computes the loss outside of a training task; use the train.py of timm 1.0.23 or newer, or "
            "python -m ast_plugin.integrations.timm.train"
        )

    def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and ast.model.training:
            ast.explore(lambda: module(*args, **options)["loss"])

    task.register_forward_pre_hook(torch.compiler.disable(before), prepend=True, with_kwargs=True)

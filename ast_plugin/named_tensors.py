"""Tensors that callers give by parameter name, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ast_plugin.errors import ConfigError, near_names


def checked_tensors(
    what: str, tensors: Any, shapes: Mapping[str, tuple[int, ...]], *, complete: bool = True
) -> dict[str, Tensor]:
    """Return tensors by name, in the order of `shapes`.

    Args:
        what: What they were given for, for the message.
        tensors: What was given.
        shapes: By name, the shapes that they must have.
        complete: Whether there must be one for every name.

    Raises:
        ConfigError: If it is no mapping from these names to tensors of these shapes.
    """
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"{what} must be a mapping from parameter names to tensors, got {type(tensors).__name__}")
    for name in tensors:
        if name not in shapes:
            raise ConfigError(f"{what} names {name!r}, which has no place here: {near_names(str(name), shapes)}")
    if complete and (missing := [name for name in shapes if name not in tensors]):
        raise ConfigError(f"{what} lacks {', '.join(map(repr, missing[:3]))}; give a tensor for each of {len(shapes)}")
    for name, tensor in tensors.items():
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if found != shapes[name]:
            raise ConfigError(f"{what}[{name!r}] must be a tensor of shape {shapes[name]}, got {found}")
    return {name: tensors[name] for name in shapes if name in tensors}


def checked_masks(what: str, masks: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return masks by name, one for every name of `shapes`.

    Args:
        what: What they were given for, for the message.
        masks: What was given.
        shapes: By name, the shapes that they must have.

    Raises:
        ConfigError: If it is no mapping from these names to bool tensors of these shapes.
    """
    checked = checked_tensors(what, masks, shapes)
    for name, mask in checked.items():
        if mask.dtype != torch.bool:
            raise ConfigError(f"{what}[{name!r}] must be bool, True = kept, got {mask.dtype}")
    return checked

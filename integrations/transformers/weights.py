"""Whether the weights that the Trainer has loaded are those that a checkpoint's sub-nets belong to.

Trainers of transformers 5 load checkpoints by the names that they find in the files, and pass over those that the
model has under other names, with a warning: the model is then as it was before. Several architectures (ViT among them)
are saved under such names. Masks of one network on the weights of another would be wrong without a sign of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import StateError
from ast_plugin.sharding import is_sharded

_logger = logging.getLogger("ast_plugin.transformers")

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LISTED = 3


def fingerprint(model: nn.Module) -> dict[str, int]:
    """Return a number for every entry of the model's state dict that depends on all of its bits and their places.

    Args:
        model: The bare model, dense; where its parameters are sharded, the result is empty.
    """
    state = model.state_dict()
    if any(is_sharded(tensor) for tensor in state.values()):
        return {}
    return {name: _sum_of_bits(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def ensure_weights(model: nn.Module, folder: str, expected: Mapping[str, int]) -> None:
    """Load the weights in a checkpoint folder by the model's own method, unless the Trainer has done so.

    Args:
        model: The bare model.
        folder: The checkpoint's.
        expected: What `fingerprint` returned when the checkpoint was written.

    Raises:
        StateError: If the weights are not those that the sub-nets were saved with.
    """
    if not expected or not _different(model, expected):
        return
    kind: Any = type(model)
    if callable(getattr(kind, "from_pretrained", None)):
        _logger.warning(
            f"The Trainer has not loaded all weights in {folder!r}; they are read by {kind.__name__} itself."
        )
        try:
            model.load_state_dict(kind.from_pretrained(folder, config=model.config).state_dict())
        except Exception as error:  # whatever the model's own code raises
            raise StateError(f"the weights in {folder!r} cannot be loaded: {error}; take another checkpoint") from error
    different = _different(model, expected)
    if different:
        listed = ", ".join(different[:_LISTED]) + (" and others" if len(different) > _LISTED else "")
        raise StateError(
            f"the weights loaded from {folder!r} are not those that its sub-nets were saved with ({len(different)} of "
            f"{len(expected)} differ: {listed}); take another checkpoint, or delete the file of the sub-nets there and "
            "pass resume_plain=True to have them start from these weights"
        )


def _different(model: nn.Module, expected: Mapping[str, int]) -> list[str]:
    present = fingerprint(model)
    return sorted(name for name in {*present, *expected} if present.get(name) != expected.get(name))


def _sum_of_bits(tensor: Tensor) -> int:
    """Return a sum in which every row and every column counts differently, so that none may change its place."""
    if not tensor.numel():
        return 0
    values = tensor.detach().contiguous().reshape(len(tensor) if tensor.ndim else 1, -1)
    bits = values.view(_INTEGERS[min(values.element_size(), 8)])
    columns, rows = (bits.sum(dimension, dtype=torch.int64) for dimension in (0, 1))
    return (_weighted(columns) + 3 * _weighted(rows)) % 2**63  # where transposed, the two change their places


def _weighted(sums: Tensor) -> int:
    return int((sums * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum())

"""The state of a run in a form whose entries are the same at every step.

`torch.distributed.checkpoint` reads a checkpoint into the entries that a fresh run has: what a fresh run lacks is
left out without a word, and a tensor of another size is refused. So whatever comes and goes in the course of a run
(the reference gradient, optimizer state, counters) is one entry of bytes, which it takes as it is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from ast_plugin.errors import StateError

_SAME_AT_EVERY_STEP = ("format", "step", "last_steps", "sub_nets", "default_sub_net", "masks")
_REST = "rest"


def with_fixed_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with everything that changes its shape in the course of a run as bytes.

    Args:
        state: What `RunState.collect` returned.

    Returns:
        Tensors and plain containers; under ``rest`` the bytes that `torch.save` writes.
    """
    buffer = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key not in _SAME_AT_EVERY_STEP}, buffer)
    return {**{key: state[key] for key in _SAME_AT_EVERY_STEP}, _REST: buffer.getvalue()}


def with_plain_entries(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `with_fixed_entries` was given; a state without ``rest`` is returned as it is.

    Raises:
        StateError: If the bytes cannot be read.
    """
    if not isinstance(state, Mapping) or _REST not in state:
        return state
    try:
        rest = torch.load(io.BytesIO(state[_REST]), weights_only=True)
        return {**{key: value for key, value in state.items() if key != _REST}, **rest}
    except Exception as error:  # what the reader of torch raises depends on where the damage is
        raise StateError(
            f"the saved state is damaged: {type(error).__name__}: {error}; load another checkpoint"
        ) from error

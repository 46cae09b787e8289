"""The state of a run in a checkpoint folder of the Trainer: one file of its own, beside the optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.checkpoint import read_checkpoint, write_checkpoint
from ast_plugin.errors import StateError

STATE = "ast_state.pt"

_ENTRY = "ast"


def write_state(folder: str | Path, state: Mapping[str, Any]) -> Path:
    """Write the state of a run into a checkpoint folder; a process that is killed leaves no half a file.

    Args:
        folder: The checkpoint's.
        state: What ``state_dict()`` of the controller returned.

    Returns:
        The file.

    Raises:
        SaveError: If it cannot be written.
    """
    path = Path(folder) / STATE
    write_checkpoint(path, {_ENTRY: dict(state)})
    return path


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """Return the state in a checkpoint folder, None where there is none.

    Args:
        folder: The checkpoint's.

    Raises:
        StateError: If the file there cannot be read, or holds something else.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        return None
    _, values = read_checkpoint(path)
    state = values.get(_ENTRY)
    if not isinstance(state, dict):
        raise StateError(f"{str(path)!r} holds no state of a run; resume from another checkpoint")
    return state

"""The state of a run in a checkpoint folder of the Trainer: one file of its own, beside the optimizer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_plugin.checkpoint import read_checkpoint, write_checkpoint
from ast_plugin.errors import StateError

STATE = "ast_state.pt"

_ENTRY = "ast"
_WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a checkpoint folder holds of a run.

    Attributes:
        run: What ``state_dict()`` of the controller returned.
        weights: What `ast_plugin.integrations.transformers.weights.fingerprint` returned.
    """

    run: Mapping[str, Any]
    weights: Mapping[str, int]


def write_state(folder: str | Path, state: SavedState) -> Path:
    """Write the state of a run into a checkpoint folder; a process that is killed leaves no half a file.

    Args:
        folder: The checkpoint's.
        state: What to write.

    Returns:
        The file.

    Raises:
        SaveError: If it cannot be written.
    """
    path = Path(folder) / STATE
    write_checkpoint(path, {_ENTRY: dict(state.run), _WEIGHTS: dict(state.weights)})
    return path


def read_state(folder: str | Path) -> SavedState | None:
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
    run, weights = values.get(_ENTRY), values.get(_WEIGHTS)
    if not isinstance(run, dict) or not isinstance(weights, dict):
        raise StateError(f"{str(path)!r} holds no state of a run; resume from another checkpoint")
    return SavedState(run=run, weights=weights)

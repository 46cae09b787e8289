"""Where the state of a run lives in timm's checkpoints.

timm 1.0.27 and newer let a task add state of its own, which is restored even with ``--no-resume-opt``. In older
ones, and in scripts without a task, it travels in the optimizer's state dict. timm's own train.py passes over both, so
that a checkpoint is an ordinary one of the dense model.
"""

from __future__ import annotations

import argparse
import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ast_plugin.errors import StateError
from ast_plugin.training_state import KEY

AVERAGE_KEY = "ast_plugin_ema"  # of the averaged model's private BatchNorm state

StateOf = Callable[[], Mapping[str, Any]]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of timm; tensors are read when they are used, but for the oldest format.

    Raises:
        StateError: If there is no such file, or it is none that timm writes.
    """
    if not Path(path).is_file():
        raise StateError(f"--resume {path}: there is no such file; check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for files that are damaged or none of its own
        reason = str(error).strip().split("\n")[0]
        raise StateError(f"--resume {path}: no checkpoint that can be read: {reason}; take another one") from error
    if not isinstance(checkpoint, dict):
        raise StateError(f"--resume {path}: holds a {type(checkpoint).__name__}, no training checkpoint of timm")
    return checkpoint


@contextlib.contextmanager
def explained(path: str | Path, args: argparse.Namespace) -> Iterator[None]:
    """Say in one sentence what differs when a checkpoint of another model is loaded within the block.

    Args:
        path: The checkpoint.
        args: The settings of this run, of which the model's name is used.

    Raises:
        StateError: If there is no such file, it is none that timm writes, or it is of another model.
    """
    arch = read_checkpoint(path).get("arch", "another model")
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        raise StateError(
            f"--resume {path}: a checkpoint of {arch}, and this run trains {getattr(args, 'model', 'another')}. "
            f"{' '.join(lines[:3])[:400]}; pass the --model and --num-classes that it was made with"
        ) from error


def state_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run has left in a checkpoint: its state and that of an average, each only if it is there."""
    for place in ("task_state", "optimizer"):
        held = checkpoint.get(place)
        if isinstance(held, Mapping) and KEY in held:
            return {key: held[key] for key in (KEY, AVERAGE_KEY) if key in held}
    return {}


def keep_in_task(task: nn.Module, state_of: StateOf) -> bool:
    """Have a task of timm carry the state in its checkpoints.

    Args:
        task: The task, as the training script has it.
        state_of: Returns the state by key.

    Returns:
        Whether this kind of task has a place for it.
    """
    get_task_state: Any = getattr(task, "get_task_state", None)
    if not callable(get_task_state):
        return False

    def with_state(*args: Any, **options: Any) -> dict[str, Any]:
        state = dict(get_task_state(*args, **options) or {})
        # The average has a task state of its own, in which nothing of the run belongs.
        return state if options.get("ema") else {**state, **state_of()}

    object.__setattr__(task, "get_task_state", with_state)
    return True


def keep_average_in_optimizer(
    optimizer: torch.optim.Optimizer, state_of: Callable[[], Mapping[str, Any] | None]
) -> None:
    """Have the optimizer carry the state of an average, where no task can.

    Args:
        optimizer: The torch optimizer.
        state_of: Returns the state, None where there is none.
    """

    def add(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        found = state_of()
        if found is not None:
            state[AVERAGE_KEY] = found

    optimizer.register_state_dict_post_hook(add)

"""Files of a fit: checkpoints and what lies beside them, and what its end leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin.elastic_file import ELASTIC
from ast_plugin.errors import StateError
from ast_plugin.integrations.frameworks.lightning.host import pl
from ast_plugin.integrations.sub_net_files import write_sub_nets
from ast_plugin.training import AlternatingSparseTraining

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def load_best(trainer: Trainer, key: str) -> dict[str, Any] | None:
    """Load the weights of the best checkpoint, and return the callback's state in it; None if there is no best one.

    Args:
        trainer: The Trainer.
        key: The callback's, in checkpoints.

    Raises:
        StateError: If it has no state of the callback.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        return None
    checkpoint = trainer.strategy.load_checkpoint(path)
    found = checkpoint.get("callbacks", {}).get(key)
    if not found:
        raise StateError(
            f"the best model is that of {path!r}, which has no sub-nets; load_best=False keeps the last ones"
        )
    trainer.strategy.load_model_state_dict(checkpoint)
    return dict(found)


def write_end(trainer: Trainer, ast: AlternatingSparseTraining, folder: str | os.PathLike[str] | None) -> None:
    """Write the files of a fit that has ended, on the first rank.

    Args:
        trainer: The Trainer.
        ast: Its run.
        folder: Where to; None: Lightning's folder for logs or ``default_root_dir``, if it writes checkpoints.

    Raises:
        SaveError: If a file cannot be written.
    """
    if folder is None and trainer.checkpoint_callbacks:
        folder = trainer.log_dir or trainer.default_root_dir
    place = None if folder is None or trainer.fast_dev_run else local_path(folder)
    if place is not None and trainer.is_global_zero:
        write_sub_nets(ast, place, host=pl.__name__.partition(".")[0])
    trainer.strategy.barrier("elastic file")


def elastic_beside(checkpoint: Path) -> Path:
    """Return the name of the elastic file beside a checkpoint: ``last.ckpt`` has ``last.elastic.safetensors``."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.{ELASTIC}")


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return a path in the file system of this machine, None where it is another one's."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return None if "://" in text else Path(text)

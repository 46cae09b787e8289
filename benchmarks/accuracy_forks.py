"""States of runs shortly before their end, from which runs that differ in that end alone go on.

With sup-tickets the first nine tenths of a run are those of the run without. So whichever comes first leaves its state
there, and the others train a tenth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ast_plugin.checkpoint import read_checkpoint, write_checkpoint
from ast_plugin.training_state import KEY

if TYPE_CHECKING:
    from accuracy_runs import Settings

AT_THE_END = "sup_tickets"
SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Fork:
    """Where the state of a run is kept, and at which step.

    Attributes:
        path: The file.
        step: Steps that the run has made then.
    """

    path: Path
    step: int

    @classmethod
    def of(cls, settings: Settings, folder: Path | None) -> Fork | None:
        """Return the fork of a run; None without a folder, or where its end begins earlier or is not its own.

        Args:
            settings: Of the run.
            folder: Where states are kept.
        """
        others = set(settings.mechanisms) - {AT_THE_END}
        if folder is None or others or settings.joint:
            return None
        if settings.mechanisms.get(AT_THE_END, {}).get("share", SHARE) > SHARE:
            return None
        name = hashlib.sha256(json.dumps({**settings.to_dict(), "mechanisms": {}}, sort_keys=True).encode()).hexdigest()
        return cls(folder / f"{name[:24]}.pt", round(settings.steps * (1 - SHARE)))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, seconds: float) -> None:
        """Keep the state, but that of plugins, which belongs to the end."""
        state = optimizer.state_dict()
        run = {key: value for key, value in state[KEY].items() if key != "plugins"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"model": model.state_dict(), "optimizer": {**state, KEY: run}, "seconds": seconds}
        write_checkpoint(self.path, kept)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Go on from the state; returns the processor time that it took to get there."""
        _, kept = read_checkpoint(self.path)
        state: dict[str, Any] = dict(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return float(state["seconds"])

"""What `test_lightning_ranks.py` starts in two processes: fits one after the other, and what a rank has then."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import Classifier, data, sparse, trainer_of
from networks import mlp
from torch.utils.data import DataLoader, DistributedSampler

BATCH = 8  # of all ranks together
SAVED = 8


class Spread(Classifier):
    """Logs what all ranks have measured together."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, accuracy = self.loss(batch)
        self.log_dict({"val_loss": loss, "val_accuracy": accuracy}, sync_dist=True)


class ByHand(Spread):
    """Steps its optimizer itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, (loss, _) = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()


RUNS: dict[str, tuple[type[Spread], bool, dict[str, Any], dict[str, Any]]] = {
    "plain": (Spread, False, {}, {"gradient_clip_val": 0.5, "val_check_interval": 3}),
    "accumulation": (Spread, False, {}, {"accumulate_grad_batches": 3}),
    "whole module": (Spread, False, {"network": None}, {}),
    "by hand": (ByHand, False, {"total_steps": 16}, {}),
    "batch norm": (Spread, True, {}, {}),
}
AGAIN = "batch norm"  # this one is resumed as well


def train(folder: Path, name: str, *, ranks: int, resume: Path | None = None) -> dict[str, Any]:
    """Fit one of `RUNS`; return what the callback and the module have then.

    Args:
        folder: Where the Trainer writes.
        name: Which one.
        ranks: How many processes there are.
        resume: A checkpoint to resume from.
    """
    kind, normalised, options, given = RUNS[name]
    module = kind(None if normalised else mlp())
    checkpoint = ModelCheckpoint(folder / name, every_n_train_steps=SAVED, save_top_k=-1, filename="{step}")
    callback = sparse(**{"network": "model", "folder": folder / name / "end", **options})
    spread = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    trainer = trainer_of(folder, callback, checkpoint, **{"enable_checkpointing": True, **spread, **given})
    # Lightning would shuffle what it spreads over ranks itself.
    sets = [data(batches, first=first, images=normalised).dataset for batches, first in ((8, 0), (2, 50))]
    place = {"num_replicas": ranks, "rank": int(os.environ.get("RANK", "0")), "shuffle": False}
    loaders = [DataLoader(rows, BATCH // ranks, sampler=DistributedSampler(rows, **place)) for rows in sets]
    trainer.fit(module, *loaders, ckpt_path=resume)
    assert callback.ast is not None
    found = {
        "around": type(callback.step_module.module).__name__ if module.automatic_optimization else "",
        "weights": {key: value.clone() for key, value in module.model.state_dict().items()},
        "masks": {sub_net: callback.ast.masks.of(sub_net) for sub_net in callback.sub_nets},
        "private": {sub_net: callback.ast.private_state(sub_net) for sub_net in callback.sub_nets},
        "conflicts": callback.ast.statistics()["conflicts"],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "train" not in key},
        "files": sorted(path.name for path in (folder / name).rglob("*") if path.is_file()),
    }
    (tested,) = trainer.validate(module, loaders[1], verbose=False)
    found["validated"] = tested
    callback.unbind()
    return found


def main(folder: Path, names: list[str]) -> None:
    """Fit all of them on this rank."""
    torch.set_num_threads(1)
    found = {name: train(folder, name, ranks=2) for name in names}
    resume = folder / AGAIN / f"step={SAVED}.ckpt"
    found[f"{AGAIN} again"] = train(folder, AGAIN, ranks=2, resume=resume)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""What `test_transformers_ranks.py` starts in two processes: Trainers one after the other, and what a rank has then."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers_runs import figures, gpt2, known, logged, pictures, resnet, sparse, trainer_of

BATCH = 8  # of all ranks together
SAVED = 7
CHECKPOINTING = known("activation_checkpointing", "gradient_checkpointing")
TEXT: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": SAVED}
EVERY: dict[str, Any] = {"save_strategy": "steps", "save_steps": SAVED, "eval_strategy": "no"}
RUNS: dict[str, dict[str, Any]] = {
    "plain": TEXT,
    "accumulation": {
        **TEXT,
        "gradient_accumulation_steps": 3,
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    },
    "batch norm": {**TEXT, **EVERY, "model": resnet},
    "sharded": {
        **TEXT,
        **EVERY,
        "optim": "adamw_torch",  # without state of its optimizer a run could not be resumed
        "learning_rate": 0.01,
        "adam_epsilon": 1e-3,  # biases of keys have no gradient but rounding errors
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        },
    },
}
AGAIN = ("batch norm", "sharded")  # these are resumed as well


def shard_on_the_processor() -> None:
    """Have Accelerate take FSDP's settings where there is no accelerator, as it does where there is one."""
    os.environ["FSDP_VERSION"] = "2"  # transformers 4 does not hand it on from its own settings
    init = AcceleratorState.__init__

    def initialize(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        init(state, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            state.fsdp_plugin = fsdp_plugin
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize


def whole(tensor: Tensor) -> Tensor:
    """Return a copy without graph, gathered where ranks hold parts of it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(folder: Path, name: str, *, ranks: int, seed: int = 0, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Train one of `RUNS`; return what a rank has at the end.

    Args:
        folder: Where the Trainer writes.
        name: Which run.
        ranks: How many processes share a batch.
        seed: Of the model.
        resume: Whether the run goes on from its checkpoint at step `SAVED`.
        **more: Further arguments of `trainer_of`.
    """
    given = {**RUNS[name], "num_train_epochs": 4, "per_device_train_batch_size": BATCH // ranks, **more}
    if ranks == 1:
        given = {key: value for key, value in given.items() if not key.startswith("fsdp")}
    make = given.pop("model", gpt2)
    if make is resnet:
        given |= {"train_dataset": pictures(), "eval_dataset": pictures(8, seed=1)}
    callback = sparse()
    trainer = trainer_of(folder, callback, model=make(seed), **given)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    ast = callback.ast
    assert ast is not None
    metrics = figures(trainer.evaluate())
    parameters = dict(trainer.model.named_parameters())
    return {
        "weights": {key: whole(parameter) for key, parameter in parameters.items()},
        "masks": {sub: {key: whole(mask) for key, mask in ast.masks.of(sub).items()} for sub in ast.sub_nets},
        "private": {sub: {key: whole(t) for key, t in ast.private_state(sub).items()} for sub in ast.sub_nets},
        "metrics": metrics,
        "norms": logged(trainer, "grad_norm"),
        "conflicts": ast.statistics()["conflicts"],
        "kinds": (type(trainer.model_wrapped).__name__, type(next(iter(parameters.values()))).__name__),
    }


def main(folder: Path, names: list[str]) -> None:
    """Do the runs; a rank's findings go to ``rank0.pt`` and so on."""
    torch.set_num_threads(1)
    found = {}
    for name in names:
        if name == "sharded":  # the last
            shard_on_the_processor()
        found[name] = train(folder / name, name, ranks=2)
        if name in AGAIN:
            found[f"{name} again"] = train(folder / name, name, ranks=2, seed=1, resume=True)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

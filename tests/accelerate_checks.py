"""What `test_accelerate.py` runs on two ranks: an Accelerate loop under DDP against one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from networks import assert_same, mlp, sgd, vector_batch, wrapped
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import ast_plugin

STEPS = 24
OPTIONS = {"sparsities": (0.5, 0.8, 0.9), "total_steps": STEPS, "update_interval": 4}


def two_ranks_equal_one_process_and_resume(folder: Path) -> Iterator[None]:
    single = mlp()
    _, optimizer, single_ast = wrapped(single, sgd(single), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, labels = vector_batch(step)
        functional.cross_entropy(single(inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        optimizer.step()
    yield
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel

    batches = [vector_batch(step) for step in range(STEPS)]
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2

    def start(late: bool, seed: int) -> tuple:
        model = mlp(seed)
        optimizer = sgd(model)
        if not late:
            ast = ast_plugin.wrap(optimizer, model, **OPTIONS)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
        assert isinstance(model, DistributedDataParallel)
        if late:
            ast = ast_plugin.wrap(optimizer, model, **OPTIONS)
        return model, optimizer, loader, ast

    def train(model, optimizer, batches) -> None:
        for inputs, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(functional.cross_entropy(model(inputs), labels))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    for late in (False, True):
        model, optimizer, loader, ast = start(late, 0)
        accelerator.register_for_checkpointing(ast)
        mine = list(loader)
        train(model, optimizer, mine[:10])
        accelerator.save_state(str(folder / f"late{late}"))
        train(model, optimizer, mine[10:])
        assert ast.step == STEPS
        bare = accelerator.unwrap_model(model)
        for one, other in zip(single.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert_same(single_ast.state_dict()["masks"], ast.state_dict()["masks"])
        accelerator.free_memory()
        accelerator._custom_objects.clear()

        again, optimizer_again, loader, ast_again = start(late, 5 + dist.get_rank())
        accelerator.register_for_checkpointing(ast_again)
        accelerator.load_state(str(folder / f"late{late}"))
        assert ast_again.step == 10
        train(again, optimizer_again, mine[10:])
        assert_same(dict(bare.state_dict()), dict(accelerator.unwrap_model(again).state_dict()))
        accelerator.free_memory()
        accelerator._custom_objects.clear()


CHECKS = {check.__name__: check for check in (two_ranks_equal_one_process_and_resume,)}

"""What `test_sup_tickets_ranks.py` runs on two ranks: the same tickets everywhere; sharded runs are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from global_batches import clipped_step, mine
from networks import assert_same, conv_net, image_batch, mlp, sgd, wrapped
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family import SupTickets

OPTIONS: dict[str, Any] = {"end_step": 0.4}


def _everywhere(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def averages_are_the_same_on_all_ranks(folder: Path) -> Iterator[None]:
    yield
    bare = conv_net()
    optimizer = sgd(bare)
    tickets = SupTickets(3, share=0.5)
    _, _, ast = wrapped(bare, optimizer, sup_tickets=tickets, **OPTIONS)
    model = DistributedDataParallel(bare, broadcast_buffers=False)
    for step in range(60):
        images, labels = image_batch(step)
        clipped_step(model, optimizer, (mine(images), mine(labels)))
    last = {name: ast.private_state(name) for name in ast.sub_nets}
    with ast.version("superposed"):
        superposed = {name: ast.materialize(name) for name in ast.sub_nets}
    one, other = _everywhere({"last": last, "superposed": superposed})
    assert_same(one["superposed"], other["superposed"])
    # Of themselves the ranks have estimated different statistics, from different data.
    assert not torch.equal(one["last"]["s50"]["norm1.running_mean"], other["last"]["s50"]["norm1.running_mean"])
    tickets.recompute([(mine(image_batch(300 + index)[0]),) for index in range(4)])
    with ast.version("superposed"):
        one, other = _everywhere({name: ast.private_state(name) for name in ast.sub_nets})
    for name in ast.sub_nets:
        assert torch.equal(one[name]["norm2.running_var"], other[name]["norm2.running_var"])
        assert not torch.equal(one[name]["norm2.running_var"], superposed[name]["norm2.running_var"])


def sharded_runs_are_refused(folder: Path) -> Iterator[None]:
    yield
    model = fully_shard(mlp())
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="sup_tickets averages whole weights, and every rank holds a part of them"):
        wrapped(model, sgd(model), sup_tickets=SupTickets(3, share=0.5), **OPTIONS)
    assert_same(before, {name: p.full_tensor() for name, p in model.named_parameters()})


CHECKS = {check.__name__: check for check in (averages_are_the_same_on_all_ranks, sharded_runs_are_refused)}

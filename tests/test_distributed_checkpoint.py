"""torch.distributed.checkpoint in one process: the controller beside model and optimizer, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import App
from networks import OPTIMIZERS, assert_same, conv_net, image_batch, sgd, snapshot, train, wrapped
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn import functional

from ast_plugin.training_exchange import with_plain_entries

pytestmark = [
    # What torch's own checkpoint code warns of in a single process, and about its own use of deprecated functions.
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed"),
]

OPTIONS: dict[str, Any] = {"total_steps": 30, "update_interval": 6}


def start(seed: int, kind: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = conv_net(seed)
    return wrapped(model, OPTIMIZERS[kind](model), **{**OPTIONS, **options})


@pytest.mark.parametrize("order", ["app before ast", "ast before model"])
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_the_controller_is_saved_and_loaded_beside_the_model(tmp_path: Path, kind: str, order: str) -> None:
    key = "app" if order == "app before ast" else "model"
    for stop in (4, 17):  # the reference gradient, optimizer states and counters differ in shape
        model, optimizer, ast = start(0, kind)
        train(model, optimizer, range(stop))
        dcp.save({key: App(model, optimizer), "ast": ast}, checkpoint_id=tmp_path / str(stop))
        again, optimizer_again, ast_again = start(7, kind)
        dcp.load({key: App(again, optimizer_again), "ast": ast_again}, checkpoint_id=tmp_path / str(stop))
        assert ast_again.step == stop
        assert_same(with_plain_entries(ast.state_dict()), with_plain_entries(ast_again.state_dict()))
        train(model, optimizer, range(stop, 30))
        train(again, optimizer_again, range(stop, 30))
        assert_same(snapshot(model), snapshot(again))
        assert_same(optimizer.state_dict(), optimizer_again.state_dict())
        for name in ast.sub_nets:
            assert_same(ast.masks.of(name), ast_again.masks.of(name))
            assert_same(ast.private_state(name), ast_again.private_state(name))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    model, optimizer, ast = start(0, "sgd")
    train(model, optimizer, range(10))
    kept = {name: {p: mask.clone() for p, mask in ast.masks.of(name).items()} for name in ast.sub_nets}
    writing = dcp.async_save({"app": App(model, optimizer), "ast": ast}, checkpoint_id=tmp_path)
    train(model, optimizer, range(10, 20))
    writing.result()
    again, optimizer_again, ast_again = start(7, "sgd")
    dcp.load({"app": App(again, optimizer_again), "ast": ast_again}, checkpoint_id=tmp_path)
    assert ast_again.step == 10
    for name in ast.sub_nets:
        assert_same(kept[name], ast_again.masks.of(name))
    train(again, optimizer_again, range(10, 20))
    assert_same(snapshot(model), snapshot(again))


def test_the_entries_and_sizes_are_the_same_at_every_step() -> None:
    model, optimizer, ast = start(0, "adamw")

    def entries() -> dict[str, Any]:
        state = ast.state_dict()
        assert isinstance(state.pop("rest"), bytes)
        masks = state.pop("masks")
        shapes = {name: {p: mask.shape for p, mask in packed.items()} for name, packed in masks.items()}
        return {"keys": sorted(state), "steps": sorted(state["last_steps"]), "masks": shapes}

    first = entries()
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        assert entries() == first


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_step_that_creates_optimizer_state_does_not_count(momentum: float) -> None:
    model = conv_net()
    model, optimizer, ast = wrapped(model, sgd(model, momentum=momentum))
    dense = snapshot(model)
    get_state_dict(model, optimizer)
    assert ast.step == 0
    model.train()
    with torch.no_grad():
        model(image_batch(0)[0])
    model(image_batch(0)[0])  # a forward of the run, whose backward never comes
    optimizer.zero_grad()
    get_state_dict(model, optimizer)
    assert ast.step == 0
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_same({name: dense[name] for name in weights}, weights)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    get_state_dict(model, optimizer)
    assert ast.step == 3


def test_a_warmup_that_begins_at_rate_zero_counts() -> None:
    model = conv_net()
    model, optimizer, ast = wrapped(model, sgd(model, lr=torch.tensor(0.0)))
    train(model, optimizer, range(1))
    assert ast.step == 1
    model.train()
    (functional.cross_entropy(model(image_batch(0)[0]), image_batch(0)[1]) * 0).backward()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert ast.step == 2


def test_a_checkpoint_of_other_masks_is_refused(tmp_path: Path) -> None:
    _, _, ast = start(0, "sgd")
    dcp.save({"ast": ast}, checkpoint_id=tmp_path)
    _, _, other = start(0, "sgd", sparsities=(0.5, 0.6))
    with pytest.raises(BaseException, match=r"ast\.last_steps\.s60"):  # torch's error is no Exception
        dcp.load({"ast": other}, checkpoint_id=tmp_path)
    assert other.step == 0

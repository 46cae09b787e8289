"""Where the state of a run stands in timm's checkpoints, and what is said of files that hold none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task import TrainingTask
from torch import nn

from ast_plugin.errors import StateError
from ast_plugin.integrations.timm.state import (
    AVERAGE_KEY,
    explained,
    keep_average_in_optimizer,
    keep_in_task,
    read_checkpoint,
    state_in,
)
from ast_plugin.training_state import KEY

pytestmark = pytest.mark.extra("timm")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_state_dict_post_hook(lambda _, state: state.update({KEY: {"step": 1}}))
    return optimizer


class WithState(TrainingTask):
    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {"projection": "ema" if ema else "own"}


def test_a_checkpoint_with_the_arguments_in_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({"args": argparse.Namespace(model="x"), "state_dict": {"w": torch.ones(3)}}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint["args"].model == "x"
    assert torch.equal(checkpoint["state_dict"]["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no such file"), (b"", "no checkpoint that can be read"), (b"text", "no checkpoint that can be")],
)
def test_files_that_are_no_checkpoint_are_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StateError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"--resume {path}: {said}")
    assert "\n" not in str(error.value)


def test_a_file_with_something_else_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.pth.tar")
    with pytest.raises(StateError, match="holds a list, no training checkpoint of timm"):
        read_checkpoint(tmp_path / "last.pth.tar")


@pytest.mark.parametrize("place", ["task_state", "optimizer"])
def test_state_is_found_where_a_run_leaves_it(place: str) -> None:
    held = {KEY: 1, AVERAGE_KEY: 2, "projection": 3}
    assert state_in({"optimizer": {}, place: held}) == {KEY: 1, AVERAGE_KEY: 2}
    assert state_in({place: {KEY: 1}}) == {KEY: 1}


def test_a_checkpoint_without_sub_nets_holds_none() -> None:
    assert state_in({"optimizer": {"state": {}}, "task_state": {"projection": 1}, "state_dict": {}}) == {}
    assert state_in({}) == {}


def test_a_task_carries_the_state_but_not_that_of_its_average() -> None:
    task = WithState()
    assert keep_in_task(task, lambda: {KEY: "state"})
    assert task.get_task_state() == {"projection": "own", KEY: "state"}
    assert task.get_task_state(ema=True) == {"projection": "ema"}
    assert "get_task_state" not in task.state_dict()


def test_a_task_of_an_older_timm_has_no_place() -> None:
    assert not keep_in_task(nn.Linear(2, 2), lambda: {})


def test_the_optimizer_carries_an_average_where_there_is_one() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    state: list[Any] = [None]
    keep_average_in_optimizer(optimizer, lambda: state[0])
    assert AVERAGE_KEY not in optimizer.state_dict()
    state[0] = {"updates": 1}
    assert optimizer.state_dict()[AVERAGE_KEY] == {"updates": 1}


def test_a_checkpoint_of_another_model_is_explained_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnet18", "state_dict": nn.Linear(2, 2).state_dict()}, path)
    args = argparse.Namespace(model="resnet34")
    with pytest.raises(StateError) as error, explained(path, args):
        nn.Linear(2, 3).load_state_dict(torch.load(path)["state_dict"])
    assert str(error.value).startswith(f"--resume {path}: a checkpoint of resnet18, and this run trains resnet34. ")
    assert "size mismatch for weight" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({}, path)
    with pytest.raises(KeyError), explained(path, argparse.Namespace()):
        raise KeyError("x")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_checkpoint_in_the_format_before_zip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    torch.save({"epoch": 3, "weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["epoch"] == 3

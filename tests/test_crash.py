"""A run that is killed again and again, and goes on each time, ends where the undisturbed one ends: to the bit.

SIGKILL leaves no time to tidy up. The moments are drawn from a seeded generator; `crash_run.POINTS` names them. After
each death every file is whole, or not there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_run
import pytest
import torch
from networks import assert_same

import ast_plugin
from ast_plugin.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]

SCRIPT = Path(crash_run.__file__)
KILLS = 30
# How often a point may be passed before the process dies there, at least and at most: some four to thirteen steps.
PASSES = {
    "forward": (4, 13),
    "backward": (4, 13),
    "masks": (6, 20),
    "arithmetic": (100, 320),
    "stepped": (4, 13),
    "checkpoint": (450, 1800),
    "flush": (4, 14),
    "rename": (2, 7),
    "renamed": (2, 7),
    "elastic": (7, 22),
    "seal": (1, 3),
    "load": (1, 3),
}


class Server:
    """The process that forks the runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def run(self, folder: Path, **options: Any) -> int:
        assert self.process.stdin is not None
        print(json.dumps({"folder": str(folder), **options}), file=self.process.stdin, flush=True)
        return int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    with started.process:  # closes the pipes and waits
        yield started
    assert started.process.returncode == 0


def check_files(folder: Path) -> None:
    """Find every file readable; what a killed writer left under a temporary name is no file of anybody's."""
    names = {path.name for path in folder.iterdir()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= {"checkpoint.pt", "elastic.safetensors"}
    assert len(names - visible) <= 2  # one for each of the two: the next writer removes the last one's
    if "checkpoint.pt" in visible:
        torch.load(folder / "checkpoint.pt", weights_only=True)
        read_checkpoint(folder / "checkpoint.pt")
    if "elastic.safetensors" in visible:
        elastic = ast_plugin.load(folder / "elastic.safetensors", crash_run.DropoutNet())
        for name in elastic.sub_nets:
            elastic.switch(name)


def assert_same_end(one: Path, other: Path) -> None:
    """Compare weights, masks, optimizer, private BatchNorm, reference gradient, statistics, scheduler, generators."""
    assert_same(
        torch.load(one / "checkpoint.pt", weights_only=True), torch.load(other / "checkpoint.pt", weights_only=True)
    )
    assert (one / "elastic.safetensors").read_bytes() == (other / "elastic.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "inactive": "freeze"}], ids=["sgd", "adamw-freeze"])
def test_thirty_kills_leave_no_trace(server: Server, tmp_path: Path, options: dict[str, Any]) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert server.run(straight, **options) == 0  # and never saves on the way

    draw = random.Random(str(options))
    moments: list[str] = [*crash_run.POINTS, *crash_run.POINTS, *["time"] * (KILLS - 2 * len(crash_run.POINTS))]
    draw.shuffle(moments)
    saving = {"save_every": 4, "elastic_every": 5, **options}  # four: also in the middle of a group of three
    reached = []
    for moment in moments:
        if moment == "time":
            # On a fast machine it dies by itself before it comes too far; on a slow one it may have done nothing yet.
            seconds = draw.uniform(0.01, 0.08)
            status = server.run(killed, seconds=seconds, point="stepped", count=PASSES["stepped"][1], **saving)
        else:
            if moment == "load" and not (killed / "checkpoint.pt").exists():
                assert server.run(killed, point="renamed", count=1, **saving) == -signal.SIGKILL
            status = server.run(killed, point=moment, count=draw.randint(*PASSES[moment]), **saving)
        assert status == -signal.SIGKILL, f"the run ended before {moment}"
        check_files(killed)
        if (killed / "checkpoint.pt").exists():
            reached.append(read_checkpoint(killed / "checkpoint.pt")[0]["optimizer"]["ast_plugin"]["step"])
    assert reached == sorted(reached)
    assert len(set(reached)) > KILLS // 3  # not always the same step over and over
    assert reached[-1] < crash_run.STEPS
    assert server.run(killed, **saving) == 0
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "elastic.safetensors"]
    assert_same_end(straight, killed)


def test_kills_of_fresh_processes_leave_no_trace(server: Server, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert server.run(straight, steps=60) == 0
    for point, count in (("masks", 30), ("checkpoint", 1000), ("rename", 7), (None, 0)):
        options = json.dumps({"point": point, "count": count, "save_every": 5, "elastic_every": 20, "steps": 60})
        done = subprocess.run([sys.executable, str(SCRIPT), str(killed), options], check=False)
        assert done.returncode == (-signal.SIGKILL if point else 0)
        check_files(killed)
    assert_same_end(straight, killed)

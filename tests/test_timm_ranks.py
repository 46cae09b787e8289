"""Two processes over gloo: ranks stay alike, private BatchNorm statistics are brought together, one rank writes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import launched
from timm_runs import BATCH, COLUMNS, COMMON, EMA, HERE, NEWEST, SPARSE, STEPS, SUB_NETS, Run, Runs, figures_of

pytestmark = [pytest.mark.extra("timm"), pytest.mark.slow]

RUNS = {
    "own": (None, ()),
    "average": (NEWEST, EMA),
    "apart": (None, ("--dist-bn", "", "--epochs", "1")),
    "refused": (NEWEST, ("--eval-metric", "s90_top1")),
}


def free_ports(number: int) -> list[int]:
    """Return ports below those that systems hand out by themselves, so that they are free when they are used too."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            break
    return found


@pytest.fixture(scope="module")
def ranks(timm_runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder of the output, and what each of two ranks found; all runs in one launch, because one costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    common = ["--data-dir", str(timm_runs.pictures), *COMMON, "-b", str(BATCH // 2), "--output", str(folder), *SPARSE]
    lines = [
        [str(script) if script else "", [*common, "--experiment", name, *flags], port]
        for (name, (script, flags)), port in zip(RUNS.items(), free_ports(len(RUNS)), strict=True)
    ]
    (folder / "runs.json").write_text(json.dumps(lines))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "timm_ranks.py"), str(folder)]
    launched(command, folder / "stderr")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_hold_the_same_weights_and_masks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = ranks
    for index, name in enumerate(("own", "average", "apart")):
        for what, figures in first["runs"][index].items():
            if what == "weights" or what.startswith("masks"):
                assert second["runs"][index][what] == figures, (name, what)


def test_private_statistics_are_brought_together(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = ranks
    for index in (0, 1):
        for sub_net in SUB_NETS:
            mine, other = first["runs"][index][f"private {sub_net}"], second["runs"][index][f"private {sub_net}"]
            for name, figures in mine.items():
                assert other[name] == pytest.approx(figures, rel=1e-6), name
    apart = [found["runs"][2]["private s80"] for found in (first, second)]
    assert apart[0] != apart[1]  # each rank has its own without --dist-bn


def test_the_average_of_private_statistics_is_the_same_everywhere(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (first, second) = ranks
    for sub_net in SUB_NETS:
        mine, other = first["runs"][1][f"average {sub_net}"], second["runs"][1][f"average {sub_net}"]
        for name, figures in mine.items():
            assert other[name] == pytest.approx(figures, rel=1e-6), name


@pytest.mark.parametrize("name", ["own", "average"])
def test_the_first_rank_writes_what_was_measured(
    name: str, ranks: tuple[Path, list[dict[str, Any]]], timm_runs: Runs
) -> None:
    folder, _ = ranks
    run = Run(0, folder / name, "", "")
    assert run.columns == COLUMNS
    assert run.summary["steps"] == STEPS  # half of the batch on each rank
    file = "elastic_ema.safetensors" if name == "average" else "elastic.safetensors"
    written = timm_runs.elastic_figures(run.folder / file)
    for sub_net, figures in figures_of(run.rows[-1]).items():
        assert written[sub_net]["loss"] == pytest.approx(figures["loss"], rel=1e-4)


def test_every_rank_says_what_it_refuses(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    assert [rank["codes"] for rank in found] == [[0, 0, 0, 2]] * 2
    for rank in (0, 1):
        assert f"ast-timm: error: rank {rank}: --eval-metric s90_top1" in (folder / "stderr").read_text()

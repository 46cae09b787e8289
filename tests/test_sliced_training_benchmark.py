"""benchmarks/sliced_training.py: what is trained is really smaller, the factors by hand, the file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_networks import Witness

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "sliced_training.py"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("sliced_training")


@pytest.fixture(scope="module")
def task(benchmark: Any) -> Any:
    return benchmark.make_task("ResNet-32", quick=True)


@pytest.mark.parametrize("name", ["leaves", "gather, correction", "masked"])
@pytest.mark.parametrize("resample", [False, True])
def test_a_contender_trains_the_share_of_channels_that_it_is_named_for(
    benchmark: Any, task: Any, name: str, resample: bool
) -> None:
    run = benchmark.Steps(task, benchmark.CONTENDERS[name], resample=resample)
    witness = Witness(run.model, ["blocks.0.conv1"])
    before = {sub_net: run.ast.kept_channels(sub_net) for sub_net in run.ast.sub_nets}
    for _ in benchmark.KEPT:
        assert run.step() > 0
    assert (witness.sliced, witness.whole) == ((0, 3) if name == "masked" else (3, 0))
    assert run.ast.step == 3
    changed = False
    for sub_net, kept in zip(run.ast.sub_nets, benchmark.KEPT, strict=True):
        for group, units in run.ast.kept_channels(sub_net).items():
            assert abs(int(units.sum()) - kept * units.numel()) <= 1  # the number of all units is exact
            changed |= not torch.equal(units, before[sub_net][group])
    assert changed == resample


def test_factors_are_of_the_dense_steps_around_a_round_and_medians_over_rounds(
    benchmark: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steps:
        def __init__(self, task: Any, options: Any, **_: Any) -> None:
            # A warm-up round first; dense steps of 8 and 4 seconds around each round: 6 on average.
            self.times = iter([8.0, 4.0] * 4) if options is None else iter([9.0] * 3 + [3.0, 2.0, 1.0] * 2 + [6.0] * 3)

        def step(self) -> float:
            return next(self.times)

    monkeypatch.setattr(benchmark, "Steps", Steps)
    found = benchmark.measure(task, ["leaves"], rounds=3, resample=False)
    assert found == {"dense_ms": 6000.0, "factors": {"leaves": [2.0, 3.0, 6.0, 3.0]}}
    text = benchmark.table({"networks": {"ResNet-32": found}})
    assert "dense step 6000 ms" in text
    assert [line.split() for line in text.splitlines() if "leaves  " in line] == [
        ["leaves", "2.00x", "3.00x", "6.00x", "3.00x"]
    ]


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    options = ["--quick", "--networks", "ResNet-32", "--rounds", "1", "--contenders", "leaves", "masked"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))
    assert set(results["networks"]["ResNet-32"]["factors"]) == {"leaves", "masked"}
    assert all(len(row) == 4 for row in results["networks"]["ResNet-32"]["factors"].values())
    assert "kept 0.5" in done.stdout


@pytest.mark.extra("report")
def test_the_picture_has_a_bar_for_every_factor_and_marks_what_is_wanted(benchmark: Any) -> None:
    factors = {"dense, channels_last": [1.25] * 4, "leaves": [1.5, 2.5, 3.5, 2.2], "masked": [0.9, 0.9, 0.9, 0.9]}
    text = benchmark.drawn({"networks": {"ResNet-32": {"dense_ms": 5.0, "factors": factors}}})
    assert text.startswith("<?xml")
    for bar in ("dense, channels_last", "leaves, kept 0.5", "leaves, kept 0.25", "leaves, kept 0.1", "2.50x", "1.25x"):
        assert bar in text
    assert text.count("1.25x") == 1

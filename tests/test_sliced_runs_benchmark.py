"""benchmarks/sliced_runs.py: what a run of another length costs, by hand; the script and its file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "sliced_runs.py"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("sliced_runs")


def test_a_longer_run_has_more_steps_and_as_many_mask_updates(benchmark: Any) -> None:
    run = benchmark.Run.__new__(benchmark.Run)
    # Ten steps of 2 seconds, the fourth with an update that takes 5 more.
    run.took = {number: 2.0 for number in range(10) if number != 3}
    run.updating = {3: 7.0}
    assert run.seconds() == 25
    assert run.seconds_of(10) == 25
    assert run.seconds_of(1000) == 2005


def test_the_cost_of_an_update_is_taken_over_the_steps_near_it(benchmark: Any) -> None:
    run = benchmark.Run.__new__(benchmark.Run)
    # Steps get cheaper along the ramp: 4 seconds at its beginning, 1 second after it.
    run.took = {number: 4.0 if number < 10 else 1.0 for number in range(20) if number not in (5, 15)}
    run.updating = {5: 6.0, 15: 3.0}
    assert run.seconds() == 54
    assert run.seconds_of(200) == (40 + 10) * 10 + 2 + 2


@pytest.mark.slow
def test_the_script_measures_and_writes_what_it_prints(tmp_path: Path) -> None:
    output = tmp_path / "runs.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--steps", "40", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    runs = results["runs"]
    assert len(runs) == 4
    for name, found in runs.items():
        assert name in done.stdout
        assert f"{found['share']:.2f}" in done.stdout
        assert found["share"] > 0
        assert found["share_long"] > 0
        assert found["updates"] >= 3

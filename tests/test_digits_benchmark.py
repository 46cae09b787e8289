"""benchmarks/digits.py: which runs it makes, the table by hand, and that an interrupted one goes on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(label: str, seed: int, steps: int, seconds: float, **accuracy: float) -> dict[str, Any]:
    return {
        "label": label,
        "settings": {"seed": seed, "steps": steps},
        "accuracy": accuracy,
        "seconds": seconds,
    }


def test_every_sub_net_is_trained_alone_for_all_and_for_its_share_of_the_steps(digits: ModuleType) -> None:
    jobs = list(digits.jobs([3], 300, [0.5, 0.9], variants=["correction-off"], only=[]))
    assert [(job.label, job.settings.sparsities, job.settings.steps) for job in jobs] == [
        ("alternating", (0.5, 0.9), 300),
        ("dense", (0.0,), 300),
        ("separate", (0.5,), 300),
        ("separate-share", (0.5,), 150),
        ("separate", (0.9,), 300),
        ("separate-share", (0.9,), 150),
        ("correction-off", (0.5, 0.9), 300),
    ]
    assert {job.settings.seed for job in jobs} == {3}
    assert len({job.key for job in jobs}) == len(jobs)


def test_only_leaves_the_other_rows_out(digits: ModuleType) -> None:
    jobs = digits.jobs([0, 1], 300, [0.5, 0.9], variants=[], only=["dense"])
    assert [job.label for job in jobs] == ["dense", "dense"]


def test_variants_are_settings_that_the_demo_knows(digits: ModuleType) -> None:
    names = list(digits.VARIANTS)
    assert [job.label for job in digits.jobs([0], 300, [0.5, 0.9], variants=names, only=names)] == names


def test_the_table_has_mean_spread_range_and_cost(digits: ModuleType) -> None:
    # s50 over two seeds: mean 91, sample deviation sqrt(1 + 1) = 1.41. Trained alone both take 300 steps: twice the
    # cost; and 30 + 30 seconds instead of 40: 1.5 times.
    results = [
        result("alternating", 0, 300, 40.0, s50=90.0, s90=80.0),
        result("alternating", 1, 300, 40.0, s50=92.0, s90=80.0),
        result("separate", 0, 300, 30.0, s50=93.0),
        result("separate", 0, 300, 30.0, s90=85.0),
        result("dense", 0, 300, 40.0, s0=95.0),
    ]
    table = digits.table(results, [0.5, 0.9])
    assert table.columns == ("", "s50", "s90", "steps", "time", "seeds")
    assert table.rows == (
        ("alternating", "91.0 +- 1.4 (90.0 .. 92.0)", "80.0 +- 0.0 (80.0 .. 80.0)", "1.00", "1.00", "2"),
        ("separate", "93.0 +- 0.0 (93.0 .. 93.0)", "85.0 +- 0.0 (85.0 .. 85.0)", "2.00", "1.50", "1"),
        ("dense", "95.0 +- 0.0 (95.0 .. 95.0)", "", "1.00", "1.00", "1"),
    )


@pytest.mark.extra("demo")
@pytest.mark.slow
def test_runs_on_file_are_not_repeated(tmp_path: Path) -> None:
    output = tmp_path / "digits.json"
    command = [sys.executable, str(SCRIPT), "--steps", "24", "--seeds", "1", "--sparsities", "0.5", "0.8"]
    options = ["--processes", "1", "--output", str(output), "--only"]

    def run(*rows: str) -> str:
        return subprocess.run([*command, *options, *rows], capture_output=True, text=True, check=True).stdout

    first = run("dense")
    assert "[1/1] dense, seed 0: s0 " in first
    second = run("dense", "alternating")
    assert "[1/1] alternating, seed 0: s50 " in second
    assert "\ndense " in second
    results = json.loads(output.read_text(encoding="utf-8")).values()
    assert sorted(entry["label"] for entry in results) == ["alternating", "dense"]
    assert all(entry["settings"]["steps"] == 24 for entry in results)

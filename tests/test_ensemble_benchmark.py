"""benchmarks/ensemble.py: its tables by hand, the page shows what is on file, a short run of every arm."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("ensemble")


def record(name: str, accuracy: float, passes: int = 1) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": accuracy,
        "ece": 0.01,
        "nll": 0.25,
        "error_detection": 0.9,
        "forward_passes": passes,
    }


def report(names: str, accuracy: float) -> dict[str, Any]:
    members = names.split("+")
    return {
        "records": [*(record(name, 0.9) for name in members), record("ensemble", accuracy, len(members))],
        "disagreement_right": 0.01,
        "disagreement_wrong": 0.1,
        "error_detection": 0.8,
    }


def found(seed: int, accuracy: float) -> dict[str, Any]:
    choices = ("s90+s95", "s90+s98", "s95+s98", "s90+s95+s98")
    reports = {choice: report(choice, accuracy) for choice in choices}
    return {"arm": "alternating", "seed": seed, "steps": 1800, "seconds": 1.0, "reports": reports}


def test_the_page_shows_what_is_on_file(benchmark: Any) -> None:
    text = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.renewed(text, benchmark.read(benchmark.RESULTS)) == text
    assert {match["name"] for match in benchmark.MARKER.finditer(text)} == set(benchmark.TABLES)


def test_tables_by_hand(benchmark: Any) -> None:
    runs = [found(0, 0.95), found(1, 0.97)]
    lines = benchmark.markdown(benchmark.quality(runs)).splitlines()
    assert lines[0] == "|  | accuracy, % | ECE, % | NLL, nats | passes | training | seeds |"
    assert lines[2] == "| s90 of one alternating run | 90.00 ± 0.00 | 1.00 ± 0.00 | 0.250 ± 0.000 | 1 | 1 | 2 |"
    whole = "| ensemble of all of one alternating run | 96.00 ± 1.41 | 1.00 ± 0.00 | 0.250 ± 0.000 | 3 | 1 | 2 |"
    assert lines[-1] == whole
    lines = benchmark.markdown(benchmark.uncertainty(runs[:1])).splitlines()
    assert lines[2] == "| s90 of one alternating run | – | – | – | 0.900 |"
    assert lines[-1] == "| ensemble of all of one alternating run | 0.010 | 0.100 | 0.800 | 0.900 |"


def test_networks_that_were_trained_apart_are_one_module(benchmark: Any) -> None:
    networks = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}
    source, inputs = benchmark.Networks(networks), torch.ones(1, 2)
    with source.sub_net("b") as model, torch.no_grad():
        assert torch.equal(model(inputs), networks["b"](inputs))
    both = benchmark.ensemble(source)
    expected = torch.stack([network(inputs).softmax(-1) for network in networks.values()]).mean(0)
    assert torch.allclose(both(inputs).exp(), expected)


@pytest.mark.slow
@pytest.mark.extra("demo")
def test_every_arm_runs_and_what_is_on_file_is_not_run_again(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ("alternating", "dense", "thirds")  # "whole" is "thirds" with more steps
    runs = [benchmark.run(arm, 0, 6) for arm in arms]
    assert [sorted(run["reports"]) for run in runs] == [
        ["s90+s95", "s90+s95+s98", "s90+s98", "s95+s98"],
        ["s0"],
        ["s90+s95+s98"],
    ]
    output = tmp_path / "found.json"
    benchmark.write(output, runs)
    assert benchmark.main(["--steps", "6", "--seeds", "1", "--arms", *arms, "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["runs"] == runs
    printed = capsys.readouterr().out
    for text in ("a dense network", "ensemble of three trained apart, a third", "AUROC, disagreement"):
        assert text in printed

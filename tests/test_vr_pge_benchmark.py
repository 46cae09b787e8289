"""benchmarks/vr_pge.py: operations are counted right and shared out evenly, and a run of each rule comes to an end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ast_plugin

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import vr_pge as benchmark  # noqa: E402  # it lies beside the benchmark, not on the path

sys.path.remove(str(BENCHMARKS))

pytestmark = [pytest.mark.slow, pytest.mark.extra("demo"), pytest.mark.extra("channels")]


def test_operations_are_those_that_torch_counts_dense_and_sliced() -> None:
    model = benchmark.DigitsResNet(width=8)
    image = torch.zeros(1, 8, 8)
    groups = benchmark.find_groups(model, image[None])
    costs = benchmark.Costs(model, groups, image)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ast = ast_plugin.wrap(
        optimizer, model, sparsities=(0.5,), method="static", pattern="channel", groups=groups, slicing="leaves"
    )
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(image[None])
    assert costs.of(ast) == counted.get_total_flops()
    assert costs.of(ast) == costs.fixed + costs.sliced / 2
    ast.detach()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(image[None])
    assert costs.fixed + costs.sliced == counted.get_total_flops()


def test_each_rule_spends_the_same_operations(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--quick", "--only", "accuracy", "--steps", "60", "--kept", "0.25"]
    assert benchmark.main([*arguments, "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["accuracy"]["0.25"]
    spent = {rule: rows[0]["gigaflops_a_picture"] for rule, rows in found.items()}
    assert set(spent) == set(benchmark.RULES)
    for rule, operations in spent.items():
        assert operations == pytest.approx(spent["random"], rel=0.12), rule
    units = {rule: sum(rows[0]["kept"].values()) for rule, rows in found.items()}
    assert len(set(units.values())) == 1
    assert "equal operations" in capsys.readouterr().out

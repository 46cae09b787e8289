from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from report_examples import ListedMasks, ListedTraining, run_report, small_training
from torch import nn

import ast_plugin
from ast_plugin.config import ASTConfig
from ast_plugin.elastic import read_elastic
from ast_plugin.errors import ConfigError, SaveError, StateError
from ast_plugin.report import Report
from ast_plugin.report_records import ConflictPoint, SparsityPoint


@dataclasses.dataclass
class Contents:
    """What `Report.from_elastic` reads of an elastic file."""

    header: dict[str, Any]
    masks: ListedMasks


def test_sub_nets_and_layers_by_hand() -> None:
    report = Report.from_training(
        small_training(
            step=7,
            metrics={"s50": {"accuracy": 0.5, "loss": math.nan}},
            statistics={"sub_nets": {"s75": {"steps": 3, "checks": 8, "conflicts": 2, "mean_cosine": -0.1}}},
        ),
        example_inputs=torch.zeros(1, 4),
        elapsed_seconds=1.5,
    )
    s50, s75 = report.sub_nets
    # 32 + 16 prunable weights and 8 + 2 biases; s50 keeps 16 + 8, s75 8 + 4
    assert (s50.kept_weights, s50.prunable_weights, s50.parameters, report.dense_parameters) == (24, 48, 34, 58)
    assert (s75.achieved_sparsity, s75.target_sparsity, s75.parameters) == (0.75, 0.75, 22)
    # 2 operations a weight on one row of input; biases are not counted
    assert (report.dense_flops, s50.flops, s75.flops) == (96, 48, 24)
    assert [layer.flops for layer in report.layers] == [64, 32]
    assert (report.example_input, report.steps, report.elapsed_seconds) == ("1 x 4", 7, 1.5)
    assert s50.metrics == {"accuracy": 0.5, "loss": None}
    assert (s50.checks, s75.steps, s75.checks, s75.conflicts, s75.mean_cosine) == (0, 3, 8, 2, -0.1)
    assert [(layer.name, layer.shape, layer.sparsity) for layer in report.layers] == [
        ("0.weight", (8, 4), {"s50": 0.5, "s75": 0.75}),
        ("2.weight", (2, 8), {"s50": 0.5, "s75": 0.75}),
    ]
    # s75 keeps the first half of what s50 keeps
    assert report.overlap == ((1.0, 0.5), (1.0, 1.0))
    assert report.settings["sparsities"] == [0.5, 0.75]
    assert set(report.versions) == {"ast_plugin", "torch"}


def test_without_an_example_nothing_is_run() -> None:
    training = small_training()
    training.model.forward = None  # type: ignore[method-assign,assignment]  # any call would fail
    report = Report.from_training(training)
    assert report.dense_flops is None
    assert report.example_input is None
    assert all(net.flops is None for net in report.sub_nets)
    assert all(layer.flops is None for layer in report.layers)


def test_history_is_kept_in_order_and_without_numbers_that_are_none() -> None:
    history = {
        "sparsity": [{"step": 0, "sub_net": "s50", "target": 0.1, "achieved": 0.125}],
        "conflicts": [
            {"step": 10, "sub_net": "s75", "checks": 4, "conflicts": 1, "mean_cosine": 0.5},
            {"step": 20, "sub_net": "s75", "checks": 0, "conflicts": 0, "mean_cosine": math.nan},
        ],
    }
    report = Report.from_training(small_training(history=history))
    assert report.sparsity_history == (SparsityPoint(step=0, sub_net="s50", target=0.1, achieved=0.125),)
    assert report.conflict_history == (
        ConflictPoint(step=10, sub_net="s75", checks=4, conflicts=1, mean_cosine=0.5),
        ConflictPoint(step=20, sub_net="s75", checks=0, conflicts=0, mean_cosine=None),
    )


def test_empty_sub_net_has_no_overlap() -> None:
    masks = ListedMasks({"a": {"weight": torch.zeros(2, 4) > 0}, "b": {"weight": torch.zeros(2, 4) == 0}})
    config = ASTConfig(sparsities=(0.5,), total_steps=10)
    report = Report.from_training(ListedTraining(nn.Linear(4, 2), masks, config))
    assert report.overlap == ((None, None), (0.0, 1.0))
    assert report.sub_nets[0].achieved_sparsity == 1


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"example_inputs \(1 x 5\) cannot be run"):
        Report.from_training(small_training(), example_inputs=torch.zeros(1, 5))


@pytest.mark.parametrize(
    "report",
    [
        run_report(),
        run_report(("2:4",), metrics=(), history=False),
        Report(title="nothing", sub_nets=()),
        Report.from_training(small_training(metrics={"s50": {"loss": math.inf}})),
    ],
    ids=["run", "one", "nothing", "not finite"],
)
def test_json_is_valid_and_brings_the_report_back(report: Report, tmp_path: Path) -> None:
    report.write_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads(text, parse_constant=refuse)
    assert Report.from_dict(values) == report
    assert Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no report of ast-plugin: 'format' must be 'ast-plugin report', got 'other'"),
        ({"version": 2}, "version of the report is 2, but ast-plugin .* reads version 1; update ast-plugin"),
        ({"steps": "7"}, "report.steps must be an integer, got '7'"),
        ({"layers": {}}, "report.layers must be a list"),
        ({"sub_nets": [3]}, r"report.sub_nets\[0\] must be a mapping, got 3"),
        ({"layerz": []}, "report has an unknown field 'layerz': did you mean 'layers'"),
    ],
)
def test_what_is_no_report_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=message):
        Report.from_dict({**run_report(blocks=2).to_dict(), **change})


def test_something_else_than_a_mapping_is_refused() -> None:
    with pytest.raises(StateError, match="'format' must be 'ast-plugin report', got 'list'"):
        Report.from_dict([])  # type: ignore[arg-type]  # what JSON may bring


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.mkdir()
    with pytest.raises(SaveError, match=r"report\.json"):
        run_report(blocks=2).write_json(path)
    assert list(tmp_path.iterdir()) == [path]


def test_elastic_header_brings_the_report_of_the_run() -> None:
    report = run_report(blocks=2)
    contents = Contents({"report": report.to_dict()}, small_training().masks)
    assert Report.from_elastic(contents) == report
    assert Report.from_elastic(contents, title="mine") == dataclasses.replace(report, title="mine")


def test_elastic_file_without_a_report_is_described_from_its_masks() -> None:
    report = Report.from_elastic(Contents({}, small_training().masks))
    assert [net.achieved_sparsity for net in report.sub_nets] == [0.5, 0.75]
    assert [net.target_sparsity for net in report.sub_nets] == [0.5, 0.75]  # nothing else is known
    assert [net.parameters for net in report.sub_nets] == [None, None]
    assert (report.title, report.steps, report.dense_parameters) == ("Elastic file", 0, None)


@pytest.mark.parametrize("with_report", [True, False])
def test_real_training_and_its_file_tell_the_same(tmp_path: Path, with_report: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ast = ast_plugin.wrap(optimizer, model, sparsities=(0.5, "2:4"), total_steps=40)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4)).backward()
        optimizer.step()
    ast.add_report_metric("loss", 0.25, sub_net="s50")
    report = Report.from_training(ast, example_inputs=torch.zeros(1, 8))
    ast.detach()

    assert [(net.name, net.pattern, net.achieved_sparsity) for net in report.sub_nets] == [
        ("s50", "unstructured", 0.5),
        ("2:4", "2:4", 0.5),
    ]
    assert all(net.on_target and net.steps == 20 for net in report.sub_nets)
    assert report.sub_nets[0].checks == 0  # the first of every group
    assert report.sub_nets[1].checks == sum(point.checks for point in report.conflict_history) > 0
    assert report.sub_nets[0].metrics == {"loss": 0.25}
    assert report.steps == 40
    assert report.sparsity_history
    assert report.sub_nets[1].flops == report.dense_flops // 2  # 2:4 halves every layer

    path = tmp_path / "elastic.safetensors"
    ast.save(path, report=report.to_dict() if with_report else None)
    stored = Report.from_elastic(read_elastic(path))
    if with_report:
        assert stored == report
    else:
        for name in ("layers", "overlap", "settings", "sparsity_history", "conflict_history", "steps"):
            expected = getattr(report, name)
            if name == "layers":
                expected = tuple(dataclasses.replace(layer, flops=None) for layer in expected)
            assert getattr(stored, name) == expected, name
        assert [net.conflicts for net in stored.sub_nets] == [net.conflicts for net in report.sub_nets]
        assert stored.sub_nets[0].metrics == {"loss": 0.25}


def test_impossible_numbers_in_a_file_are_named() -> None:
    values = run_report().to_dict()
    assert Report.from_dict(values).to_dict() == values
    for change, message in (
        ({"steps": -1}, "report.steps must be at least 0, got -1"),
        ({"elapsed_seconds": -0.5}, "report.elapsed_seconds must be at least 0, got -0.5"),
        ({"overlap": [[1.0]]}, f"report.overlap must have {len(values['sub_nets'])} rows and columns, one a sub-net"),
        ({"overlap": [[7.0] * 3] * 3}, r"report.overlap\[0\]\[0\] must be between 0 and 1, got 7.0"),
    ):
        with pytest.raises(StateError, match=message):
            Report.from_dict({**values, **change})

"""The files beside timm's checkpoints hold what was trained and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm_runs import EMA, NEWEST, STEPS, SUB_NETS, Run, Runs, figures_of

import ast_plugin
from ast_plugin.integrations.timm import train
from ast_plugin.integrations.timm.run import TimmRun
from ast_plugin.version import __version__

pytestmark = pytest.mark.extra("timm")


@pytest.fixture
def reported(timm_runs: Runs) -> Run:
    pytest.importorskip("matplotlib")
    return timm_runs.once(train.main, "--ast-sparsities", "0.5", "0.8")


def test_a_summary_for_programs_says_what_was_made(timm_runs: Runs) -> None:
    run = timm_runs.own()
    summary = json.loads((run.folder / "ast.json").read_text())
    assert summary["model"] == "test_resnet"
    assert summary["steps"] == STEPS
    assert summary["default_sub_net"] == "s50"
    assert summary["files"] == ["elastic.safetensors"]
    assert summary["config"]["sparsities"] == [0.5, 0.8]
    assert summary["versions"]["ast-plugin"] == __version__
    assert summary["versions"]["torch"] == torch.__version__
    assert list(summary["sub_nets"]) == list(SUB_NETS)
    for name, figures in figures_of(run.rows[-1]).items():
        assert summary["sub_nets"][name]["metrics"] == figures


def test_the_report_shows_every_sub_net_and_what_was_measured(reported: Run) -> None:
    page = (reported.folder / "report.html").read_text(encoding="utf-8")
    assert "Sub-nets of test_resnet" in page
    assert all(name in page for name in SUB_NETS)
    assert reported.summary["files"] == ["elastic.safetensors", "report.html"]


def test_a_report_changes_nothing_of_the_run(reported: Run, timm_runs: Runs) -> None:
    assert reported.rows == timm_runs.own().rows
    assert not (timm_runs.own().folder / "report.html").exists()


def test_the_elastic_file_holds_the_figures_and_the_report(timm_runs: Runs) -> None:
    run = timm_runs.own()
    elastic = ast_plugin.load(run.folder / "elastic.safetensors", timm_runs.network())
    assert elastic.metrics == figures_of(run.rows[-1])
    report = ast_plugin.Report.from_elastic(elastic)
    assert "s80" in report.render_terminal(color=False)


def test_average_and_model_have_a_file_each(timm_runs: Runs) -> None:
    run = timm_runs.launched(NEWEST, *EMA)
    assert run.summary["files"] == ["elastic.safetensors", "elastic_ema.safetensors"]
    both = {}
    for file, key in (("elastic", "state_dict"), ("elastic_ema", "state_dict_ema")):
        model = timm_runs.network()
        weights = ast_plugin.load(run.folder / f"{file}.safetensors", model).materialize("s80")
        dense = run.checkpoint()[key]
        for name in run.state()["shapes"]:
            kept = weights[name] != 0
            assert torch.equal(weights[name][kept], dense[name][kept]), (file, name)
        both[file] = weights
    assert any(not torch.equal(both["elastic"][name], tensor) for name, tensor in both["elastic_ema"].items())


def test_operations_are_counted_at_the_size_of_training(reported: Run) -> None:
    with safe_open(reported.folder / "elastic.safetensors", "pt") as file:
        texts = " ".join(file.metadata().values())
    report = reported.folder / "report.html"
    assert "flops" in texts.lower()
    assert "No operations" not in report.read_text(encoding="utf-8")


def test_without_matplotlib_the_run_ends_all_the_same(
    timm_runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = timm_runs.attempt(train.main, "--ast-sparsities", "0.5", "0.8", "--epochs", "1")
    assert run.code == 0
    assert run.summary["files"] == ["elastic.safetensors"]
    assert "No report.html: " in run.err


def test_a_folder_that_cannot_be_written_is_one_line(
    timm_runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finish, occupied = TimmRun.finish, tmp_path / "file"
    occupied.write_text("no folder")

    def elsewhere(self: TimmRun) -> object:
        self._output_dir = occupied
        return finish(self)

    monkeypatch.setattr(TimmRun, "finish", elsewhere)
    run = timm_runs.attempt(train.main, "--ast-sparsities", "0.5", "0.8", "--ast-no-report", "--epochs", "1")
    assert run.code == 2
    line = run.err.splitlines()[-1]
    assert line.startswith("train: error: ")
    assert str(occupied) in line
    assert "Traceback" not in run.err

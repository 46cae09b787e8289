"""Sup-tickets in timm's training scripts: superposed sub-nets are measured and written, also after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from networks import assert_same
from safetensors.torch import load_file
from timm_runs import COLUMNS, EMA, NEWEST, SPARSE, SUB_NETS, Run, Runs, figures_of

from ast_plugin.integrations.timm import train

pytestmark = pytest.mark.extra("timm")

EPOCHS = ("--epochs", "6")


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Return flags for two cycles of six steps at the end of 24."""
    file = tmp_path_factory.mktemp("settings") / "settings.json"
    file.write_text(json.dumps({"end_step": 0.4, "update_interval": 2, "sup_tickets": {"share": 0.5}}))
    return (*EPOCHS, "--ast-config", file, "--ast-sup-tickets", "2")


def check(runs: Runs, run: Run) -> None:
    """Compare what a run says of its superposed and of its last sub-nets with their files."""
    assert run.columns == COLUMNS
    summary = run.summary
    assert {"elastic.safetensors", "elastic_last.safetensors"} <= set(summary["files"])
    for file, key in (("elastic", "sub_nets"), ("elastic_last", "last_sub_nets")):
        figures = runs.elastic_figures(run.folder / f"{file}.safetensors")
        for name, sparsity in zip(SUB_NETS, (0.5, 0.8), strict=True):
            said = summary[key][name]
            assert said["sparsity"] == pytest.approx(sparsity, abs=1e-4)
            assert figures[name]["loss"] == pytest.approx(said["metrics"]["loss"], rel=1e-5)
    assert summary["sub_nets"]["s80"]["metrics"]["loss"] != summary["last_sub_nets"]["s80"]["metrics"]["loss"]


@pytest.mark.slow
def test_the_superposed_sub_nets_are_measured_and_written_beside_the_last_ones(
    timm_runs: Runs, flags: tuple[str | Path, ...]
) -> None:
    run = timm_runs.own(*flags)
    check(timm_runs, run)
    for name, figures in figures_of(run.rows[-1]).items():
        assert run.summary["last_sub_nets"][name]["metrics"] == figures
    assert sum("Sub-nets superposed: s50 loss" in line for line in run.err.splitlines()) == 1


@pytest.mark.slow
def test_the_launched_script_does_the_same_and_an_average_has_its_own_file(
    timm_runs: Runs, flags: tuple[str | Path, ...]
) -> None:
    run = timm_runs.launched(NEWEST, *flags, *EMA)
    check(timm_runs, run)
    assert "elastic_ema.safetensors" in run.summary["files"]


@pytest.mark.slow
def test_batch_norm_of_the_superposed_sub_nets_comes_from_the_training_data(
    timm_runs: Runs, flags: tuple[str | Path, ...]
) -> None:
    tickets = timm_runs.own(*flags).state()["plugins"]["sup_tickets"]
    assert tickets["tickets"] == 2
    assert tickets["recomputed"] is True


@pytest.mark.slow
def test_a_run_that_was_resumed_within_a_cycle_ends_as_the_uninterrupted_one(
    timm_runs: Runs, flags: tuple[str | Path, ...]
) -> None:
    whole = timm_runs.launched(NEWEST, *flags)  # a script that seeds its epochs
    again = timm_runs.launched(NEWEST, *flags, "--resume", whole.folder / "checkpoint-3.pth.tar")
    assert again.rows == whole.rows[4:]
    for name in ("elastic", "elastic_last"):
        assert_same(*(load_file(run.folder / f"{name}.safetensors") for run in (whole, again)))
    assert again.summary["sub_nets"] == whole.summary["sub_nets"]


def test_a_share_that_leaves_no_room_is_one_line(timm_runs: Runs) -> None:
    run = timm_runs.attempt(train.main, *SPARSE, "--ast-sup-tickets", "3")
    assert run.code == 2
    assert "share=0.1 of total_steps=8 is 1 steps" in run.err
    run = timm_runs.attempt(train.main, *SPARSE, "--ast-sup-tickets", "0")
    assert run.code == 2
    assert "--ast-sup-tickets: cycles of sup_tickets must be" in run.err

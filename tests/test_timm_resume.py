"""A run that is broken off and resumed is the run that was never broken off, as far as its script itself is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from networks import assert_same
from timm import utils
from timm_runs import COLUMNS, EMA, MODEL, NEWEST, OLDER, SPARSE, STEPS, Run, Runs

from ast_plugin.integrations.timm import launcher, train
from ast_plugin.integrations.timm.run import TimmRun
from ast_plugin.training_exchange import with_plain_entries

pytestmark = pytest.mark.extra("timm")

SCRIPTS = {"own": None, "newest": NEWEST, "older": OLDER}


def seeded_train(arguments: list[str]) -> int:
    """Run our own script with epochs seeded by their number, as `timm_script` does by itself."""
    train_one_epoch = train.train_one_epoch

    def seeded(epoch: int, *args: Any, **options: Any) -> Any:
        utils.random_seed(42 + epoch, 0)
        return train_one_epoch(epoch, *args, **options)

    with mock.patch.object(train, "train_one_epoch", seeded):
        return train.main(arguments)


def run_of(runs: Runs, script: str, *flags: str | Path) -> Run:
    path = SCRIPTS[script]
    if path is None:
        return runs.once(seeded_train, *SPARSE, *flags)
    return runs.launched(path, *flags)


def first_checkpoint(run: Run) -> Path:
    return run.folder / "checkpoint-0.pth.tar"


def trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what training has made of a checkpoint, without the bookkeeping of files and times."""
    kept = {key: value for key, value in checkpoint.items() if key not in ("args", "saver", "arch", "version")}
    for holder in (kept.get("task_state", {}), kept["optimizer"]):
        if "ast_plugin" in holder:
            state = dict(with_plain_entries(holder["ast_plugin"]))
            state.pop("metrics")  # measured by the script, at the end of the same epoch
            holder["ast_plugin"] = state
    return kept


def state_at_start(main: Callable[[list[str]], object], runs: Runs, *flags: str | Path, script: Path | None) -> Any:
    """Return the state of a run right after its beginning, and the run itself."""
    states: list[dict[str, Any]] = []
    begin = TimmRun.begin

    def remembered(self: TimmRun, *args: Any, **options: Any) -> Any:
        ast = begin(self, *args, **options)
        states.append({key: dict(with_plain_entries(value)) for key, value in self.state().items()})
        return ast

    with mock.patch.object(TimmRun, "begin", remembered):
        run = runs.attempt(main, *SPARSE, *flags, script=script)
    assert run.code == 0, run.err[-3000:]
    (state,) = states
    return state, run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_uninterrupted_one(script: str, timm_runs: Runs) -> None:
    whole = run_of(timm_runs, script)
    resumed = run_of(timm_runs, script, "--resume", first_checkpoint(whole))
    assert resumed.rows == whole.rows[1:]
    assert_same(trained(resumed.checkpoint()), trained(whole.checkpoint()))
    assert resumed.summary["steps"] == STEPS
    assert resumed.summary["sub_nets"] == whole.summary["sub_nets"]


@pytest.mark.parametrize("script", ["newest", "older"])
def test_without_sub_nets_the_scripts_resume_as_exactly(script: str, timm_runs: Runs) -> None:
    path = SCRIPTS[script]
    assert path is not None
    whole = timm_runs.unmodified(path)
    resumed = timm_runs.unmodified(path, "--resume", first_checkpoint(whole))
    assert resumed.rows == whole.rows[1:]
    assert_same(trained(resumed.checkpoint()), trained(whole.checkpoint()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_average_of_every_sub_net_is_resumed(script: str, timm_runs: Runs) -> None:
    whole = run_of(timm_runs, script, *EMA)
    resumed = run_of(timm_runs, script, *EMA, "--resume", first_checkpoint(whole))
    assert resumed.rows == whole.rows[1:]
    assert resumed.columns == COLUMNS
    assert whole.rows != run_of(timm_runs, script).rows  # the average's figures, not the model's
    last = trained(resumed.checkpoint())
    assert_same(last, trained(whole.checkpoint()))
    averaged = (last.get("task_state") or last["optimizer"])["ast_plugin_ema"]
    private = averaged["private"]["s80"]
    assert any(float(tensor.float().abs().sum()) for name, tensor in private.items() if name.endswith("running_mean"))
    present = last.get("task_state", last["optimizer"])["ast_plugin"]["normalization"]["tensors"]["s80"]
    assert any(not torch.equal(tensor, present[name]) for name, tensor in private.items())


@pytest.mark.parametrize("script", SCRIPTS)
def test_sub_nets_are_resumed_without_the_optimizer_too(script: str, timm_runs: Runs) -> None:
    whole = run_of(timm_runs, script)
    main = seeded_train if SCRIPTS[script] is None else launcher.main
    flags = ("--resume", first_checkpoint(whole), "--no-resume-opt")
    state, run = state_at_start(main, timm_runs, *flags, script=SCRIPTS[script])
    saved = whole.state("checkpoint-0")
    found = dict(state["ast_plugin"])
    assert found["step"] == STEPS // 2
    for key in ("step", "last_steps", "masks", "statistics", "default_sub_net"):
        assert_same({key: found[key]}, {key: saved[key]})
    assert_same(found["normalization"]["tensors"], saved["normalization"]["tensors"])
    assert run.rows[0]["epoch"] == "1"
    # a momentum that starts anew makes another second epoch
    assert run.rows[0]["train_loss"] != whole.rows[1]["train_loss"]


def test_a_student_is_resumed_with_its_projection(timm_runs: Runs) -> None:
    flags = ("--kd-model-name", timm_runs.teacher("test_byobnet"), "--kd-distill-type", "feature")
    whole = timm_runs.launched(NEWEST, *flags)
    resumed = timm_runs.launched(NEWEST, *flags, "--resume", first_checkpoint(whole))
    assert resumed.rows == whole.rows[1:]
    assert "projection" in whole.checkpoint()["task_state"]
    assert_same(trained(resumed.checkpoint()), trained(whole.checkpoint()))


def test_a_plain_checkpoint_starts_sub_nets(timm_runs: Runs) -> None:
    plain = timm_runs.unmodified(NEWEST)
    run = timm_runs.launched(NEWEST, "--resume", first_checkpoint(plain))
    assert [row["epoch"] for row in run.rows] == ["1"]
    assert run.columns == COLUMNS
    assert run.summary["steps"] == STEPS // 2
    assert run.summary["config"]["total_steps"] == STEPS // 2
    assert run.summary["sub_nets"]["s80"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert "is a checkpoint without sub-nets: they start from its weights, at epoch 1" in run.err


def test_weights_alone_start_sub_nets_from_the_first_epoch(timm_runs: Runs) -> None:
    plain = timm_runs.unmodified(NEWEST)
    run = timm_runs.launched(NEWEST, "--initial-checkpoint", plain.folder / "last.pth.tar")
    assert [row["epoch"] for row in run.rows] == ["0", "1"]
    assert float(run.rows[0]["train_loss"]) < float(timm_runs.launched(NEWEST).rows[0]["train_loss"])


@pytest.mark.parametrize("script", ["newest", "older"])
def test_the_plain_script_resumes_the_dense_model(script: str, timm_runs: Runs, tmp_path: Path) -> None:
    path = SCRIPTS[script]
    assert path is not None
    whole = timm_runs.launched(path)
    stripped = whole.checkpoint("checkpoint-0")
    stripped.pop("task_state", None)
    stripped["optimizer"].pop("ast_plugin", None)
    torch.save(stripped, tmp_path / "stripped.pth.tar")
    resumed = timm_runs.unmodified(path, "--resume", first_checkpoint(whole))
    control = timm_runs.unmodified(path, "--resume", tmp_path / "stripped.pth.tar")
    assert [row["epoch"] for row in resumed.rows] == ["1"]
    assert resumed.rows == control.rows
    assert_same(resumed.checkpoint()["state_dict"], control.checkpoint()["state_dict"])
    assert not [name for name in stripped["state_dict"] if "ast" in name.split(".")]


def test_scripts_resume_each_others_checkpoints(timm_runs: Runs) -> None:
    own = run_of(timm_runs, "own")
    run = timm_runs.launched(NEWEST, "--resume", first_checkpoint(own))
    assert run.summary["steps"] == STEPS
    assert [row["epoch"] for row in run.rows] == ["1"]


def test_a_resumed_run_may_be_longer_than_planned(timm_runs: Runs) -> None:
    whole = timm_runs.launched(NEWEST)
    with pytest.warns(UserWarning, match=r"total_steps=12 \(saved: 8\)"):
        run = timm_runs.launched(NEWEST, "--resume", whole.folder / "last.pth.tar", "--epochs", "3")
    assert [row["epoch"] for row in run.rows] == ["2"]
    assert run.summary["steps"] == STEPS + STEPS // 2


def test_a_run_that_is_complete_has_nothing_to_resume(timm_runs: Runs) -> None:
    whole = timm_runs.launched(NEWEST)
    run = timm_runs.attempt(launcher.main, *SPARSE, "--resume", whole.folder / "last.pth.tar", script=NEWEST)
    assert run.code == 0
    assert "No epoch was trained, so there are no sub-nets to write." in run.err
    assert not (run.folder / "ast.json").exists()


def refused(runs: Runs, script: str, *flags: str | Path) -> str:
    """Return the line on standard error with which a command line is refused."""
    path = SCRIPTS[script]
    run = runs.attempt(train.main if path is None else launcher.main, *flags, script=path)
    assert run.code == 2
    assert "Traceback" not in run.err
    assert not (run.folder / "summary.csv").exists()
    line = run.err.splitlines()[-1]
    assert line.startswith("train: error: " if path is None else "ast-timm: error: ")
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_sub_nets_are_named(script: str, timm_runs: Runs) -> None:
    checkpoint = first_checkpoint(run_of(timm_runs, script))
    line = refused(timm_runs, script, "--ast-sparsities", "0.5", "0.9", "--resume", checkpoint)
    assert f"--resume {checkpoint}: the saved state has the sub-nets s50, s80, this run has s50, s90" in line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-classes", "7"), "size mismatch for fc.weight"),
        (("--model", "test_efficientnet"), "Missing key(s)"),
    ],
)
def test_another_model_is_named(script: str, flags: tuple[str, str], said: str, timm_runs: Runs) -> None:
    checkpoint = first_checkpoint(run_of(timm_runs, script))
    line = refused(timm_runs, script, *SPARSE, *flags, "--resume", checkpoint)
    assert f"--resume {checkpoint}: a checkpoint of {MODEL}, and this run trains " in line
    assert said in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_file_is_said_to_be_one(script: str, timm_runs: Runs, tmp_path: Path) -> None:
    whole = first_checkpoint(run_of(timm_runs, script)).read_bytes()
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes(whole[: len(whole) // 2])
    assert f"--resume {damaged}: no checkpoint that can be read" in refused(
        timm_runs, script, *SPARSE, "--resume", damaged
    )
    damaged.write_bytes(b"not a checkpoint")
    assert f"--resume {damaged}: no checkpoint that can be read" in refused(
        timm_runs, script, *SPARSE, "--resume", damaged
    )


@pytest.mark.parametrize("place", ["masks", "rest", "step"])
def test_a_damaged_state_is_said_to_be_one(place: str, timm_runs: Runs, tmp_path: Path) -> None:
    checkpoint = timm_runs.launched(NEWEST).checkpoint("checkpoint-0")
    del checkpoint["task_state"]["ast_plugin"][place]
    torch.save(checkpoint, tmp_path / "damaged.pth.tar")
    line = refused(timm_runs, "newest", *SPARSE, "--resume", tmp_path / "damaged.pth.tar")
    assert "damaged" in line


def test_another_choice_of_weights_is_named(timm_runs: Runs) -> None:
    checkpoint = first_checkpoint(timm_runs.launched(NEWEST))
    line = refused(timm_runs, "newest", *SPARSE, "--ast-exclude", "layer1.*", "--resume", checkpoint)
    assert "the saved state belongs to other prunable parameters" in line
    assert "layer1.0.conv1.weight" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_optimizer_goes_on_without_the_state_of_the_first(script: str, timm_runs: Runs) -> None:
    whole = run_of(timm_runs, script)
    flags = ("--resume", first_checkpoint(whole), "--no-resume-opt", "--opt", "adamw", "--lr", "0.001")
    resumed = run_of(timm_runs, script, *flags)
    assert [row["epoch"] for row in resumed.rows] == ["1"]
    assert resumed.summary["steps"] == STEPS
    (state,) = resumed.state()["normalization"]["optimizer"].values()
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())
    assert state

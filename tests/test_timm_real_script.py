"""The rows of the launcher on a real ``train.py`` of timm, whose path the variable AST_TIMM_TRAIN_SCRIPT holds.

Left out without it. timm's scripts need worker processes on a CPU, so that a run takes seconds more than one of ours.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from networks import assert_same
from timm_runs import COLUMNS, EMA, SPARSE, STEPS, Run, Runs, figures_of

from ast_plugin.integrations.timm import launcher

GIVEN = os.environ.get("AST_TIMM_TRAIN_SCRIPT", "")
SCRIPT = Path(GIVEN).resolve()
WORKERS = ("-j", "1", "--input-size", "3", "32", "32")

pytestmark = [
    pytest.mark.extra("timm"),
    pytest.mark.slow,
    pytest.mark.skipif(not GIVEN, reason="AST_TIMM_TRAIN_SCRIPT names no train.py"),
    pytest.mark.filterwarnings("ignore"),  # of the script, which may be years older than torch
]

ROWS = {
    "nothing else": (),
    "accumulation": ("--grad-accum-steps", "3"),
    "norm": ("--clip-grad", "0.1"),
    "value": ("--clip-grad", "0.001", "--clip-mode", "value"),
    "agc": ("--clip-grad", "0.001", "--clip-mode", "agc"),
    "adamw": ("--opt", "adamw", "--lr", "0.001", "--sched-on-updates"),
    "lookahead": ("--opt", "lookahead_adamw", "--lr", "0.001"),
    "bfloat16": ("--amp", "--amp-dtype", "bfloat16"),
    "memory": ("--channels-last", "--grad-checkpointing"),
    "mixup": ("--mixup", "0.8", "--cutmix", "1.0"),
    "average": EMA,
    "compiled": ("--torchcompile", "aot_eager", *EMA),
    "sub-net": ("--ast-eval-sub-net", "s80"),
}


def trained(runs: Runs, *flags: str | Path) -> Run:
    return runs.launched(SCRIPT, *WORKERS, *flags)


def plain(runs: Runs, *flags: str | Path) -> Run:
    return runs.unmodified(SCRIPT, *WORKERS, *flags)


def first_checkpoint(run: Run) -> Path:
    return run.folder / "checkpoint-0.pth.tar"


def check(runs: Runs, run: Run, tolerance: float = 1e-4) -> None:
    assert run.columns == COLUMNS
    averaged = run.folder / "elastic_ema.safetensors"
    written = runs.elastic_figures(averaged if averaged.exists() else run.folder / "elastic.safetensors")
    for name, figures in figures_of(run.rows[-1]).items():
        assert written[name]["loss"] == pytest.approx(figures["loss"], rel=tolerance)
        sparsity = run.summary["sub_nets"][name]["sparsity"]
        assert sparsity == pytest.approx(int(name[1:]) / 100, abs=1e-4)


def refused(runs: Runs, *flags: str | Path) -> str:
    run = runs.attempt(launcher.main, *WORKERS, *flags, script=SCRIPT)
    assert run.code == 2
    assert "Traceback" not in run.err
    return run.err.splitlines()[-1]


def test_without_flags_the_script_runs_as_it_is(timm_runs: Runs) -> None:
    alone, run = plain(timm_runs), timm_runs.once(launcher.main, *WORKERS, script=SCRIPT)
    assert run.rows == alone.rows
    other = {**yaml.safe_load(alone.arguments), "experiment": run.folder.name}
    assert yaml.safe_load(run.arguments) == other
    launched, unmodified = run.checkpoint(), alone.checkpoint()
    assert launched.keys() == unmodified.keys()
    for key in ("state_dict", "optimizer"):
        assert_same({key: launched[key]}, {key: unmodified[key]})


@pytest.mark.parametrize("row", ROWS)
def test_sub_nets_train_with(row: str, timm_runs: Runs) -> None:
    run = trained(timm_runs, *ROWS[row])
    check(timm_runs, run, tolerance=2e-2 if row == "bfloat16" else 1e-4)
    assert run.summary["steps"] == (4 if row == "accumulation" else STEPS)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_students_are_trained_by_their_own_names(kind: str, timm_runs: Runs) -> None:
    if "--kd-model-name" not in SCRIPT.read_text(encoding="utf-8"):
        pytest.skip("this script does not distil")
    flags = ("--kd-model-name", timm_runs.teacher("test_byobnet"), "--kd-distill-type", kind)
    try:
        plain(timm_runs, *flags)
    except TypeError as error:
        pytest.skip(f"this script and this timm do not go together: {error}")
    check(timm_runs, trained(timm_runs, *flags))


@pytest.mark.parametrize("flags", [(), EMA, ("--no-resume-opt",)], ids=["model", "average", "without optimizer"])
def test_a_run_is_resumed(flags: tuple[str, ...], timm_runs: Runs) -> None:
    if "--no-resume-opt" in flags and "resume_task_checkpoint" not in SCRIPT.read_text(encoding="utf-8"):
        pytest.skip("checkpoints of this script hold sub-nets in the optimizer's state alone")
    whole = trained(timm_runs, *(EMA if flags == EMA else ()))
    run = trained(timm_runs, *flags, "--resume", first_checkpoint(whole))
    check(timm_runs, run)
    assert [row["epoch"] for row in run.rows] == ["1"]
    assert run.summary["steps"] == STEPS
    assert f"at step {STEPS // 2} of {STEPS}" in run.err


def test_a_plain_checkpoint_starts_sub_nets_and_theirs_is_a_plain_one(timm_runs: Runs, tmp_path: Path) -> None:
    run = trained(timm_runs, "--resume", first_checkpoint(plain(timm_runs)))
    check(timm_runs, run)
    assert run.summary["steps"] == STEPS // 2
    whole = trained(timm_runs)
    stripped = whole.checkpoint("checkpoint-0")
    stripped.pop("task_state", None)
    stripped["optimizer"].pop("ast_plugin", None)
    torch.save(stripped, tmp_path / "stripped.pth.tar")
    resumed = plain(timm_runs, "--resume", first_checkpoint(whole))
    control = plain(timm_runs, "--resume", tmp_path / "stripped.pth.tar")
    assert resumed.rows == control.rows
    assert_same(resumed.checkpoint()["state_dict"], control.checkpoint()["state_dict"])


@pytest.mark.parametrize("metric", ["s80_top1", "s80_loss"])
def test_the_best_checkpoint_is_that_of_the_metric(metric: str, timm_runs: Runs) -> None:
    run = trained(timm_runs, "--eval-metric", metric, "--ast-method", "rigl")  # as sparse from the beginning
    column = [float(row[f"eval_{metric}"]) for row in run.rows]
    best = column.index(min(column) if metric.endswith("loss") else max(column))
    assert run.checkpoint("model_best")["epoch"] == best
    assert [run.checkpoint(f"checkpoint-{epoch}")["metric"] for epoch in (0, 1)] == column


def test_help_has_the_group(timm_runs: Runs) -> None:
    run = timm_runs.attempt(launcher.main, "--help", script=SCRIPT)
    assert run.code == 0
    assert "--ast-sparsities S [S ...]" in run.out


def test_flags_come_from_the_file_of_the_script_too(timm_runs: Runs) -> None:
    first = trained(timm_runs)
    again = timm_runs.once(launcher.main, *WORKERS, "-c", first.folder / "args.yaml", script=SCRIPT)
    assert again.rows == first.rows


def test_bad_input_is_one_line(timm_runs: Runs) -> None:
    checkpoint = first_checkpoint(trained(timm_runs))
    assert "there is no sub-net 's90'" in refused(timm_runs, *SPARSE, "--eval-metric", "s90_top1")
    assert "no effect without --ast-sparsities" in refused(timm_runs, "--ast-method", "rigl")
    assert "this run has s50, s90" in refused(
        timm_runs, "--ast-sparsities", "0.5", "0.9", "--ast-no-report", "--resume", checkpoint
    )
    assert "a checkpoint of test_resnet, and this run trains test_efficientnet" in refused(
        timm_runs, *SPARSE, "--model", "test_efficientnet", "--resume", checkpoint
    )

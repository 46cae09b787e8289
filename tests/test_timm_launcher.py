"""``ast-timm TRAIN_SCRIPT ...``: the script as it is without flags, sub-nets with them, clear words about mistakes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from networks import assert_same
from timm_runs import COLUMNS, COMMON, EMA, HERE, NEWEST, OLDER, SPARSE, STEPS, Run, Runs, captured, figures_of

from ast_plugin.integrations.timm import launcher
from ast_plugin.integrations.timm.flags import TITLE

pytestmark = pytest.mark.extra("timm")

SCRIPTS = {"newest": NEWEST, "older": OLDER}


def said_of(run: Run) -> str:
    """Return the line on standard error with which a command line was refused."""
    assert run.code == 2
    assert "Traceback" not in run.err
    assert not (run.folder / "summary.csv").exists()
    line = run.err.splitlines()[-1]
    assert line.startswith("ast-timm: error: ")
    return line


@pytest.mark.parametrize("flags", [(), EMA], ids=["model", "average"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_flags_the_script_runs_as_it_is(script: str, flags: tuple[str, ...], timm_runs: Runs) -> None:
    alone = timm_runs.unmodified(SCRIPTS[script], *flags)
    run = timm_runs.once(launcher.main, *flags, script=SCRIPTS[script])
    assert (run.folder / "summary.csv").read_bytes() == (alone.folder / "summary.csv").read_bytes()
    assert run.arguments == alone.arguments.replace(
        f"experiment: '{alone.folder.name}'", f"experiment: '{run.folder.name}'"
    )
    assert {path.name for path in run.folder.iterdir()} == {path.name for path in alone.folder.iterdir()}
    for name in ("last", "model_best", "checkpoint-0"):
        launched, unmodified = run.checkpoint(name), alone.checkpoint(name)
        assert launched.keys() == unmodified.keys()
        for key in ("state_dict", "optimizer", "epoch", "metric"):
            assert_same({key: launched[key]}, {key: unmodified[key]})
        given = {**vars(unmodified["args"]), "experiment": run.folder.name}
        assert vars(launched["args"]) == given


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_flags_every_sub_net_is_trained_measured_and_written(script: str, timm_runs: Runs) -> None:
    run = timm_runs.launched(SCRIPTS[script])
    assert run.columns == COLUMNS
    assert [row["epoch"] for row in run.rows] == ["0", "1"]
    assert run.summary["steps"] == STEPS
    written = timm_runs.elastic_figures(run.folder / "elastic.safetensors")
    for name, figures in figures_of(run.rows[-1]).items():
        assert written[name]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
        assert written[name]["top1"] == pytest.approx(figures["top1"])
    assert "Test s50" in run.err
    assert "Test s80" in run.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_average_is_measured_and_written(script: str, timm_runs: Runs) -> None:
    run = timm_runs.launched(SCRIPTS[script], *EMA)
    written = timm_runs.elastic_figures(run.folder / "elastic_ema.safetensors")
    for name, figures in figures_of(run.rows[-1]).items():
        assert written[name]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert "Test (EMA) s80" in run.err


def test_both_shapes_of_scripts_train_alike(timm_runs: Runs) -> None:
    newest, older = (timm_runs.launched(script) for script in SCRIPTS.values())
    assert newest.rows == older.rows
    assert_same(newest.checkpoint()["state_dict"], older.checkpoint()["state_dict"])


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--grad-accum-steps", "3", "--clip-grad", "0.1", "--clip-mode", "agc"), 4),
        (("--opt", "lookahead_adamw", "--lr", "0.001", "--sched-on-updates"), STEPS),
        (("--amp", "--amp-dtype", "bfloat16", "--channels-last", "--grad-checkpointing"), STEPS),
    ],
    ids=["accumulation", "lookahead", "precision"],
)
def test_sub_nets_train_with(flags: tuple[str, ...], steps: int, timm_runs: Runs) -> None:
    run = timm_runs.launched(NEWEST, *flags)
    assert run.columns == COLUMNS
    assert run.summary["steps"] == steps
    written = timm_runs.elastic_figures(run.folder / "elastic.safetensors")
    tolerance = 2e-2 if "--amp" in flags else 1e-5
    for name, figures in figures_of(run.rows[-1]).items():
        assert written[name]["loss"] == pytest.approx(figures["loss"], rel=tolerance)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_students_are_trained_by_their_own_names(kind: str, timm_runs: Runs) -> None:
    teacher = timm_runs.teacher("test_byobnet")  # with other features, to which the student's are projected
    run = timm_runs.launched(NEWEST, "--kd-model-name", teacher, "--kd-distill-type", kind, *EMA)
    written = timm_runs.elastic_figures(run.folder / "elastic_ema.safetensors")
    assert written["s80"]["loss"] == pytest.approx(figures_of(run.rows[-1])["s80"]["loss"], rel=1e-5)
    if kind == "feature":
        assert "projection" in run.checkpoint()["task_state"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_compiled_model_gives_the_figures_of_an_eager_one(script: str, timm_runs: Runs) -> None:
    eager = timm_runs.launched(SCRIPTS[script], *EMA)
    run = timm_runs.launched(SCRIPTS[script], *EMA, "--torchcompile", "aot_eager")
    for name, figures in figures_of(eager.rows[-1]).items():
        assert figures_of(run.rows[-1])[name] == pytest.approx(figures, rel=1e-4)


def test_flags_come_from_the_file_of_the_script_too(timm_runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text("ast_sparsities: [0.5, 0.8]\nast_no_report: true\nast_drop_fraction: 0.3\n")
    run = timm_runs.once(launcher.main, "-c", file, script=NEWEST)
    assert run.rows == timm_runs.launched(NEWEST, "--ast-drop-fraction", "0.3").rows
    recorded = yaml.safe_load(run.arguments)
    assert recorded["ast_sparsities"] == [0.5, 0.8]
    assert recorded["ast_drop_fraction"] == 0.3
    assert recorded["ast_method"] is None


def test_the_recorded_arguments_make_the_same_run(timm_runs: Runs) -> None:
    first = timm_runs.launched(NEWEST)
    again = timm_runs.once(launcher.main, "-c", first.folder / "args.yaml", script=NEWEST)
    assert again.rows == first.rows


@pytest.mark.parametrize("metric", ["s80_top5", "s80_loss", "loss"])
def test_the_best_checkpoint_is_that_of_the_metric(metric: str, timm_runs: Runs) -> None:
    run = timm_runs.launched(NEWEST, "--eval-metric", metric, "--ast-method", "rigl")  # as sparse from the beginning
    column = [float(row[f"eval_{metric}"]) for row in run.rows]
    best = column.index(min(column) if metric.endswith("loss") else max(column))
    assert [run.checkpoint(f"checkpoint-{epoch}")["metric"] for epoch in (0, 1)] == column
    assert run.checkpoint("model_best")["epoch"] == best
    assert column[best] != column[1 - best]
    assert yaml.safe_load(run.arguments)["eval_metric"] == metric


def test_no_checkpoint_on_the_way_to_the_sparsity_is_the_best(timm_runs: Runs) -> None:
    run = timm_runs.launched(NEWEST)
    assert run.checkpoint("checkpoint-0")["metric"] == -math.inf
    assert run.checkpoint("model_best")["epoch"] == 1
    assert run.checkpoint("model_best")["metric"] == float(run.rows[1]["eval_top1"])


def test_help_of_the_script_has_the_group(timm_runs: Runs) -> None:
    run = timm_runs.attempt(launcher.main, "--help", script=NEWEST)
    assert run.code == 0
    assert "a training script" in run.out
    assert f"\n{TITLE}:\n" in run.out
    assert "--ast-sparsities S [S ...]" in run.out


def test_help_without_a_script_is_that_of_the_command() -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        found, out, err = captured(lambda arguments=arguments: launcher.main(arguments))
        assert found == code
        assert (out if code == 0 else err).startswith("usage: ast-timm TRAIN_SCRIPT")


def test_the_interpreter_is_left_as_it_was(timm_runs: Runs) -> None:
    before = list(sys.argv), list(sys.path), set(sys.modules)
    timm_runs.launched(NEWEST)
    assert (list(sys.argv), list(sys.path)) == before[:2]
    assert not [name for name in set(sys.modules) - before[2] if "train_script" in name]


@pytest.mark.slow
def test_the_module_is_a_command(timm_runs: Runs, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "ast_plugin.integrations.timm", str(NEWEST)]
    command += ["--data-dir", str(timm_runs.pictures), *COMMON, *SPARSE, "-j", "1"]
    command += ["--output", str(tmp_path), "--experiment", "e"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Run(0, tmp_path / "e", "", "").summary["steps"] == STEPS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('hello')\n", "has no function _parse_args()"),
        ("def main(:\n", "is no Python script"),
        ("PNG\0\0", "is no Python script"),
        ("from timm.models import what_only_newer_versions_have\n", "what_only_newer_versions_have"),
        ("import a_package_that_is_not_there\n", "a_package_that_is_not_there"),
    ],
    ids=["other", "syntax", "binary", "timm", "package"],
)
def test_a_script_that_is_not_of_timm(text: str, said: str, timm_runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    line = said_of(timm_runs.attempt(launcher.main, *SPARSE, script=script))
    assert str(script) in line
    assert said in line


@pytest.mark.parametrize("name", ["_parse_args", "create_optimizer_v2", "train_one_epoch", "validate", "main"])
def test_a_missing_function_is_named(name: str, timm_runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"from timm_script import *\nfrom timm_script import _parse_args\ndel {name}\n")
    line = said_of(timm_runs.attempt(launcher.main, *SPARSE, script=script))
    assert f"has no function {name}()" in line
    assert "timm 1." in line


def test_a_parser_that_is_none_is_named(timm_runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from timm_script import *\nfrom timm_script import _parse_args\nparser = None\n")
    line = said_of(timm_runs.attempt(launcher.main, *SPARSE, script=script))
    assert "has no argparse.ArgumentParser named parser" in line


def test_a_script_that_is_not_there(timm_runs: Runs, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "train.py", "there is no training script"),
        (tmp_path, "there is no training script"),
    ):
        assert f"{said} {path}" in said_of(timm_runs.attempt(launcher.main, *SPARSE, script=path))
    text = tmp_path / "notes.txt"
    text.write_text("notes")
    assert "is no Python script" in said_of(timm_runs.attempt(launcher.main, *SPARSE, script=text))


def test_flags_before_the_script_are_explained() -> None:
    code, _, err = captured(lambda: launcher.main(["--ast-sparsities", "0.9", "train.py"]))
    assert code == 2
    assert err == (
        "ast-timm: error: the first argument must be the path of timm's train.py, got '--ast-sparsities'; put it "
        "before all flags\n"
    )


@pytest.mark.parametrize("flag", ["--ast-sparsities", "--ast-method", "--ast-include", "--ast-config"])
def test_flags_without_a_value(flag: str, timm_runs: Runs) -> None:
    run = timm_runs.attempt(launcher.main, flag, script=NEWEST)
    assert run.code == 2
    assert f"argument {flag}: expected" in run.err.splitlines()[-1]


BAD = {
    "metric": ((*SPARSE, "--eval-metric", "s90_top1"), "--eval-metric s90_top1: there is no sub-net 's90'"),
    "loss": ((*SPARSE, "--eval-metric", "s8_loss"), "did you mean 's80_loss'"),
    "sub-net": ((*SPARSE, "--ast-eval-sub-net", "s90"), "'s90'"),
    "method": ((*SPARSE, "--ast-method", "rigel"), "did you mean 'rigl'"),
    "no sparsities": (("--ast-method", "rigl"), "--ast-method: no effect without --ast-sparsities"),
    "sparsity": (("--ast-sparsities", "1.5"), "1.5"),
    "second order": ((*SPARSE, "--opt", "adahessian"), "second derivatives"),
    "scripted": ((*SPARSE, "--torchscript"), "--torchscript: hooks do not run inside a scripted model"),
    "resume": ((*SPARSE, "--resume", "nowhere.pth.tar"), "--resume nowhere.pth.tar: there is no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_code_two(kind: str, timm_runs: Runs) -> None:
    flags, said = BAD[kind]
    assert said in said_of(timm_runs.attempt(launcher.main, *flags, script=NEWEST))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_said_at_once(timm_runs: Runs) -> None:
    line = said_of(timm_runs.attempt(launcher.main, *SPARSE, "--device", "cuda", script=NEWEST))
    assert "--device cuda: this PyTorch sees no CUDA device" in line


def test_the_rank_stands_before_an_error(timm_runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, _, err = captured(lambda: launcher.main(["nowhere.py"]))
    assert code == 2
    assert err.startswith("ast-timm: error: rank 1: there is no training script nowhere.py")


def test_timm_that_is_not_installed(timm_runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ast-plugin[timm]'" in said_of(timm_runs.attempt(launcher.main, *SPARSE, script=NEWEST))


def test_errors_of_the_script_itself_pass(timm_runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm_runs.attempt(launcher.main, *SPARSE, "--model", "no_such_model", script=NEWEST)

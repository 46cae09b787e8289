"""The package's own training script: every row of the table of what sub-nets work with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from timm_runs import COLUMNS, EMA, SPARSE, STEPS, SUB_NETS, Run, Runs, figures_of

import ast_plugin
from ast_plugin.integrations.timm import train

pytestmark = pytest.mark.extra("timm")

ROWS = {
    "bfloat16": ("--amp", "--amp-dtype", "bfloat16"),
    "accumulation": ("--grad-accum-steps", "3"),
    "norm": ("--clip-grad", "0.1"),
    "value": ("--clip-grad", "0.001", "--clip-mode", "value"),
    "agc": ("--clip-grad", "0.001", "--clip-mode", "agc"),
    "updates": ("--sched-on-updates",),
    "mixup": ("--mixup", "0.8"),
    "cutmix": ("--cutmix", "1.0", "--no-prefetcher"),
    "average": EMA,
}
OPTIMIZERS = ("adamw", "adafactorbv", "lamb", "lion", "lookahead_adamw", "muon", "rmsproptf")


def check(runs: Runs, run: Run, *, epochs: int = 2, steps: int = STEPS, tolerance: float = 1e-5) -> None:
    """Compare what a run says of itself with its files: the sub-nets in them are as sparse and as good as they say."""
    assert run.columns == COLUMNS
    assert [int(row["epoch"]) for row in run.rows] == list(range(epochs))
    summary = run.summary
    assert summary["steps"] == steps
    for name, sparsity in zip(SUB_NETS, (0.5, 0.8), strict=True):
        assert summary["sub_nets"][name]["sparsity"] == pytest.approx(sparsity, abs=1e-4)
    averaged = run.folder / "elastic_ema.safetensors"
    written = runs.elastic_figures(averaged if averaged.exists() else run.folder / "elastic.safetensors")
    for name, figures in figures_of(run.rows[-1]).items():
        assert written[name]["loss"] == pytest.approx(figures["loss"], rel=tolerance)
        if tolerance < 1e-4:
            assert written[name]["top1"] == pytest.approx(figures["top1"])


def test_a_run_writes_the_sub_nets_that_it_has_measured(timm_runs: Runs) -> None:
    run = timm_runs.own()
    check(timm_runs, run)
    last = figures_of(run.rows[-1])
    assert last["s50"] != last["s80"]
    assert run.rows[-1]["eval_loss"] == run.rows[-1]["eval_s50_loss"]  # the densest goes under the script's own names
    assert sum("Sub-nets: s50 loss" in line for line in run.err.splitlines()) == 2


@pytest.mark.parametrize("row", ROWS)
def test_sub_nets_train_with(row: str, timm_runs: Runs) -> None:
    run = timm_runs.own(*ROWS[row])
    steps = 4 if row == "accumulation" else STEPS
    check(timm_runs, run, steps=steps, tolerance=2e-2 if row == "bfloat16" else 1e-5)
    assert figures_of(run.rows[-1]) != figures_of(timm_runs.own().rows[-1])  # the flag did something


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sub_nets_train_with_the_optimizer(optimizer: str, timm_runs: Runs) -> None:
    run = timm_runs.own("--opt", optimizer, "--lr", "0.001", "--epochs", "1")
    check(timm_runs, run, epochs=1, steps=STEPS // 2)


@pytest.mark.parametrize(("row", "tolerance"), [("--grad-checkpointing", 1e-5), ("--channels-last", 3e-2)])
def test_the_same_training_in_another_way(row: str, tolerance: float, timm_runs: Runs) -> None:
    # Other convolution kernels round otherwise, and 8 steps at this rate make 2 % of it without sub-nets.
    run = timm_runs.own(row)
    check(timm_runs, run)
    losses = [float(row["train_loss"]) for row in timm_runs.own().rows]
    assert [float(row["train_loss"]) for row in run.rows] == pytest.approx(losses, rel=tolerance)


@pytest.mark.slow
def test_a_compiled_model_gives_the_figures_of_an_eager_one(timm_runs: Runs) -> None:
    run = timm_runs.own("--torchcompile", "aot_eager")
    check(timm_runs, run)
    for name, figures in figures_of(timm_runs.own().rows[-1]).items():
        assert figures_of(run.rows[-1])[name] == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_distilled_sub_nets_have_the_names_of_the_student(kind: str, timm_runs: Runs) -> None:
    run = timm_runs.own("--kd-model-name", timm_runs.teacher(), "--kd-distill-type", kind)
    check(timm_runs, run)  # loads the file into a bare network
    assert set(run.state()["shapes"]) <= set(timm_runs.network().state_dict())


def test_an_averaged_student_is_written_and_measured(timm_runs: Runs) -> None:
    run = timm_runs.own("--kd-model-name", timm_runs.teacher(), "--kd-distill-type", "feature", *EMA)
    check(timm_runs, run)
    assert (run.folder / "elastic_ema.safetensors").is_file()


def test_arguments_come_from_a_file_and_flags_are_stronger(timm_runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text(yaml.safe_dump({"ast_sparsities": [0.5, 0.8], "ast_no_report": True, "ast_method": "rigl"}))
    run = timm_runs.once(train.main, "-c", file, "--ast-method", "granet")
    assert run.rows == timm_runs.own().rows
    recorded = yaml.safe_load(run.arguments)
    assert recorded["ast_sparsities"] == [0.5, 0.8]
    assert recorded["ast_method"] == "granet"


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_settings_that_a_run_has_written_make_the_same_run(suffix: str, timm_runs: Runs, tmp_path: Path) -> None:
    first = timm_runs.own("--ast-update-interval", "2", "--ast-drop-fraction", "0.3")
    file = tmp_path / f"settings.{suffix}"
    file.write_text((json.dumps if suffix == "json" else yaml.safe_dump)(first.summary["config"]))
    again = timm_runs.once(train.main, "--ast-config", file, "--ast-no-report")
    assert again.rows == first.rows
    assert again.summary["config"] == first.summary["config"]
    assert again.rows != timm_runs.own().rows


def test_globs_choose_the_weights(timm_runs: Runs) -> None:
    run = timm_runs.own("--ast-include", "layer?.*.weight", "--ast-exclude", "layer1.*", "*bn*", "--epochs", "1")
    pruned = set(run.state()["shapes"])
    assert pruned
    assert {name.split(".")[0] for name in pruned} == {"layer2", "layer3", "layer4"}


def test_a_pattern_holds_in_every_group_of_the_written_sub_net(timm_runs: Runs) -> None:
    run = timm_runs.once(
        train.main, "--ast-sparsities", "0.5", "--ast-pattern", "2:4", "--ast-no-report", "--epochs", "1"
    )
    model = timm_runs.network()
    weights = ast_plugin.load(run.folder / "elastic.safetensors", model).materialize("s50")
    for name, shape in run.state()["shapes"].items():
        flat = weights[name].movedim(1, -1).reshape(-1, shape[1])  # groups lie along the input channels
        assert int((flat.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2, name


def test_another_method_correction_and_rule_are_used(timm_runs: Runs) -> None:
    flags = ("--ast-method", "rigl", "--ast-correction", "off", "--ast-inactive", "freeze")
    run = timm_runs.own(*flags, "--ast-distribution", "uniform", "--epochs", "1")
    config = run.summary["config"]
    assert (config["method"], config["correction"], config["inactive"]) == ("rigl", "off", "freeze")
    assert config["distribution"] == "uniform"


def test_the_sub_net_that_evaluation_shows_can_be_chosen(timm_runs: Runs) -> None:
    run = timm_runs.own("--ast-eval-sub-net", "s80")
    assert [row["eval_loss"] for row in run.rows] == [row["eval_s80_loss"] for row in run.rows]
    assert [row["eval_loss"] for row in run.rows] != [row["eval_s50_loss"] for row in run.rows]


def test_without_flags_it_trains_the_dense_network_alone(timm_runs: Runs) -> None:
    run = timm_runs.once(train.main)
    assert run.columns == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert "task_state" not in run.checkpoint()
    assert {path.name for path in run.folder.iterdir()} == {
        *("args.yaml", "summary.csv", "last.pth.tar", "model_best.pth.tar"),
        *("checkpoint-0.pth.tar", "checkpoint-1.pth.tar"),
    }
    model = timm_runs.network()
    model.load_state_dict(run.checkpoint()["state_dict"])
    assert timm_runs.evaluate(model)["loss"] == pytest.approx(float(run.rows[-1]["eval_loss"]), rel=1e-5)
    assert float((model.fc.weight == 0).sum()) == 0


def test_epochs_without_evaluation_are_trained_all_the_same(timm_runs: Runs) -> None:
    run = timm_runs.own("--val-interval", "2")
    assert [row["epoch"] for row in run.rows] == ["1"]
    assert run.columns == COLUMNS
    assert run.summary["steps"] == STEPS
    written = timm_runs.elastic_figures(run.folder / "elastic.safetensors")
    assert written["s80"]["loss"] == pytest.approx(float(run.rows[0]["eval_s80_loss"]), rel=1e-5)


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_the_run(timm_runs: Runs) -> None:
    run = timm_runs.own("--recovery-interval", "3")
    (path,) = run.folder.glob("recovery-1-*.pth.tar")
    state = run.checkpoint(path.name.removesuffix(".pth.tar"))
    assert state["task_state"]["ast_plugin"]["step"] == STEPS // 2 + 3
    assert "ast_plugin" not in state["optimizer"]  # once is enough


def test_an_exported_sub_net_is_as_good_in_timm_alone(timm_runs: Runs, tmp_path: Path) -> None:
    import timm

    from ast_plugin.cli import main

    run = timm_runs.own()
    for name, file in (("s80", "s80.safetensors"), ("s50", "s50.pth")):
        path = tmp_path / file
        assert main(["export", str(run.folder / "elastic.safetensors"), "--sub-net", name, "--to", str(path)]) == 0
        model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path))
        assert timm_runs.evaluate(model)["loss"] == pytest.approx(figures_of(run.rows[-1])[name]["loss"], rel=1e-5)
    zeros = sum(int((tensor == 0).sum()) for tensor in load_file(tmp_path / "s80.safetensors").values())
    sparse = sum(torch.Size(s).numel() for s in run.state()["shapes"].values())
    assert zeros >= 0.8 * sparse - 1


BAD = {
    "metric of no sub-net": (("--eval-metric", "s90_top1"), "--eval-metric s90_top1: there is no sub-net 's90'"),
    "sub-net": (("--ast-eval-sub-net", "s90"), "'s90'"),
    "method": (("--ast-method", "grannet"), "did you mean 'granet'"),
    "pattern": (("--ast-pattern", "3:2"), "3:2"),
    "distribution": (("--ast-distribution", "unifrom"), "did you mean 'uniform'"),
    "number": (("--ast-drop-fraction", "two"), "drop_fraction"),
    "glob": (("--ast-include", "nowhere*"), "nowhere*"),
    "file": (("--ast-config", "nowhere.yaml"), "--ast-config nowhere.yaml: cannot be read"),
    "second order": (("--opt", "adahessian"), "second derivatives"),
    "checkpoint": (("--resume", "nowhere.pth.tar"), "--resume nowhere.pth.tar: there is no such file"),
    "arguments": (("-c", "nowhere.yaml"), "nowhere.yaml"),
    "metric": (("--eval-metric", "s80_acc"), "validation measures no 'acc'"),
    "model": (("--model", "resnet1"), "--model resnet1: timm has no such model"),
    "optimizer": (("--opt", "adamv"), "--opt adamv: timm has no such optimizer"),
    "folder": (("--data-dir", "nowhere"), "--data-dir nowhere: there is no such folder"),
    "split": (("--val-split", ""), "--val-split must name a split"),
    "epochs": (("--epochs", "0"), "--epochs must be at least 1, got 0"),
    "weights": (("--initial-checkpoint", "nowhere.pth"), "--initial-checkpoint nowhere.pth: there is no such file"),
    "device": (("--device", "gpu"), "--device gpu: PyTorch knows no such device"),
    "output": (("--output", "/dev/null"), "--output /dev/null: cannot be written"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_exit_code_two(kind: str, timm_runs: Runs) -> None:
    flags, said = BAD[kind]
    run = timm_runs.attempt(train.main, *SPARSE, *flags)
    assert run.code == 2
    line = run.err.splitlines()[-1]
    assert "train: error: " in line
    assert said in line
    assert "Traceback" not in run.err
    assert not (run.folder / "summary.csv").exists()


def test_other_flags_want_sparsities(timm_runs: Runs) -> None:
    run = timm_runs.attempt(train.main, "--ast-method", "rigl")
    assert run.code == 2
    assert run.err.splitlines()[-1].startswith("train: error: --ast-method: no effect without --ast-sparsities")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_said_at_once(timm_runs: Runs) -> None:
    for flags in (SPARSE, ()):
        run = timm_runs.attempt(train.main, *flags, "--device", "cuda")
        assert run.code == 2
        assert run.err.splitlines()[-1].startswith("train: error: --device cuda: this PyTorch sees no CUDA device")


def test_a_metric_named_by_its_sub_net_chooses_the_best(timm_runs: Runs) -> None:
    run = timm_runs.own("--eval-metric", "s80_loss", "--ast-method", "rigl")
    losses = [float(row["eval_s80_loss"]) for row in run.rows]
    for epoch, loss in enumerate(losses):
        assert run.checkpoint(f"checkpoint-{epoch}")["metric"] == loss
    assert run.checkpoint("model_best")["epoch"] == losses.index(min(losses))

"""The turning points of a run: what is refused before training, what evaluation returns, what the end writes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from timm_parts import STEPS_PER_EPOCH, arguments, assert_same, network, sgd, snapshot, step, task_of, timm_run
from torch import nn

from ast_plugin.alternation import AlternatingOrder
from ast_plugin.errors import ActivationError, ConfigError, SelectionError, WrapError
from ast_plugin.integrations.timm.run import TimmRun

pytestmark = pytest.mark.extra("timm")


def begun(run: TimmRun, *, epochs: int = 2, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    model = network()
    task, optimizer = task_of(model), sgd(model)
    run.begin(
        model, optimizer, total_steps=epochs * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, task=task, **options
    )
    return model, optimizer, task


def mean_output(model: nn.Module, *_: Any, **__: Any) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        loss = float(model.eval()(torch.randn(2, 3, 32, 32, generator=generator)).square().mean())
    return {"loss": loss, "top1": -loss}


def test_before_the_beginning_evaluation_is_the_scripts_own() -> None:
    model = network()
    assert timm_run().validate(mean_output, model) == mean_output(model)


def test_every_sub_net_is_evaluated_and_the_densest_stands_for_the_run() -> None:
    run = timm_run()
    model, optimizer, task = begun(run)
    for number in range(3):
        step(task, optimizer, number)
    assert run.ast is not None
    expected = {}
    for name in ("s50", "s80"):
        with run.ast.sub_net(name):
            expected[name] = mean_output(model)
    metrics = run.validate(mean_output, model)
    assert list(metrics) == ["loss", "top1", "s50_loss", "s50_top1", "s80_loss", "s80_top1"]
    for name, figures in expected.items():
        assert {metric: metrics[f"{name}_{metric}"] for metric in figures} == figures
        assert run.ast.metrics[name] == figures
    assert metrics["loss"] == expected["s50"]["loss"]
    assert expected["s50"] != expected["s80"]


@pytest.mark.parametrize(("metric", "base", "headline"), [("s80_loss", "loss", "s80"), ("s50_top1", "top1", "s50")])
def test_a_named_sub_net_goes_under_the_scripts_own_names(metric: str, base: str, headline: str) -> None:
    args = arguments(eval_metric=metric)
    run = timm_run(args=args)
    assert args.eval_metric == base  # of which the script knows whether lower is better
    model, *_ = begun(run)
    metrics = run.validate(mean_output, model)
    assert metrics[base] == metrics[f"{headline}_{base}"]


def test_the_log_says_which_sub_net_is_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    suffixes = []

    def validate(model: nn.Module, log_suffix: str = "") -> dict[str, float]:
        suffixes.append(log_suffix)
        return {"loss": 1.0}

    run = timm_run()
    model, *_ = begun(run)
    with caplog.at_level(logging.INFO, "ast_plugin.timm"):
        run.validate(validate, model)
        run.validate(validate, model, log_suffix=" (x)")
    assert suffixes == [" s50", " s80", " (x) s50", " (x) s80"]
    assert "Sub-nets (x): s50 loss 1 | s80 loss 1" in caplog.text


def test_a_function_without_a_suffix_is_given_none() -> None:
    def validate(model: nn.Module, loader: str) -> dict[str, float]:
        assert loader == "loader"
        return {"loss": 1.0}

    run = timm_run()
    model, *_ = begun(run)
    assert run.validate(validate, model, "loader")["s80_loss"] == 1.0


@pytest.mark.parametrize("result", [None, 1.0, (1.0, 2.0)])
def test_an_evaluation_without_metrics_by_name_is_refused(result: object) -> None:
    run = timm_run()
    model, *_ = begun(run)
    before = snapshot(model)
    with pytest.raises(ActivationError, match=f"returned {type(result).__name__}, not metrics by name"):
        run.validate(lambda model: result, model)  # type: ignore[arg-type, return-value]  # what it is about
    assert_same(snapshot(model), before)


def test_another_model_is_not_evaluated_as_sub_nets() -> None:
    run = timm_run()
    begun(run)
    with pytest.raises(ActivationError, match="neither the model of this run nor its moving average"):
        run.validate(mean_output, network(seed=1))


def test_wrappers_around_the_model_do_not_hide_it() -> None:
    run = timm_run()
    model, *_ = begun(run)
    compiled = torch.compile(model, backend="eager")
    suffix = {"log_suffix": ""}
    seen: list[nn.Module] = []

    def validate(model: nn.Module, log_suffix: str) -> Mapping[str, float]:
        seen.append(model)
        return OrderedDict(loss=1.0)

    run.validate(validate, compiled, **suffix)
    assert seen == [compiled, compiled]


def test_the_average_is_evaluated_as_every_sub_net() -> None:
    run = timm_run()
    model = network()
    average = ModelEmaV3(model, decay=0.5)
    task, optimizer = task_of(model), sgd(model)
    run.begin(model, optimizer, total_steps=8, steps_per_epoch=4, task=task, average=average)
    for number in range(4):
        step(task, optimizer, number)
        average.update(model, step=number)
    by_average = run.validate(mean_output, average, log_suffix=" (EMA)")
    by_model = run.validate(mean_output, model)
    assert by_average == run.validate(mean_output, average.module)
    assert all(by_average[name] != by_model[name] for name in by_model)
    assert run.ast is not None
    assert run.ast.metrics["s80"]["loss"] == by_model["s80_loss"]  # files say what the model's sub-nets have


def test_checks_find_mistakes_before_the_data_are_read() -> None:
    model = network()
    for options, said in (
        ({"method": "grannet"}, "did you mean 'granet'"),
        ({"pattern": "5:4"}, "5:4"),
        ({"distribution": "unifrom"}, "did you mean 'uniform'"),
    ):
        with pytest.raises(ConfigError, match=said):
            timm_run(**options).check(sgd(model), model)
    with pytest.raises(SelectionError, match="nowhere"):
        timm_run(include=["nowhere*"]).check(sgd(model), model)


def test_an_optimizer_that_cannot_work_is_refused_early() -> None:
    model = network()
    for name in ("adahessian", "lookahead_adahessian"):
        with pytest.raises(WrapError, match="second derivatives"):
            timm_run().check(create_optimizer_v2(model, opt=name, lr=0.1), model)


def test_a_check_leaves_everything_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    before, hooks = snapshot(model), len(model._forward_pre_hooks)
    with caplog.at_level(logging.INFO, "ast_plugin.timm"):
        timm_run().check(sgd(model), model)
    assert_same(snapshot(model), before)
    assert len(model._forward_pre_hooks) == hooks
    assert "Sub-nets s50, s80 of ResNet: 15 of 47 parameters are pruned" in caplog.text


def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--torchscript: hooks do not run inside a scripted model"):
        timm_run(args=arguments(torchscript=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}: this PyTorch sees no CUDA device"):
        timm_run(args=arguments(device=device))


def test_ranks_without_a_folder_write_nothing(tmp_path: Path) -> None:
    run = timm_run()
    begun(run, epochs=1, output_dir=None)
    assert run.finish() == []


def test_without_an_epoch_there_is_nothing_to_write(caplog: pytest.LogCaptureFixture) -> None:
    assert timm_run().finish() == []
    assert "No epoch was trained" in caplog.text


def test_an_interrupted_run_writes_what_is_there(tmp_path: Path) -> None:
    run = timm_run()
    _, optimizer, task = begun(run, epochs=3, output_dir=tmp_path)

    def epoch() -> str:
        for number in range(STEPS_PER_EPOCH):
            step(task, optimizer, number)
        return "metrics"

    assert run.train(epoch) == "metrics"
    with pytest.raises(KeyboardInterrupt):
        run.train(interrupted)
    with pytest.warns(UserWarning, match=r"its target is 0.[58]00, which the masks reach at step"):
        files = run.finish()
    assert {file.name for file in files} == {"elastic.safetensors", "ast.json"}
    assert run.ast is not None
    assert run.ast.step == STEPS_PER_EPOCH


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_network_of_other_origin_is_trained_by_the_general_rules() -> None:
    # What somebody has registered with timm is created by name as well.
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    ast = timm_run().begin(model, sgd(model), total_steps=4, steps_per_epoch=2)
    assert list(ast.masks.parameters) == [n for n, p in model.named_parameters() if p.ndim == 2]


def test_the_state_has_what_a_checkpoint_needs() -> None:
    run = timm_run()
    assert run.state() == {}
    begun(run)
    assert set(run.state()) == {"ast_plugin"}
    averaged = timm_run()
    model = network()
    averaged.begin(model, sgd(model), total_steps=4, steps_per_epoch=2, average=ModelEmaV3(model))
    assert set(averaged.state()) == {"ast_plugin", "ast_plugin_ema"}


def test_a_model_for_other_input_than_pictures_is_written_without_operations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = timm_run(args=arguments(in_chans=5))
    begun(run, epochs=1, output_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"its target is 0.[58]00"):  # not a step was trained
        run.finish()
    assert "Operations are not counted: ResNet cannot be run on a picture" in caplog.text
    assert (tmp_path / "elastic.safetensors").is_file()


def test_networks_without_private_state_train_too() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    run = timm_run()
    task, optimizer = task_of(model), sgd(model)
    run.begin(model, optimizer, total_steps=4, steps_per_epoch=2, task=task)
    for number in range(4):
        step(task, optimizer, number)
    metrics = run.validate(mean_output, model)
    assert metrics["s50_loss"] != metrics["s80_loss"]


def test_a_metric_that_validation_does_not_return_is_refused() -> None:
    run = timm_run(args=arguments(eval_metric="s80_acc"))
    model, *_ = begun(run)
    with pytest.raises(ConfigError, match="--eval-metric: validation measures no 'acc'"):
        run.validate(mean_output, model)


def test_a_script_without_a_metric_of_its_own_keeps_it_so() -> None:
    run = timm_run(args=arguments(eval_metric=None))
    model, *_ = begun(run)
    assert run.args.eval_metric is None
    assert "s80_top1" in run.validate(mean_output, model)


def test_an_order_that_needs_a_closure_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlternatingOrder, "sub_nets_at", lambda self, step: [0, 1], raising=False)
    model = network()
    with pytest.raises(ConfigError, match=r"'alternating' trains several .* loop calls optimizer"):
        timm_run().check(sgd(model), model)
    assert not model._forward_pre_hooks

"""VR-PGE in timm's scripts: it has the losses of the networks that are drawn, from the script's training task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm_parts import STEPS_PER_EPOCH, network, sgd, step, task_of, timm_run
from timm_runs import NEWEST, OLDER, Runs

from ast_plugin.errors import ConfigError
from ast_plugin.integrations.timm import launcher, train

pytestmark = [pytest.mark.extra("timm"), pytest.mark.extra("channels")]

OPTIONS: dict[str, Any] = {"sparsities": (0.5,), "method": "vr-pge", "pattern": "channel", "slicing": "auto"}
FLAGS = ("--ast-sparsities", "0.5", "--ast-method", "vr-pge", "--ast-pattern", "channel", "--ast-no-report")


def test_a_step_of_the_task_brings_the_losses_and_trains_one_network() -> None:
    run, model = timm_run(**OPTIONS), network()
    task, optimizer = task_of(model), sgd(model)
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    ast = run.begin(model, optimizer, total_steps=2 * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, task=task)
    for number in range(2 * STEPS_PER_EPOCH):
        step(task, optimizer, number)
    assert calls == [False, False, True] * 4 + [False] * 4 + [True] * 4
    assert ast.step == 2 * STEPS_PER_EPOCH
    assert ast.at_target
    model.eval()
    with torch.no_grad():
        task(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    assert calls[-1] is False
    assert len(calls) == 4 * 3 + 8 + 1


def test_a_script_without_a_task_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="outside of a training task"):
        timm_run(**OPTIONS).begin(model, sgd(model), total_steps=8, steps_per_epoch=4)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [(), ("--amp", "--amp-dtype", "bfloat16")], ids=["plain", "amp"])
def test_both_scripts_train_one_network_with_the_budget(timm_runs: Runs, amp: tuple[str, ...]) -> None:
    for run in (
        timm_runs.once(train.main, *FLAGS, *amp),
        timm_runs.once(launcher.main, *FLAGS, *amp, script=NEWEST),
    ):
        assert run.state()["sampler"]["final"].sum() * 2 == len(run.state()["sampler"]["values"])
        assert "eval_s50_top1" in run.columns
    refused = timm_runs.attempt(launcher.main, *FLAGS, script=OLDER)
    assert refused.code == 2
    assert "use the train.py of timm 1.0.23 or newer" in refused.err

"""timm's moving average holds dense weights and the default's BatchNorm; that of the others is averaged beside it."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from timm_parts import assert_same, network, sgd, step, task_of
from torch import nn

from ast_plugin.errors import ConfigError, StateError
from ast_plugin.integrations.timm.average import RunAverage
from ast_plugin.integrations.timm.library import wrap
from ast_plugin.training import AlternatingSparseTraining

pytestmark = pytest.mark.extra("timm")

DECAY = 0.75
RUNNING = "layer1.0.bn1.running_mean"


def training(model: nn.Module) -> tuple[AlternatingSparseTraining, nn.Module, torch.optim.Optimizer]:
    optimizer, task = sgd(model), task_of(model)
    return wrap(optimizer, model, sparsities=(0.5, 0.8), total_steps=20, outermost=task), task, optimizer


def test_private_state_is_averaged_with_the_decay_of_the_average() -> None:
    model = network()
    holder = ModelEmaV3(model, decay=DECAY)
    ast, task, optimizer = training(model)
    average = RunAverage(ast, holder, None)
    expected = {name: ast.private_state(name)[RUNNING] for name in ast.sub_nets}
    for number in range(6):
        step(task, optimizer, number)
        holder.update(model, step=number)
        for name in expected:
            expected[name] = expected[name].lerp(ast.private_state(name)[RUNNING], 1 - holder.get_decay(number))
    for name in ast.sub_nets:
        with average.sub_net(name) as found:
            torch.testing.assert_close(found.get_buffer(RUNNING), expected[name])
    assert holder.get_decay(5) == DECAY
    assert not torch.equal(expected["s50"], expected["s80"])


def test_a_decay_that_warms_up_is_followed() -> None:
    model = network()
    holder = ModelEmaV3(model, decay=DECAY, use_warmup=True)
    ast, task, optimizer = training(model)
    average = RunAverage(ast, holder, None)
    before = average.twin.private_state("s80")[RUNNING]
    for number in range(2):
        step(task, optimizer, number)
    holder.update(model, step=3)
    present = ast.private_state("s80")[RUNNING]
    decay = holder.get_decay(3)
    assert 0 < decay < DECAY
    torch.testing.assert_close(average.twin.private_state("s80")[RUNNING], before.lerp(present, 1 - decay))


def test_an_older_kind_of_average_is_followed() -> None:
    model = network()
    holder = ModelEmaV2(model, decay=DECAY)
    ast, task, optimizer = training(model)
    average = RunAverage(ast, holder, None)
    before = average.twin.private_state("s80")[RUNNING]
    for number in range(2):
        step(task, optimizer, number)
    holder.update(model)
    present = ast.private_state("s80")[RUNNING]
    torch.testing.assert_close(average.twin.private_state("s80")[RUNNING], before.lerp(present, 1 - DECAY))


def test_the_average_itself_is_what_it_would_be_alone() -> None:
    averages = []
    for watched in (False, True):
        model = network()
        holder = ModelEmaV3(model, decay=DECAY)
        ast, task, optimizer = training(model)
        if watched:
            average = RunAverage(ast, holder, None)
        for number in range(4):
            step(task, optimizer, number)
            holder.update(model)
            if watched:
                with average.sub_net("s80"):
                    pass
        averages.append(holder.module.state_dict())
    assert_same(*averages)


def test_the_state_is_resumed() -> None:
    model = network()
    holder = ModelEmaV3(model, decay=DECAY)
    ast, task, optimizer = training(model)
    average = RunAverage(ast, holder, None)
    for number in range(4):
        step(task, optimizer, number)
        holder.update(model)
    again = RunAverage(ast, ModelEmaV3(network(), decay=DECAY), average.state_dict())
    assert_same(again.state_dict(), average.state_dict())
    with pytest.raises(StateError):
        RunAverage(ast, ModelEmaV3(network(), decay=DECAY), {"private": {}, "updates": 1})


def test_something_that_is_no_average_is_refused() -> None:
    ast, _, _ = training(network())
    with pytest.raises(ConfigError, match=r"--model-ema: a ResNet has no update\(\) and decay"):
        RunAverage(ast, network(), None)

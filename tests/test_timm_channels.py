"""Channel sub-nets of timm's networks: groups are found on a picture of the size that the script trains on."""

from __future__ import annotations

import pytest
from timm_parts import STEPS_PER_EPOCH, network, sgd, step, task_of, timm_run

from ast_plugin.integrations.timm.networks import picture_for
from ast_plugin.integrations.timm.run import TimmRun

pytestmark = [pytest.mark.extra("timm"), pytest.mark.extra("channels")]


def test_a_run_of_channel_sub_nets_finds_the_inner_channels_by_itself() -> None:
    run: TimmRun = timm_run(pattern="channel", method="static")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task, optimizer = task_of(model), sgd(model)
    ast = run.begin(model, optimizer, total_steps=8, steps_per_epoch=STEPS_PER_EPOCH, task=task)
    assert ast.groups is not None
    assert all(group.kind == "channels" for group in ast.groups.groups)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    for name, sparsity in (("s50", 0.5), ("s80", 0.8)):
        kept = ast.kept_channels(name)
        units = {group.name: group.units for group in ast.groups.groups}
        assert sum(int(flags.sum()) for flags in kept.values()) == round((1 - sparsity) * sum(units.values()))
    for number in range(8):
        step(task, optimizer, number)
    assert ast.step == 8
    assert ast.statistics()["sub_nets"]["s80"]["dropped_channels"] == pytest.approx(0.8, abs=0.02)


def test_the_picture_has_the_size_that_is_trained_on() -> None:
    run = timm_run()
    assert picture_for(network(), run.args).shape == (1, 3, 32, 32)

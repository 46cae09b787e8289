"""Learning rate schedulers on a wrapped optimizer: torch's, and timm's by epoch and by update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import assert_same, image_batch, snapshot
from optimizer_cases import tiny_net
from optimizer_checks import through_file, train
from scheduler_cases import SchedulerCase, check_scheduler, timm_schedulers, torch_schedulers

import ast_plugin

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("case", torch_schedulers(), ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_scheduler_of_torch(case: SchedulerCase, kind: str) -> None:
    check_scheduler(case, kind, wrapped_first=kind == "SGD")


@pytest.mark.extra("timm")
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
def test_schedulers_of_timm() -> None:
    cases = timm_schedulers()
    assert len(cases) >= 9
    for index, case in enumerate(cases):
        check_scheduler(case, ("SGD", "AdamW")[index % 2], wrapped_first=index % 3 == 0)


def test_a_schedule_with_warm_up_resumes_bit_identically_with_three_sub_nets() -> None:
    def run(seed: int) -> tuple[Any, Any, Any]:
        model = tiny_net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ast_plugin.wrap(optimizer, model, sparsities=(0.3, 0.6, 0.8), total_steps=20, update_interval=3)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)

    def go(parts: tuple[Any, Any, Any], steps: range) -> None:
        for step in steps:
            train(parts[0], parts[1], range(step, step + 1), image_batch)
            parts[2].step()

    straight, first, second = run(0), run(0), run(9)
    go(straight, range(16))
    go(first, range(7))
    states = through_file({str(index): part.state_dict() for index, part in enumerate(first)})
    for index, part in enumerate(second):
        part.load_state_dict(states[str(index)])
    go(second, range(7, 16))
    assert_same(snapshot(straight[0]), snapshot(second[0]))
    assert_same(straight[1].state_dict(), second[1].state_dict())

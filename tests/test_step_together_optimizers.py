"""Steps that train several sub-nets with every optimizer of torch and schedulefree, against gradients added by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_reference import Reference, closure_of
from optimizer_cases import Case, schedule_free_cases, torch_cases
from torch import Tensor

import ast_plugin
from ast_plugin.integrations.family import plugin

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "sparsities": (0.9, 0.3, 0.6),
    "total_steps": 40,
    "method": "static",
}
# One takes sparse gradients alone; the others move weights before they call the closure.
REFUSED = ("SparseAdam", "AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure")
CASES = [*torch_cases(), *schedule_free_cases()]


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in REFUSED], ids=lambda case: case.label)
def test_every_optimizer_trains_as_by_hand(case: Case) -> None:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = case.batches(step)
        return inputs.double(), labels

    model = case.network(0).double()
    optimizer = case.make(model)
    ast = ast_plugin.wrap(optimizer, model, alternation="joint", plugins=[plugin], **OPTIONS)
    reference = Reference(case.network(0).double(), case.make, **OPTIONS)
    for step in range(5):
        optimizer.step(closure_of(model.train(), optimizer, [batch(step)]))
        reference.train([batch(step)])
    assert ast.step == 5
    assert max(reference.differences(model, ast).values()) < 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case.name in REFUSED], ids=lambda case: case.label)
def test_what_cannot_work_with_a_closure_says_so(case: Case) -> None:
    model = case.network(0)
    optimizer = case.make(model)

    def train() -> None:
        ast_plugin.wrap(optimizer, model, alternation="joint", plugins=[plugin], **OPTIONS)
        optimizer.step(closure_of(model.train(), optimizer, [case.batches(0)]))

    with pytest.raises((ast_plugin.WrapError, ast_plugin.ActivationError), match=case.name):
        train()
    assert all(torch.isfinite(p).all() for p in model.parameters())

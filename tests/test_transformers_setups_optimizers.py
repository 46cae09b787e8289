"""Optimizers of the Trainer: those that ``optim=`` names, those that are given, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, sgd, snapshot
from torch import nn
from torch.optim.lr_scheduler import StepLR
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers_loops import assert_as_loop, assert_as_plain, assert_runs_agree
from transformers_runs import SUB_NETS, gpt2, logged, sparse, trainer_of

from ast_plugin.errors import WrapError

pytestmark = pytest.mark.extra("hf")

OPTIM = ["adafactor", "adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"]
SCHEDULE_FREE = ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"]


@pytest.mark.parametrize("name", [*OPTIM, *SCHEDULE_FREE])
def test_optimizers_by_name(tmp_path: Path, name: str) -> None:
    given = {"optim": name, "learning_rate": 0.1 if name.endswith("sgd") else 0.01}
    assert_as_plain(tmp_path, **given)
    assert_as_loop(tmp_path, **given)


def given_pair(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
    return optimizer, StepLR(optimizer, 5, gamma=0.5)


def given_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    return sgd(model), None


@pytest.mark.parametrize("optimizers", [given_pair, given_optimizer])
def test_optimizers_that_are_given(tmp_path: Path, optimizers: Callable[[nn.Module], Any]) -> None:
    assert_as_plain(tmp_path, optimizers=optimizers)
    assert_as_loop(tmp_path, optimizers=optimizers)


def layerwise(model: nn.Module) -> torch.optim.Optimizer:
    """As the Trainer makes GaLore's and APOLLO's: one optimizer a parameter, stepped while gradients arrive."""
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    return LayerWiseDummyOptimizer(optimizer_dict=optimizers)


class FusedBackward(torch.optim.SGD):
    """As LOMO: the step is part of backward."""

    def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (layerwise, r"a hook on parameter .* steps an optimizer inside backward"),
        (lambda model: FusedBackward(model.parameters(), lr=0.1), r"FusedBackward steps inside backward"),
    ],
)
def test_optimizers_that_step_in_backward_are_refused_before_the_first_step(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer], reason: str
) -> None:
    model = gpt2()
    before = snapshot(model)
    callback = sparse()
    with pytest.raises(WrapError, match=reason):
        trainer_of(tmp_path, callback, model=model, optimizers=(make(model), None)).train()
    assert callback.ast is None
    assert_same(snapshot(model), before)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_evaluation_between_steps_is_that_of_the_averaged_weights(tmp_path: Path, name: str) -> None:
    assert_as_plain(tmp_path, optim=name, **EVALUATED)
    callback = sparse()
    trainer = trainer_of(tmp_path, callback, optim=name, **EVALUATED)
    trainer.train()
    every = trainer.evaluate()
    for sub_net in SUB_NETS:
        assert callback.ast is not None
        alone = trainer_of(tmp_path, model=gpt2(seed=1))
        trainer.optimizer.eval()
        alone.model.load_state_dict(callback.ast.materialize(sub_net))
        assert alone.evaluate()["eval_loss"] == pytest.approx(every[f"eval_{sub_net}_loss"], rel=1e-5)
        trainer.optimizer.train()
        alone.model.load_state_dict(callback.ast.materialize(sub_net))
        assert alone.evaluate()["eval_loss"] != pytest.approx(every[f"eval_{sub_net}_loss"], rel=1e-5)
    assert len(logged(trainer, "eval_s80_loss")) == 5
    never = trainer_of(tmp_path, other := sparse(), optim=name)
    never.train()
    assert other.ast is not None
    assert_runs_agree(other.ast, callback.ast, rtol=1e-4)

"""What is refused before a run begins, without touching anything."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from networks import assert_same, conv_net, sgd, snapshot
from torch import nn

import ast_plugin
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ConfigError, SelectionError, WrapError
from ast_plugin.hookspecs import hookimpl
from ast_plugin.methods import RIGL, Method
from ast_plugin.parameters import select_parameters
from ast_plugin.preview import check_run


def config(**options: Any) -> ASTConfig:
    return ASTConfig(**{"sparsities": (0.5, 0.9), "total_steps": 100, **options})


def test_a_run_that_can_begin_gives_the_verdict_that_wrap_gives() -> None:
    model = conv_net()
    optimizer, before = sgd(model), snapshot(model)
    choices = check_run(config(exclude=("head.*",)), nn.DataParallel(model), optimizer=optimizer)
    assert_same(snapshot(model), before)
    ast = ast_plugin.wrap(optimizer, model, config(exclude=("head.*",)))
    assert [choice.name for choice in choices if choice.prunable] == list(ast.masks.parameters)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "granit"}, ConfigError, "granet"),
        ({"pattern": "diagonal"}, ConfigError, "diagonal"),
        ({"distribution": "erks"}, ConfigError, "erk"),
        ({"alternation": "alternately"}, ConfigError, "alternating"),
        ({"alternation": "fixed:s95"}, ConfigError, "s95"),
        ({"include": ("nothing.*",)}, SelectionError, "matches no parameter"),
    ],
)
def test_what_cannot_begin_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_run(config(**options), conv_net())


def test_an_order_by_epochs_is_no_obstacle_while_their_length_is_unknown() -> None:
    assert check_run(config(alternation="single_path"), conv_net())


def test_a_pattern_that_a_weight_cannot_carry_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    with pytest.raises(ConfigError, match=r"1\.weight has shape"):
        check_run(config(), model)


def test_an_optimizer_that_cannot_train_sub_nets_is_refused() -> None:
    model = conv_net()
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    with pytest.raises(WrapError, match="SparseAdam"):
        check_run(config(), model, optimizer=optimizer)


def test_the_name_of_a_method_that_is_given_as_an_object_means_nothing() -> None:
    with pytest.raises(ConfigError):
        check_run(config(method="mine"), conv_net())
    assert check_run(config(method="mine"), conv_net(), method=dataclasses.replace(RIGL, name="mine"))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Taking(Method):
    """A method that takes the head over, and prunes nothing else."""

    log: list[str] = dataclasses.field(default_factory=list)

    @hookimpl
    def ast_select_parameters(self, model: nn.Module) -> Any:
        self.log.append("select")
        return select_parameters(model, include=["head.weight"])


def test_a_method_takes_over_for_the_length_of_the_call_alone() -> None:
    log: list[str] = []

    def take_over(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        log.append("take over")
        return lambda: log.append("undo")

    model = conv_net()
    method = Taking(name="taking", description="", take_over=take_over, log=log)
    choices = check_run(config(), model, optimizer=sgd(model), method=method)
    assert [choice.name for choice in choices if choice.prunable] == ["head.weight"]
    assert log == ["take over", "select", "undo"]
    log.clear()
    with pytest.raises(SelectionError):
        check_run(config(), nn.Identity(), optimizer=sgd(model), method=method)
    assert log == ["take over", "select", "undo"]
    assert check_run(config(), model, method=method) == []  # without an optimizer it is not asked


class HeadAlone:
    @hookimpl
    def ast_select_parameters(self, model: nn.Module) -> Any:
        return select_parameters(model, include=["head.weight"])


def test_plugins_of_the_run_are_asked() -> None:
    choices = check_run(config(), conv_net(), plugins=[HeadAlone()])
    assert [choice.name for choice in choices if choice.prunable] == ["head.weight"]

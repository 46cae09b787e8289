"""The mixin: the same run for people who write a Trainer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from networks import assert_same, snapshot
from transformers import Trainer
from transformers_runs import BUSY, arguments_of, gpt2, sparse, texts, trainer_of

from ast_plugin import ASTConfig
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.transformers import ASTTrainerMixin

pytestmark = pytest.mark.extra("hf")


class Mine(ASTTrainerMixin, Trainer):
    """A Trainer with sub-nets, and something of its own."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().training_step(*args, **kwargs)


def mine(folder: Path, **given: Any) -> Mine:
    data: dict[str, Any] = {"train_dataset": texts(), "eval_dataset": texts(8, seed=1)}
    return Mine(model=gpt2(), args=arguments_of(folder), **data, **given)


def given_as(kind: str) -> Any:
    return {"mapping": BUSY, "config": ASTConfig(**BUSY, seed=3), "callback": sparse()}[kind]


@pytest.mark.parametrize("kind", ["mapping", "config", "callback"])
def test_it_trains_as_the_callback_does(tmp_path: Path, kind: str) -> None:
    usual = trainer_of(tmp_path, sparse())
    usual.train()
    trainer = mine(tmp_path, ast=given_as(kind))
    trainer.train()
    assert trainer.steps == 16
    assert trainer.ast_callback is not None
    assert trainer.ast_callback.ast is not None
    assert trainer.callback_handler.callbacks[0] is trainer.ast_callback
    assert_same(snapshot(trainer.model), snapshot(usual.model))
    assert "eval_s90_loss" in trainer.evaluate()


def test_without_settings_it_is_the_trainer(tmp_path: Path) -> None:
    usual = trainer_of(tmp_path)
    usual.train()
    trainer = mine(tmp_path)
    assert trainer.ast_callback is None
    trainer.train()
    assert_same(snapshot(trainer.model), snapshot(usual.model))


def test_what_is_no_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got float"):
        mine(tmp_path, ast=0.9)
    with pytest.raises(ConfigError, match="one ASTCallback"):
        mine(tmp_path, ast=BUSY, callbacks=[sparse()])

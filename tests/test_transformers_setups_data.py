"""Data of the Trainer: how they are ordered, streams, several evaluation sets, and training that ends by a metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import assert_same, sgd, snapshot
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer
from transformers_loops import assert_as_loop, assert_as_plain
from transformers_runs import BUSY, SUB_NETS, Stop, figures, gpt2, known, logged, sparse, texts, trainer_of

import ast_plugin
from ast_plugin.integrations.transformers import TransformersSelection
from ast_plugin.integrations.transformers.state import read_state

pytestmark = pytest.mark.extra("hf")

_STRATEGY = known("train_sampling_strategy", "group_by_length")
BY_LENGTH = {_STRATEGY: "group_by_length" if _STRATEGY.startswith("train") else True}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of texts of several lengths; what was added is no label."""
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([row["input_ids"] for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": (labels >= 0).long()}


def uneven() -> list[dict[str, Tensor]]:
    return texts(32, lengths=(4, 20))


@pytest.mark.parametrize("steps", [1, 3])
def test_batches_of_texts_of_one_length(tmp_path: Path, steps: int) -> None:
    given = {"train_dataset": uneven, "data_collator": padded, "gradient_accumulation_steps": steps, **BY_LENGTH}
    assert_as_plain(tmp_path, **given)
    trainer = assert_as_loop(tmp_path, **given)
    lengths = [inputs["input_ids"].shape[1] for step in trainer.steps for inputs, *_ in step]
    assert len(set(lengths)) > 4


class Stream(IterableDataset):
    """Texts one after the other, without a length."""

    def __init__(self, count: int = 1000) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for seed in range(self.count):
            yield texts(1, seed=seed)[0]


@pytest.mark.parametrize("count", [1000, 20], ids=["endless", "of five batches an epoch"])
def test_streams(tmp_path: Path, count: int) -> None:
    given = {"train_dataset": lambda: Stream(count), "max_steps": 14}
    assert_as_plain(tmp_path, **given)
    assert_as_loop(tmp_path, **given)


def test_training_may_end_between_two_micro_batches(tmp_path: Path) -> None:
    # The gradient of the first is there, and stays; the sub-nets are as far as they had come.
    given = {"gradient_accumulation_steps": 2, "max_steps": 12}

    def train(trainer: Trainer) -> None:
        trainer.add_callback(Stop(5, "on_substep_end"))
        trainer.train()
        assert trainer.state.global_step == 5

    assert_as_plain(tmp_path, train=train, **given)
    callbacks = sparse(method="granet"), sparse(method="granet")
    trainer = trainer_of(tmp_path, callbacks[0], Stop(5, "on_substep_end"), **given)
    other = trainer_of(tmp_path, callbacks[1], Stop(5), **given)
    trainer.train()
    other.train()
    for ast in (callback.ast for callback in callbacks):
        assert ast is not None
        assert ast.step == 5
        assert [ast.is_near_target(name) for name in SUB_NETS] == [False, False, False]
    assert trainer.model.lm_head.weight.grad is not None
    assert other.model.lm_head.weight.grad is None
    assert_same(snapshot(trainer.model), snapshot(other.model))
    assert figures(trainer.evaluate()) == {**figures(other.evaluate()), "epoch": trainer.state.epoch}


def test_an_evaluation_before_the_first_step_is_of_the_first_masks(tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 4}
    assert_as_plain(tmp_path, eval_on_start=True, **given)
    first, later = sparse(), sparse()
    trainer, other = (
        trainer_of(tmp_path, callback, eval_on_start=start, **given)
        for callback, start in ((first, True), (later, False))
    )
    trainer.train()
    other.train()
    assert_same(snapshot(trainer.model), snapshot(other.model))
    for name in SUB_NETS:
        losses = logged(trainer, f"eval_{name}_loss")
        assert losses[1:] == logged(other, f"eval_{name}_loss")

        model = gpt2()
        ast = ast_plugin.wrap(sgd(model), model, total_steps=16, plugins=[TransformersSelection()], seed=3, **BUSY)
        alone = trainer_of(tmp_path, model=gpt2())
        alone.model.load_state_dict(ast.materialize(name))
        assert losses[0] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"near": texts(8, seed=1), "far": texts(8, seed=2)}
    given = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_far_s80_loss",
    }
    callback = sparse()
    trainer = trainer_of(tmp_path, callback, eval_dataset=sets, **given)
    trainer.train()
    every = figures(trainer.evaluate())
    for name, data in sets.items():
        alone = figures(trainer.evaluate(data, metric_key_prefix=f"eval_{name}"))
        assert alone == {key: value for key, value in every.items() if name in key or key == "epoch"}
        for sub_net in SUB_NETS:
            assert len(logged(trainer, f"eval_{name}_{sub_net}_loss")) >= 4
            with callback.sub_net(sub_net):
                assert every[f"eval_{name}_{sub_net}_loss"] == trainer.evaluate(data)["eval_loss"]
    assert every["eval_far_s80_loss"] == trainer.state.best_metric
    assert every["eval_far_loss"] != every["eval_near_loss"]


def test_training_stops_where_the_metric_of_a_sub_net_grows_no_better(tmp_path: Path) -> None:
    given = {
        "learning_rate": 0.1,
        "num_train_epochs": 10,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
    }

    def train(trainer: Trainer) -> None:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        trainer.train()
        assert 4 < trainer.state.global_step < trainer.state.max_steps

    assert_as_plain(tmp_path / "plain", train=train, **given)
    callback = sparse()
    trainer = trainer_of(tmp_path, callback, metric_for_best_model="eval_s80_loss", **given)
    train(trainer)
    losses = logged(trainer, "eval_s80_loss")
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    folder = tmp_path / f"checkpoint-{4 * (best + 1)}"
    assert Path(trainer.state.best_model_checkpoint) == folder
    assert callback.ast is not None
    found = read_state(folder)
    assert found is not None
    assert_same(callback.ast.state_dict()["masks"], found.run["masks"])
    assert trainer.evaluate()["eval_s80_loss"] == losses[best]

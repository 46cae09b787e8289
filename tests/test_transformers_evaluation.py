"""Evaluation of every sub-net: what the Trainer returns, logs and shows, and which model is the best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, snapshot
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, ProgressCallback, Trainer, TrainerCallback
from transformers_runs import SUB_NETS, figures, gpt2, logged, pictures, resnet, sparse, texts, trainer_of

from ast_plugin.integrations.transformers import ASTCallback
from ast_plugin.integrations.transformers.state import read_state
from ast_plugin.training_exchange import with_plain_entries

pytestmark = pytest.mark.extra("hf")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def picture_trainer(folder: Path, *callbacks: TrainerCallback, **given: Any) -> Trainer:
    usual: dict[str, Any] = {
        "model": resnet(),
        "train_dataset": pictures(32),
        "eval_dataset": pictures(16, seed=1),
        "compute_metrics": accuracy,
    }
    return trainer_of(folder, *callbacks, **{**usual, **given})


class Told(TrainerCallback):
    """Keeps what the Trainer reports."""

    def __init__(self) -> None:
        self.evaluated: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.evaluated.append(dict(metrics))

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logged.append(dict(logs))


def test_every_sub_net_has_the_metrics_of_the_network_that_it_is(tmp_path: Path) -> None:
    trainer = picture_trainer(tmp_path, callback := sparse())
    trainer.train()
    ast = callback.ast
    assert ast is not None
    metrics = figures(trainer.evaluate())
    names = ("loss", "accuracy")
    assert set(metrics) == {
        "epoch",
        *(f"eval_{name}" for name in names),
        *(f"eval_{sub_net}_{name}" for sub_net in SUB_NETS for name in (*names, "sparsity")),
    }
    for name in SUB_NETS:
        alone = resnet()
        alone.load_state_dict(ast.materialize(name))
        plain = picture_trainer(tmp_path, model=alone).evaluate()
        assert metrics[f"eval_{name}_loss"] == plain["eval_loss"]
        assert metrics[f"eval_{name}_accuracy"] == plain["eval_accuracy"]
        assert metrics[f"eval_{name}_sparsity"] == ast.masks.sparsity(name)
        assert ast.metrics[name] == {"loss": plain["eval_loss"], "accuracy": plain["eval_accuracy"]}
    assert metrics["eval_loss"] == metrics["eval_s50_loss"]
    assert len({metrics[f"eval_{name}_loss"] for name in SUB_NETS}) == 3


def test_callbacks_and_log_are_told_once_with_everything(tmp_path: Path) -> None:
    trainer = picture_trainer(tmp_path, told := Told(), sparse(), eval_strategy="epoch")
    trainer.train()
    assert len(told.evaluated) == 2
    for metrics in told.evaluated:
        assert {"eval_loss", "eval_accuracy", "eval_s50_loss", "eval_s80_accuracy", "eval_s90_sparsity"} <= set(metrics)
    assert [entry for entry in told.logged if "eval_loss" in entry] == told.evaluated
    assert logged(trainer, "eval_s90_accuracy") == [metrics["eval_s90_accuracy"] for metrics in told.evaluated]
    assert len(logged(trainer, "eval_loss")) == 2


def test_tensorboard_gets_a_curve_for_every_sub_net(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture_trainer(tmp_path, sparse(), eval_strategy="epoch", report_to="tensorboard", save_strategy="epoch").train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    assert {f"eval/{name}_accuracy" for name in SUB_NETS} <= set(found.Tags()["scalars"])


def test_a_progress_bar_counts_the_batches_of_one_sub_net(tmp_path: Path) -> None:
    bars: list[tuple[int, int]] = []

    class Watched(ProgressCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            super().on_prediction_step(*args, **kwargs)
            assert self.prediction_bar is not None
            bars.append((self.prediction_bar.n, self.prediction_bar.total))

    trainer = picture_trainer(tmp_path, sparse(), disable_tqdm=False)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(watched := Watched())
    trainer.train()
    trainer.evaluate()
    assert bars == [(1, 2), (2, 2)] * 3
    assert watched.prediction_bar is None


def test_inside_a_block_evaluation_is_that_of_the_chosen_sub_net_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback := sparse())
    trainer.train()
    every = figures(trainer.evaluate())
    with callback.sub_net("s90"):
        chosen = figures(trainer.evaluate())
        predicted = trainer.predict(texts(8, seed=1))
    assert chosen == {"eval_loss": every["eval_s90_loss"], "epoch": 2.0}
    assert predicted.metrics is not None
    assert predicted.metrics["test_loss"] == every["eval_s90_loss"]
    without = trainer.predict(texts(8, seed=1))
    assert without.metrics is not None
    assert without.metrics["test_loss"] == every["eval_s50_loss"]


def test_a_sub_net_generates_as_the_model_that_it_is(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback := sparse())
    trainer.train()
    ast = callback.ast
    assert ast is not None
    alone = gpt2()
    alone.load_state_dict(ast.materialize("s90"))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_scores": True}
    given = {"input_ids": texts(2)[0]["input_ids"][None, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    before = snapshot(trainer.model)
    with callback.sub_net("s90"):
        mine = trainer.model.eval().generate(**given, **options, return_dict_in_generate=True)
    plain = alone.eval().generate(**given, **options, return_dict_in_generate=True)
    assert torch.equal(mine.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(mine.scores, plain.scores, strict=True))
    assert_same(snapshot(trainer.model), before)


def test_several_sets_and_prefixes_are_evaluated_for_every_sub_net(tmp_path: Path) -> None:
    sets = {"one": texts(8, seed=1), "two": texts(8, seed=2)}
    trainer = trainer_of(tmp_path, callback := sparse(), eval_dataset=sets)
    trainer.train()
    metrics = trainer.evaluate()
    assert {f"eval_{data}_{name}_loss" for data in sets for name in SUB_NETS} <= set(metrics)
    assert metrics["eval_two_s80_loss"] == trainer.evaluate(sets["two"])["eval_s80_loss"]
    assert metrics["eval_two_s80_loss"] == trainer.evaluate(sets["two"], None, "held_out")["held_out_s80_loss"]
    assert metrics["eval_one_s90_loss"] != metrics["eval_two_s90_loss"]
    assert callback.ast is not None
    assert set(callback.ast.metrics["s80"]) == {"one_loss", "two_loss", "loss", "held_out_loss"}


def test_a_trainer_with_an_evaluate_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Perplexing(Trainer):
        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics[f"{metric_key_prefix}_perplexity"] = math.exp(metrics[f"{metric_key_prefix}_loss"])
            return metrics

    trainer = trainer_of(tmp_path, sparse(), kind=Perplexing)
    trainer.train()
    metrics = trainer.evaluate()
    for name in SUB_NETS:
        assert metrics[f"eval_{name}_perplexity"] == math.exp(metrics[f"eval_{name}_loss"])


def test_an_evaluate_may_take_other_arguments(tmp_path: Path) -> None:
    class Answering(Trainer):
        """As in scripts for answering questions: one more argument stands before the prefix."""

        def evaluate(  # type: ignore[override]
            self,
            eval_dataset: Any = None,
            eval_examples: Any = None,
            ignore_keys: list[str] | None = None,
            metric_key_prefix: str = "eval",
        ) -> dict[str, float]:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix) | {f"{metric_key_prefix}_exact": 1.0}

    class Plain(Trainer):
        def evaluate(  # type: ignore[override]
            self, eval_dataset: Any = None, ignore_keys: list[str] | None = None
        ) -> dict[str, float]:
            return super().evaluate(eval_dataset, ignore_keys)

    plain = trainer_of(tmp_path, callback := sparse(), kind=Plain, max_steps=6, eval_strategy="steps", eval_steps=6)
    plain.train()
    expected = plain.evaluate(texts(8, seed=2))
    for name in SUB_NETS:
        with callback.sub_net(name):
            assert plain.evaluate(texts(8, seed=2))["eval_loss"] == expected[f"eval_{name}_loss"]
    answering: Any = trainer_of(tmp_path, sparse(), kind=Answering, max_steps=6, eval_strategy="steps", eval_steps=6)
    answering.train()
    metrics = answering.evaluate(texts(8, seed=2), ["examples"], None, "held_out")
    for name in SUB_NETS:
        assert metrics[f"held_out_{name}_loss"] == expected[f"eval_{name}_loss"]
        assert metrics[f"held_out_{name}_exact"] == 1.0


def test_metrics_that_have_the_prefix_already_are_those_of_each_sub_net(tmp_path: Path) -> None:
    trainer = picture_trainer(tmp_path, sparse(), compute_metrics=lambda given: {"eval_accuracy": 0.5})
    trainer.train()
    metrics = figures(trainer.evaluate())
    assert [metrics[name] for name in ("eval_accuracy", *(f"eval_{name}_accuracy" for name in SUB_NETS))] == [0.5] * 4
    assert not any("eval_accuracy" in name.removeprefix("eval_") for name in metrics)


def test_metrics_that_a_trainer_adds_when_it_logs_are_those_of_each_sub_net(tmp_path: Path) -> None:
    class Counting(Trainer):
        """As TRL's: figures are collected while batches pass, and come out in the log, under the usual prefix."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[float] = []

        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            if not model.training:
                self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self.losses:
                logs = {**logs, "eval_highest": max(self.losses)}
                self.losses.clear()
            super().log(logs, *args, **kwargs)

    trainer = trainer_of(tmp_path, callback := sparse(), kind=Counting, eval_strategy="epoch", eval_dataset=texts(20))
    trainer.train()
    metrics = trainer.evaluate()
    highest = [metrics[f"eval_{name}_highest"] for name in SUB_NETS]
    assert len(set(highest)) == 3
    assert metrics["eval_highest"] == highest[0]
    assert logged(trainer, "eval_s90_highest")[-1] == highest[-1]
    with callback.sub_net("s90"):
        trainer.evaluate()
    assert logged(trainer, "eval_highest")[-1] == highest[-1]
    assert len(logged(trainer, "eval_loss")) == 4


def test_an_error_inside_evaluation_leaves_trainer_and_model_as_they_were(tmp_path: Path) -> None:
    calls: Iterator[int] = iter(range(100))

    def failing(prediction: EvalPrediction) -> dict[str, float]:
        if next(calls) == 1:
            raise RuntimeError("no metric today")
        return {"accuracy": 0.0}

    trainer = picture_trainer(tmp_path, told := Told(), callback := sparse(), compute_metrics=failing)
    trainer.train()
    before, attributes = snapshot(trainer.model), set(vars(trainer))
    with pytest.raises(RuntimeError, match="no metric today"):
        trainer.evaluate()
    assert not logged(trainer, "eval_loss")
    assert_same(snapshot(trainer.model), before)
    assert set(vars(trainer)) == attributes
    assert callback.ast is not None
    assert callback.ast.chosen is None
    assert told.evaluated == []
    trainer.evaluate()
    assert len(told.evaluated) == 1


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_an_interrupt_inside_evaluation_leaves_a_dense_model(tmp_path: Path, method: str) -> None:
    trainer = trainer_of(tmp_path, sparse(), max_steps=6)
    trainer.train()
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = trainer.model.transformer.h[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        getattr(trainer, method)(texts(8, seed=1))
    handle.remove()
    assert torch.equal(weight, before)


def test_another_model_in_the_trainer_has_no_metrics_of_sub_nets(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(), max_steps=6)
    trainer.train()
    trainer.model = trainer.model_wrapped = gpt2(seed=1)
    assert set(figures(trainer.evaluate())) == {"eval_loss", "epoch"}


def test_eval_on_start_evaluates_the_first_masks(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(), eval_on_start=True, eval_strategy="epoch")
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert first["step"] == 0
    assert first["eval_s90_sparsity"] == pytest.approx(0.9, abs=1e-3)


BEST: dict[str, Any] = {
    "num_train_epochs": 3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_by_a_sub_net_comes_back_with_masks_and_private_state(tmp_path: Path, only_model: bool) -> None:
    trainer = picture_trainer(
        tmp_path,
        callback := sparse(),
        metric_for_best_model="eval_s80_loss",
        greater_is_better=True,  # so that it is not the last one
        save_only_model=only_model,
        **BEST,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_s80_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=lambda step: losses[step])
    assert best < 20
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_s80_loss"] == losses[best]
    state = read_state(tmp_path / f"checkpoint-{best}")
    assert state is not None
    assert callback.ast is not None
    now, then = (with_plain_entries(found) for found in (callback.ast.state_dict(), state.run))
    assert_same(now["masks"], then["masks"])
    assert_same(now["normalization"]["tensors"], then["normalization"]["tensors"])
    assert now["metrics"]["s80"]["loss"] == losses[best]


def test_on_the_way_to_its_sparsity_no_sub_net_is_the_best(tmp_path: Path) -> None:
    callback = ASTCallback(sparsities=(0.5, 0.95))  # sparser and sparser until half of the run
    trainer = trainer_of(
        tmp_path,
        callback,
        EarlyStoppingCallback(1),
        metric_for_best_model="eval_s95_sparsity",  # best at the beginning
        greater_is_better=False,
        **BEST,
    )
    trainer.train()
    sparsity = {
        entry["step"]: entry["eval_s95_sparsity"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    assert min(sparsity.values()) < 0.5
    assert trainer.state.best_metric == pytest.approx(0.95, abs=5e-4)
    assert trainer.state.best_metric == sparsity[trainer.state.best_global_step]
    assert trainer.state.best_global_step == min(step for step, found in sparsity.items() if found > 0.9495)
    assert trainer.state.global_step == trainer.state.best_global_step + 2  # early stopping counts from there


def test_saving_the_best_alone_begins_when_the_sub_net_is_there(tmp_path: Path) -> None:
    callback = ASTCallback(sparsities=(0.5, 0.95))
    options = {**BEST, "save_strategy": "best", "load_best_model_at_end": False}
    trainer = trainer_of(tmp_path, callback, metric_for_best_model="eval_s95_loss", greater_is_better=True, **options)
    trainer.train()
    evaluated = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    saved = sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.glob("checkpoint-*"))
    there = [step for step, entry in evaluated.items() if entry["eval_s95_sparsity"] > 0.9495]
    assert saved[0] == there[0] > 2
    assert all((tmp_path / f"checkpoint-{step}" / "ast_state.pt").is_file() for step in saved)


def test_a_metric_that_nobody_measures_is_refused_by_the_trainer_with_all_there_are(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, sparse(method="static"), metric_for_best_model="s90_bleu", **BEST)
    with pytest.raises(KeyError, match="eval_s90_loss"):
        trainer.train()

"""Sup-tickets in the Trainer: superposed sub-nets are measured, written, estimated from its data, and resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, snapshot
from transformers import Trainer
from transformers_runs import SUB_NETS, gpt2, pictures, resnet, sparse, texts, trainer_of

import ast_plugin
from ast_plugin.integrations.family import SupTickets
from ast_plugin.integrations.transformers import ASTCallback, attach
from ast_plugin.training_exchange import with_plain_entries

pytestmark = pytest.mark.extra("hf")

# 36 steps, of which the last 18 are two cycles of nine.
LONG: dict[str, Any] = {"max_steps": 36}
EARLY: dict[str, Any] = {"end_step": 0.4}


def tickets(**settings: Any) -> SupTickets:
    return SupTickets(2, share=0.5, **settings)


def convolutional(folder: Path, callback: ASTCallback, **given: Any) -> Trainer:
    data = {"model": resnet(), "train_dataset": pictures(32), "eval_dataset": pictures(8, seed=1)}
    return trainer_of(folder, callback, **{**LONG, **data, **given})


def test_the_last_evaluation_measures_the_superposed_sub_nets_too_and_earlier_ones_do_not(tmp_path: Path) -> None:
    callback = sparse(sup_tickets=tickets(), **EARLY)
    trainer = trainer_of(tmp_path, callback, **LONG, eval_strategy="steps", eval_steps=12)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_s90_loss" in entry]
    assert [("eval_s90_superposed_loss" in entry, entry["step"]) for entry in entries] == [
        (False, 12),
        (False, 24),
        (True, 36),
    ]
    found = trainer.evaluate()
    assert callback.ast is not None
    for name in SUB_NETS:
        with callback.ast.version("superposed"), callback.ast.sub_net(name):
            own = trainer.evaluate()
        assert own["eval_loss"] == pytest.approx(found[f"eval_{name}_superposed_loss"], rel=1e-6)
        assert found[f"eval_{name}_superposed_loss"] != found[f"eval_{name}_loss"]
        assert found[f"eval_{name}_superposed_sparsity"] == pytest.approx(found[f"eval_{name}_sparsity"])
        with callback.ast.version("superposed"):
            assert callback.ast.metrics[name]["loss"] == pytest.approx(own["eval_loss"])


def test_what_is_saved_are_the_superposed_sub_nets_and_beside_them_the_last_ones(tmp_path: Path) -> None:
    callback = attach(trainer_of(tmp_path, **LONG), sup_tickets=tickets(), sparsities=(0.5, 0.8), **EARLY)
    assert callback.ast is None
    trainer = callback._binding.trainer  # type: ignore[union-attr]
    trainer.train()
    trainer.save_model()
    ast = callback.ast
    assert ast is not None
    summary = json.loads((tmp_path / "ast_config.json").read_text())
    assert summary["files"] == ["elastic.safetensors", "elastic_last.safetensors"]
    batch = {"input_ids": torch.stack([row["input_ids"] for row in texts(4, seed=7)])}
    for file, version in (("elastic", "superposed"), ("elastic_last", "last")):
        model = gpt2(seed=5)
        elastic = ast_plugin.load(tmp_path / f"{file}.safetensors", model)
        for name in ast.sub_nets:
            with ast.version(version), ast.sub_net(name), torch.no_grad():
                wanted = ast.model.eval()(**batch).logits
            with elastic.sub_net(name), torch.no_grad():
                torch.testing.assert_close(model.eval()(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("evaluated", [True, False])
def test_batch_norm_of_the_superposed_sub_nets_comes_from_the_training_data(tmp_path: Path, evaluated: bool) -> None:
    made = tickets(max_batches=3)
    callback = sparse(sup_tickets=made, **EARLY)
    given = {"eval_strategy": "steps", "eval_steps": 36} if evaluated else {}
    convolutional(tmp_path, callback, **given).train()
    assert made.recomputed


def test_data_that_the_model_cannot_be_fed_leave_the_averages_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Named(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            inputs = {"pixel_values": inputs["pictures"], "labels": inputs["labels"]}
            return super().compute_loss(model, inputs, *args, **options)

    made = tickets()
    data = [{"pictures": row["pixel_values"], "labels": row["labels"]} for row in pictures(32)]
    callback = sparse(sup_tickets=made, **EARLY)
    with caplog.at_level(logging.WARNING, "ast_plugin.transformers"):
        convolutional(tmp_path, callback, kind=Named, train_dataset=data, remove_unused_columns=False).train()
    assert made.available
    assert not made.recomputed
    assert "stays the average of the tickets" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("at", [18, 24, 27])
def test_a_run_that_was_resumed_within_a_cycle_is_the_uninterrupted_one(tmp_path: Path, at: int) -> None:
    def made(name: str) -> tuple[Trainer, ASTCallback]:
        callback = sparse(sup_tickets=tickets(), **EARLY)
        saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 36}
        return convolutional(tmp_path / name, callback, **saving), callback

    whole, callback = made("whole")
    whole.train()
    resumed, other = made("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert callback.ast is not None
    assert other.ast is not None
    assert_same(snapshot(whole.model), snapshot(resumed.model))
    assert_same(dict(with_plain_entries(callback.ast.state_dict())), dict(with_plain_entries(other.ast.state_dict())))
    for name in SUB_NETS:
        with callback.ast.version("superposed"), other.ast.version("superposed"):
            assert_same(callback.ast.materialize(name), other.ast.materialize(name))


def test_the_best_checkpoint_from_before_the_end_has_no_superposed_sub_nets_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Worse(Trainer):
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            found = super().evaluate(*args, **options)
            return {**found, "eval_loss": float(self.state.global_step)}

    callback = sparse(sup_tickets=tickets(), **EARLY)
    saving = {"save_strategy": "steps", "save_steps": 12, "eval_strategy": "steps", "eval_steps": 12}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    with caplog.at_level(logging.WARNING, "ast_plugin.transformers"):
        trainer_of(tmp_path, callback, kind=Worse, **LONG, **saving, **best).train()
    assert callback.ast is not None
    assert callback.ast.versions == ("last",)
    assert "is from before the end" in caplog.text


def test_a_second_training_goes_on_without_new_cycles(tmp_path: Path) -> None:
    made = tickets()
    callback = sparse(sup_tickets=made, **EARLY)
    trainer = trainer_of(tmp_path, callback, **LONG)
    trainer.train()
    before = made.state_dict()
    trainer.train()
    assert made.rate is None
    assert_same(before, made.state_dict())

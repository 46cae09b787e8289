"""The weights of a checkpoint: those that its sub-nets belong to, whatever names the files have for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_saved
from networks import assert_same, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers_runs import pictures, sparse, trainer_of

from ast_plugin.errors import StateError
from ast_plugin.integrations.transformers import ASTCallback
from ast_plugin.integrations.transformers.weights import ensure_weights, fingerprint

pytestmark = pytest.mark.extra("hf")


def vit(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return transformers_saved.vit(num_channels=1)


def vit_trainer(folder: Path, callback: ASTCallback, **given: Any) -> Trainer:
    data = {"train_dataset": pictures(32), "eval_dataset": pictures(8, seed=1)}
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    return trainer_of(folder, callback, model=given.pop("model", vit()), **data, **saving, **given)


def test_a_network_that_is_saved_under_other_names_resumes_exactly(tmp_path: Path) -> None:
    whole = vit_trainer(tmp_path / "whole", sparse())
    whole.train()
    resumed = vit_trainer(tmp_path / "resumed", sparse(), model=vit(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same(snapshot(resumed.model), snapshot(whole.model))


def test_the_best_of_a_network_that_is_saved_under_other_names_comes_back(tmp_path: Path) -> None:
    trainer = vit_trainer(
        tmp_path, sparse(), load_best_model_at_end=True, metric_for_best_model="s80_loss", greater_is_better=True
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_s80_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=lambda step: losses[step])
    assert best < 16
    assert trainer.evaluate()["eval_s80_loss"] == losses[best]


def test_weights_that_were_changed_are_refused_by_name(tmp_path: Path) -> None:
    trainer = vit_trainer(tmp_path, sparse())
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StateError, match=r"1 of \d+ differ: classifier\.weight.*resume_plain=True"):
        vit_trainer(tmp_path, sparse()).train(resume_from_checkpoint=str(folder))


def test_weights_that_are_there_are_not_loaded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = vit()
    with caplog.at_level(logging.WARNING, "ast_plugin.transformers"):
        ensure_weights(model, str(tmp_path), fingerprint(model))
        ensure_weights(model, str(tmp_path), {})  # of sharded parameters nothing was noted
    assert caplog.records == []
    other = fingerprint(vit(seed=1))
    with pytest.raises(StateError, match="cannot be loaded"):
        ensure_weights(model, str(tmp_path), other)


def test_a_fingerprint_depends_on_every_entry_and_every_type() -> None:
    model = nn.Module()
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e5m2)
    for number, kind in enumerate(kinds):
        model.register_buffer(f"b{number}", torch.ones(3, 4).to(kind))
    model.register_buffer("empty", torch.ones(0))
    model.register_buffer("turned", torch.arange(12.0).view(3, 4).T)
    before = fingerprint(model)
    assert set(before) == {f"b{number}" for number in range(len(kinds))} | {"empty", "turned"}
    for name in set(before) - {"empty"}:
        buffer = model.get_buffer(name)
        buffer[0, 0] = False
        after = fingerprint(model)
        if name != "turned":  # it was zero there
            assert [key for key in before if before[key] != after[key]] == [name]
        buffer[0, 0] = True
        before = fingerprint(model)


def test_a_network_of_ones_own_is_refused_where_its_weights_differ(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(StateError, match="weight"):
        ensure_weights(model, str(tmp_path), {**fingerprint(model), "weight": 0})


def test_a_fingerprint_tells_every_bit_and_its_place() -> None:
    linear = nn.Linear(4, 4)
    marks = {fingerprint(linear)["weight"]}
    weight = linear.weight.detach().clone()
    flipped = weight.clone()
    flipped[2, 1] = -flipped[2, 1]
    for other in (
        weight.t(),
        weight.flip(0),
        weight[:, [1, 0, 2, 3]],
        weight.reshape(2, 2, 4).transpose(0, 1),
        flipped,
    ):
        linear.weight.data = other.reshape(4, 4).contiguous()
        marks.add(fingerprint(linear)["weight"])
    assert len(marks) == 6
    linear.weight.data = weight.t().contiguous().t()
    assert fingerprint(linear)["weight"] in marks


@pytest.mark.parametrize(
    "kind", [torch.float16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64, torch.complex128]
)
def test_fingerprints_are_there_for_every_type(kind: torch.dtype) -> None:
    module = nn.Module()
    for name, shape in {"scalar": (), "none": (0, 3), "some": (2, 3, 4)}.items():
        module.register_buffer(name, torch.ones(shape).to(kind))
    first = fingerprint(module)
    assert first["none"] == 0
    module.some = torch.zeros(2, 3, 4).to(kind)
    second = fingerprint(module)
    assert first["some"] != second["some"]
    assert first["scalar"] == second["scalar"] != 0

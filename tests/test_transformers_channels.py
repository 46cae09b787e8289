"""Channel sub-nets in the Trainer: what the model is called with comes from itself or from the training data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers_runs import pictures, resnet, sparse, trainer_of

from ast_plugin.integrations.transformers.examples import example_inputs

pytestmark = [pytest.mark.extra("hf"), pytest.mark.extra("channels")]


def test_heads_and_hidden_units_of_a_language_model_are_found(tmp_path: Path) -> None:
    callback = sparse(pattern="channel", sparsities=(0.25, 0.5), method="static")
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    ast = callback.ast
    assert ast is not None
    assert ast.groups is not None
    assert [(group.kind, group.units) for group in ast.groups.groups] == [("heads", 2), ("hidden", 64)] * 2
    assert {name: int(flags.sum()) for name, flags in ast.kept_channels("s50").items()} == {
        group.name: group.units // 2 for group in ast.groups.groups
    }


def test_a_model_that_says_nothing_of_itself_is_run_on_one_example_of_the_data(tmp_path: Path) -> None:
    callback = sparse(pattern="channel", sparsities=(0.5,), method="static")
    trainer = trainer_of(tmp_path, callback, model=resnet(), train_dataset=pictures())
    state = torch.get_rng_state()
    inputs = example_inputs(trainer)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {"pixel_values": (1, 1, 8, 8)}
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    assert callback.ast is not None
    assert callback.ast.groups is not None
    assert {group.kind for group in callback.ast.groups.groups} == {"channels"}

"""Checkpoints of the Trainer: a resumed run is the uninterrupted one, and what is refused says what differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import assert_same, snapshot
from transformers import Trainer
from transformers_runs import SUB_NETS, gpt2, logged, pictures, resnet, sparse, trainer_of

from ast_plugin.errors import StateError
from ast_plugin.integrations.transformers import ASTCallback
from ast_plugin.integrations.transformers.state import STATE, SavedState, read_state, write_state
from ast_plugin.training_exchange import with_plain_entries

pytestmark = pytest.mark.extra("hf")

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}


def assert_same_run(one: Trainer, other: Trainer, callbacks: tuple[ASTCallback, ASTCallback]) -> None:
    """Compare weights, optimizer, schedule and the whole state of the sub-nets bit for bit."""
    assert_same(snapshot(one.model), snapshot(other.model))
    states = [dict(with_plain_entries(callback.ast.state_dict())) for callback in callbacks if callback.ast is not None]
    assert_same(states[0], states[1])
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert_same(one.lr_scheduler.state_dict(), other.lr_scheduler.state_dict())
    assert logged(one, "eval_s90_loss") == logged(other, "eval_s90_loss")
    assert logged(one, "loss") == logged(other, "loss")


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {"model": "gpt2"}),
        ({"method": "granet", "sparsities": (0.5, 0.9)}, {"model": "gpt2", "gradient_accumulation_steps": 2}),
        ({"inactive": "freeze"}, {"model": "gpt2", "optim": "adafactor"}),
        ({}, {"model": "resnet", "optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
)
@pytest.mark.parametrize("at", [3, 9])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any], given: dict[str, Any], at: int
) -> None:
    def made(name: str) -> tuple[Trainer, ASTCallback]:
        how = dict(given)
        if how.pop("model") == "gpt2":
            how["model"] = gpt2(dropout=0.1)
        else:
            how |= {"model": resnet(), "train_dataset": pictures(32), "eval_dataset": pictures(8, seed=1)}
        callback = sparse(**options)
        epochs = 4 if "gradient_accumulation_steps" in how else 2
        return trainer_of(tmp_path / name, callback, num_train_epochs=epochs, **how, **SAVING), callback

    whole, callback = made("whole")
    whole.train()
    resumed, other = made("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))  # not in its own folder
    assert_same_run(whole, resumed, (callback, other))


@pytest.mark.filterwarnings("ignore:mtime may not be reliable on this filesystem")  # the Trainer's own
def test_resume_finds_the_last_checkpoint_by_itself(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", callback := sparse(), save_total_limit=2, **SAVING)
    whole.train()
    kept = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert kept == ["checkpoint-15", "checkpoint-16"]
    shutil.copytree(tmp_path / "whole" / "checkpoint-15", tmp_path / "resumed" / "checkpoint-15")
    resumed = trainer_of(tmp_path / "resumed", other := sparse(), save_total_limit=2, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed, (callback, other))


def test_a_second_train_may_resume_from_a_checkpoint_of_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callback := sparse(), **SAVING)
    trainer.train()
    first, then = callback.ast, snapshot(trainer.model)
    assert first is not None
    masks = {name: first.masks.pack(name) for name in SUB_NETS}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert callback.ast is not None
    assert_same({name: callback.ast.masks.pack(name) for name in SUB_NETS}, masks)
    assert_same(snapshot(trainer.model), then)


def test_a_checkpoint_is_one_of_a_plain_trainer_too(tmp_path: Path) -> None:
    trainer_of(tmp_path, sparse(), **SAVING).train()
    plain = trainer_of(tmp_path, **SAVING)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert plain.state.global_step == 16
    assert not any("s90" in key for entry in plain.state.log_history[-2:] for key in entry)


def test_a_checkpoint_without_sub_nets_is_refused_unless_they_may_start_from_it(tmp_path: Path) -> None:
    trainer_of(tmp_path, load_best_model_at_end=True, **SAVING).train()
    folder = str(tmp_path / "checkpoint-9")
    trainer = trainer_of(tmp_path, sparse())
    with pytest.raises(StateError, match="resume_plain=True") as caught:
        trainer.train(resume_from_checkpoint=folder)
    assert folder in str(caught.value)
    assert not trainer.model._forward_pre_hooks

    fresh = trainer_of(tmp_path / "fresh", callback := sparse(resume_plain=True), load_best_model_at_end=True, **SAVING)
    fresh.train(resume_from_checkpoint=folder)
    assert callback.ast is not None
    assert callback.ast.config.total_steps == 7  # those that are left of 16
    assert fresh.state.best_model_checkpoint is not None
    assert Path(fresh.state.best_model_checkpoint).parent == tmp_path / "fresh"
    assert callback.ast.masks.sparsity("s90") == pytest.approx(0.9, abs=1e-3)


def test_a_checkpoint_of_other_sub_nets_is_refused_with_what_differs(tmp_path: Path) -> None:
    trainer_of(tmp_path, sparse(), **SAVING).train()
    folder = tmp_path / "checkpoint-9"
    other = trainer_of(tmp_path, callback := sparse(sparsities=(0.5, 0.95)))
    with pytest.raises(StateError, match=r"s50, s80, s90, this run has s50, s95") as caught:
        other.train(resume_from_checkpoint=str(folder))
    assert str(folder / STATE) in str(caught.value)
    assert callback.ast is None
    assert not other.model._forward_pre_hooks
    stored = torch.load(folder / "optimizer.pt", weights_only=True)
    assert "ast_plugin" not in stored
    with pytest.raises(StateError, match="other prunable parameters"):
        trainer_of(tmp_path, sparse(exclude=("*c_fc*",))).train(resume_from_checkpoint=str(folder))
    with pytest.warns(UserWarning, match="inactive='freeze'"):
        trainer_of(tmp_path, sparse(inactive="freeze")).train(resume_from_checkpoint=str(folder))


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    trainer_of(tmp_path, sparse(), **SAVING).train()
    file = tmp_path / "checkpoint-9" / STATE
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    file.write_bytes(data)
    with pytest.raises(StateError, match=STATE):
        trainer_of(tmp_path, sparse()).train(resume_from_checkpoint=str(file.parent))


def test_a_state_is_tensors_and_plain_containers_and_complete_or_absent(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    state = SavedState(run={"step": 3, "masks": {"s50": torch.ones(3)}}, weights={"head.weight": -7})
    file = write_state(tmp_path, state)
    assert file == tmp_path / STATE
    found = read_state(tmp_path)
    assert found is not None
    assert_same(dict(found.run), dict(state.run))
    assert found.weights == state.weights
    torch.save({"other": 1}, file)
    with pytest.raises(StateError, match=STATE):
        read_state(tmp_path)


def test_a_run_that_resumes_longer_than_it_was_planned_says_so_and_goes_on(tmp_path: Path) -> None:
    trainer_of(tmp_path, sparse(), **SAVING).train()
    longer = trainer_of(tmp_path, callback := sparse(), num_train_epochs=3)
    with pytest.warns(UserWarning, match="total_steps=24"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert callback.ast is not None
    assert callback.ast.step == 24

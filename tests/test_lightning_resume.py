"""Checkpoints of Lightning's: what resumes, bit for bit, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import SUB_NETS, Classifier, data, sparse, trainer_of
from networks import assert_same, conv_net, snapshot
from torch.nn import functional

import ast_plugin
from ast_plugin.errors import ConfigError, StateError
from ast_plugin.integrations.frameworks.lightning import ASTCallback

pytestmark = [
    pytest.mark.extra("lightning"),
    # What Lightning says of other folders, other callbacks and loaders without a position.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Positioned:
    """A loader whose position is in its state, as Lightning asks for to resume in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches = list(data())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(
    folder: Path, *callbacks: Any, resume: Path | None = None, loader: Any = None, module: Any = None, **given: Any
) -> Classifier:
    """Fit with a checkpoint of every third step."""
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = trainer_of(folder, *callbacks, checkpoint, **{"enable_checkpointing": True, **given})
    module = Classifier() if module is None else module
    trainer.fit(module, data() if loader is None else loader, data(2, first=50), ckpt_path=resume)
    return module


def assert_same_run(one: ASTCallback, other: ASTCallback) -> None:
    assert one.ast is not None
    assert other.ast is not None
    assert one.ast.step == other.ast.step
    assert_same(one.ast.state_dict()["masks"], other.ast.state_dict()["masks"])
    for name in SUB_NETS:
        assert_same(one.ast.private_state(name), other.ast.private_state(name))
    assert one.ast.metrics == other.ast.metrics
    assert one.ast.statistics() == other.ast.statistics()
    assert one.ast.history == other.ast.history
    assert_same(one.ast.optimizer.state_dict(), other.ast.optimizer.state_dict())


@pytest.mark.parametrize("given", [{}, {"val_check_interval": 3}, {"accumulate_grad_batches": 2}])
def test_a_run_that_resumes_in_the_middle_of_an_epoch_is_as_one_that_was_not_interrupted(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    straight = sparse(network="model")
    module = fit(tmp_path / "a", straight, loader=Positioned(), **given)
    for path in (tmp_path / "a" / "step=3.ckpt", tmp_path / "a" / "step=6.ckpt"):
        resumed = sparse(network="model")
        again = fit(
            tmp_path / path.stem, resumed, resume=path, loader=Positioned(), module=Classifier(conv_net(9)), **given
        )
        assert_same(snapshot(module), snapshot(again))
        assert_same_run(straight, resumed)


def test_a_run_that_resumes_between_epochs(tmp_path: Path) -> None:
    straight, resumed = sparse(network="model"), sparse(network="model")
    trainer = trainer_of(tmp_path, straight, ModelCheckpoint(tmp_path, save_top_k=-1), enable_checkpointing=True)
    module = Classifier()
    trainer.fit(module, data(), data(2, first=50))
    again = fit(tmp_path / "b", resumed, resume=tmp_path / "epoch=0-step=8.ckpt", module=Classifier(conv_net(9)))
    assert_same(snapshot(module), snapshot(again))
    assert_same_run(straight, resumed)


def test_checkpoints_are_dense_and_plain_trainers_resume_them(tmp_path: Path) -> None:
    callback = sparse(network="model", method="static")  # nothing grows, from zero
    fit(tmp_path / "a", callback)
    path = tmp_path / "a" / "step=9.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert "ast_plugin" not in checkpoint["optimizer_states"][0]
    assert all(bool((checkpoint["state_dict"][f"model.{name}"] != 0).all()) for name in callback.ast.masks.parameters)
    plain = Classifier.load_from_checkpoint(path, model=conv_net(3), weights_only=True)
    assert_same(dict(plain.state_dict()), checkpoint["state_dict"])
    with pytest.warns(UserWarning, match="ASTCallback"):  # Lightning says that a callback is missing
        fit(tmp_path / "b", resume=path)


def test_a_checkpoint_without_sub_nets_is_refused_or_started_from(tmp_path: Path) -> None:
    fit(tmp_path / "a")
    path = tmp_path / "a" / "step=9.ckpt"
    with pytest.raises(StateError, match="is a checkpoint without sub-nets; pass resume_plain=True"):
        fit(tmp_path / "b", sparse(network="model"), resume=path)
    callback = sparse(network="model", resume_plain=True)
    fit(tmp_path / "c", callback, resume=path)
    assert callback.ast.step == 7
    assert callback.ast.config.total_steps == 7


def test_a_checkpoint_of_other_sub_nets_is_refused_with_what_differs(tmp_path: Path) -> None:
    fit(tmp_path / "a", sparse(network="model"))
    callback = sparse(network="model", sparsities=(0.5, 0.8))
    with pytest.raises(StateError, match=r"step=9.ckpt'.*has the sub-nets s50, s80, s90, this run has s50, s80"):
        fit(tmp_path / "b", callback, resume=tmp_path / "a" / "step=9.ckpt")
    assert callback.ast is None


def test_a_run_with_no_step_left_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "a", max_steps=9, max_epochs=-1)
    callback = sparse(network="model", resume_plain=True, total_steps=9)
    path = tmp_path / "a" / "step=9.ckpt"
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    with pytest.raises(ConfigError, match="total_steps=9, and the fit makes 16"):
        trainer.fit(Classifier(), data(), data(1), ckpt_path=path)


def test_the_best_checkpoint_is_loaded_with_its_sub_nets(tmp_path: Path) -> None:
    # The worst one is taken for the best, so that it is not the last.
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss_s90", mode="max", save_top_k=-1)
    callback = sparse(network="model", load_best=True, folder=tmp_path / "end")
    trainer = trainer_of(tmp_path, callback, checkpoint, enable_checkpointing=True, max_epochs=3)
    module = Classifier()
    trainer.fit(module, data(), data(2, first=50))
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert best["global_step"] < 24
    assert_same(dict(module.state_dict()), best["state_dict"])
    assert callback.ast.step == best["global_step"]
    assert callback.ast.metrics["s90"]["val_loss"] == float(checkpoint.best_model_score)
    (found,) = trainer.validate(module, data(2, first=50), verbose=False)
    assert found["val_loss_s90"] == pytest.approx(float(checkpoint.best_model_score))
    elastic = ast_plugin.load(tmp_path / "end" / "elastic.safetensors", conv_net(4))
    with elastic.sub_net("s90") as network:
        losses = [functional.cross_entropy(network.eval()(x), y).item() for x, y in data(2, first=50)]
    assert sum(losses) / 2 == pytest.approx(float(checkpoint.best_model_score), rel=1e-5)


def test_testing_a_checkpoint_takes_its_sub_nets_too(tmp_path: Path) -> None:
    callback = sparse(network="model")
    module = fit(tmp_path, callback)
    trainer = trainer_of(tmp_path, callback)
    first = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    (found,) = trainer.test(module, data(2, first=50), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    assert callback.ast.step == first["global_step"] == 3
    elastic = ast_plugin.load(tmp_path / "step=3.elastic.safetensors", conv_net(4))
    for name in SUB_NETS:
        with elastic.sub_net(name) as network:
            losses = [functional.cross_entropy(network.eval()(x), y).item() for x, y in data(2, first=50)]
        assert found[f"test_loss_{name}"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_testing_a_checkpoint_without_a_fit_before_says_what_to_do(tmp_path: Path) -> None:
    fit(tmp_path, sparse(network="model"))
    trainer = trainer_of(tmp_path, sparse(network="model"))
    with pytest.raises(StateError, match=r"ast_plugin\.load"):
        trainer.test(Classifier(), data(2, first=50), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)


def test_evaluating_a_checkpoint_without_sub_nets_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "plain")
    callback, module = sparse(network="model"), Classifier()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), data(1))
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(
            StateError, match=r"step=3\.ckpt' is a checkpoint without sub-nets, and those of the last fit"
        ):
            evaluate(module, data(1), ckpt_path=tmp_path / "plain" / "step=3.ckpt")

"""Files that a fit leaves: beside checkpoints, and at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import SUB_NETS, Classifier, data, sparse, trainer_of
from networks import assert_same, conv_net

import ast_plugin
from ast_plugin.integrations.frameworks.lightning.files import elastic_beside

pytestmark = pytest.mark.extra("lightning")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(path: Path, callback: Any) -> None:
    """Assert that a file holds the sub-nets that the run has now."""
    elastic = ast_plugin.load(path, conv_net(7))
    for name in SUB_NETS:
        assert_same(elastic.materialize(name), callback.ast.materialize(name))


def test_files_at_the_end(tmp_path: Path) -> None:
    callback, module = sparse(network="model", folder=tmp_path / "end"), Classifier()
    trainer_of(tmp_path, callback).fit(module, data(), data(2, first=50))
    assert names(tmp_path / "end") == ["ast_config.json", "elastic.safetensors"]
    assert_holds(tmp_path / "end" / "elastic.safetensors", callback)
    summary = json.loads((tmp_path / "end" / "ast_config.json").read_text())
    assert summary["model"] == "ConvNet"
    assert summary["versions"].keys() == {"ast-plugin", "torch", "lightning"}
    assert [row["name"] for row in summary["sub_nets"]] == list(SUB_NETS)
    assert summary["sub_nets"][2]["metrics"]["val_loss"] == callback.ast.metrics["s90"]["val_loss"]
    assert summary["step"] == 16


def test_files_lie_in_the_folder_for_logs_where_none_is_given(tmp_path: Path) -> None:
    callback = sparse(network="model")
    logger = CSVLogger(tmp_path / "logs")
    trainer = trainer_of(tmp_path, callback, logger=logger, enable_checkpointing=True)
    trainer.fit(Classifier(), data(), data(2, first=50))
    folder = Path(trainer.log_dir)
    assert folder.parent.parent == tmp_path / "logs"
    assert {"ast_config.json", "checkpoints", "elastic.safetensors"} <= set(names(folder))
    callback = sparse(network="model")
    trainer_of(tmp_path / "root", callback, enable_checkpointing=True).fit(Classifier(), data(), data(1))
    assert {"ast_config.json", "checkpoints", "elastic.safetensors"} == set(names(tmp_path / "root"))


def test_a_trainer_that_writes_no_checkpoints_writes_nothing(tmp_path: Path) -> None:
    trainer_of(tmp_path, sparse(network="model")).fit(Classifier(), data(), data(1))
    assert names(tmp_path) == []


def test_elastic_files_lie_beside_checkpoints_and_go_with_them(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss_s90", save_top_k=1, save_last=True, filename="best")
    callback = sparse(network="model", folder=tmp_path / "end")
    trainer = trainer_of(tmp_path, callback, checkpoint, enable_checkpointing=True, max_epochs=4)
    module = Classifier()
    trainer.fit(module, data(), data(2, first=50))
    best = Path(checkpoint.best_model_path)
    saved = [name for name in names(tmp_path) if name != "end"]
    assert saved == sorted([best.name, elastic_beside(best).name, "last.ckpt", "last.elastic.safetensors"])
    found = ast_plugin.load(elastic_beside(best), conv_net(7))
    assert found.metrics["s90"]["val_loss"] == pytest.approx(float(checkpoint.best_model_score))
    weights = torch.load(best, weights_only=True)["state_dict"]
    kept = found.materialize("s50")["conv1.weight"]
    assert torch.equal(kept, weights["model.conv1.weight"] * (kept != 0))


def test_sub_nets_on_their_way_are_in_checkpoints_alone(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    callback = sparse(network="model", method="granet", end_step=0.6, folder=tmp_path / "end")
    trainer = trainer_of(tmp_path, callback, checkpoint, enable_checkpointing=True)
    trainer.fit(Classifier(), data(), data(1))
    assert (tmp_path / "step=4.ckpt").is_file()
    assert not (tmp_path / "step=4.elastic.safetensors").exists()
    assert (tmp_path / "step=16.elastic.safetensors").is_file()
    assert_holds(tmp_path / "end" / "elastic.safetensors", callback)


def test_a_checkpoint_that_is_asked_for(tmp_path: Path) -> None:
    callback, module = sparse(network="model"), Classifier()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), data(1))
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert names(tmp_path) == ["mine.ckpt", "mine.elastic.safetensors"]
    assert_holds(tmp_path / "mine.elastic.safetensors", callback)
    callback.unbind()
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert names(tmp_path) == ["mine.ckpt", "mine.elastic.safetensors", "plain.ckpt"]


def test_names_beside_checkpoints() -> None:
    assert elastic_beside(Path("a/last.ckpt")) == Path("a/last.elastic.safetensors")
    assert elastic_beside(Path("epoch=1-loss=0.25.ckpt")).name == "epoch=1-loss=0.25.elastic.safetensors"
    assert elastic_beside(Path("model")).name == "model.elastic.safetensors"

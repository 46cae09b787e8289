"""Validation, test and prediction by Lightning's loops: each sub-net as a plain network of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import SUB_NETS, Classifier, data, sparse, trainer_of
from networks import conv_net, snapshot
from torch import Tensor
from torch.nn import functional

from ast_plugin.integrations.frameworks.lightning import ASTCallback

pytestmark = pytest.mark.extra("lightning")

HELD_OUT = {"batches": 2, "first": 50}


def alone(callback: ASTCallback, name: str) -> float:
    """Return the loss of a plain network with a sub-net's weights on the validation data."""
    assert callback.ast is not None
    network = conv_net(5)
    network.load_state_dict(callback.ast.materialize(name))
    network.eval()
    with torch.no_grad():
        losses = [float(functional.cross_entropy(network(x), y)) for x, y in data(**HELD_OUT)]
    return sum(losses) / len(losses)


class Listening(pl.Callback):
    """Notes what happens, and what metrics there are when an evaluation ends."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.events.append("start")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.events.append("batch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.events.append("end")
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pl.Trainer, Classifier, ASTCallback, Listening]]:
    """A fit of two epochs with validation after each, a logger, and a callback that listens."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    callback, listening, module = sparse(network="model"), Listening(), Classifier()
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    trainer = trainer_of(folder, listening, callback, logger=logger, num_sanity_val_steps=1)
    trainer.fit(module, data(), data(**HELD_OUT))
    yield trainer, module, callback, listening
    callback.unbind()


def test_every_sub_net_is_validated_as_a_plain_network_of_its_weights(fitted: Any) -> None:
    trainer, _, callback, _ = fitted
    for name in SUB_NETS:
        assert float(trainer.callback_metrics[f"val_loss_{name}"]) == pytest.approx(alone(callback, name), rel=1e-5)
        assert float(trainer.callback_metrics[f"sparsity_{name}"]) == pytest.approx(callback.ast.masks.sparsity(name))
    assert trainer.callback_metrics["val_loss"] == trainer.callback_metrics["val_loss_s50"]
    assert len({float(trainer.callback_metrics[f"val_loss_{name}"]) for name in SUB_NETS}) == 3


def test_other_callbacks_see_one_validation_with_the_metrics_of_all(fitted: Any) -> None:
    _, _, _, listening = fitted
    sanity = ["start", "batch", "end"]
    assert listening.events == sanity + 2 * ["start", "batch", "batch", "end"]
    for metrics in listening.metrics[1:]:
        assert {"val_loss", "val_accuracy", "sparsity_s80"} <= metrics.keys()
        assert {f"{metric}_{name}" for metric in ("val_loss", "val_accuracy") for name in SUB_NETS} <= metrics.keys()
    assert listening.metrics[1]["val_loss_s90"] != listening.metrics[2]["val_loss_s90"]


def test_loggers_have_every_metric(fitted: Any) -> None:
    trainer, _, _, _ = fitted
    rows = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    assert {"train_loss", "val_loss", "val_loss_s80", "val_accuracy_s90", "sparsity_s50"} <= set(columns)
    where = columns.index("val_loss_s90")
    assert len([row for row in rows[1:] if row.split(",")[where]]) == 2


def test_metrics_are_noted_for_report_and_elastic_file(fitted: Any) -> None:
    trainer, _, callback, _ = fitted
    for name in SUB_NETS:
        assert callback.ast.metrics[name].keys() >= {"val_loss", "val_accuracy"}
        assert callback.ast.metrics[name]["val_loss"] == float(trainer.callback_metrics[f"val_loss_{name}"])
        assert "train_loss" not in callback.ast.metrics[name]


def test_validate_and_test_after_a_fit(fitted: Any) -> None:
    trainer, module, callback, _ = fitted
    (validated,) = trainer.validate(module, data(**HELD_OUT), verbose=False)
    (tested,) = trainer.test(module, data(**HELD_OUT), verbose=False)
    for name in SUB_NETS:
        assert validated[f"val_loss_{name}"] == pytest.approx(alone(callback, name), rel=1e-5)
        assert tested[f"test_loss_{name}"] == pytest.approx(alone(callback, name), rel=1e-5)
    assert validated["val_loss"] == validated["val_loss_s50"]
    assert tested["test_loss"] == tested["test_loss_s50"]
    assert callback.ast.metrics["s90"]["test_loss"] == tested["test_loss_s90"]


def test_one_sub_net_in_a_block(fitted: Any) -> None:
    trainer, module, callback, _ = fitted
    with callback.sub_net("s90"):
        (tested,) = trainer.test(module, data(**HELD_OUT), verbose=False)
        predicted = torch.cat(trainer.predict(module, data(**HELD_OUT)))
    assert tested.keys() == {"test_loss", "test_accuracy"}
    assert tested["test_loss"] == pytest.approx(alone(callback, "s90"), rel=1e-5)
    network = conv_net(5)
    network.load_state_dict(callback.ast.materialize("s90"))
    expected = torch.cat([network.eval()(images) for images, _ in data(**HELD_OUT)])
    torch.testing.assert_close(predicted, expected.detach())


def test_prediction_without_a_block_is_the_default_sub_nets(fitted: Any) -> None:
    trainer, module, callback, _ = fitted
    before = snapshot(module)
    predicted = torch.cat(trainer.predict(module, data(**HELD_OUT)))
    network = conv_net(5)
    network.load_state_dict(callback.ast.materialize("s50"))
    torch.testing.assert_close(
        predicted, torch.cat([network.eval()(images) for images, _ in data(**HELD_OUT)]).detach()
    )
    after = snapshot(module)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Accumulating(Classifier):
    """Metrics that are kept over the batches: by an object of torchmetrics, and by hand."""

    def __init__(self) -> None:
        from torchmetrics.classification import MulticlassAccuracy

        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=5, average="micro")
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        output = self(batch[0])
        self.accuracy(output, batch[1])
        self.outputs.append(functional.cross_entropy(output, batch[1]))
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", self.outputs[-1], on_step=True, on_epoch=True, add_dataloader_idx=True)

    def on_validation_epoch_end(self) -> None:
        self.log("by_hand", torch.stack(self.outputs).mean())
        self.outputs.clear()


def test_metrics_that_are_kept_over_batches_are_each_sub_nets_own(tmp_path: Path) -> None:
    callback, module = sparse(network="model"), Accumulating()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), data(**HELD_OUT))
    metrics = trainer.callback_metrics
    for name in SUB_NETS:
        network = conv_net(5)
        network.load_state_dict(callback.ast.materialize(name))
        network.eval()
        right = torch.cat([network(images).argmax(1) == labels for images, labels in data(**HELD_OUT)])
        assert float(metrics[f"accuracy_{name}"]) == pytest.approx(float(right.float().mean()))
        assert float(metrics[f"by_hand_{name}"]) == pytest.approx(alone(callback, name), rel=1e-5)
        assert float(metrics[f"loss_{name}_epoch"]) == pytest.approx(alone(callback, name), rel=1e-5)
        assert callback.ast.metrics[name]["loss"] == float(metrics[f"loss_{name}_epoch"])
    callback.unbind()


def test_several_sets_of_data(tmp_path: Path) -> None:
    callback, module = sparse(network="model"), Accumulating()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), [data(**HELD_OUT), data(1, first=70)])
    for name in SUB_NETS:
        found = float(trainer.callback_metrics[f"loss_{name}_epoch/dataloader_idx_0"])
        assert found == pytest.approx(alone(callback, name), rel=1e-5)
        assert callback.ast.metrics[name]["loss/dataloader_idx_0"] == found
    found = trainer.validate(module, [data(**HELD_OUT), data(1, first=70)], verbose=False)
    assert len(found) == 2
    assert {f"loss_{name}_epoch/dataloader_idx_1" for name in SUB_NETS} <= found[1].keys()
    callback.unbind()


def test_the_best_checkpoint_is_one_with_all_sub_nets_at_their_sparsity(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss_s90", mode="max", save_top_k=5)
    callback = sparse(network="model", method="granet", end_step=0.6)
    trainer = trainer_of(tmp_path, callback, checkpoint, max_epochs=5, enable_checkpointing=True)
    trainer.fit(Classifier(), data(), data(**HELD_OUT))
    steps = sorted(int(Path(path).stem.partition("step=")[2]) for path in checkpoint.best_k_models)
    assert steps == [32, 40]
    callback.unbind()


def test_early_stopping_looks_at_evaluations_with_all_sub_nets_at_their_sparsity(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss_s90", patience=0, min_delta=100.0)  # nothing is an improvement
    callback = sparse(network="model", method="granet", end_step=0.6)
    trainer = trainer_of(tmp_path, callback, stopping, max_epochs=8)
    trainer.fit(Classifier(), data(), data(**HELD_OUT))
    assert callback.ast.step == 56  # the first such evaluation is after 48 steps, and the next is no better
    callback.unbind()


def test_a_progress_bar_counts_every_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = sparse(network="model")
    trainer = trainer_of(tmp_path, callback, enable_progress_bar=True, max_epochs=1)
    trainer.fit(Classifier(), data(), data(**HELD_OUT))
    assert "val_loss_s90" in capsys.readouterr().out
    callback.unbind()

"""What Lightning's Trainer does in a step, with sub-nets: the plain Trainer's bits, and those of a loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning_loops import assert_as_loop, assert_as_plain
from lightning_runs import SUB_NETS, Classifier, data, sparse, trainer_of
from networks import assert_same, conv_net, plain_conv_net, snapshot
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
from ast_plugin.errors import ConfigError
from ast_plugin.integrations.family import plugin as family
from ast_plugin.integrations.frameworks.lightning import ASTCallback

pytestmark = pytest.mark.extra("lightning")

AVERAGES: dict[str, dict[str, Any]] = {
    "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 1, "annealing_epochs": 1},
    **({"EMAWeightAveraging": {"decay": 0.5}} if hasattr(callbacks, "EMAWeightAveraging") else {}),
}
EVERY_TWO = {"val_check_interval": 3, "num_sanity_val_steps": 2}


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("network", ["model", None])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3, **EVERY_TWO},
    ],
    ids=["plain", "accumulation", "clipping", "all with validation in between"],
)
def test_training_is_the_plain_trainers_and_the_loops(
    tmp_path: Path, given: dict[str, Any], network: str | None
) -> None:
    assert_as_plain(tmp_path, network=network, **given)
    assert_as_loop(tmp_path, network=network, **given)


def test_half_precision(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1)
    assert_as_loop(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1, forward=autocast)


def test_double_precision(tmp_path: Path) -> None:
    assert_as_plain(tmp_path, precision="64-true")


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch", "ignore:Swapping scheduler")
def test_averages_of_networks_without_batch_norm(tmp_path: Path, average: str) -> None:
    def module() -> Classifier:
        return Classifier(plain_conv_net())

    assert_as_plain(
        tmp_path, module=module, callbacks=lambda: [getattr(callbacks, average)(**AVERAGES[average])], max_epochs=3
    )


def test_sub_nets_of_an_average_are_validated_and_saved(tmp_path: Path) -> None:
    found = []
    kind: Any = getattr(callbacks, "EMAWeightAveraging", None)
    if kind is None:
        pytest.skip("this version of Lightning has none")

    class Listening(kind):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found.append(snapshot(self._average_model.module.model))
            super().on_train_end(trainer, pl_module)

    callback, module = sparse(network="model", folder=tmp_path), Classifier(plain_conv_net())
    trainer = trainer_of(tmp_path, callback, Listening(decay=0.5))
    trainer.fit(module, data(), data(2, first=50))
    (average,) = found
    for name in SUB_NETS:
        elastic = ast_plugin.load(tmp_path / "elastic.safetensors", plain_conv_net())
        masks = callback.ast.masks.of(name)
        with elastic.sub_net(name) as network:
            for key, value in network.eval().state_dict().items():
                torch.testing.assert_close(value, average[key] * masks.get(key, torch.tensor(True)))
            losses = [float(functional.cross_entropy(network(x), y).detach()) for x, y in data(2, first=50)]
        assert float(trainer.callback_metrics[f"val_loss_{name}"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    callback.unbind()


class Manual(Classifier):
    """Steps its optimizer itself, after every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, (loss, _) = self.optimizers(), self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def test_manual_optimization_is_as_automatic(tmp_path: Path) -> None:
    manual, automatic = Manual(), Classifier()
    one, other = sparse(network="model", total_steps=8), sparse(network="model")
    trainer_of(tmp_path, one).fit(manual, data(), data(2, first=50))
    trainer_of(tmp_path, other, gradient_clip_val=0.05, accumulate_grad_batches=2).fit(
        automatic, data(), data(2, first=50)
    )
    assert_same(snapshot(manual), snapshot(automatic))
    assert manual.losses == automatic.losses
    assert one.ast.step == other.ast.step == 8
    assert_same(one.ast.state_dict()["masks"], other.ast.state_dict()["masks"])


class Pair(Classifier):
    """Two networks with an optimizer each, stepped by hand: one learns to make what the other is sure of."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.maker = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        first, second = self.optimizers()
        made = self.maker(torch.ones(len(images), 4)).view_as(images)
        for optimizer, loss in (
            (first, lambda: functional.cross_entropy(self.model(images), labels)),
            (second, lambda: -self.model(made).logsumexp(1).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9) for part in (self.model, self.maker)]


@pytest.mark.parametrize("network", ["model", "maker"])
def test_of_several_optimizers_the_networks_own_is_taken(tmp_path: Path, network: str) -> None:
    callback, module = ASTCallback(sparsities=(0.5, 0.8), network=network, total_steps=16, method="rigl"), Pair()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), data(1))
    assert callback.ast.model is module.get_submodule(network)
    assert callback.ast.optimizer is trainer.optimizers[("model", "maker").index(network)]
    assert callback.ast.step == 16
    assert [callback.ast.masks.sparsity(name) for name in callback.sub_nets] == pytest.approx([0.5, 0.8], abs=2e-3)


@pytest.mark.extra("channels")
@pytest.mark.parametrize("network", ["model", None])
def test_channel_sub_nets_are_found_on_the_example_input_array(tmp_path: Path, network: str | None) -> None:
    def module() -> Classifier:
        made = Classifier()
        made.example_input_array = torch.zeros(1, 1, 8, 8)
        return made

    callback = ASTCallback(sparsities=(0.5, 0.8), pattern="channel", method="static", network=network)
    trained = module()
    trainer = trainer_of(tmp_path, callback, num_sanity_val_steps=1)
    trainer.fit(trained, data(), data(2, first=50))
    assert callback.ast.statistics()["sub_nets"]["s80"]["dropped_channels"] > 0.5
    assert "with smaller weights" in str(callback.ast.describe())
    masked, other = (
        module(),
        ASTCallback(sparsities=(0.5, 0.8), pattern="channel", method="static", network=network, slicing="off"),
    )
    trainer_of(tmp_path, other, num_sanity_val_steps=1).fit(masked, data(), data(2, first=50))
    weights = [
        {name: module.get_parameter(name) for name, _ in module.named_parameters()} for module in (trained, masked)
    ]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.extra("channels")
def test_channel_sub_nets_without_an_example_are_refused_with_what_to_do(tmp_path: Path) -> None:
    callback, module = sparse(network="model", pattern="channel", method="static"), Classifier()
    with pytest.raises(ConfigError, match="set example_input_array of Classifier"):
        trainer_of(tmp_path, callback).fit(module, data(), data(1))
    assert callback.ast is None


@pytest.mark.extra("channels")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_masks_that_are_drawn_at_every_step(tmp_path: Path, accumulated: int) -> None:
    class Logging(Classifier):
        example_input_array = torch.zeros(1, 1, 8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            self.passes += 1
            return {"loss": super().training_step(batch, batch_idx)}

    callback, module = ASTCallback(sparsities=(0.5,), method="vr-pge", pattern="channel", network="model"), Logging()
    trainer = trainer_of(tmp_path, callback, accumulate_grad_batches=accumulated)
    trainer.fit(module, data(), data(1))
    assert callback.ast.step == 16 // accumulated
    assert callback.ast.sampler.is_final
    assert module.passes > 16
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(module.losses[-1])


def test_sub_nets_that_train_together_in_every_step(tmp_path: Path) -> None:
    callback = sparse(network="model", alternation="joint", plugins=[family])
    trainer_of(tmp_path, callback, gradient_clip_val=0.5).fit(Classifier(), data(), data(1))
    assert callback.ast.step == 16
    assert {figures["steps"] for figures in callback.ast.statistics()["sub_nets"].values()} == {16}
    callback = sparse(network="model", alternation="joint", plugins=[family])
    trainer = trainer_of(tmp_path, callback, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match="alternation 'joint'"):
        trainer.fit(Classifier(), data(), data(1))


def test_a_development_run_needs_no_room_for_a_schedule(tmp_path: Path) -> None:
    callback = sparse(network="model", method="granet", folder=tmp_path / "none")
    trainer_of(tmp_path, callback, fast_dev_run=True).fit(Classifier(), data(), data(1))
    assert callback.ast.step == 1
    assert not (tmp_path / "none").exists()


class Compiled(Classifier):
    """Without what a graph cannot hold."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)[0]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["model", None])
def test_compiling_the_module(tmp_path: Path, network: str | None) -> None:
    def compiled(module: Classifier) -> Any:
        torch._dynamo.reset()
        return torch.compile(module, backend="aot_eager")

    found = []
    for prepare in (compiled, lambda module: module):
        callback, module = sparse(network=network), Compiled()
        trainer = trainer_of(tmp_path, callback, max_epochs=1)
        trainer.fit(prepare(module), data(), data(2, first=50))
        found.append((snapshot(module), {name: float(value) for name, value in trainer.callback_metrics.items()}))
        callback.unbind()
    torch.testing.assert_close(*(weights for weights, _ in found), rtol=1e-5, atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.slow
def test_compiling_the_network(tmp_path: Path) -> None:
    def module() -> Classifier:
        torch._dynamo.reset()
        return Classifier(torch.compile(conv_net(0), backend="aot_eager"))

    assert_as_loop(tmp_path, module=module, rtol=1e-5)

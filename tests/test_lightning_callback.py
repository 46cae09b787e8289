"""The callback from the beginning of a fit to its end: what it refuses, what it leaves behind, further fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning_runs import SUB_NETS, Classifier, data, sparse, trainer_of
from networks import assert_same, conv_net, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import ast_plugin
from ast_plugin.attachment import is_attached
from ast_plugin.config import ASTConfig
from ast_plugin.errors import ActivationError, ASTError, ConfigError, MissingExtraError, SelectionError, WrapError
from ast_plugin.integrations.frameworks.lightning import ASTCallback, host
from ast_plugin.integrations.frameworks.lightning.checks import check_strategy

pytestmark = pytest.mark.extra("lightning")


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Asleep(Classifier):
    def __init__(self) -> None:
        super().__init__(conv_net().eval())


class TwoForOne(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.model.stem, self.model.head)]


class Other(Classifier):
    def configure_optimizers(self) -> Any:
        self.other = nn.Linear(2, 2)
        return torch.optim.SGD(self.other.parameters(), lr=0.1)


REFUSED: dict[str, tuple[type[ASTError], str, Callable[[], list[Any]], dict[str, Any], type[Classifier]]] = {
    "no such network": (
        ConfigError,
        "network='net': Classifier has no such module; .*Known: model",
        lambda: [sparse(network="net")],
        {},
        Classifier,
    ),
    "a checkpoint by no sub-net": (
        ConfigError,
        r"ModelCheckpoint\(monitor\)='val_loss_s91': there is no sub-net 's91'",
        lambda: [sparse(), ModelCheckpoint(monitor="val_loss_s91")],
        {"enable_checkpointing": True},
        Classifier,
    ),
    "a stop by no sub-net": (
        ConfigError,
        r"EarlyStopping\(monitor\)='val_loss_s91'",
        lambda: [sparse(), EarlyStopping("val_loss_s91")],
        {},
        Classifier,
    ),
    "an average": (
        WrapError,
        "StochasticWeightAveraging averages the BatchNorm of one sub-net alone",
        lambda: [sparse(), StochasticWeightAveraging(swa_lrs=0.01)],
        {},
        Classifier,
    ),
    "manual, no network": (ConfigError, "has to be named", lambda: [sparse(total_steps=16)], {}, Manual),
    "manual, no steps": (ConfigError, "give total_steps", lambda: [sparse(network="model")], {}, Manual),
    "several optimizers": (
        WrapError,
        r"2 optimizers \(SGD and SGD\) train parts of ConvNet",
        lambda: [sparse(network="model", total_steps=16)],
        {},
        TwoForOne,
    ),
    "no optimizer": (WrapError, "no optimizer trains ConvNet", lambda: [sparse(network="model")], {}, Other),
    "nothing to prune": (SelectionError, "nope", lambda: [sparse(include=("nope*",))], {}, Classifier),
    "asleep": (
        WrapError,
        "in evaluation mode, in which Lightning leaves",
        lambda: [sparse(network="model")],
        {},
        Asleep,
    ),
    "other steps": (
        ConfigError,
        "total_steps=17, and the fit makes 16",
        lambda: [sparse(network="model", total_steps=17)],
        {},
        Classifier,
    ),
    "steps that change": (
        ConfigError,
        "give total_steps",
        lambda: [sparse(network="model"), GradientAccumulationScheduler({1: 2})],
        {},
        Classifier,
    ),
    "too few steps": (
        ConfigError,
        "smallest total_steps",
        lambda: [sparse(method="granet")],
        {"max_steps": 2},
        Classifier,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Found 1 module")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:SWA is currently only")
def test_what_cannot_work_is_refused_before_anything_is_touched(tmp_path: Path, case: str) -> None:
    error, message, callbacks, given, kind = REFUSED[case]
    module, made = kind(), callbacks()
    before = snapshot(module)
    trainer = trainer_of(tmp_path, *made, **given)
    with pytest.raises(error, match=message):
        trainer.fit(module, data(), data(1))
    assert made[0].ast is None
    assert not is_attached(module)
    after = snapshot(module)
    assert_same(before, {name: after[name] for name in before})
    assert list(tmp_path.rglob("*.safetensors")) == []
    made[0].unbind()
    assert "training_step" not in vars(trainer.strategy)
    assert "save_checkpoint" not in vars(trainer)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ASTCallback"):  # Lightning does so itself
        trainer_of(tmp_path, sparse(), sparse())
    trainer = trainer_of(tmp_path, sparse())
    trainer.callbacks.append(sparse())
    with pytest.raises(ConfigError, match="takes one ASTCallback, and this one has two"):
        trainer.fit(Classifier(), data(), data(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (1.5,)}, "1.5"),
        ({"sparsities": (0.5,), "sparsity": 1}, "sparsity"),
        ({"sparsities": (0.5,), "network": 3}, "network must be the name of an attribute"),
        ({"sparsities": (0.5,), "load_best": "yes"}, "load_best must be True or False"),
        ({"sparsities": (0.5,), "resume_plain": None}, "resume_plain must be True or False"),
        ({"config": ASTConfig(sparsities=(0.5,)), "seed": 1}, "exclude each other"),
    ],
)
def test_settings_are_checked_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ASTCallback(**options)


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
def test_strategies_that_take_weights_apart_are_refused(name: str) -> None:
    if not hasattr(strategies, name):
        pytest.skip("this version of Lightning has none")
    kind = getattr(strategies, name)

    class Trainer:
        strategy = kind.__new__(kind)

    with pytest.raises(WrapError, match=f"{name} .*; train with strategy='ddp', or on one device"):
        check_strategy(Trainer())


def test_without_lightning_the_extra_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "from ast_plugin.errors import MissingExtraError\n"
        "try:\n"
        "    from ast_plugin.integrations.frameworks.lightning import ASTCallback\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ast-plugin[lightning]" in done.stdout


@pytest.mark.parametrize(("version", "fits"), [("2.4.1", False), ("1.9.5", False), ("2.5.0", True), ("3.0.0rc1", True)])
def test_versions_that_are_too_old_are_refused(version: str, fits: bool) -> None:
    if fits:
        host.check_version(version)
        return
    with pytest.raises(MissingExtraError, match=f"needs Lightning 2.5 or newer, and {version} is installed"):
        host.check_version(version)


def test_data_without_length_need_max_steps_or_total_steps(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return (row for batch in data() for row in zip(*batch, strict=True))

    callback = sparse(network="model")
    with pytest.raises(ConfigError, match=r"the data have no length and there is no max_steps, .*; give total_steps"):
        trainer_of(tmp_path, callback).fit(Classifier(), DataLoader(Stream(), 8), data(1))
    for options, given in (({}, {"max_steps": 12}), ({"total_steps": 16}, {})):
        callback = sparse(network="model", **options)
        trainer_of(tmp_path, callback, **given).fit(Classifier(), DataLoader(Stream(), 8), data(1))
        assert callback.ast.step == callback.ast.config.total_steps == given.get("max_steps", 16)
        assert callback.ast.config.steps_per_epoch is None


def test_accumulation_that_changes_needs_total_steps(tmp_path: Path) -> None:
    callback = sparse(network="model", total_steps=12)
    trainer = trainer_of(tmp_path, callback, GradientAccumulationScheduler({1: 2}))
    trainer.fit(Classifier(), data(), data(1))
    assert trainer.global_step == callback.ast.step == 12


def test_the_seed_is_that_of_seed_everything_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    seeds = []
    for given, options in ((None, {}), (7, {}), (7, {"seed": 3})):
        if given is not None:
            pl.seed_everything(given, verbose=False)
        callback = sparse(network="model", method="static", **options)
        trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier(), data(), data(1))
        seeds.append(callback.ast.config.seed)
    assert seeds == [0, 7, 3]


def test_names_are_those_of_the_network_or_of_the_module(tmp_path: Path) -> None:
    for network, prefix in ((None, "model."), ("model", "")):
        callback = sparse(network=network, method="static")
        trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier(), data(), data(1))
        assert set(callback.ast.masks.parameters) == {f"{prefix}{name}.weight" for name in ("conv1", "conv2", "head")}


def test_a_sub_net_before_training_says_when_there_will_be_one() -> None:
    with pytest.raises(ActivationError, match=r"call trainer\.fit\(\) first"):
        sparse().sub_net("s90")


def test_other_training_is_refused_until_the_callback_lets_go(tmp_path: Path) -> None:
    callback, module = sparse(network="model"), Classifier()
    trainer_of(tmp_path, callback).fit(module, data(), data(1))
    before = snapshot(module)
    with pytest.raises(ActivationError, match=r"call unbind\(\) on its ASTCallback first"):
        trainer_of(tmp_path).fit(module, data(), data(1))
    with pytest.raises(WrapError, match=r"call unbind\(\) on its ASTCallback first"):
        trainer_of(tmp_path, sparse(network="model")).fit(module, data(), data(1))
    assert_same(before, snapshot(module))
    callback.unbind()
    assert not is_attached(module)
    again = sparse(network="model")
    trainer_of(tmp_path, again).fit(module, data(), data(1))
    assert again.ast.step == 16


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_fit_goes_on_with_the_masks_of_the_first(tmp_path: Path, same_trainer: bool) -> None:
    callback, module = sparse(network="model"), Classifier()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module, data(), data(1))
    masks, private = callback.ast.state_dict()["masks"], callback.ast.private_state("s90")
    seen = []

    class First(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append((callback.ast.state_dict()["masks"], callback.ast.private_state("s90")))

    if same_trainer:
        trainer.callbacks.append(First())
        trainer.fit_loop.max_epochs = 3
    else:
        trainer = trainer_of(tmp_path, callback, First(), max_epochs=1)
    trainer.fit(module, data(), data(1))
    assert_same({"masks": masks, "private": private}, {"masks": seen[0][0], "private": seen[0][1]})
    assert callback.ast.step == 24
    assert_same(masks, callback.ast.state_dict()["masks"])  # the schedule has ended
    (found,) = trainer.validate(module, data(1), verbose=False)
    assert {f"val_loss_{name}" for name in SUB_NETS} <= found.keys()


def test_a_fit_of_another_model_is_a_run_of_its_own(tmp_path: Path) -> None:
    callback, first, second = sparse(network="model"), Classifier(), Classifier(conv_net(4))
    trainer_of(tmp_path, callback).fit(first, data(), data(1))
    trainer_of(tmp_path, callback).fit(second, data(), data(1))
    assert callback.ast.model is second.model
    assert callback.ast.step == 16
    assert not is_attached(first)


@pytest.mark.parametrize("where", ["forward", "backward", "between"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_model_is_dense_and_another_fit_starts_anew(
    tmp_path: Path, where: str, error: type[BaseException]
) -> None:
    class Breaking(Classifier):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3 and where == "forward" and not self.broken:
                raise error("stop")
            return loss

        def on_before_backward(self, loss: Tensor) -> None:
            if self.trainer.global_step == 3 and where == "between" and not self.broken:
                raise error("stop")

        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3 and where == "backward" and not self.broken:
                raise error("stop")

    callback, module = sparse(network="model", method="static"), Breaking()
    trainer = trainer_of(tmp_path, callback)
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, data(), data(1))
    assert callback.ast.step == 3
    assert all(bool((module.model.get_parameter(name) != 0).all()) for name in callback.ast.masks.parameters)
    module.broken = True
    trainer_of(tmp_path, callback).fit(module, data(), data(1))
    assert callback.ast.step == 16


def test_a_module_whose_networks_are_called_one_by_one(tmp_path: Path) -> None:
    class Parts(Classifier):
        def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            net, (images, labels) = self.model, batch
            hidden = net.norm0(net.stem(images)).relu()
            hidden = net.norm1(net.conv1(hidden)).relu()
            output = net.head(net.norm2(net.conv2(hidden)).relu().mean(dim=(2, 3)))
            return nn.functional.cross_entropy(output, labels), (output.argmax(1) == labels).float().mean()

    found = []
    for kind in (Classifier, Parts):
        callback, module = sparse(), kind()
        trainer = trainer_of(tmp_path, callback, num_sanity_val_steps=1)
        trainer.fit(module, data(), data(2, first=50))
        (tested,) = trainer.test(module, data(2, first=50), verbose=False)
        found.append((snapshot(module), module.losses, tested))
    assert_same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_the_core_is_found_by_its_controller(tmp_path: Path) -> None:
    callback, module = sparse(network="model"), Classifier()
    trainer_of(tmp_path, callback).fit(module, data(), data(1))
    assert isinstance(callback.ast, ast_plugin.AlternatingSparseTraining)
    assert callback.sub_nets == callback.ast.sub_nets == SUB_NETS

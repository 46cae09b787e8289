"""`wrap` on networks of timm: real training, and sub-nets that stock timm loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional

import ast_plugin
import ast_plugin.integrations.timm as package
from ast_plugin import ASTConfig, ConfigError, PluginError, WrapError, hookimpl
from ast_plugin.cli import main
from ast_plugin.export import export_state_dict
from ast_plugin.integrations.timm import TimmSelection, wrap
from ast_plugin.parameters import select_parameters

pytestmark = pytest.mark.extra("timm")

STEPS = 20
CLASSES = 4
SETTINGS: dict[str, Any] = {"sparsities": (0.5, 0.8, 0.9), "total_steps": STEPS, "update_interval": 2}


def network(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Stripes whose width is the class, a pure function of the step."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    columns = torch.arange(32)
    stripes = torch.stack([(columns // (2 ** (int(label) + 1)) % 2).float() for label in labels])
    images = stripes[:, None, None, :].expand(-1, 3, 32, 32)
    return images + 0.1 * torch.randn(8, 3, 32, 32, generator=generator), labels


def train(model: nn.Module, optimizer: Any, steps: int = STEPS) -> None:
    model.train()
    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_a_plugin_by_keyword_takes_part() -> None:
    heard: list[str] = []

    class Listener:
        @hookimpl
        def ast_sub_net_switched(self, sub_net: str) -> None:
            heard.append(sub_net)

    model = network()
    wrap(create_optimizer_v2(model, opt="sgd", lr=0.1), model, **SETTINGS, listener=Listener())
    assert heard == ["s50"]


def trained(name: str = "test_resnet", opt: str = "adamw") -> tuple[nn.Module, Any]:
    model = network(name)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.05)
    ast = wrap(optimizer, model, **SETTINGS)
    train(model, optimizer)
    return model, ast


@pytest.mark.parametrize("opt", ["adamw", "lookahead_momentum"])
def test_a_short_run_gives_exact_sparsities_and_private_batch_norms(opt: str) -> None:
    model, ast = trained(opt=opt)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert (ast.step, len(norms)) == (STEPS, 15)
    total = sum(row.prunable and model.get_parameter(row.parameter).numel() for row in ast.describe().rows)
    states = {name: ast.materialize(name) for name in ast.sub_nets}
    for name, target in zip(ast.sub_nets, SETTINGS["sparsities"], strict=True):
        zeros = sum(int((states[name][parameter] == 0).sum()) for parameter in ast.masks.parameters)
        assert abs(zeros - target * total) <= 1
        assert torch.count_nonzero(states[name]["conv1.0.weight"]) == model.get_parameter("conv1.0.weight").numel()
    for norm in norms:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            one, two, three = (states[name][f"{norm}.{tensor}"] for name in ast.sub_nets)
            assert not torch.equal(one, two)
            assert not torch.equal(two, three)
        assert sum(int(state[f"{norm}.num_batches_tracked"]) for state in states.values()) == STEPS
    assert all(bool(model.get_parameter(parameter).all()) for parameter in ast.masks.parameters)  # dense at rest


def test_the_loop_may_call_timm_s_task() -> None:
    tasks = pytest.importorskip("timm.task")
    results = []
    for around in (False, True):
        model = network()
        task = tasks.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        optimizer = create_optimizer_v2(model, opt="momentum", lr=0.01)
        ast = wrap(optimizer, model, outermost=task if around else None, **SETTINGS)
        model.train()
        for step in range(6):
            optimizer.zero_grad()
            task(*batch(step))["loss"].backward()
            optimizer.step()
        assert ast.masks.parameters[0] == "conv1.3.weight"
        results.append(ast.materialize("s90"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ------------------------------------------------------------------------------------------------ in stock timm


def outputs(ast: Any, name: str, images: Tensor) -> Tensor:
    ast.model.eval()
    with ast.sub_net(name) as model, torch.no_grad():
        return model(images)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_create_model_loads_an_exported_sub_net(tmp_path: Path, suffix: str) -> None:
    _, ast = trained()
    images, _ = batch(99)
    for name in ast.sub_nets:
        path = tmp_path / f"{name}.{suffix}"
        export_state_dict(ast, name, path)
        plain = timm.create_model("test_resnet", num_classes=CLASSES, checkpoint_path=str(path)).eval()
        with torch.no_grad():
            assert torch.equal(plain(images), outputs(ast, name, images))


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit", "test_convnext"])
def test_create_model_loads_what_the_command_exports_from_an_elastic_file(tmp_path: Path, architecture: str) -> None:
    _, ast = trained(architecture)
    elastic, path = tmp_path / "elastic.safetensors", tmp_path / "s80.safetensors"
    ast.save(elastic)
    assert main(["export", str(elastic), "--sub-net", "s80", "--to", str(path)]) == 0
    plain = timm.create_model(architecture, num_classes=CLASSES, checkpoint_path=str(path)).eval()
    images, _ = batch(99)
    with torch.no_grad():
        assert torch.equal(plain(images), outputs(ast, "s80", images))


LOAD_IN_STOCK_TIMM = """
import sys

sys.modules["ast_plugin"] = None  # any import of it fails
import timm
import torch

given = torch.load("given.pt", weights_only=True)
model = timm.create_model("test_resnet", num_classes=4, checkpoint_path="s90.pth").eval()
with torch.inference_mode():
    assert torch.equal(model(given["images"]), given["outputs"])
zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim > 1)
print("zeros", zeros)
"""


@pytest.mark.slow
def test_an_exported_sub_net_needs_this_package_no_more(tmp_path: Path) -> None:
    _, ast = trained()
    images, _ = batch(99)
    torch.save({"images": images, "outputs": outputs(ast, "s90", images)}, tmp_path / "given.pt")
    export_state_dict(ast, "s90", tmp_path / "s90.pth")
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{LOAD_IN_STOCK_TIMM}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total = ast.masks.total()
    assert done.stdout.split() == ["zeros", str(total - ast.masks.kept("s90"))]


# ------------------------------------------------------------------------------------------------ the call itself


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_settings_may_come_as_one_object() -> None:
    model = network()
    ast = wrap(sgd(model), model, ASTConfig(sparsities=(0.5,), total_steps=10, exclude=("fc.*",)))
    assert "fc.weight" not in ast.masks.parameters


def test_plugins_of_the_user_are_asked_first() -> None:
    class Everything:
        @hookimpl
        def ast_select_parameters(self, model: nn.Module, include: Any, exclude: Any) -> Any:
            return select_parameters(model, include=("*",))

    model = network()
    ast = wrap(sgd(model), model, sparsities=(0.5,), total_steps=10, plugins=(Everything(),))
    assert ast.masks.parameters[0] == "conv1.0.weight"


def test_the_plugin_may_be_passed_as_well() -> None:
    model = network("test_efficientnet")
    ast = wrap(sgd(model), model, sparsities=(0.5,), total_steps=10, plugins=[TimmSelection()])
    assert "blocks.2.0.conv_dw.weight" not in ast.masks.parameters
    model = network()
    with pytest.raises(PluginError, match="is the class TimmSelection: give an object of it"):
        wrap(sgd(model), model, sparsities=(0.5,), total_steps=10, plugins=[TimmSelection])
    with pytest.raises(ConfigError, match="plugins must be a list or tuple"):
        wrap(sgd(model), model, sparsities=(0.5,), total_steps=10, plugins=TimmSelection())  # type: ignore[arg-type]  # wrong on purpose


def test_what_is_no_network_of_timm_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(WrapError, match=r"no network of timm is inside model, a Sequential; give what timm.create_m"):
        wrap(sgd(plain), plain, sparsities=(0.5,), total_steps=10)
    model = network()
    with pytest.raises(WrapError, match=r"model must be a torch.nn.Module, got str"):
        wrap(sgd(model), "resnet18", sparsities=(0.5,), total_steps=10)  # type: ignore[arg-type]  # wrong on purpose
    assert wrap(sgd(model), model, sparsities=(0.5,), total_steps=10).attached  # untouched by the refusals


def test_a_task_is_no_network() -> None:
    tasks, model = pytest.importorskip("timm.task"), network()
    task = tasks.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(WrapError, match=r"model is timm's ClassificationTask.*outermost=task"):
        wrap(sgd(model), task, sparsities=(0.5,), total_steps=10)
    compiled = nn.Module()
    compiled._orig_mod = task  # as torch.compile does
    with pytest.raises(WrapError, match=r"model is timm's ClassificationTask"):
        wrap(sgd(model), compiled, sparsities=(0.5,), total_steps=10)


def test_public_names() -> None:
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert (package.wrap, package.TimmSelection) == (wrap, TimmSelection)
    assert package.wrap is not ast_plugin.wrap
    with pytest.raises(AttributeError, match="has no attribute 'warp'"):
        _ = package.warp

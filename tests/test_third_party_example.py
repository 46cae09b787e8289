"""The example package: built, installed into a folder of its own, found by its entry point and trained with.

The wheel is made with the setuptools at hand and unpacked, which is all that installing a pure Python wheel is; so no
installer and no network is needed. Everything that uses it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ast_plugin

pytestmark = pytest.mark.slow  # three processes that each import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "third_party_method"
CORE = Path(str(ast_plugin.__file__)).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the example installed in it."""
    # a copy: building leaves build/ and *.egg-info in the tree
    copy, dist, site = (tmp_path_factory.mktemp(name) for name in ("copy", "dist", "site"))
    shutil.copytree(EXAMPLE, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    call = f"from setuptools import build_meta; build_meta.build_wheel({str(dist)!r})"
    built = subprocess.run([sys.executable, "-c", call], cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("AST_PLUGIN_BLOCK", "AST_PLUGIN_DISABLE_AUTOLOAD")}
    paths = os.pathsep.join([str(site), str(CORE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**inherited, "PYTHONPATH": paths, **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def answer(site: Path, code: str, **variables: str) -> Any:
    """Run `code` where the example is installed; return what it prints as JSON."""
    done = run(site, "-W", "error", "-c", textwrap.dedent(code), **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOOK = """
    import dataclasses, json, os
    import torch
    from ast_plugin import ConfigError, ScoreInputs
    from ast_plugin.plugins import PluginRegistry

    def look(**variables):
        os.environ.update(variables)
        registry = PluginRegistry()
        for name in variables:
            del os.environ[name]
        try:
            method = registry.method("taylor").description
        except ConfigError as error:
            method = str(error)
        return {"method": method, "loaded": [dataclasses.asdict(plugin) for plugin in registry.loaded()]}

    found = {
        "blocked": look(AST_PLUGIN_BLOCK="taylor"),
        "no autoload": look(AST_PLUGIN_DISABLE_AUTOLOAD="1"),
        "loaded": look(),
    }
    score = PluginRegistry().method("taylor").grow_score
    weight, mask = torch.tensor([2.0, -3.0, 0.0]), torch.ones(3, dtype=torch.bool)
    found["scores"] = [
        score(ScoreInputs(weight=weight, gradient=gradient, mask=mask, generator=torch.Generator())).tolist()
        for gradient in (torch.tensor([0.5, 1.0, 9.0]), None)
    ]
    print(json.dumps(found))
"""

TRAIN = """
    import json
    import torch
    import ast_plugin
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = ast_plugin.wrap(
        optimizer, model, method="taylor", sparsities=(0.5, 0.8), total_steps=120, update_interval=10, end_step=100
    )
    first = {name: training.masks.pack(name) for name in training.sub_nets}
    losses = []
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 12, generator=generator)
        labels = inputs.view(32, 4, 3).sum(dim=2).argmax(dim=1)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {
        name: any(not torch.equal(first[name][p], packed) for p, packed in training.masks.pack(name).items())
        for name in training.sub_nets
    }
    print(json.dumps({
        "method": training.config.method,
        "kept": {name: training.masks.kept(name) for name in training.sub_nets},
        "total": training.masks.total(),
        "moved": moved,
        "losses": [sum(losses[:10]) / 10, sum(losses[-10:]) / 10],
    }))
"""


@pytest.fixture(scope="module")
def found(site: Path) -> Any:
    return answer(site, LOOK)


def test_the_method_is_found_by_its_entry_point(site: Path, found: Any) -> None:
    assert found["loaded"]["method"] == (
        "drop the smallest magnitudes, grow the largest |w * dL/dw| (after Molchanov et al. 2019)"
    )
    assert {
        "name": "taylor",
        "origin": f"ast-plugin-example-taylor, {site / 'ast_plugin_example_taylor.py'}",
        "version": "0.1.0",
        "hooks": ["ast_methods"],
    } in found["loaded"]["loaded"]


@pytest.mark.parametrize("how", ["blocked", "no autoload"])
def test_the_plugin_can_be_left_out(found: Any, how: str) -> None:
    assert found[how]["method"].startswith("unknown method 'taylor': Known: gmp, granet, rigl, set, static, vr-pge")
    assert "taylor" not in [plugin["name"] for plugin in found[how]["loaded"]]


def test_the_score_is_the_product_of_weight_and_gradient(found: Any) -> None:
    # |2 * 0.5|, |-3 * 1|, |0 * 9|; zeros without a gradient
    assert found["scores"] == [[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_command_line_lists_the_plugin_and_where_it_is_from(site: Path) -> None:
    listed = run(site, "-m", "ast_plugin", "plugins")
    assert listed.returncode == 0, listed.stderr
    text = "".join(listed.stdout.split())  # however the table is wrapped
    assert "taylor" in text
    assert "ast-plugin-example-taylor" in text


def test_a_run_with_the_method_moves_the_masks_at_exact_sparsity(site: Path) -> None:
    found = answer(site, TRAIN)
    assert found["method"] == "taylor"
    # 12 * 32 + 32 * 32 + 32 * 4 = 1536 weights; half and a fifth of them
    assert found["total"] == 1536
    assert found["kept"] == {"s50": 768, "s80": 307}
    assert found["moved"] == {"s50": True, "s80": True}
    assert found["losses"][1] < 0.7 * found["losses"][0]

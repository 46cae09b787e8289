"""Imports go down only: the floors of the architecture, held by parsing every module.

A module may import from its own floor (without a cycle) and from those below, wherever the import stands;
only imports under ``if TYPE_CHECKING:`` may point up. Below floor 7 no host is named, and what is imported
at module level comes from the standard library or the core's own dependencies.
"""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = 6

FLOORS = {
    "config": 0,
    "errors": 0,
    "files": 0,
    "flag_settings": 0,
    "sub_nets": 0,
    "version": 0,
    "alternation": 1,
    "channels": 1,
    "correction": 1,
    "distributions": 1,
    "kept": 1,
    "mask_forms": 1,
    "masking": 1,
    "named_tensors": 1,
    "packs": 1,
    "patterns": 1,
    "private_entries": 1,
    "random_state": 1,
    "schedules": 1,
    "selection_kernels": 1,
    "sharding": 1,
    "turns": 1,
    "vr_pge": 1,
    "guests": 2,
    "anchors": 2,
    "masks": 2,
    "methods": 2,
    "norm_layers": 2,
    "normalization": 2,
    "packed_masks": 2,
    "parameters": 2,
    "samplers": 2,
    "sharded_masks": 2,
    "sharded_slots": 2,
    "slots": 2,
    "statistics": 2,
    "vr_pge_method": 2,
    "vr_pge_scores": 2,
    "channel_search": 3,
    "defaults": 3,
    "hookspecs": 3,
    "plugins": 3,
    "activation": 4,
    "attachment": 4,
    "checkpoint": 4,
    "compile": 4,
    "decisions": 4,
    "distributed": 4,
    "elastic": 4,
    "gradients": 4,
    "inactive": 4,
    "optimizers": 4,
    "plain_model": 4,
    "plans": 4,
    "recalibration": 4,
    "reference": 4,
    "rewinding": 4,
    "sliced_activation": 4,
    "sliced_copies": 4,
    "sliced_kernels": 4,
    "sliced_plans": 4,
    "sliced_probes": 4,
    "sliced_routes": 4,
    "sliced_tensors": 4,
    "sampling": 4,
    "sealed_file": 4,
    "sliced_model": 4,
    "updates": 4,
    "channel_scores": 4,
    "channel_states": 4,
    "channel_updates": 4,
    "weight_updates": 4,
    "grouping": 4,
    "tensor_exchange": 4,
    "blocks": 5,
    "describe": 5,
    "dynamic": 5,
    "events": 5,
    "exploration": 5,
    "optimizer_modes": 5,
    "export": 5,
    "parts": 5,
    "preview": 5,
    "profiles": 5,
    "report": 5,
    "step": 5,
    "training": 5,
    "twins": 5,
    "versions": 5,
    "wrapping": 5,
    "__init__": TOP,
    "__main__": TOP,
    "cli": TOP,
    "demo": TOP,
}
# A concept that grew past one file is split as report.py, report_html.py, ...: the parts stand on the same floor.
SPLIT_CONCEPTS = (
    "attachment",
    "channel_search",
    "cli",
    "compile",
    "demo",
    "dynamic",
    "elastic",
    "export",
    "patterns",
    "plugins",
    "profiles",
    "report",
    "step",
    "training",
    "wrapping",
)

HOSTS = frozenset({"accelerate", "timm", "transformers", "lightning", "pytorch_lightning"})
CORE_DEPENDENCIES = frozenset({"numpy", "pluggy", "safetensors", "torch"})
OPTIONAL_DEPENDENCIES = HOSTS | {
    *("matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn", "torch_pruning", "torchvision"),
    "yaml",  # timm and transformers need it
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module: full dotted name, line, and where the statement stands."""

    target: str
    line: int
    type_checking: bool
    in_function: bool


def floor_of(name: str) -> int | None:
    """Return the floor of the module `name` (file name without suffix), None where the table has none."""
    if name in FLOORS:
        return FLOORS[name]
    for concept in SPLIT_CONCEPTS:
        if name.startswith(f"{concept}_"):
            return FLOORS[concept]
    return None


def imports_of(source: str, package: str, modules: frozenset[str]) -> list[Import]:
    """Return every import in `source`, a module that lies directly in `package`; `modules` are its siblings."""
    found: list[Import] = []

    def add(target: str, node: ast.AST, type_checking: bool, in_function: bool) -> None:
        found.append(Import(target, node.lineno, type_checking, in_function))  # type: ignore[attr-defined]  # a statement

    def visit(node: ast.AST, type_checking: bool, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node, type_checking, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                # `from ast_plugin import errors` names a module, `from ast_plugin import wrap` the package itself
                add(
                    f"{base}.{alias.name}" if base == package and alias.name in modules else base,
                    node,
                    type_checking,
                    in_function,
                )
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
                add(node.args[0].value, node, type_checking, in_function)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, True, in_function)
            for child in node.orelse:
                visit(child, type_checking, in_function)
            return
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, type_checking, inside)

    visit(ast.parse(source), False, False)
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Return a sentence for each import that breaks a rule; `sources` maps module names of `ast_plugin` to text."""
    modules = frozenset(sources)
    wrong = [
        f"{name}.py has no floor; enter it in FLOORS of tests/test_floors.py"
        for name in sources
        if floor_of(name) is None
    ]
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        floor = floor_of(name)
        for imported in imports_of(source, "ast_plugin", modules):
            where = f"{name}.py:{imported.line}"
            root, _, rest = imported.target.partition(".")
            if root in HOSTS:
                wrong.append(f"{where} names the host {root}; only integrations/ may")
            if root == "ast_plugin":
                target = rest.partition(".")[0] or "__init__"
                if target == "integrations":
                    wrong.append(f"{where} imports integrations, which stands above everything else")
                    continue
                below = floor_of(target)
                if below is None:
                    wrong.append(f"{where} imports ast_plugin.{target}, which has no floor")
                elif floor is not None and below > floor and not imported.type_checking:
                    wrong.append(f"{where} (floor {floor}) imports {target} (floor {below}): imports go down only")
                if not imported.type_checking and not imported.in_function and target in graph and target != name:
                    graph[name].add(target)
            elif root not in CORE_DEPENDENCIES and root not in sys.stdlib_module_names:
                if not (imported.type_checking or imported.in_function):
                    wrong.append(f"{where} imports {root} at module level; the core alone must be importable")
                elif root not in OPTIONAL_DEPENDENCIES:
                    wrong.append(f"{where} imports {root}, which no extra installs")
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        wrong.append(f"import cycle: {' -> '.join(error.args[1])}")
    return wrong


def package_sources() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "ast_plugin").glob("*.py"))}


def test_package_keeps_its_floors() -> None:
    assert violations(package_sources()) == []


def test_package_is_flat() -> None:
    # The floors are a table of files; a sub-package would escape them.
    folders = [path.name for path in (ROOT / "ast_plugin").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == []


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"errors": "import ast_plugin.training"}, "errors.py:1 (floor 0) imports training (floor 5)"),
        ({"masks": "from ast_plugin.plugins import PluginRegistry"}, "masks.py:1 (floor 2) imports plugins (floor 3)"),
        ({"masks": "from .plugins import PluginRegistry"}, "masks.py:1 (floor 2) imports plugins (floor 3)"),
        ({"masks": "from . import plugins", "plugins": ""}, "masks.py:1 (floor 2) imports plugins (floor 3)"),
        (
            {"masks": "def f():\n    from ast_plugin import cli", "cli": ""},
            "masks.py:2 (floor 2) imports cli (floor 6)",
        ),
        ({"training": "from ast_plugin import wrap"}, "training.py:1 (floor 5) imports __init__ (floor 6)"),
        ({"report_html": "import ast_plugin.demo_model"}, "report_html.py:1 (floor 5) imports demo_model (floor 6)"),
        ({"masks": "import importlib\nimportlib.import_module('ast_plugin.cli')"}, "masks.py:2 (floor 2) imports cli"),
        ({"cli": "def f():\n    import timm.models"}, "cli.py:2 names the host timm"),
        ({"cli": "from transformers import Trainer"}, "cli.py:1 names the host transformers"),
        ({"cli": "if TYPE_CHECKING:\n    import timm"}, "cli.py:2 names the host timm"),
        ({"cli": "from importlib.util import find_spec\nfind_spec('timm')"}, "cli.py:2 names the host timm"),
        ({"cli": "import ast_plugin.integrations.timm"}, "cli.py:1 imports integrations"),
        ({"report": "import rich.table"}, "report.py:1 imports rich at module level"),
        ({"report": "def f():\n    import pandas"}, "report.py:2 imports pandas, which no extra installs"),
        ({"novelty": ""}, "novelty.py has no floor"),
        ({"masks": "import ast_plugin.methods", "methods": "import ast_plugin.masks"}, "import cycle: "),
    ],
)
def test_check_finds_a_planted_violation(sources: dict[str, str], message: str) -> None:
    found = violations(sources)
    assert len(found) >= 1
    assert message in found[0]


@pytest.mark.parametrize(
    "sources",
    [
        {"training": "import ast_plugin.errors\nfrom ast_plugin.masks import MaskStore\nimport torch, json"},
        {"elastic": "from ast_plugin.activation import put_on", "activation": ""},
        {"masks": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ast_plugin.training import X"},
        {"report": "def f():\n    from rich.table import Table"},
        {"training": "from . import errors", "errors": ""},
    ],
)
def test_check_accepts_what_is_allowed(sources: dict[str, str]) -> None:
    assert violations(sources) == []


IMPORT_EVERYTHING = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
print("imported", len({modules!r}))
"""


LOOK_UP = """
import ast_plugin
from ast_plugin.errors import MissingExtraError

def look_up(package):
    needing = set()
    public = getattr(package, "__all__", ())
    extra = "lightning" if package.__name__.endswith("lightning") else "hf"
    for name in public:
        try:
            getattr(package, name)
        except MissingExtraError as error:
            assert f"ast-plugin[{extra}]" in str(error), error
            needing.add(name)
    of_the_host = {"ASTCallback", "ASTTrainerMixin", "attach"} & set(public)
    assert needing >= of_the_host, needing
    assert not needing & {"ASTArguments", "TimmSelection", "TransformersSelection", "wrap"}, needing
"""


def test_integrations_are_importable_without_their_hosts(tmp_path: Path) -> None:
    # Of their public names, those that are made of the host's own classes say which extra is missing.
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "integrations").glob("*/**/__init__.py")]
    packages = [f"ast_plugin.{'.'.join(folder.parts)}" for folder in folders]
    names = "\n".join(f"look_up({name})" for name in packages)
    blocked, modules = sorted(OPTIONAL_DEPENDENCIES), ["ast_plugin.integrations", *packages]
    script = IMPORT_EVERYTHING.format(blocked=blocked, modules=modules) + LOOK_UP + f"{names}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules)}"
    assert len(packages) >= 1


def test_every_module_is_importable_with_the_core_dependencies_alone(tmp_path: Path) -> None:
    modules = [f"ast_plugin.{name}" for name in package_sources() if name not in ("__init__", "__main__")]
    script = IMPORT_EVERYTHING.format(blocked=sorted(OPTIONAL_DEPENDENCIES), modules=["ast_plugin", *modules])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules) + 1}"


def test_the_page_names_every_module_on_its_floor() -> None:
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))
    named = {
        int(floor): set(re.findall(r"`([\w*]+)`", modules)) for floor, modules in rows.items() if int(floor) <= TOP
    }
    parts = {name for name in package_sources() if name not in FLOORS}
    split = {concept for concept in SPLIT_CONCEPTS if any(part.startswith(f"{concept}_") for part in parts)}
    expected: dict[int, set[str]] = {floor: set() for floor in range(TOP + 1)}
    for name, floor in FLOORS.items():
        expected[floor].add(f"{name}*" if name in split else name)
    assert named == expected

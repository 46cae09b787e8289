"""The rest of the family comes in through public hooks: floors 0 to 6 know none of it, not even by name.

`test_floors.py` holds the imports. Here the words are held: code, docstrings and comments of `ast_plugin/*.py` name
none of the plugins, orders, accessors and frameworks that live in `integrations/family` and `integrations/frameworks`.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from networks import mlp

import ast_plugin
from ast_plugin.integrations.family import plugin as family
from ast_plugin.plugins import PluginRegistry

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "ast_plugin").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# What each word stands for is in docs/; torch-pruning is missing because the core's own search for channels uses it.
WORDS = (
    r"super.?posed|superposition",
    r"ticket",
    r"dense.?pivot",
    r"cocktail",
    r"(?<![a-z])joint",
    r"ensembl",
    r"sparsifier",
    r"sparsimony",
    r"rigl.?torch",
    r"torch\.ao\b|ao\.pruning",
    r"utils\.prune|nn\.prune",
    r"lightning",
    r"(?<![a-z])accelerate(?!d)",  # `torch.accelerator` is torch's
    r"\bfabric\b",
)


def named(source: str) -> list[str]:
    """Return the words of the family that occur in a text, as they stand there."""
    return [match[0] for word in WORDS for match in re.finditer(word, source, re.IGNORECASE)]


def test_no_module_of_the_core_names_any_of_it() -> None:
    assert len(CORE) > 100
    found = {path.name: named(f"{path.stem}\n{path.read_text(encoding='utf-8')}") for path in CORE}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class SupTickets: ...", ["Ticket"]),
        ('"""The super-posed masks."""', ["super-posed"]),
        ("alternation = 'dense_pivot'", ["dense_pivot"]),
        ("# as in joint training", ["joint"]),
        ("def joint_steps(of): JointSteps()", ["joint", "Joint"]),
        ("def accelerate_loop(): ...", ["accelerate"]),
        ("def ensemble(self): ...", ["ensembl"]),
        ("import sparsimony", ["sparsimony"]),
        ("from torch.ao.pruning import BaseSparsifier", ["Sparsifier", "torch.ao"]),
        ("torch.nn.utils.prune.remove(module)", ["utils.prune"]),
        ("import lightning.pytorch, accelerate", ["lightning", "accelerate"]),
        ("rigl_torch.RigL, rigl-torch", ["rigl_torch", "rigl-torch"]),
        ("the sets are disjoint; torch.accelerator; method rigl", []),
    ],
)
def test_check_finds_a_planted_word(source: str, words: list[str]) -> None:
    assert named(source) == words


def test_the_family_is_an_installed_plugin_like_anybody_s() -> None:
    points = PROJECT["entry-points"]
    assert points["ast_plugin"]["family"] == "ast_plugin.integrations.family.plugin"
    assert set(points["ast_plugin.elastic"]) == {"ensemble"}


def test_without_its_plugin_the_core_does_not_know_its_orders() -> None:
    own = {record.name for record in family.ast_alternations()}
    assert own >= {"dense_pivot"}
    assert not own & set(PluginRegistry(autoload=False).alternations())
    assert own <= set(PluginRegistry([family], autoload=False).alternations())


def test_blocking_it_takes_its_names_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AST_PLUGIN_DISABLE_AUTOLOAD", "1")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ast_plugin.ConfigError, match="unknown alternation 'dense_pivot'"):
        ast_plugin.wrap(optimizer, model, sparsities=(0.0, 0.5, 0.9), alternation="dense_pivot", total_steps=60)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

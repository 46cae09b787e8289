"""Determinism for every test, and the option that leaves out what needs an optional dependency."""

from __future__ import annotations

import ast
import gc
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy
import pytest
import torch

if TYPE_CHECKING:
    from timm_runs import Runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="leave out the tests marked extra(...)")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells start background jobs with Ctrl-C ignored, and tests of interrupts need it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The same examples in every run: what fails once fails again.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("repeatable")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out whole files whose `pytestmark` names an extra: they import it, so they must not be imported."""
    if config.getoption("--core") and collection_path.suffix == ".py":
        return marks_whole_file(collection_path.read_text(encoding="utf-8")) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--core"):
        left_out = [item for item in items if item.get_closest_marker("extra")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("extra")]


def pytest_collection_finish() -> None:
    freeze()


def freeze() -> None:
    """Have the garbage collector pass over what all tests have imported: a trainer calls it after every training."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let everything go at the end: some libraries complain of what is left."""
    gc.unfreeze()


def marks_whole_file(source: str) -> bool:
    """Tell whether a module-level ``pytestmark = pytest.mark.extra(...)`` (or a list with one) stands in `source`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            return any(isinstance(inner, ast.Attribute) and inner.attr == "extra" for inner in ast.walk(node.value))
    return False


@pytest.fixture(autouse=True, scope="module")
def frozen_again() -> Iterator[None]:
    """Freeze once more after tests of benchmarks, which have the collector look at everything when they are done."""
    yield
    if not gc.get_freeze_count():
        freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of timm's training scripts, shared by all tests; needs the extra `timm`."""
    from timm_runs import Runs

    return Runs(tmp_path_factory.mktemp("timm"))

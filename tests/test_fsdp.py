"""FSDP2 on two ranks: sharded parameters with sharded masks, equal to one process, saved and resumed."""

from __future__ import annotations

import pytest
from fsdp_checks import CHECKS
from ranks import run_checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks("fsdp_checks", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(results: dict[str, str], name: str) -> None:
    assert results.get("launch", "ok") == "ok"
    assert results[name] == "ok"

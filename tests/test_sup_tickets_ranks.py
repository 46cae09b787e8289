"""Sup-tickets on two ranks."""

from __future__ import annotations

import pytest
from ranks import run_checks
from sup_tickets_checks import CHECKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks("sup_tickets_checks", tmp_path_factory.mktemp("sup_tickets"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(results: dict[str, str], name: str) -> None:
    assert results.get("launch", "ok") == "ok"
    assert results[name] == "ok"

"""VR-PGE on two ranks: losses are averaged, and probabilities and masks are the same everywhere."""

from __future__ import annotations

import pytest
from ranks import run_checks
from vr_pge_ranks import CHECKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks("vr_pge_ranks", tmp_path_factory.mktemp("vr_pge"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(results: dict[str, str], name: str) -> None:
    assert results.get("launch", "ok") == "ok"
    assert results[name] == "ok"

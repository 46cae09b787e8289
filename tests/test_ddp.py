"""DistributedDataParallel on two ranks: equal to one process, identical masks, and nothing that waits for ever."""

from __future__ import annotations

import pytest
from ddp_checks import CHECKS
from ranks import run_checks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks("ddp_checks", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(results: dict[str, str], name: str) -> None:
    assert results.get("launch", "ok") == "ok"
    assert results[name] == "ok"

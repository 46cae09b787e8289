"""Sparsifiers that decide masks on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_checks

pytestmark = [pytest.mark.slow, pytest.mark.extra("frameworks")]


def test_two_ranks_have_the_masks_of_one_process(tmp_path: Path) -> None:
    results = run_checks("frameworks_ranks", tmp_path)
    assert results == dict.fromkeys(results, "ok")
    assert "two_ranks_are_one_process_on_the_global_batch" in results

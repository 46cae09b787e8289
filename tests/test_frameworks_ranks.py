"""Decisions of other frameworks on two ranks: rigl-torch under DDP, importances of torch-pruning under FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_checks

pytestmark = [pytest.mark.slow, pytest.mark.extra("frameworks"), pytest.mark.extra("channels")]


def test_two_ranks_decide_as_one_process(tmp_path: Path) -> None:
    found = run_checks("framework_checks", tmp_path)
    assert found == {"a_run_of_rigl_torch_goes_on": "ok", "importances_see_whole_weights": "ok"}

"""Decisions of other frameworks on two ranks: rigl-torch and sparsifiers under DDP, importances under FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_checks

pytestmark = [pytest.mark.slow, pytest.mark.extra("frameworks"), pytest.mark.extra("channels")]


def test_two_ranks_decide_as_one_process(tmp_path: Path) -> None:
    found = run_checks("framework_checks", tmp_path)
    assert found == {"a_run_of_rigl_torch_goes_on": "ok", "importances_see_whole_weights": "ok"}


def test_two_ranks_have_the_masks_that_sparsifiers_decide_in_one_process(tmp_path: Path) -> None:
    found = run_checks("sparsifier_checks", tmp_path)
    assert found == {"two_ranks_are_one_process_on_the_global_batch": "ok"}

"""A data-parallel run of rigl-torch on two ranks, taken over."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_checks

pytestmark = [pytest.mark.slow, pytest.mark.extra("frameworks")]


def test_two_ranks_go_on_as_one_process(tmp_path: Path) -> None:
    assert run_checks("rigl_checks", tmp_path) == {"two_ranks_go_on_as_one_process": "ok"}

"""docs/distributed.md names every check that runs on several ranks, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import accelerate_checks
import ddp_checks
import fsdp_checks

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
MODULES = (accelerate_checks, ddp_checks, fsdp_checks)


def test_every_check_has_a_row_and_every_row_a_check() -> None:
    table = PAGE[PAGE.index("| setup | result |") :]
    named = re.findall(r"`((?:accelerate|ddp|fsdp)_checks\.\w+)`", table)
    assert sorted(named) == sorted(f"{module.__name__}.{name}" for module in MODULES for name in module.CHECKS)
    for file in re.findall(r"`(test_\w+)`", table):
        assert (ROOT / "tests" / f"{file}.py").is_file(), file

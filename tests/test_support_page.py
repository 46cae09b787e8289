"""The pages of setups name tests that exist, and every test of a setup is named there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = "\n".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("support.md", "transformers-setups.md", "lightning-setups.md")
)
PATTERNS = (
    *("test_setups_*.py", "test_transformers_setups*.py", "test_transformers_ranks.py"),
    *("test_lightning_setups.py", "test_lightning_ranks.py"),
)
HELPERS = {  # tests that hold what a row takes for granted
    "test_a_twin_of_a_copy_starts_as_the_run_is_and_follows_it_on_request",
    "test_blocks_of_a_twin_nest_and_end_dense_after_an_exception",
    "test_what_is_no_twin_is_refused",
}


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def sections() -> dict[str, set[str]]:
    """Return the tests that the page names, by the file that the section names."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        file = re.search(r"^`(test_\w+\.py)`", section, re.MULTILINE)
        if file:
            found[file[1]] = set(re.findall(r"`(test_\w+)` \|$", section, re.MULTILINE))
    return found


def test_the_pages_have_a_section_for_every_file_of_setups() -> None:
    files = {path.name for pattern in PATTERNS for path in (ROOT / "tests").glob(pattern)}
    assert files <= sections().keys()
    assert sum(map(len, sections().values())) > 50


@pytest.mark.parametrize("file", sorted(sections()))
def test_a_section_names_the_tests_of_its_file(file: str) -> None:
    named, there = sections()[file], names_in(file)
    assert named - there == set()
    assert there - named - HELPERS == set()


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| setup ")]
    assert [line for line in rows if not re.search(r"\| `test_\w+` \|$", line)] == []

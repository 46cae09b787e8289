"""The tables in docs/optimizers.md name every optimizer and scheduler that the installed versions offer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from optimizer_cases import CASES
from scheduler_cases import timm_schedulers, torch_schedulers

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
REMEDY = "run scripts/optimizer_table.py"


def rows_under(heading: str) -> dict[str, list[list[str]]]:
    """Return the rows of the table under a heading by what stands in their first cell."""
    section = re.split(r"^#{2,3} ", PAGE.partition(f" {heading}\n")[2], flags=re.MULTILINE)[0]
    rows: dict[str, list[list[str]]] = {}
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows.setdefault(cells[0], []).append(cells)
    return rows


@pytest.mark.parametrize(
    "source",
    [
        "torch.optim",
        pytest.param("timm", marks=pytest.mark.extra("timm")),
        pytest.param("schedulefree", marks=pytest.mark.extra("schedulefree")),
    ],
)
def test_every_optimizer_has_its_rows(source: str) -> None:
    rows = rows_under(source)
    for name in {case.name for case in CASES[source]()}:
        assert name in rows, f"{name} is missing in docs/optimizers.md; {REMEDY}"
    options = {case.label for case in CASES[source]()}
    assert sum(map(len, rows.values())) - 1 >= len(options), REMEDY  # one row is the head


@pytest.mark.parametrize("source", sorted(CASES))
def test_no_row_says_no_and_each_refusal_has_a_reason(source: str) -> None:
    rows = [row for rows in rows_under(source).values() for row in rows][1:]
    assert len(rows) >= 5
    for name, _, *results, note in rows:
        if note.startswith("refused: "):
            assert len(note) > 40, name
        elif note.startswith("not run: "):
            assert results == ["–"] * 3, name
        else:
            assert results == ["yes"] * 3, (name, REMEDY)


def test_every_scheduler_of_torch_has_its_row() -> None:
    rows = rows_under("Learning rate schedulers")
    for case in torch_schedulers():
        assert rows[case.name][0][2:] == ["yes", "yes"], REMEDY


@pytest.mark.extra("timm")
def test_every_scheduler_of_timm_has_its_row() -> None:
    rows = rows_under("Learning rate schedulers")
    for case in timm_schedulers():
        assert rows[case.name][0][2:] == ["yes", "yes"], REMEDY

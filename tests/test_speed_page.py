"""docs/speed.md and benchmarks/speed_page.py: the tables are those of the result files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("speed_page")


def test_the_page_shows_what_is_on_file(page: Any) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.renewed(text) == text
    assert {match["name"] for match in page.MARKER.finditer(text)} == set(page.TABLES)


def test_a_table_of_training_by_hand(page: Any) -> None:
    factors = {"dense, channels_last": [1.3, 1.3, 1.3, 1.25], "leaves": [1.5, 2.5, 3.456, 2.2]}
    results = {"kept": [0.5, 0.25, 0.1], "networks": {"ResNet-32": {"dense_ms": 517.3, "factors": factors}}}
    assert page.training(results, "ResNet-32").splitlines() == [
        "|  | kept 0.5 | kept 0.25 | kept 0.1 | whole run |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| dense (517 ms) | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| dense, channels_last | 1.25 | 1.25 | 1.25 | 1.25 |",
        "| leaves | 1.50 | 2.50 | 3.46 | 2.20 |",
        "| wanted, leaves | 1.4 | 1.65 | 1.9 |  |",
    ]


def test_a_table_of_inference_by_hand(page: Any) -> None:
    row = {"engine": "PyTorch", "name": "sliced", "ms": 51.63, "factor": 1.668, "at_least": 1.9}
    results = {"parts": {"ResNet-50": {"rows": [row, {**row, "name": "dense", "factor": 1.0, "at_least": None}]}}}
    assert page.inference(results, "ResNet-50").splitlines()[2:] == [
        "| PyTorch | sliced | 51.6 | 1.67 | 1.9 |",
        "| PyTorch | dense | 51.6 | 1.00 |  |",
    ]

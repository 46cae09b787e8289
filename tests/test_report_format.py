from __future__ import annotations

import math

import pytest

from ast_plugin.report_format import (
    clean,
    cosine,
    count,
    decimal,
    decimals,
    duration,
    elided,
    grouped,
    layer_labels,
    percent,
    shape,
    short_percent,
)


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.9, 2, "90.00 %"),
        (0.0, 2, "0.00 %"),
        (1.0, 1, "100.0 %"),
        (0.99999, 2, "99.999 %"),  # 100.00 % would say that nothing is left
        (0.00001, 1, "0.001 %"),
        (1 - 1e-15, 2, "100.00 %"),
        (None, 2, "–"),
    ],
)
def test_percent_is_not_rounded_to_all_or_nothing(share: float | None, digits: int, text: str) -> None:
    assert percent(share, digits) == text


def test_short_percent_has_no_trailing_zeros() -> None:
    assert [short_percent(share) for share in (0.9, 0.995, 0.0, 1.0)] == ["90 %", "99.5 %", "0 %", "100 %"]
    assert [short_percent(share, 2) for share in (0.79999, 0.99999)] == ["80 %", "99.999 %"]
    assert short_percent(0.9, 0) == "90 %"


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1.00 k"),
        (23_454_912, "", "23.5 M"),
        (999_600, "", "1.00 M"),
        (4_089_184_256, "FLOP", "4.09 GFLOP"),
        (12, "FLOP", "12 FLOP"),
        (3e18, "", "3000 P"),
        (None, "", "–"),
    ],
)
def test_counts_have_three_digits_and_a_prefix(number: float | None, unit: str, text: str) -> None:
    assert count(number, unit) == text


def test_figures_of_a_column_have_equally_many_digits() -> None:
    assert decimals([0.927, 0.8919, None]) == ["0.9270", "0.8919", "–"]
    assert decimals([93.391, -8.5]) == ["93.39", "−8.50"]
    assert decimals([12, 300]) == ["12", "300"]
    assert decimals([1e-7, 2000.0]) == ["1e-07", "2000"]
    assert decimals([None]) == ["–"]
    assert decimals([3.6718, math.nan, -math.inf, None]) == ["3.672", "nan", "−inf", "–"]
    assert decimals([math.nan, math.inf]) == ["nan", "inf"]


def test_single_figures() -> None:
    assert [decimal(value) for value in (0.12345, -2.0, 123456.0, None)] == ["0.1235", "−2", "123456", "–"]
    assert [cosine(value) for value in (0.05, -0.05, None)] == ["+0.050", "−0.050", "–"]
    assert [grouped(value) for value in (1234567, None)] == ["1,234,567", "–"]
    assert [shape(value) for value in ((3, 4), ())] == ["3 × 4", "scalar"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23, "1.2 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (151.3, "2 min 31 s"), (7322, "2 h 2 min"), (None, "–")],
)
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_names_cannot_break_or_reorder_a_line() -> None:
    assert (
        clean("a\nb\x00c\u202ed\ud800")
        == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}cd\N{REPLACEMENT CHARACTER}"
    )


def test_long_names_keep_both_ends() -> None:
    assert elided("short", 10) == "short"
    assert elided("layer1.block.conv.weight", 11) == "layer…eight"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.a.weight", "model.b.weight"], ["a", "b"]),
        (["a.weight", "a.bias"], ["weight", "bias"]),
        (["model.a.weight"], ["model.a"]),
        (["weight", "fc.weight"], ["weight", "fc.weight"]),
        ([], []),
    ],
)
def test_layer_labels_leave_out_what_all_share(names: list[str], labels: list[str]) -> None:
    assert layer_labels(names) == labels

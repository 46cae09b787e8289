from __future__ import annotations

import dataclasses
import io
import sys

import pytest
from report_examples import run_report

from ast_plugin.report import Report
from ast_plugin.report_text import TextTable, plain_table, split_columns, sub_net_table


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)


def test_plain_table_by_hand() -> None:
    table = TextTable(title="Nets", columns=("net", "n"), rows=(("s90", "1"), ("s5", "1,234")))
    assert plain_table(table).splitlines() == ["Nets", "", "net      n", "---  -----", "s90      1", "s5   1,234"]


def test_columns_that_do_not_fit_follow_below() -> None:
    table = TextTable(title="T", columns=("net", "aaaa", "bbbb", "cccc"), rows=(("s90", "1", "2", "3"),))
    # widths with two blanks each: 5, 6, 6, 6
    first, second = split_columns(table, 17, headings_break=False)
    assert (first.title, first.columns, first.rows) == ("T", ("net", "aaaa", "bbbb"), (("s90", "1", "2"),))
    assert (second.title, second.columns, second.rows) == ("T (continued)", ("net", "cccc"), (("s90", "3"),))
    assert split_columns(table, 23, headings_break=False) == [table]
    assert len(split_columns(table, 1, headings_break=False)) == 3  # never without a column of its own


def test_headings_may_break_between_words() -> None:
    table = TextTable(title="T", columns=("net", "mean cosine"), rows=(("s90", "+0.1"),))
    assert len(split_columns(dataclasses.replace(table, columns=("net", "mean cosine")), 13, headings_break=True)) == 1


def test_sub_net_table_leaves_out_what_says_nothing() -> None:
    report = run_report(history=False)
    assert sub_net_table(report).columns == (
        "sub-net", "sparsity", "weights kept", "parameters", "FLOPs", "accuracy", "conflicts", "mean cosine",
    )  # fmt: skip
    bare = dataclasses.replace(
        report,
        dense_flops=None,
        sub_nets=tuple(
            dataclasses.replace(net, parameters=None, metrics={}, checks=0, target_sparsity=0.5, pattern="4x4")
            for net in report.sub_nets
        ),
    )
    assert sub_net_table(bare).columns == ("sub-net", "pattern", "target", "sparsity", "weights kept")


@pytest.mark.usefixtures("without_rich")
def test_plain_text_tells_everything_without_rich() -> None:
    text = run_report((0.9, 0.98)).render_terminal(layers=True, width=200)
    assert text.splitlines()[:2] == [
        "ResNet on digits",
        "1,200 optimizer steps, 2 min 31 s, dense network: 304 k parameters, 38.8 MFLOP on 1 x 1 x 8 x 8",
    ]
    lines = [line.split() for line in text.splitlines()]
    assert ["s90", "90.00", "%", "30,246", "32.2", "k", "4.65", "M", "0.9270", "–", "–"] in lines
    assert ["s98", "98.00", "%", "6,049", "8.05", "k", "930", "k", "0.8456", "3,906", "(31", "%)", "+0.052"] in lines
    assert ["s98", "93.0", "%", "100.0", "%"] in lines
    assert any(line[:2] == ["fc", "10"] for line in lines)
    assert "no faster and saves no memory by itself" in text


@pytest.mark.usefixtures("without_rich")
def test_plain_text_keeps_to_the_width() -> None:
    text = run_report((0.5, 0.8, 0.9, 0.95, 0.98, 0.99), metrics=("a", "b", "c")).render_terminal(width=60)
    tables = [line for line in text.splitlines() if line.startswith(("s5", "s8", "s9", "sub-net", "---"))]
    assert max(map(len, tables)) <= 60
    assert "Sub-nets (continued)" in text


@pytest.mark.extra("report")
@pytest.mark.parametrize("width", [40, 80, 160])
def test_rich_tables_keep_to_the_width_and_cut_nothing(width: int) -> None:
    report = run_report(metrics=("accuracy", "loss", "a metric with a long name"))
    text = report.render_terminal(width=width, layers=True, color=False)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("30,246", "2,604 (31 %)", "4.65 M", "16 × 16 × 3 × 3"):
        assert figure in text


@pytest.mark.extra("report")
def test_colours_are_used_only_where_wanted() -> None:
    assert "\x1b[" in run_report().render_terminal(width=80, color=True)
    assert "\x1b[" not in run_report().render_terminal(width=80, color=False)


@pytest.mark.extra("report")
def test_brackets_in_names_are_no_markup() -> None:
    report = dataclasses.replace(run_report(), title="[red]run[/red]\nnext")
    assert "[red]run[/red]\N{REPLACEMENT CHARACTER}next" in report.render_terminal(width=80, color=False)


def test_run_off_target_is_pointed_out() -> None:
    report = run_report()
    late = dataclasses.replace(report.sub_nets[2], achieved_sparsity=0.5)
    text = dataclasses.replace(report, sub_nets=(*report.sub_nets[:2], late)).render_terminal(width=120)
    assert "Not at the target sparsity: s98." in text
    assert "98.00 %" in text
    assert "50.00 %" in text


def test_output_without_unicode_gets_plain_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    text = run_report().render_terminal(width=100, layers=True)
    print(text)
    assert text.isascii()
    assert "16 x 16 x 3 x 3" in text


def test_report_about_nothing_is_text_too() -> None:
    text = Report(title="nothing", sub_nets=()).render_terminal(width=80)
    assert text.startswith("nothing\nNo training on record")


@pytest.mark.extra("report")
@pytest.mark.parametrize("width", range(40, 130, 3))
def test_no_figure_is_cut_at_any_width(width: int) -> None:
    report = run_report()
    figures = set(report.render_terminal(width=500, color=False).split())
    shown = report.render_terminal(width=width, color=False)
    assert {figure for figure in figures if figure[:1] in "+-0123456789"} <= set(shown.split())
    assert all(len(line) <= width for line in shown.splitlines())

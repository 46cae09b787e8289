"""The report as text: a table by rich where it is installed, a plain aligned one elsewhere."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ast_plugin.report_format import (
    ABSENT,
    clean,
    cosine,
    count,
    decimals,
    duration,
    grouped,
    layer_labels,
    percent,
    shape,
)

if TYPE_CHECKING:
    from ast_plugin.report import Report

SIMULATED = (
    "Masks are simulated sparsity: zeros stored in dense tensors, which is no faster and saves no memory by itself. "
    "FLOPs are theoretical."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table before it is drawn.

    Attributes:
        title: What it shows.
        columns: Headings; the first column is set left, the others right.
        rows: Cells, as many a row as there are columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_text(report: Report, *, layers: bool = False, width: int | None = None, color: bool | None = None) -> str:
    """Return the report as lines of text, without a line break at the end.

    Args:
        report: What to show.
        layers: Whether to add the sparsity of every layer.
        width: Columns to use; None takes the terminal's.
        color: Whether to use colours; None uses them where standard output is a terminal.
    """
    tables = [sub_net_table(report)]
    if len(report.sub_nets) > 1 and report.overlap:
        tables.append(overlap_table(report))
    if layers:
        tables.append(layer_table(report))
    return render_tables([clean(report.title), _summary(report)], tables, _notes(report), width=width, color=color)


def render_tables(
    head: Sequence[str],
    tables: Sequence[TextTable],
    notes: Sequence[str],
    *,
    width: int | None = None,
    color: bool | None = None,
) -> str:
    """Return tables under a heading, by rich where it is installed, without a line break at the end.

    Args:
        head: Lines above, the first one as title; at least one.
        tables: What is drawn; those too wide are split by columns.
        notes: Lines below.
        width: Columns to use; None takes the terminal's.
        color: Whether to use colours; None uses them where standard output is a terminal.
    """
    columns = shutil.get_terminal_size().columns if width is None else width
    try:
        text = _with_rich(head, tables, notes, columns, sys.stdout.isatty() if color is None else color)
    except ImportError:
        drawn = [plain_table(part) for table in tables for part in split_columns(table, columns, headings_break=False)]
        text = "\n\n".join(["\n".join(head), *drawn, *notes])
    return text if _unicode_output() else _ascii(text)


def sub_net_table(report: Report) -> TextTable:
    """Return the table with one row a sub-net; columns that would say nothing are left out."""
    nets = report.sub_nets
    metrics = list(dict.fromkeys(metric for net in nets for metric in net.metrics))
    columns: dict[str, list[str]] = {"sub-net": [clean(net.name) for net in nets]}
    if any(net.pattern not in ("unstructured", net.name) for net in nets):
        columns["pattern"] = [clean(net.pattern) for net in nets]
    if not all(net.on_target for net in nets):
        columns["target"] = [percent(net.target_sparsity) for net in nets]
    if any(net.dropped_channels is not None for net in nets):
        columns["channels dropped"] = [
            ABSENT if net.dropped_channels is None else percent(net.dropped_channels) for net in nets
        ]
    columns["sparsity"] = [percent(net.achieved_sparsity) for net in nets]
    columns["weights kept"] = [grouped(net.kept_weights) for net in nets]
    if any(net.parameters is not None for net in nets):
        columns["parameters"] = [count(net.parameters) for net in nets]
    if report.dense_flops is not None:
        columns["FLOPs"] = [count(net.flops) for net in nets]
    for metric in metrics:
        columns[clean(metric)] = decimals([net.metrics.get(metric) for net in nets])
    if any(net.checks for net in nets):
        columns["conflicts"] = [
            f"{grouped(net.conflicts)} ({percent(net.conflict_rate, 0)})" if net.checks else ABSENT for net in nets
        ]
        columns["mean cosine"] = [cosine(net.mean_cosine) for net in nets]
    return TextTable(
        title="Sub-nets",
        columns=tuple(columns),
        rows=tuple(zip(*columns.values(), strict=True)),
    )


def overlap_table(report: Report) -> TextTable:
    """Return the overlap matrix: share of the row's kept weights that the column keeps too."""
    names = [clean(net.name) for net in report.sub_nets]
    return TextTable(
        title="Share of the row's weights that the column keeps too",
        columns=("", *names),
        rows=tuple(
            (name, *(percent(share, 1) for share in row)) for name, row in zip(names, report.overlap, strict=True)
        ),
    )


def layer_table(report: Report) -> TextTable:
    """Return the sparsity of every layer for every sub-net."""
    labels = layer_labels([layer.name for layer in report.layers], 40)
    return TextTable(
        title="Sparsity per layer",
        columns=("layer", "shape", *(clean(net.name) for net in report.sub_nets)),
        rows=tuple(
            (label, shape(layer.shape), *(percent(layer.sparsity.get(net.name), 1) for net in report.sub_nets))
            for label, layer in zip(labels, report.layers, strict=True)
        ),
    )


def plain_table(table: TextTable) -> str:
    """Return a table aligned with blanks, a rule under its head, no characters beyond those of its cells."""
    lines: Sequence[tuple[str, ...]] = (table.columns, *table.rows)
    widths = _min_widths(table, headings_break=False)
    drawn = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in (table.title, "", drawn[0], rule, *drawn[1:]))


def split_columns(table: TextTable, width: int, *, headings_break: bool) -> list[TextTable]:
    """Return the table in parts that fit `width` characters, each with the first column again.

    Args:
        table: What is to be drawn.
        width: Characters that a line can hold, two of them between columns.
        headings_break: Whether a heading may be broken between its words.
    """
    sizes = [min_width + 2 for min_width in _min_widths(table, headings_break=headings_break)]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(sizes)):
        if len(parts[-1]) > 1 and sum(sizes[i] for i in parts[-1]) + sizes[column] > width:
            parts.append([0])
        parts[-1].append(column)
    return [
        TextTable(
            title=table.title if n == 0 else f"{table.title} (continued)",
            columns=tuple(table.columns[i] for i in part),
            rows=tuple(tuple(row[i] for i in part) for row in table.rows),
        )
        for n, part in enumerate(parts)
    ]


def _min_widths(table: TextTable, *, headings_break: bool) -> list[int]:
    """Return how wide each column must be so that no cell is cut."""
    widths = []
    for i, heading in enumerate(table.columns):
        words = heading.split(" ") if headings_break else [heading]
        widths.append(max(len(text) for text in (*words, *(row[i] for row in table.rows))))
    return widths


def _fitted_widths(table: TextTable, width: int) -> list[int]:
    """Return column widths that fit `width`, headings on one line as far as there is room.

    rich left alone narrows columns below their figures when it has to break headings.
    """
    least, most = _min_widths(table, headings_break=True), _min_widths(table, headings_break=False)
    room = width - sum(least) - len(least) - 1
    fitted = []
    for narrow, wide in zip(least, most, strict=True):
        more = max(0, min(wide - narrow, room))
        # A heading either gets its line or stays broken; part of the room would not help it.
        more = more if narrow + more == wide else 0
        room -= more
        fitted.append(narrow + more)
    return fitted


def _with_rich(head: Sequence[str], tables: Sequence[TextTable], notes: Sequence[str], width: int, color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    system: Literal["standard"] | None = "standard" if color else None
    console = Console(file=out, width=width, force_terminal=color, color_system=system, highlight=False)
    console.print(Text(head[0], style="bold"), *(Text(line) for line in head[1:]), "", sep="\n")
    for table in [part for whole in tables for part in split_columns(whole, width, headings_break=True)]:
        drawn = Table(box=box.SIMPLE_HEAD, padding=0)
        for i, (heading, exactly) in enumerate(zip(table.columns, _fitted_widths(table, width), strict=True)):
            drawn.add_column(Text(heading), justify="right" if i else "left", style="" if i else "bold", width=exactly)
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(Text(table.title, style="bold"), drawn, sep="\n")
    for note in notes:
        console.print(Text(note, style="dim"))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def _summary(report: Report) -> str:
    """Return one line about the run."""
    parts = [f"{grouped(report.steps)} optimizer steps" if report.steps else ""]
    if report.elapsed_seconds is not None:
        parts.append(duration(report.elapsed_seconds))
    if report.dense_parameters is not None:
        parts.append(f"dense network: {count(report.dense_parameters)} parameters")
    if report.dense_flops is not None:
        parts.append(f"{count(report.dense_flops, 'FLOP')} on {clean(report.example_input)}")
    return ", ".join(part for part in parts if part) or "No training on record"


def _notes(report: Report) -> list[str]:
    notes = [SIMULATED]
    late = [clean(net.name) for net in report.sub_nets if not net.on_target]
    if late:
        notes.insert(0, f"Not at the target sparsity: {', '.join(late)}.")
    return notes


def _unicode_output() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "").startswith("utf")


def _ascii(text: str) -> str:
    """Return `text` for an output that cannot show more than ASCII; a failed print would lose everything."""
    replaced = text.translate({ord(ABSENT): "-", 0x2212: "-", 0xD7: "x", 0x2026: "~", 0x2500: "-", 0x2501: "-"})
    return replaced.encode("ascii", "replace").decode("ascii")

"""A profile as text: one row for each sub-net and form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ast_plugin.report_format import ABSENT, clean, count, decimals, percent
from ast_plugin.report_text import TextTable, render_tables

if TYPE_CHECKING:
    from ast_plugin.profiles_records import Profile

_NOTE = (
    "Latency is the median of a call on this machine, measured on this input. Memory and file are those of one network "
    "in this form; the elastic file holds all sub-nets."
)


def render_profile(profile: Profile, *, width: int | None = None, color: bool | None = None) -> str:
    """Return the profile as lines of text, without a line break at the end.

    Args:
        profile: What to show.
        width: Columns to use; None takes the terminal's.
        color: Whether to use colours; None uses them where standard output is a terminal.
    """
    machine = [
        f"input {profile.example_input}" if profile.example_input else "",
        f"{profile.threads} threads" if profile.threads > 1 else "one thread" if profile.threads else "",
        f"{profile.runs} calls each" if profile.runs else "",
        f"elastic file {count(profile.elastic_bytes, 'B')}" if profile.elastic_bytes is not None else "",
    ]
    head = ["Profile of the sub-nets", ", ".join(part for part in machine if part)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in profile.left_out:
        reasons.setdefault((entry.form, entry.reason), []).append(clean(entry.sub_net))
    notes = [
        f"Not measured: {clean(form)} of {', '.join(names)}: {clean(reason)}"
        for (form, reason), names in reasons.items()
    ]
    return render_tables(head, [profile_table(profile)], [*notes, _NOTE], width=width, color=color)


def profile_table(profile: Profile) -> TextTable:
    """Return the table with one row for each record; columns that would say nothing are left out.

    Args:
        profile: What to show.
    """
    records = profile.records
    dense = next((record.latency_ms for record in records if record.form == "dense"), None)
    columns = {
        "sub-net": [clean(record.sub_net) for record in records],
        "form": [clean(record.form) for record in records],
        "sparsity": [percent(record.sparsity) for record in records],
        **{clean(name): decimals([record.metrics.get(name) for record in records]) for name in profile.metrics},
        "latency, ms": decimals([record.latency_ms for record in records]),
        "p95, ms": decimals([record.p95_ms for record in records]),
    }
    if dense is not None:
        columns["faster than dense"] = [
            f"{dense_ms / record.latency_ms:.2f} x" if (dense_ms := _dense(profile, record.sub_net)) else ABSENT
            for record in records
        ]
    for heading, values, unit in (
        ("memory", [record.memory_bytes for record in records], "B"),
        ("file", [record.file_bytes for record in records], "B"),
        ("FLOPs", [record.flops for record in records], ""),
    ):
        if any(value is not None for value in values):
            columns[heading] = [count(value, unit) for value in values]
    return TextTable(title="Sub-nets by form", columns=tuple(columns), rows=tuple(zip(*columns.values(), strict=True)))


def _dense(profile: Profile, sub_net: str) -> float | None:
    """Return the latency of a sub-net computed densely, in milliseconds."""
    found = (r.latency_ms for r in profile.records if r.sub_net == sub_net and r.form == "dense")
    return next(found, None)

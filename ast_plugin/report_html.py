"""The report as one HTML page that opens from disk: no script, no network, pictures inside.

The page forbids itself both by a content security policy, so that nothing in a name can load or run anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ast_plugin import report_figures as figures
from ast_plugin.report_drawing import SERIES, mark_symbol
from ast_plugin.report_format import ABSENT, count, duration, grouped, percent, short_percent
from ast_plugin.report_markup import escaped, grid, muted, picture, scrolling, section
from ast_plugin.report_style import style_sheet
from ast_plugin.report_tables import layer_table, overlap_matrix, settings_table, sub_net_table

if TYPE_CHECKING:
    from ast_plugin.report import Report

_MOST_METRIC_PICTURES = 6
_TALL = 64
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SIMULATED = (
    "<strong>What is simulated.</strong> These sub-nets are masks over one set of weights: dropped weights are zeros "
    "stored in dense tensors. That alone makes nothing faster and saves no memory. FLOPs are theoretical: the work "
    "left for a runtime that skips every zero."
)
_STRETCHED = (
    "The axis of sparsity is stretched towards 100 %: equal distances are equal ratios of the weights that are left. "
    "The other axis need not start at zero."
)
_POINTS_AND_LINES = "Pale: single windows of steps. Line: means over wider windows, weighted by the number of checks."
_FLOPS = (
    "FLOPs: matrix products, convolutions and attention of one forward pass, two per multiply-add; each prunable "
    "layer's share times its density. "
)


def render_page(report: Report) -> str:
    """Return the whole page.

    Args:
        report: What to show.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    symbols = "".join(mark_symbol(i) for i in range(min(len(report.sub_nets), SERIES)))
    parts = (
        f"<svg width='0' height='0' class='symbols' aria-hidden='true'>{symbols}</svg>",
        _header(report),
        "<main>",
        section("Sub-nets", f"<div class='card'>{sub_net_table(report, _names(report))}</div>"),
        _reach(report),
        _zeros(report),
        _gradients(report),
        _details(report),
        "</main>",
        _footer(report),
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(report.title)}</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    facts = [f"{len(report.sub_nets)} sub-net{'s' * (len(report.sub_nets) != 1)} of one network"]
    if report.steps:
        facts.append(f"{grouped(report.steps)} optimizer steps")
    if "method" in report.settings:
        facts.append(f"method {escaped(report.settings['method'])}")
    notes = [_SIMULATED]
    late = [escaped(net.name) for net in report.sub_nets if not net.on_target]
    if late:
        notes.append(
            f"<strong>Not at the target.</strong> {', '.join(late)}: the masks have another sparsity than was asked "
            "for, as after a run that ended before the end of its schedule."
        )
    shown = "".join(f"<p class='note'>{note}</p>" for note in notes)
    return (
        f"<header><p class='over'>Alternating sparse training, report of ast-plugin</p><h1>{escaped(report.title)}</h1>"
        f"{muted(', '.join(facts))}<div class='tiles'>{_tiles(report)}</div>{shown}</header>"
    )


def _tiles(report: Report) -> str:
    """Return the key figures."""
    tiles = []
    shares = sorted(net.achieved_sparsity for net in report.sub_nets)
    if shares:
        low, high = (short_percent(share, 2) for share in (shares[0], shares[-1]))
        reach = low if low == high else f"{low.removesuffix(' %')} to {high}"
        tiles.append((reach, "achieved sparsity of the prunable weights"))
    if report.dense_parameters and report.sub_nets:
        share = percent(report.sub_nets[0].prunable_weights / report.dense_parameters, 1)
        tiles.append((count(report.dense_parameters), f"parameters when dense, {share} of them prunable"))
    if report.dense_flops is not None:
        example = f"<span class='one'>{escaped(report.example_input or ABSENT)}</span>"
        tiles.append((count(report.dense_flops, "FLOP"), f"when dense, on {example}"))
    if report.elapsed_seconds is not None:
        tiles.append((duration(report.elapsed_seconds), "of training, for all sub-nets together"))
    checks = sum(net.checks for net in report.sub_nets)
    if checks:
        rate = percent(sum(net.conflicts for net in report.sub_nets) / checks, 1)
        done = "" if _correction(report) in (None, "off") else " and were corrected"
        tiles.append((rate, f"of {grouped(checks)} gradient checks found a conflict{done}"))
    return "".join(f"<div class='tile'><strong>{value}</strong><span>{what}</span></div>" for value, what in tiles)


def _reach(report: Report) -> str:
    """Return what the sub-nets reach and what they share: metrics against sparsity, overlap of the masks."""
    names = [
        metric
        for metric in dict.fromkeys(name for net in report.sub_nets for name in net.metrics)
        if any(net.metrics.get(metric) is not None for net in report.sub_nets)
    ]
    shown = names[:_MOST_METRIC_PICTURES]
    cards = [
        picture(f"{escaped(name)} against sparsity", figures.metric_picture(report, name), "" if i else _STRETCHED)
        for i, name in enumerate(shown)
    ]
    if not names:
        how = "<code>ast.add_report_metric('accuracy', value, sub_net='s90')</code>"
        text = muted(f"No metric is on record. {how} before the report is written puts one here.")
        cards.append(f"<div class='card'><h3>Metrics</h3>{text}</div>")
    if len(report.sub_nets) > 1 and report.overlap:
        cards.append(f"<div class='card'><h3>Overlap of the masks</h3>{overlap_matrix(report)}</div>")
    more = f"The first {len(shown)} of {len(names)} metrics; all are in the table." if len(names) > len(shown) else ""
    return section("What they reach and what they share", _legend(report) if names else "", grid(cards), muted(more))


def _zeros(report: Report) -> str:
    """Return where the zeros are and when they came: sparsity per layer and over the run."""
    cards, missing = [], ""
    if report.layers and report.sub_nets:
        drawing = figures.layers_picture(report)
        caption = (
            f"{len(report.layers)} prunable layers in the order of the model, on an axis stretched towards 100 %. "
            "Exact figures are in the table of layers below."
        )
        if len(report.layers) > _TALL:
            drawing = scrolling(drawing, "Sparsity per layer", kind="tall")
            caption += " Scroll inside the picture for the rest."
        cards.append(picture("Sparsity per layer", drawing, caption))
    if any(point.achieved is not None for point in report.sparsity_history):
        caption = (
            "Broad and pale: what the schedule asked for at each mask update. Thin: what the masks had from then on."
        )
        cards.append(picture("Sparsity over the run", figures.sparsity_history_picture(report), caption, stays=True))
    else:
        missing = "No mask update is on record."
    legend = _legend(report) if cards else ""
    return section("Where the zeros are and when they came", legend, grid(cards), muted(missing))


def _gradients(report: Report) -> str:
    """Return whether the sub-nets' gradients opposed each other: conflicts and mean cosine over the run."""
    heading = "Gradients of one sub-net against the next"
    if not any(point.checks for point in report.conflict_history):
        off = _correction(report) == "off"
        return section(heading, muted("Gradient correction was off." if off else "No gradient check is on record."))
    silent = [net.name for net in report.sub_nets if not net.checks]
    without = f" Not checked: {', '.join(map(escaped, silent))}." if silent else ""
    if report.settings.get("alternation") == "alternating" and silent == [net.name for net in report.sub_nets[:1]]:
        without = f"{without[:-1]}, the first of every group."
    caption = (
        "Share of the checks in which a sub-net's gradient opposed that of the sub-net trained before it. "
        f"{_POINTS_AND_LINES}{without}"
    )
    cards = [picture("Checks with a conflict", figures.conflict_picture(report), caption)]
    if any(point.mean_cosine is not None for point in report.conflict_history):
        caption = (
            "Cosine between a sub-net's gradient and the one before, before correction: above zero they agree, below "
            f"zero they conflict. {_POINTS_AND_LINES}"
        )
        cards.append(picture("Mean cosine", figures.cosine_picture(report), caption))
    return section(heading, _legend(report), grid(cards))


def _details(report: Report) -> str:
    parts = []
    if report.settings:
        parts.append(f"<details><summary>Settings</summary>{settings_table(report)}</details>")
    if report.layers:
        parts.append(f"<details><summary>Sparsity of every layer</summary>{layer_table(report)}</details>")
    return section("Details", *parts) if parts else ""


def _footer(report: Report) -> str:
    versions = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in report.versions.items())
    return (
        f"<footer><p>{_FLOPS if report.dense_flops is not None else ''}Sparsity is the fraction of zeros among the "
        "prunable weights; parameters count the kept prunable weights and everything that is never pruned.</p>"
        "<p>Method: Yang, Meng, Seo, Fan: Get More at Once: Alternating Sparse Training with Gradient Correction, "
        f"NeurIPS 2022.{f' Made with {versions}.' if versions else ''}</p></footer>"
    )


def _legend(report: Report) -> str:
    items = "".join(
        f"<li>{name} <span class='muted'>{short_percent(net.achieved_sparsity, 2)}</span></li>"
        for name, net in zip(_names(report), report.sub_nets, strict=True)
    )
    return f"<ul class='legend' aria-label='Sub-nets and their marks'>{items}</ul>"


def _names(report: Report) -> list[str]:
    """Return the sub-nets' names with their marks."""
    return [
        f"<span class='name'><svg class='mark' aria-hidden='true'><use href='#mark-{i % SERIES}'/></svg>"
        f"{escaped(net.name)}</span>"
        for i, net in enumerate(report.sub_nets)
    ]


def _correction(report: Report) -> str | None:
    """Return the scope of the gradient correction; None if the settings do not say."""
    value = report.settings.get("correction")
    value = value.get("scope") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None

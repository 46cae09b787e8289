"""The report as one HTML page that opens from disk: no script, no network, pictures inside.

The page forbids itself both by a content security policy, so that nothing in a name can load or run anything.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin import report_figures as figures
from ast_plugin.config import ASTConfig
from ast_plugin.report_format import (
    ABSENT,
    clean,
    cosine,
    count,
    decimals,
    duration,
    grouped,
    percent,
    shape,
    short_percent,
)
from ast_plugin.report_style import style_sheet

if TYPE_CHECKING:
    from ast_plugin.report import Report
    from ast_plugin.report_records import SubNetRecord

_MOST_METRIC_PICTURES = 6
_TALL = 64
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(report: Report) -> str:
    """Return the whole page.

    Args:
        report: What to show.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    marks = [figures.marker_svg(i) for i in range(min(len(report.sub_nets), figures.SERIES))]
    page = _Page(report, marks)
    body = "\n".join(
        (
            page.head(),
            "<main>",
            page.sub_nets(),
            page.metrics(),
            page.zeros(),
            page.course(),
            page.details(),
            "</main>",
            page.foot(),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(report.title)}</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def escaped(text: Any) -> str:
    """Return `text` as it may stand between tags or in a quoted attribute."""
    return html.escape(clean(text), quote=True)


class _Page:
    """The parts of the page, from top to bottom."""

    def __init__(self, report: Report, marks: Sequence[str]) -> None:
        self.report = report
        self.marks = marks
        self.names = [escaped(net.name) for net in report.sub_nets]

    def head(self) -> str:
        report = self.report
        facts = [f"{len(report.sub_nets)} sub-net{'s' * (len(report.sub_nets) != 1)} of one network"]
        if report.steps:
            facts.append(f"{grouped(report.steps)} optimizer steps")
        facts += [f"method {escaped(report.settings['method'])}"] * ("method" in report.settings)
        late = [name for name, net in zip(self.names, report.sub_nets, strict=True) if not net.on_target]
        notes = [
            "<p class='note'><strong>What is simulated.</strong> These sub-nets are masks over one set of weights: "
            "dropped weights are zeros stored in dense tensors. That alone makes nothing faster and no file smaller. "
            "FLOPs are theoretical: the work left for a runtime that skips every zero.</p>"
        ]
        if late:
            notes.append(
                f"<p class='note'><strong>Not at the target.</strong> {', '.join(late)}: the masks have another "
                "sparsity than was asked for, as after a run that ended before the end of its schedule.</p>"
            )
        return (
            f"<header><p class='over'>Alternating sparse training, report of ast-plugin</p>"
            f"<h1>{escaped(report.title)}</h1><p class='muted'>{', '.join(facts)}</p>"
            f"<div class='tiles'>{self._tiles()}</div>{''.join(notes)}</header>"
        )

    def _tiles(self) -> str:
        report = self.report
        shares = sorted(net.achieved_sparsity for net in report.sub_nets)
        tiles = []
        if shares:
            low, high = percent(shares[0], 1), percent(shares[-1], 1)
            tiles.append((low if low == high else f"{low} – {high}", "achieved sparsity of the prunable weights"))
        if report.dense_parameters is not None:
            prunable = report.sub_nets[0].prunable_weights if report.sub_nets else 0
            share = percent(prunable / report.dense_parameters, 1) if report.dense_parameters else ABSENT
            tiles.append((count(report.dense_parameters), f"parameters when dense, {share} of them prunable"))
        if report.dense_flops is not None:
            tiles.append((count(report.dense_flops, "FLOP"), f"when dense, on {escaped(report.example_input)}"))
        if report.elapsed_seconds is not None:
            tiles.append((duration(report.elapsed_seconds), "of training, for all sub-nets together"))
        checks = sum(net.checks for net in report.sub_nets)
        if checks:
            rate = percent(sum(net.conflicts for net in report.sub_nets) / checks, 1)
            done = "" if self._correction() in (None, "off") else " and were corrected"
            tiles.append((rate, f"of {grouped(checks)} gradient checks found a conflict{done}"))
        return "".join(f"<div class='tile'><strong>{value}</strong><span>{what}</span></div>" for value, what in tiles)

    def sub_nets(self) -> str:
        nets, report = self.report.sub_nets, self.report
        metrics = list(dict.fromkeys(metric for net in nets for metric in net.metrics))
        columns: list[tuple[str, Callable[[SubNetRecord], str], str]] = [
            ("target sparsity", lambda net: percent(net.target_sparsity), ""),
            ("achieved", lambda net: percent(net.achieved_sparsity), "0 %"),
            ("weights kept", lambda net: _two(grouped(net.kept_weights), f"of {grouped(net.prunable_weights)}"),
             grouped(nets[0].prunable_weights) if nets else ""),
        ]  # fmt: skip
        if any(net.pattern != "unstructured" for net in nets):
            columns.insert(0, ("pattern", lambda net: escaped(net.pattern), ""))
        if report.dense_parameters is not None:
            whole = report.dense_parameters or 1
            columns.append(
                (
                    "parameters",
                    lambda net: _two(count(net.parameters), f"{percent((net.parameters or 0) / whole, 1)} of dense"),
                    count(whole),
                )
            )
        if report.dense_flops is not None:
            dense = report.dense_flops or 1
            columns.append(
                ("FLOPs", lambda net: _two(count(net.flops), f"{percent((net.flops or 0) / dense, 1)} of dense"),
                 count(dense))
            )  # fmt: skip
        for metric in metrics:
            shown = dict(zip(self.names, decimals([net.metrics.get(metric) for net in nets]), strict=True))
            columns.append((escaped(metric), lambda net, shown=shown: shown[escaped(net.name)], ""))  # type: ignore[misc]
        if any(net.steps for net in nets):
            columns.append(("steps", lambda net: grouped(net.steps), ""))
        if any(net.checks for net in nets):
            columns.append(
                (
                    "conflicts",
                    lambda net: (
                        _two(percent(net.conflict_rate, 1), f"{grouped(net.conflicts)} of {grouped(net.checks)}")
                        if net.checks
                        else ABSENT
                    ),
                    "",
                )
            )
            columns.append(("mean cosine", lambda net: cosine(net.mean_cosine), ""))
        rows = [
            [self._name(i), *(cell(net) for _, cell, _ in columns)] for i, net in enumerate(nets)
        ]
        dense_row = ["dense network", *(value for _, _, value in columns)]
        table = _table(
            "", ["sub-net", *(name for name, _, _ in columns)], rows, last=dense_row if len(rows) else None
        )
        return f"<section><h2>Sub-nets</h2><div class='card'>{_scroll(table, 'Table of sub-nets')}</div></section>"

    def metrics(self) -> str:
        report = self.report
        names = [
            metric
            for metric in dict.fromkeys(m for net in report.sub_nets for m in net.metrics)
            if any(net.metrics.get(metric) is not None for net in report.sub_nets)
        ]
        if not names:
            return (
                "<section><h2>Metrics</h2><p class='muted'>No metric is on record. "
                "<code>ast.add_report_metric(\"accuracy\", value, sub_net=\"s90\")</code> before the report is written "
                "puts one here.</p></section>"
            )
        cards = [
            _picture(escaped(name), figures.metric_picture(report, name),
                     "The axis of sparsity is stretched towards 100 %: equal distances are equal ratios of the weights "
                     "that are left. The other axis need not start at zero.")
            for name in names[:_MOST_METRIC_PICTURES]
        ]  # fmt: skip
        more = ""
        if len(names) > _MOST_METRIC_PICTURES:
            more = f"<p class='muted'>The first {_MOST_METRIC_PICTURES} of {len(names)} metrics; all are in the table.</p>"
        heading = "Metrics against sparsity"
        return f"<section><h2>{heading}</h2>{self._legend()}{_grid(cards)}{more}</section>"

    def zeros(self) -> str:
        report = self.report
        if not report.layers:
            return ""
        tall = len(report.layers) > _TALL
        drawing = figures.layers_picture(report)
        if tall:
            drawing = f"<div class='tall' tabindex='0' role='region' aria-label='Sparsity per layer'>{drawing}</div>"
        layers = _picture(
            "Sparsity per layer",
            drawing,
            f"{len(report.layers)} prunable layers in the order of the model, on an axis stretched towards 100 %. "
            "Exact figures are in the table of layers below.",
        )
        cards = [layers, *([self._overlap()] if len(report.sub_nets) > 1 and report.overlap else [])]
        return f"<section><h2>Where the zeros are</h2>{self._legend()}{_grid(cards)}</section>"

    def _overlap(self) -> str:
        nets, rows = self.report.sub_nets, []
        for name, row in zip(self.names, self.report.overlap, strict=True):
            cells = "".join(
                f"<td style='--share:{0.72 * (share or 0):.3f}'>{percent(share, 1)}</td>" for share in row
            )
            rows.append(f"<tr><th scope='row'>{name}</th>{cells}</tr>")
        chance = "".join(f"<td style='--share:0'>{percent(1 - net.achieved_sparsity, 1)}</td>" for net in nets)
        heads = "".join(f"<th scope='col'>{name}</th>" for name in self.names)
        table = (
            "<table class='heat'><caption>Share of the row's kept weights that the column keeps too.</caption>"
            f"<thead><tr><td style='--share:0'></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
            f"<tfoot><tr><th scope='row'>independent masks would share</th>{chance}</tr></tfoot></table>"
        )
        order = sorted(range(len(nets)), key=lambda i: nets[i].achieved_sparsity)
        dense, sparse = order[0], order[-1]
        share = self.report.overlap[sparse][dense]
        return (
            "<div class='card stay'><h3>Overlap of the masks</h3>"
            f"{_scroll(table, 'Overlap of the masks')}<p class='muted'>For example: of the weights that "
            f"{self.names[sparse]} keeps, {self.names[dense]} keeps {percent(share, 1)} too.</p></div>"
        )

    def course(self) -> str:
        report, cards, missing = self.report, [], []
        if any(point.achieved is not None for point in report.sparsity_history):
            cards.append(
                _picture(
                    "Sparsity over the run",
                    figures.sparsity_history_picture(report),
                    "Broad and pale: what the schedule asked for at each mask update. Thin: what the masks had from then "
                    "on.",
                )
            )
        else:
            missing.append("No mask update is on record.")
        if any(point.checks for point in report.conflict_history):
            silent = [n for n, net in zip(self.names, report.sub_nets, strict=True) if not net.checks]
            without = f" Not checked: {', '.join(silent)}." if silent else ""
            text = "Pale: single windows of steps. Line: means over wider windows, weighted by the number of checks."
            cards.append(
                _picture(
                    "Conflicting gradients",
                    figures.conflict_picture(report),
                    "Share of the checks in which a sub-net's gradient opposed that of the sub-net trained before it. "
                    f"{text}{without}",
                )
            )
            if any(point.mean_cosine is not None for point in report.conflict_history):
                cards.append(
                    _picture(
                        "Agreement of gradients",
                        figures.cosine_picture(report),
                        "Mean cosine between a sub-net's gradient and the one before, before correction. Above zero they "
                        f"agree, below zero they conflict. {text}",
                    )
                )
        else:
            off = self._correction() == "off"
            missing.append("Gradient correction was off." if off else "No gradient check is on record.")
        note = f"<p class='muted'>{' '.join(missing)}</p>" if missing else ""
        legend = self._legend() if cards else ""
        return f"<section><h2>How training went</h2>{legend}{_grid(cards)}{note}</section>"

    def details(self) -> str:
        report, parts = self.report, []
        if report.settings:
            defaults = {f.name: f.default for f in dataclasses.fields(ASTConfig)}
            rows = []
            for name, value in report.settings.items():
                default = defaults.get(name, dataclasses.MISSING)
                known = default is not dataclasses.MISSING
                plain_default = list(default) if isinstance(default, tuple) else default
                changed = not known or plain_default != value
                rows.append(
                    f"<tr{' class=changed' if changed else ''}><td>{escaped(name)}</td>"
                    f"<td><code>{escaped(_value(value))}</code></td>"
                    f"<td>{'default' if not changed else f'<code>{escaped(_value(plain_default))}</code>' if known else ''}"
                    "</td></tr>"
                )
            parts.append(
                "<details><summary>Settings</summary><table class='wrap'><thead><tr><th scope='col'>setting</th>"
                "<th scope='col'>value</th><th scope='col'>default</th></tr></thead>"
                f"<tbody>{''.join(rows)}</tbody></table></details>"
            )
        if report.layers:
            has_flops = any(layer.flops is not None for layer in report.layers)
            heads = ["layer", "shape", "weights", *(["dense FLOPs"] * has_flops), *self.names]
            table = _table(
                "",
                heads,
                [
                    [
                        escaped(layer.name),
                        shape(layer.shape),
                        grouped(layer.weights),
                        *([count(layer.flops)] * has_flops),
                        *(percent(layer.sparsity.get(net.name)) for net in report.sub_nets),
                    ]
                    for layer in report.layers
                ],
            )
            parts.append(f"<details><summary>Sparsity of every layer</summary>{_scroll(table, 'Layers')}</details>")
        return f"<section><h2>Details</h2>{''.join(parts)}</section>" if parts else ""

    def foot(self) -> str:
        versions = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in self.report.versions.items())
        flops = (
            "FLOPs: matrix products, convolutions and attention of one forward pass, two per multiply-add; each prunable "
            "layer's share times its density. "
            if self.report.dense_flops is not None
            else ""
        )
        return (
            f"<footer><p>{flops}Sparsity is the fraction of zeros among the prunable weights; parameters count the kept "
            "prunable weights and everything that is never pruned.</p>"
            "<p>Method: Yang, Meng, Seo, Fan: Get More at Once: Alternating Sparse Training with Gradient Correction, "
            f"NeurIPS 2022. {'Made with ' + versions + '.' if versions else ''}</p></footer>"
        )

    def _legend(self) -> str:
        items = "".join(
            f"<li>{self._name(i)} <span class='muted'>{short_percent(round(net.achieved_sparsity, 5))}</span></li>"
            for i, net in enumerate(self.report.sub_nets)
        )
        return f"<ul class='legend' aria-label='Sub-nets and their marks'>{items}</ul>"

    def _name(self, index: int) -> str:
        mark = self.marks[index % figures.SERIES]
        return f"<span class='name'><span class='mark'>{mark}</span>{self.names[index]}</span>"

    def _correction(self) -> str | None:
        value = self.report.settings.get("correction")
        value = value.get("scope") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None


def _table(caption: str, heads: Iterable[str], rows: Iterable[Sequence[str]], last: Sequence[str] | None = None) -> str:
    """Return a table of cells that are markup already; the first cell of a row is its heading."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    if last is not None:
        cells = "".join(f"<td>{cell}</td>" for cell in last[1:])
        body += f"<tr class='dense'><th scope='row'>{last[0]}</th>{cells}</tr>"
    title = f"<caption>{caption}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scroll(content: str, label: str) -> str:
    # Reachable by keyboard, because a wide table scrolls on a narrow screen.
    return f"<div class='scroll' tabindex='0' role='region' aria-label='{label}'>{content}</div>"


def _picture(heading: str, drawing: str, caption: str) -> str:
    return f"<figure class='card'><h3>{heading}</h3>{drawing}<figcaption>{caption}</figcaption></figure>"


def _grid(cards: Sequence[str]) -> str:
    return f"<div class='{'pair' if len(cards) > 1 else 'single'}'>{''.join(cards)}</div>" if cards else ""


def _two(value: str, small: str) -> str:
    return f"{value}<small>{small}</small>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

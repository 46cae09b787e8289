"""The tables of the HTML report: sub-nets, overlap of their masks, settings, layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin.config import ASTConfig
from ast_plugin.report_format import ABSENT, cosine, count, decimals, grouped, percent, shape
from ast_plugin.report_markup import escaped, scrolling, table, two_lines

if TYPE_CHECKING:
    from ast_plugin.report import Report

_WIDE_MATRIX = 4


def sub_net_table(report: Report, names: Sequence[str]) -> str:
    """Return the table with one row a sub-net and one for the dense network; columns without any figure are left out.

    Args:
        report: What to show.
        names: Markup of the sub-nets' names.
    """
    nets, parameters, flops = report.sub_nets, report.dense_parameters, report.dense_flops
    prunable = nets[0].prunable_weights if nets else 0
    columns: list[tuple[str, list[str], str]] = []  # heading, one cell a sub-net, cell of the dense network
    if any(net.pattern != "unstructured" for net in nets):
        columns.append(("pattern", [escaped(net.pattern) for net in nets], ""))
    by_channel = [net.dropped_channels for net in nets]
    if any(dropped is not None for dropped in by_channel):
        shares = zip(by_channel, nets, strict=True)
        dropped_channels = [
            ABSENT if share is None else two_lines(percent(share), f"target {percent(net.target_sparsity)}")
            for share, net in shares
        ]
        columns.append(("channels dropped", dropped_channels, "0 %"))
    sparsities = [
        percent(net.achieved_sparsity)
        if net.dropped_channels is not None
        else two_lines(percent(net.achieved_sparsity), f"target {percent(net.target_sparsity)}")
        for net in nets
    ]
    columns.append(("sparsity", sparsities, "0 %"))
    kept = [two_lines(grouped(net.kept_weights), f"of {grouped(net.prunable_weights)}") for net in nets]
    columns.append(("weights kept", kept, grouped(prunable)))
    if parameters is not None:
        columns.append(("parameters", [_of_dense(net.parameters, parameters) for net in nets], count(parameters)))
    if flops is not None:
        columns.append(("FLOPs", [_of_dense(net.flops, flops) for net in nets], count(flops)))
    for metric in dict.fromkeys(metric for net in nets for metric in net.metrics):
        columns.append((escaped(metric), decimals([net.metrics.get(metric) for net in nets]), ""))
    if any(net.steps for net in nets):
        columns.append(("steps", [grouped(net.steps) for net in nets], ""))
    if any(net.checks for net in nets):
        conflicts = [
            two_lines(percent(net.conflict_rate, 1), f"{grouped(net.conflicts)} of {grouped(net.checks)}")
            if net.checks
            else ABSENT
            for net in nets
        ]
        columns.append(("conflicts", conflicts, ""))
        columns.append(("mean cosine", [cosine(net.mean_cosine) for net in nets], ""))
    rows = [(name, *(cells[i] for _, cells, _ in columns)) for i, name in enumerate(names)]
    dense = ("dense network", *(cell for _, _, cell in columns))
    return scrolling(table(("sub-net", *(heading for heading, _, _ in columns)), rows, dense), "Sub-nets")


def overlap_matrix(report: Report) -> str:
    """Return the overlap of the masks as a matrix of shaded cells, with what chance alone would give below it."""
    names = [escaped(net.name) for net in report.sub_nets]
    many = len(names) > _WIDE_MATRIX
    digits = 0 if many else 1
    rows = []
    for name, row in zip(names, report.overlap, strict=True):
        cells = [f"<td style='--share:{0.72 * (share or 0):.3f}'>{percent(share, digits)}</td>" for share in row]
        rows.append(f"<tr><th scope='row'>{name}</th>{''.join(cells)}</tr>")
    densities = [percent(1 - net.achieved_sparsity, digits) for net in report.sub_nets]
    chance = "".join(f"<td style='--share:0'>{density}</td>" for density in densities)
    heads = "".join(f"<th scope='col'>{name}</th>" for name in names)
    matrix = (
        f"<table class='heat{' many' if many else ''}'>"
        "<caption>Share of the row's weights that the column keeps too.</caption>"
        f"<thead><tr><td style='--share:0'></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><th scope='row'>independent masks would share</th>{chance}</tr></tfoot></table>"
    )
    order = sorted(range(len(names)), key=lambda i: report.sub_nets[i].achieved_sparsity)
    dense, sparse = order[0], order[-1]
    example = (
        f"For example: of the weights that {names[sparse]} keeps, "
        f"{names[dense]} keeps {percent(report.overlap[sparse][dense], 1)} too."
    )
    return f"{scrolling(matrix, 'Overlap of the masks')}<p class='muted'>{example}</p>"


def settings_table(report: Report) -> str:
    """Return the settings, those that differ from their default set off."""
    defaults = {field.name: field.default for field in dataclasses.fields(ASTConfig)}
    rows = []
    for name, value in report.settings.items():
        default = defaults.get(name, dataclasses.MISSING)
        default = list(default) if isinstance(default, tuple) else default
        changed = default != value
        shown = "" if default is dataclasses.MISSING else f"<code>{escaped(_setting(default))}</code>"
        rows.append(
            f"<tr{' class=changed' if changed else ''}><th scope='row'>{escaped(name)}</th>"
            f"<td><code>{escaped(_setting(value))}</code></td><td>{shown if changed else 'default'}</td></tr>"
        )
    heads = "".join(f"<th scope='col'>{heading}</th>" for heading in ("setting", "value", "default"))
    return f"<table class='wrap'><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def layer_table(report: Report) -> str:
    """Return shape and size of every layer and its sparsity in every sub-net."""
    counted = any(layer.flops is not None for layer in report.layers)
    names = [escaped(net.name) for net in report.sub_nets]
    heads = ("layer", "shape", "weights", *(("dense FLOPs",) if counted else ()), *names)
    rows = [
        (
            escaped(layer.name),
            shape(layer.shape),
            grouped(layer.weights),
            *((count(layer.flops),) if counted else ()),
            *(percent(layer.sparsity.get(net.name)) for net in report.sub_nets),
        )
        for layer in report.layers
    ]
    return scrolling(table(heads, rows), "Sparsity of every layer")


def _of_dense(part: int | None, whole: int) -> str:
    if part is None or not whole:
        return count(part)
    return two_lines(count(part), f"{percent(part / whole, 1)} of dense")


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

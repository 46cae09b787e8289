"""The five pictures of a report, as SVG text for use inside a page.

One colour and one shape of mark a sub-net, the same in all of them. Where sparsities of layers or sub-nets are
compared, their axis is stretched towards 100 %: equal distances are equal ratios of the weights that are left, because
98 % and 99 % differ by as much as 0 % and 50 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin.report_drawing import (
    GRID,
    MARKERS,
    MUTED,
    SERIES,
    add_axes,
    label_points,
    mark,
    new_figure,
    series_color,
    sparsity_axis,
    step_axis,
    stretched,
    to_svg,
    value_axis,
)
from ast_plugin.report_format import clean, layer_labels
from ast_plugin.report_records import ConflictPoint

if TYPE_CHECKING:
    from ast_plugin.report import Report

_WIDTH = 440.0
_MOST_POINTS = 200
_BINS = 24

Value = Callable[[Sequence[ConflictPoint]], float | None]


def metric_picture(report: Report, metric: str) -> str:
    """Return a metric against the sparsity of every sub-net that has it.

    Args:
        report: What to draw.
        metric: Name of the metric.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    points = [
        (i, stretched(net.achieved_sparsity), value)
        for i, net in enumerate(report.sub_nets)
        if (value := net.metrics.get(metric)) is not None
    ]
    with new_figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = add_axes(figure, left=46, right=16, top=14, bottom=40)
        low, high = min(x for _, x, _ in points), max(x for _, x, _ in points)
        sparsity_axis(axes, low, high, width=_WIDTH - 62)
        axes.set_xlabel("achieved sparsity")
        values = [value for _, _, value in points]
        pad = max(0.22 * (max(values) - min(values)), 0.004 * max(map(abs, values)), 1e-6)
        axes.set_ylim(min(values) - pad, max(values) + pad)
        value_axis(axes, matplotlib)
        ordered = sorted(points, key=lambda point: (point[1], -point[2]))
        axes.plot([x for _, x, _ in ordered], [y for _, _, y in ordered], color=GRID, linewidth=1.2, zorder=1)
        for i, x, y in points:
            axes.plot([x], [y], zorder=3, **mark(i, 8))
        label_points(axes, [(x, y, clean(report.sub_nets[i].name)) for i, x, y in points])
        number = list(dict.fromkeys(name for net in report.sub_nets for name in net.metrics)).index(metric)
        return to_svg(figure, f"metric{number}", f"{metric} against achieved sparsity, one point per sub-net")


def layers_picture(report: Report) -> str:
    """Return the sparsity of every layer, one row a layer and one mark a sub-net.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    labels = layer_labels([layer.name for layer in report.layers], 26)
    left = 10 + 7.1 * max(map(len, labels))
    height = 14.0 * len(labels) + 62
    with new_figure(_WIDTH, height) as (figure, _):
        axes = add_axes(figure, left=left, right=16, top=20, bottom=42)
        shares = [layer.sparsity.get(net.name) for layer in report.layers for net in report.sub_nets]
        known = [stretched(share) for share in shares if share is not None and share < 1]
        low, high = min(known, default=0.0), max(known, default=0.3)
        empty = high + 0.12 * max(high - low, 0.3) if any(share == 1 for share in shares) else None
        sparsity_axis(axes, low, high, width=_WIDTH - left - 16, empty=empty)
        axes.set_xlabel("sparsity")
        axes.xaxis.set_tick_params(top=False, labeltop=True, labelbottom=True)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="y", color=GRID, linewidth=0.5)
        for i, net in enumerate(report.sub_nets):
            places = [
                (stretched(share) if share < 1 else empty, row)
                for row, layer in enumerate(report.layers)
                if (share := layer.sparsity.get(net.name)) is not None
            ]
            xs, ys = [x for x, _ in places], [y for _, y in places]
            axes.plot(xs, ys, color=series_color(i), linewidth=0.8, alpha=0.35, zorder=2)
            axes.plot(xs, ys, zorder=3, **{**mark(i, 5.5), "markeredgewidth": 0.7})
        return to_svg(figure, "layers", "Sparsity of every layer, one mark per sub-net")


def sparsity_history_picture(report: Report) -> str:
    """Return target and achieved sparsity over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with new_figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = add_axes(figure, left=46, right=16, top=14, bottom=40)
        last = max(report.steps, *(point.step for point in report.sparsity_history))
        for i, net in enumerate(report.sub_nets):
            points = [point for point in report.sparsity_history if point.sub_net == net.name]
            if not points:
                continue
            steps = [point.step for point in points] + [last]
            targets = [_gap(point.target) for point in points]
            achieved = [_gap(point.achieved) for point in points]
            every = (max(1, len(points) // 8), max(1, len(points) // 6))
            axes.plot(
                steps[:-1], targets, color=series_color(i), linewidth=5, alpha=0.28, solid_capstyle="round", zorder=2
            )
            axes.plot(
                steps, [*achieved, achieved[-1]], color=series_color(i), linewidth=1.4, zorder=3, drawstyle="steps-post"
            )
            marked = slice(i * every[0] // max(1, len(report.sub_nets)), None, every[1])
            axes.plot(steps[:-1][marked], achieved[marked], zorder=4, **mark(i, 6))
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0 %", "25 %", "50 %", "75 %", "100 %"))
        step_axis(axes, matplotlib, last)
        return to_svg(figure, "history", "Target and achieved sparsity over the optimizer steps")


def conflict_picture(report: Report) -> str:
    """Return the share of gradient checks that found a conflict, over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """

    def rate(points: Sequence[ConflictPoint]) -> float | None:
        checks = sum(point.checks for point in points)
        return sum(point.conflicts for point in points) / checks if checks else None

    with new_figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = add_axes(figure, left=46, right=16, top=14, bottom=40)
        top = _over_time(axes, matplotlib, report, rate)[1]
        axes.set_ylim(0, min(1.0, max(0.05, 1.1 * top)) + 0.01)
        value_axis(axes, matplotlib, percentage=True)
        return to_svg(figure, "conflicts", "Share of gradient checks that found a conflict, over the optimizer steps")


def cosine_picture(report: Report) -> str:
    """Return the mean cosine between gradient and reference over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """

    def mean(points: Sequence[ConflictPoint]) -> float | None:
        known = [(point.mean_cosine, point.checks) for point in points if point.mean_cosine is not None]
        checks = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / checks if checks else None

    with new_figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = add_axes(figure, left=46, right=16, top=14, bottom=40)
        low, high = _over_time(axes, matplotlib, report, mean)
        low, high = min(low, 0.0), max(high, 0.0)
        pad = max(0.1 * (high - low), 0.005)
        axes.set_ylim(low - pad, high + pad)
        axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
        value_axis(axes, matplotlib)
        return to_svg(figure, "cosine", "Mean cosine between gradient and reference over the optimizer steps")


def _over_time(axes: Any, matplotlib: Any, report: Report, value: Value) -> tuple[float, float]:
    """Draw every window as a faint point and means of wider windows as a line; return the lowest and highest value."""
    drawn: list[float] = []
    last = max(report.steps, *(point.step for point in report.conflict_history))
    for i, net in enumerate(report.sub_nets):
        points = [point for point in report.conflict_history if point.sub_net == net.name and point.checks]
        single = [(point.step, shown) for point in points if (shown := value([point])) is not None]
        if len(single) <= _MOST_POINTS:
            axes.plot(
                [x for x, _ in single], [y for _, y in single], linestyle="none", marker=MARKERS[i % SERIES],
                markersize=3, color=series_color(i), alpha=0.35, markeredgewidth=0, zorder=2,
            )  # fmt: skip
            drawn += [y for _, y in single]
        line = []
        for part in _bins(points, last):
            mean = value(part)
            if mean is not None:
                line.append((sum(point.step for point in part) / len(part), mean))
        drawn += [y for _, y in line]
        axes.plot([x for x, _ in line], [y for _, y in line], color=series_color(i), linewidth=1.6, zorder=3)
        every = max(1, len(line) // 6)
        marked = line[i * every // max(1, len(report.sub_nets)) :: every]
        axes.plot([x for x, _ in marked], [y for _, y in marked], zorder=4, **mark(i, 6))
    step_axis(axes, matplotlib, last)
    return min(drawn, default=0.0), max(drawn, default=0.0)


def _bins(points: Sequence[ConflictPoint], last: int) -> list[list[ConflictPoint]]:
    """Return the points in at most `_BINS` windows of equal length, empty ones left out."""
    parts: dict[int, list[ConflictPoint]] = {}
    for point in points:
        parts.setdefault(min(_BINS - 1, point.step * _BINS // max(1, last)), []).append(point)
    return [parts[key] for key in sorted(parts)]


def _gap(value: float | None) -> float:
    return math.nan if value is None else value

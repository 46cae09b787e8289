"""The pictures of a report, as SVG text that takes its colours from the page around it.

Drawn by matplotlib without its global state. Colours are CSS variables (``--ink``, ``--muted``, ``--grid``,
``--surface``, ``--series-1`` ...), so that one picture fits a light and a dark page; letters stay letters, so that
they can be searched and read aloud. Sparsity has an axis stretched towards 100 %: equal distances are equal ratios
of the weights that are left, for 98 % and 99 % differ by as much as 0 % and 50 %.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import missing_extra
from ast_plugin.report_format import clean, cosine, decimal, elided, layer_labels, short_percent
from ast_plugin.report_records import ConflictPoint

if TYPE_CHECKING:
    from ast_plugin.report import Report

SERIES = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_WIDTH = 440.0
_FONT = 11.0
_MOST_POINTS = 200
_BINS = 24

# Placeholders that matplotlib writes as they are and `_svg` turns into CSS variables.
_INK, _MUTED, _GRID, _SURFACE = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface"} | {
    f"#0102{i:02x}": f"series-{i + 1}" for i in range(SERIES)
}
_SPARSITY_TICKS = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
_FINER_TICKS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.85, 0.92, 0.94, 0.96, 0.97, 0.985)


def metric_picture(report: Report, metric: str) -> str:
    """Return a metric against the sparsity of every sub-net that has it.

    Args:
        report: What to draw.
        metric: Name of the metric.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    points = [
        (i, _stretched(net.achieved_sparsity), value)
        for i, net in enumerate(report.sub_nets)
        if (value := net.metrics.get(metric)) is not None
    ]
    with _figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = _axes(figure, left=58, right=16, top=14, bottom=44)
        low, high = min(x for _, x, _ in points), max(x for _, x, _ in points)
        _sparsity_axis(axes, low, high, width=_WIDTH - 74)
        axes.set_xlabel("achieved sparsity")
        values = [value for _, _, value in points]
        pad = max(0.22 * (max(values) - min(values)), 0.004 * max(map(abs, values)), 1e-6)
        axes.set_ylim(min(values) - pad, max(values) + pad)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: decimal(value))
        axes.set_ylabel(elided(clean(metric), 36))
        ordered = sorted(points, key=lambda point: (point[1], -point[2]))
        axes.plot([x for _, x, _ in ordered], [y for _, _, y in ordered], color=_GRID, linewidth=1.2, zorder=1)
        for i, x, y in points:
            axes.plot([x], [y], zorder=3, **_marker(i, 8))
        _label_points(axes, [(x, y, clean(report.sub_nets[i].name)) for i, x, y in points])
        number = list(report.sub_nets[points[0][0]].metrics).index(metric)
        return _svg(figure, f"metric{number}", f"{metric} against achieved sparsity, one point per sub-net")


def layers_picture(report: Report) -> str:
    """Return the sparsity of every layer, one row a layer and one mark a sub-net.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    labels = layer_labels([layer.name for layer in report.layers], 30)
    left = 14 + 5.9 * max(map(len, labels))
    height = 13.0 * len(labels) + 62
    with _figure(_WIDTH, height) as (figure, _):
        axes = _axes(figure, left=left, right=16, top=20, bottom=42)
        shares = [layer.sparsity.get(net.name) for layer in report.layers for net in report.sub_nets]
        known = [_stretched(share) for share in shares if share is not None and share < 1]
        low, high = min(known, default=0.0), max(known, default=0.3)
        empty = high + 0.12 * max(high - low, 0.3) if any(share == 1 for share in shares) else None
        _sparsity_axis(axes, low, high, width=_WIDTH - left - 16, empty=empty)
        axes.set_xlabel("sparsity")
        axes.xaxis.set_tick_params(top=False, labeltop=True, labelbottom=True)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="y", color=_GRID, linewidth=0.5)
        for i, net in enumerate(report.sub_nets):
            places = [
                (_stretched(share) if share < 1 else empty, row)
                for row, layer in enumerate(report.layers)
                if (share := layer.sparsity.get(net.name)) is not None
            ]
            xs, ys = [x for x, _ in places], [y for _, y in places]
            axes.plot(xs, ys, color=_color(i), linewidth=0.8, alpha=0.35, zorder=2)
            axes.plot(xs, ys, zorder=3, **{**_marker(i, 5.5), "markeredgewidth": 0.7})
        return _svg(figure, "layers", "Sparsity of every layer, one mark per sub-net")


def sparsity_history_picture(report: Report) -> str:
    """Return target and achieved sparsity over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    with _figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = _axes(figure, left=50, right=16, top=14, bottom=44)
        last = max(report.steps, *(point.step for point in report.sparsity_history))
        for i, net in enumerate(report.sub_nets):
            points = [point for point in report.sparsity_history if point.sub_net == net.name]
            if not points:
                continue
            steps = [point.step for point in points] + [last]
            targets = [_gap(point.target) for point in points]
            achieved = [_gap(point.achieved) for point in points]
            every = (max(1, len(points) // 8), max(1, len(points) // 6))
            axes.plot(steps[:-1], targets, color=_color(i), linewidth=5, alpha=0.28, solid_capstyle="round", zorder=2)
            axes.plot(steps, [*achieved, achieved[-1]], color=_color(i), linewidth=1.4, zorder=3, drawstyle="steps-post")
            marked = slice(i * every[0] // max(1, len(report.sub_nets)), None, every[1])
            axes.plot(steps[:-1][marked], achieved[marked], zorder=4, **_marker(i, 6))
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0 %", "25 %", "50 %", "75 %", "100 %"))
        axes.set_ylabel("sparsity")
        _step_axis(axes, matplotlib, last)
        return _svg(figure, "history", "Target and achieved sparsity over the optimizer steps")


def conflict_picture(report: Report) -> str:
    """Return the share of gradient checks that found a conflict, over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """

    def rate(points: Sequence[ConflictPoint]) -> float | None:
        checks = sum(point.checks for point in points)
        return sum(point.conflicts for point in points) / checks if checks else None

    with _figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = _axes(figure, left=50, right=16, top=14, bottom=44)
        top = _over_time(axes, matplotlib, report, rate)[1]
        axes.set_ylim(0, min(1.0, max(0.05, 1.1 * top)) + 0.01)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: short_percent(value))
        axes.set_ylabel("checks with a conflict")
        return _svg(figure, "conflicts", "Share of gradient checks that found a conflict, over the optimizer steps")


def cosine_picture(report: Report) -> str:
    """Return the mean cosine between gradient and reference over the optimizer steps.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """

    def mean(points: Sequence[ConflictPoint]) -> float | None:
        known = [(point.mean_cosine, point.checks) for point in points if point.mean_cosine is not None]
        checks = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / checks if checks else None

    with _figure(_WIDTH, 270.0) as (figure, matplotlib):
        axes = _axes(figure, left=58, right=16, top=14, bottom=44)
        low, high = _over_time(axes, matplotlib, report, mean)
        low, high = min(low, 0.0), max(high, 0.0)
        pad = max(0.1 * (high - low), 0.005)
        axes.set_ylim(low - pad, high + pad)
        axes.axhline(0, color=_MUTED, linewidth=1, zorder=1)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: cosine(value) if round(value, 9) else "0")
        axes.set_ylabel("mean cosine")
        return _svg(figure, "cosine", "Mean cosine between gradient and reference over the optimizer steps")


def marker_svg(index: int) -> str:
    """Return the mark of the sub-net with this index as a small picture for a legend."""
    with _figure(14.0, 14.0) as (figure, _):
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        axes.plot([0], [0], clip_on=False, **_marker(index, 9))
        return _svg(figure, f"mark{index}", None)


def _over_time(axes: Any, matplotlib: Any, report: Report, value: Any) -> tuple[float, float]:
    """Draw every window as a faint point and means of wider windows as a line; return the lowest and highest value."""
    drawn: list[float] = []
    last = max(report.steps, *(point.step for point in report.conflict_history))
    for i, net in enumerate(report.sub_nets):
        points = [point for point in report.conflict_history if point.sub_net == net.name and point.checks]
        single = [(point.step, shown) for point in points if (shown := value([point])) is not None]
        if len(single) <= _MOST_POINTS:
            axes.plot(
                [x for x, _ in single], [y for _, y in single], linestyle="none", marker=MARKERS[i % SERIES],
                markersize=3, color=_color(i), alpha=0.35, markeredgewidth=0, zorder=2,
            )  # fmt: skip
            drawn += [y for _, y in single]
        line = []
        for part in _bins(points, last):
            mean = value(part)
            if mean is not None:
                line.append((sum(point.step for point in part) / len(part), mean))
        drawn += [y for _, y in line]
        axes.plot([x for x, _ in line], [y for _, y in line], color=_color(i), linewidth=1.6, zorder=3)
        every = max(1, len(line) // 6)
        marked = line[i * every // max(1, len(report.sub_nets)) :: every]
        axes.plot([x for x, _ in marked], [y for _, y in marked], zorder=4, **_marker(i, 6))
    _step_axis(axes, matplotlib, last)
    return min(drawn, default=0.0), max(drawn, default=0.0)


def _bins(points: Sequence[ConflictPoint], last: int) -> list[list[ConflictPoint]]:
    """Return the points in at most `_BINS` windows of equal length, empty ones left out."""
    parts: dict[int, list[ConflictPoint]] = {}
    for point in points:
        parts.setdefault(min(_BINS - 1, point.step * _BINS // max(1, last)), []).append(point)
    return [parts[key] for key in sorted(parts)]


def _stretched(sparsity: float) -> float:
    """Return the place of a sparsity in [0, 1) on the stretched axis: -log10 of the density."""
    return -math.log10(max(1 - sparsity, 1e-9))


def _sparsity_axis(axes: Any, low: float, high: float, *, width: float, empty: float | None = None) -> None:
    """Set limits and ticks of a stretched axis so that the labels do not touch."""
    middle, span = (low + high) / 2, max(high - low, 0.3)
    left, right = max(-0.02, middle - 0.58 * span), middle + 0.58 * span
    if empty is not None:
        right = empty + 0.05 * span
    axes.set_xlim(left, right)
    chosen: list[tuple[float, str]] = [] if empty is None else [(empty, "100 %")]
    for share in (*_SPARSITY_TICKS, *_FINER_TICKS):
        place, gap = _stretched(share), 44 * (right - left) / width
        if left <= place <= right and all(abs(place - other) >= gap for other, _ in chosen):
            chosen.append((place, short_percent(share)))
    axes.set_xticks([place for place, _ in chosen], [text for _, text in chosen])
    axes.grid(axis="x", color=_GRID, linewidth=0.5)


def _step_axis(axes: Any, matplotlib: Any, last: int) -> None:
    axes.set_xlim(0, max(1, last) * 1.01)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if last < 1e6 else f"{value / 1e6:g} M")
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color=_GRID, linewidth=0.5)


def _label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name near each point, above or below, where it covers neither a point nor another name."""
    axes.figure.canvas.draw()
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    frame = axes.bbox
    for (x, y, name), (px, py) in zip(points, places, strict=True):
        text = elided(name, 14)
        half = 3.4 * len(text) + 2
        for rise in (15.0, -15.0, 28.0, -28.0, 41.0, -41.0):
            box = (px - half, py + rise - 6, px + half, py + rise + 6)
            free = all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken)
            if free and frame.y0 < box[1] and box[3] < frame.y1:
                break
        taken.append(box)
        shift = min(0.0, frame.x1 + 14 - box[2]) + max(0.0, frame.x0 - box[0])
        axes.annotate(
            text, (x, y), xytext=(shift, rise), textcoords="offset points", ha="center", va="center", color=_INK
        )


def _gap(value: float | None) -> float:
    return math.nan if value is None else value


def _color(index: int) -> str:
    return f"#0102{index % SERIES:02x}"


def _marker(index: int, size: float) -> dict[str, Any]:
    """Return how a sub-net's marks look: colour and shape both tell it, and a rim keeps them apart where they meet."""
    return {
        "linestyle": "none", "marker": MARKERS[index % SERIES], "markersize": size, "markerfacecolor": _color(index),
        "markeredgecolor": _SURFACE, "markeredgewidth": 1.0,
    }  # fmt: skip


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Give an empty figure of so many SVG units and the matplotlib module; the user's settings neither matter nor change."""
    try:
        import matplotlib
        import matplotlib.ticker
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("the HTML report", "matplotlib", "report") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names in scripts that matplotlib's own font lacks are drawn by the browser's fonts.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "text.parse_math": False, "font.size": _FONT, "axes.labelsize": _FONT,
                "xtick.labelsize": _FONT - 1, "ytick.labelsize": _FONT - 1, "axes.edgecolor": _GRID,
                "axes.labelcolor": _MUTED, "xtick.color": _GRID, "ytick.color": _GRID, "xtick.labelcolor": _MUTED,
                "ytick.labelcolor": _MUTED, "text.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
                "axes.facecolor": "none", "axes.axisbelow": True, "axes.unicode_minus": True,
            }
        )  # fmt: skip
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        FigureCanvasSVG(figure)
        yield figure, matplotlib


def _axes(figure: Any, *, left: float, right: float, top: float, bottom: float) -> Any:
    """Add axes with margins in SVG units; computed margins would depend on fonts that the browser may not have."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def _svg(figure: Any, name: str, description: str | None) -> str:
    """Return the figure as an ``<svg>`` element for use inside a page.

    Args:
        figure: The matplotlib figure.
        name: Prefix that keeps its ids apart from those of other pictures on the page.
        description: What a screen reader says; None marks an ornament.
    """
    import html
    import io

    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = name  # otherwise ids are random and no two runs give the same page
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    label = 'aria-hidden="true"' if description is None else f'role="img" aria-label="{html.escape(clean(description))}"'
    text = re.sub(r"<svg[^>]*>", f"<svg {view[0] if view else ''} {label}>", text, count=1)
    return re.sub(r"<[^>]*>", lambda tag: _page_markup(tag[0], name), text)


def _page_markup(tag: str, name: str) -> str:
    """Return one tag with ids of its own, colours from the page and coordinates of a sensible length."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font-family:[^;\"]*;? ?", "", tag)  # the page's own font
    tag = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r"((?:fill|stroke): ?)(#[0-9a-f]{6})", lambda m: m[1] + _css(m[2]), tag)
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag)


def _css(color: str) -> str:
    return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color

"""Drawing for reports: figures, axes and marks by matplotlib, turned into SVG text that fits into a page.

Drawn without matplotlib's global state. Colours are CSS variables (``--ink``, ``--muted``, ``--grid``, ``--surface``,
``--series-1`` ...), so that one picture fits a light and a dark page; letters stay letters, so that they can be
searched and read aloud.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ast_plugin.errors import missing_extra
from ast_plugin.report_format import clean, elided, short_percent

SERIES = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_SCALE = (1.0, 0.95, 1.1, 0.9, 1.1, 1.2, 1.2, 1.6)  # so that all shapes look equally large
_FONT = 12.0

# Placeholders that matplotlib writes as they are and `to_svg` turns into CSS variables.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"} | {
    f"#0102{i:02x}": f"series-{i + 1}" for i in range(SERIES)
}
_SPARSITY_TICKS = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
_FINER_TICKS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.85, 0.92, 0.94, 0.96, 0.97, 0.985)


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Give an empty figure and the matplotlib module; the user's settings of it neither matter nor change.

    Args:
        width: Width in SVG units.
        height: Height in SVG units.

    Yields:
        The figure and the module.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
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
                "xtick.labelsize": _FONT - 1, "ytick.labelsize": _FONT - 1, "axes.edgecolor": GRID,
                "axes.labelcolor": MUTED, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED,
                "ytick.labelcolor": MUTED, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False,
                "axes.facecolor": "none", "axes.axisbelow": True, "axes.unicode_minus": True,
            }
        )  # fmt: skip
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        FigureCanvasSVG(figure)
        yield figure, matplotlib


def add_axes(figure: Any, *, left: float, right: float, top: float, bottom: float) -> Any:
    """Add axes with margins in SVG units; computed margins would depend on fonts that the browser may not have."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def to_svg(figure: Any, name: str, description: str) -> str:
    """Return the figure as an ``<svg>`` element for use inside a page.

    Args:
        figure: The matplotlib figure.
        name: Prefix that keeps its ids apart from those of other pictures on the page.
        description: What a screen reader says.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = name  # otherwise ids are random and no two runs give the same page
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    content = text[text.index(">", text.index("<svg")) + 1 :].strip()
    content = re.sub(r"<[^>]*>", lambda tag: _page_markup(tag[0], name), content)
    role = f'role="img" aria-label="{html.escape(clean(description))}"'
    return f"<svg {view[0] if view else ''} {role}>{content}"


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


def mark(index: int, size: float) -> dict[str, Any]:
    """Return how a sub-net's marks look: colour and shape both tell it, and a rim keeps them apart where they meet."""
    return {
        "linestyle": "none", "marker": MARKERS[index % SERIES], "markersize": size * _SCALE[index % SERIES],
        "markerfacecolor": series_color(index),
        "markeredgecolor": SURFACE, "markeredgewidth": 1.0,
    }  # fmt: skip


def series_color(index: int) -> str:
    """Return the colour of a sub-net by its index, as a placeholder for its CSS variable."""
    return f"#0102{index % SERIES:02x}"


def stretched(sparsity: float) -> float:
    """Return the place of a sparsity in [0, 1) on the stretched axis: -log10 of the density."""
    return -math.log10(max(1 - sparsity, 1e-9))


def sparsity_axis(axes: Any, low: float, high: float, *, width: float, empty: float | None = None) -> None:
    """Set limits and ticks of a stretched axis so that the labels do not touch."""
    middle, span = (low + high) / 2, max(high - low, 0.3)
    left, right = max(-0.02, middle - 0.58 * span), middle + 0.58 * span
    if empty is not None:
        right = empty + 0.05 * span
    axes.set_xlim(left, right)
    chosen: list[tuple[float, str]] = [] if empty is None else [(empty, "100 %")]
    for share in (*_SPARSITY_TICKS, *_FINER_TICKS):
        place, gap = stretched(share), 43 * (right - left) / width
        if left <= place <= right and all(abs(place - other) >= gap for other, _ in chosen):
            chosen.append((place, short_percent(share)))
    axes.set_xticks([place for place, _ in chosen], [text for _, text in chosen])
    axes.grid(axis="x", color=GRID, linewidth=0.5)


def step_axis(axes: Any, matplotlib: Any, last: int) -> None:
    """Set limits and ticks of an axis of optimizer steps from 0 to `last`."""
    axes.set_xlim(0, max(1, last) * 1.01)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if last < 1e6 else f"{value / 1e6:g} M")
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color=GRID, linewidth=0.5)


def value_axis(axes: Any, matplotlib: Any, *, percentage: bool = False) -> None:
    """Set ticks of the vertical axis, all with as many digits as the one that needs most."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in matplotlib.ticker.MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    shown = [100 * tick for tick in ticks] if percentage else ticks
    near = 1e-6 * max(abs(shown[-1] - shown[0]), 1e-12)
    places = next((n for n in range(10) if all(abs(round(value, n) - value) <= near for value in shown)), 10)
    texts = [f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}") if abs(value) > near else "0" for value in shown]
    axes.set_yticks(ticks, [f"{text} %" for text in texts] if percentage else texts)


def label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name near each point, above or below, where it covers neither a point nor another name."""
    axes.figure.canvas.draw()
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    frame = axes.bbox
    for (x, y, name), (px, py) in zip(points, places, strict=True):
        text = elided(name, 14)
        half = 3.6 * len(text) + 4
        for rise in (15.0, -15.0, 28.0, -28.0, 41.0, -41.0):
            box = (px - half, py + rise - 6, px + half, py + rise + 6)
            free = all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken)
            if free and frame.y0 < box[1] and box[3] < frame.y1:
                break
        taken.append(box)
        shift = min(0.0, frame.x1 + 14 - box[2]) + max(0.0, frame.x0 - box[0])
        axes.annotate(
            text, (x, y), xytext=(shift, rise), textcoords="offset points", ha="center", va="center", color=INK
        )


def mark_symbol(index: int) -> str:
    """Return the mark of a sub-net as an SVG symbol with the id ``mark-INDEX``, for legends to refer to."""
    with new_figure(14.0, 14.0) as (figure, _):
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        axes.plot([0], [0], clip_on=False, **mark(index, 9))
        svg = to_svg(figure, f"symbol{index}", "")
    content = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return f'<symbol id="mark-{index}" viewBox="0 0 14 14" overflow="visible">{content}</symbol>'

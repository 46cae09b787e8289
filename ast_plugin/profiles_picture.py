"""A profile as a picture: how good the sub-nets are, against latency, memory and FLOPs.

One colour a sub-net, as in the report, and one shape of mark a form. Axes of cost are logarithmic, since sub-nets
differ by factors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ast_plugin.errors import ConfigError, missing_extra
from ast_plugin.files import atomic_write
from ast_plugin.profiles_records import Profile, ProfileRecord
from ast_plugin.report_drawing import MARKERS, SERIES
from ast_plugin.report_format import clean, count, elided
from ast_plugin.report_style import LIGHT

SUFFIXES = (".svg", ".png", ".pdf")

_PANELS: tuple[tuple[str, Callable[[ProfileRecord], float | None]], ...] = (
    ("latency, ms", lambda record: record.latency_ms),
    ("memory, bytes", lambda record: record.memory_bytes),
    ("FLOPs", lambda record: record.flops),
)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse what `write_picture` could not write, before anything is measured.

    Args:
        path: Where the picture is to go.

    Raises:
        ConfigError: If the suffix is none of ``.svg``, ``.png`` and ``.pdf``.
        MissingExtraError: If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"picture must end in {', '.join(SUFFIXES)}, got {os.fspath(path)!r}; the suffix chooses")
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError:
        raise missing_extra("a picture", "matplotlib", "report") from None


def write_picture(profile: Profile, path: str | os.PathLike[str], *, metric: str | None = None) -> None:
    """Draw a profile and write it to a file.

    Args:
        profile: What to show.
        path: Where to write; the suffix ``.svg``, ``.png`` or ``.pdf`` chooses the format.
        metric: The metric on the vertical axis; None takes the first one, or without metrics the density.

    Raises:
        ConfigError: If the suffix is another one, or no sub-net has the metric.
        MissingExtraError: If matplotlib is not installed.
        SaveError: If the file cannot be written.
    """
    check_picture(path)
    if metric is not None and metric not in profile.metrics:
        known = ", ".join(profile.metrics) or "none"
        raise ConfigError(f"metric {metric!r} is none of the profile's; known: {known}")
    metric = metric or next(iter(profile.metrics), None)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "profile", "text.parse_math": False, "font.size": 10})
        figure = Figure(figsize=(12, 4.4), facecolor=LIGHT["surface"], layout="constrained")
        _draw(figure, profile, metric)
        kind = Path(path).suffix.lower()[1:]
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        atomic_write(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150, metadata=metadata))


def _draw(figure: Any, profile: Profile, metric: str | None) -> None:
    panels = [(label, cost) for label, cost in _PANELS if any(cost(record) for record in profile.records)]
    forms = list(dict.fromkeys(record.form for record in profile.records))
    for index, axes in enumerate(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]):
        label, cost = panels[index]
        _draw_panel(axes, profile, forms, label, cost, metric)
        if index == 0:
            axes.set_ylabel("share of weights kept" if metric is None else clean(metric))
    figure.suptitle(f"Sub-nets on {profile.example_input}" if profile.example_input else "Sub-nets", fontsize=11)
    _legend(figure, profile.sub_nets, forms)


def _draw_panel(
    axes: Any,
    profile: Profile,
    forms: Sequence[str],
    label: str,
    cost: Callable[[ProfileRecord], float | None],
    metric: str | None,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for record in profile.records:
        place, value = cost(record), _quality(record, metric)
        if place and value is not None:
            color = _color(profile.sub_nets.index(record.sub_net))
            axes.plot([place], [value], linestyle="none", zorder=3, **_mark(color, forms.index(record.form)))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(float(f"{value:.6g}"))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(label, color=LIGHT["muted"])
    axes.grid(color=LIGHT["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, sub_nets: Sequence[str], forms: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shown = [(elided(clean(name), 20), _mark(_color(index), 0)) for index, name in enumerate(sub_nets)]
    shown += [(clean(form), _mark(LIGHT["muted"], index)) for index, form in enumerate(forms)]
    handles = [Line2D([], [], linestyle="none", label=label, **mark) for label, mark in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False)


def _quality(record: ProfileRecord, metric: str | None) -> float | None:
    return 1 - record.sparsity if metric is None else record.metrics.get(metric)


def _color(index: int) -> str:
    return LIGHT[f"series-{index % SERIES + 1}"]


def _mark(color: str, form: int) -> dict[str, Any]:
    return {
        "marker": MARKERS[form % len(MARKERS)],
        "markersize": 9,
        "markerfacecolor": color,
        "markeredgecolor": LIGHT["surface"],
        "markeredgewidth": 1.0,
    }

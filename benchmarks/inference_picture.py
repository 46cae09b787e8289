"""The picture of `inference.py`: for each network a bar a form, as long as it is times faster than dense."""

from __future__ import annotations

import io
from typing import Any

from ast_plugin.errors import missing_extra

_COLORS = {"PyTorch": "#4269d0", "ONNX Runtime": "#efb118", "OpenVINO": "#6cc5b0"}
_BAR = 17.0  # height of a row in points


def picture(results: dict[str, Any], label: str = "times faster than the engine's best dense; marks: wanted") -> str:
    """Return the figures of `inference.py` as an SVG document with a white ground.

    Args:
        results: What the JSON file holds.
        label: What a bar is long.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("the picture", "matplotlib", "report") from None
    parts = results["parts"]
    heights = [len(measured["rows"]) + 2.5 for measured in parts.values()]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "inference", "font.size": 9}):
        figure = Figure(figsize=(8, sum(heights) * _BAR / 72), facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (part, measured) in zip(all_axes, parts.items(), strict=True):
            rows = measured["rows"][::-1]
            axes.set_title(part, loc="left", fontweight="bold")
            axes.barh(
                [f"{row['name']} ({row['engine']})" for row in rows],
                [row["factor"] for row in rows],
                color=[_COLORS[row["engine"]] for row in rows],
                height=0.75,
            )
            for place, row in enumerate(rows):
                axes.text(row["factor"], place, f" {row['factor']:.2f}x", va="center")
                if row["at_least"] is not None:
                    axes.plot([row["at_least"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.2)
            axes.axvline(1, color="#888888", linewidth=0.8)
            axes.set_xlim(0, 1.12 * max(row["factor"] for row in rows))
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[-1].set_xlabel(label, loc="right")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

"""Colours can be told apart, also by people with a common form of colour blindness."""

from __future__ import annotations

import itertools

import numpy
import pytest

from ast_plugin.report_style import DARK, LIGHT, style_sheet

# Machado, Oliveira, Fernandes 2009: what full protanopia, deuteranopia and tritanopia make of linear RGB.
SIGHT = {
    "normal": numpy.eye(3),
    "protanopia": numpy.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": numpy.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": numpy.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(color: str) -> numpy.ndarray:
    """Return ``#rrggbb`` as linear RGB in [0, 1]."""
    values = numpy.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return numpy.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    """Return linear RGB as CIELAB under daylight."""
    to_xyz = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ numpy.clip(rgb, 0, 1) / numpy.array([0.9505, 1.0, 1.089])
    f = numpy.where(xyz > 0.008856, numpy.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, in [1, 21]."""
    low, high = sorted(float(numpy.array([0.2126, 0.7152, 0.0722]) @ linear(color)) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


def series(tints: dict[str, str]) -> list[str]:
    return [color for name, color in tints.items() if name.startswith("series-")]


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("tints", [LIGHT, DARK], ids=["light", "dark"])
def test_any_two_colours_differ(tints: dict[str, str], sight: str) -> None:
    seen = [lab(SIGHT[sight] @ linear(color)) for color in series(tints)]
    assert len(seen) == 8
    assert min(float(numpy.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) >= 14


@pytest.mark.parametrize("tints", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_background(tints: dict[str, str]) -> None:
    assert min(contrast(color, tints["surface"]) for color in series(tints)) >= 3
    for ground in ("page", "surface", "note"):
        assert contrast(tints["ink"], tints[ground]) >= 7
        assert contrast(tints["muted"], tints[ground]) >= 4.5


def test_both_sets_name_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert all(f"--{name}: {value};" in style_sheet() for tints in (LIGHT, DARK) for name, value in tints.items())

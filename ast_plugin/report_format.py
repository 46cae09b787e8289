"""Numbers and names as people read them, the same in the terminal, the page and the pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

ABSENT = "–"  # an en dash: an empty cell that is not a minus sign

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_BIDI = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def percent(share: float | None, digits: int = 2) -> str:
    """Return a share in [0, 1] as a percentage, never rounded to 100 % or 0 % unless it is.

    Args:
        share: For example 0.9; None gives the sign for an absent value.
        digits: Digits behind the point; more are taken where the rounding would lie.
    """
    if share is None:
        return ABSENT
    for places in range(digits, 9):
        text = f"{100 * share:.{places}f}"
        if (float(text) != 100 or share == 1) and (float(text) != 0 or share == 0):
            return f"{text} %"
    return f"{100 * share:.{digits}f} %"


def short_percent(share: float, digits: int = 6) -> str:
    """Return a share in [0, 1] as a percentage without trailing zeros: ``90 %``, ``99.5 %``.

    Args:
        share: For example 0.9.
        digits: Most digits behind the point; more are taken where the rounding would lie.
    """
    text = percent(share, digits).removesuffix(" %")
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def count(number: float | None, unit: str = "") -> str:
    """Return a large number with three significant digits and a prefix: ``23.4 M``, ``1.02 GFLOP``.

    Args:
        number: A count; None gives the sign for an absent value.
        unit: What is counted; empty for a bare number.
    """
    if number is None:
        return ABSENT
    if number < 1000:
        return f"{number:g} {unit}".rstrip()
    scaled = float(number)
    for prefix in ("k", "M", "G", "T", "P"):
        scaled /= 1000
        if scaled < 999.5 or prefix == "P":
            break
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {prefix}{unit}"


def grouped(number: int | None) -> str:
    """Return a count with all its digits in groups of three: ``23,454,912``."""
    return ABSENT if number is None else f"{number:,}"


def decimal(value: float | None, digits: int = 4) -> str:
    """Return a measured value with `digits` significant digits, without an exponent where it can be avoided."""
    if value is None:
        return ABSENT
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e9:
        text = f"{value:.0f}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def decimals(values: Sequence[float | None]) -> list[str]:
    """Return measured values with equally many digits behind the point, so that a column of them can be compared.

    Four significant digits of the largest; values whose sizes lie too far apart for that keep four each. Values that
    are not finite stand among the others as ``nan`` and ``inf``.
    """
    known = [abs(value) for value in values if value is not None and math.isfinite(value)]
    sizes = [size for size in known if size]
    if not sizes or max(sizes) >= 1e9 or min(sizes) < 1e-4 * max(sizes) or max(sizes) < 1e-4:
        return [decimal(value) for value in values]
    whole = all(size == int(size) for size in known)
    places = 0 if whole else max(0, 3 - math.floor(math.log10(max(sizes))))
    texts = [ABSENT if value is None else f"{value:.{places}f}" for value in values]  # also "nan" and "inf"
    return [text.replace("-", "\N{MINUS SIGN}", 1) for text in texts]


def cosine(value: float | None) -> str:
    """Return a cosine in [-1, 1] with its sign and three digits behind the point."""
    return ABSENT if value is None else f"{value:+.3f}".replace("-", "\N{MINUS SIGN}", 1)


def duration(seconds: float | None) -> str:
    """Return a time span in its two largest units: ``2 min 31 s``."""
    if seconds is None:
        return ABSENT
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as ``64 x 3 x 7 x 7`` with multiplication signs."""
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in sizes) or "scalar"


def clean(text: Any) -> str:
    """Return `text` without characters that break a line, a page or the direction of writing.

    Control characters and halves of surrogate pairs become a replacement sign; marks that turn the writing direction
    are left out, so that a name cannot rearrange the line it stands in.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _BIDI.sub("", str(text)))


def elided(text: str, length: int) -> str:
    """Return `text` cut in its middle to at most `length` characters; both ends of a layer's name tell something."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (length - 1 - head) :]}"


def layer_labels(names: Sequence[str], length: int = 34) -> list[str]:
    """Return short labels for parameters: without what all of them share at either end, cut in the middle.

    Only whole segments between dots are taken off, and at least one always stays.

    Args:
        names: Full parameter names, for example ``model.layer1.0.conv1.weight``.
        length: Longest label.
    """
    parts = [clean(name).split(".") for name in names]
    if len(parts) > 1:
        while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
            parts = [p[1:] for p in parts]
    while all(len(p) > 1 and p[-1] == "weight" for p in parts) and parts:
        parts = [p[:-1] for p in parts]
    return [elided(".".join(p), length) for p in parts]

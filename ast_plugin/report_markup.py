"""Pieces of markup for the HTML report; what they take is markup already where nothing else is said."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from ast_plugin.report_format import clean


def escaped(text: Any) -> str:
    """Return any text as it may stand between tags or in a quoted attribute."""
    return html.escape(clean(text), quote=True)


def table(heads: Iterable[str], rows: Iterable[Sequence[str]], last: Sequence[str] | None = None) -> str:
    """Return a table; the first cell of each row is its heading, `last` is set apart below the others."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
    lines = [("", row) for row in rows] + ([(" class='dense'", last)] if last is not None else [])
    body = "".join(
        f"<tr{kind}><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for kind, row in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def scrolling(content: str, label: str, *, kind: str = "scroll") -> str:
    """Return content that scrolls where it is larger than the screen, also by keyboard; `label` is plain text."""
    return f"<div class='{kind}' tabindex='0' role='region' aria-label='{escaped(label)}'>{content}</div>"


def picture(heading: str, drawing: str, caption: str = "", *, stays: bool = False) -> str:
    """Return a card with a picture; it stays in view beside a longer one if `stays` is set."""
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure class='card{' stay' if stays else ''}'><h3>{heading}</h3>{drawing}{text}</figure>"


def grid(cards: Sequence[str]) -> str:
    """Return cards in two columns; one alone keeps to the width at which its letters have their size."""
    return f"<div class='{'pair' if len(cards) > 1 else 'single'}'>{''.join(cards)}</div>" if cards else ""


def section(heading: str, *content: str) -> str:
    """Return a section of the page."""
    return f"<section><h2>{heading}</h2>{''.join(content)}</section>"


def muted(text: str) -> str:
    """Return a paragraph in the background."""
    return f"<p class='muted'>{text}</p>" if text else ""


def two_lines(value: str, small: str) -> str:
    """Return a cell with a figure and, smaller, what it relates to."""
    return f"{value}<small>{small}</small>"

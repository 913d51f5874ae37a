"""Markup: small HTML tables for notebooks. Everything that is shown is escaped: training text is not to be trusted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

LONGEST = 300
"""Characters of a value that are shown."""


def shown(value: Any) -> str:
    """A value as escaped text on one line, cut at `LONGEST` characters."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    # A lone surrogate, which JSON can spell, would fail when the page is encoded.
    text = text[: LONGEST + 1].encode("utf-8", errors="replace").decode()
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return escape(line if len(text) <= LONGEST else line[: LONGEST - 1] + "\u2026", quote=True)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """An HTML table; numbers are set to the right, and everything is escaped."""
    head = "".join(f"<th style='text-align:left'>{shown(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    title = f"<caption style='text-align:left'>{shown(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<td style='text-align:{'right' if number else 'left'}'>{shown(value)}</td>"

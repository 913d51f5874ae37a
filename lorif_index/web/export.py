"""Export: an answer as JSON or CSV. Text is given as it is; only what a spreadsheet would take for a formula is not."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..results import SearchStats
from .explorer import Found, Question
from .page import plain_json

COLUMNS = ("rank", "id", "score", "source", "text")


def answer_json(question: Question, hits: Sequence[Found], stats: SearchStats, **facts: Any) -> str:
    """The answer as ASCII JSON; a lone surrogate stays an escape, what is not finite is null."""
    rows = [
        {
            "rank": hit.rank,
            "id": hit.item.id,
            "score": hit.score,
            "source": hit.item.source,
            "text": hit.item.text,
            "payload": hit.item.payload,
        }
        for hit in hits
    ]
    return plain_json({"question": asdict(question), **facts, "hits": rows, "stats": asdict(stats)})


def answer_csv(hits: Sequence[Found]) -> str:
    """The hits as CSV: a header, then `COLUMNS`, lines ended by CR LF (RFC 4180).

    A cell that begins like a formula gets an apostrophe before it (OWASP, "CSV Injection"), and a lone surrogate
    becomes a question mark, for it cannot be written.
    """
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for hit in hits:
        row = (hit.rank, hit.item.id, repr(hit.score), _cell(hit.item.source), _cell(hit.item.text))
        writer.writerow(row)
    return out.getvalue()


def _cell(text: str | None) -> str:
    if not text:
        return ""
    # Spreadsheets skip blanks before a formula.
    risky = text[0] in "\t\r\n" or text.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
    safe = f"'{text}" if risky else text
    return safe.replace("\0", "").encode("utf-8", "replace").decode("utf-8")

"""Report: one answer as one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, IndexExistsError
from ..version import VERSION
from .charts import Bar, by_source, histogram, layer_bars
from .explorer import MOST_EXPLAINED, Explorer, Found, Question, Shading
from .page import asset, render, shaded, style_source


def report(
    explorer: Explorer,
    question: Question,
    *,
    k: int = 20,
    recall: float = 0.99,
    exact: bool = False,
    shade: int = 10,
) -> str:
    """The question, its proponents and opponents side by side, and how they were found.

    Args:
        explorer: the index.
        question: a text, or a row.
        k: passages on each side.
        recall, exact: as for `Index.search`.
        shade: passages on each side whose tokens are shaded, from the first on; each takes a pass through the model.

    Returns:
        HTML, with its stylesheet, without a script; its own policy forbids every request.

    Raises:
        QueryError: as `Explorer.search` and `Explorer.explain`.
    """
    # One over all rows at most: nobody is on both sides.
    k = min(k, max(len(explorer.index) // 2, 1))
    sides = [explorer.search(question, k, opponents=o, recall=recall, exact=exact) for o in (False, True)]
    proponents, opponents = (side.hits for side in sides)
    shown = [hit for hits in (proponents, opponents) for hit in hits[:shade]]
    explained: dict[int, Shading] = {}
    why = ""
    if shade:
        try:
            explained = _explained(explorer, question, [hit.item.id for hit in shown])
        except DataError as error:
            why = str(error)
    layers, layers_note = _layers(explorer, question, proponents, explained)
    scores = explorer.scores(question)
    found = np.array([hit.score for hits in (proponents, opponents) for hit in hits])
    words = explorer.text_of(question)
    css = asset("static/style.css")
    return render(
        "report.html",
        title="Which training passages made the model expect this?",
        css=_markup(css),
        style_source=_markup(style_source(css)),
        name=explorer.index.path.name,
        total=len(explorer.index),
        fingerprint=explorer.index.fingerprint,
        question=question,
        words=words,
        loss=explorer.loss(question),
        notes=_notes(explorer, shade, why),
        proponents=proponents,
        opponents=opponents,
        largest=max((abs(float(s)) for s in found), default=0.0) or 1.0,
        shading={row: shaded(one) for row, one in explained.items()},
        for_bars=by_source((hit.item.source, hit.score) for hit in proponents),
        against_bars=by_source((hit.item.source, hit.score) for hit in opponents),
        layers=layers,
        layers_note=layers_note,
        columns=[] if scores is None else histogram(scores, found),
        stats=sides[0].stats,
        version=VERSION,
    )


def write_report(path: Path, html: str, *, replace: bool = False) -> None:
    """Writes a page, whole or not at all.

    Raises:
        IndexExistsError: there is something, and it is not to be replaced.
    """
    if not replace and path.exists():
        raise IndexExistsError(f"{path} exists: pass another file with --out, or --replace")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _explained(explorer: Explorer, question: Question, ids: Sequence[int]) -> dict[int, Shading]:
    wanted = list(dict.fromkeys(ids))
    found: dict[int, Shading] = {}
    for start in range(0, len(wanted), MOST_EXPLAINED):
        found |= explorer.explain(question, wanted[start : start + MOST_EXPLAINED])
    return found


def _notes(explorer: Explorer, shade: int, why: str) -> list[str]:
    if not shade:
        return []
    if not explorer.explains:
        return [f"Tokens are not shaded: that takes the model, and {explorer.why}."]
    return [f"Tokens are not shaded: {why}."] if why else []


def _layers(
    explorer: Explorer, question: Question, hits: Sequence[Found], explained: dict[int, Shading]
) -> tuple[list[Bar], str]:
    """Each layer's part in the first proponents' scores."""
    known = [explained[hit.item.id] for hit in hits if hit.item.id in explained]
    if known:
        sums: dict[str, float] = {}
        for one in known:
            for name, value in one.layers.items():
                sums[name] = sums.get(name, 0.0) + value
        return layer_bars(sums), f"Summed over the first {len(known)} proponents, unfactored."
    ids = [hit.item.id for hit in hits]
    parts = explorer.layer_scores(question, ids)
    if parts is None:
        return [], ""
    return layer_bars(parts), f"Summed over the {len(ids)} proponents, of what is stored."


def _markup(text: str) -> object:
    """Of the package's own: not to be escaped."""
    from markupsafe import Markup

    return Markup(text)

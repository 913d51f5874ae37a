"""Report: one answer as one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

from ..errors import DataError
from ..version import VERSION
from .charts import by_source, layer_bars
from .explorer import MOST_EXPLAINED, Explorer, Shading, WrittenQuestion
from .page import asset, render, style_source, token_values


def report(explorer: Explorer, question: WrittenQuestion, *, k: int = 20, recall: float = 0.99, shade: int = 10) -> str:
    """The question, its proponents and opponents side by side, and how they were found.

    Args:
        explorer: the index.
        question: a text, or a row.
        k: passages on each side.
        recall: as for `Index.search`.
        shade: passages on each side whose tokens are shaded, from the first on; each takes a pass through the model.

    Returns:
        HTML, with its stylesheet, without a script; its own policy forbids every request.

    Raises:
        QueryError: as `Explorer.search` and `Explorer.explain`.
    """
    # One over all rows at most: nobody is on both sides.
    k = min(k, max(len(explorer.index) // 2, 1))
    sides = [explorer.search(question, k, opponents=opponents, recall=recall) for opponents in (False, True)]
    shown = list(dict.fromkeys(hit.item.id for side in sides for hit in side.hits[:shade]))
    explained: dict[int, Shading] = {}
    notes = []
    try:
        for start in range(0, len(shown), MOST_EXPLAINED):
            explained |= explorer.explain(question, shown[start : start + MOST_EXPLAINED])
        if shade and explorer.text_model is None:
            notes.append(f"Tokens are not shaded: that takes the model, and {explorer.why}.")
    except DataError as error:
        notes.append(f"Tokens are not shaded: {error}.")
    layers: dict[str, float] = {}
    for hit in sides[0].hits[:shade]:
        for name, value in explained[hit.item.id].layers.items() if hit.item.id in explained else ():
            layers[name] = layers.get(name, 0.0) + value
    css = asset("static/style.css")
    return render(
        "report.html",
        title="Which training passages made the model expect this?",
        css=css,
        style_source=style_source(css),
        name=explorer.index.path.name,
        total=len(explorer.index),
        fingerprint=explorer.index.fingerprint,
        question=question,
        words=explorer.text_of(question),
        loss=explorer.loss(question),
        notes=notes,
        sides=[
            (title, side.hits, by_source((hit.item.source, hit.score) for hit in side.hits))
            for title, side in zip(("Proponents", "Opponents"), sides, strict=True)
        ],
        largest=max((abs(hit.score) for side in sides for hit in side.hits), default=0.0) or 1.0,
        shading={row: token_values(one.tokens, one.shares) for row, one in explained.items()},
        layers=layer_bars(layers),
        stats=sides[0].stats,
        version=VERSION,
    )

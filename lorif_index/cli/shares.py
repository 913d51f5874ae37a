"""Shares: a score taken apart, in a terminal: tokens shaded by their shares, the strongest of them with numbers.

Texts are not to be trusted: characters that hide or reorder others are shown by their number, and nothing in them is
markup. Where there are no colours, the numbers say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..web.charts import strengths
from ..web.visible import visible
from .show import excerpt

_STRONGEST = 6
# For and against: blue and orange, which colour-blind readers tell apart, on a dark ground, with white letters.
_FOR, _AGAINST = (20, 80, 200), (190, 90, 0)


def show_explanations(out: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """For each question its passages, with their tokens, the question's, and layers.

    Args:
        out: where to.
        answers: {"text", "explanations"}, these as `Explanation.to_json`, with the passage's "source", and the
            "texts" and "query_texts" of the tokens.
    """
    for answer in answers:
        out.print(Text.assemble("“", excerpt(answer["text"]), "”"), style="bold")
        for e in answer["explanations"]:
            stored = "" if e["stored"] is None else f", {e['stored']:.4g} from its stored row"
            source = excerpt(e["source"] or "")
            source.stylize("cyan")
            out.print(Text.assemble(f"\n{e['id']}  ", (f"score {e['score']:.4g}", "bold"), f"{stored}  ", source))
            parts = {"tokens": (e["texts"], e["tokens"]), "text's": (e["query_texts"], e["query_tokens"])}
            parts["layers"] = (list(e["layers"]), list(e["layers"].values()))
            if e["tokens"] is not None:
                out.print(shaded(e["texts"], np.array(e["tokens"])))
            for name, (texts, shares) in parts.items():
                if shares is not None:
                    out.print(Text.assemble((f"  {name:10}", "dim"), strongest(texts, np.array(shares), e["score"])))
    out.print(
        "Shares of the score, which they sum to: one above 100% is made up for by others below zero. A token's share "
        "is that of what was predicted from it, so look at the token behind it, too."
        + (" Blue is for the text, orange against it." if out.is_terminal else ""),
        style="dim",
    )


def shaded(tokens: Sequence[str], shares: np.ndarray) -> Text:
    """The text of tokens, each on a ground of its share.

    Args:
        tokens: their texts.
        shares: (T,), of each.
    """
    text = Text()
    for token, strength in zip(tokens, strengths(shares).tolist(), strict=True):
        ground = None
        if abs(strength) > 0.15:
            red, green, blue = (round(part * abs(strength)) for part in (_FOR if strength > 0 else _AGAINST))
            ground = Style(color="white", bgcolor=f"rgb({red},{green},{blue})", underline=strength < 0)
        text.append(_on_one_line(token), ground)
    return text


def strongest(names: Sequence[str], shares: np.ndarray, score: float) -> Text:
    """The largest shares by size, as parts of the score: “ the” +31%, ...

    Args:
        names: of tokens or layers.
        shares: (T,), of each.
        score: what they sum to.
    """
    parts = []
    for place in np.argsort(-np.abs(shares), kind="stable")[:_STRONGEST].tolist():
        # Of a score of about nothing percentages say nothing.
        part = float(shares[place]) / abs(score) if score else float("inf")
        number = f"{part:+.0%}" if abs(part) < 10 else f"{shares[place]:+.3g}"
        parts.append(f"“{_on_one_line(names[place])}” {number}")
    return Text(", ".join(parts))


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", " ").replace("\t", " ")

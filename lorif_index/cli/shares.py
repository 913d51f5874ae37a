"""Shares: a score taken apart, in a terminal: tokens shaded by their shares, the strongest of them with numbers.

Texts are not to be trusted: characters that hide or reorder others are shown by their number, and nothing in them is
markup. Where there are no colours, the numbers say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..search.explain import Explanation
from ..web.charts import strengths
from ..web.visible import visible
from .show import excerpt

_STRONGEST = 6
_LAYERS = 4
# For and against: blue and orange, which colour-blind readers tell apart, on a dark ground, with white letters.
_FOR, _AGAINST = (20, 80, 200), (190, 90, 0)


@dataclass(frozen=True)
class Told:
    """The score of a passage taken apart, in words.

    Attributes:
        explanation: the shares.
        text, source: of the passage; None where the index keeps none.
        tokens: (T,), the text that each token of the passage adds, beside `explanation.tokens`.
        query_tokens: (Tq,), the same of the question with its prompt, beside `explanation.query_tokens`.
    """

    explanation: Explanation
    text: str | None
    source: str | None
    tokens: list[str]
    query_tokens: list[str]

    def to_json(self) -> dict[str, Any]:
        """The explanation's values, with "texts" and "query_texts" of the tokens, and the passage's source and text."""
        return self.explanation.to_json() | {
            "source": self.source,
            "text": self.text,
            "texts": self.tokens,
            "query_texts": self.query_tokens,
        }


def show_explanations(out: Console, texts: Sequence[str], found: Sequence[Sequence[Told]]) -> None:
    """For each question its passages, with their tokens, the question's, and layers."""
    for text, row in zip(texts, found, strict=True):
        out.print(Text.assemble("“", excerpt(text), "”"), style="bold")
        for one in row:
            _show(out, one)
    out.print(
        "Shares of the score, which they sum to; a token's is that of what was predicted from it. Blue is for the "
        "text, orange against it.",
        style="dim",
    )


def _show(out: Console, one: Told) -> None:
    e = one.explanation
    stored = "" if np.isnan(e.stored) else f", {e.stored:.4g} from its stored row"
    source = excerpt(one.source or "")
    source.stylize("cyan")
    out.print(Text.assemble(f"\n{e.id}  ", (f"score {e.score:.4g}", "bold"), f"{stored}  ", source))
    if e.tokens is not None:
        out.print(shaded(one.tokens, e.tokens))
        out.print(Text.assemble(("  tokens    ", "dim"), strongest(one.tokens, e.tokens, e.score)))
    if e.query_tokens is not None:
        out.print(Text.assemble(("  text's    ", "dim"), strongest(one.query_tokens, e.query_tokens, e.score)))
    shares = np.array(list(e.layers.values()))
    out.print(Text.assemble(("  layers    ", "dim"), strongest(list(e.layers), shares, e.score, most=_LAYERS)))


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


def strongest(names: Sequence[str], shares: np.ndarray, score: float, most: int = _STRONGEST) -> Text:
    """The largest shares by size, as parts of the score: “ the” +31%, ...

    Args:
        names: of tokens or layers.
        shares: (T,), of each.
        score: what they sum to.
        most: how many to name.
    """
    parts = []
    for place in np.argsort(-np.abs(shares), kind="stable")[:most].tolist():
        # Of a score of about nothing percentages say nothing.
        part = float(shares[place]) / abs(score) if score else float("inf")
        number = f"{part:+.0%}" if abs(part) < 10 else f"{shares[place]:+.3g}"
        parts.append(f"“{_on_one_line(names[place])}” {number}")
    return Text(", ".join(parts))


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", " ").replace("\t", " ")

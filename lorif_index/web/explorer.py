"""Explorer: what the pages ask of an index: both sides of a question, shares of tokens, rows.

An index of texts with its model at hand answers texts. Any index answers by its own rows: what is like this one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QueryError
from ..index import Index
from ..results import SearchStats
from ..text.demo import ORIGIN as DEMO
from ..text.demo import QUESTION
from ..text.model import TextModel
from ..text.passages import described, is_text
from ..text.textindex import open_text_index, remembered_model, text_facts
from ..text.textquestions import TextQuestion

MOST_HITS = 1000
"""Of one side of an answer."""
MOST_EXPLAINED = 50
"""Passages in one call of `Explorer.explain`: each takes a pass through the model."""
_ANSWERS_KEPT = 200
_MOST_WORDS = 100_000
_EXAMPLES = 6


@dataclass(frozen=True)
class WrittenQuestion:
    """A text, or a row of the index put as a question.

    Attributes:
        text: the text whose loss is explained; None where a row asks.
        prompt: comes before the text, and is not itself asked about.
        row: a row's id; None where a text asks.
    """

    text: str | None = None
    prompt: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Item:
    """A row of the index as it is shown.

    Attributes:
        id: the row's id.
        text: what it says: a passage, else its payload as JSON, else nothing.
        source: where it is from; None where nothing says so.
        payload: as it was given to `build`; None where there is none.
    """

    id: int
    text: str | None
    source: str | None
    payload: Any = None


@dataclass(frozen=True)
class Found:
    """An item with its rank, from 1, its score, and its rank by words alone: 0 shares none, None is not known."""

    rank: int
    score: float
    item: Item
    lexical: int | None = None


@dataclass(frozen=True)
class Side:
    """Proponents or opponents, strongest first, and how they were found."""

    hits: list[Found]
    stats: SearchStats


@dataclass(frozen=True)
class Shading:
    """How a passage's score comes about.

    Attributes:
        tokens: its tokens as text, and each one's share of the score.
        shares: (T,) float.
        layers: layer -> its part of the score.
        score: unfactored; the sum of the shares, and of the layers.
        stored: the score of the row that is kept.
        asked_tokens, asked_shares: the same of the question's tokens; None where they were not asked for.
    """

    tokens: list[str]
    shares: np.ndarray
    layers: dict[str, float]
    score: float
    stored: float
    asked_tokens: list[str] | None = None
    asked_shares: np.ndarray | None = None


class Explorer:
    """An index, with its model where that is at hand. Safe to use from several threads: it answers one at a time.

    Args:
        index: open.
        text_model: what it was built from, or None.
        why: why there is no model, where there is none.
    """

    def __init__(self, index: Index, text_model: TextModel | None = None, why: str = "") -> None:
        self.index, self.text_model, self.why = index, text_model, why
        self._words = self._have_words()
        # One at a time, since a model's hooks are its own; the last answers are kept.
        self._lock = threading.Lock()
        self._kept = lru_cache(_ANSWERS_KEPT)(lambda ask, *arguments: ask(*arguments))

    @classmethod
    def open(cls, path: Path, *, model: Path | None = None, device: str = "auto") -> Explorer:
        """Opens an index, with the model that it remembers if it is there.

        Args:
            path: the index.
            model: the model's folder; one that is named must be right.
            device: as for `load_text_model`.

        Raises:
            As `Index.open`, and as `open_text_index` where a model is named, or found and another one.
        """
        remembered = remembered_model(path)
        if model is None and (remembered is None or not remembered.is_dir()):
            why = (
                "the index was not made by lorif build, so it knows no model"
                if remembered is None
                else "the model that the index was built from is no longer where it was"
            )
            return cls(Index.open(path), None, why)
        return cls(*open_text_index(path, model=model, device=device))

    def search(
        self,
        question: WrittenQuestion,
        k: int,
        *,
        opponents: bool = False,
        recall: float = 0.99,
        rerank: int | None = None,
        refine: bool = False,
    ) -> Side:
        """The k rows that did most for, or against, the question; a row that asks is not among its own. So many of the
        best as `rerank` says are computed again, and the question is refined, where the model and its texts are there.

        Raises:
            QueryError: k or rerank above `MOST_HITS`, a question that cannot be put, or as `Index.search`.
        """
        if not 1 <= k <= MOST_HITS:
            raise QueryError(f"k must be from 1 to {MOST_HITS:,}, got {k}")
        if rerank is not None and rerank > MOST_HITS:
            raise QueryError(f"rerank must be at most {MOST_HITS:,}, got {rerank:,}")
        with self._lock:
            return self._kept(self._search, question, k, opponents, recall, rerank, refine)

    def loss(self, question: WrittenQuestion) -> tuple[int, float] | None:
        """(tokens with a loss, the model's loss on them in nats); None where no text and model are there."""
        text = self.text_of(question)
        if self.text_model is None or text is None:
            return None
        with self._lock:
            return self.text_model.losses(TextQuestion.written(text, question.prompt).row)[0]

    def explain(
        self, question: WrittenQuestion, ids: Sequence[int], *, asked_tokens: bool = False
    ) -> dict[int, Shading]:
        """Shares of tokens and layers in the scores of some rows; nothing where there is no model, or no text.

        A row that asks is explained as its text: the shares are of whole gradients, not of what is stored.

        Raises:
            QueryError: more than `MOST_EXPLAINED` ids, one that the index does not hold, or a question that cannot be
            put. DataError: no texts are kept, or they cannot be cut as at the build.
        """
        if len(ids) > MOST_EXPLAINED:
            raise QueryError(f"at most {MOST_EXPLAINED} passages are explained at once, got {len(ids)}")
        words = self.text_of(question)
        if self.text_model is None or words is None or not ids:
            return {}
        with self._lock:
            return self._kept(self._explain, self.text_model, words, question.prompt, tuple(ids), asked_tokens)

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Rows as they are shown.

        Raises:
            QueryError: an id that the index does not hold.
        """
        return _items(ids, self.index.payloads(ids))

    def text_of(self, question: WrittenQuestion) -> str | None:
        """What is asked, in words; None where a row that is no text asks."""
        if question.row is None:
            return question.text
        item = self.items([question.row])[0]
        return item.text if is_text(item.payload) else None

    def examples(self) -> list[tuple[str, WrittenQuestion]]:
        """(label, question) to begin with: rows from all over the index, and before them the demo's question."""
        if not len(self.index):
            return []
        ids = self.index.ids
        chosen = ids[np.unique(np.linspace(0, len(ids) - 1, _EXAMPLES + 2).astype(int)[1:-1])].tolist()
        rows = [(item.text or f"row {item.id}", WrittenQuestion(row=item.id)) for item in self.items(chosen)]
        demo = self.text_model is not None and text_facts(self.index).get("origin") == DEMO
        return [(QUESTION, WrittenQuestion(QUESTION)), *rows] if demo else rows

    def _have_words(self) -> bool:
        """Whether ranks by words can be shown, and are soon known."""
        few = 0 < len(self.index) <= _MOST_WORDS and find_spec("bm25s") is not None
        if not few or self.text_model is None:
            return False
        payload = self.index.payloads(self.index.ids[:1])[0]
        return isinstance(payload, str) or is_text(payload)

    def _query(self, question: WrittenQuestion) -> Any:
        if question.row is not None:
            return self.index.gradients([question.row])
        if self.text_model is None:
            raise QueryError(f"a text needs the model, and {self.why}: name it with --model, or ask by a row's id")
        return TextQuestion.written(question.text or "", question.prompt).row

    def _search(
        self, question: WrittenQuestion, k: int, opponents: bool, recall: float, rerank: int | None, refine: bool
    ) -> Side:
        extra = 0 if question.row is None else 1
        found = self.index.search(
            self._query(question),
            k + extra,
            opponents=opponents,
            recall=recall,
            rerank=None if rerank is None else rerank + extra,
            refine=refine,
            lexical=question.row is None and self._words,
        )
        ids, scores = found.ids[0].tolist(), found.scores[0].tolist()
        payloads = [None] * len(ids) if found.payloads is None else found.payloads[0]
        words = [None] * len(ids) if found.lexical is None else found.lexical[0].tolist()
        items = zip(scores, _items(ids, payloads), words, strict=True)
        others = [one for one in items if one[1].id != question.row]
        hits = [Found(rank, *one) for rank, one in enumerate(others[:k], start=1)]
        return Side(hits, found.stats)

    def _explain(
        self, text_model: TextModel, text: str, prompt: str | None, ids: tuple[int, ...], asked_tokens: bool
    ) -> dict[int, Shading]:
        query, out = TextQuestion.written(text, prompt).row, {}
        theirs = text_model.token_texts(query)[0] if asked_tokens else None
        found = self.index.explain(query, ids, query_tokens=asked_tokens)[0]
        for one, tokens in zip(found, text_model.token_texts(self.index.payloads(ids)), strict=True):
            shares = np.zeros(len(tokens)) if one.tokens is None else one.tokens
            asked = None if one.query_tokens is None else theirs
            out[one.id] = Shading(tokens, shares, one.layers, one.score, one.stored, asked, one.query_tokens)
        return out


def _items(ids: Sequence[int], payloads: Sequence[Any]) -> list[Item]:
    return [Item(i, *described(payload), payload) for i, payload in zip(ids, payloads, strict=True)]

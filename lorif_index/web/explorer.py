"""Explorer: what the pages ask of an index: both sides of a question, all scores, shares of tokens, rows.

An index of texts with its model at hand answers texts. Any index that stores gradients answers by its own rows: what is
like this one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import QueryError
from ..index import Index
from ..results import Hits, SearchStats
from ..text.demo import ORIGIN as DEMO
from ..text.demo import QUESTION
from ..text.model import TextModel
from ..text.model import question as in_words
from ..text.passages import described, is_text
from ..text.textindex import StoredTexts, open_text_index, remembered_model, text_facts

MOST_HITS = 1000
"""Of one side of an answer."""
MOST_EXPLAINED = 50
"""Passages in one call of `Explorer.explain`: each takes a pass through the model."""
ALL_SCORES_UP_TO = 200_000
"""Rows up to which a question is scored against all of them for the picture of the distribution."""
# Answers, scores, losses; and shadings, which are smaller.
_KEPT, _SHADINGS_KEPT = 64, 1000
_MOST_LAYER_SCORES = 1_000_000
_EXAMPLES = 6


@dataclass(frozen=True)
class Question:
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
    """An item with its rank, from 1, and its score."""

    rank: int
    score: float
    item: Item


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
        asked_tokens, asked_shares: the same of the question's tokens; None where they were not asked for.
    """

    tokens: list[str]
    shares: np.ndarray
    layers: dict[str, float]
    score: float
    asked_tokens: list[str] | None = None
    asked_shares: np.ndarray | None = None


class Explorer:
    """An index, with its model where that is at hand. Safe to use from several threads: it answers one at a time.

    Args:
        index: open.
        text_model: what it was built from, or None.
        why: why there is no model, where there is none.
        examples: texts to offer as questions.
    """

    def __init__(
        self, index: Index, text_model: TextModel | None = None, why: str = "", examples: Sequence[str] = ()
    ) -> None:
        self.index, self.text_model, self.why = index, text_model, why
        self.given = list(examples)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._shadings: OrderedDict[Any, Shading] = OrderedDict()

    @classmethod
    def open(
        cls, path: Path, *, model: Path | None = None, device: str = "auto", examples: Sequence[str] = ()
    ) -> Explorer:
        """Opens an index, with the model that it remembers if it is there.

        Args:
            path: the index.
            model: the model's folder; one that is named must be right.
            device: as for `load_text_model`.
            examples: as above.

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
            return cls(Index.open(path), None, why, examples)
        return cls(*open_text_index(path, model=model, device=device), "", examples)

    # -- asking ----------------------------------------------------------------------------------------------------

    def search(
        self,
        question: Question,
        k: int,
        *,
        opponents: bool = False,
        recall: float = 0.99,
        exact: bool = False,
    ) -> Side:
        """The k rows that did most for, or against, the question; a row that asks is not among its own.

        Raises:
            QueryError: k above `MOST_HITS`, a question that cannot be put, or as `Index.search`.
        """
        if not 1 <= k <= MOST_HITS:
            raise QueryError(f"k must be from 1 to {MOST_HITS:,}, got {k}")
        return self._once(
            ("search", question, k, opponents, recall, exact),
            lambda: self._search(question, k, opponents, recall, exact),
        )

    def loss(self, question: Question) -> tuple[int, float] | None:
        """(tokens with a loss, the model's loss on them in nats); None where no text and model are there."""
        text = self.text_of(question)
        model = self.text_model
        if model is None or text is None:
            return None
        row = in_words(text, question.prompt)
        return self._once(("loss", text, question.prompt), lambda: model.losses(row)[0])

    def scores(self, question: Question) -> np.ndarray | None:
        """Scores of all rows, (n,) float32; None where there are too many, or none are stored."""
        if len(self.index) > ALL_SCORES_UP_TO or not self.index.bytes_per_example:
            return None
        return self._once(("scores", question), lambda: self.index.scores(self._query(question))[0])

    def layer_scores(self, question: Question, ids: Sequence[int]) -> dict[str, float] | None:
        """Layer -> its part of some rows' scores as stored, summed over them; None where that takes too long."""
        index = self.index
        if len(index) * len(index.layers) > _MOST_LAYER_SCORES or not index.bytes_per_example or not ids:
            return None

        def take() -> dict[str, float]:
            columns, query = np.searchsorted(index.ids, np.asarray(ids)), self._query(question)
            return {n: float(index.scores(query, layers=n)[0, columns].sum(dtype=np.float64)) for n in index.layers}

        return self._once(("layers", question, tuple(ids)), take)

    def explain(self, question: Question, ids: Sequence[int], *, asked_tokens: bool = False) -> dict[int, Shading]:
        """Shares of tokens and layers in the scores of some rows; nothing where there is no model, or no text.

        A row that asks is explained as its text: the shares are of whole gradients, not of what is stored.

        Raises:
            QueryError: more than `MOST_EXPLAINED` ids, one that the index does not hold, or a question that cannot be
            put. DataError: no texts are kept, or they cannot be cut as at the build.
        """
        if len(ids) > MOST_EXPLAINED:
            raise QueryError(f"at most {MOST_EXPLAINED} passages are explained at once, got {len(ids)}")
        words = self.text_of(question)
        if self.text_model is None or words is None:
            return {}
        with self._lock:
            keys = {row: (question, row, asked_tokens) for row in ids}
            found = {row: self._shadings[key] for row, key in keys.items() if key in self._shadings}
            # In one call: the question's own gradient is taken once.
            missing = [row for row in keys if row not in found]
            if missing:
                found |= self._shadings_of(self.text_model, in_words(words, question.prompt), missing, asked_tokens)
            for row, key in keys.items():
                _keep(self._shadings, key, found[row], _SHADINGS_KEPT)
        return {row: found[row] for row in keys}

    @property
    def explains(self) -> bool:
        """Whether `explain` may have something to say."""
        return self.text_model is not None

    # -- looking ---------------------------------------------------------------------------------------------------

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Rows as they are shown.

        Raises:
            QueryError: an id that the index does not hold.
        """
        payloads = self.index.payloads(np.asarray(ids, np.int64))
        return _items(ids, payloads)

    def text_of(self, question: Question) -> str | None:
        """What is asked, in words; None where a row that is no text asks."""
        if question.row is None:
            return question.text
        item = self.items([question.row])[0]
        return item.text if is_text(item.payload) else None

    def examples(self) -> list[tuple[str, Question]]:
        """(label, question) to begin with: those that were given, else rows from all over the index."""
        if self.given and self.text_model is not None:
            return [(text, Question(text)) for text in self.given]
        if self.text_model is not None and text_facts(self.index).get("origin") == DEMO:
            return [(QUESTION, Question(QUESTION)), *self._rows()]
        return self._rows()

    def _rows(self) -> list[tuple[str, Question]]:
        if not len(self.index):
            return []
        ids = self.index.ids
        chosen = ids[np.unique(np.linspace(0, len(ids) - 1, _EXAMPLES + 2).astype(int)[1:-1])].tolist()
        return [(item.text or f"row {item.id}", Question(row=item.id)) for item in self.items(chosen)]

    def close(self) -> None:
        """Gives the index's files back."""
        self.index.close()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _once(self, key: Any, make: Any) -> Any:
        """One at a time, since a model's hooks are its own; the last answers are kept."""
        with self._lock:
            if key not in self._kept:
                _keep(self._kept, key, make(), _KEPT)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _query(self, question: Question) -> Any:
        if question.row is not None:
            return self.index.gradients([question.row])
        if self.text_model is None:
            raise QueryError(f"a text needs the model, and {self.why}: name it with --model, or ask by a row's id")
        return in_words(question.text or "", question.prompt)

    def _shadings_of(
        self, text_model: TextModel, query: dict[str, str], rows: list[int], asked_tokens: bool
    ) -> dict[int, Shading]:
        stored, out = StoredTexts(self.index, text_model), {}
        theirs = text_model.token_texts(query)[0] if asked_tokens else None
        for one in self.index.explain(query, rows, data=stored, query_tokens=asked_tokens)[0]:
            tokens = stored.token_texts(one.id)
            shares = np.zeros(len(tokens)) if one.tokens is None else one.tokens
            out[one.id] = Shading(
                tokens, shares, one.layers, one.score, None if one.query_tokens is None else theirs, one.query_tokens
            )
        return out

    def _search(self, question: Question, k: int, opponents: bool, recall: float, exact: bool) -> Side:
        extra = 0 if question.row is None else 1
        found: Hits = self.index.search(
            self._query(question), k + extra, opponents=opponents, recall=recall, exact=exact or None
        )
        ids, scores = found.ids[0].tolist(), found.scores[0].tolist()
        payloads = [None] * len(ids) if found.payloads is None else found.payloads[0]
        items = _items(ids, payloads)
        others = [(score, item) for score, item in zip(scores, items, strict=True) if item.id != question.row]
        hits = [Found(rank, score, item) for rank, (score, item) in enumerate(others[:k], start=1)]
        return Side(hits, found.stats)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """The last ones only."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def _items(ids: Sequence[int], payloads: Sequence[Any]) -> list[Item]:
    return [Item(i, *described(payload), payload) for i, payload in zip(ids, payloads, strict=True)]

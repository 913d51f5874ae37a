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
from ..text.demo import QUESTION
from ..text.textindex import METADATA, TextIndex, encode_question
from ..text.texts import read_passages

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
_WITH_GRADIENTS = ("eigen", "factors", "both")


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
        asked: the same index with its model, or None.
        why: why there is no model, where there is none.
        examples: texts to offer as questions.
    """

    def __init__(
        self, index: Index, asked: TextIndex | None = None, why: str = "", examples: Sequence[str] = ()
    ) -> None:
        self.index, self.asked, self.why = index, asked, why
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
            As `Index.open`, and as `TextIndex.open` where a model is named, or found and another one.
        """
        remembered = _model_folder(path)
        if model is None and (remembered is None or not remembered.is_dir()):
            why = (
                "the index was not made by lorif build, so it knows no model"
                if remembered is None
                else "the model that the index was built from is no longer where it was"
            )
            return cls(Index.open(path), None, why, examples)
        asked = TextIndex.open(path, model=model, device=device)
        return cls(asked.index, asked, "", examples)

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
        if self.asked is None or text is None:
            return None
        asked, prompt = self.asked, question.prompt
        return self._once(("loss", text, prompt), lambda: asked.loss(text, prompt=prompt))

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
        asked, words = self.asked, self.text_of(question)
        if asked is None or words is None:
            return {}
        with self._lock:
            keys = {row: (question, row, asked_tokens) for row in ids}
            found = {row: self._shadings[key] for row, key in keys.items() if key in self._shadings}
            # In one call: the question's own gradient is taken once.
            missing = [row for row in keys if row not in found]
            if missing:
                found |= _shadings(asked, words, question.prompt, missing, asked_tokens)
            for row, key in keys.items():
                _keep(self._shadings, key, found[row], _SHADINGS_KEPT)
        return {row: found[row] for row in keys}

    @property
    def explains(self) -> bool:
        """Whether `explain` may have something to say."""
        return self.asked is not None

    # -- looking ---------------------------------------------------------------------------------------------------

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Rows as they are shown.

        Raises:
            QueryError: an id that the index does not hold.
        """
        payloads = self.index.payloads(np.asarray(ids, np.int64))
        return _items(self.index, ids, payloads)

    def text_of(self, question: Question) -> str | None:
        """What is asked, in words; None where a row that is no text asks."""
        if question.row is None:
            return question.text
        item = self.items([question.row])[0]
        return item.text if _is_text(item.payload) or item.payload is None else None

    def examples(self) -> list[tuple[str, Question]]:
        """(label, question) to begin with: those that were given, else rows from all over the index."""
        if self.given and self.asked is not None:
            return [(text, Question(text)) for text in self.given]
        # The demo's own.
        facts = self.index.metadata.get(METADATA)
        if self.asked is not None and isinstance(facts, dict) and facts.get("origin") == {"data": "pydoc_data.topics"}:
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
        words = question.text
        if question.row is not None:
            if self.asked is None or self.index.codec in _WITH_GRADIENTS:
                return self.index.gradients([question.row])
            # Rows of coordinates are no gradients, but the passage still has words.
            words = self.text_of(question)
        if self.asked is None:
            raise QueryError(f"a text needs the model, and {self.why}: name it with --model, or ask by a row's id")
        model = self.asked.text_model
        return [encode_question(words or "", model.tokenizer, model.context, prompt=question.prompt)]

    def _search(self, question: Question, k: int, opponents: bool, recall: float, exact: bool) -> Side:
        extra = 0 if question.row is None else 1
        found: Hits = self.index.search(
            self._query(question), k + extra, opponents=opponents, recall=recall, exact=exact or None
        )
        ids, scores = found.ids[0].tolist(), found.scores[0].tolist()
        payloads = [None] * len(ids) if found.payloads is None else found.payloads[0]
        items = _items(self.index, ids, payloads)
        others = [(score, item) for score, item in zip(scores, items, strict=True) if item.id != question.row]
        hits = [Found(rank, score, item) for rank, (score, item) in enumerate(others[:k], start=1)]
        return Side(hits, found.stats)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """The last ones only."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def _shadings(
    asked: TextIndex, words: str, prompt: str | None, rows: list[int], asked_tokens: bool
) -> dict[int, Shading]:
    out = {}
    for one in asked.explain([words], rows, prompt=prompt, query_tokens=asked_tokens)[0]:
        found = one.explanation
        shares = np.zeros(len(one.tokens)) if found.tokens is None else found.tokens
        theirs = found.query_tokens
        out[found.id] = Shading(
            tokens=one.tokens,
            shares=shares,
            layers=found.layers,
            score=found.score,
            asked_tokens=None if theirs is None else one.query_tokens,
            asked_shares=theirs,
        )
    return out


def _model_folder(path: Path) -> Path | None:
    with Index.open(path) as bare:
        facts = bare.metadata.get(METADATA)
    named = facts.get("model") if isinstance(facts, dict) else None
    return Path(named) if isinstance(named, str) else None


def _is_text(payload: Any) -> bool:
    return isinstance(payload, dict) and isinstance(payload.get("text"), str)


def _items(index: Index, ids: Sequence[int], payloads: Sequence[Any]) -> list[Item]:
    facts = index.metadata.get(METADATA)
    known = facts.get("passages") if isinstance(facts, dict) else None
    if isinstance(known, dict) and "digest" in known:
        # Until format version 4 passages were in a file of their own.
        passages = read_passages(index.path, known, ids)
        return [Item(i, passages[i].text, passages[i].source) if i in passages else Item(i, None, None) for i in ids]
    return [_item(i, payload) for i, payload in zip(ids, payloads, strict=True)]


def _item(row: int, payload: Any) -> Item:
    import json

    if payload is None:
        return Item(row, None, None)
    if isinstance(payload, str):
        return Item(row, payload, None, payload)
    source = payload.get("source") if isinstance(payload, dict) else None
    text = payload["text"] if _is_text(payload) else json.dumps(payload, ensure_ascii=False, indent=1)
    return Item(row, text, None if source is None else str(source), payload)

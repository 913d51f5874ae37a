"""Words: where hits would stand by their words alone (BM25), so that a reader sees what influence finds beyond them.

BM25 as Lucene computes it, k1 = 1.5, b = .75 (Robertson and Zaragoza, 2009, doi:10.1561/1500000019), by bm25s (Lù,
arXiv:2407.03618); words are runs of letters and digits, in small letters, none left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, QueryError
from ..search.named import check_alone, payloads_at
from ..search.reader import Reader
from .chat import is_chat

_PATTERN = r"(?u)\b\w+\b"
_AT_ONCE = 10_000


class Words:
    """The words of all texts that an index keeps: some hundred bytes a passage, in memory.

    Args:
        reader: the version.

    Raises:
        QueryError: it keeps no texts. ConfigError: bm25s is not installed.
    """

    def __init__(self, reader: Reader) -> None:
        try:
            import bm25s
        except ImportError:
            raise ConfigError("lexical=True needs bm25s, which is not installed: pip install bm25s") from None
        check_alone(reader)
        live, texts = reader.store.live, list[str]()
        for start in range(0, len(live), _AT_ONCE):
            texts += [_text_of(payload) or "" for payload in payloads_at(reader, live[start : start + _AT_ONCE])]
        if not any(texts):
            raise QueryError(
                "the index keeps no texts to compare words with: build it with payloads=, strings or dicts with a "
                "'text' (lorif build keeps them)"
            )
        self._ids = reader.store.live_ids
        self._cut: Callable[[list[Any]], list[list[str]]] = lambda some: bm25s.tokenize(
            some, lower=True, token_pattern=_PATTERN, stopwords=None, return_ids=False, show_progress=False
        )
        self._found = bm25s.BM25()
        self._found.index(self._cut(texts), show_progress=False)

    def ranks(self, texts: Sequence[str], ids: np.ndarray) -> np.ndarray:
        """Ranks of some rows by the words of each question, (q, k) int64 from 1; 0 where a row shares none.

        Args:
            texts: q of them, of `question_texts`.
            ids: (q, k).
        """
        out = np.zeros(ids.shape, dtype=np.int64)
        for row, words, its in zip(out, self._cut(list(texts)), ids, strict=True):
            known = [word for word in words if word in self._found.vocab_dict]
            if known:
                scores = self._found.get_scores(known)
                own = scores[np.searchsorted(self._ids, its)]
                above = len(scores) - np.searchsorted(np.sort(scores), own, side="right")
                row[:] = np.where(own > 0, above + 1, 0)
        return out


def question_texts(query: Any) -> list[str]:
    """The words of each question: of a text, a chat, a row, or several of them, as they are asked.

    Raises:
        QueryError: questions that are no texts.
    """
    asked = [query] if isinstance(query, (str, Mapping)) or is_chat(query) else query
    texts = [_text_of(one) for one in asked] if isinstance(asked, Sequence) else [None]
    found = [text for text in texts if text is not None]
    if len(found) < len(texts):
        raise QueryError("lexical=True compares words, and the question is no text: ask with a text or a chat")
    return found


def _text_of(value: Any) -> str | None:
    """The words of a payload or a question; None where it has none."""
    if isinstance(value, str):
        return value
    if is_chat(value):
        return " ".join(part for part in (_text_of(message.get("content")) for message in value) if part)
    if not isinstance(value, Mapping):
        return None
    parts = [_text_of(value[name]) for name in ("text", "messages", "prompt", "completion") if name in value]
    return " ".join(part for part in parts if part) if any(parts) else None

"""Passages: documents cut into windows of tokens, which are the examples of an index and the payloads that it keeps.

A passage is a row {"source", "text"}, with "input_ids" where its text alone would give other tokens. As it is,
`TokenisedData` makes an example of it, when the index is built and when a hit is explained.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, StoreError
from ..progress import ProgressCallback, reporter
from .documents import Document

Row = dict[str, Any]
LEAST_TOKENS = 2
"""A window of fewer tokens has no next token to predict, so no loss."""

_AT_ONCE = 256


def cut(documents: Iterable[Document], tokenizer: Any, *, max_length: int) -> Iterator[tuple[Document, list[Row], int]]:
    """Each document with its passages, windows of at most `max_length` tokens one behind the other, and how many tokens
    these have together.

    A document is tokenised whole, with the special tokens its tokenizer adds, and then cut. A window of fewer than two
    tokens has no loss and is left out, so that an empty document has no passages.

    Args:
        documents: in order.
        tokenizer: of transformers, a fast one.
        max_length: tokens, at least 2.

    Raises:
        ConfigError: max_length out of range. DataError: the tokenizer tells no places of its tokens.
    """
    if max_length < LEAST_TOKENS:
        raise ConfigError(f"max_length must be at least {LEAST_TOKENS} tokens, got {max_length}")
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} tells no places of its tokens, so that texts cannot be cut: load the fast one"
        )
    waiting = iter(documents)
    while group := list(islice(waiting, _AT_ONCE)):
        texts = [document.text for document in group]
        encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        for at, document in enumerate(group):
            ids, spans = encoded["input_ids"][at], encoded["offset_mapping"][at]
            pieces = list(_windows(document, ids, spans, max_length))
            yield document, _rows(pieces, tokenizer), sum(len(part) for *_, part in pieces)


def _windows(
    document: Document, ids: list[int], spans: list[tuple[int, int]], max_length: int
) -> Iterator[tuple[str, str, list[int]]]:
    """(source, text, tokens) of each window."""
    starts = range(0, len(ids) - LEAST_TOKENS + 1, max_length)
    for number, start in enumerate(starts, start=1):
        # Special tokens stand for no characters, and have the empty span.
        real = [span for span in spans[start : start + max_length] if span[1] > span[0]]
        text = document.text[real[0][0] : real[-1][1]] if real else ""
        part = f", part {number} of {len(starts)}" if len(starts) > 1 else ""
        yield document.source + part, text, ids[start : start + max_length]


def _rows(pieces: list[tuple[str, str, list[int]]], tokenizer: Any) -> list[Row]:
    """Passages with their tokens where their text, tokenised by itself, gives others: a window in the middle of a
    document may lack special tokens, or begin where no word does."""
    if not pieces:
        return []
    again = tokenizer([text for _, text, _ in pieces], return_attention_mask=False, verbose=False)["input_ids"]
    return [
        {"source": source, "text": text} | ({} if list(found) == ids else {"input_ids": ids})
        for (source, text, ids), found in zip(pieces, again, strict=True)
    ]


class Passages:
    """Documents cut into passages, as a map-style dataset of rows. A temporary file keeps them, which is gone with the
    object.

    Args:
        documents: walked once.
        tokenizer, max_length: as for `cut`.
        folder: an existing folder on the disk that is to hold them; default: where temporary files go.
        progress: as for `Index.build`.

    Attributes:
        tokens: in all.
        documents: that they were cut from.
        max_length: tokens of a passage at most.

    Raises:
        DataError: no passage, or as the documents raise. ConfigError: as `cut`.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Any,
        *,
        max_length: int,
        folder: Path | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        self.max_length, self.tokens, self.documents = max_length, 0, 0
        self._ends = array("q", [0])
        self._file = tempfile.TemporaryFile(prefix=".passages-", dir=folder)  # noqa: SIM115 - closed by the next line
        weakref.finalize(self, self._file.close)
        with reporter(progress) as report, report.stage("tokenise") as stage:
            for _, rows, tokens in cut(documents, tokenizer, max_length=max_length):
                self.documents, self.tokens = self.documents + 1, self.tokens + tokens
                for row in rows:
                    data = json.dumps(row).encode()
                    self._file.write(data)
                    self._ends.append(self._ends[-1] + len(data))
                stage.advance(len(rows))
        if not len(self):
            raise DataError(f"none of the {self.documents} documents has a passage of at least {LEAST_TOKENS} tokens")
        self._file.flush()

    @property
    def nbytes(self) -> int:
        """Of all rows, as JSON."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        start, end = self._ends[i], self._ends[i + 1]
        # At a place of its own, so that several processes or threads may read.
        data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise StoreError("temporary passages ended early: did something change the disk?")
        return dict(json.loads(data))


def described(payload: Any) -> tuple[str | None, str | None]:
    """(text, source) of what an index keeps of an example: a passage, a string, or any other value as JSON."""
    if payload is None or isinstance(payload, str):
        return payload, None
    source = payload.get("source") if isinstance(payload, dict) else None
    text = payload["text"] if is_text(payload) else json.dumps(payload, ensure_ascii=False, indent=1)
    return text, None if source is None else str(source)


def is_text(payload: Any) -> bool:
    """Whether a payload is a passage."""
    return isinstance(payload, dict) and isinstance(payload.get("text"), str)

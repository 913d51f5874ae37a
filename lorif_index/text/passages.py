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
from bisect import bisect_right
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


def cut(
    documents: Iterable[Document], tokenizer: Any, *, max_length: int, stride: int | None = None
) -> Iterator[tuple[Document, list[Row], int]]:
    """Each document with its passages, windows of at most `max_length` tokens, one every `stride` tokens, and how many
    tokens these have together.

    A document is tokenised whole, with the special tokens its tokenizer adds, and then cut. A window of fewer than two
    tokens has no loss and is left out, so that an empty document has no passages.

    Args:
        documents: in order.
        tokenizer: of transformers. One without offsets ("slow") gives passages as it decodes them.
        max_length: tokens, at least 2.
        stride: tokens from the beginning of a window to that of the next, 1 .. max_length; default max_length, no
            overlap.

    Raises:
        ConfigError: max_length or stride out of range.
    """
    stride = max_length if stride is None else stride
    if max_length < LEAST_TOKENS:
        raise ConfigError(f"max_length must be at least {LEAST_TOKENS} tokens, got {max_length}")
    if not 1 <= stride <= max_length:
        raise ConfigError(f"stride must be from 1 to max_length={max_length}, so that no token is lost, got {stride}")
    offsets = bool(tokenizer.is_fast)
    waiting = iter(documents)
    while group := list(islice(waiting, _AT_ONCE)):
        texts = [document.text for document in group]
        encoded = tokenizer(texts, return_offsets_mapping=offsets, return_attention_mask=False, verbose=False)
        for at, document in enumerate(group):
            spans = encoded["offset_mapping"][at] if offsets else None
            pieces = list(_windows(document, encoded["input_ids"][at], spans, tokenizer, max_length, stride))
            yield document, _rows(pieces, tokenizer), sum(len(ids) for *_, ids in pieces)


def _windows(
    document: Document,
    ids: list[int],
    spans: list[tuple[int, int]] | None,
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> Iterator[tuple[str, str, list[int]]]:
    """(source, text, tokens) of each window."""
    starts = [s for s in range(0, len(ids), stride) if s == 0 or s + max_length - stride < len(ids)]
    starts = [s for s in starts if len(ids[s : s + max_length]) >= LEAST_TOKENS]
    newlines = [i for i, char in enumerate(document.text) if char == "\n"] if document.lined else []
    for number, start in enumerate(starts, start=1):
        part = ids[start : start + max_length]
        source = document.source
        if spans is None:
            text, first, last = tokenizer.decode(part, skip_special_tokens=True), 0, 0
        else:
            # Special tokens stand for no characters, and have the empty span.
            real = [span for span in spans[start : start + max_length] if span[1] > span[0]]
            first, last = (real[0][0], real[-1][1]) if real else (0, 0)
            text = document.text[first:last]
        if document.lined and spans is not None:
            source += f":{_line(newlines, first)}-{_line(newlines, max(first, last - 1))}"
        elif len(starts) > 1:
            source += f", part {number} of {len(starts)}"
        yield source, text, part


def _line(newlines: list[int], position: int) -> int:
    """The number of the line, from 1, that a character is in; a newline belongs to the line it ends."""
    return bisect_right(newlines, position - 1) + 1


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
        tokenizer, max_length, stride: as for `cut`.
        folder: an existing folder on the disk that is to hold them; default: where temporary files go.
        progress: as for `Index.build`.

    Attributes:
        documents, empty: how many there were, and how many of them have no passage.
        running, running_passages: how many of them are files of running text (.txt), and the passages of those.
        tokens: in all.
        max_length, stride: in tokens: the longest passage, and from one passage of a document to the next.

    Raises:
        DataError: no passage, or as the documents raise. ConfigError: as `cut`.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Any,
        *,
        max_length: int,
        stride: int | None = None,
        folder: Path | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        self.max_length, self.stride = max_length, max_length if stride is None else stride
        self.documents = self.empty = self.running = self.running_passages = self.tokens = 0
        self._ends = array("q", [0])
        self._file = tempfile.TemporaryFile(prefix=".passages-", dir=folder)  # noqa: SIM115 - closed by the next line
        weakref.finalize(self, self._file.close)
        with reporter(progress) as report, report.stage("tokenise") as stage:
            for document, rows, tokens in cut(documents, tokenizer, max_length=max_length, stride=stride):
                self._append(document, rows, tokens)
                stage.advance(len(rows))
        if not len(self):
            raise DataError(f"none of the {self.documents} documents has a passage of at least {LEAST_TOKENS} tokens")
        self._file.flush()

    def _append(self, document: Document, rows: list[Row], tokens: int) -> None:
        self.documents += 1
        self.empty += not rows
        self.running += document.lined
        self.running_passages += len(rows) if document.lined else 0
        self.tokens += tokens
        for row in rows:
            data = json.dumps(row).encode()
            self._file.write(data)
            self._ends.append(self._ends[-1] + len(data))

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

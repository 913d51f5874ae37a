"""Texts: files of text as passages with a source, cut into windows of tokens, and kept beside the index.

read_documents   a .txt or .jsonl file, a folder of them, or a saved `datasets` folder -> documents with a source
cut              documents -> passages, each the text of one window of tokens
unlike           passages whose text alone would give other tokens
token_strings    tokens -> the text that each adds
TokenWindows     the windows, as a map-style dataset
PassageSpool     the passages on their way to be payloads, so that hits can be shown
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash

from ..errors import ConfigError, CorruptionError, DataError, StoreError

PASSAGES = "passages.jsonl"
LEAST_TOKENS = 2
"""A window of fewer tokens has no next token to predict, so no loss."""

_AT_ONCE = 256
# Tokens that are decoded with the next one, so that it looks as it does among others.
_BEFORE = 4


@dataclass(frozen=True)
class Document:
    """A text as it was found.

    Attributes:
        text: all of it.
        source: where it is from: a file, a line of a file, or what the source field says.
        lined: whether its parts are named by their lines.
    """

    text: str
    source: str
    lined: bool = False


@dataclass(frozen=True)
class Passage:
    """One example of an index: the text of one window of tokens, and where it is from."""

    text: str
    source: str


# -- reading -----------------------------------------------------------------------------------------------------


def read_documents(path: Path, *, text_field: str = "text", source_field: str | None = None) -> Iterator[Document]:
    """Documents of a .txt file (one), a .jsonl file (one a line), a folder of such files, or a saved `datasets` folder.

    Args:
        path: the file or folder; files in a folder, and in folders in it, are taken in the order of their names.
        text_field: the field or column that holds the text, in .jsonl and datasets.
        source_field: the field or column that says where it is from; default: file and line, or the row's number.

    Raises:
        DataError: nothing there, of another kind, not UTF-8, not JSON, or without the field; the message names the
            file and line.
    """
    fields = _Fields(text_field, source_field)
    if path.is_dir():
        yield from _read_folder(path, fields)
    elif not path.exists():
        raise DataError(f"{path} does not exist: pass a .txt or .jsonl file, a folder of them, or a saved dataset")
    elif path.suffix in _READERS:
        yield from _READERS[path.suffix](path, path.name, fields)
    else:
        raise DataError(f"{path} ends neither in .txt nor in .jsonl: rename it, or convert it")


@dataclass(frozen=True)
class _Fields:
    text: str
    source: str | None

    def document(self, row: Any, place: str) -> Document:
        """The document that a row holds."""
        if not isinstance(row, dict):
            raise DataError(f"{place} is no JSON object, but of type {type(row).__name__}")
        text, source = self._value(row, self.text, place), place
        if not isinstance(text, str):
            raise DataError(f"{place}: field {self.text!r} holds {type(text).__name__}, not text")
        if self.source is not None:
            source = str(self._value(row, self.source, place))
        return Document(text, source)

    def _value(self, row: dict[str, Any], field: str, place: str) -> Any:
        if field not in row:
            raise DataError(f"{place} has no field {field!r}, only {sorted(map(str, row))}: name the right one")
        return row[field]


def _read_folder(path: Path, fields: _Fields) -> Iterator[Document]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        raise DataError(f"{path} holds several datasets, {splits}: pass the folder of one of them")
    if (path / "state.json").is_file():
        yield from _saved_dataset(path, fields)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS and p.is_file())
    if not files:
        raise DataError(f"{path} has no .txt or .jsonl file in it, and is no saved dataset")
    for file in files:
        yield from _READERS[file.suffix](file, file.relative_to(path).as_posix(), fields)


def _text_file(path: Path, name: str, fields: _Fields) -> Iterator[Document]:
    try:
        yield Document(path.read_text(encoding="utf-8-sig"), name, lined=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): convert it") from None


def _jsonl_file(path: Path, name: str, fields: _Fields) -> Iterator[Document]:
    # In bytes: a record ends at a newline, not at the other marks that Python counts as ends of lines.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON ({error})") from None
            yield fields.document(row, place)


def _saved_dataset(path: Path, fields: _Fields) -> Iterator[Document]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes the package raise
        raise DataError(f"{path} cannot be read as a saved dataset: {error}") from error
    for number, row in enumerate(dataset):
        yield fields.document(row, f"row {number}")


_READERS = {".txt": _text_file, ".jsonl": _jsonl_file}


# -- cutting -----------------------------------------------------------------------------------------------------


def cut(
    documents: Iterable[Document], tokenizer: Any, *, max_length: int, stride: int | None = None
) -> Iterator[list[tuple[Passage, list[int]]]]:
    """Each document's passages and their tokens: windows of at most `max_length` tokens, one every `stride` tokens.

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
            yield _windows(document, encoded["input_ids"][at], spans, tokenizer, max_length, stride)


def _windows(
    document: Document,
    ids: list[int],
    spans: list[tuple[int, int]] | None,
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> list[tuple[Passage, list[int]]]:
    pieces = []
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
        pieces.append((Passage(text, source), part))
    return pieces


def _line(newlines: list[int], position: int) -> int:
    """The number of the line, from 1, that a character is in; a newline belongs to the line it ends."""
    return bisect_right(newlines, position - 1) + 1


def unlike(pieces: list[tuple[Passage, list[int]]], tokenizer: Any) -> list[bool]:
    """Of each passage, whether its text, tokenised by itself, gives other tokens than it has: a window in the middle of
    a document may lack special tokens, or begin where no word does."""
    if not pieces:
        return []
    again = tokenizer([passage.text for passage, _ in pieces], return_attention_mask=False, verbose=False)["input_ids"]
    return [list(found) != ids for (_, ids), found in zip(pieces, again, strict=True)]


def token_strings(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text, so that they join to it; a token that ends within a character adds nothing, and
    the one that completes it all of it.

    Args:
        ids: of the tokens.
        tokenizer: of transformers.
    """
    strings, begun = [], 0
    for end in range(1, len(ids) + 1):
        # A few tokens before, for tokenizers whose spaces depend on what precedes.
        start = max(begun - _BEFORE, 0)
        before, whole = (tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for stop in (begun, end))
        if whole.endswith("\ufffd") and end < len(ids):
            strings.append("")
            continue
        strings.append(whole[len(before) :])
        begun = end
    return strings


class TokenWindows:
    """Windows of tokens as a map-style dataset: {"input_ids", "attention_mask"}, each (length,) int64, unpadded.

    Held as one flat array, four bytes a token.
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends = array("q", [0])

    def append(self, ids: Iterable[int]) -> None:
        self._tokens.extend(ids)
        self._ends.append(len(self._tokens))

    @property
    def tokens(self) -> int:
        """How many in all."""
        return len(self._tokens)

    def length(self, i: int) -> int:
        """Tokens of one window."""
        return self._ends[i + 1] - self._ends[i]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        ids = torch.from_numpy(np.array(self._tokens[self._ends[i] : self._ends[i + 1]], dtype=np.int64))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- keeping -----------------------------------------------------------------------------------------------------


class PassageSpool:
    """Passages kept in a temporary file until the index has them: a sequence of payloads {"source", "text"}, with
    "tokens" where those of the text would be others.

    A context manager: the file is removed at the end.

    Args:
        folder: an existing folder on the disk that is to hold it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(prefix=".passages-", dir=folder)  # noqa: SIM115 - closed by __exit__
        self._ends = array("q", [0])
        self._flushed = True

    def append(self, passage: Passage, tokens: list[int] | None = None) -> None:
        payload: dict[str, Any] = {"source": passage.source, "text": passage.text}
        data = json.dumps(payload if tokens is None else payload | {"tokens": tokens}).encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._flushed = False

    @property
    def nbytes(self) -> int:
        """Of all payloads."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        start, end = self._ends[i], self._ends[i + 1]
        data, at = bytearray(end - start), 0
        while at < len(data):
            got = os.preadv(self._file.fileno(), [memoryview(data)[at:]], start + at)
            if not got:
                raise StoreError("temporary passages ended early: did something change the disk?")
            at += got
        return dict(json.loads(data))

    def __enter__(self) -> PassageSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_passages(folder: Path, known: dict[str, Any], ids: Iterable[int]) -> dict[int, Passage]:
    """The passages of some ids, from the file beside an index of format version 4 or older; later ones are payloads.

    Args:
        folder: the index.
        known: the file's `count` and `digest` (XXH3-128, in hex).
        ids: of examples.

    Raises:
        StoreError: the file is gone. CorruptionError: it is not as it was written.
    """
    path, wanted = folder / PASSAGES, set(ids)
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{path} is missing, so hits cannot be shown: restore it from a copy, or build again")
    digest, found, count = xxhash.xxh3_128(), {}, 0
    with path.open("rb") as file:
        for count, line in enumerate(file, start=1):
            digest.update(line)
            if count - 1 in wanted:
                found[count - 1] = line
    if digest.hexdigest() != known.get("digest") or count != known.get("count"):
        raise CorruptionError(
            f"{path} has {count} passages with digest {digest.hexdigest()}, where {known.get('count')} with "
            f"{known.get('digest')} were written: restore it from a copy, or build again"
        )
    return {i: Passage(**json.loads(line)) for i, line in found.items()}

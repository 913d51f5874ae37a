"""Tokenised: data sets and questions of text as data sets of examples, tokenised as they are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import xxhash
from torch import nn
from torch.utils.data import DataLoader

from ..capture.ensemble import members_of
from ..capture.losses import restarts
from ..config import CurvatureRows
from ..errors import DataError, FingerprintError, QueryError
from .chat import is_chat
from .documents import UnpackedDocuments
from .encoding import KINDS, LABELS, Encoded, Encoder, Needs, has_foreign_columns, kind_of

_AT_ONCE = 256


@dataclass
class _Faults:
    """What is wrong with examples, for one message."""

    too_long: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    longest: int = 0

    def note(self, encoder: Encoder, item: Encoded, i: int, strict: bool) -> None:
        if encoder.too_long_by(item):
            self.too_long.append(i)
            self.longest = max(self.longest, len(item["input_ids"]))
            item = encoder.cut(item) if encoder.too_long == "truncate" else item
        if not item["input_ids"] or (strict and not encoder.has_loss(item)):
            self.silent.append(i)

    def refuse(self, encoder: Encoder, count: int) -> None:
        """Raises DataError where something is wrong that was not allowed."""
        if self.too_long and encoder.too_long == "refuse":
            raise DataError(
                f"{len(self.too_long)} of {count} examples have more than {encoder.max_length} tokens, which is what "
                f"the model takes (the longest {self.longest}; the first is example {self.too_long[0]}): shorten them, "
                "or pass data=TokenisedData(data, tokenizer, model=model, too_long='truncate')"
            )
        if self.silent:
            wanted = f"label (a column {' or '.join(map(repr, LABELS[:2]))})" if encoder.needs.labelled else "token"
            raise DataError(
                f"{len(self.silent)} of {count} examples have no {wanted} that has a loss (the first is example "
                f"{self.silent[0]}): leave them out, as with dataset.filter"
            )


class TokenisedData:
    """A data set for `Index.build`, of rows that are tokenised as they are read: nothing of it is kept in memory.

    Rows are strings, or dicts; of their columns the first of these is taken that is there:

    - `input_ids`, with `attention_mask`, `token_type_ids`, `position_ids`, and `labels` (or `assistant_masks`,
      `completion_mask`) where there are some;
    - `messages`: a chat; what the assistant says has a loss;
    - `prompt` and `completion`, texts or chats; the completion has a loss;
    - `text`.

    A sequence classifier's `labels` or `label` is an integer or a label's name. Of a text, a masked language model gets
    15% of the tokens hidden, the same ones whenever the text comes. Whatever its tokenizer does, rows are filled up on
    the right.

    Args:
        data: a map-style dataset (a Hugging Face Dataset, a list); `data[i]` must be the same each time.
        tokenizer: of transformers; not needed for input_ids.
        model: what it is for: says what is padding, how much it takes, and what has a loss. Without it, a causal
            language model.
        max_length: tokens of an example at most; default: what model and tokenizer say.
        too_long: "refuse" raises for data with longer examples; "truncate" cuts them, with a warning.

    All rows are read once here, to find what cannot be used.

    Attributes:
        truncated: numbers of the examples that are cut.

    Raises:
        DataError: no known columns; examples too long, without a loss, or with labels that the model does not have.
        ConfigError: settings.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any = None,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        max_length: int | None = None,
        too_long: str = "refuse",
        strict: bool = True,
    ) -> None:
        if not len(data):
            raise DataError("the data holds no examples")
        if isinstance(model, (list, tuple)):
            model = model[0]
        needs = Needs.of(model, tokenizer)  # type: ignore[arg-type]
        self._encoder = _encoder(data[0], tokenizer, needs, max_length, too_long)
        narrow = getattr(data, "select_columns", None)
        there = getattr(data, "column_names", None)
        if callable(narrow) and isinstance(there, list):
            data = narrow([name for name in self._encoder.columns if name in there])
        self._data = data
        faults = _Faults()
        for start in range(0, len(data), _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, len(data)))
            for i, item in zip(part, self._encoded(part), strict=True):
                faults.note(self._encoder, item, i, strict)
        faults.refuse(self._encoder, len(data))
        self.truncated: tuple[int, ...] = tuple(faults.too_long)
        if self.truncated:
            warnings.warn(
                f"{len(self.truncated)} of {len(data)} examples are cut to {self._encoder.max_length} tokens",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Encoded:
        return self.__getitems__([i])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Encoded]:
        return [self._encoder.cut(item) for item in self._encoded(ids)]

    def _encoded(self, ids: Sequence[int]) -> list[Encoded]:
        fetch = getattr(self._data, "__getitems__", None)
        rows = fetch(list(ids)) if fetch is not None else [self._data[int(i)] for i in ids]
        return self._encoder.encode([_as_row(row) for row in rows], ids)

    def collate_examples(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of items, filled up."""
        return self._encoder.collate(items)


class TokenisedStream:
    """The same of a data set that can only be walked; problems are found on the way. Arguments: see `TokenisedData`."""

    def __init__(self, stream: Iterable[Any], tokenizer: Any, model: nn.Module | None) -> None:
        self._stream = stream
        first = next(iter(stream), None)
        if first is None:
            raise DataError("the data holds no examples")
        self._encoder = _encoder(first, tokenizer, Needs.of(model, tokenizer), None, "refuse")

    def __iter__(self) -> Iterator[Encoded]:
        rows, at = iter(self._stream), 0
        while part := [_as_row(row) for row in islice(rows, _AT_ONCE)]:
            items = self._encoder.encode(part, range(at, at + len(part)))
            faults = _Faults()
            for number, item in enumerate(items):
                faults.note(self._encoder, item, at + number, True)
            at += len(part)
            faults.refuse(self._encoder, at)
            yield from items

    def collate_examples(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of items, filled up."""
        return self._encoder.collate(items)


def _as_row(row: Any) -> Any:
    return {"text": row} if isinstance(row, str) else row


def _encoder(first: Any, tokenizer: Any, needs: Needs, max_length: int | None, too_long: str) -> Encoder:
    row = _as_row(first)
    kind = kind_of(row, needs) if isinstance(row, Mapping) else None
    if kind is None:
        got = sorted(map(str, row)) if isinstance(row, Mapping) else type(first).__name__
        known = "; ".join(" and ".join(columns) for columns in KINDS.values())
        raise DataError(
            f"the data has none of the columns that are known ({known}; of a sequence classifier or masked language "
            f"model only text or input_ids), but {got}: rename one, as with dataset.rename_column"
        )
    return Encoder(kind, row, tokenizer, needs, max_length, too_long)


def is_ready(data: Any) -> bool:
    """Whether data say of themselves, by an attribute `ready`, that their items are a model's inputs already: they are
    not looked at."""
    return getattr(data, "ready", None) is True


def prepared(data: Any, model: nn.Module | None, tokenizer: Any, *, strict: bool = True) -> Any:
    """Data as `capture` takes it: texts, chats and packed rows become examples; all else is handed back as it is.

    Args:
        data: what was passed as `data=`.
        model: what it is for; an ensemble's first member stands for all.
        tokenizer: of transformers, or None.
        strict: refuse examples without a loss.

    Raises:
        DataError: text without a tokenizer; or as `TokenisedData`.
    """
    ready = isinstance(data, (TokenisedData, TokenisedStream, DataLoader, torch.Tensor)) or is_ready(data)
    if data is None or not isinstance(model, nn.Module) or ready:
        return data
    member = members_of(model)[0]
    if isinstance(data, str):
        raise DataError("data is one string: pass a list of strings, one an example")
    if isinstance(data, UnpackedDocuments):
        return TokenisedData(data, tokenizer, model=member, strict=strict)
    if isinstance(data, Mapping):
        if "input_ids" in data and _is_packed_batch(data):
            return TokenisedData(UnpackedDocuments(dict(data)), tokenizer, model=member, strict=strict)
        return data
    streaming = not hasattr(data, "__len__")
    if streaming and (not isinstance(data, Iterable) or iter(data) is data):
        return data
    if not streaming and (not hasattr(data, "__getitem__") or not len(data)):
        return data
    first = next(iter(data), None) if streaming else data[0]
    row = _as_row(first)
    if not isinstance(row, Mapping):
        return data
    needs, ours = Needs.of(member, tokenizer), hasattr(member, "config")
    kind = kind_of(row, needs)
    if kind == "tokens":
        positions = "position_ids" in row and not needs.labelled and not has_foreign_columns(row, member)
        if not streaming and ("document_ids" in row or positions):
            return TokenisedData(UnpackedDocuments(data), tokenizer, model=member, strict=strict)
        ours = ours and not has_foreign_columns(row, member) and not _has_decoder(member)
        ours = ours and (needs.labelled or tokenizer is not None or hasattr(data, "column_names"))
    elif kind is None:
        ours = tokenizer is not None and any(isinstance(value, str) for value in row.values()) and not _numbers(row)
    elif tokenizer is None:
        # Text beside columns of numbers is left out, as ever.
        ours = not _numbers(row)
    if not ours:
        return data
    if streaming:
        return TokenisedStream(data, tokenizer, member)
    return TokenisedData(data, tokenizer, model=member, strict=strict)


def _has_decoder(model: nn.Module) -> bool:
    """Whether labels are a second text, beside the input."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_packed_batch(batch: Mapping[str, Any]) -> bool:
    """Whether a batch of tensors (n, T) has borders of documents in its rows."""
    ids, positions, mask = batch.get("input_ids"), batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return False
    if "document_ids" in batch:
        return True
    if not isinstance(positions, torch.Tensor) or positions.shape != ids.shape:
        return False
    shown = mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else positions >= 0
    return bool(restarts(positions, shown).any())


def _numbers(row: Mapping[str, Any]) -> bool:
    return any(isinstance(value, (list, torch.Tensor)) and not is_chat(value) for value in row.values())


def prepared_rows(curvature: Any, model: nn.Module | None, tokenizer: Any) -> Any:
    """The same for what was passed as `curvature=`."""
    if isinstance(curvature, CurvatureRows):
        return CurvatureRows(prepared(curvature.rows, model, tokenizer), curvature.rows_per_example)
    return curvature if isinstance(curvature, str) else prepared(curvature, model, tokenizer)


def prepared_query(query: Any, model: nn.Module | None, tokenizer: Any, *, strict: bool = True) -> Any:
    """A question as data: a string, strings, a chat, chats, rows or columns of them; all else is handed back as it is.

    Args:
        query: what was passed to `search`.
        model, tokenizer: as for `prepared`.
        strict: refuse questions without a loss (another measure may do without).

    Raises:
        QueryError: text without a tokenizer; or what `prepared` raises.
    """
    if isinstance(query, str):
        query = [query]
    elif is_chat(query):
        query = [{"messages": query}]
    elif isinstance(query, (list, tuple)) and query and all(is_chat(item) for item in query):
        query = [{"messages": item} for item in query]
    elif isinstance(query, Mapping):
        query = _rows(query)
    if tokenizer is None and isinstance(query, (list, tuple)) and query and isinstance(_as_row(query[0]), Mapping):
        row = _as_row(query[0])
        if "input_ids" not in row and any(all(name in row for name in columns) for columns in KINDS.values()):
            raise QueryError(
                "the query is text, and the index knows no tokenizer: Index.open(path, model=..., tokenizer=...)"
            )
    try:
        return prepared(query, model, tokenizer, strict=strict)
    except DataError as error:
        raise QueryError(f"query: {error}") from error


def _rows(query: Mapping[str, Any]) -> Any:
    """One row, or a slice of columns, as a list of rows; batches of tensors stay."""
    for kind, columns in KINDS.items():
        if not all(name in query for name in columns):
            continue
        value = query[columns[0]]
        if isinstance(value, torch.Tensor):
            return query
        several = isinstance(value, (list, tuple)) and bool(value) and not is_chat(value)
        if kind == "tokens":
            several = several and isinstance(value[0], (list, tuple, torch.Tensor))
        if not several:
            return [dict(query)]
        return [{name: column[i] for name, column in query.items()} for i in range(len(value))]
    return query


TOKENIZER = "tokenizer"
"""The key of an index's metadata under which its tokenizer is remembered."""


def tokenizer_digest(tokenizer: Any) -> dict[str, str] | None:
    """What an index remembers of its tokenizer: class, and XXH3-128, in hex, of its vocabulary and chat template."""
    if tokenizer is None:
        return None
    digest = xxhash.xxh3_128()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{number}|{token}\n".encode(errors="surrogatepass"))
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode(errors="surrogatepass"))
    return {"class": type(tokenizer).__name__, "digest": str(digest.hexdigest())}


def check_tokenizer(known: Any, tokenizer: Any, place: str) -> None:
    """Compares a tokenizer with what an index remembers of its own, if it does.

    Raises:
        FingerprintError: it is another one.
    """
    given = tokenizer_digest(tokenizer)
    if given is not None and isinstance(known, Mapping) and known.get("digest") != given["digest"]:
        raise FingerprintError(
            f"{place} was built with tokenizer {dict(known)}, and {given} was given (vocabulary or chat template): "
            "pass the one that it was built with"
        )

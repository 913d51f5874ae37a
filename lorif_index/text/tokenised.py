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
from .encoding import KINDS, LABELS, Encoded, Encoder, Needs, has_foreign_columns, kind_of
from .packed import UnpackedDocuments

_AT_ONCE = 256


@dataclass
class _Faults:
    """What is wrong with examples, for one message."""

    too_long: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    longest: int = 0

    def note(self, encoder: Encoder, found: list[tuple[Encoded, int]], ids: range, strict: bool) -> None:
        for i, (item, length) in zip(ids, found, strict=True):
            if encoder.max_length is not None and length > encoder.max_length:
                self.too_long.append(i)
                self.longest = max(self.longest, length)
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
                f"{self.silent[0]}): leave them out, as with dataset.filter, or write more"
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
        strict: refuse examples without a loss.
        check: read all rows once here, to find what cannot be used; False for rows that are known to be fit.

    Attributes:
        truncated: numbers of the examples that are cut, as far as they were looked for.

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
        check: bool = True,
    ) -> None:
        if not len(data):
            raise DataError("the data holds no examples")
        if isinstance(model, (list, tuple)):
            model = model[0]
        needs = Needs.of(model, tokenizer)  # type: ignore[arg-type]
        self._encoder, self._strict = Encoder(tokenizer, needs, max_length, too_long), strict
        narrow, there = getattr(data, "select_columns", None), getattr(data, "column_names", None)
        if callable(narrow) and isinstance(there, list):
            data = narrow(self._encoder.columns(data[0]))
        self._data = data
        self.truncated: tuple[int, ...] = ()
        if check:
            self._look()

    def _look(self) -> None:
        faults, count = _Faults(), len(self)
        for start in range(0, count, _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, count))
            faults.note(self._encoder, self._encoder.encode(self._rows(part), part), part, self._strict)
        faults.refuse(self._encoder, count)
        self.truncated = tuple(faults.too_long)
        if self.truncated:
            warnings.warn(
                f"{len(self.truncated)} of {count} examples are cut to {self._encoder.max_length} tokens", stacklevel=3
            )

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Encoded:
        return self.__getitems__([i])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Encoded]:
        return [item for item, _ in self._encoder.encode(self._rows(ids), ids)]

    def _rows(self, ids: Sequence[int]) -> list[Any]:
        fetch = getattr(self._data, "__getitems__", None)
        return list(map(_as_row, fetch(list(ids)) if fetch is not None else (self._data[int(i)] for i in ids)))

    def collate_examples(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of items, filled up."""
        return self._encoder.collate(items)


class TokenisedStream:
    """The same of a data set that can only be walked; problems are found on the way. Arguments: see `TokenisedData`."""

    def __init__(self, stream: Iterable[Any], tokenizer: Any, model: nn.Module | None) -> None:
        self._stream, self._encoder = stream, Encoder(tokenizer, Needs.of(model, tokenizer))
        self.collate_examples = self._encoder.collate

    def __iter__(self) -> Iterator[Encoded]:
        rows, at = map(_as_row, self._stream), 0
        while part := list(islice(rows, _AT_ONCE)):
            ids, faults = range(at, at + len(part)), _Faults()
            found = self._encoder.encode(part, ids)
            faults.note(self._encoder, found, ids, True)
            at += len(part)
            faults.refuse(self._encoder, at)
            yield from (item for item, _ in found)


def _as_row(row: Any) -> Any:
    return {"text": row} if isinstance(row, str) else row


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
    done = isinstance(data, (TokenisedData, TokenisedStream, DataLoader, torch.Tensor))
    if data is None or not isinstance(model, nn.Module) or done:
        return data
    if isinstance(data, str):
        raise DataError("data is one string: pass a list of strings, one an example")
    member = members_of(model)[0]
    if isinstance(data, Mapping):
        if not _is_packed_batch(data):
            return data
        data = UnpackedDocuments(dict(data))
    if isinstance(data, UnpackedDocuments):
        return TokenisedData(data, tokenizer, model=member, strict=strict)
    streaming = not hasattr(data, "__len__")
    if (not isinstance(data, Iterable) or iter(data) is data) if streaming else not _has_rows(data):
        return data
    row = _as_row(next(iter(data), None) if streaming else data[0])
    if not isinstance(row, Mapping):
        return data
    needs = Needs.of(member, tokenizer)
    if not streaming and _is_packed(row, needs, member):
        data = UnpackedDocuments(data)
    elif not _is_ours(data, row, needs, member, tokenizer):
        return data
    if streaming:
        return TokenisedStream(data, tokenizer, member)
    return TokenisedData(data, tokenizer, model=member, strict=strict)


def _has_rows(data: Any) -> bool:
    return hasattr(data, "__getitem__") and len(data) > 0


def _is_packed(row: Mapping[str, Any], needs: Needs, model: nn.Module) -> bool:
    """Whether rows of tokens have several documents in them, or positions that may say so."""
    if "input_ids" not in row:
        return False
    positions = "position_ids" in row and not needs.labelled and not has_foreign_columns(row, model)
    return "document_ids" in row or positions


def _is_ours(data: Any, row: Mapping[str, Any], needs: Needs, model: nn.Module, tokenizer: Any) -> bool:
    """Whether rows are to be tokenised here, or filled up as a model of transformers wants them."""
    kind = kind_of(row, needs)
    if kind == "tokens":
        # Labels of a model with a decoder are a second text.
        decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        known = hasattr(model, "config") and not has_foreign_columns(row, model) and not decoder
        return known and (needs.labelled or tokenizer is not None or hasattr(data, "column_names"))
    if kind is None and (tokenizer is None or not any(isinstance(value, str) for value in row.values())):
        return False
    # Text beside columns of numbers is left out, as ever.
    return (kind is not None and tokenizer is not None) or not _numbers(row)


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

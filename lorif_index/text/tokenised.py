"""Tokenised: data sets and questions of text as data sets of examples, tokenised as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import xxhash
from torch import nn
from torch.utils.data import DataLoader

from ..capture.data import as_tensors
from ..capture.ensemble import members_of
from ..config import CurvatureRows
from ..errors import DataError, FingerprintError, QueryError
from .chat import is_chat
from .encoding import KINDS, LABELS, Encoded, Needs, RowTokeniser, has_foreign_columns, kind_of
from .packed import LENGTHS, UnpackedDocuments

_AT_ONCE = 256


class _Faults:
    """What is wrong with examples, for one message."""

    def __init__(self, encoder: RowTokeniser, strict: bool) -> None:
        self._encoder, self._strict = encoder, strict
        self._too_long, self._silent = dict[int, int](), list[int]()

    def note(self, items: Sequence[Encoded], ids: Iterable[int]) -> None:
        """Looks at examples with some numbers."""
        context = self._encoder.needs.context
        for i, item in zip(ids, items, strict=True):
            length = len(item["input_ids"])
            if context is not None and length > context:
                self._too_long[i] = length
            if not length or (self._strict and not self._encoder.has_loss(item)):
                self._silent.append(i)

    def refuse(self, count: int) -> None:
        """Raises DataError where one of `count` examples cannot be used."""
        if self._too_long:
            raise DataError(
                f"{len(self._too_long)} of {count} examples have more than {self._encoder.needs.context} tokens, which "
                f"is what the model takes (the longest {max(self._too_long.values())}; the first is example "
                f"{min(self._too_long)}): shorten them, or pass data=TokenisedData(data, tokenizer, model=model, "
                "max_length=...), which cuts them"
            )
        if self._silent:
            labelled = self._encoder.needs.labelled
            wanted = f"label (a column {' or '.join(map(repr, LABELS[:2]))})" if labelled else "token"
            raise DataError(
                f"{len(self._silent)} of {count} examples have no {wanted} that has a loss (the first is example "
                f"{self._silent[0]}): leave them out, as with dataset.filter, or write more"
            )


class TokenisedData:
    """A data set for `Index.build`, of rows that are tokenised as they are read: nothing of it is kept in memory.

    Rows are strings, or dicts; of their columns the first of these is taken that is there:

    - `input_ids`, with `attention_mask`, `token_type_ids`, `position_ids`, and `labels` (or `assistant_masks`,
      `completion_mask`) where there are some;
    - `messages`: a chat; what the assistant says has a loss;
    - `prompt` and `completion`, texts or chats; the completion has a loss;
    - `text`.

    A sequence classifier's `labels` or `label` is an integer. Of a text, a masked language model gets 15% of the tokens
    hidden, the same ones whenever the text comes. Whatever its tokenizer does, rows are filled up on the right.

    Args:
        data: a map-style dataset (a Hugging Face Dataset, a list); `data[i]` must be the same each time.
        tokenizer: of transformers; not needed for input_ids.
        model: what it is for: says what is padding, how much it takes, and what has a loss. Without it, a causal
            language model.
        max_length: tokens that examples are cut to; by default, those that are too long for the model are refused.
        strict: refuse examples without a loss.
        check: read all rows once here, to find what cannot be used; False for rows that are known to be fit.

    Raises:
        DataError: no known columns; examples too long, or without a loss. ConfigError: max_length beyond the model's
        context.
    """

    def __init__(
        self,
        data: Any,
        tokenizer: Any = None,
        *,
        model: nn.Module | None = None,
        max_length: int | None = None,
        strict: bool = True,
        check: bool = True,
    ) -> None:
        if not len(data):
            raise DataError("the data holds no examples")
        self._encoder = RowTokeniser(tokenizer, Needs.of(model, tokenizer), max_length)
        narrow, there = getattr(data, "select_columns", None), getattr(data, "column_names", None)
        if callable(narrow) and isinstance(there, list):
            data = narrow(self._encoder.columns(data[0]))
        self._data = data
        if check:
            faults = _Faults(self._encoder, strict)
            for start in range(0, len(self), _AT_ONCE):
                part = range(start, min(start + _AT_ONCE, len(self)))
                faults.note(self.__getitems__(part), part)
            faults.refuse(len(self))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Encoded:
        return self.__getitems__([i])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Encoded]:
        fetch = getattr(self._data, "__getitems__", None)
        rows = fetch(list(ids)) if fetch is not None else [self._data[int(i)] for i in ids]
        return self._encoder.encode([_as_row(row) for row in rows], ids)

    def collate_examples(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of items, filled up."""
        return self._encoder.collate(items)


class TokenisedStream:
    """The same of a data set that can only be walked; problems are found on the way. Arguments: see `TokenisedData`."""

    def __init__(self, stream: Iterable[Any], tokenizer: Any, model: nn.Module | None) -> None:
        self._stream, self._encoder = stream, RowTokeniser(tokenizer, Needs.of(model, tokenizer))
        self.collate_examples = self._encoder.collate

    def __iter__(self) -> Iterator[Encoded]:
        rows, at = map(_as_row, self._stream), 0
        while part := list(islice(rows, _AT_ONCE)):
            ids, faults = range(at, at + len(part)), _Faults(self._encoder, True)
            found = self._encoder.encode(part, ids)
            faults.note(found, ids)
            at += len(part)
            faults.refuse(at)
            yield from found


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
    done = data is None or isinstance(data, (TokenisedData, TokenisedStream, DataLoader, torch.Tensor, Mapping))
    if done or not isinstance(model, nn.Module):
        return data
    if isinstance(data, str):
        raise DataError("data is one string: pass a list of strings, one an example")
    member = members_of(model)[0]
    streaming = not hasattr(data, "__len__")
    if streaming:
        if not isinstance(data, Iterable) or iter(data) is data:
            return data
        row = _as_row(next(iter(data), None))
    else:
        if not hasattr(data, "__getitem__") or not len(data):
            return data
        row = _as_row(data[0])
    if not isinstance(row, Mapping):
        return data
    needs = Needs.of(member, tokenizer)
    packed = isinstance(data, UnpackedDocuments)
    if not (streaming or packed) and _is_packed(row, needs, member):
        data, packed = UnpackedDocuments(data), True
    if not (packed or _is_ours(data, row, needs, member, tokenizer)):
        return data
    if streaming:
        return TokenisedStream(data, tokenizer, member)
    return TokenisedData(data, tokenizer, model=member, strict=strict)


def _is_packed(row: Mapping[str, Any], needs: Needs, model: nn.Module) -> bool:
    """Whether rows of tokens have several documents in them, or positions that may say so."""
    if "input_ids" not in row:
        return False
    positions = "position_ids" in row and not needs.labelled and not has_foreign_columns(row, model)
    return "document_ids" in row or LENGTHS in row or positions


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
    numbers = any(isinstance(value, (list, torch.Tensor)) and not is_chat(value) for value in row.values())
    return (kind is not None and tokenizer is not None) or not numbers


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
    query = as_tensors(query)
    if isinstance(query, str) or is_chat(query):
        query = [query]
    elif isinstance(query, Mapping):
        first = [query[columns[0]] for columns in KINDS.values() if all(name in query for name in columns)][:1]
        if first and not isinstance(first[0], torch.Tensor):
            # A slice of a Hugging Face Dataset has columns of rows; else it is one row.
            columns = (
                isinstance(first[0], list) and first[0] != [] and isinstance(first[0][0], (list, str, torch.Tensor))
            )
            count = len(first[0]) if columns else 1
            query = [{k: v[i] for k, v in query.items()} if columns else dict(query) for i in range(count)]
    if isinstance(query, (list, tuple)) and query:
        query = [{"messages": item} if is_chat(item) else item for item in query]
        row = _as_row(query[0])
        text = isinstance(row, Mapping) and "input_ids" not in row
        if tokenizer is None and text and any(all(name in row for name in columns) for columns in KINDS.values()):
            raise QueryError(
                "the query is text, and the index knows no tokenizer: Index.open(path, model=..., tokenizer=...)"
            )
    try:
        return prepared(query, model, tokenizer, strict=strict)
    except DataError as error:
        raise QueryError(f"query: {error}") from error


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

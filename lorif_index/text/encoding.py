"""Encoding: rows of text, chat or tokens to what a model of transformers takes, and those to padded batches."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from ..capture.losses import IGNORE, base_model, offset_positions
from ..errors import ConfigError, DataError
from ..linalg.projection import keyed_generator
from .chat import chat_tokens, completion_tokens

KINDS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Forms of rows, the first that fits, and the columns that make them."""

LABELS = ("labels", "label", "label_ids")

_TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# Columns by which trainers say which tokens have a loss.
_MASKS = ("assistant_masks", "completion_mask")
# Of a text's tokens, hidden from a masked language model (Devlin et al., arXiv:1810.04805).
_HIDDEN_PERCENT = 15
_MASK_SEED = 0
_NO_LIMIT = 1 << 30

Encoded = dict[str, Any]
"""Columns of one example: lists of ints of one length, and of a classifier `labels`, an int."""


@dataclass(frozen=True)
class Needs:
    """What a model wants of its examples.

    Attributes:
        labelled: one label an example (a sequence classifier).
        masked: labels are of hidden tokens (a masked language model).
        shifted: labels are the next tokens; False also for other models that are neither.
        context: the longest input, in tokens; None where nothing says.
        pad: the token that fills rows up.
    """

    labelled: bool
    masked: bool
    shifted: bool
    context: int | None
    pad: int

    @classmethod
    def of(cls, model: nn.Module | None, tokenizer: Any) -> Needs:
        """From a model's class and config, and its tokenizer; without a model, a causal language model's."""
        inside = None if model is None else base_model(model)
        name, config = type(inside).__name__, getattr(inside, "config", None)
        labelled = "ForSequenceClassification" in name
        find = getattr(config, "get_text_config", None)
        inner = find() if callable(find) else config
        pad = getattr(inner, "pad_token_id", None)
        if labelled and pad is None:
            raise DataError(
                f"{name} finds the end of a text by its padding, and its config has no pad_token_id: set "
                "model.config.pad_token_id as it was trained"
            )
        if pad is None:
            pad = getattr(tokenizer, "pad_token_id", None)
        other = any(part in name for part in ("TokenClassification", "QuestionAnswering", "MultipleChoice"))
        other = other or bool(getattr(config, "is_encoder_decoder", False))
        return cls(
            labelled,
            "ForMaskedLM" in name,
            not labelled and "ForMaskedLM" not in name and not other,
            _context(inside, inner, tokenizer),
            0 if pad is None else int(pad),
        )


def _context(model: nn.Module | None, config: Any, tokenizer: Any) -> int | None:
    found = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    first = None if model is None else offset_positions(model)
    if first is not None and isinstance(found[1], int):
        found[1] -= first
    limits = [int(n) for n in found if isinstance(n, (int, float)) and 0 < n < _NO_LIMIT]
    return min(limits, default=None)


def has_foreign_columns(row: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether rows have inputs of the model that no `RowTokeniser` knows: pictures, boxes, a decoder's tokens."""
    named = inspect.signature(base_model(model).forward).parameters
    return bool(set(row) & set(named) - {*_TOKEN_COLUMNS, *LABELS})


def kind_of(columns: Collection[Any], needs: Needs) -> str | None:
    """Which of `KINDS` a row with such columns is; None: none of them."""
    for kind, wanted in KINDS.items():
        if all(name in columns for name in wanted) and (kind in ("tokens", "text") or needs.shifted):
            return kind
    return None


class RowTokeniser:
    """Rows to examples of a model; each row may be of another kind.

    Args:
        tokenizer: of transformers; None for rows of tokens.
        needs: of the model.
        max_length: tokens that examples are cut to; None: they are left as they are.

    Raises:
        ConfigError: max_length beyond the context.
    """

    def __init__(self, tokenizer: Any, needs: Needs, max_length: int | None = None) -> None:
        if max_length is not None and needs.context is not None and max_length > needs.context:
            raise ConfigError(
                f"max_length={max_length} is above the model's context of {needs.context} tokens: pass at most that"
            )
        self.needs, self._tokenizer, self._max_length = needs, tokenizer, max_length

    def kind(self, row: Any) -> str:
        """Which of `KINDS` a row is.

        Raises:
            DataError: none of them, one that needs a tokenizer where there is none, or not enough for the model.
        """
        kind, needs = kind_of(row, self.needs) if isinstance(row, Mapping) else None, self.needs
        if kind is None:
            got = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            known = "; ".join(" and ".join(columns) for columns in KINDS.values())
            raise DataError(
                f"the data has none of the columns that are known ({known}; of a sequence classifier or masked "
                f"language model only text or input_ids), but {got}: rename one, as with dataset.rename_column"
            )
        if kind != "tokens" and self._tokenizer is None:
            raise DataError(f"the data has {' and '.join(KINDS[kind])} to be tokenised: pass tokenizer=")
        if kind == "text" and not (needs.labelled or needs.masked or needs.shifted):
            raise DataError(
                "the model's labels are not to be had from text alone (a classifier of tokens, or an encoder-decoder): "
                "pass tokenised columns, labels among them"
            )
        return kind

    def columns(self, row: Mapping[str, Any]) -> list[str]:
        """What is looked at of a row like this one."""
        kind = self.kind(row)
        found = list(KINDS[kind])
        if kind == "tokens":
            found += [*_TOKEN_COLUMNS, *_MASKS]
        if kind == "tokens" or self.needs.labelled:
            found += LABELS
        return [name for name in dict.fromkeys(found) if name in row]

    def encode(self, rows: Sequence[Any], ids: Sequence[int]) -> list[Encoded]:
        """Examples of some rows.

        Args:
            rows: dicts.
            ids: their numbers, for messages.

        Raises:
            DataError: naming the row.
        """
        kinds = [self.kind(row) for row in rows]
        texts = {i: row["text"] for row, kind, i in zip(rows, kinds, ids, strict=True) if kind == "text"}
        for i, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"example {i}: text must be a string, got {type(text).__name__}")
        # Its tokenizer cuts a text, so that special tokens at the end stay there.
        cut = {} if self._max_length is None else {"truncation": True, "max_length": self._max_length}
        found = self._tokenizer(list(texts.values()), verbose=False, **cut) if texts else {}
        places, out = {i: at for at, i in enumerate(texts)}, []
        for row, kind, i in zip(rows, kinds, ids, strict=True):
            try:
                if kind == "text":
                    item = {name: list(found[name][places[i]]) for name in _TOKEN_COLUMNS if name in found}
                    item.setdefault("attention_mask", [1] * len(item["input_ids"]))
                    self._give_labels(item, row)
                else:
                    item = self._one(kind, row)
            except (DataError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"example {i}: {error}") from error
            out.append({k: v[: self._max_length] if isinstance(v, list) else v for k, v in item.items()})
        return out

    def _one(self, kind: str, row: Any) -> Encoded:
        if kind == "tokens":
            return self._tokens(row)
        if kind == "messages":
            ids, labels = chat_tokens(row["messages"], self._tokenizer)
        else:
            ids, labels = completion_tokens(row["prompt"], row["completion"], self._tokenizer)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _tokens(self, row: Any) -> Encoded:
        item: Encoded = {name: _ints(row[name], name) for name in _TOKEN_COLUMNS if row.get(name) is not None}
        item.setdefault("attention_mask", [1] * len(item["input_ids"]))
        given = None if self.needs.labelled else _first(row, LABELS)
        mask = _first(row, _MASKS) if self.needs.shifted else None
        if given is not None:
            item["labels"] = _ints(given, "labels")
        elif mask is not None:
            pairs = zip(item["input_ids"], _ints(mask, "masks"), strict=True)
            item["labels"] = [token if own else IGNORE for token, own in pairs]
        else:
            self._give_labels(item, row)
        for name, values in item.items():
            if isinstance(values, list) and len(values) != len(item["input_ids"]):
                raise DataError(f"{name} has {len(values)} values where input_ids has {len(item['input_ids'])}")
        return item

    def _give_labels(self, item: Encoded, row: Any) -> None:
        if self.needs.labelled:
            given = _first(row, LABELS)
            if given is not None:
                value = given.item() if isinstance(given, torch.Tensor) and given.numel() == 1 else given
                if isinstance(value, bool) or not hasattr(value, "__index__"):
                    raise DataError(
                        f"label {given!r:.60} is no integer: number the classes; for a regression or several labels an "
                        "example pass loss=fn, and data that is collated for it"
                    )
                item["labels"] = int(value)
        elif self.needs.masked:
            item["labels"] = self._hide(item["input_ids"], item["attention_mask"])

    def _hide(self, ids: list[int], mask: list[int]) -> list[int]:
        """Replaces some tokens by the mask token, the same ones of the same text; labels are what they were."""
        hidden = getattr(self._tokenizer, "mask_token_id", None)
        if hidden is None:
            raise DataError(
                "a masked language model has a loss on hidden tokens, and there is no tokenizer with a mask token to "
                "hide some: pass it, or columns input_ids and labels"
            )
        special = set(self._tokenizer.all_special_ids)
        places = [t for t, token in enumerate(ids) if token not in special and mask[t]]
        key = xxhash.xxh3_128(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()
        draws = keyed_generator(_MASK_SEED, "mask", key).random_raw(max(len(places), 1))
        chosen = [
            places[n] for n in draws[: len(places)].argsort(kind="stable")[: -(-len(places) * _HIDDEN_PERCENT // 100)]
        ]
        labels = [IGNORE] * len(ids)
        for t in chosen:
            labels[t], ids[t] = ids[t], hidden
        return labels

    def has_loss(self, item: Encoded) -> bool:
        """Whether any token of an example, or its label, counts."""
        if self.needs.labelled:
            return bool(item["input_ids"]) and item.get("labels", IGNORE) != IGNORE
        counted = item["labels"] if "labels" in item else item["input_ids"]
        shown = [value != IGNORE and on for value, on in zip(counted, item["attention_mask"], strict=True)]
        return any(shown[1:] if self.needs.shifted else shown)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: rows filled up on the right, `labels` with -100, tokens with the model's padding, others with 0."""
        if any("labels" in item for item in items) and not self.needs.labelled:
            # Where some examples say what has a loss, of the others all tokens have.
            items = [{"labels": item["input_ids"], **item} for item in items]
        longest = max(len(item["input_ids"]) for item in items)
        fill = {"input_ids": self.needs.pad, "labels": IGNORE}
        names = [name for name in items[0] if all(name in item for item in items)]
        batch = {}
        for name in names:
            if isinstance(items[0][name], int):
                batch[name] = torch.tensor([item[name] for item in items], dtype=torch.int64)
                continue
            batch[name] = torch.full((len(items), longest), fill.get(name, 0), dtype=torch.int64)
            for row, item in zip(batch[name], items, strict=True):
                row[: len(item[name])] = torch.tensor(item[name], dtype=torch.int64)
        return batch


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of some columns that a row has."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _ints(values: Any, name: str) -> list[int]:
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if not all(isinstance(v, int) for v in listed):
        raise DataError(f"{name} must be integers, one a token, got {listed!r:.60}")
    return listed

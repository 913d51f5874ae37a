"""Documents: packed rows taken apart, so that the examples of an index are the documents in them.

A packed row holds several documents, which a model keeps apart by attention masks that are block-diagonal and by
positions that begin anew. A document alone, with the positions that it had, is then the same computation: its loss and
its gradient are exactly its part of the row's. (Where documents could see each other, packing is no packing but one
long text: pass that without document_ids.) The one term that belongs to no document is left out: the first token of a
document as predicted from the last of the one before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..capture.losses import restarts
from ..errors import DataError

LENGTHS = "seq_lengths"
"""TRL's column of the documents' lengths."""
_COLUMNS = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids")


class UnpackedDocuments:
    """The documents of a data set of packed rows, as a map-style dataset of dicts of (length,) int64 tensors.

    Rows are dicts with `input_ids` and `document_ids`, each (T,): a document is where the id stays the same, and
    negative ids and what `attention_mask` hides are padding; or without document_ids, `seq_lengths`, the documents'
    lengths one after another, as TRL packs them; or `position_ids` that begin anew at 0. Other columns of tokens are
    taken apart with them; position_ids are kept.

    Args:
        rows: a map-style dataset, such as a Hugging Face Dataset. Walked once to find the borders, which take 24 bytes
            a document.

    Attributes:
        origins: (documents, 3) int64: row, first position and end of each.

    Raises:
        DataError: rows without borders, of unlike lengths, or with a document in pieces.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        found = array("q")
        for number in range(len(self._rows)):
            for start, stop in _borders(self._rows[number], number):
                found.extend((number, start, stop))
        self.origins = np.frombuffer(found, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([i])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        items, kept = [], dict[int, Any]()
        for number, start, stop in self.origins[np.asarray(ids, dtype=np.int64)].tolist():
            if number not in kept:
                kept = {number: self._rows[number]}
            row = kept[number]
            items.append({k: torch.as_tensor(row[k])[start:stop] for k in _COLUMNS if row.get(k) is not None})
        return items


def _borders(row: Any, number: int) -> list[tuple[int, int]]:
    """First positions and ends of the documents in a row."""
    ids = torch.as_tensor(row["input_ids"])
    parts = {k: torch.as_tensor(row[k]) for k in (*_COLUMNS, "document_ids") if row.get(k) is not None}
    if "document_ids" not in parts and row.get(LENGTHS) is not None:
        lengths = torch.as_tensor(row[LENGTHS])
        if int(lengths.sum()) != len(ids):
            raise DataError(f"packed row {number}: {LENGTHS} sum to {int(lengths.sum())}, of {len(ids)} tokens")
        parts["document_ids"] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    for name, part in parts.items():
        if part.shape != ids.shape or part.ndim != 1:
            raise DataError(
                f"packed row {number}: {name} has shape {tuple(part.shape)} where input_ids has {tuple(ids.shape)}: "
                "columns of a packed row have one value a token"
            )
    mask = parts.get("attention_mask")
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if "document_ids" in parts:
        names = parts["document_ids"]
        shown = shown & (names >= 0)
        begins = names[1:] != names[:-1]
    elif "position_ids" in parts:
        begins = restarts(parts["position_ids"][None], shown[None])[0]
    else:
        raise DataError(
            f"packed row {number} has no document_ids, {LENGTHS} or position_ids, only {sorted(map(str, row))}"
        )
    edges = np.flatnonzero((begins | (shown[1:] != shown[:-1])).numpy()) + 1
    cuts = [0, *edges.tolist(), len(ids)]
    pairs = [(a, b) for a, b in pairwise(cuts) if a < b and bool(shown[a])]
    if "document_ids" in parts:
        seen = [int(names[a]) for a, _ in pairs]
        if len(set(seen)) != len(seen):
            twice = next(name for name in seen if seen.count(name) > 1)
            raise DataError(
                f"packed row {number} holds document {twice} in several pieces: ids of a row must differ, and padding "
                "must not lie inside of a document"
            )
    return pairs

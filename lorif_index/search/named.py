"""Named: rows that are asked for by their ids: where they are, and their payloads, texts and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError, QueryError
from ..storage.payloads import decode
from .reader import Reader


def as_ids(ids: Iterable[int] | np.ndarray) -> np.ndarray:
    """(m,) int64 of row ids as they were given.

    Raises:
        QueryError: they are no integers.
    """
    try:
        given = ids if isinstance(ids, np.ndarray) else np.asarray(list(ids))
    except TypeError:
        raise QueryError(f"ids must be several integers, got {ids!r}: pass a list of them, such as [3, 5]") from None
    if given.size == 0:
        return np.empty(0, dtype=np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise QueryError(f"ids must be integers, got an array of {given.dtype} with shape {given.shape}")
    return given.astype(np.int64)


def found_positions(reader: Reader, ids: np.ndarray) -> np.ndarray:
    """(m,) int64: positions in the whole index of the rows with some ids.

    Raises:
        QueryError: there is no such row.
    """
    positions = reader.rows.positions_of(ids)
    if len(ids) and positions.min() < 0:
        raise QueryError(f"the index has no row with id {int(ids[positions < 0][0])}: ids are in index.ids")
    return positions


def check_alone(reader: Reader) -> None:
    """Rows are read, and examples explained, where one process holds all of them.

    Raises:
        QueryError: several ranks hold them.
    """
    if reader.ranks.size > 1:
        raise QueryError(
            "this is asked of an index that one process has opened, and several ranks hold this one: "
            "Index.open(path), without distributed="
        )


def payloads_of(reader: Reader, ids: Iterable[int] | np.ndarray) -> list[Any]:
    """Payloads of rows, in the order wanted; None where a row has none.

    Raises:
        QueryError: an id that the index does not hold. CorruptionError: a payload that is damaged.
    """
    return payloads_at(reader, found_positions(reader, as_ids(ids)))


def payloads_at(reader: Reader, positions: np.ndarray) -> list[Any]:
    """Payloads of rows at positions (m,); None where a row has none."""
    return [decode(payload) for payload in reader.rows.payloads_at(positions)]


def stored_gradients(reader: Reader, ids: Iterable[int] | np.ndarray) -> dict[str, torch.Tensor]:
    """Layer -> (n, d_in, d_out) float32: the projected gradients that stored rows stand for.

    Raises:
        QueryError: an id that the index does not hold. CorruptionError: a damaged row.
    """
    check_alone(reader)
    rows = reader.store.gather(found_positions(reader, as_ids(ids)))
    return {name: gradient.dense() for name, gradient in reader.codec.gradients(rows).items()}


class StoredTexts:
    """The payloads of an index by ids, as a data set of the texts that it was built from."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return int(self._reader.store.live_ids.max()) + 1

    def __getitems__(self, ids: Sequence[int]) -> list[Any]:
        rows = payloads_of(self._reader, np.asarray(ids, np.int64))
        for i, row in zip(ids, rows, strict=True):
            if not isinstance(row, (dict, str)):
                raise DataError(f"the index keeps no text of example {i}: pass data=, what it was built from")
        return rows

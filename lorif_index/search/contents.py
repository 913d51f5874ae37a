"""Contents: which rows are of one example, by the hashes that stand beside them (see `capture.contents`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..capture.contents import CONTENT_BYTES, contents_of
from ..capture.data import Batch
from ..errors import QueryError
from .named import as_ids, check_alone, found_positions
from .reader import Reader
from .rows import IndexRows

AT_ONCE = 10_000_000
"""Rows whose hashes are held at once, together with their order 480 MB. Of more rows a build's report looks at the
hashes below a bound: all copies of an example lie on one side of it."""
_SHOWN, _SHOWN_IDS = 3, 5
_NO_HASHES = (
    "the index keeps no hashes of its examples: they are made where a model takes the gradients (build it from "
    "model= and data=, by this version)"
)


def hashes(reader: Reader, ids: Iterable[int] | np.ndarray) -> np.ndarray:
    """(m,) of 32 hexadecimal digits, in the order wanted.

    Raises:
        QueryError: an id that the index does not hold; no hashes.
    """
    check_alone(reader)
    found = reader.store.contents_at(found_positions(reader, as_ids(ids)))
    if found is None:
        raise QueryError(_NO_HASHES)
    return np.array([one.tobytes().hex() for one in found], dtype="U32")


def found_again(reader: Reader, batches: Iterable[Batch]) -> list[np.ndarray]:
    """For each example of some batches the ids (any,) int64 of the rows that are of the same, rising.

    Raises:
        QueryError: no hashes.
    """
    _check_there(reader)
    asked = np.concatenate([np.empty((0, CONTENT_BYTES), np.uint8), *map(contents_of, batches)])
    wanted = {one.tobytes(): list[int]() for one in asked}
    heads = np.unique(_numbers(asked)[:, 0])
    for ids, contents in _by_shard(reader.rows):
        for at in np.flatnonzero(np.isin(_numbers(contents)[:, 0], heads)).tolist():
            where = wanted.get(contents[at].tobytes())
            if where is not None:
                where.append(int(ids[at]))
    return [np.array(wanted[one.tobytes()], dtype=np.int64) for one in asked]


def duplicates(reader: Reader) -> list[np.ndarray]:
    """Ids (at least 2,) int64, rising, of the rows of one example, of all examples that are there more than once; by
    their first ids.

    Raises:
        QueryError: no hashes.
    """
    _check_there(reader)
    parts = -(-reader.live_count // AT_ONCE)
    found = [group for part in range(parts) for group in _groups(*_within(reader.rows, part, parts))]
    return sorted(found, key=lambda group: int(group[0]))


def added_copies(reader: Reader, first: int) -> list[np.ndarray]:
    """Groups as `duplicates` of which the last was added with an id of at least `first`; none where there are no
    hashes, or so many rows that looking at all of their hashes would cost an addition something."""
    if reader.ranks.size > 1 or reader.live_count > AT_ONCE:
        return []
    return [group for group in _groups(*_within(reader.rows, 0, 1)) if group[-1] >= first]


def measure_duplicates(rows: IndexRows) -> dict[str, Any] | None:
    """What a build says of copies, the same on all ranks.

    Returns:
        {"examples": copies of an earlier one, estimated where `looked_at` is below 1, "looked_at": share of all rows,
        "first": ids of some of the largest groups}, as plain JSON values; None where rows have no hashes.
    """
    ranks = rows.ranks
    parts = -(-len(rows.team) // AT_ONCE)
    with ranks.jointly():
        ids, numbers = _within(rows, 0, parts)
    ids, numbers = np.concatenate(ranks.gather(ids)), np.concatenate(ranks.gather(numbers))
    if not ranks.count(int(_there(rows))):
        return None
    found = _groups(ids, numbers)
    largest = sorted(found, key=lambda group: (-len(group), int(group[0])))[:_SHOWN]
    return {
        "examples": sum(len(group) - 1 for group in found) * parts,
        "looked_at": round(1 / parts, 6),
        "first": [group[:_SHOWN_IDS].tolist() for group in largest],
    }


def _there(rows: IndexRows) -> bool:
    """Whether any row that this rank holds has a hash."""
    return any(shard.info.contents_digest for shard in rows.store.shards)


def _check_there(reader: Reader) -> None:
    check_alone(reader)
    if not _there(reader.rows):
        raise QueryError(_NO_HASHES)


def _numbers(contents: np.ndarray) -> np.ndarray:
    """(n, 2) uint64 of (n, 16) uint8."""
    return np.ascontiguousarray(contents).view("<u8")


def _by_shard(rows: IndexRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, hashes) of the live rows that this rank holds, where there are hashes."""
    store = rows.store
    for shard, start in zip(store.shards, store.starts.tolist(), strict=False):
        dead = None if store.dead is None else store.dead[start : start + shard.count]
        if shard.info.sealed.file in store.damaged or (found := shard.contents()) is None:
            continue
        ids = store.ids[start : start + shard.count]
        yield (ids, found) if dead is None else (ids[~dead], found[~dead])


def _within(rows: IndexRows, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(m,) ids and (m, 2) hashes, of those in one of several equal ranges."""
    ids, numbers = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    for its, contents in _by_shard(rows):
        both = _numbers(contents)
        mine = both[:, 0] % np.uint64(parts) == part
        ids.append(its[mine])
        numbers.append(both[mine])
    return np.concatenate(ids), np.concatenate(numbers)


def _groups(ids: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """Rising ids of the rows with one hash, of the hashes that several have."""
    order = np.lexsort((ids, numbers[:, 1], numbers[:, 0]))
    ids, numbers = ids[order], numbers[order]
    ends = np.flatnonzero((numbers[1:] != numbers[:-1]).any(axis=1)) + 1
    return [group for group in np.split(ids, ends) if len(group) > 1]

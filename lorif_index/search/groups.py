"""Groups: the scores of the whole training set, summed by a field of the payloads while they stream by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import QueryError
from ..progress import Reporter
from ..ranks import Ranks
from ..results import Group, Groups
from ..storage.payloads import decode
from .planner import scan
from .reader import Reader
from .scoring import Question

One = str | Callable[[Any], Any]
By = One | Sequence[One]
"""A field of payloads that are objects, or a function of the payload that gives a JSON scalar; or several of them, by
whose values together groups are made."""

# Payloads that are in memory together.
_AT_ONCE = 1024


def keys_of(by: By) -> list[One]:
    """What groups are made by, one after the other."""
    return [by] if isinstance(by, str) or callable(by) else list(by)


def name_of(key: One) -> str:
    """A field, or the name of a function."""
    return key if isinstance(key, str) else getattr(key, "__name__", type(key).__name__)


class _Numbered:
    """Numbers for values as they appear; 1, 1.0 and True are three, as they are in JSON."""

    def __init__(self, by: By) -> None:
        self._keys, self._several = keys_of(by), not (isinstance(by, str) or callable(by))
        self._numbers: dict[tuple[Any, ...], int] = {}
        self.values: list[Any] = []
        self.fields: set[str] = set()
        # Which keys have had a value.
        self.seen = [False] * len(self._keys)

    def empty(self) -> _Numbered:
        """Another one for the same keys."""
        return _Numbered(self._keys if self._several else self._keys[0])

    def number(self, payload: Any, example: int) -> int:
        """The number of the payload's value, or values; QueryError where one is no JSON scalar."""
        return self.known([self._value(at, payload, example) for at in range(len(self._keys))])

    def known(self, values: list[Any]) -> int:
        """The number of the values that the keys have given."""
        key = tuple((type(value), value) for value in values)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self.values.append(tuple(values) if self._several else values[0])
        return self._numbers[key]

    def _value(self, at: int, payload: Any, example: int) -> Any:
        by = self._keys[at]
        if isinstance(by, str):
            value = payload.get(by) if isinstance(payload, dict) else None
            if value is None and isinstance(payload, dict) and len(self.fields) < 20:
                self.fields |= set(payload)
        else:
            value = by(payload)
        if not isinstance(value, (str, int, float, bool, type(None))) or value != value:
            raise QueryError(
                f"example {example} has the group {value!r} of type {type(value).__name__}: groups are text, numbers, "
                "true, false or null; pass by=function(payload) that gives one"
            )
        self.seen[at] |= value is not None
        return value


def sum_groups(reader: Reader, question: Question, by: By, k: int | None, report: Reporter) -> Groups:
    """The groups of every query, in one streamed pass over the live rows. Memory grows with the number of groups.

    Args:
        reader: the index; it has rows.
        question: the queries.
        by: what makes a group.
        k: how many groups of a query to keep, of the largest sums; None: all.

    Raises:
        QueryError: no payload has the field, or a value is no JSON scalar.
    """
    ranks = reader.ranks
    if not reader.any_payloads:
        raise QueryError("groups are made by payloads, and this index has none: build it with payloads=")
    numbered, queries = _Numbered(by), question.count
    counts, sums = np.zeros(0, dtype=np.int64), np.zeros((2, queries, 0))
    with ranks.jointly():
        for positions, scores, _ in scan(reader, question, report):
            at, ids = positions.numpy(), reader.store.ids
            numbers = np.empty(len(at), dtype=np.int64)
            for start in range(0, len(at), _AT_ONCE):
                part = at[start : start + _AT_ONCE]
                found = zip(part.tolist(), reader.store.payloads(part), strict=True)
                numbers[start : start + len(part)] = [numbered.number(decode(p), int(ids[i])) for i, p in found]
            more = len(numbered.values) - len(counts)
            counts = np.pad(counts, (0, more)) + np.bincount(numbers, minlength=len(numbered.values))
            sums = np.pad(sums, ((0, 0), (0, 0), (0, more)))
            for q, row in enumerate(scores.double().cpu().numpy()):
                for sign, half in enumerate((np.maximum(row, 0), np.minimum(row, 0))):
                    sums[sign, q] += np.bincount(numbers, weights=half, minlength=len(counts))
    if ranks.size > 1:
        numbered, counts, sums = _together(ranks, numbered, counts, sums)
    for key, seen in zip(keys_of(by), numbered.seen, strict=True):
        if isinstance(key, str) and not seen:
            known = sorted(map(str, numbered.fields))
            raise QueryError(
                f"no payload has a field {key!r}, but {known}: name one of them, or pass by=function(payload)"
            )
    names = [name_of(key) for key in keys_of(by)]
    name = names[0] if isinstance(by, str) or callable(by) else names
    lists = [_ranked(numbered.values, counts, sums[0, q], sums[1, q], k) for q in range(queries)]
    return Groups(name, lists, int(counts.sum()), len(counts))


def _together(
    ranks: Ranks, numbered: _Numbered, counts: np.ndarray, sums: np.ndarray
) -> tuple[_Numbered, np.ndarray, np.ndarray]:
    """The groups that all ranks have seen, in the order of the ranks."""
    mine = [list(value) if isinstance(value, tuple) else [value] for value in numbered.values]
    found = ranks.gather_values([mine, sorted(numbered.fields), numbered.seen, counts.tolist(), sums.tolist()])
    whole = numbered.empty()
    numbers = [[whole.known(values) for values in every] for every, *_ in found]
    total, added = np.zeros(len(whole.values), np.int64), np.zeros((*sums.shape[:2], len(whole.values)))
    for places, (_, fields, seen, each, parts) in zip(numbers, found, strict=True):
        whole.fields |= set(fields)
        whole.seen = [a or b for a, b in zip(whole.seen, seen, strict=True)]
        total[places] += np.array(each, dtype=np.int64)
        added[:, :, places] += np.array(parts).reshape(*sums.shape[:2], len(places))
    return whole, total, added


def _ranked(
    values: list[Any], counts: np.ndarray, positive: np.ndarray, negative: np.ndarray, k: int | None
) -> list[Group]:
    total = positive + negative
    order = np.argsort(-total, kind="stable")[:k].tolist()
    return [Group(values[i], float(total[i]), int(counts[i]), float(positive[i]), float(negative[i])) for i in order]

"""Spans: which examples are sealed, which are left, and who does them."""

from __future__ import annotations

from collections.abc import Sequence

from ..storage.shards import ShardInfo

Span = tuple[int, int]
"""Ids from the first to before the second."""


def unsealed(sealed: Sequence[Sequence[int]], count: int) -> list[Span]:
    """What of the ids below `count` no span of `sealed` covers."""
    left, at = [], 0
    for first, stop in sorted((int(first), int(stop)) for first, stop in sealed):
        if first > at:
            left.append((at, first))
        at = max(at, stop)
    if at < count:
        left.append((at, count))
    return left


def some_of(spans: Sequence[Span], part: slice) -> list[Span]:
    """Of the ids in some spans, counted through, those from part.start to before part.stop."""
    out, at = [], 0
    for start, stop in spans:
        low, high = max(part.start - at, 0), min(part.stop - at, stop - start)
        if low < high:
            out.append((start + low, start + high))
        at += stop - start
    return out


def within(spans: Sequence[Span], number: int) -> bool:
    """Whether an id is in one of some spans."""
    return any(start <= number < stop for start, stop in spans)


def without_overlaps(everyone: Sequence[Sequence[Sequence[int]]], rank: int, own: list[ShardInfo]) -> list[ShardInfo]:
    """A rank's shards without those whose examples another folder has, too: one that was away and came back.

    Args:
        everyone: for each rank the spans of its shards.
        rank: whose are wanted.
        own: its shards, in the order of its spans.
    """
    kept, at = set(), 0
    for first, stop, whose in sorted((int(a), int(b), r) for r, spans in enumerate(everyone) for a, b in spans):
        if first >= at:
            kept.add((whose, first))
            at = stop
    return [shard for shard in own if (rank, shard.first_id) in kept]

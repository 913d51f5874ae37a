"""Scoring: questions against stored rows, streamed; exact for what is stored. Everything is accumulated in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..codecs.base import Parts, Scorer
from ..ranks import Ranks
from ..storage.resident import Resident

# A block of which more are better than what is kept, times k, is looked at twice.
_MUCH = 8


@dataclass(frozen=True)
class Question:
    """Queries made ready for the rows of an index.

    Attributes:
        parts: what the codec's scorer takes, float32 tensors (q, ...).
        x: (q, k) float32, for the coarse index; None where the index has no sketch.
        count: q.
        scale: (m,) float32 that a scan multiplies the live rows' scores by, or None.
        thresholds: (q,) float32 by which a scan shrinks scores then (see `shrinkage`), or None.
    """

    parts: Parts
    x: torch.Tensor | None
    count: int
    scale: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None

    def some(self, queries: slice) -> Question:
        """Some of the queries."""
        x, thresholds = (None if part is None else part[queries] for part in (self.x, self.thresholds))
        parts = {name: part[queries] for name, part in self.parts.items()}
        return Question(parts, x, len(range(self.count)[queries]), self.scale, thresholds)

    def scaled(self, queries: torch.Tensor) -> Question:
        """Scores are multiplied by the queries' (q,)."""

        def times(part: torch.Tensor) -> torch.Tensor:
            return part * queries.reshape(-1, *(1 for _ in part.shape[1:]))

        parts = {name: times(part) for name, part in self.parts.items()}
        return replace(self, parts=parts, x=None if self.x is None else times(self.x))


def shared_question(question: Question | Exception | None, ranks: Ranks) -> Question:
    """Rank 0's question, on all ranks; its scale and thresholds stay behind. What went wrong in making it may be passed
    in its place: then all ranks raise it."""
    if ranks.size == 1 and isinstance(question, Question):
        return question
    facts: Any = question if isinstance(question, Exception) else None
    there: dict[str, torch.Tensor] = {}
    if isinstance(question, Question) and ranks.first:
        there = question.parts | ({} if question.x is None else {"": question.x})
        facts = [question.count, _shapes(there)]
    count, shapes = ranks.told(facts)
    found = _spread(there, shapes, ranks)
    x = found.pop("", None)
    return Question(found, x, count)


def shared_layers(layers: Mapping[str, torch.Tensor] | None, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Rank 0's tensors by layer, float32, on all ranks; what the others pass does not matter."""
    mine = {} if layers is None else dict(layers)
    return mine if ranks.size == 1 else _spread(mine, ranks.told(_shapes(mine)), ranks)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> list[list[Any]]:
    return [[name, list(part.shape)] for name, part in tensors.items()]


def _spread(tensors: Mapping[str, torch.Tensor], shapes: list[list[Any]], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Rank 0's float32 tensors, of such names and shapes, on all ranks: one message."""
    if not shapes:
        return {}
    sizes = [math.prod(shape) for _, shape in shapes]
    mine = torch.cat([part.flatten() for part in tensors.values()]) if ranks.first else torch.empty(sum(sizes))
    parts = ranks.spread(mine, 0).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def stream_scores(
    rows: Resident, scorer: Scorer, question: Question
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(positions (m,) int64, scaled scores (q, m) where rows are, bytes read) of every block's live rows, in order."""
    dead, at = rows.store.dead, 0
    for start, block, read in rows.stream():
        scores, positions = scorer.score(block), torch.arange(start, start + len(block))
        if dead is not None:
            alive = torch.from_numpy(np.flatnonzero(~dead[start : start + len(block)]))
            scores, positions = scores.index_select(1, alive.to(scores.device)), positions[alive]
        if question.scale is not None:
            scores.mul_(question.scale[at : at + len(positions)].to(scores.device))
        at += len(positions)
        yield positions, scores, read


class TopK:
    """The k best of a stream of scores per query; ties go to the earlier row. Memory O(q k), whatever the stream. They
    are kept where the scores are.

    Args:
        queries: q.
        k: how many to keep.
        largest: keep the largest scores; else the smallest.
    """

    def __init__(self, queries: int, k: int, *, largest: bool = True) -> None:
        self._k = k
        self._sign = 1.0 if largest else -1.0
        self._scores = torch.empty(queries, 0)
        self._positions = torch.empty(queries, 0, dtype=torch.int64)

    def update(self, positions: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes scores (q, n) of rows at positions (n,), which rise from call to call."""
        signed = scores * self._sign
        positions = positions.to(signed.device).expand_as(signed)
        self._scores, self._positions = self._scores.to(signed.device), self._positions.to(signed.device)
        full = self._scores.shape[1] == self._k
        if full or signed.shape[1] > self._k:
            # Everything at or above the k-th best, so that ties are decided by position below. Most blocks have nothing
            # that is better than what is kept; of those that have much, the block's own k-th best says more.
            keep = signed >= (self._scores[:, -1:] if full else self._kth(signed))
            most = int(keep.sum(dim=1).max())
            if full and most > _MUCH * self._k:
                keep &= signed >= self._kth(signed)
                most = int(keep.sum(dim=1).max())
            if most == 0:
                return
            # The chosen columns first, in order; the rest is marked and sorts last.
            order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :most]
            chosen = torch.gather(keep, 1, order)
            signed = torch.gather(signed, 1, order).masked_fill(~chosen, -torch.inf)
            positions = torch.gather(positions, 1, order)
        signed = torch.cat([self._scores, signed], dim=1)
        positions = torch.cat([self._positions, positions], dim=1)
        order = torch.argsort(signed, dim=1, descending=True, stable=True)[:, : self._k]
        self._scores, self._positions = torch.gather(signed, 1, order), torch.gather(positions, 1, order)

    def _kth(self, signed: torch.Tensor) -> torch.Tensor:
        """(q, 1): each query's k-th best of a block."""
        return torch.topk(signed, self._k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions (q, k) int64, scores (q, k) float32), best first, on the CPU."""
        return self._positions.cpu(), (self._scores * self._sign).cpu()

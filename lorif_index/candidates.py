"""Candidates: what the coarse index proposes is gathered, scored exactly, and continued while the recall is short.

Each query's best coarse rows are read by position, those that several queries share once, and scored by the same
scorer as a full scan. From the errors seen among them and the coarse scores of the rest the recall is estimated; a
query whose estimate is short goes on with twice as many.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from .calibration import Calibration, Rest, expected_missed, recall_from_missed
from .coarse import Coarse
from .errors import QueryError
from .scoring import Question, Scorer
from .store import Store

# Rows are gathered and scored a block at a time: bounds memory for large batches.
_GATHER_BYTES = 128 << 20
# Coarse scores are asked for this many times as far as rows are rescored, to see what comes next.
_BEYOND = 2
_FIRST_GUESS = 1000
# A query goes on only if its estimate is this much of the allowed loss short.
_TOLERANCE = 1.1


@dataclass
class Found:
    """What a candidate search found.

    Attributes:
        positions: (q, k) int64, best first.
        scores: (q, k) float32.
        candidates: (q,) rows rescored for each query.
        recall: (q,) estimated.
        rows_read: distinct rows gathered.
        seconds: by stage.
    """

    positions: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray
    recall: np.ndarray
    rows_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def coordinates(question: Question) -> torch.Tensor:
    """A question's coordinates (q, k), which the coarse index compares with.

    Raises:
        QueryError: it has none.
    """
    if question.x is None:
        raise QueryError("the index has no sketch, so that it cannot propose candidates: pass exact=True")
    return question.x


class _Known:
    """One query's rescored candidates; scores have their sign turned so that large is wanted."""

    def __init__(self) -> None:
        self.positions = np.empty(0, dtype=np.int64)
        self.coarse = np.empty(0, dtype=np.float32)
        self.exact = np.empty(0, dtype=np.float32)

    def take(self, positions: np.ndarray, coarse: np.ndarray, exact: np.ndarray) -> None:
        self.positions = np.concatenate([self.positions, positions])
        self.coarse = np.concatenate([self.coarse, coarse])
        self.exact = np.concatenate([self.exact, exact])

    def best(self, k: int) -> np.ndarray:
        """Places of the k best by exact score, best first; ties go to the earlier row, as in a scan."""
        return np.lexsort((self.positions, -self.exact))[:k]


class CandidateSearch:
    """Coarse search and exact rescoring over one index.

    Args:
        store: the rows.
        coarse: the coarse index over their coordinates.
        sample: (m, k) float32 coordinates of random rows, which stand for all in the estimate.
        calibration: what was learnt, or None.
    """

    def __init__(self, store: Store, coarse: Coarse, sample: np.ndarray, calibration: Calibration | None) -> None:
        self._store = store
        self._coarse = coarse
        self._sample = sample
        self.calibration = calibration

    @property
    def limit(self) -> int:
        """Most candidates of a query; beyond, a scan is the better way."""
        return max(len(self._store) // 8, min(len(self._store), 4 * _FIRST_GUESS))

    def first_count(self, k: int, recall: float, *, largest: bool) -> int:
        """Candidates to begin with: T(k, recall) where it was calibrated."""
        table = self.calibration.tables["proponents" if largest else "opponents"] if self.calibration else None
        needed = table.needed(k, recall) if table else None
        if needed is None:
            needed = self.limit if table else max(_FIRST_GUESS, 20 * k)
        return min(max(needed, 2 * k, 64), self.limit)

    def run(
        self, question: Question, k: int, recall: float, *, largest: bool, count: int
    ) -> Found:
        """Searches for the k best rows of each query.

        Args:
            question: the queries, with coordinates.
            k: at most the number of rows.
            recall: wanted, in (0, 1].
            largest: the largest scores, or the smallest.
            count: candidates to begin with.
        """
        sign = np.float32(1.0 if largest else -1.0)
        queries = coordinates(question).numpy() * sign
        correction = self._correction(largest)
        total = question.count
        scorers = [question.some(slice(q, q + 1)).scorer(self._store.layout) for q in range(total)]
        found = Found(
            np.full((total, k), -1, dtype=np.int64),
            np.zeros((total, k), dtype=np.float32),
            np.zeros(total, dtype=np.int64),
            np.zeros(total),
            seconds={"coarse": 0.0, "gather": 0.0, "rescore": 0.0, "check": 0.0},
        )
        beyond = self._sample @ queries.T
        known = [_Known() for _ in range(total)]
        pending = np.arange(total)
        while len(pending):
            began = time.perf_counter()
            positions, coarse = self._coarse.search(queries[pending], _BEYOND * count)
            found.seconds["coarse"] += time.perf_counter() - began
            # An index of inverted lists may find fewer than asked for: -1 marks the end.
            usable = (positions >= 0).sum(axis=1).tolist()
            # Equal coarse scores may come in another order the second time: what is known is told by position.
            fresh = [
                np.flatnonzero(~np.isin(positions[i, : min(count, usable[i])], known[q].positions))
                for i, q in enumerate(pending.tolist())
            ]
            mine = [scorers[q] for q in pending.tolist()]
            scored = self._rescore(mine, [positions[i, f] for i, f in enumerate(fresh)], found)
            began = time.perf_counter()
            again = []
            for i, q in enumerate(pending.tolist()):
                state = known[q]
                state.take(positions[i, fresh[i]], coarse[i, fresh[i]], scored[i] * sign)
                best = state.best(k)
                found.positions[q, : len(best)] = state.positions[best]
                found.scores[q, : len(best)] = state.exact[best] * sign
                found.candidates[q] = len(state.positions)
                if len(best):
                    rest = self._rest(coarse[i, min(count, usable[i]) : usable[i]], beyond[:, q], coarse[i, usable[i] - 1])
                    missed = expected_missed(state.coarse, state.exact, rest, float(state.exact[best[-1]]))
                    found.recall[q] = recall_from_missed(k, missed * correction) * len(best) / k
                short = (1.0 - found.recall[q]) > _TOLERANCE * (1.0 - recall)
                if short and usable[i] >= count and count < self.limit:
                    again.append(q)
            found.seconds["check"] += time.perf_counter() - began
            pending = np.array(again, dtype=np.int64)
            count = min(2 * count, self.limit)
        return found

    def order(self, question: Question, rows: slice, count: int, *, largest: bool) -> np.ndarray:
        """(q, count) positions in coarse order, for some of the queries."""
        sign = np.float32(1.0 if largest else -1.0)
        return self._coarse.search(coordinates(question)[rows].numpy() * sign, count)[0]

    def coarse_only(self, question: Question, k: int, *, largest: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The k best by coarse score: positions, approximate scores (q, k), and the recall learnt for that."""
        sign = np.float32(1.0 if largest else -1.0)
        positions, scores = self._coarse.search(coordinates(question).numpy() * sign, k)
        table = self.calibration.tables["proponents" if largest else "opponents"] if self.calibration else None
        return positions, scores * sign, table.recall_alone(k) if table else float("nan")

    def _correction(self, largest: bool) -> float:
        if self.calibration is None:
            return 1.0
        return self.calibration.tables["proponents" if largest else "opponents"].correction

    def _rest(self, seen: np.ndarray, sample: np.ndarray, last: float) -> Rest:
        """Coarse scores of what is not rescored: those seen one by one, the sample for everything below them."""
        below = sample[sample < last]
        weight = len(self._store) / max(len(sample), 1)
        weights = np.concatenate([np.ones(len(seen)), np.full(len(below), weight)])
        return Rest(np.concatenate([seen, below]), weights)

    def _rescore(self, scorers: list[Scorer], wanted: list[np.ndarray], found: Found) -> list[np.ndarray]:
        """Exact scores of each query's candidates; rows are read once, in rising order, a block at a time."""
        union = np.unique(np.concatenate(wanted)) if wanted else np.empty(0, dtype=np.int64)
        found.rows_read += len(union)
        out = [np.empty(len(part), dtype=np.float32) for part in wanted]
        orders = [np.argsort(part) for part in wanted]
        ranked = [part[order] for part, order in zip(wanted, orders, strict=True)]
        step = max(_GATHER_BYTES // max(self._store.layout.row_bytes, 1), 1)
        for start in range(0, len(union), step):
            block = union[start : start + step]
            began = time.perf_counter()
            rows = self._store.gather(block)
            gathered = time.perf_counter()
            for scorer, part, order, scores in zip(scorers, ranked, orders, out, strict=True):
                low, high = np.searchsorted(part, [block[0], block[-1] + 1])
                if high > low:
                    places = np.searchsorted(block, part[low:high])
                    # One query that wants the whole block needs no copy of it.
                    mine = rows if len(places) == len(block) else rows[torch.from_numpy(places)]
                    scores[order[low:high]] = scorer.score(mine)[0].numpy()
            found.seconds["gather"] += gathered - began
            found.seconds["rescore"] += time.perf_counter() - gathered
        return out

"""Candidates: what the coarse index proposes is narrowed by coordinates, scored exactly, and continued while short.

Three orders, each of fewer rows and nearer to the exact one: the coarse code proposes the widest set; the stored
coordinates (held in memory up to a limit) narrow it; the factors of what is left are read by position and scored by the
same scorer as a full scan. Rows that several queries share are read once. From the errors seen on the way the recall is
estimated; a query whose estimate is short goes on with twice as many.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from .calibration import SIGNS, Calibration, Orders, Seen, expected_missed, recall_from_missed
from .errors import QueryError
from .resident import Resident
from .rows import RowLayout
from .scoring import Question, Scorer
from .scratch import SCRATCH

# Factors are gathered and scored a block at a time: bounds memory for large batches.
_GATHER_BYTES = 128 << 20
# Coarse scores are asked for this many times as far as rows are proposed, to see what comes next.
_BEYOND = 2
_FIRST_GUESS = 1000
_LEAST_WIDE, _LEAST_DEEP = 256, 64
# A query goes on only if what it is estimated to lose is this much more than it may: a single estimate is rough, and
# the recall asked for is a mean.
_TOLERANCE = 2.0


@dataclass(frozen=True)
class Counts:
    """How many rows a search takes per query: `wide` by coarse order, `deep` of those scored exactly."""

    wide: int
    deep: int


@dataclass
class Found:
    """What a candidate search found.

    Attributes:
        positions: (q, k) int64, best first.
        scores: (q, k) float32.
        candidates: (q,) rows scored exactly for each query.
        proposed: (q,) rows that the coarse order proposed.
        recall: (q,) estimated.
        bytes_read: from the shards.
        seconds: by stage.
    """

    positions: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray
    proposed: np.ndarray
    recall: np.ndarray
    bytes_read: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"coarse": 0.0, "narrow": 0.0, "gather": 0.0, "rescore": 0.0, "check": 0.0}
    )


class _State:
    """What is known of one query; scores have their sign turned so that large is wanted."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.positions = np.empty(0, dtype=np.int64)
        self.coarse = np.empty(0, dtype=np.float32)
        self.fine = np.empty(0, dtype=np.float32)
        self.deep = np.empty(0, dtype=np.int64)
        self.exact = np.empty(0, dtype=np.float32)

    def propose(self, positions: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> None:
        self.positions = np.concatenate([self.positions, positions])
        self.coarse = np.concatenate([self.coarse, coarse])
        self.fine = np.concatenate([self.fine, fine])

    def next_deep(self, count: int) -> np.ndarray:
        """Places of the best by fine score that are not scored exactly yet."""
        if count < len(self.fine):
            best = np.argpartition(-self.fine, count - 1)[:count]
        else:
            best = np.arange(len(self.fine))
        return best[~np.isin(best, self.deep)] if len(self.deep) else best

    def score(self, places: np.ndarray, exact: np.ndarray) -> None:
        self.deep = np.concatenate([self.deep, places])
        self.exact = np.concatenate([self.exact, exact])

    def best(self, k: int) -> np.ndarray:
        """Which of the exact scores are the k best, best first; ties go to the earlier row, as in a scan."""
        return np.lexsort((self.positions[self.deep], -self.exact))[:k]


def coordinates(question: Question) -> torch.Tensor:
    """A question's coordinates (q, k), which the coarse index compares with.

    Raises:
        QueryError: it has none.
    """
    if question.x is None:
        raise QueryError("the index has no sketch, so that it cannot propose candidates: pass exact=True")
    return question.x


class Proposer(Protocol):
    """What proposes candidates: a `Coarse`, or a `FlatSketch` on a GPU."""

    def search(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (q, count) int64, -1 for none, and scores (q, count) float32, falling, of queries (q, k)."""
        ...


class CandidateSearch:
    """Coarse search, narrowing and exact rescoring over one index.

    Args:
        rows: the index's.
        coarse: what proposes candidates, over their coordinates.
        sample: (m, k) float32 coordinates of random rows, which stand for all in the estimate.
        calibration: what was learnt, or None.
    """

    def __init__(self, rows: Resident, coarse: Proposer, sample: np.ndarray, calibration: Calibration | None) -> None:
        self._rows = rows
        self._layout = rows.layout
        self._coarse = coarse
        self._sample = sample
        self.calibration = calibration

    @property
    def limit(self) -> int:
        """Most rows proposed for a query; beyond, a scan is the better way."""
        return min(max(len(self._rows) // 8, 4 * _FIRST_GUESS), len(self._rows))

    @property
    def narrows(self) -> bool:
        """Whether coordinates lie between the coarse order and the factors."""
        return self._layout.codes is not None and self._layout.width > 0

    @property
    def layout(self) -> RowLayout:
        """Of the rows."""
        return self._layout

    def first_counts(self, k: int, recall: float, *, largest: bool) -> Counts:
        """How many rows to begin with: as calibrated, or a guess."""
        return self.counts_by(self._orders(largest), k, recall)

    def counts_by(self, orders: Orders | None, k: int, recall: float) -> Counts:
        """The same by given tables."""
        if orders is None:
            wide, deep = max(2 * _FIRST_GUESS, 40 * k), max(_FIRST_GUESS, 20 * k)
        else:
            wide, deep = orders.needed(k, recall) or (self.limit, self.limit)
        wide = min(max(wide, 2 * k, _LEAST_WIDE), self.limit)
        return Counts(wide, min(max(deep, k + k // 4, _LEAST_DEEP), wide) if self.narrows else wide)

    def run(self, question: Question, k: int, recall: float, *, largest: bool, counts: Counts) -> Found:
        """Searches for the k best rows of each query.

        Args:
            question: the queries, with coordinates.
            k: at most the number of rows.
            recall: wanted, in (0, 1]; 0 never goes on.
            largest: the largest scores, or the smallest.
            counts: rows to begin with.
        """
        sign = np.float32(1.0 if largest else -1.0)
        queries = coordinates(question).numpy() * sign
        orders = self._orders(largest)
        total = question.count
        states = [_State(question.some(slice(q, q + 1)).scorer(self._layout, self._rows.device)) for q in range(total)]
        found = Found(
            np.full((total, k), -1, dtype=np.int64),
            np.zeros((total, k), dtype=np.float32),
            np.zeros(total, dtype=np.int64),
            np.zeros(total, dtype=np.int64),
            np.zeros(total),
        )
        sampled = self._sample @ queries.T
        pending = list(range(total))
        while pending:
            began = time.perf_counter()
            positions, coarse = self._coarse.search(queries[pending], _BEYOND * counts.wide)
            # An index of inverted lists may find fewer than asked for: -1 marks the end.
            usable = (positions >= 0).sum(axis=1).tolist()
            found.seconds["coarse"] += time.perf_counter() - began
            rests = []
            for i, q in enumerate(pending):
                taken = min(counts.wide, usable[i])
                self._propose(states[q], positions[i, :taken], coarse[i, :taken], sign, found)
                # One that found fewer has not looked everywhere: then any row may be among the rest.
                complete = usable[i] == positions.shape[1]
                last = coarse[i, usable[i] - 1] if complete else np.inf
                rests.append(self._rest(coarse[i, taken : usable[i]], sampled[:, q], last))
            self._score_exactly([states[q] for q in pending], counts.deep, sign, found)
            began = time.perf_counter()
            short = []
            for i, q in enumerate(pending):
                state = states[q]
                best = state.best(k)
                found.positions[q, : len(best)] = state.positions[state.deep[best]]
                found.scores[q, : len(best)] = state.exact[best] * sign
                found.candidates[q], found.proposed[q] = len(state.deep), len(state.positions)
                if len(best):
                    seen = Seen(state.coarse, state.fine, state.deep, state.exact, *rests[i])
                    recall_now = recall_from_missed(k, expected_missed(seen, float(state.exact[best[-1]])))
                    found.recall[q] = (orders.corrected(recall_now, k) if orders else recall_now) * len(best) / k
                more = counts.wide < min(self.limit, usable[i] + 1) or counts.deep < len(state.positions)
                if more and (1.0 - found.recall[q]) > _TOLERANCE * (1.0 - recall):
                    short.append(q)
            found.seconds["check"] += time.perf_counter() - began
            pending = short
            wide = min(2 * counts.wide, self.limit)
            counts = Counts(wide, min(2 * counts.deep, wide) if self.narrows else wide)
        return found

    def order(self, question: Question, count: int, *, largest: bool) -> np.ndarray:
        """(q, count) positions in coarse order."""
        sign = np.float32(1.0 if largest else -1.0)
        return self._coarse.search(coordinates(question).numpy() * sign, count)[0]

    def coarse_only(self, question: Question, k: int, *, largest: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The k best by coarse score: positions, approximate scores (q, k), and the recall learnt for that."""
        sign = np.float32(1.0 if largest else -1.0)
        positions, scores = self._coarse.search(coordinates(question).numpy() * sign, k)
        orders = self._orders(largest)
        return positions, scores * sign, orders.recall_alone(k) if orders else float("nan")

    def by_coordinates(self, question: Question, positions: np.ndarray) -> np.ndarray:
        """(m,) float32: scores by coordinates of rows at some positions for a question of one query."""
        return self._by_coordinates(question.scorer(self._layout, self._rows.device), positions)[0]

    def _by_coordinates(self, scorer: Scorer, positions: np.ndarray) -> tuple[np.ndarray, int]:
        """The same, and the bytes that were read for it."""
        order = np.argsort(positions)
        codes, read = self._rows.codes(positions[order])
        out = np.empty(len(positions), dtype=np.float32)
        out[order] = scorer.score_codes(codes)[0].cpu().numpy()
        return out, read

    def _orders(self, largest: bool) -> Orders | None:
        return self.calibration.orders[SIGNS[0] if largest else SIGNS[1]] if self.calibration else None

    def _propose(
        self, state: _State, positions: np.ndarray, coarse: np.ndarray, sign: np.float32, found: Found
    ) -> None:
        """Takes what is new among the proposed, with scores by coordinates where there are any."""
        began = time.perf_counter()
        if len(state.positions):
            # Equal coarse scores may come in another order the second time: what is known is told by position.
            new = ~np.isin(positions, state.positions)
            positions, coarse = positions[new], coarse[new]
        fine = coarse
        if self._layout.codes is not None and len(positions):
            fine, read = self._by_coordinates(state.scorer, positions)
            fine *= sign
            found.bytes_read += read
        state.propose(positions, coarse, fine)
        found.seconds["narrow"] += time.perf_counter() - began

    def _score_exactly(self, states: list[_State], count: int, sign: np.float32, found: Found) -> None:
        """Exact scores of each query's best by fine score; rows are read once, in rising order, a block at a time."""
        wanted = [state.next_deep(count) for state in states]
        if not self._layout.width:
            # Coordinates are all that is stored: their scores are the exact ones.
            for state, places in zip(states, wanted, strict=True):
                state.score(places, state.fine[places])
            return
        # Each query's places in rising order of their positions.
        wanted = [places[np.argsort(state.positions[places])] for state, places in zip(states, wanted, strict=True)]
        at = [state.positions[places] for state, places in zip(states, wanted, strict=True)]
        union = np.unique(np.concatenate(at)) if at else np.empty(0, dtype=np.int64)
        scores = [np.empty(len(part), dtype=np.float32) for part in at]
        step = max(_GATHER_BYTES // self._layout.factor_bytes, 1)
        for start in range(0, len(union), step):
            block = union[start : start + step]
            began = time.perf_counter()
            factors, read = self._rows.factors(block)
            found.bytes_read += read
            gathered = time.perf_counter()
            for state, part, out in zip(states, at, scores, strict=True):
                low, high = np.searchsorted(part, [block[0], block[-1] + 1])
                if high > low:
                    places = np.searchsorted(block, part[low:high])
                    # One query that wants the whole block needs no copy of it.
                    all_of_it = len(places) == len(block)
                    mine = factors if all_of_it else SCRATCH.select("mine", factors, torch.from_numpy(places))
                    out[low:high] = state.scorer.score_factors(mine)[0].cpu().numpy()
            found.seconds["gather"] += gathered - began
            found.seconds["rescore"] += time.perf_counter() - gathered
        for state, places, out in zip(states, wanted, scores, strict=True):
            # Sums in the same order as a scan's: factors, then coordinates.
            fine = state.fine[places] if self._layout.codes is not None else np.float32(0.0)
            state.score(places, out * sign + fine)

    def _rest(self, seen: np.ndarray, sample: np.ndarray, last: float) -> tuple[np.ndarray, np.ndarray]:
        """Coarse scores of what is not proposed, and weights: those seen one by one, then the sample below them."""
        below = sample[sample < last]
        weight = len(self._rows) / max(len(sample), 1)
        weights = np.concatenate([np.ones(len(seen)), np.full(len(below), weight)])
        return np.concatenate([seen, below]), weights

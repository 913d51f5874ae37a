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

from .calibration import SIGNS, Calibration, Orders
from .coarse import tilted
from .errors import QueryError
from .missed import Seen, expected_missed
from .resident import Resident
from .rows import RowLayout
from .scoring import Question, Scorer
from .scratch import SCRATCH

# Factors are gathered and scored a block at a time: bounds memory for large batches.
_GATHER_BYTES = 128 << 20
_FIRST_GUESS, _GUESSED_TILT = 1000, 0.05
_LEAST_WIDE, _LEAST_DEEP = 256, 64


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
    """What is known of one query; scores have their sign turned so that large is wanted.

    `coarse` is tilted; `fine`, the score by coordinates, is not. `size` is |x| |z|, or 1 where z is not known.
    """

    def __init__(self, scorer: Scorer, norm: float, tilt: float) -> None:
        self.scorer = scorer
        self.norm, self.tilt = np.float32(norm), np.float32(tilt)
        self.positions = np.empty(0, dtype=np.int64)
        self.coarse = np.empty(0, dtype=np.float32)
        self.fine = np.empty(0, dtype=np.float32)
        self.size = np.empty(0, dtype=np.float32)
        self.deep = np.empty(0, dtype=np.int64)
        self.exact = np.empty(0, dtype=np.float32)
        self.complete = False

    def propose(self, positions: np.ndarray, coarse: np.ndarray, fine: np.ndarray, size: np.ndarray) -> None:
        self.positions = np.concatenate([self.positions, positions])
        self.coarse = np.concatenate([self.coarse, coarse])
        self.fine = np.concatenate([self.fine, fine])
        self.size = np.concatenate([self.size, size])

    @property
    def order(self) -> np.ndarray:
        """Scores by coordinates, tilted."""
        return self.fine + self.tilt * self.size

    def first(self, count: int) -> np.ndarray:
        """Places of the best by order."""
        if count < len(self.fine):
            return np.argpartition(-self.order, count - 1)[:count]
        return np.arange(len(self.fine))

    def unscored(self) -> np.ndarray:
        """Places without an exact score."""
        shallow = np.ones(len(self.fine), dtype=bool)
        shallow[self.deep] = False
        return np.flatnonzero(shallow)

    def score(self, places: np.ndarray, exact: np.ndarray) -> None:
        self.deep = np.concatenate([self.deep, places])
        self.exact = np.concatenate([self.exact, exact])

    def best(self, k: int) -> np.ndarray:
        """Which of the exact scores are the k best, best first; ties go to the earlier row, as in a scan."""
        return np.lexsort((self.positions[self.deep], -self.exact))[:k]

    def seen(self, coordinates: bool) -> Seen:
        """What the search has seen of the query."""
        order = self.order
        if not coordinates:
            # The coarse order stands for exact scores, which are known of every row proposed.
            order = np.empty_like(self.coarse)
            order[self.deep] = self.exact
        return Seen(self.coarse, order, self.fine, self.size, self.deep, self.exact, self.complete)


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

    @property
    def tilts(self) -> bool:
        """Whether it heeds `tilt`."""
        ...

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Positions (q, count) int64, -1 for none, and scores (q, count) float32, falling, of queries (q, k), by
        <x, z> + tilt |x| |z|."""
        ...


class CandidateSearch:
    """Coarse search, narrowing and exact rescoring over one index.

    Args:
        rows: the index's.
        coarse: what proposes candidates, over their coordinates.
        calibration: what was learnt, or None.
    """

    def __init__(self, rows: Resident, coarse: Proposer, calibration: Calibration | None) -> None:
        self._rows = rows
        self._layout = rows.layout
        self._coarse = coarse
        self.calibration = calibration

    @property
    def limit(self) -> int:
        """Most rows proposed for a query; beyond, a scan is the better way."""
        return min(max(len(self._rows) // 4, 4 * _FIRST_GUESS), len(self._rows))

    @property
    def narrows(self) -> bool:
        """Whether coordinates lie between the coarse order and the factors."""
        return self._layout.codes is not None and self._layout.width > 0

    @property
    def layout(self) -> RowLayout:
        """Of the rows."""
        return self._layout

    def reaches(self, k: int, recall: float, *, largest: bool) -> bool:
        """Whether calibration knows a number of candidates for that recall; True where nothing was calibrated."""
        orders = self._orders(largest)
        return orders is None or orders.needed(k, recall) is not None

    @property
    def tilts(self) -> bool:
        """Whether the order can be tilted."""
        return self._coarse.tilts

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

    def run(
        self,
        question: Question,
        k: int,
        recall: float,
        *,
        largest: bool,
        counts: Counts,
        without: np.ndarray | None = None,
        tilt: float | None = None,
    ) -> Found:
        """Searches for the k best rows of each query.

        Args:
            question: the queries, with coordinates.
            k: at most the number of rows.
            recall: wanted, in (0, 1]; 0 never goes on.
            largest: the largest scores, or the smallest.
            counts: rows to begin with.
            without: (q,) for each query the position of a row that is no answer to it, or -1.
            tilt: of the orders; by default as calibrated.
        """
        sign = np.float32(1.0 if largest else -1.0)
        queries = coordinates(question).numpy() * sign
        orders = self._orders(largest)
        tilt = self._tilt(orders) if tilt is None else tilt
        total = question.count
        norms = np.linalg.norm(queries, axis=1)
        states = [
            _State(question.some(slice(q, q + 1)).scorer(self._layout, self._rows.device), norms[q], tilt)
            for q in range(total)
        ]
        found = Found(
            np.full((total, k), -1, dtype=np.int64),
            np.zeros((total, k), dtype=np.float32),
            np.zeros(total, dtype=np.int64),
            np.zeros(total, dtype=np.int64),
            np.zeros(total),
        )
        widen, pending = list(range(total)), list(range(total))
        wide = np.full(total, counts.wide)
        wanted: dict[int, np.ndarray] = {}
        first = True
        while pending:
            if widen:
                self._widen(states, widen, queries, wide, tilt, without, sign, found)
            if not self.narrows:
                wanted = {q: states[q].unscored() for q in pending}
            elif first:
                wanted = {q: states[q].first(counts.deep) for q in pending}
            first = False
            self._score_exactly([states[q] for q in pending], [wanted[q] for q in pending], sign, found)
            began = time.perf_counter()
            wanted, widen = {}, []
            for q in pending:
                state = states[q]
                best = state.best(k)
                found.positions[q, : len(best)] = state.positions[state.deep[best]]
                found.scores[q, : len(best)] = state.exact[best] * sign
                found.candidates[q], found.proposed[q] = len(state.deep), len(state.positions)
                if not len(best):
                    continue
                missed = expected_missed(state.seen(self._layout.codes is not None), float(state.exact[best[-1]]))
                seen = missed.recall(k)
                found.recall[q] = (orders.corrected(seen, k) if orders else seen) * len(best) / k
                lost = 1.0 - found.recall[q]
                if lost <= 1.0 - recall or recall == 0:
                    continue
                # Of what may be lost in the end, half may be lost among the proposed rows.
                share = 0.5 * (1.0 - recall) / lost
                likely = missed.likely(share * (missed.unproposed + missed.unscored))
                within = missed.unscored if len(likely) else 0.0
                if missed.unproposed >= within and wide[q] < self.limit and not state.complete:
                    wide[q] = min(2 * wide[q], self.limit)
                    widen.append(q)
                    wanted[q] = likely
                elif len(likely):
                    wanted[q] = likely
            pending = list(wanted)
            found.seconds["check"] += time.perf_counter() - began
        return found

    def _widen(
        self,
        states: list[_State],
        chosen: list[int],
        queries: np.ndarray,
        wide: np.ndarray,
        tilt: float,
        without: np.ndarray | None,
        sign: np.float32,
        found: Found,
    ) -> None:
        """Proposes to the chosen queries so many rows as `wide` has for them, less those that they know already."""
        began = time.perf_counter()
        positions, coarse = self._coarse.search(queries[chosen], int(wide[chosen].max()), tilt)
        found.seconds["coarse"] += time.perf_counter() - began
        for q, row, scores in zip(chosen, positions, coarse, strict=True):
            row, scores = row[: wide[q]], scores[: wide[q]]
            # An index of inverted lists may find fewer than asked for: -1 marks the end.
            good = row >= 0
            states[q].complete = int(good.sum()) == len(self._rows)
            if without is not None:
                good &= row != without[q]
            self._propose(states[q], row[good], scores[good], sign, found)

    def order(self, question: Question, count: int, tilt: float, *, largest: bool) -> np.ndarray:
        """(q, count) positions in coarse order."""
        sign = np.float32(1.0 if largest else -1.0)
        return self._coarse.search(coordinates(question).numpy() * sign, count, tilt)[0]

    def coarse_only(self, question: Question, k: int, *, largest: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The k best by coarse score: positions, approximate scores (q, k), and the recall learnt for that."""
        sign = np.float32(1.0 if largest else -1.0)
        positions, scores = self._coarse.search(coordinates(question).numpy() * sign, k)
        orders = self._orders(largest)
        return positions, scores * sign, orders.recall_alone(k) if orders else float("nan")

    def by_coordinates(self, question: Question, positions: np.ndarray, tilt: float, *, largest: bool) -> np.ndarray:
        """(m,) float32: place in the order by coordinates, as scores, of rows at some positions for one query."""
        scorer = question.scorer(self._layout, self._rows.device)
        scores, norms, _ = self._by_coordinates(scorer, positions)
        return tilted(scores[None] * (1 if largest else -1), coordinates(question).numpy(), norms, tilt)[0]

    def _by_coordinates(self, scorer: Scorer, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """(m,) float32 scores by coordinates, (m,) norms of those, and the bytes that were read for it."""
        order = np.argsort(positions)
        codes, read = self._rows.codes(positions[order])
        scores, norms = np.empty(len(positions), dtype=np.float32), np.empty(len(positions), dtype=np.float32)
        scores[order] = scorer.score_codes(codes)[0].cpu().numpy()
        norms[order] = self._layout.codes.norms(codes).cpu().numpy()  # type: ignore[union-attr]
        return scores, norms, read

    def _tilt(self, orders: Orders | None) -> float:
        if not self._coarse.tilts:
            return 0.0
        return _GUESSED_TILT if orders is None else orders.tilt

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
        fine, size = coarse, np.ones_like(coarse)
        if self._layout.codes is not None and len(positions):
            fine, norms, read = self._by_coordinates(state.scorer, positions)
            fine *= sign
            size = state.norm * norms
            found.bytes_read += read
        state.propose(positions, coarse, fine, size)
        found.seconds["narrow"] += time.perf_counter() - began

    def _score_exactly(self, states: list[_State], wanted: list[np.ndarray], sign: np.float32, found: Found) -> None:
        """Exact scores of rows at some places of each query; rows are read once, in rising order, a block at a time."""
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

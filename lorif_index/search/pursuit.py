"""Pursuit: one search for some queries. Propose, narrow, score exactly, see what was missed; go on if it is too much.

Three orders, each of fewer rows and nearer to the exact one: the coarse code proposes the widest set; the stored
coordinates narrow it; the factors of what is left are read by position and scored by the same scorer as a full scan.
Rows that several queries share are read once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ..errors import NonFiniteError, QueryError
from .calibration import Orders
from .missed import Missed, Seen, expected_missed
from .rescoring import Each, Rescorer
from .scoring import Question, Scorer

# Where a search itself sees less than this share of what may be lost, more rows would be taken blindly.
_LEAST_LOSS = 0.25


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


@dataclass(frozen=True)
class Counts:
    """How many rows a search takes per query: `wide` by coarse order, `deep` of those scored exactly."""

    wide: int
    deep: int


@dataclass
class Found:
    """What a search by candidates found.

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

    @classmethod
    def nothing(cls, queries: int, k: int) -> Found:
        """Room for the answers."""
        none = np.zeros(queries, dtype=np.int64)
        positions, scores = np.full((queries, k), -1, dtype=np.int64), np.zeros((queries, k), dtype=np.float32)
        return cls(positions, scores, none, none.copy(), np.zeros(queries))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time taken inside to a stage."""
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def coordinates(question: Question) -> torch.Tensor:
    """A question's coordinates (q, k), which the coarse index compares with.

    Raises:
        QueryError: it has none.
    """
    if question.x is None:
        raise QueryError("the index has no sketch, so that it cannot propose candidates: pass exact=True")
    return question.x


class _State:
    """What is known of one query; scores have their sign turned so that large is wanted.

    `coarse` is tilted; `fine`, the score by coordinates, is not. `size` is |x| |z|, or 1 where z is not known. `wide`
    rows are to be proposed, `wider` while they are not; `complete` where every row is.
    """

    def __init__(self, scorer: Scorer, norm: float, tilt: float, wide: int) -> None:
        self.scorer = scorer
        self.norm, self.tilt = np.float32(norm), np.float32(tilt)
        self.wide, self.wider, self.complete = wide, True, False
        self.positions = np.empty(0, dtype=np.int64)
        self.coarse = np.empty(0, dtype=np.float32)
        self.fine = np.empty(0, dtype=np.float32)
        self.size = np.empty(0, dtype=np.float32)
        self.deep = np.empty(0, dtype=np.int64)
        self.exact = np.empty(0, dtype=np.float32)

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

    def missed(self, worst: int, coordinates: bool) -> Missed:
        """What the search has missed, `worst` being the last of the k best.

        Raises:
            NonFiniteError: scores are inf or NaN.
        """
        if not all(np.isfinite(part).all() for part in (self.coarse, self.fine, self.size, self.exact)):
            raise NonFiniteError(
                "scores of candidates are inf or NaN: the query's gradients are too large, or what the index was "
                "fitted with is damaged (index.verify() tells)"
            )
        order = self.order
        if not coordinates:
            # The coarse order stands for exact scores, which are known of every row proposed.
            order = np.empty_like(self.coarse)
            order[self.deep] = self.exact
        seen = Seen(self.coarse, order, self.fine, self.size, self.deep, self.exact, self.complete)
        return expected_missed(seen, float(self.exact[worst]))


class Pursuit:
    """The k best rows of each query.

    Args:
        rows: scores the index's rows.
        coarse: what proposes candidates, over their coordinates.
        question: the queries, with coordinates.
        k: at most the number of rows.
        largest: the largest scores, or the smallest.
        limit: most rows to propose for a query.
        orders: what was learnt of estimates, or None.
        tilt: of the orders.
        without: (q,) for each query the position of a row that is no answer to it, or -1.
    """

    def __init__(
        self,
        rows: Rescorer,
        coarse: Proposer,
        question: Question,
        *,
        k: int,
        largest: bool,
        limit: int,
        orders: Orders | None,
        tilt: float,
        without: np.ndarray | None = None,
    ) -> None:
        self._rows, self._layout, self._coarse = rows, rows.layout, coarse
        self._question, self._k, self._limit = question, k, limit
        self._orders, self._tilt, self._without = orders, tilt, without
        self._sign = np.float32(1.0 if largest else -1.0)
        self._queries = coordinates(question).numpy() * self._sign
        self._found = Found.nothing(question.count, k)

    def run(self, counts: Counts, recall: float) -> Found:
        """Searches.

        Args:
            counts: rows to begin with.
            recall: wanted, in (0, 1]; 0 never goes on.
        """
        found, question = self._found, self._question
        scorers = [
            question.some(slice(q, q + 1)).scorer(self._layout, self._rows.device) for q in range(question.count)
        ]
        norms = np.linalg.norm(self._queries, axis=1).tolist()
        self._states = [_State(scorer, n, self._tilt, counts.wide) for scorer, n in zip(scorers, norms, strict=True)]
        pending = list(range(len(self._states)))
        widen, wanted = pending, dict[int, np.ndarray]()
        first = True
        with _workers(len(pending), self._rows.device) as each:
            while pending:
                if widen:
                    self._widen(widen, each)
                if not self._layout.narrows:
                    wanted = {q: self._states[q].unscored() for q in pending}
                elif first:
                    best = each(lambda q: self._states[q].first(counts.deep), pending)
                    wanted, _ = self._rows.settled(dict(zip(pending, best, strict=True)), [])
                first = False
                self._score_exactly(wanted, each)
                with found.timed("check"):
                    further = zip(pending, each(lambda q: self._check(q, recall), pending), strict=True)
                    wanted = {q: places for q, places in further if places is not None}
                widths = [[q, self._states[q].wide, self._states[q].wider] for q in wanted]
                wanted, widths = self._rows.settled(wanted, widths)
                for q, wide, wider in widths:
                    self._states[q].wide, self._states[q].wider = wide, bool(wider)
                widen = [q for q in wanted if self._states[q].wider]
                pending = list(wanted)
        return found

    def _widen(self, chosen: list[int], each: Each) -> None:
        """Proposes rows to some queries, as many as they are to have, less those that they know already."""
        states = [self._states[q] for q in chosen]
        with self._found.timed("coarse"):
            most = max(state.wide for state in states)
            positions, coarse = self._coarse.search(self._queries[chosen], most, self._tilt)

        def known(i: int) -> tuple[np.ndarray, np.ndarray]:
            state, row, scores = states[i], positions[i, : states[i].wide], coarse[i, : states[i].wide]
            # An index of inverted lists may find fewer than asked for: -1 marks the end.
            good = row >= 0
            state.complete, state.wider = int(good.sum()) == self._rows.live_count, False
            if self._without is not None:
                good &= row != self._without[chosen[i]]
            if len(state.positions):
                # Equal coarse scores may come in another order the second time: what is known is told by position.
                good &= ~np.isin(row, state.positions)
            return row[good], scores[good]

        with self._found.timed("narrow"):
            fresh = each(known, range(len(chosen)))
            fine = [(scores, np.ones_like(scores)) for _, scores in fresh]
            if self._layout.codes is not None:
                asked = [(state.scorer, row) for state, (row, _) in zip(states, fresh, strict=True)]
                scored, read = self._rows.by_codes(asked, each)
                self._found.bytes_read += read
                fine = [(s[:, 0] * self._sign, state.norm * s[:, 1]) for state, s in zip(states, scored, strict=True)]
            for state, (row, scores), (exacter, size) in zip(states, fresh, fine, strict=True):
                state.propose(row, scores, exacter, size)

    def _score_exactly(self, wanted: dict[int, np.ndarray], each: Each) -> None:
        """Exact scores of rows at some places of each query."""
        states = [self._states[q] for q in wanted]
        if not self._layout.width:
            # Coordinates are all that is stored: their scores are the exact ones.
            for state, places in zip(states, wanted.values(), strict=True):
                state.score(places, state.fine[places])
            return
        # Each query's places in rising order of their positions.
        risen = [p[np.argsort(state.positions[p])] for state, p in zip(states, wanted.values(), strict=True)]
        asked = [(state.scorer, state.positions[places]) for state, places in zip(states, risen, strict=True)]
        scores, read = self._rows.exactly(asked, each, self._found.timed)
        self._found.bytes_read += read
        for state, places, out in zip(states, risen, scores, strict=True):
            # Sums in the same order as a scan's: factors, then coordinates.
            fine = state.fine[places] if self._layout.codes is not None else np.float32(0.0)
            state.score(places, out * self._sign + fine)

    def _check(self, q: int, recall: float) -> np.ndarray | None:
        """Notes a query's answers and their estimated recall.

        Returns:
            None where that is enough; else places to score exactly next (there may be none), the query's `wide` being
            doubled where more rows must be proposed.
        """
        state, found, k = self._states[q], self._found, self._k
        best = state.best(k)
        found.positions[q, : len(best)] = state.positions[state.deep[best]]
        found.scores[q, : len(best)] = state.exact[best] * self._sign
        found.candidates[q], found.proposed[q] = len(state.deep), len(state.positions)
        if not len(best):
            return None
        missed = state.missed(int(best[-1]), self._layout.codes is not None)
        estimate = missed.recall(k)
        estimate = self._orders.corrected(estimate, k) if self._orders else estimate
        found.recall[q] = estimate * len(best) / k
        lost, total = 1.0 - found.recall[q], missed.unproposed + missed.unscored
        blind = total < _LEAST_LOSS * (1.0 - recall) * k and len(best) == k
        if recall == 0 or lost <= 1.0 - recall or blind:
            return None
        # Of what may be lost in the end, half may be lost among the proposed rows.
        likely = missed.likely(0.5 * (1.0 - recall) / lost * total)
        if missed.unproposed >= (missed.unscored if len(likely) else 0.0) and self._may_widen(state):
            state.wide, state.wider = min(2 * state.wide, self._limit), True
            return likely
        return likely if len(likely) else None

    def _may_widen(self, state: _State) -> bool:
        return state.wide < self._limit and not state.complete


@contextmanager
def _workers(count: int, device: torch.device) -> Iterator[Each]:
    """Does something for each query: by as many threads as torch has, where there are several queries."""
    threads = min(torch.get_num_threads(), count) if device.type == "cpu" else 1
    if threads < 2:
        yield lambda function, items: [function(item) for item in items]
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="lorif-query") as pool:
        yield lambda function, items: list(pool.map(function, items))

"""Pursuit: one search for some queries. Propose, score exactly, see what was missed; go on if it is too much.

The coarse order proposes rows; these are read by position and scored by the same scorer as a full scan. Rows that
several queries share are read once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ..codecs.base import Scorer
from ..errors import NonFiniteError, QueryError
from .calibration import Orders
from .missed import expected_missed
from .proposers import Proposer
from .rescoring import Each, Rescorer
from .scoring import Question

# Where a search itself sees less than this share of what may be lost, more rows would be taken blindly.
_LEAST_LOSS = 0.25


@dataclass
class Pursued:
    """What a search by candidates found.

    Attributes:
        positions: (q, k) int64, best first.
        scores: (q, k) float32.
        candidates: (q,) rows scored exactly for each query.
        recall: (q,) estimated.
        bytes_read: from the shards.
        seconds: by stage.
    """

    positions: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray
    recall: np.ndarray
    bytes_read: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"coarse": 0.0, "gather": 0.0, "rescore": 0.0, "check": 0.0}
    )

    @classmethod
    def nothing(cls, queries: int, k: int) -> Pursued:
        """Room for the answers."""
        positions, scores = np.full((queries, k), -1, dtype=np.int64), np.zeros((queries, k), dtype=np.float32)
        return cls(positions, scores, np.zeros(queries, dtype=np.int64), np.zeros(queries))

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

    `coarse` is tilted. `wide` rows are to be proposed; `complete` where every row is.
    """

    def __init__(self, scorer: Scorer, wide: int) -> None:
        self.scorer, self.wide, self.complete = scorer, wide, False
        self.positions = np.empty(0, dtype=np.int64)
        self.coarse = np.empty(0, dtype=np.float32)
        self.exact = np.empty(0, dtype=np.float32)

    def best(self, k: int) -> np.ndarray:
        """Which rows are the k best, best first; ties go to the earlier row, as in a scan."""
        return np.lexsort((self.positions, -self.exact))[:k]

    def missed(self, worst: int) -> float:
        """How many answers the search has missed, `worst` being the last of the k best.

        Raises:
            NonFiniteError: scores are inf or NaN.
        """
        if not (np.isfinite(self.coarse).all() and np.isfinite(self.exact).all()):
            raise NonFiniteError(
                "scores of candidates are inf or NaN: the query's gradients are too large, or what the index was "
                "fitted with is damaged (index.verify() tells)"
            )
        return 0.0 if self.complete else expected_missed(self.coarse, self.exact, float(self.exact[worst]))


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
        tilt: of the coarse order.
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
        self._rows, self._coarse = rows, coarse
        self._question, self._k, self._limit = question, k, limit
        self._orders, self._tilt, self._without = orders, tilt, without
        self._sign = np.float32(1.0 if largest else -1.0)
        self._queries = coordinates(question).numpy() * self._sign
        self._found = Pursued.nothing(question.count, k)

    def run(self, wide: int, recall: float) -> Pursued:
        """Searches.

        Args:
            wide: rows to propose for each query to begin with.
            recall: wanted, in (0, 1]; 0 never goes on.
        """
        question, codec, device = self._question, self._rows.codec, self._rows.device
        singles = (question.some(slice(q, q + 1)).parts for q in range(question.count))
        self._states = [_State(codec.scorer(parts, device), wide) for parts in singles]
        pending = list(range(question.count))
        with _workers(len(pending), device) as each:
            while pending:
                self._widen(pending, each)
                with self._found.timed("check"):
                    wider = [
                        q
                        for q, more in zip(pending, each(lambda q: self._check(q, recall), pending), strict=True)
                        if more
                    ]
                pending = self._rows.settled(wider)
                for q in pending:
                    self._states[q].wide = min(2 * self._states[q].wide, self._limit)
        return self._found

    def _widen(self, chosen: list[int], each: Each) -> None:
        """Proposes rows to some queries, as many as they are to have, and scores those that they do not know yet."""
        states = [self._states[q] for q in chosen]
        with self._found.timed("coarse"):
            most = max(state.wide for state in states)
            positions, coarse = self._coarse.search(self._queries[chosen], most, self._tilt)

            def fresh(i: int) -> tuple[np.ndarray, np.ndarray]:
                state, row, scores = states[i], positions[i, : states[i].wide], coarse[i, : states[i].wide]
                # -1 marks the end where there are fewer rows.
                good = row >= 0
                state.complete = int(good.sum()) == self._rows.live_count
                if self._without is not None:
                    good &= row != self._without[chosen[i]]
                if len(state.positions):
                    # Equal coarse scores may come in another order the second time: what is known is told by position.
                    good &= ~np.isin(row, state.positions)
                order = np.argsort(row[good])
                return row[good][order], scores[good][order]

            new = each(fresh, range(len(chosen)))
        wanted = [(state.scorer, row) for state, (row, _) in zip(states, new, strict=True)]
        scores, read = self._rows.exactly(wanted, each, self._found.timed)
        self._found.bytes_read += read
        for state, (row, approximate), exact in zip(states, new, scores, strict=True):
            state.positions = np.concatenate([state.positions, row])
            state.coarse = np.concatenate([state.coarse, approximate])
            state.exact = np.concatenate([state.exact, exact * self._sign])

    def _check(self, q: int, recall: float) -> bool:
        """Notes a query's answers and their estimated recall; whether more rows must be proposed."""
        state, found, k = self._states[q], self._found, self._k
        best = state.best(k)
        found.positions[q, : len(best)] = state.positions[best]
        found.scores[q, : len(best)] = state.exact[best] * self._sign
        found.candidates[q] = len(state.positions)
        if not len(best):
            return False
        missed = state.missed(int(best[-1]))
        estimate = k / (k + missed)
        if self._orders is not None and not state.complete:
            estimate = min(self._orders.corrected(estimate, k), self._orders.at_most(k, state.wide))
        found.recall[q] = estimate * len(best) / k
        blind = missed < _LEAST_LOSS * (1.0 - recall) * k and len(best) == k
        if recall == 0 or found.recall[q] >= recall or blind:
            return False
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

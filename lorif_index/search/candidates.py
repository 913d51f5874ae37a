"""Candidates: how a search by candidates begins, by what calibration learnt, and the order calibration looks at."""

from __future__ import annotations

import numpy as np

from ..codecs.base import RowCodec
from .calibration import SIGNS, Calibration, Orders
from .proposers import Proposer
from .pursuit import Pursued, Pursuit, coordinates
from .rescoring import Rescorer
from .scoring import Question

_FIRST_GUESS, _GUESSED_TILT = 1000, 0.05
# Queries searched for together, at most, and what their scorers may take.
_TOGETHER, _SCORERS_BYTES = 128, 256 << 20
_LEAST_WIDE, _LEAST_LIMIT = 256, 20_000
# A quarter of a million rows, which is as far as `bench.search_at_scale` has followed: calibration, which looks at that
# many for each of its queries, would else take memory by N.
_MOST_LIMIT = 1 << 18


def most_proposed(rows: int) -> int:
    """Rows that are proposed for a query at most, of so many; beyond, a scan is the better way."""
    return min(max(min(rows // 4, _MOST_LIMIT), _LEAST_LIMIT), rows)


def guessed(k: int) -> int:
    """Rows to propose where nothing was calibrated."""
    return max(2 * _FIRST_GUESS, 40 * k)


class CandidateSearch:
    """Coarse search and exact rescoring over one index.

    Args:
        rows: scores the index's rows.
        coarse: what proposes candidates, over their coordinates.
        calibration: what was learnt, or None.
    """

    def __init__(self, rows: Rescorer, coarse: Proposer, calibration: Calibration | None) -> None:
        self._rows = rows
        self._coarse = coarse
        self.calibration = calibration

    @property
    def limit(self) -> int:
        """Most rows proposed for a query; beyond, a scan is the better way."""
        return most_proposed(len(self._rows))

    @property
    def codec(self) -> RowCodec:
        """Of the rows."""
        return self._rows.codec

    @property
    def together(self) -> int:
        """How many queries to search for at the same time: bounds memory."""
        return min(max(_SCORERS_BYTES // max(self.codec.query_bytes, 1), 1), _TOGETHER)

    @property
    def tilts(self) -> bool:
        """Whether the order can be tilted."""
        return self._coarse.tilts

    def reaches(self, k: int, recall: float, *, largest: bool) -> bool:
        """Whether calibration knows a number of candidates for that recall; True where nothing was calibrated."""
        orders = self._orders(largest)
        return orders is None or orders.needed(k, recall) is not None

    def first_count(self, k: int, recall: float, *, largest: bool) -> int:
        """How many rows to propose to begin with: as calibrated, or a guess."""
        return self.count_by(self._orders(largest), k, recall)

    def count_by(self, orders: Orders | None, k: int, recall: float) -> int:
        """The same by given tables."""
        wide = guessed(k) if orders is None else orders.needed(k, recall) or self.limit
        return min(max(wide, 2 * k, _LEAST_WIDE), self.limit)

    def run(self, question: Question, k: int, recall: float, *, largest: bool, wide: int) -> Pursued:
        """Searches for the k best rows of each query, going on while the recall estimated is less than that wanted."""
        orders = self._orders(largest)
        tilt = 0.0 if not self.tilts else _GUESSED_TILT if orders is None else orders.tilt
        pursuit = Pursuit(
            self._rows, self._coarse, question, k=k, largest=largest, limit=self.limit, orders=orders, tilt=tilt
        )
        return pursuit.run(wide, recall)

    def trial(
        self, question: Question, k: int, *, largest: bool, wide: int, tilt: float, without: np.ndarray
    ) -> Pursued:
        """A search that proposes so many rows and no more, with raw estimates; `without` as in `Pursuit`."""
        pursuit = Pursuit(
            self._rows,
            self._coarse,
            question,
            k=k,
            largest=largest,
            limit=self.limit,
            orders=None,
            tilt=tilt,
            without=without,
        )
        return pursuit.run(wide, 0.0)

    def order(self, question: Question, count: int, tilt: float, *, largest: bool) -> np.ndarray:
        """(q, count) positions in coarse order."""
        sign = np.float32(1.0 if largest else -1.0)
        return self._coarse.search(coordinates(question).numpy() * sign, count, tilt)[0]

    def coarse_only(self, question: Question, k: int, *, largest: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The k best by coarse score: positions, approximate scores (q, k), and the recall learnt for that."""
        sign = np.float32(1.0 if largest else -1.0)
        positions, scores = self._coarse.search(coordinates(question).numpy() * sign, k)
        # Codes are few: of equal scores the earlier row comes first, however many ranks have searched.
        order = np.lexsort((positions, -scores), axis=1)
        positions, scores = np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1)
        orders = self._orders(largest)
        return positions, scores * sign, orders.recall_alone(k) if orders else float("nan")

    def _orders(self, largest: bool) -> Orders | None:
        return self.calibration.orders[SIGNS[0] if largest else SIGNS[1]] if self.calibration else None

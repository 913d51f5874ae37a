"""Candidates: how a search by candidates begins, by what calibration learnt, and the orders calibration looks at."""

from __future__ import annotations

import numpy as np

from ..codecs.layout import RowLayout
from .calibration import SIGNS, Calibration, Orders
from .coarse import tilted
from .pursuit import Counts, Found, Proposer, Pursuit, coordinates
from .rescoring import Rescorer
from .scoring import Question

_FIRST_GUESS, _GUESSED_TILT = 1000, 0.05
# Queries searched for together, at most, and what their scorers may take.
_TOGETHER, _SCORERS_BYTES = 128, 256 << 20
_LEAST_WIDE, _LEAST_DEEP, _LEAST_LIMIT = 256, 64, 20_000
# A quarter of a million rows, which is as far as `bench.search_at_scale` has followed: calibration, which looks at that
# many for each of its queries, would else take memory by N.
_MOST_LIMIT = 1 << 18


def most_proposed(rows: int) -> int:
    """Rows that are proposed for a query at most, of so many; beyond, a scan is the better way."""
    return min(max(min(rows // 4, _MOST_LIMIT), _LEAST_LIMIT), rows)


def guessed(k: int) -> tuple[int, int]:
    """Rows to propose, and to score exactly, where nothing was calibrated."""
    return max(2 * _FIRST_GUESS, 40 * k), max(_FIRST_GUESS, 20 * k)


class CandidateSearch:
    """Coarse search, narrowing and exact rescoring over one index.

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
    def layout(self) -> RowLayout:
        """Of the rows."""
        return self._rows.layout

    @property
    def together(self) -> int:
        """How many queries to search for at the same time: bounds memory."""
        eigen = self.layout.eigen
        each = 0 if eigen is None else eigen.query_bytes
        return min(max(_SCORERS_BYTES // max(each, 1), 1), _TOGETHER)

    @property
    def tilts(self) -> bool:
        """Whether the order can be tilted."""
        return self._coarse.tilts

    def reaches(self, k: int, recall: float, *, largest: bool) -> bool:
        """Whether calibration knows a number of candidates for that recall; True where nothing was calibrated."""
        orders = self._orders(largest)
        return orders is None or orders.needed(k, recall) is not None

    def first_counts(self, k: int, recall: float, *, largest: bool) -> Counts:
        """How many rows to begin with: as calibrated, or a guess."""
        return self.counts_by(self._orders(largest), k, recall)

    def counts_by(self, orders: Orders | None, k: int, recall: float) -> Counts:
        """The same by given tables."""
        if orders is None:
            wide, deep = guessed(k)
        else:
            wide, deep = orders.needed(k, recall) or (self.limit, self.limit)
        wide = min(max(wide, 2 * k, _LEAST_WIDE), self.limit)
        return Counts(wide, min(max(deep, k + k // 4, _LEAST_DEEP), wide) if self.layout.narrows else wide)

    def run(self, question: Question, k: int, recall: float, *, largest: bool, counts: Counts) -> Found:
        """Searches for the k best rows of each query, going on while the recall estimated is less than that wanted."""
        orders = self._orders(largest)
        tilt = 0.0 if not self.tilts else _GUESSED_TILT if orders is None else orders.tilt
        pursuit = Pursuit(
            self._rows, self._coarse, question, k=k, largest=largest, limit=self.limit, orders=orders, tilt=tilt
        )
        return pursuit.run(counts, recall)

    def trial(
        self, question: Question, k: int, *, largest: bool, counts: Counts, tilt: float, without: np.ndarray
    ) -> Found:
        """A search that takes these counts and no more, with raw estimates; `without` as in `Pursuit`."""
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
        return pursuit.run(counts, 0.0)

    def order(self, question: Question, count: int, tilt: float, *, largest: bool) -> np.ndarray:
        """(q, count) positions in coarse order."""
        sign = np.float32(1.0 if largest else -1.0)
        return self._coarse.search(coordinates(question).numpy() * sign, count, tilt)[0]

    def by_coordinates(self, question: Question, positions: np.ndarray, tilt: float, *, largest: bool) -> np.ndarray:
        """(m,) float32: place in the order by coordinates, as scores, of rows at some positions for one query."""
        asked = [(question.scorer(self.layout, self._rows.device), positions)]
        (found,), _ = self._rows.by_codes(asked, lambda function, items: [function(item) for item in items])
        signed = found[None, :, 0] * np.float32(1 if largest else -1)
        return tilted(signed, coordinates(question).numpy(), found[:, 1], tilt)[0]

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

"""Calibration: how many candidates a recall takes, learnt from queries with known answers, and an estimate at search.

The coarse order is an approximation of the exact one. From queries whose exact answers were found by a full scan, the
coarse ranks of those answers give T(k, recall), the candidates after which that share of the k best is among them. At
a search the candidates' own errors tell how many of the rest may have been missed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .errors import CorruptionError

KS = (1, 3, 10, 30, 100, 300, 1000)
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999)
SIGNS = ("proponents", "opponents")


@dataclass(frozen=True)
class Table:
    """What was learnt of one order of the rows.

    Attributes:
        ks: answers asked for, rising.
        targets: recalls, rising.
        candidates: [k][target] -> T, or None where no number up to the limit reached it.
        alone: [k] -> recall of that order alone: the share of the k best among its own k best.
    """

    ks: tuple[int, ...]
    targets: tuple[float, ...]
    candidates: tuple[tuple[int | None, ...], ...]
    alone: tuple[float, ...]

    def needed(self, k: int, recall: float) -> int | None:
        """T(k, recall): of the next larger k and recall that were calibrated; None: beyond what was."""
        row = next((i for i, known in enumerate(self.ks) if known >= k), None)
        column = next((j for j, target in enumerate(self.targets) if target >= recall - 1e-9), None)
        if row is None or column is None:
            return None
        found = self.candidates[row][column]
        return None if found is None else max(found, k)

    def recall_alone(self, k: int) -> float:
        """Recall of the order alone."""
        return float(np.interp(math.log(k), np.log(self.ks), self.alone))

    @classmethod
    def from_json(cls, data: Any) -> Table:
        """The inverse of `dataclasses.asdict`; ValueError, KeyError or TypeError where it cannot be."""
        table = cls(
            tuple(map(int, data["ks"])),
            tuple(map(float, data["targets"])),
            tuple(tuple(None if v is None else int(v) for v in row) for row in data["candidates"]),
            tuple(map(float, data["alone"])),
        )
        rows = {len(table.candidates), len(table.alone)}
        if not table.ks or rows != {len(table.ks)} or {len(row) for row in table.candidates} != {len(table.targets)}:
            raise ValueError("a table of the wrong form")
        return table


@dataclass(frozen=True)
class Orders:
    """What was learnt for one sign.

    Attributes:
        coarse: of the coarse index's order.
        fine: of the order by stored coordinates, where factors are scored after them; else None.
        scale, power: what is really lost of an answer is about scale * (what is estimated to be lost) ^ power.
    """

    coarse: Table
    fine: Table | None
    scale: float = 1.0
    power: float = 1.0

    def corrected(self, recall: float) -> float:
        """An estimated recall, by what was learnt of such estimates."""
        return 1.0 - min(self.scale * (1.0 - recall) ** self.power, 1.0)

    def needed(self, k: int, recall: float) -> tuple[int | None, int | None]:
        """Candidates by coarse order, and how many of those by fine order, that reach the recall together.

        With two orders each may lose half of what may be lost.
        """
        if self.fine is None:
            found = self.coarse.needed(k, recall)
            return found, found
        each = 1.0 - (1.0 - recall) / 2.0
        return self.coarse.needed(k, each), self.fine.needed(k, each)


@dataclass(frozen=True)
class Calibration:
    """What was learnt for proponents and opponents.

    Attributes:
        orders: sign -> tables.
        queries: how many queries it was learnt from.
        rows: the index's rows when it was learnt.
        limit: most candidates that were looked at.
        damping: that of the calibration's scores, as JSON.
    """

    orders: Mapping[str, Orders]
    queries: int
    rows: int
    limit: int
    damping: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "orders": {sign: asdict(orders) for sign, orders in self.orders.items()},
            "queries": self.queries,
            "rows": self.rows,
            "limit": self.limit,
            "damping": self.damping,
        }

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """From the manifest.

        Raises:
            CorruptionError: missing fields or wrong forms.
        """
        try:
            orders = {
                sign: Orders(
                    Table.from_json(data["orders"][sign]["coarse"]),
                    None if data["orders"][sign]["fine"] is None else Table.from_json(data["orders"][sign]["fine"]),
                    float(data["orders"][sign]["scale"]),
                    float(data["orders"][sign]["power"]),
                )
                for sign in SIGNS
            }
            return cls(orders, int(data["queries"]), int(data["rows"]), int(data["limit"]), dict(data["damping"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"the manifest's calibration is not as expected: {error!r}") from None


def learn(ranks: np.ndarray, limit: int) -> Table:
    """The table of one sign.

    Args:
        ranks: (q, m) int64: coarse rank of each query's exact answers, best answer first; `limit` or more where the
            coarse order up to `limit` does not have it.
        limit: how far the coarse order was followed.

    T is the least number at which the mean recall over the queries, less its standard error, reaches the target.
    """
    queries, most = ranks.shape
    ks = tuple(k for k in KS if k <= most) or (most,)
    steps = np.unique(np.geomspace(1, max(limit, 1), 400).astype(np.int64))
    candidates, alone = [], []
    for k in ks:
        # (q, steps): recall of each query after each number of candidates.
        order = np.sort(ranks[:, :k], axis=1)
        recall = np.stack([np.searchsorted(row, steps, side="left") for row in order]) / k
        mean = recall.mean(axis=0)
        error = recall.std(axis=0, ddof=1) / math.sqrt(queries) if queries > 1 else np.zeros_like(mean)
        # What is left over counts even where the error is 0 because all queries agree.
        sure = np.where(mean >= 1.0, 1.0, mean - error)
        reached = [np.flatnonzero(sure >= target - 1e-9) for target in TARGETS]
        candidates.append(tuple(int(steps[r[0]]) if len(r) else None for r in reached))
        alone.append(float((ranks[:, :k] < k).mean()))
    return Table(ks, TARGETS, tuple(candidates), tuple(alone))


def learn_correction(estimated: np.ndarray, lost: np.ndarray, least: np.ndarray) -> tuple[float, float]:
    """Scale and power from pairs of mean losses, estimated and real, at several depths; a line between logarithms.

    Args:
        estimated, lost: (m,) means over the calibration queries.
        least: (m,) the smallest loss that those queries could have shown; half of it stands for none.
    """
    seen = estimated > 0
    if seen.sum() < 2:
        return 1.0, 1.0
    x, y = np.log(estimated[seen]), np.log(np.maximum(lost[seen], least[seen] / 2))
    spread = float(np.square(x - x.mean()).sum())
    power = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 1.0
    power = min(max(power, 0.25), 2.0)
    return float(np.exp(y.mean() - power * x.mean())), power


@dataclass(frozen=True)
class Seen:
    """What a search has seen of one query; signs such that large is wanted.

    Attributes:
        coarse, fine: (w,) coarse scores and scores by coordinates of the rows proposed; the same where there are no
            coordinates.
        deep: (d,) places among those w whose exact scores are known: the best by fine score.
        exact: (d,) exact scores.
        rest, weights: coarse scores of rows that were not proposed, and how many rows each stands for.
    """

    coarse: np.ndarray
    fine: np.ndarray
    deep: np.ndarray
    exact: np.ndarray
    rest: np.ndarray
    weights: np.ndarray


def expected_missed(seen: Seen, threshold: float) -> float:
    """How many rows without an exact score are expected to score above the threshold, the k-th best exact score found.

    The fine score is taken as a line in the coarse one plus residuals, the exact one as a line in the fine one plus
    residuals. Both are fitted on rows that were chosen by the line's own variable, so that the choice does not bias it.
    """
    to_fine, to_exact = _Line.fit(seen.coarse, seen.fine), _Line.fit(seen.fine[seen.deep], seen.exact)
    shallow = np.ones(len(seen.fine), dtype=bool)
    shallow[seen.deep] = False
    missed = float(_survival(threshold - to_exact.at(seen.fine[shallow]), to_exact.residuals).sum())
    if len(seen.rest):
        # One residual of either kind, paired in turn.
        turns = np.resize(to_exact.residuals, len(to_fine.residuals))
        residuals = to_exact.slope * to_fine.residuals + np.random.default_rng(0).permutation(turns)
        gap = threshold - to_exact.at(to_fine.at(seen.rest))
        missed += float((_survival(gap, residuals) * seen.weights).sum())
    return missed


@dataclass(frozen=True)
class _Line:
    middle_x: float
    middle_y: float
    slope: float
    residuals: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray) -> _Line:
        """Least squares."""
        x, y = x.astype(np.float64), y.astype(np.float64)
        middle_x, middle_y = float(x.mean()), float(y.mean())
        spread = float(np.square(x - middle_x).sum())
        slope = float(((x - middle_x) * (y - middle_y)).sum()) / spread if spread > 0 else 0.0
        return cls(middle_x, middle_y, slope, y - middle_y - slope * (x - middle_x))

    def at(self, x: np.ndarray) -> np.ndarray:
        return self.middle_y + self.slope * (x - self.middle_x)


def _survival(gap: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Chance that a residual exceeds each gap: the larger of the empirical and the normal one."""
    ordered = np.sort(residuals)
    sigma = float(ordered.std())
    empirical = 1.0 - np.searchsorted(ordered, gap, side="left") / len(ordered)
    if not sigma > 1e-12 * max(float(np.abs(gap).max(initial=0.0)), 1e-300):
        return empirical
    return np.maximum(empirical, torch.special.ndtr(torch.from_numpy(-gap / sigma)).numpy())


def recall_from_missed(k: int, missed: float) -> float:
    """Share of the k best that were found if `missed` rows outside score above the k-th best found."""
    return k / (k + missed) if missed > 0 else 1.0

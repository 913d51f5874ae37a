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
_POOLED = 10


@dataclass(frozen=True)
class Orders:
    """What was learnt for one sign, of the coarse order and of the order by coordinates after it.

    Attributes:
        ks: answers asked for, rising.
        targets: recalls, rising.
        wide: [k][target] -> rows to take by coarse order, or None where no number up to the limit reached the target.
        deep: [k][target] -> how many of those, by coordinates, to score exactly; as wide where there is one order.
        alone: [k] -> recall of the coarse order alone: the share of the k best among its own k best.
        scales: (k, mean estimated loss, real loss over it) of searches of several depths.
    """

    ks: tuple[int, ...]
    targets: tuple[float, ...]
    wide: tuple[tuple[int | None, ...], ...]
    deep: tuple[tuple[int | None, ...], ...]
    alone: tuple[float, ...]
    scales: tuple[tuple[int, float, float], ...] = ()

    def needed(self, k: int, recall: float) -> tuple[int, int] | None:
        """(wide, deep) of the next larger k and recall that were calibrated; None: beyond what was."""
        row = next((i for i, known in enumerate(self.ks) if known >= k), None)
        column = next((j for j, target in enumerate(self.targets) if target >= recall - 1e-9), None)
        if row is None or column is None:
            return None
        # A single best answer is a small sample of the queries' answers: what ten take, it is given too.
        rows = [i for i in range(row, len(self.ks)) if i == row or self.ks[i] <= _POOLED]
        wide = [w for i in rows if (w := self.wide[i][column]) is not None]
        deep = [d for i in rows if (d := self.deep[i][column]) is not None]
        if self.wide[row][column] is None or not wide or not deep:
            return None
        return max(*wide, k), max(*deep, k)

    def recall_alone(self, k: int) -> float:
        """Recall of the coarse order alone."""
        return float(np.interp(math.log(k), np.log(self.ks), self.alone))

    def corrected(self, estimate: float, k: int) -> float:
        """An estimated recall, by what was learnt of estimates of that size at the nearest k."""
        if not self.scales or estimate >= 1.0:
            return estimate
        nearest = min((s[0] for s in self.scales), key=lambda known: abs(math.log(known / k)))
        known = sorted((lost, scale) for at, lost, scale in self.scales if at == nearest)
        scale = np.interp(math.log(1.0 - estimate), np.log([x for x, _ in known]), np.log([y for _, y in known]))
        return 1.0 - min(math.exp(float(scale)) * (1.0 - estimate), 1.0)

    @classmethod
    def from_json(cls, data: Any) -> Orders:
        """The inverse of `dataclasses.asdict`; ValueError, KeyError or TypeError where it cannot be."""

        def counts(rows: Any) -> tuple[tuple[int | None, ...], ...]:
            return tuple(tuple(None if v is None else int(v) for v in row) for row in rows)

        made = cls(
            tuple(map(int, data["ks"])),
            tuple(map(float, data["targets"])),
            counts(data["wide"]),
            counts(data["deep"]),
            tuple(map(float, data["alone"])),
            tuple((int(k), float(target), float(scale)) for k, target, scale in data["scales"]),
        )
        lengths = {len(made.wide), len(made.deep), len(made.alone)}
        widths = {len(row) for row in (*made.wide, *made.deep)}
        if not made.ks or lengths != {len(made.ks)} or widths != {len(made.targets)}:
            raise ValueError("tables of the wrong form")
        return made


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
            orders = {sign: Orders.from_json(data["orders"][sign]) for sign in SIGNS}
            return cls(orders, int(data["queries"]), int(data["rows"]), int(data["limit"]), dict(data["damping"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptionError(f"the manifest's calibration is not as expected: {error!r}") from None


def learn(coarse: np.ndarray, fine: np.ndarray | None, limit: int) -> Orders:
    """What one sign's calibration queries say.

    Args:
        coarse: (q, m) int64: place in the coarse order of each query's exact answers, best answer first; `limit` or
            more where the coarse order up to `limit` does not have it.
        fine: the same in the order by coordinates, or None where there is none.
        limit: how far the coarse order was followed.

    Of all pairs (wide, deep) at which the mean recall over the queries, less its standard error, reaches the target,
    the cheapest.
    """
    queries, most = coarse.shape
    ks = tuple(k for k in KS if k <= most) or (most,)
    steps = np.unique(np.geomspace(1, max(limit, 1), 160).astype(np.int64))
    wide: list[list[int | None]] = []
    deep: list[list[int | None]] = []
    for k in ks:
        first = coarse[:, :k]
        second = first if fine is None else fine[:, :k]
        found: list[tuple[int, int] | None] = [None] * len(TARGETS)
        for d in steps.tolist():
            # Answers that d exact scores reach count by their place in the coarse order; the others are lost.
            places = np.sort(np.where(second < d, first, limit), axis=1)
            at = steps[steps >= d]
            recall = np.stack([np.searchsorted(row, at, side="left") for row in places]) / k
            mean = recall.mean(axis=0)
            error = recall.std(axis=0, ddof=1) / math.sqrt(queries) if queries > 1 else np.zeros_like(mean)
            sure = np.where(mean >= 1.0, 1.0, mean - error)
            for j, target in enumerate(TARGETS):
                reached = np.flatnonzero(sure >= target - 1e-9)
                if len(reached):
                    pair = (d, d) if fine is None else (int(at[reached[0]]), d)
                    if fine is None and int(at[reached[0]]) > d:
                        continue
                    if found[j] is None or _cost(*pair) < _cost(*found[j]):  # type: ignore[misc]
                        found[j] = pair
        wide.append([None if pair is None else pair[0] for pair in found])
        deep.append([None if pair is None else pair[1] for pair in found])
    alone = tuple(float((coarse[:, :k] < k).mean()) for k in ks)
    return Orders(ks, TARGETS, tuple(map(tuple, wide)), tuple(map(tuple, deep)), alone)


def _cost(wide: int, deep: int) -> float:
    """An exact score costs about ten scores by coordinates (measured at c = 4)."""
    return wide + 10.0 * deep


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

"""Calibration: how many candidates a recall takes, and what estimates of a recall are worth, learnt from queries with
known answers.

The coarse order is an approximation of the exact one. From queries whose exact answers were found by a full scan, the
coarse ranks of those answers give T(k, recall), the candidates after which that share of the k best is among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import CorruptionError

# Of answers or candidates: beyond any index's rows.
_MOST = 1 << 48
KS = (1, 3, 10, 30, 100, 300, 1000)
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999)
SIGNS = ("proponents", "opponents")
_POOLED = 10
_LEAST_LOSS, _GROUPS, _LEAST_GROUP = 1e-6, 12, 8


@dataclass(frozen=True)
class Orders:
    """What was learnt of the coarse order for one sign.

    Attributes:
        ks: answers asked for, rising.
        targets: recalls, rising.
        wide: [k][target] -> rows to propose, or None where no number up to the limit reached the target.
        alone: [k] -> recall of the coarse order alone: the share of the k best among its own k best.
        losses: (k, estimated loss, real loss) of searches of several depths, in groups of like estimates; the more was
            estimated, the more was lost.
        tilt: of the order, <x, z> + tilt |x| |z|.
    """

    ks: tuple[int, ...]
    targets: tuple[float, ...]
    wide: tuple[tuple[int | None, ...], ...]
    alone: tuple[float, ...]
    losses: tuple[tuple[int, float, float], ...] = ()
    tilt: float = 0.0

    def needed(self, k: int, recall: float) -> int | None:
        """Rows to propose at the next larger k and recall that were calibrated; None: beyond what was."""
        row = next((i for i, known in enumerate(self.ks) if known >= k), None)
        column = next((j for j, target in enumerate(self.targets) if target >= recall - 1e-9), None)
        if row is None or column is None or self.wide[row][column] is None:
            return None
        # A single best answer is a small sample of the queries' answers: what ten take, it is given too.
        rows = [i for i in range(row, len(self.ks)) if i == row or self.ks[i] <= _POOLED]
        return max(k, *(w for i in rows if (w := self.wide[i][column]) is not None))

    def recall_alone(self, k: int) -> float:
        """Recall of the coarse order alone."""
        return float(np.interp(math.log(k), np.log(self.ks), self.alone))

    def at_most(self, k: int, wide: int) -> float:
        """The least recall that calibration did not reach with so many rows: what an estimate may say at most. What a
        search sees of its own rows knows nothing of answers that the coarse order hides altogether."""
        row = next((i for i, known in enumerate(self.ks) if known >= k), len(self.ks) - 1)
        beyond = (t for t, w in zip(self.targets, self.wide[row], strict=True) if w is None or w > wide)
        return next(beyond, 1.0)

    def corrected(self, estimate: float, k: int) -> float:
        """An estimated recall, by what was really lost where estimates were of that size, at the nearest k."""
        if not self.losses:
            return estimate
        nearest = min((point[0] for point in self.losses), key=lambda known: abs(math.log(known / k)))
        known = [(math.log(lost), math.log(real / lost)) for at, lost, real in self.losses if at == nearest]
        lost = max(1.0 - estimate, _LEAST_LOSS)
        scale = np.interp(math.log(lost), [x for x, _ in known], [y for _, y in known])
        return 1.0 - min(math.exp(float(scale)) * lost, 1.0)

    @classmethod
    def from_json(cls, data: Any) -> Orders:
        """The inverse of `dataclasses.asdict`; ValueError, KeyError or TypeError where it cannot be."""

        def counts(rows: Any) -> tuple[tuple[int | None, ...], ...]:
            return tuple(tuple(None if v is None else int(v) for v in row) for row in rows)

        made = cls(
            tuple(map(int, data["ks"])),
            tuple(map(float, data["targets"])),
            counts(data["wide"]),
            tuple(map(float, data["alone"])),
            tuple((int(k), float(lost), float(real)) for k, lost, real in data["losses"]),
            float(data["tilt"]),
        )
        lengths = {len(made.wide), len(made.alone)}
        widths = {len(row) for row in made.wide}
        if not made.ks or lengths != {len(made.ks)} or widths != {len(made.targets)}:
            raise ValueError("tables of the wrong form")
        if not all(0 < k < _MOST for k in made.ks) or any(a >= b for a, b in pairwise(made.ks)):
            raise ValueError(f"numbers of answers {made.ks}")
        numbers = (*made.alone, *made.targets, made.tilt)
        if not all(map(math.isfinite, numbers)) or not all(
            v is None or 0 <= v < _MOST for row in made.wide for v in row
        ):
            raise ValueError("tables of no counts")
        if not all(k > 0 and 0 < lost <= 1 and 0 < real <= 1 for k, lost, real in made.losses):
            raise ValueError("losses outside of 0 to 1")
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
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptionError(f"the manifest's calibration is not as expected: {error!r}") from None


def learn(coarse: np.ndarray, limit: int) -> Orders:
    """What one sign's calibration queries say: the least number of rows at which the mean recall over the queries, less
    its standard error, reaches each target.

    Args:
        coarse: (q, m) int64: place in the coarse order of each query's exact answers, best answer first; `limit` or
            more where the coarse order up to `limit` does not have it.
        limit: how far the coarse order was followed.
    """
    queries, most = coarse.shape
    ks = tuple(k for k in KS if k <= most) or (most,)
    steps = np.unique(np.geomspace(1, max(limit, 1), 160).astype(np.int64))
    wide: list[tuple[int | None, ...]] = []
    for k in ks:
        places = np.sort(coarse[:, :k], axis=1)
        recall = np.stack([np.searchsorted(row, steps, side="left") for row in places]) / k
        mean = recall.mean(axis=0)
        error = recall.std(axis=0, ddof=1) / math.sqrt(queries) if queries > 1 else np.zeros_like(mean)
        sure = np.where(mean >= 1.0, 1.0, mean - error)
        reached = [np.flatnonzero(sure >= target - 1e-9) for target in TARGETS]
        wide.append(tuple(int(steps[found[0]]) if len(found) else None for found in reached))
    alone = tuple(float((coarse[:, :k] < k).mean()) for k in ks)
    return Orders(ks, TARGETS, tuple(wide), alone)


def loss_curve(estimated: np.ndarray, real: np.ndarray, least: float) -> list[tuple[float, float]]:
    """(estimated, real) mean loss of groups of like estimates, both rising.

    Args:
        estimated, real: (m,) of single queries at several depths.
        least: real loss below which the queries could not have shown any.
    """
    estimated = np.maximum(estimated, _LEAST_LOSS)
    order = np.argsort(estimated, kind="stable")
    groups = np.array_split(order, min(_GROUPS, max(len(order) // _LEAST_GROUP, 1)))
    lost = [float(np.exp(np.log(estimated[group]).mean())) for group in groups]
    seen = _rising([max(float(real[group].mean()), least) for group in groups])
    return list(zip(lost, seen, strict=True))


def _rising(values: list[float]) -> list[float]:
    """The nearest sequence that never falls, by pooling neighbours that do (Ayer et al., Ann. Math. Stat. 26, 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pool = (value, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, count = pools.pop()
            pool = ((mean * count + pool[0] * pool[1]) / (count + pool[1]), count + pool[1])
        pools.append(pool)
    return [mean for mean, count in pools for _ in range(count)]

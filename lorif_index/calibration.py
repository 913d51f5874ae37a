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
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
SIGNS = ("proponents", "opponents")


@dataclass(frozen=True)
class Table:
    """What was learnt for one sign.

    Attributes:
        ks: answers asked for, rising.
        targets: recalls, rising.
        candidates: [k][target] -> T, or None where no number up to the limit reached it.
        alone: [k] -> recall of the coarse order alone: the share of the k best among its own k best.
        correction: factor on the estimated number of missed answers.
    """

    ks: tuple[int, ...]
    targets: tuple[float, ...]
    candidates: tuple[tuple[int | None, ...], ...]
    alone: tuple[float, ...]
    correction: float = 1.0

    def needed(self, k: int, recall: float) -> int | None:
        """T(k, recall): of the next larger k and recall that were calibrated; None: beyond what was."""
        row = next((i for i, known in enumerate(self.ks) if known >= k), None)
        column = next((j for j, target in enumerate(self.targets) if target >= recall - 1e-9), None)
        if row is None or column is None:
            return None
        found = self.candidates[row][column]
        return None if found is None else max(found, k)

    def recall_alone(self, k: int) -> float:
        """Recall of the coarse order alone."""
        return float(np.interp(math.log(k), np.log(self.ks), self.alone))


@dataclass(frozen=True)
class Calibration:
    """Tables for proponents and opponents.

    Attributes:
        tables: sign -> table.
        queries: how many queries it was learnt from.
        rows: the index's rows when it was learnt.
        limit: most candidates that were looked at.
        damping: that of the calibration's scores, as JSON.
    """

    tables: Mapping[str, Table]
    queries: int
    rows: int
    limit: int
    damping: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "tables": {sign: asdict(table) for sign, table in self.tables.items()},
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
            tables = {
                sign: Table(
                    tuple(map(int, t["ks"])),
                    tuple(map(float, t["targets"])),
                    tuple(tuple(None if v is None else int(v) for v in row) for row in t["candidates"]),
                    tuple(map(float, t["alone"])),
                    float(t["correction"]),
                )
                for sign, t in data["tables"].items()
            }
            if set(tables) != set(SIGNS) or any(
                not t.ks or len(t.candidates) != len(t.ks) or len(t.alone) != len(t.ks) for t in tables.values()
            ):
                raise ValueError("tables of the wrong form")
            return cls(tables, int(data["queries"]), int(data["rows"]), int(data["limit"]), dict(data["damping"]))
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
        reached = [np.flatnonzero(sure >= target) for target in TARGETS]
        candidates.append(tuple(int(steps[r[0]]) if len(r) else None for r in reached))
        alone.append(float((ranks[:, :k] < k).mean()))
    return Table(ks, TARGETS, tuple(candidates), tuple(alone))


@dataclass(frozen=True)
class Rest:
    """Coarse scores of rows that were not rescored, and how many rows each stands for."""

    scores: np.ndarray
    weights: np.ndarray


def expected_missed(coarse: np.ndarray, exact: np.ndarray, rest: Rest, threshold: float) -> float:
    """How many of the rest are expected to score above the threshold.

    Args:
        coarse, exact: (t,) scores of the rescored candidates, signs such that large is wanted.
        rest: coarse scores of what was not rescored.
        threshold: the k-th best exact score found.

    The exact score is taken as a line in the coarse one plus the residuals seen among the candidates, which were
    chosen by the coarse score alone, so that the line is not biased by the choice. A residual's tail is the larger of
    the empirical and the normal one.
    """
    if not len(rest.scores):
        return 0.0
    middle_c, middle_e = float(coarse.mean()), float(exact.mean())
    spread = float(np.square(coarse - middle_c).sum())
    slope = float(((coarse - middle_c) * (exact - middle_e)).sum()) / spread if spread > 0 else 0.0
    residuals = np.sort(exact - middle_e - slope * (coarse - middle_c))
    sigma = float(residuals.std())
    gap = threshold - (middle_e + slope * (rest.scores - middle_c))
    empirical = 1.0 - np.searchsorted(residuals, gap, side="left") / len(residuals)
    normal = torch.special.ndtr(torch.from_numpy(-gap / sigma)).numpy() if sigma > 0 else (gap <= 0).astype(float)
    return float((np.maximum(empirical, normal) * rest.weights).sum())


def recall_from_missed(k: int, missed: float) -> float:
    """Share of the k best that were found if `missed` rows outside score above the k-th best found."""
    return k / (k + missed) if missed > 0 else 1.0

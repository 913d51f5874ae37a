"""Results: what a search returns, with its diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SearchStats:
    """How an answer was found.

    Attributes:
        exact: every row was scored; "exact" means exact for what is stored.
        store: the representation that was scored: "eigen", "both", "factors", "coordinates", or "coarse" where scores
            are the coarse index's approximations.
        dtype: the stored dtype of factors, and the bits of coordinates: "float16", "4 bits", "float16 + 4 bits".
        examined: rows scored exactly for the query that took most.
        total: rows in the index.
        bytes_read: from the shards, for all queries together.
        seconds: by stage: "gradients", "transform", then "scan", or "coarse", "narrow", "gather",
            "rescore" and "check".
        damping: the policy, as JSON.
        layers: how many layers the scores are summed over.
        approximate: scores are coarse ones, not exact for anything stored.
        plan: how the answer was sought, and why.
        candidates: the same as examined, or 0 where no candidate was rescored.
        recall: what was asked for; 1 for a scan.
        estimated_recall: mean over the queries; NaN where nothing is known.
        recall_by_query: the estimate for each query.
        candidates_by_query: rows rescored for each query.
        skipped: rows that no answer can have, because their shard is damaged (`Index.open(damaged="skip")`).
    """

    exact: bool
    store: str
    dtype: str
    examined: int
    total: int
    bytes_read: int
    seconds: dict[str, float]
    damping: dict[str, Any]
    layers: int
    approximate: bool = False
    plan: str = ""
    candidates: int = 0
    recall: float = 1.0
    estimated_recall: float = 1.0
    recall_by_query: list[float] = field(default_factory=list)
    candidates_by_query: list[int] = field(default_factory=list)
    skipped: int = 0


@dataclass(frozen=True)
class Hits:
    """The k best rows of each query, best first.

    Attributes:
        ids: (q, k) int64, the index's row ids: positions in the training data.
        scores: (q, k) float32; score / N estimates the change of the query's loss, in nats, if that example were left
            out. Positive: a proponent.
        stats: how they were found.
        payloads: for each query those of its hits, as they were given to `build` or `add`; None where there are none.
    """

    ids: np.ndarray
    scores: np.ndarray
    stats: SearchStats
    payloads: list[list[Any]] | None = None

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.ids)

    def __repr__(self) -> str:
        q, k = self.ids.shape
        lines = [f"Hits: {q} queries x {k} of {self.stats.total} examples, {self.stats.store}: {self.stats.plan}"]
        for row in range(min(q, 3)):
            best = ", ".join(
                f"{i}: {s:.4g}" for i, s in zip(self.ids[row, :5].tolist(), self.scores[row, :5].tolist(), strict=True)
            )
            lines.append(f"  [{row}] {best}{', ...' if k > 5 else ''}")
        if q > 3:
            lines.append("  ...")
        return "\n".join(lines)

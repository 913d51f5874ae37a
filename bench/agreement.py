"""How alike two rankings are."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(q,) Spearman correlations of rows."""
    ranks = [rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (a, b)]
    norms = [np.sqrt(np.square(r).sum(axis=1)) for r in ranks]
    return (ranks[0] * ranks[1]).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-12)


def agreement(scores: np.ndarray, truth: np.ndarray, k: int) -> tuple[float, float]:
    """(mean Spearman, mean overlap of the top k)."""
    top = [np.intersect1d(x[-k:], y[-k:]).size / k for x, y in zip(scores.argsort(1), truth.argsort(1), strict=True)]
    return float(correlations(scores, truth).mean()), float(np.mean(top))

"""Missed: how many of the best rows a search has not proposed, from what it has seen.

The coarse order may not propose an answer. A proposed row whose chance of being proposed was P stands for (1 - P) / P
others that were not (Horvitz and Thompson, JASA 47, 1952); P follows from how far coarse scores stray from exact ones
among the rows that lie far above the cut.
"""

from __future__ import annotations

import numpy as np
import torch

# A row's chance of being proposed is not believed to be smaller than this.
_LEAST_CHANCE = 0.02
# Errors of the coarse order are read from this share of the proposed rows, the highest, but from so many at least.
_TOP_SHARE, _TOP_LEAST = 0.1, 64


def expected_missed(coarse: np.ndarray, exact: np.ndarray, threshold: float) -> float:
    """How many rows are expected to score at least `threshold` without having been proposed.

    Args:
        coarse: (w,) coarse scores of the proposed rows; signs such that large is wanted.
        exact: (w,) their exact scores.
        threshold: the k-th best exact score found.
    """
    chances = _proposed(coarse, exact)
    return float(((exact >= threshold) * (1.0 - chances) / chances).sum())


def _proposed(coarse: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(w,) the chance that each proposed row had of being proposed."""
    count = min(max(int(_TOP_SHARE * len(exact)), _TOP_LEAST), len(exact))
    top = np.argpartition(-exact, count - 1)[:count]
    errors = coarse[top].astype(np.float64) - exact[top]
    room = exact.astype(np.float64) - coarse.min() + errors.mean()
    return np.maximum(_normal(room, float(errors.std())), _LEAST_CHANCE)


def _normal(x: np.ndarray, sigma: float) -> np.ndarray:
    """The normal distribution function of that standard deviation."""
    if not sigma > 0:
        return np.where(x >= 0, 1.0, 0.0)
    return torch.special.ndtr(torch.from_numpy(np.asarray(x / sigma, dtype=np.float64))).numpy()

"""Missed: how many of the best rows a search has not scored, from what it has seen.

Two things lose an answer. The coarse order may not propose it: a proposed row whose chance of being proposed was P
stands for (1 - P) / P others that were not (Horvitz and Thompson, JASA 47, 1952); P follows from the coarse errors of
the rows that lie far above the cut. Or it was proposed, and its score by coordinates was too small for an exact one:
the exact scores at hand say how far exact scores stray from those. In units of |x| |z|, the product of the norms, both
errors hardly depend on the row but on the cosine c = fine / (|x| |z|): their mean is taken as linear in c and c |c|,
their variance in c^2. Rows are chosen by c and |z| alone, so that the choice does not bias that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# A row's chance of being proposed is not believed to be smaller than this.
_LEAST_CHANCE = 0.02
# Errors of the coarse order are read from this share of the proposed rows, the highest, but from so many at least.
_TOP_SHARE, _TOP_LEAST = 0.1, 64


@dataclass(frozen=True)
class Seen:
    """What a search has seen of one query; signs such that large is wanted.

    Attributes:
        coarse: (w,) coarse scores of the proposed rows.
        order: (w,) what they approximate.
        fine: (w,) scores by coordinates.
        size: (w,) what errors grow with: |x| |z|, or ones.
        deep: (d,) places among those w whose exact scores are known.
        exact: (d,) exact scores.
        complete: every row was proposed.
    """

    coarse: np.ndarray
    order: np.ndarray
    fine: np.ndarray
    size: np.ndarray
    deep: np.ndarray
    exact: np.ndarray
    complete: bool


@dataclass(frozen=True)
class Missed:
    """How many rows are expected to score above the k-th best found, without having been scored exactly.

    Attributes:
        unproposed: of rows that the coarse order did not propose.
        unscored: of rows that it did.
        chances: (w,) of each proposed row to be one; 0 where its exact score is known.
    """

    unproposed: float
    unscored: float
    chances: np.ndarray

    def recall(self, k: int) -> float:
        """Share of the k best that was found."""
        return k / (k + self.unproposed + self.unscored)

    def likely(self, most: float) -> np.ndarray:
        """Places of the fewest rows such that no more than `most` answers are expected among the others."""
        order = np.argsort(-self.chances, kind="stable")
        left = self.unscored - np.cumsum(self.chances[order])
        count = int(np.searchsorted(-left, -most)) + 1 if self.unscored > most else 0
        return order[:count][self.chances[order[:count]] > 0]


def expected_missed(seen: Seen, threshold: float) -> Missed:
    """What a search has missed, given the k-th best exact score that it found."""
    answers = np.zeros(len(seen.coarse))
    answers[seen.deep] = seen.exact >= threshold
    shallow = np.ones(len(answers), dtype=bool)
    shallow[seen.deep] = False
    if shallow.any():
        answers[shallow] = _chances(seen, shallow, threshold)
    unproposed = 0.0
    if not seen.complete:
        proposed = _proposed(seen)
        unproposed = float((answers * (1.0 - proposed) / proposed).sum())
    chances = np.where(shallow, answers, 0.0)
    return Missed(unproposed, float(chances.sum()), chances)


def _proposed(seen: Seen) -> np.ndarray:
    """(w,) the chance that each proposed row had of being proposed."""
    count = min(max(int(_TOP_SHARE * len(seen.order)), _TOP_LEAST), len(seen.order))
    top = np.argpartition(-seen.order, count - 1)[:count]
    size = np.maximum(seen.size, 1e-30).astype(np.float64)
    errors = (seen.coarse[top] - seen.order[top]) / size[top]
    room = (seen.order - seen.coarse.min()) / size + errors.mean()
    return np.maximum(_normal(room, float(errors.std())), _LEAST_CHANCE)


def _chances(seen: Seen, shallow: np.ndarray, threshold: float) -> np.ndarray:
    """The chance of each row without an exact score to exceed the threshold."""
    size = np.maximum(seen.size, 1e-30).astype(np.float64)
    cosine = seen.fine / size
    known, errors = cosine[seen.deep], seen.exact / size[seen.deep] - cosine[seen.deep]
    mean, spread = _fit_errors(known, errors)
    left = cosine[shallow]
    gap = threshold / size[shallow] - left - _terms(left) @ mean
    return _survival(gap / _spread(left, spread), (errors - _terms(known) @ mean) / _spread(known, spread))


def _terms(cosine: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(cosine), cosine, cosine * np.abs(cosine)], axis=1)


def _spread(cosine: np.ndarray, spread: tuple[float, float]) -> np.ndarray:
    """Standard deviation of errors at some cosines."""
    return np.sqrt(spread[0] + spread[1] * np.square(cosine))


def _fit_errors(cosine: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Coefficients of the errors' mean and variance, by least squares, weighted the second time."""
    terms = _terms(cosine)
    spread = (1.0, 0.0)
    mean: np.ndarray = np.zeros(3)
    for _ in range(2):
        weights = 1.0 / _spread(cosine, spread)
        mean = np.linalg.lstsq(terms * weights[:, None], errors * weights, rcond=1e-9)[0]
        squares = np.square(errors - terms @ mean)
        x = np.square(cosine)
        centred = x - x.mean()
        steep = float(centred @ squares) / float(centred @ centred) if centred.any() else 0.0
        steep = max(steep, 0.0)
        level = float(squares.mean() - steep * x.mean())
        # Neither part may be negative: then the other one stands alone.
        spread = (level, steep) if level > 0 else (0.1 * float(squares.mean()), max(steep, 0.0))
        spread = (max(spread[0], 1e-24), spread[1])
    return mean, spread


def _survival(gap: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Chance that a standardised residual exceeds each gap: the larger of the empirical and the normal one."""
    ordered = np.sort(residuals)
    empirical = 1.0 - np.searchsorted(ordered, gap, side="left") / len(ordered)
    return np.maximum(empirical, _normal(-gap, float(ordered.std())))


def _normal(x: np.ndarray, sigma: float) -> np.ndarray:
    """The normal distribution function of that standard deviation."""
    if not sigma > 0:
        return np.where(x >= 0, 1.0, 0.0)
    return torch.special.ndtr(torch.from_numpy(np.asarray(x / sigma, dtype=np.float64))).numpy()

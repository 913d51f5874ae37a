"""Shrinkage: scores that are to be summed, with those that cannot be told from noise made small.

Most examples have little to do with a question, and their scores are spread about zero by chance overlap of gradients
and by rounded rows. One does not matter; thousands, summed, drown the few that count. A score s becomes
s * s^2 / (s^2 + t^2), nearly s where it is well above t and nearly nothing below: the empirical Wiener gain at the
universal threshold t = sigma * sqrt(2 ln n), which the largest of n normal noises hardly passes (Donoho and Johnstone,
Biometrika 81, 1994). sigma is told by the scores themselves, median |s| / 0.6745. TRAK (Park et al., arXiv:2303.14186)
thresholds its scores, too, at a level found by retraining; here nothing is fitted. A question's order stays as it is.
"""

from __future__ import annotations

import math

import numpy as np

# The median of the absolute value of a standard normal variable.
_MEDIAN_NORMAL = 0.6744897501960817


def shrink(scores: np.ndarray) -> None:
    """Shrinks scores (q, n) float32 of all n examples, in place, a question at a time."""
    for row in scores:
        threshold = float(np.median(np.abs(row))) / _MEDIAN_NORMAL * math.sqrt(2.0 * math.log(max(row.shape[0], 1)))
        if threshold > 0:
            # Of the ratio, squared: it neither overflows nor vanishes, whatever the scores' units.
            with np.errstate(divide="ignore", over="ignore"):
                row /= 1.0 + (threshold / np.abs(row)) ** 2

"""Largest: which few numbers of very many are the largest. torch.topk orders more than it has to.

A threshold that some more than the wanted numbers pass is taken from a part of them; only what passes it is ordered.
"""

from __future__ import annotations

import numpy as np
import torch

# The part: every so many, a prime, so that no matrix's columns are met alone.
_EVERY = 17
# Fewer numbers for each that is wanted, or in all, are ordered as they are.
_TIMES, _LEAST = 16, 1 << 14
# Beyond what the part says, so many standard deviations of a draw.
_SPARE = 4.0


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Columns (n, count) int64 of each row's largest numbers, in no order; exact, of equal numbers any.

    Args:
        values: (n, d) without NaN.
        count: at most d.
    """
    n, d = values.shape
    if values.device.type != "cpu" or d < _LEAST or d < _TIMES * count or not n or not count:
        return torch.topk(values, count, dim=1, sorted=False).indices
    part, share = values[:, ::_EVERY], count / _EVERY
    enough = min(int(share + _SPARE * (share**0.5 + 1.0)), part.shape[1])
    thresholds = torch.topk(part, enough, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    # numpy finds what is true several times faster than torch.
    flat = np.flatnonzero((values >= thresholds).numpy())
    rows, columns = np.divmod(flat, d)
    counts = np.bincount(rows, minlength=n)
    at = np.arange(len(flat)) - (np.cumsum(counts) - counts)[rows]
    numbers, most = values.numpy(), counts.max()
    places, passed = np.zeros((n, most), np.int64), np.full((n, most), -np.inf, numbers.dtype)
    places[rows, at], passed[rows, at] = columns, numbers[rows, columns]
    lacking = np.flatnonzero(counts < count)
    if len(lacking) == n:
        return torch.topk(values, count, dim=1, sorted=False).indices
    best = torch.topk(torch.from_numpy(passed), count, dim=1, sorted=False).indices
    found = torch.from_numpy(places).gather(1, best)
    for row in lacking:
        found[row] = torch.topk(values[row], count, sorted=False).indices
    return found

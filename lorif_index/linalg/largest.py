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
# A row of which more pass, times what is wanted and in all, is ordered as it is.
_MOST_TIMES, _LEAST_MOST = 4, 512


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Columns (n, count) int64 of each row's largest numbers, in no order; exact, of equal numbers any. NaN counts as
    the largest.

    Args:
        values: (n, d).
        count: at most d.
    """
    n, d = values.shape
    if values.device.type != "cpu" or d < _LEAST or d < _TIMES * count or not n or not count:
        return torch.topk(values, count, dim=1, sorted=False).indices
    part, share = values[:, ::_EVERY], count / _EVERY
    enough = min(int(share + _SPARE * (share**0.5 + 1.0)), part.shape[1])
    thresholds = torch.topk(part, enough, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    # numpy counts and finds what is true several times faster than torch.
    passed = (values < thresholds).logical_not_().numpy()
    counts = np.array([np.count_nonzero(row) for row in passed])
    # Too few: the part was unlike the rest. Very many: numbers are equal, and a list of them would have no bound.
    others = np.flatnonzero((counts < count) | (counts > _MOST_TIMES * count + _LEAST_MOST))
    passed[others], counts[others] = False, 0
    rows, columns = np.divmod(np.flatnonzero(passed), d)
    at = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    room, numbers = (n, max(int(counts.max()), count)), values.numpy()
    places, among = np.zeros(room, np.int64), np.full(room, -np.inf, numbers.dtype)
    places[rows, at], among[rows, at] = columns, numbers[rows, columns]
    found = torch.from_numpy(places).gather(1, torch.topk(torch.from_numpy(among), count, dim=1, sorted=False).indices)
    if len(others):
        found[others] = torch.topk(values[others], count, dim=1, sorted=False).indices
    return found

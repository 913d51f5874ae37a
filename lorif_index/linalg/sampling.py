"""Sampling: random examples without replacement, the same for the same seed on any machine."""

from __future__ import annotations

import numpy as np

from .projection import keyed_generator

# Up to so many things a sample is the beginning of a shuffle of all.
_SHUFFLED_UP_TO = 1 << 22
_DRAWN_TOGETHER = 1 << 16


def drawn(total: int, count: int, seed: int, *key: str | int) -> np.ndarray:
    """The first `count` of all numbers below `total` in random order, (count,) int64: more of them begin with the same.

    Memory goes by what is drawn where there are many: a shuffle takes 8 bytes for each.
    """
    generator = np.random.Generator(keyed_generator(seed, *key))
    count = min(count, total)
    if total <= _SHUFFLED_UP_TO or count > total // 2:
        return generator.permutation(total).astype(np.int64)[:count]
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        # Drawn again and again, each kept where it comes first.
        found = np.concatenate([found, generator.integers(total, size=_DRAWN_TOGETHER, dtype=np.int64)])
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return found[:count]

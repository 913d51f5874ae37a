"""Living: proposals without removed rows. Fast-scan indexes cannot leave rows out: more are asked for and filtered."""

from __future__ import annotations

import numpy as np

from .pursuit import Proposer


class LivingRows:
    """A proposer over the rows that were not removed.

    Args:
        inner: proposes any row.
        dead: (n,) bool.
    """

    def __init__(self, inner: Proposer, dead: np.ndarray) -> None:
        self._inner, self._dead = inner, dead
        self._gone = int(dead.sum())

    @property
    def tilts(self) -> bool:
        """Whether searches can be tilted."""
        return self._inner.tilts

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best living rows of queries (q, k), as `Proposer.search` has them."""
        count = min(count, len(self._dead) - self._gone)
        # As many more as are dead of an average stretch, and then as often as it takes.
        asked = min(count + -(-count * self._gone // max(len(self._dead) - self._gone, 1)) + 16, count + self._gone)
        while True:
            positions, scores = self._inner.search(x, asked, tilt)
            alive = (positions >= 0) & ~self._dead[positions]
            found, more = alive.sum(axis=1), (positions >= 0).all(axis=1)
            if asked >= count + self._gone or not ((found < count) & more).any():
                return _first(positions, scores, alive, count)
            asked = min(2 * asked, count + self._gone)


def _first(positions: np.ndarray, scores: np.ndarray, alive: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of each row that are alive, in order; -1 and -inf where there are fewer."""
    order = np.argsort(~alive, axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(alive, order, axis=1)
    return (
        np.where(kept, np.take_along_axis(positions, order, axis=1), -1),
        np.where(kept, np.take_along_axis(scores, order, axis=1), np.float32(-np.inf)),
    )

"""Joint: proposals of all ranks, each from the coarse index of its own rows, put together."""

from __future__ import annotations

import numpy as np

from .pursuit import Proposer
from .team import Team

BYTES_ORDERED = 60
"""Memory that one rank's proposal takes on every rank while those of all are put in order: the message and its copy,
position and score, keys and order."""
ORDERED_BYTES = 256 << 20
"""Proposals to so many queries are put in order together that they take about so much."""


class JointProposer:
    """A proposer over the rows of a team.

    Args:
        inner: proposes rows of this rank, or of its whole folder; None where it proposes nothing.
        team: the rows.
        tilts: whether the ranks' proposers can be tilted.
        of_folder: the positions that `inner` gives are in all of the folder's rows, not in this rank's alone.
    """

    def __init__(self, inner: Proposer | None, team: Team, *, tilts: bool, of_folder: bool) -> None:
        self._inner, self._team, self._of_folder = inner, team, of_folder
        self.tilts = tilts

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best rows of queries (q, k), as `Proposer.search` has them, by positions in the whole index."""
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def find(part: slice) -> tuple[np.ndarray, np.ndarray]:
            if not found:
                found.append(self._own(x, count, tilt))
            positions, scores = found[0]
            return positions[part], scores[part]

        # The same steps on all ranks.
        step = max(ORDERED_BYTES // (BYTES_ORDERED * max(count, 1) * self._team.ranks.size), 1)
        parts = [slice(start, start + step) for start in range(0, max(len(x), 1), step)]
        best = [self._team.best(lambda part=part: find(part), count) for part in parts]  # type: ignore[misc]
        positions, scores = zip(*best, strict=True)
        return np.concatenate(positions), np.concatenate(scores)

    def _own(self, x: np.ndarray, count: int, tilt: float) -> tuple[np.ndarray, np.ndarray]:
        """What this rank proposes."""
        if self._inner is None:
            return np.empty((len(x), 0), np.int64), np.empty((len(x), 0), np.float32)
        positions, scores = self._inner.search(x, count, tilt)
        return self._team.globally(positions, of_folder=self._of_folder), scores

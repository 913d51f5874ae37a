"""Joint: proposals of all ranks, each from the coarse index of its own rows, put together."""

from __future__ import annotations

import numpy as np

from .pursuit import Proposer
from .team import Team


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
        inner = self._inner

        def find() -> tuple[np.ndarray, np.ndarray]:
            if inner is None:
                return np.empty((len(x), 0), np.int64), np.empty((len(x), 0), np.float32)
            positions, scores = inner.search(x, count, tilt)
            return self._team.globally(positions, of_folder=self._of_folder), scores

        return self._team.best(find, count)

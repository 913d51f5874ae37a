"""Proposers: what gives candidates by their coordinates. The coarse index is one; here are those around it.

On a GPU with room, the coordinates themselves are scanned in its place (faiss's fast-scan indexes are for CPUs). Fast
scan cannot leave rows out: more are asked for, and removed ones are filtered. What several ranks propose is put
together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from ..storage.team import Team

# Scores of so many (query, row) pairs are held at once.
_PAIRS = 1 << 26
BYTES_ORDERED = 60
"""Memory that one rank's proposal takes on every rank while those of all are put in order: the message and its copy,
position and score, keys and order."""
ORDERED_BYTES = 256 << 20
"""Proposals to so many queries are put in order together that they take about so much."""


class Proposer(Protocol):
    """What proposes candidates: a `Coarse`, or a `FlatSketch` on a GPU."""

    @property
    def tilts(self) -> bool:
        """Whether it heeds `tilt`."""
        ...

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Positions (q, count) int64, -1 for none, and scores (q, count) float32, falling, of queries (q, k), by
        <x, z> + tilt |x| |z|."""
        ...


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


class JointProposer:
    """A proposer over the rows of a team.

    Args:
        inner: proposes rows of this rank; None where it has none.
        team: the rows.
        tilts: whether the ranks' proposers can be tilted.
    """

    def __init__(self, inner: Proposer | None, team: Team, *, tilts: bool) -> None:
        self._inner, self._team, self.tilts = inner, team, tilts

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
        return self._team.globally(positions), scores


class FlatSketch:
    """Coordinates on a device, searched by position like a `Coarse`.

    Args:
        blocks: coordinates (n, k) float32 of all rows, in order.
        count, dim: rows and k in all.
        device: where they are kept, in half precision; scores are summed in float32.
    """

    def __init__(self, blocks: Iterable[torch.Tensor], count: int, dim: int, device: torch.device) -> None:
        # Directions in half precision, and norms beside them: neither overflows, whatever the gradients' scale.
        self._rows = torch.empty(count, dim, dtype=torch.float16, device=device)
        self._norms = torch.empty(count, device=device)
        at = 0
        for block in blocks:
            directions, norms = _polar(block)
            self._rows[at : at + len(block)] = directions.to(device)
            self._norms[at : at + len(block)] = norms[:, 0].to(device)
            at += len(block)

    @property
    def tilts(self) -> bool:
        """Whether searches can be tilted."""
        return True

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best of queries (q, k) by <x, z> + tilt |x| |z|.

        Returns:
            positions (q, count) int64, and scores (q, count) float32, falling.
        """
        queries, sizes = _polar(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(self._rows.device))
        count = min(count, len(self))
        step = max(_PAIRS // max(len(queries), 1), count)
        best = torch.empty(len(queries), 0, device=self._rows.device)
        where = torch.empty(len(queries), 0, dtype=torch.int64, device=self._rows.device)
        for start in range(0, len(self), step):
            part = self._rows[start : start + step]
            # On a GPU the product itself sums halves in float32; elsewhere they are converted first.
            cosines = (queries.half() @ part.T).float() if part.is_cuda else queries @ part.float().T
            scores = cosines.add_(tilt).mul_(self._norms[start : start + len(part)]).mul_(sizes)
            places = torch.arange(start, start + len(part), device=part.device).expand_as(scores)
            best, where = torch.cat([best, scores], dim=1), torch.cat([where, places], dim=1)
            if best.shape[1] > count:
                best, chosen = torch.topk(best, count, dim=1)
                where = torch.gather(where, 1, chosen)
        order = torch.argsort(best, dim=1, descending=True, stable=True)
        return torch.gather(where, 1, order).cpu().numpy(), torch.gather(best, 1, order).cpu().numpy()


def _polar(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions (n, k) and norms (n, 1) of rows; zeros have no direction."""
    # The largest entry first: squares of very small or large ones would leave float32.
    peak = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(peak > 0, peak, 1.0)
    length = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1.0), length * peak

"""Team: the rows of one index over the ranks that hold them, and what they find put together.

Every row has one position in the whole index, by rising id, wherever it lies. A rank holds some shards: a part of those
in a folder that all ranks see, or of those in a folder of its own. It works on the positions in its own shards, and
what leaves it is by positions in the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from ..errors import DistributedError
from ..ranks import ALONE, Ranks
from .manifest import Manifest
from .shards import ShardInfo


class Team:
    """Which rows this rank holds, of how many.

    Args:
        shards: those in this rank's folder, in order.
        starts: of each of those, the position in the whole index of its first row.
        mine: which of those this rank holds.
        rows: of the whole index.

    Attributes:
        shards: those that this rank holds.
        folder: number of the folder that they lie in.
        offset: how many rows of its folder come before them.
    """

    def __init__(
        self,
        ranks: Ranks,
        shards: Sequence[ShardInfo],
        starts: Sequence[int],
        mine: slice,
        rows: int,
        *,
        folder: int = 0,
    ) -> None:
        self.ranks, self.shards, self.folder = ranks, list(shards[mine]), folder
        counts = [shard.rows for shard in shards]
        self.offset = sum(counts[: mine.start])
        self._inside = np.cumsum([0, *counts]).astype(np.int64)
        self._starts = np.array([*starts], dtype=np.int64)
        self._own, self._rows = sum(counts[mine]), rows

    @classmethod
    def of(cls, manifest: Manifest, ranks: Ranks = ALONE) -> Team:
        """The team that holds an index, whose ranks all call this.

        Args:
            manifest: of the index in this rank's folder, which other ranks may share.

        Raises:
            DistributedError: the ranks' folders hold different indexes, or not all parts of one.
        """
        if ranks.size == 1:
            counts = [shard.rows for shard in manifest.shards]
            starts = np.cumsum([0, *counts])[:-1].tolist()
            return cls(ranks, manifest.shards, starts, slice(0, len(counts)), sum(counts))
        # Calibration and coarse index change without the rows: all must have opened the same version.
        build = f"{manifest.digest()} {manifest.generation}"
        part = manifest.part or {"number": 0, "of": 1, "build": build}
        said = ranks.gather_values(part)
        builds, numbers = {s["build"] for s in said}, [int(s["number"]) for s in said]
        if len(builds) > 1 or any(s["of"] != part["of"] for s in said):
            raise DistributedError(
                f"the ranks have opened different indexes ({ {r: str(s['build'])[:12] for r, s in enumerate(said)} }): "
                "open the same one on all, or the parts of one build"
            )
        missing = sorted(set(range(part["of"])) - set(numbers))
        if missing:
            raise DistributedError(
                f"the index lies in {part['of']} folders, and no rank has opened number {missing[0]} of them: start a "
                "rank where it lies, or copy it to one's machine"
            )
        first = numbers.index(part["number"]) == ranks.rank
        told = [[s.first_id, s.rows] for s in manifest.shards] if first else None
        everywhere = sorted(
            (first_id, rows, number)
            for number, shards in zip(numbers, ranks.gather_values(told), strict=True)
            for first_id, rows in shards or ()
        )
        ends = np.cumsum([0, *(rows for _, rows, _ in everywhere)])
        starts = [int(s) for s, (_, _, number) in zip(ends, everywhere, strict=False) if number == part["number"]]
        sharing = [rank for rank, number in enumerate(numbers) if number == part["number"]]
        mine = _share([s.rows for s in manifest.shards], sharing.index(ranks.rank), len(sharing))
        return cls(ranks, manifest.shards, starts, mine, int(ends[-1]), folder=part["number"])

    def __len__(self) -> int:
        """Rows of the whole index; removed ones count."""
        return self._rows

    @property
    def own(self) -> slice:
        """Of the rows in this rank's folder, those that it holds."""
        return slice(self.offset, self.offset + self._own)

    def globally(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the whole index, of positions in this rank's shards; -1 stays."""
        if self.ranks.size == 1:
            return positions
        inside = positions + self.offset
        shard = np.searchsorted(self._inside, inside, side="right") - 1
        shard = np.clip(shard, 0, max(len(self._starts) - 1, 0))
        moved = self._starts[shard] + inside - self._inside[shard] if len(self._starts) else inside
        return np.where(positions >= 0, moved, -1)

    def locally(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of positions in the whole index those that this rank holds: their places, and positions in its shards."""
        if self.ranks.size == 1:
            return np.arange(len(positions)), positions
        if not len(self._starts):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        shard = np.clip(np.searchsorted(self._starts, positions, side="right") - 1, 0, None)
        inside = positions - self._starts[shard] + self._inside[shard]
        local = inside - self.offset
        good = (positions >= self._starts[shard]) & (inside < self._inside[shard + 1])
        good &= (local >= 0) & (local < self._own)
        places = np.flatnonzero(good)
        return places, local[places]

    def assembled(
        self,
        compute: Callable[[], Sequence[np.ndarray]],
        places: Sequence[np.ndarray],
        sizes: Sequence[int],
        *tail: int,
        dtype: type = np.float32,
    ) -> list[np.ndarray]:
        """Arrays (size, *tail) whose entries several ranks have, whole on all: one message for all of them.

        Args:
            compute: gives this rank's entries, an array (any, *tail) for each; what it raises, all ranks raise.
            places: where they belong.
        """
        if self.ranks.size == 1:
            return list(compute())
        ends = np.cumsum([0, *sizes])
        # The last entry says whether any rank failed.
        out: np.ndarray = np.zeros((int(ends[-1]) + 1, *tail), dtype=dtype)
        error: Exception | None = None
        try:
            for start, where, what in zip(ends[:-1], places, compute(), strict=True):
                out[start + where] = what
        except Exception as raised:
            error = raised
            out[-1] = 1
        # Every entry is one rank's, and zero elsewhere: sums are exact.
        whole = self.ranks.sum(torch.from_numpy(out)).numpy()
        if whole[-1].any():
            self.ranks.fail(error)
        return [whole[a:b] for a, b in pairwise(ends)]

    def best(
        self, find: Callable[[], tuple[np.ndarray, np.ndarray]], count: int, *, largest: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best of what all ranks find, by one gather; ties go to the earlier row.

        Args:
            find: gives what this rank has found: positions (q, any) in the whole index, -1 for none, and scores
                (q, any) float32, best first. What it raises, all ranks raise.
            count: how many.
            largest: whether the best scores are the largest.

        Returns:
            positions (q, count) and scores, best first; -1 and the worst of scores where there are fewer.
        """
        if self.ranks.size == 1:
            return find()
        sign = np.float32(1.0 if largest else -1.0)
        mine: np.ndarray | Exception
        try:
            positions, scores = find()
            mine = np.empty(positions.T.shape, dtype=[("at", "<i8"), ("score", "<f4")])
            mine["at"], mine["score"] = positions.T, scores.T
        except Exception as raised:
            mine = raised
        found = np.concatenate(self.ranks.gather(mine)).T
        at, value = found["at"], np.where(found["at"] >= 0, found["score"] * sign, np.float32(-np.inf))
        order = np.lexsort((np.where(at >= 0, at, np.iinfo(np.int64).max), -value), axis=1)[:, :count]
        at, value = np.take_along_axis(at, order, axis=1), np.take_along_axis(value, order, axis=1)
        return at, value * sign


def _share(rows: Sequence[int], number: int, size: int) -> slice:
    """Contiguous shards for one of `size` ranks, such that each has about as many rows."""
    ends = np.cumsum([0, *rows])
    # Each shard goes to the rank that its middle falls to.
    middles = (ends[:-1] + ends[1:]) / 2
    owner = np.minimum((middles * size // max(ends[-1], 1)).astype(np.int64), size - 1)
    return slice(int(np.searchsorted(owner, number)), int(np.searchsorted(owner, number, side="right")))

"""Rescoring: exact scores of named rows, wherever they lie.

Rows that several queries share are read once, in rising order, a block at a time, and scored by the scan's own scorer.
Over several ranks each scores the rows that it holds; scores travel, rows do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ..codecs.base import RowCodec, Scorer
from ..linalg.scratch import SCRATCH
from ..storage.resident import Resident
from ..storage.team import Team

# Rows are gathered and scored a block at a time: bounds memory for large batches.
_GATHER_BYTES = 128 << 20

Wanted = Sequence[tuple[Scorer, np.ndarray]]
"""For each query its scorer, and rising positions of rows in the whole index."""
Each = Callable[[Callable[[int], Any], Iterable[int]], list[Any]]
"""Does something for each of some queries, perhaps side by side."""
Timed = Callable[[str], AbstractContextManager[None]]
"""Adds the time taken inside to a stage: "gather" or "rescore"."""


class Rescorer:
    """Scores rows of an index by their positions.

    Args:
        rows: those that this rank holds.
        codec: what they mean.
        team: whose they are a part of.
        live_count: rows of all ranks that answers are taken from.
    """

    def __init__(self, rows: Resident, codec: RowCodec, team: Team, live_count: int) -> None:
        self._rows, self._team, self.codec, self.live_count = rows, team, codec, live_count
        self.device = rows.device

    def __len__(self) -> int:
        return len(self._team)

    def settled(self, values: list[Any]) -> list[Any]:
        """What rank 0 has decided to do next: processors of different makes may round differently.

        Args:
            values: JSON values, as this rank would have them.
        """
        return values if self._team.ranks.size == 1 else self._team.ranks.told(values)

    def exactly(self, wanted: Wanted, each: Each, timed: Timed) -> tuple[list[np.ndarray], int]:
        """The exact scores of each query's rows, (m,) float32, and bytes read."""
        mine, total = [self._team.locally(positions) for _, positions in wanted], 0
        at = [local for _, local in mine]

        def compute() -> list[np.ndarray]:
            nonlocal total
            union = np.unique(np.concatenate(at))
            scores = [np.empty(len(part), dtype=np.float32) for part in at]
            step = max(_GATHER_BYTES // self.codec.row_bytes, 1)
            for start in range(0, len(union), step):
                block = union[start : start + step]
                with timed("gather"):
                    rows, read = self._rows.gather(block)
                total += read

                def score(i: int, block: np.ndarray = block, rows: torch.Tensor = rows) -> None:
                    low, high = np.searchsorted(at[i], [block[0], block[-1] + 1])
                    if high > low:
                        places = np.searchsorted(block, at[i][low:high])
                        # One query that wants the whole block needs no copy of it.
                        all_of_it = len(places) == len(block)
                        own = rows if all_of_it else SCRATCH.select("mine", rows, torch.from_numpy(places))
                        scores[i][low:high] = wanted[i][0].score(own)[0].cpu().numpy()

                with timed("rescore"):
                    each(score, range(len(wanted)))
            return scores

        places, sizes = [where for where, _ in mine], [len(positions) for _, positions in wanted]
        return self._team.assembled(compute, places, sizes), total

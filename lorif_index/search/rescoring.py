"""Rescoring: scores of named rows, by their coordinates and exactly, wherever the rows lie.

Rows that several queries share are read once, in rising order, a block at a time, and scored by the scan's own scorer.
Over several ranks each scores the rows that it holds; scores travel, rows do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ..codecs.scratch import SCRATCH
from ..storage.resident import Resident
from .scoring import Scorer
from .team import Team

# Factors are gathered and scored a block at a time: bounds memory for large batches.
_GATHER_BYTES = 128 << 20

Asked = Sequence[tuple[Scorer, np.ndarray]]
"""For each query its scorer, and positions of rows in the whole index."""
Each = Callable[[Callable[[int], Any], Iterable[int]], list[Any]]
"""Does something for each of some queries, perhaps side by side."""
Timed = Callable[[str], AbstractContextManager[None]]
"""Adds the time taken inside to a stage: "gather" or "rescore"."""


class Rescorer:
    """Scores rows of an index by their positions.

    Args:
        rows: those that this rank holds.
        team: whose they are a part of.
        live_count: rows of all ranks that answers are taken from.
    """

    def __init__(self, rows: Resident, team: Team, live_count: int) -> None:
        self._rows, self._team, self.live_count = rows, team, live_count
        self.layout, self.device = rows.layout, rows.device

    def __len__(self) -> int:
        return len(self._team)

    def settled(self, wanted: dict[int, np.ndarray], extra: list[Any]) -> tuple[dict[int, np.ndarray], list[Any]]:
        """What rank 0 has decided to do next: processors of different makes may round differently.

        Args:
            wanted: query -> places, as this rank would have it.
            extra: JSON values beside.
        """
        ranks = self._team.ranks
        if ranks.size == 1:
            return wanted, extra
        sizes, extra = ranks.told([[[q, len(places)] for q, places in wanted.items()], extra])
        mine = np.concatenate([np.empty(0, np.int64), *wanted.values()]) if ranks.first else np.empty(0, np.int64)
        total = sum(size for _, size in sizes)
        places = ranks.spread(torch.from_numpy(mine) if ranks.first else torch.empty(total, dtype=torch.int64), 0)
        ends = np.cumsum([size for _, size in sizes])[:-1]
        parts = np.split(places.numpy(), ends) if sizes else []
        return {int(q): part for (q, _), part in zip(sizes, parts, strict=True)}, extra

    def by_codes(self, asked: Asked, each: Each) -> tuple[list[np.ndarray], int]:
        """Of each query's rows the score by coordinates and the coordinates' norm, (m, 2) float32, and bytes read."""
        mine, read = [self._team.locally(positions) for _, positions in asked], [0] * len(asked)

        def score(i: int) -> np.ndarray:
            scorer, (_, local) = asked[i][0], mine[i]
            out = np.empty((len(local), 2), dtype=np.float32)
            if len(local):
                order = np.argsort(local)
                codes, read[i] = self._rows.codes(local[order])
                out[order, 0] = scorer.score_codes(codes)[0].cpu().numpy()
                out[order, 1] = self.layout.codes.norms(codes).cpu().numpy()  # type: ignore[union-attr]
            return out

        places, sizes = [where for where, _ in mine], [len(positions) for _, positions in asked]
        found = self._team.assembled(lambda: each(score, range(len(asked))), places, sizes, 2)
        return found, sum(read)

    def exactly(self, asked: Asked, each: Each, timed: Timed) -> tuple[list[np.ndarray], int]:
        """Of each query's rows, at rising positions, the share of factors or eigencodes in the exact score, (m,)
        float32, and bytes read."""
        mine, total = [self._team.locally(positions) for _, positions in asked], 0
        at = [local for _, local in mine]

        def compute() -> list[np.ndarray]:
            nonlocal total
            union = np.unique(np.concatenate(at))
            scores = [np.empty(len(part), dtype=np.float32) for part in at]
            step = max(_GATHER_BYTES // self.layout.factor_bytes, 1)
            for start in range(0, len(union), step):
                block = union[start : start + step]
                with timed("gather"):
                    factors, read = self._rows.factors(block)
                total += read

                def score(i: int, block: np.ndarray = block, factors: torch.Tensor = factors) -> None:
                    low, high = np.searchsorted(at[i], [block[0], block[-1] + 1])
                    if high > low:
                        places = np.searchsorted(block, at[i][low:high])
                        # One query that wants the whole block needs no copy of it.
                        all_of_it = len(places) == len(block)
                        own = factors if all_of_it else SCRATCH.select("mine", factors, torch.from_numpy(places))
                        scores[i][low:high] = asked[i][0].score_factors(own)[0].cpu().numpy()

                with timed("rescore"):
                    each(score, range(len(asked)))
            return scores

        places, sizes = [where for where, _ in mine], [len(positions) for _, positions in asked]
        return self._team.assembled(compute, places, sizes), total

"""Rows: those of an index that this rank holds, with the codec that knows what they mean.

A build that is under way and an opened index alike hold their rows so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ..capture.gradients import GradientBlock
from ..codecs.base import RowCodec
from ..curvature.fit import RowPass
from ..curvature.sketch import Named, Sketch
from ..linalg.sampling import drawn
from ..linalg.scratch import CPU
from ..ranks import ALONE, Ranks
from ..storage.manifest import Manifest
from ..storage.resident import Resident
from ..storage.store import Store
from ..storage.team import Team
from .devices import room_on
from .rescoring import Rescorer

# Rows read together.
_BLOCK_ROWS = 512


class IndexRows:
    """An index's rows.

    Args:
        folder: of the index.
        manifest: that names its shards.
        codec: what rows mean.
        seed: of random choices of rows.
        device: where rows are scored.
        removed: rising ids of rows that are dead, or None.
        verify: when streamed shards are compared with their digests (`store.VERIFY`).
        damaged: names of shards that are left out.
        ranks: who hold the index together, and all make theirs at the same time.

    Attributes:
        team: which rows this rank holds; `store` has those.
        live_count: rows of all ranks that answers are taken from.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        codec: RowCodec,
        *,
        seed: int = 0,
        device: torch.device = CPU,
        removed: np.ndarray | None = None,
        verify: str = "first",
        damaged: Collection[str] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.codec, self.ranks, self.device, self._seed = folder, codec, ranks, device, seed
        self.team, held = Team.of(manifest, ranks), -1
        with ranks.jointly():
            size, shards = codec.row_bytes, self.team.shards
            self.store = Store(folder, size, shards, removed=removed, verify=verify, damaged=damaged)
            held = self.store.live_count
        self.live_count = held if ranks.size == 1 else ranks.count(held)

    @cached_property
    def resident(self) -> Resident:
        """The rows where they are scored: on a GPU those that fit stay there."""
        return Resident(self.store, self.device, room_on(self.device))

    @cached_property
    def rescorer(self) -> Rescorer:
        """Scores rows of all ranks by their positions."""
        return Rescorer(self.resident, self.codec, self.team, self.live_count)

    def drawn(self, what: str, most: int) -> tuple[np.ndarray, int]:
        """Random live rows of the whole index: sorted positions, in this rank's shards, of those that it holds, and how
        many all ranks have.

        Args:
            what: names the random numbers.
            most: how many.
        """
        if self.ranks.size == 1:
            live = self.store.live
            chosen = np.sort(drawn(len(live), most, self._seed, what, len(live)))
            return live[chosen], len(chosen)
        total = len(self.team)
        _, local = self.team.locally(np.sort(drawn(total, most, self._seed, what, total)))
        dead = self.store.dead
        local = local if dead is None else local[~dead[local]]
        return local, self.ranks.count(len(local))

    def blocks(self, positions: np.ndarray) -> Iterator[torch.Tensor]:
        """Rows at some positions in this rank's shards, some hundred at a time: bounds memory."""
        for start in range(0, len(positions), _BLOCK_ROWS):
            yield self.store.gather(positions[start : start + _BLOCK_ROWS])

    def gradients(self, positions: np.ndarray | None = None) -> RowPass:
        """Walks over what rows stand for: those at some positions in this rank's shards, or all."""
        if positions is None:
            return partial(self._decoded, lambda: (rows for _, rows in self.store.stream()))
        return partial(self._decoded, lambda: self.blocks(positions))

    def _decoded(self, rows: Callable[[], Iterable[torch.Tensor]]) -> Iterator[GradientBlock]:
        at = 0
        for block in rows():
            yield GradientBlock(np.arange(at, at + len(block), dtype=np.int64), self.codec.gradients(block))
            at += len(block)

    def coordinates(self, sketch: Sketch | Named, first: int = 0) -> Iterator[torch.Tensor]:
        """z (n, k) float32 of this rank's rows from position `first` on, by blocks; by `Named` shortened rows."""
        sketched = self.codec.sketcher(sketch)
        for _, rows in self.store.stream(first):
            yield sketched(rows)

    def positions_of(self, ids: np.ndarray) -> np.ndarray:
        """Positions of rows by their ids, in the whole index; -1 where there is no such row, or no longer."""
        with self.ranks.jointly():
            local = self.store.positions_of(ids)
        if self.ranks.size == 1:
            return local
        # One rank has it: the sum of what is found, plus one, is that.
        found = torch.from_numpy(self.team.globally(local) + 1)
        return self.ranks.sum(found).numpy() - 1

    def energies_of(self, ids: np.ndarray) -> np.ndarray:
        """(m,) float32: squared norms of live examples' gradients, by their ids, whichever rank holds their rows."""
        places, local = self.team.locally(self.positions_of(ids))
        return self.team.assembled(lambda: [self.store.energies_at(local)], [places], [len(ids)])[0]

    def ids_at(self, positions: np.ndarray) -> np.ndarray:
        """Ids of rows at positions (any shape) in the whole index."""
        if self.ranks.size == 1:
            return self.store.ids[positions]
        places, local = self.team.locally(positions.ravel())
        found = self.team.assembled(lambda: [self.store.ids[local]], [places], [positions.size], dtype=np.int64)
        return found[0].reshape(positions.shape)

    def payloads_at(self, positions: np.ndarray) -> list[bytes | None]:
        """Payloads of rows at positions (m,) in the whole index; None where a row has none."""
        if self.ranks.size == 1:
            return self.store.payloads(positions)
        places, local = self.team.locally(positions)
        with self.ranks.jointly():
            found = zip(places.tolist(), self.store.payloads(local), strict=True)
            mine = [(place, value.decode()) for place, value in found if value is not None]
        out: list[bytes | None] = [None] * len(positions)
        for theirs in self.ranks.gather_values(mine):
            for place, value in theirs:
                out[place] = value.encode()
        return out

    def close(self) -> None:
        """Gives the file handles back."""
        self.store.close()

"""Store: an index's rows, shard after shard; appended while building, streamed or gathered when searching.

Rows are addressed by position. Removed ones keep theirs until the index is compacted, and are dead: read, perhaps, but
never answered with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .shards import Shard, ShardInfo, write_shard

BLOCK_BYTES = 4 << 20
VERIFY = ("first", "always", "never")
"""When streamed shards are compared with their digests: before their first use, before every pass, or never. Rows that
are gathered singly are always compared with their checksums."""
_READ_AHEAD = 2


class StoreWriter:
    """Collects rows up to a shard's size, and seals shards one after another.

    Args:
        folder: where the shards go; must exist.
        row_bytes: of a row.
        shard_bytes: most bytes of a shard's rows; about as many of its payloads also make it full.
        sealed: shards that are there already, to which the new ones are appended.
        name: gives a new shard's name.
    """

    def __init__(
        self,
        folder: Path,
        row_bytes: int,
        shard_bytes: int,
        sealed: list[ShardInfo],
        name: Callable[[], str],
    ) -> None:
        self._folder = folder
        self._row_bytes = row_bytes
        self.sealed = sealed
        self._name = name
        self._bytes, self._payload_bytes = shard_bytes, 0
        self._payloads: list[bytes] | None = None
        self._capacity = max(shard_bytes // row_bytes, 1)
        self._rows = torch.empty(0, row_bytes, dtype=torch.uint8)
        self._ids = np.empty(self._capacity, dtype=np.int64)
        self._energies = np.empty(self._capacity, dtype=np.float32)
        self._filled = 0
        self._pool: ThreadPoolExecutor | None = None
        self._written: Future[ShardInfo] | None = None
        self._on_sealed: Callable[[], None] | None = None
        # Of the shard before: room for the one after.
        self._spare: tuple[torch.Tensor, np.ndarray, np.ndarray] | None = None

    @contextmanager
    def aside(self, on_sealed: Callable[[], None]) -> Iterator[None]:
        """Inside, another thread writes a full shard while the caller makes the rows of the next one; never more than
        one. A shard counts as sealed when it is there, at the latest on leaving, whatever ended the work.

        Args:
            on_sealed: called by the caller's thread whenever a shard was sealed, while none is being written: files
                are touched in one order, as if there were one thread.

        Raises:
            OSError: what went wrong in writing, at the next call that waits for it.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorif-write") as pool:
            self._pool, self._on_sealed = pool, on_sealed
            try:
                yield
            except BaseException:
                # The first error is the caller's.
                with suppress(Exception):
                    self._settle()
                raise
            else:
                self._settle()
            finally:
                self._pool = self._written = self._on_sealed = None

    def append(
        self,
        rows: torch.Tensor,
        ids: np.ndarray,
        energies: np.ndarray,
        payloads: Sequence[bytes] | None = None,
    ) -> bool:
        """Adds rows (n, row_bytes), always with payloads or always without; whether a shard was sealed."""
        sealed_before = len(self.sealed)
        if payloads is not None and self._payloads is None:
            self._payloads = []
        at = 0
        while at < len(ids):
            take = min(len(ids) - at, self._capacity - self._filled)
            self._grow(self._filled + take)
            room = slice(self._filled, self._filled + take)
            self._rows[room] = rows[at : at + take]
            self._ids[room] = ids[at : at + take]
            self._energies[room] = energies[at : at + take]
            if self._payloads is not None and payloads is not None:
                self._payloads += payloads[at : at + take]
                self._payload_bytes += sum(map(len, payloads[at : at + take]))
            self._filled += take
            at += take
            if self._filled == self._capacity or self._payload_bytes >= self._bytes:
                self._hand_over()
        return len(self.sealed) > sealed_before

    def flush(self) -> None:
        """Seals what has been collected."""
        self._settle()
        if self._filled:
            shard = self._collected()()
            self._empty()
            self._add(shard)

    def _hand_over(self) -> None:
        """Seals what has been collected, or has it sealed."""
        if self._pool is None:
            self.flush()
            return
        self._settle()
        self._written = self._pool.submit(self._collected())
        full = self._rows, self._ids, self._energies
        room = self._spare or (self._rows[:0].clone(), np.empty_like(self._ids), np.empty_like(self._energies))
        (self._rows, self._ids, self._energies), self._spare = room, full
        self._empty()

    def _collected(self) -> Callable[[], ShardInfo]:
        """What writes and seals what has been collected, as it is now."""
        kept = slice(self._filled)
        rows, ids, energies = self._rows[kept], self._ids[kept], self._energies[kept]
        return partial(write_shard, self._folder, self._name(), rows, ids, energies, self._payloads)

    def _empty(self) -> None:
        self._filled = self._payload_bytes = 0
        self._payloads = None if self._payloads is None else []

    def _settle(self) -> None:
        """Waits for the shard that is being written, if any."""
        if self._written is not None:
            shard = self._written.result()
            self._written = None
            self._add(shard)

    def _add(self, shard: ShardInfo) -> None:
        self.sealed.append(shard)
        if self._on_sealed is not None:
            self._on_sealed()

    def _grow(self, needed: int) -> None:
        # Grown by doubling: a small index need not hold a whole shard's memory.
        if needed > len(self._rows):
            size = min(max(2 * len(self._rows), needed), self._capacity)
            larger = torch.empty(size, self._row_bytes, dtype=torch.uint8)
            larger[: self._filled] = self._rows[: self._filled]
            self._rows = larger


class Store:
    """The sealed rows of an index, addressed by position 0 .. n - 1.

    Args:
        folder: of the index.
        row_bytes: of a row.
        shards: in order.
        removed: rising ids of rows that are dead.
        verify: one of `VERIFY`.
        damaged: names of shards whose rows are dead, and which are not read.
    """

    def __init__(
        self,
        folder: Path,
        row_bytes: int,
        shards: list[ShardInfo],
        *,
        removed: np.ndarray | None = None,
        verify: str = "first",
        damaged: Collection[str] = (),
    ) -> None:
        self.row_bytes = row_bytes
        self.shards = [Shard(folder, info, row_bytes) for info in shards]
        self._starts = np.cumsum([0, *(info.rows for info in shards)])
        self._ids: np.ndarray | None = None
        self._removed, self._verify, self.damaged = removed, verify, frozenset(damaged)
        self._dead: np.ndarray | None = None
        self._gone = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.file.info.size for shard in self.shards)

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64: the row ids, by position, rising; of the dead, too."""
        if self._ids is None:
            parts = [self._ids_of(shard) for shard in self.shards]
            self._ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return self._ids

    def _ids_of(self, shard: Shard) -> np.ndarray:
        if shard.info.sealed.file not in self.damaged:
            return shard.ids()
        # Which ids the rows of a damaged shard had is only known by its range.
        return np.minimum(np.arange(shard.count) + shard.info.first_id, shard.info.last_id)

    @property
    def dead(self) -> np.ndarray | None:
        """(n,) bool: which rows are removed or in a damaged shard; None where none is."""
        if self._removed is None and not self.damaged:
            return None
        with self._lock:
            if self._dead is None:
                dead = np.zeros(len(self), dtype=bool)
                if self._removed is not None and len(self._removed):
                    dead = np.isin(self.ids, self._removed)
                for shard, start in zip(self.shards, self._starts[:-1].tolist(), strict=True):
                    if shard.info.sealed.file in self.damaged:
                        dead[start : start + shard.count] = True
                self._gone = int(dead.sum())
                self._dead = dead
        return self._dead

    @property
    def live(self) -> np.ndarray:
        """(m,) int64: positions of the rows that answers are taken from, rising."""
        dead = self.dead
        return np.arange(len(self), dtype=np.int64) if dead is None else np.flatnonzero(~dead)

    @property
    def live_count(self) -> int:
        dead = self.dead
        return len(self) if dead is None else len(self) - self._gone

    @property
    def live_ids(self) -> np.ndarray:
        """(m,) int64: ids of the rows that answers are taken from, rising."""
        dead = self.dead
        return self.ids if dead is None else self.ids[~dead]

    def positions_of(self, wanted: np.ndarray) -> np.ndarray:
        """Positions of rows by their ids (m,); -1 where there is no such row, or no longer."""
        own, dead = self.ids, self.dead
        at = np.searchsorted(own, wanted)
        inside = at < len(own)
        good = np.zeros(len(wanted), dtype=bool)
        good[inside] = own[at[inside]] == wanted[inside]
        if dead is not None:
            good[inside] &= ~dead[at[inside]]
        return np.where(good, at, -1)

    def first_position(self, number: int) -> int:
        """Of the first row of a shard."""
        return int(self._starts[number])

    def close(self) -> None:
        for shard in self.shards:
            shard.file.close()

    def stream(self, first: int = 0, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows from position `first` on, in order, as (position of the first, rows (n, row_bytes) uint8).

        The next block is read while the caller works on this one. A block is a view of a buffer that is used again:
        it is good until the next one is asked for.
        """
        rows = max(min(block_bytes // self.row_bytes, max((s.count for s in self.shards), default=1)), 1)
        pieces = [
            (shard, int(start), i, min(i + rows, shard.count))
            for shard, start in zip(self.shards, self._starts[:-1], strict=True)
            for i in range(min(max(first - int(start), 0), shard.count), shard.count, rows)
            if shard.info.sealed.file not in self.damaged
        ]
        buffers = [torch.empty(rows, self.row_bytes, dtype=torch.uint8) for _ in range(_READ_AHEAD + 1)]
        views = [_bytes(buffer) for buffer in buffers]

        def read(number: int) -> None:
            shard, _, start, stop = pieces[number]
            if start == 0 or number == 0:
                self._check(shard)
            shard.read(start, stop, views[number % len(views)])

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorif-read") as pool:
            pending = [pool.submit(read, i) for i in range(min(_READ_AHEAD, len(pieces)))]
            for i, (_, first, start, stop) in enumerate(pieces):
                pending.pop(0).result()
                if i + _READ_AHEAD < len(pieces):
                    # The buffer it fills is the one the caller had before this block: it has been given back.
                    pending.append(pool.submit(read, i + _READ_AHEAD))
                yield first + start, buffers[i % len(buffers)][: stop - start]

    def gather(self, positions: np.ndarray, *, check: bool = True, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows at some positions, in the order asked for, (m, row_bytes) uint8, into `out` if given.

        Args:
            positions: (m,) int64 in [0, n).
            check: compare each row with its checksum.
            out: contiguous room for them.

        Raises:
            CorruptionError: a row does not match its checksum.
        """
        size = self.row_bytes
        if out is None:
            out = torch.empty(len(positions), size, dtype=torch.uint8)
        raw, flat = out.numpy(), _bytes(out)
        order = np.argsort(positions, kind="stable")
        ends = np.searchsorted(positions[order], self._starts[1:])
        begin = 0
        for shard, start, end in zip(self.shards, self._starts[:-1], ends.tolist(), strict=True):
            if end > begin:
                places = order[begin:end]
                local = positions[places] - start
                shard.gather(local, [flat[p * size : (p + 1) * size] for p in places.tolist()])
                if check:
                    shard.check(local, raw, places)
            begin = end
        return out

    def payloads(self, positions: np.ndarray) -> list[bytes | None]:
        """The payloads of rows at some positions, in the order asked for; None where a row has none.

        Raises:
            CorruptionError: one does not match its checksum.
        """
        out: list[bytes | None] = [None] * len(positions)
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        for owner in np.unique(owners).tolist():
            shard, places = self.shards[owner], np.flatnonzero(owners == owner)
            if shard.has_payloads:
                found = shard.payloads(positions[places] - self._starts[owner])
                for place, payload in zip(places.tolist(), found, strict=True):
                    out[place] = payload
        return out

    def energies(self) -> np.ndarray:
        """(n,) float32: squared norms of the examples' gradients, by position."""
        return np.concatenate([np.empty(0, np.float32), *(shard.energies() for shard in self.shards)])

    def energies_at(self, positions: np.ndarray) -> np.ndarray:
        """(m,) float32: squared norms of some examples' gradients."""
        out = np.empty(len(positions), dtype=np.float32)
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            out[places] = self.shards[owner].energies()[positions[places] - self._starts[owner]]
        return out

    def _check(self, shard: Shard) -> None:
        """Compares a shard with its digest before it is streamed, as often as it was said."""
        if self._verify == "always":
            shard.file.verify()
        elif self._verify == "first":
            shard.file.verify_once()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data

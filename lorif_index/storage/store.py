"""Store: an index's rows, shard after shard; appended while building, streamed or gathered when searching.

Rows are addressed by position. Removed ones keep theirs until the index is compacted, and are dead: read, perhaps, but
never answered with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..capture.contents import CONTENT_BYTES
from .scattered import SCATTERED
from .shards import Entries, Shard, ShardInfo, write_shard

BLOCK_BYTES = 4 << 20
VERIFY = ("first", "always", "never")
"""When streamed shards are compared with their digests: before their first use, before every pass, or never. Rows that
are gathered singly are always compared with their checksums."""
_READ_AHEAD = 2


class StoreWriter:
    """Collects rows up to a shard's size, and seals shards one after another.

    Args:
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
        self.sealed = sealed
        self._folder, self._shard_bytes, self._name = folder, shard_bytes, name
        self._capacity = max(shard_bytes // row_bytes, 1)
        # As they came.
        self._parts: list[Entries] = []
        self._filled = self._payload_bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._written: Future[ShardInfo] | None = None
        self._on_sealed: Callable[[], None] | None = None

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

    def append(self, entries: Entries) -> None:
        """Adds rows, always with payloads or always without, and so of contents."""
        at = 0
        while at < len(entries):
            part = entries.part(slice(at, at + self._capacity - self._filled))
            self._parts.append(part)
            at += len(part)
            self._filled += len(part)
            self._payload_bytes += sum(map(len, part.payloads or ()))
            if self._filled == self._capacity or self._payload_bytes >= self._shard_bytes:
                self._hand_over()

    def flush(self) -> None:
        """Seals what has been collected."""
        self._settle()
        if self._filled:
            self._add(self._collected()())

    def _hand_over(self) -> None:
        """Seals what has been collected, or has it sealed."""
        if self._pool is None:
            self.flush()
            return
        self._settle()
        self._written = self._pool.submit(self._collected())

    def _collected(self) -> Callable[[], ShardInfo]:
        """What writes and seals what has been collected, which is then no longer held here."""
        together = Entries.together(self._parts)
        self._parts, self._filled, self._payload_bytes = [], 0, 0
        return partial(write_shard, self._folder, self._name(), together)

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


class Store:
    """The sealed rows of an index, addressed by position 0 .. n - 1.

    Args:
        removed: rising ids of rows that are dead.
        verify: one of `VERIFY`.
        damaged: names of shards whose rows are dead, and which are not read.

    Attributes:
        starts: (shards + 1,) positions of the shards' first rows, and n.
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
        self.starts = np.cumsum([0, *(info.rows for info in shards)])
        self._removed, self._verify, self.damaged = removed, verify, frozenset(damaged)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.file.info.size for shard in self.shards)

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) int64: the row ids, by position, rising; of the dead, too."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(self._ids_of(shard) for shard in self.shards)])

    def _ids_of(self, shard: Shard) -> np.ndarray:
        if shard.info.sealed.file not in self.damaged:
            return shard.ids()
        # Which ids the rows of a damaged shard had is only known by its range.
        return np.minimum(np.arange(shard.count) + shard.info.first_id, shard.info.last_id)

    @cached_property
    def dead(self) -> np.ndarray | None:
        """(n,) bool: which rows are removed or in a damaged shard; None where none is."""
        if self._removed is None and not self.damaged:
            return None
        dead = np.isin(self.ids, () if self._removed is None else self._removed)
        for shard, start in zip(self.shards, self.starts.tolist(), strict=False):
            if shard.info.sealed.file in self.damaged:
                dead[start : start + shard.count] = True
        return dead

    @property
    def live(self) -> np.ndarray:
        """(m,) int64: positions of the rows that answers are taken from, rising."""
        dead = self.dead
        return np.arange(len(self), dtype=np.int64) if dead is None else np.flatnonzero(~dead)

    @cached_property
    def live_count(self) -> int:
        return len(self) if self.dead is None else len(self) - int(self.dead.sum())

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
            for shard, start in zip(self.shards, self.starts[:-1], strict=True)
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

    def gather(self, positions: np.ndarray, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows at some positions, in the order asked for, (m, row_bytes) uint8, into `out` if given.

        Args:
            positions: (m,) int64 in [0, n).
            out: contiguous room for them.

        Raises:
            CorruptionError: a row does not match its checksum.
        """
        size = self.row_bytes
        if out is None:
            out = torch.empty(len(positions), size, dtype=torch.uint8)
        raw, flat = out.numpy(), _bytes(out)
        parts = list(self._by_shard(positions))
        read = self._read_cached(parts, raw)
        for shard, places, local in parts:
            if len(left := np.flatnonzero(~read[places])):
                shard.gather(local[left], [flat[p * size : (p + 1) * size] for p in places[left].tolist()])
            shard.check(local, raw, places)
        return out

    @staticmethod
    def _read_cached(parts: Sequence[tuple[Shard, np.ndarray, np.ndarray]], raw: np.ndarray) -> np.ndarray:
        """Reads what the page cache has of some shards' rows, to their places in `raw`; which rows that were."""
        held = [shard.file.for_scattered() for shard, _, _ in parts]
        # No file, where no shard has the row.
        files, offsets = np.full(len(raw), -1, np.int32), np.zeros(len(raw), np.int64)
        for file, (shard, places, local) in zip(held, parts, strict=True):
            files[places], offsets[places] = file.fd, shard.offsets(local)
        return SCATTERED.read(files, offsets, raw)

    def payloads(self, positions: np.ndarray) -> list[bytes | None]:
        """The payloads of rows at some positions, in the order asked for; None where a row has none.

        Raises:
            CorruptionError: one does not match its checksum.
        """
        out: list[bytes | None] = [None] * len(positions)
        for shard, places, local in self._by_shard(positions):
            if shard.has_payloads:
                for place, payload in zip(places.tolist(), shard.payloads(local), strict=True):
                    out[place] = payload
        return out

    def energies_at(self, positions: np.ndarray) -> np.ndarray:
        """(m,) float32: squared norms of some examples' gradients."""
        out = np.empty(len(positions), dtype=np.float32)
        for shard, places, local in self._by_shard(positions):
            out[places] = shard.energies()[local]
        return out

    def contents_at(self, positions: np.ndarray) -> np.ndarray | None:
        """(m, 16) uint8: hashes of some examples; None where one has none."""
        out = np.empty((len(positions), CONTENT_BYTES), dtype=np.uint8)
        for shard, places, local in self._by_shard(positions):
            found = shard.contents()
            if found is None:
                return None
            out[places] = found[local]
        return out

    def _by_shard(self, positions: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Of each shard that has some of the rows: their places in `positions`, and their rising positions in it."""
        order = np.argsort(positions, kind="stable")
        ends = np.searchsorted(positions[order], self.starts).tolist()
        for shard, start, (begin, end) in zip(self.shards, self.starts[:-1], pairwise(ends), strict=True):
            if end > begin:
                yield shard, order[begin:end], positions[order[begin:end]] - start

    def _check(self, shard: Shard) -> None:
        """Compares a shard with its digest before it is streamed, as often as it was said."""
        if self._verify == "always":
            shard.file.verify()
        elif self._verify == "first":
            shard.file.verify_once()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data

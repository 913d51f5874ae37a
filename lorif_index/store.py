"""Store: an index's rows, shard after shard; appended while building, streamed or gathered when searching."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .rows import RowLayout
from .shards import Shard, ShardInfo, write_shard

BLOCK_BYTES = 4 << 20
_READ_AHEAD = 2


class StoreWriter:
    """Collects rows up to a shard's size, and seals shards one after another.

    Args:
        folder: where the shards go; must exist.
        layout: the rows' layout.
        shard_bytes: rows of a shard, in bytes.
        sealed: shards that are there already, when an interrupted build goes on.
    """

    def __init__(self, folder: Path, layout: RowLayout, shard_bytes: int, sealed: list[ShardInfo]) -> None:
        self._folder = folder
        self._layout = layout
        self.sealed = sealed
        self._capacity = max(shard_bytes // layout.row_bytes, 1)
        self._rows = torch.empty(0, layout.row_bytes, dtype=torch.uint8)
        self._ids = np.empty(self._capacity, dtype=np.int64)
        self._filled = 0

    def append(self, rows: torch.Tensor, ids: np.ndarray) -> bool:
        """Adds rows (n, row_bytes) uint8; whether a shard was sealed."""
        sealed_before = len(self.sealed)
        at = 0
        while at < len(ids):
            take = min(len(ids) - at, self._capacity - self._filled)
            self._grow(self._filled + take)
            self._rows[self._filled : self._filled + take] = rows[at : at + take]
            self._ids[self._filled : self._filled + take] = ids[at : at + take]
            self._filled += take
            at += take
            if self._filled == self._capacity:
                self.flush()
        return len(self.sealed) > sealed_before

    def flush(self) -> None:
        """Seals what has been collected."""
        if not self._filled:
            return
        name = f"shard-{len(self.sealed):06d}.h5"
        rows, ids = self._rows[: self._filled], self._ids[: self._filled]
        dtype = None if self._layout.codes else self._layout.dtype
        self.sealed.append(write_shard(self._folder, name, rows, ids, dtype))
        self._filled = 0

    def _grow(self, needed: int) -> None:
        # Grown by doubling: a small index need not hold a whole shard's memory.
        if needed > len(self._rows):
            size = min(max(2 * len(self._rows), needed), self._capacity)
            larger = torch.empty(size, self._layout.row_bytes, dtype=torch.uint8)
            larger[: self._filled] = self._rows[: self._filled]
            self._rows = larger


class Store:
    """The sealed rows of an index, addressed by position 0 .. n - 1."""

    def __init__(self, folder: Path, layout: RowLayout, shards: list[ShardInfo]) -> None:
        self.layout = layout
        self.shards = [Shard(folder, info, layout.row_bytes) for info in shards]
        self._starts = np.cumsum([0, *(info.rows for info in shards)])
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.file.info.size for shard in self.shards)

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64: the row ids, by position."""
        if self._ids is None:
            parts = [shard.ids() for shard in self.shards]
            self._ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return self._ids

    def close(self) -> None:
        for shard in self.shards:
            shard.file.close()

    def stream(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, as (position of the first, rows (n, row_bytes) uint8).

        The next block is read while the caller works on this one. A block is a view of a buffer that is used again:
        it is good until the next one is asked for.
        """
        rows = max(min(block_bytes // self.layout.row_bytes, max((s.count for s in self.shards), default=1)), 1)
        pieces = [
            (shard, int(start), i, min(i + rows, shard.count))
            for shard, start in zip(self.shards, self._starts[:-1], strict=True)
            for i in range(0, shard.count, rows)
        ]
        buffers = [torch.empty(rows, self.layout.row_bytes, dtype=torch.uint8) for _ in range(_READ_AHEAD + 1)]
        views = [buffer.numpy().data.cast("B") for buffer in buffers]

        def read(number: int) -> None:
            shard, _, start, stop = pieces[number]
            shard.read_rows(start, stop, views[number % len(views)])

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorif-read") as pool:
            pending = [pool.submit(read, i) for i in range(min(_READ_AHEAD, len(pieces)))]
            for i, (_, first, start, stop) in enumerate(pieces):
                pending.pop(0).result()
                if i + _READ_AHEAD < len(pieces):
                    # The buffer it fills is the one the caller had before this block: it has been given back.
                    pending.append(pool.submit(read, i + _READ_AHEAD))
                yield first + start, buffers[i % len(buffers)][: stop - start]

    def gather(self, positions: np.ndarray, *, check: bool = True) -> torch.Tensor:
        """Rows at some positions, (m, row_bytes) uint8, in the order asked for.

        Args:
            positions: (m,) int64 in [0, n).
            check: compare each row with its checksum.

        Raises:
            CorruptionError: a row does not match its checksum.
        """
        size = self.layout.row_bytes
        out = torch.empty(len(positions), size, dtype=torch.uint8)
        raw = out.numpy()
        flat = raw.reshape(-1).data
        order = np.argsort(positions, kind="stable")
        ends = np.searchsorted(positions[order], self._starts[1:])
        begin = 0
        for shard, start, end in zip(self.shards, self._starts[:-1], ends.tolist(), strict=True):
            if end > begin:
                places = order[begin:end]
                local = positions[places] - start
                shard.gather_rows(local, [flat[p * size : (p + 1) * size] for p in places.tolist()])
                if check:
                    shard.check_rows(local, raw, places)
            begin = end
        return out

    def verify(self) -> None:
        """Compares every shard with its digest; raises `CorruptionError` at the first that differs."""
        for shard in self.shards:
            shard.file.verify()


class BlockBuffer(threading.local):
    """A float32 buffer per thread for converted blocks: allocating afresh costs page faults at every block."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0)

    def convert(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as float32, in a buffer that is used again."""
        if self._buffer.shape[0] < rows.shape[0] or self._buffer.shape[1] != rows.shape[1]:
            self._buffer = torch.empty(rows.shape)
        out = self._buffer[: rows.shape[0]]
        # copy_ converts halves several times faster than .float() (measured on CPUs with F16C).
        return out.copy_(rows)

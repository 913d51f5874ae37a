"""Store: an index's rows, shard after shard; appended while building, streamed or gathered when searching."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .rows import RowLayout, Rows
from .shards import Part, Shard, ShardInfo, write_shard

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
        self._rows = layout.empty(0)
        self._ids = np.empty(self._capacity, dtype=np.int64)
        self._filled = 0

    def append(self, rows: Rows, ids: np.ndarray) -> bool:
        """Adds rows; whether a shard was sealed."""
        sealed_before = len(self.sealed)
        at = 0
        while at < len(ids):
            take = min(len(ids) - at, self._capacity - self._filled)
            self._grow(self._filled + take)
            room = slice(self._filled, self._filled + take)
            self._rows.factors[room] = rows.factors[at : at + take]
            self._rows.codes[room] = rows.codes[at : at + take]
            self._ids[room] = ids[at : at + take]
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
        self.sealed.append(write_shard(self._folder, name, rows, ids, self._layout.dtype))
        self._filled = 0

    def _grow(self, needed: int) -> None:
        # Grown by doubling: a small index need not hold a whole shard's memory.
        if needed > len(self._rows):
            size = min(max(2 * len(self._rows), needed), self._capacity)
            larger = self._layout.empty(size)
            larger.factors[: self._filled] = self._rows.factors[: self._filled]
            larger.codes[: self._filled] = self._rows.codes[: self._filled]
            self._rows = larger


class Store:
    """The sealed rows of an index, addressed by position 0 .. n - 1."""

    def __init__(self, folder: Path, layout: RowLayout, shards: list[ShardInfo]) -> None:
        self.layout = layout
        self.shards = [Shard(folder, info, layout) for info in shards]
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

    def stream(self, first: int = 0, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Rows]]:
        """Rows from position `first` on, in order, as (position of the first, rows).

        The next block is read while the caller works on this one. A block is a view of a buffer that is used again:
        it is good until the next one is asked for.
        """
        rows = max(min(block_bytes // max(self.layout.row_bytes, 1), max((s.count for s in self.shards), default=1)), 1)
        pieces = [
            (shard, int(start), i, min(i + rows, shard.count))
            for shard, start in zip(self.shards, self._starts[:-1], strict=True)
            for i in range(min(max(first - int(start), 0), shard.count), shard.count, rows)
        ]
        buffers = [self.layout.empty(rows) for _ in range(_READ_AHEAD + 1)]
        views = [(_bytes(buffer.factors), _bytes(buffer.codes)) for buffer in buffers]

        def read(number: int) -> None:
            shard, _, start, stop = pieces[number]
            factors, codes = views[number % len(views)]
            shard.factors.read(start, stop, factors)
            shard.codes.read(start, stop, codes)

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lorif-read") as pool:
            pending = [pool.submit(read, i) for i in range(min(_READ_AHEAD, len(pieces)))]
            for i, (_, first, start, stop) in enumerate(pieces):
                pending.pop(0).result()
                if i + _READ_AHEAD < len(pieces):
                    # The buffer it fills is the one the caller had before this block: it has been given back.
                    pending.append(pool.submit(read, i + _READ_AHEAD))
                yield first + start, buffers[i % len(buffers)][: stop - start]

    def gather(self, positions: np.ndarray, *, check: bool = True) -> Rows:
        """Rows at some positions, in the order asked for.

        Args:
            positions: (m,) int64 in [0, n).
            check: compare each row with its checksums.

        Raises:
            CorruptionError: a row does not match its checksum.
        """
        return Rows(self.gather_factors(positions, check=check), self.gather_codes(positions, check=check))

    def gather_factors(
        self, positions: np.ndarray, *, check: bool = True, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The factors of rows at some positions, (m, width) in the stored dtype (see `gather`), into `out` if given."""
        if out is None:
            out = torch.empty(len(positions), self.layout.width, dtype=self.layout.torch_dtype)
        self._gather([shard.factors for shard in self.shards], positions, out.view(torch.uint8), check)
        return out

    def gather_codes(self, positions: np.ndarray, *, check: bool = True) -> torch.Tensor:
        """The codes of rows at some positions, (m, code bytes) uint8 (see `gather`)."""
        out = torch.empty(len(positions), self.layout.code_bytes, dtype=torch.uint8)
        self._gather([shard.codes for shard in self.shards], positions, out, check)
        return out

    def all_codes(self) -> torch.Tensor:
        """The codes of all rows, (n, code bytes) uint8: mind the memory."""
        out = torch.empty(len(self), self.layout.code_bytes, dtype=torch.uint8)
        for shard, start in zip(self.shards, self._starts[:-1].tolist(), strict=True):
            shard.codes.read(0, shard.count, _bytes(out[start : start + shard.count]))
        return out

    def _gather(self, parts: list[Part], positions: np.ndarray, out: torch.Tensor, check: bool) -> None:
        size = out.shape[1]
        if not size:
            return
        raw = out.numpy()
        flat = _bytes(out)
        order = np.argsort(positions, kind="stable")
        ends = np.searchsorted(positions[order], self._starts[1:])
        begin = 0
        for part, start, end in zip(parts, self._starts[:-1], ends.tolist(), strict=True):
            if end > begin:
                places = order[begin:end]
                local = positions[places] - start
                part.gather(local, [flat[p * size : (p + 1) * size] for p in places.tolist()])
                if check:
                    part.check(local, raw, places)
            begin = end

    def verify(self) -> None:
        """Compares every shard with its digest; raises `CorruptionError` at the first that differs."""
        for shard in self.shards:
            shard.file.verify()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data

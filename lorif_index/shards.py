"""Shards: sealed files of rows, their ids and their checksums.

A shard holds `rows`, (n, width) in the stored dtype where they are factors alone and (n, row bytes) uint8 otherwise,
`ids` (n,) int64 and `checksums` (n,) uint64, the XXH3-64 of each row's bytes, so that single rows gathered from it can
be verified too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from .errors import CorruptionError
from .sealed import SealedFile, SealedInfo, write_sealed

# bfloat16 has no HDF5 type of its own: its bits are stored as unsigned integers, and the attribute `dtype` says so.
_VIEWS = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest records it.

    Attributes:
        sealed: the file.
        rows: n.
        first_id, last_id: of its rows; ids rise along the shards.
    """

    sealed: SealedInfo
    rows: int
    first_id: int
    last_id: int

    def to_json(self) -> dict[str, Any]:
        return {
            "sealed": self.sealed.to_json(),
            "rows": self.rows,
            "first_id": self.first_id,
            "last_id": self.last_id,
        }

    @classmethod
    def from_json(cls, data: Any) -> ShardInfo:
        try:
            sealed = SealedInfo.from_json(data["sealed"])
            numbers = (data["rows"], data["first_id"], data["last_id"])
        except (TypeError, KeyError) as error:
            raise CorruptionError(f"the manifest's entry of a shard is not as expected: {error!r}") from None
        if not all(isinstance(v, int) and v >= 0 for v in numbers) or numbers[0] == 0:
            raise CorruptionError(f"the manifest's entry of shard {sealed.file} has rows and ids {numbers}")
        return cls(sealed, *numbers)


def write_shard(folder: Path, name: str, rows: torch.Tensor, ids: np.ndarray, dtype: str | None) -> ShardInfo:
    """Writes and seals one shard.

    Args:
        folder: an existing folder.
        name: the file's final name.
        rows: (n, row_bytes) uint8, contiguous, on the CPU; n > 0.
        ids: (n,) int64, rising.
        dtype: "float16", "bfloat16" or "float32" where rows are factors alone, else None.

    Raises:
        OSError: the disk is full or refuses; nothing is left under the final name.
    """
    raw = rows.contiguous().numpy()
    checksums = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in raw), dtype="<u8", count=len(raw))
    arrays = {"rows": raw if dtype is None else raw.view(_VIEWS[dtype]), "ids": ids.astype("<i8"), "checksums": checksums}
    sealed = write_sealed(folder, name, arrays, {"dtype": dtype or "bytes"})
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]))


def write_ids(folder: Path, name: str, ids: np.ndarray) -> ShardInfo:
    """Seals a shard that keeps its ids alone, where rows are in the coarse index only."""
    sealed = write_sealed(folder, name, {"ids": ids.astype("<i8")}, {"dtype": "none"})
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]))


class Shard:
    """A sealed shard for reading."""

    def __init__(self, folder: Path, info: ShardInfo, row_bytes: int) -> None:
        self.count = info.rows
        self.file = SealedFile(folder, info.sealed)
        self._row_bytes = row_bytes
        self._rows_offset = self.file.require("rows", info.rows * row_bytes) if row_bytes else 0
        self._checksums: np.ndarray | None = None

    def read_rows(self, start: int, stop: int, out: memoryview) -> None:
        """Reads rows [start, stop) into the beginning of a buffer of bytes."""
        self.file.read(self._rows_offset + start * self._row_bytes, out[: (stop - start) * self._row_bytes])

    def gather_rows(self, positions: np.ndarray, out: list[memoryview]) -> None:
        """Reads single rows, in rising order of their positions, each into its own buffer."""
        offsets = (self._rows_offset + positions * self._row_bytes).tolist()
        self.file.read_scattered(offsets, out)

    def ids(self) -> np.ndarray:
        """(n,) int64."""
        return self.file.read_array("ids", (self.count,), "<i8").astype(np.int64, copy=False)

    def check_rows(self, positions: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Compares gathered rows with their checksums.

        Args:
            positions: (m,) of the rows in this shard.
            rows: (any, row bytes) uint8.
            places: (m,): where in `rows` each of them is.

        Raises:
            CorruptionError: naming the first row that differs.
        """
        if self._checksums is None:
            self._checksums = self.file.read_array("checksums", (self.count,), "<u8")
        expected, digest = self._checksums[positions].tolist(), xxhash.xxh3_64_intdigest
        found = [digest(rows[place]) for place in places.tolist()]
        if found != expected:
            position = next(p for p, a, b in zip(positions.tolist(), found, expected, strict=True) if a != b)
            raise CorruptionError(
                f"row {position} of {self.file.path} does not match its checksum: restore the file from a copy"
            )

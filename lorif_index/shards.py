"""Shards: sealed files of rows, their ids and their checksums.

A shard holds `ids` (n,) int64; of the factors, or of eigencodes in their place, `rows` (n, width) in the stored dtype
with `checksums` (n,) uint64; of
the coordinates `codes` (n, bytes) uint8 with `code_checksums` (n,) uint64; whichever are kept. A checksum is the
XXH3-64 of a row's bytes, so that single rows gathered from a shard can be verified too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from .errors import CorruptionError
from .rows import RowLayout, Rows
from .sealed import SealedFile, SealedInfo, write_sealed

# bfloat16 has no HDF5 type of its own: its bits are stored as unsigned integers, and the attribute `dtype` says so.
_VIEWS = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "uint8": "u1"}


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


def write_shard(folder: Path, name: str, rows: Rows, ids: np.ndarray, dtype: str) -> ShardInfo:
    """Writes and seals one shard.

    Args:
        folder: an existing folder.
        name: the file's final name.
        rows: n > 0 rows, contiguous, on the CPU.
        ids: (n,) int64, rising.
        dtype: of the factors: "float16", "bfloat16" or "float32"; "uint8" where eigencodes take their place.

    Raises:
        OSError: the disk is full or refuses; nothing is left under the final name.
    """
    arrays: dict[str, np.ndarray] = {"ids": ids.astype("<i8")}
    if rows.factors.shape[1]:
        raw = rows.factors.contiguous().view(torch.uint8).numpy()
        arrays |= {"rows": raw.view(_VIEWS[dtype]), "checksums": _checksums(raw)}
    if rows.codes.shape[1]:
        codes = rows.codes.contiguous().numpy()
        arrays |= {"codes": codes, "code_checksums": _checksums(codes)}
    sealed = write_sealed(folder, name, arrays, {"dtype": dtype})
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]))


def _checksums(raw: np.ndarray) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in raw), dtype="<u8", count=len(raw))


def write_ids(folder: Path, name: str, ids: np.ndarray) -> ShardInfo:
    """Seals a shard that keeps its ids alone, where rows are in the coarse index only."""
    sealed = write_sealed(folder, name, {"ids": ids.astype("<i8")}, {"dtype": "none"})
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]))


class Part:
    """One of the two parts of a shard's rows, for reading.

    Args:
        file: the shard's.
        names: of the datasets with the rows and with their checksums.
        count: rows.
        size: bytes of a row.
    """

    def __init__(self, file: SealedFile, names: tuple[str, str], count: int, size: int) -> None:
        self._file, self._names, self._count, self._size = file, names, count, size
        self.offset = file.require(names[0], count * size) if size else 0
        self._checksums: np.ndarray | None = None

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Reads rows [start, stop) into the beginning of a buffer of bytes."""
        if self._size:
            self._file.read(self.offset + start * self._size, out[: (stop - start) * self._size])

    def gather(self, positions: np.ndarray, out: list[memoryview]) -> None:
        """Reads single rows, in rising order of their positions, each into its own buffer."""
        self._file.read_scattered((self.offset + positions * self._size).tolist(), out)

    def check(self, positions: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Compares gathered rows with their checksums.

        Args:
            positions: (m,) of the rows in this shard.
            rows: (any, row bytes) uint8.
            places: (m,): where in `rows` each of them is.

        Raises:
            CorruptionError: naming the first row that differs.
        """
        if self._checksums is None:
            self._checksums = self._file.read_array(self._names[1], (self._count,), "<u8")
        expected, digest = self._checksums[positions].tolist(), xxhash.xxh3_64_intdigest
        found = [digest(rows[place]) for place in places.tolist()]
        if found != expected:
            position = next(p for p, a, b in zip(positions.tolist(), found, expected, strict=True) if a != b)
            raise CorruptionError(
                f"row {position} of {self._file.path} does not match its checksum: restore the file from a copy"
            )


class Shard:
    """A sealed shard for reading."""

    def __init__(self, folder: Path, info: ShardInfo, layout: RowLayout) -> None:
        self.count = info.rows
        self.file = SealedFile(folder, info.sealed)
        self.factors = Part(self.file, ("rows", "checksums"), info.rows, layout.factor_bytes)
        self.codes = Part(self.file, ("codes", "code_checksums"), info.rows, layout.code_bytes)

    def ids(self) -> np.ndarray:
        """(n,) int64."""
        return self.file.read_array("ids", (self.count,), "<i8").astype(np.int64, copy=False)

"""Shards: sealed files of rows, their ids and their checksums.

A shard holds `ids` (n,) int64; of the factors, or of eigencodes in their place, `rows` (n, width) in the stored dtype
with `checksums` (n,) uint64; of the coordinates `codes` (n, bytes) uint8 with `code_checksums` (n,) uint64; of the
user's payloads `payloads` (bytes,) uint8, `payload_ends` (n,) int64 and `payload_checksums` (n,) uint64; whichever are
kept; and `energies` (n,) float32, the squared norm of each example's gradient. A checksum is the XXH3-64 of the bytes,
so that single rows gathered from a shard can be verified too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ..codecs.layout import RowLayout, Rows
from ..errors import CorruptionError
from .sealed import SealedFile, SealedInfo, write_sealed

# bfloat16 has no HDF5 type of its own: its bits are stored as unsigned integers, and the attribute `dtype` says so.
_MOST = 1 << 62
# Of payloads, at a time; one may be longer.
_READ_BYTES = 1 << 20
_VIEWS = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "uint8": "u1"}


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest records it.

    Attributes:
        sealed: the file.
        rows: n.
        first_id, last_id: of its rows; ids rise along the shards.
        shift: added to the ids in the file, where shards of one index became another's.
        ids_digest: XXH3-64 of the ids' bytes in the file, in hex; None where version 4 or older wrote it.
    """

    sealed: SealedInfo
    rows: int
    first_id: int
    last_id: int
    shift: int = 0
    ids_digest: str | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Ids that no other shard may have: from the first to before the second."""
        return self.first_id, self.last_id + 1

    def to_json(self) -> dict[str, Any]:
        return {
            "sealed": self.sealed.to_json(),
            "rows": self.rows,
            "first_id": self.first_id,
            "last_id": self.last_id,
            "shift": self.shift,
            "ids_digest": self.ids_digest,
        }

    @classmethod
    def from_json(cls, data: Any) -> ShardInfo:
        try:
            sealed = SealedInfo.from_json(data["sealed"])
            numbers = (data["rows"], data["first_id"], data["last_id"], data.get("shift", 0))
            digest = data.get("ids_digest")
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptionError(f"the manifest's entry of a shard is not as expected: {error!r}") from None
        rows, first, last, _ = numbers
        if (
            not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < _MOST for v in numbers)
            or not 0 < rows <= last - first + 1
            or not isinstance(digest, (str, type(None)))
        ):
            raise CorruptionError(f"the manifest's entry of shard {sealed.file} has rows and ids {numbers}")
        return cls(sealed, *numbers, digest)


def write_shard(
    folder: Path,
    name: str,
    rows: Rows,
    ids: np.ndarray,
    dtype: str,
    *,
    energies: np.ndarray | None = None,
    payloads: Sequence[bytes] | None = None,
) -> ShardInfo:
    """Writes and seals one shard.

    Args:
        folder: an existing folder.
        name: the file's final name.
        rows: n > 0 rows, contiguous, on the CPU; of no bytes, where they are in the coarse index only.
        ids: (n,) int64, rising.
        dtype: of the factors: "float16", "bfloat16" or "float32"; "uint8" where eigencodes take their place.
        energies: (n,) float32, or None where they are not known.
        payloads: n of them, or None.

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
    if energies is not None:
        arrays["energies"] = energies.astype("<f4")
    if payloads is not None:
        arrays["payloads"] = np.frombuffer(b"".join(payloads), dtype=np.uint8)
        arrays["payload_ends"] = np.cumsum([len(p) for p in payloads]).astype("<i8")
        arrays["payload_checksums"] = np.array([xxhash.xxh3_64_intdigest(p) for p in payloads], dtype="<u8")
    return _sealed_shard(folder, name, arrays, dtype)


def _sealed_shard(folder: Path, name: str, arrays: dict[str, np.ndarray], dtype: str) -> ShardInfo:
    ids = arrays["ids"]
    sealed = write_sealed(folder, name, arrays, {"dtype": dtype})
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]), 0, xxhash.xxh3_64_hexdigest(ids.tobytes()))


def _checksums(raw: np.ndarray) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in raw), dtype="<u8", count=len(raw))


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
        self.info, self.count = info, info.rows
        self.file = SealedFile(folder, info.sealed)
        self.file.require("ids", 8 * info.rows)
        self.factors = Part(self.file, ("rows", "checksums"), info.rows, layout.factor_bytes)
        self.codes = Part(self.file, ("codes", "code_checksums"), info.rows, layout.code_bytes)
        self._ends: np.ndarray | None = None
        self._sums = np.empty(0, dtype="<u8")
        self._offset = 0

    def ids(self) -> np.ndarray:
        """(n,) int64.

        Raises:
            CorruptionError: they are not those that were sealed.
        """
        ids = self.file.read_array("ids", (self.count,), "<i8")
        if self.info.ids_digest is None:
            # Older versions have no checksum of the ids alone.
            self.file.verify_once()
        elif xxhash.xxh3_64_hexdigest(ids.tobytes()) != self.info.ids_digest:
            raise CorruptionError(f"the ids in {self.file.path} do not match their checksum: restore it from a copy")
        ids = ids.astype(np.int64, copy=False) + self.info.shift
        if (ids[0], ids[-1]) != (self.info.first_id, self.info.last_id) or not (np.diff(ids) > 0).all():
            raise CorruptionError(
                f"{self.file.path} has ids {ids[0]} to {ids[-1]}, where rising ones from {self.info.first_id} to "
                f"{self.info.last_id} were recorded: restore the index from a copy"
            )
        return ids

    def energies(self) -> np.ndarray | None:
        """(n,) float32: squared norms of the examples' gradients, or None where they were not kept."""
        if "energies" not in self.file.info.offsets:
            return None
        self.file.verify_once()
        return self.file.read_array("energies", (self.count,), "<f4")

    @property
    def has_payloads(self) -> bool:
        return "payload_ends" in self.file.info.offsets

    def payloads(self, positions: np.ndarray) -> list[bytes]:
        """The payloads of rows at some positions, as they were stored.

        Raises:
            CorruptionError: one does not match its checksum.
        """
        if self._ends is None:
            ends = self.file.read_array("payload_ends", (self.count,), "<i8")
            if ends[0] < 0 or (np.diff(ends) < 0).any():
                raise CorruptionError(f"the payloads in {self.file.path} do not follow each other: restore it")
            sums = self.file.read_array("payload_checksums", (self.count,), "<u8")
            offset = self.file.require("payloads", int(ends[-1]))
            self._sums, self._offset = sums, offset
            # Last: another thread may see it.
            self._ends = ends
        out = []
        held, first, last = memoryview(b""), 0, 0
        wanted = positions.tolist()
        for number, position in enumerate(wanted):
            begin, end = int(self._ends[position - 1]) if position else 0, int(self._ends[position])
            if begin < first or end > last:
                # Those that follow each other are read together.
                run = number + 1
                while run < len(wanted) and wanted[run] == wanted[run - 1] + 1:
                    run += 1
                most = np.searchsorted(self._ends, begin + _READ_BYTES, side="right")
                first, last = begin, int(self._ends[max(min(wanted[run - 1], int(most) - 1), position)])
                held = memoryview(bytearray(last - first))
                self.file.read(self._offset + first, held)
            data = bytes(held[begin - first : end - first])
            if xxhash.xxh3_64_intdigest(data) != int(self._sums[position]):
                raise CorruptionError(
                    f"the payload of row {position} of {self.file.path} does not match its checksum: restore the file "
                    "from a copy"
                )
            out.append(data)
        return out

"""Shards: sealed files of rows, their ids and their checksums.

A shard holds `ids` (n,) int64; `rows` (n, row bytes) uint8, whatever the index's codec means by them, with `checksums`
(n,) uint64; `energies` (n,) float32, the squared norm of each example's gradient; where a model took them,
`contents` (n, 16) uint8, a hash of each example; and of the user's payloads, if there
are any, `payloads` (bytes,) uint8, `payload_ends` (n,) int64 and `payload_checksums` (n,) uint64. A checksum is the
XXH3-64 of the bytes, so that single rows gathered from a shard can be verified too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from ..capture.contents import CONTENT_BYTES
from ..errors import CorruptionError
from .sealed import SealedFile, SealedInfo, as_count, entry_of, write_sealed

# Beside a row: its id, its gradient's squared norm, its checksum and its example's hash; of a payload its end and its
# checksum.
BESIDE_ROW, BESIDE_PAYLOAD = 8 + 4 + 8 + CONTENT_BYTES, 16
# What HDF5 puts around a file's arrays, and the manifest says of it.
FILE_BYTES = 4096 + 700


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest records it.

    Attributes:
        sealed: the file.
        rows: n.
        first_id, last_id: of its rows; ids rise along the shards.
        shift: added to the ids in the file, where shards of one index became another's.
        ids_digest: XXH3-64 of the ids' bytes in the file, in hex.
        contents_digest: the same of the examples' hashes; "" where there are none.
    """

    sealed: SealedInfo
    rows: int
    first_id: int
    last_id: int
    shift: int
    ids_digest: str
    contents_digest: str = ""

    @property
    def span(self) -> tuple[int, int]:
        """Ids that no other shard may have: from the first to before the second."""
        return self.first_id, self.last_id + 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ShardInfo:
        """From the manifest's entry.

        Raises:
            CorruptionError: fields that are missing or of the wrong form.
        """
        with entry_of("a shard"):
            info = cls(**data | {"sealed": SealedInfo.from_json(data["sealed"])})
            rows, first, last, _ = numbers = [as_count(v) for v in (info.rows, info.first_id, info.last_id, info.shift)]
            if not 0 < rows <= last - first + 1 or not isinstance(info.ids_digest + info.contents_digest, str):
                raise ValueError(f"{info.sealed.file} of rows and ids {numbers}")
        return info


@dataclass(frozen=True)
class Entries:
    """What a shard keeps of some examples.

    Attributes:
        rows: (n, row bytes) uint8, on the CPU.
        ids: (n,) int64, rising.
        energies: (n,) float32.
        contents: (n, 16) uint8, or None.
        payloads: n of them, or None.
    """

    rows: torch.Tensor
    ids: np.ndarray
    energies: np.ndarray
    contents: np.ndarray | None = None
    payloads: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, some: slice) -> Entries:
        """Some of them, with rows of their own: the memory of these may be used again."""
        return Entries(
            self.rows[some].to("cpu", copy=True),
            self.ids[some],
            self.energies[some],
            None if self.contents is None else self.contents[some],
            None if self.payloads is None else self.payloads[some],
        )

    @classmethod
    def together(cls, parts: Sequence[Entries]) -> Entries:
        """All of them, one part after another: all with payloads, or all without, and so of contents."""
        return cls(
            torch.cat([part.rows for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.energies for part in parts]),
            None if parts[0].contents is None else np.concatenate([part.contents for part in parts]),
            None if parts[0].payloads is None else [one for part in parts for one in part.payloads or ()],
        )


def write_shard(folder: Path, name: str, entries: Entries) -> ShardInfo:
    """Writes and seals one shard, of at least one example.

    Raises:
        OSError: the disk is full or refuses; nothing is left under the final name.
    """
    raw, ids = entries.rows.contiguous().numpy(), entries.ids.astype("<i8")
    checksums = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in raw), dtype="<u8", count=len(raw))
    arrays = {"ids": ids, "rows": raw, "checksums": checksums, "energies": entries.energies.astype("<f4")}
    contents_digest = ""
    if entries.contents is not None:
        arrays["contents"] = np.ascontiguousarray(entries.contents)
        contents_digest = xxhash.xxh3_64_hexdigest(arrays["contents"].data)
    payloads = entries.payloads
    if payloads is not None:
        arrays["payloads"] = np.frombuffer(b"".join(payloads), dtype=np.uint8)
        arrays["payload_ends"] = np.cumsum([len(p) for p in payloads]).astype("<i8")
        arrays["payload_checksums"] = np.array([xxhash.xxh3_64_intdigest(p) for p in payloads], dtype="<u8")
    sealed = write_sealed(folder, name, arrays)
    ids_digest = xxhash.xxh3_64_hexdigest(ids.tobytes())
    return ShardInfo(sealed, len(ids), int(ids[0]), int(ids[-1]), 0, ids_digest, contents_digest)


def shard_bytes_of(rows: int, row_bytes: int, shard_bytes: int, payload_bytes: float = 0.0) -> tuple[int, int]:
    """Bytes on disk of so many rows, without and of their payloads of so many bytes each (0: there are none)."""
    shards = -(-rows * row_bytes // max(shard_bytes, 1))
    payloads = int(rows * (payload_bytes + BESIDE_PAYLOAD)) if payload_bytes else 0
    return rows * (row_bytes + BESIDE_ROW) + shards * FILE_BYTES, payloads


class Shard:
    """A sealed shard for reading."""

    def __init__(self, folder: Path, info: ShardInfo, row_bytes: int) -> None:
        self.info, self.count, self._size = info, info.rows, row_bytes
        self.file = SealedFile(folder, info.sealed)
        self.file.require("ids", 8 * info.rows)
        self._rows = self.file.require("rows", info.rows * row_bytes)

    def read(self, start: int, stop: int, out: memoryview) -> None:
        """Reads rows [start, stop) into the beginning of a buffer of bytes."""
        self.file.read(self._rows + start * self._size, out[: (stop - start) * self._size])

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """(m,) int64: where in the file rows begin."""
        return self._rows + positions * self._size

    def gather(self, positions: np.ndarray, out: list[memoryview]) -> None:
        """Reads single rows, in rising order of their positions, each into its own buffer."""
        self.file.read_scattered(self.offsets(positions).tolist(), out)

    def check(self, positions: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """Compares gathered rows with their checksums.

        Args:
            positions: (m,) of the rows in this shard.
            rows: (any, row bytes) uint8.
            places: (m,): where in `rows` each of them is.

        Raises:
            CorruptionError: naming the first row that differs.
        """
        expected, digest = self._checksums[positions].tolist(), xxhash.xxh3_64_intdigest
        found = [digest(rows[place]) for place in places.tolist()]
        if found != expected:
            position = next(p for p, a, b in zip(positions.tolist(), found, expected, strict=True) if a != b)
            raise CorruptionError(
                f"row {position} of {self.file.path} does not match its checksum: restore the file from a copy"
            )

    @cached_property
    def _checksums(self) -> np.ndarray:
        return self.file.read_array("checksums", (self.count,), "<u8")

    def ids(self) -> np.ndarray:
        """(n,) int64.

        Raises:
            CorruptionError: they are not those that were sealed.
        """
        ids = self.file.read_array("ids", (self.count,), "<i8")
        if xxhash.xxh3_64_hexdigest(ids.tobytes()) != self.info.ids_digest:
            raise CorruptionError(f"the ids in {self.file.path} do not match their checksum: restore it from a copy")
        ids = ids.astype(np.int64, copy=False) + self.info.shift
        if (ids[0], ids[-1]) != (self.info.first_id, self.info.last_id) or not (np.diff(ids) > 0).all():
            raise CorruptionError(
                f"{self.file.path} has ids {ids[0]} to {ids[-1]}, where rising ones from {self.info.first_id} to "
                f"{self.info.last_id} were recorded: restore the index from a copy"
            )
        return ids

    def energies(self) -> np.ndarray:
        """(n,) float32: squared norms of the examples' gradients."""
        self.file.verify_once()
        return self.file.read_array("energies", (self.count,), "<f4")

    def contents(self) -> np.ndarray | None:
        """(n, 16) uint8: hashes of the examples; None where there are none.

        Raises:
            CorruptionError: they are not those that were sealed.
        """
        if not self.info.contents_digest:
            return None
        found = self.file.read_array("contents", (self.count, CONTENT_BYTES), "|u1")
        if xxhash.xxh3_64_hexdigest(found.data) != self.info.contents_digest:
            raise CorruptionError(
                f"the contents in {self.file.path} do not match their checksum: restore it from a copy"
            )
        return found

    @property
    def has_payloads(self) -> bool:
        return "payload_ends" in self.file.info.offsets

    def payloads(self, positions: np.ndarray) -> list[bytes]:
        """The payloads of rows at some positions, as they were stored.

        Raises:
            CorruptionError: one does not match its checksum.
        """
        ends, sums, offset = self._payload_table
        out = []
        for position in positions.tolist():
            begin, end = int(ends[position - 1]) if position else 0, int(ends[position])
            data = bytearray(end - begin)
            self.file.read(offset + begin, memoryview(data))
            if xxhash.xxh3_64_intdigest(data) != int(sums[position]):
                raise CorruptionError(
                    f"the payload of row {position} of {self.file.path} does not match its checksum: restore the file "
                    "from a copy"
                )
            out.append(bytes(data))
        return out

    @cached_property
    def _payload_table(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Where each payload ends, their checksums, and where the first begins."""
        ends = self.file.read_array("payload_ends", (self.count,), "<i8")
        if ends[0] < 0 or (np.diff(ends) < 0).any():
            raise CorruptionError(f"the payloads in {self.file.path} do not follow each other: restore it")
        sums = self.file.read_array("payload_checksums", (self.count,), "<u8")
        return ends, sums, self.file.require("payloads", int(ends[-1]))

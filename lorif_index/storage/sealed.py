"""Sealed files: immutable HDF5 files written beside libhdf5, and read with preadv at recorded offsets.

h5py creates a file whose contiguous, unfiltered datasets are allocated but not filled; their bytes are written at the
datasets' offsets, the file is digested, synced and renamed. So a file is complete or absent under its name, a full
disk is an ordinary error, and reading never parses HDF5: the manifest says where the bytes are and what they must be.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import threading
import weakref
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CorruptionError, StoreError

_CHUNK = 8 << 20
# What stays in a core's cache between being read and being digested.
_DIGEST_CHUNK = 256 << 10
# Asks for what is in the page cache and nothing else; 0 where the system does not know it.
_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)


@dataclass(frozen=True)
class SealedInfo:
    """What the manifest says of a sealed file: enough to check it before anything in it is believed.

    Attributes:
        file: its name inside the index's folder.
        size: in bytes.
        digest: XXH3-128 of the whole file, in hex.
        offsets: dataset -> offset of its first byte.
    """

    file: str
    size: int
    digest: str
    offsets: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> SealedInfo:
        """From the manifest's entry.

        Raises:
            CorruptionError: missing or unknown fields, wrong types, or a name that leaves the folder.
        """
        try:
            info = cls(**data)
        except TypeError as error:
            raise CorruptionError(f"the manifest's entry of a file is not as expected: {error}") from None
        fine = (
            isinstance(info.file, str)
            # As builds give them: nothing that the system might take for something else.
            and info.file.isascii()
            and info.file.isprintable()
            and "/" not in info.file
            and info.file not in ("", ".", "..")
            and isinstance(info.digest, str)
            and _is_count(info.size)
            and isinstance(info.offsets, dict)
            and all(_is_count(v) for v in info.offsets.values())
        )
        if not fine:
            raise CorruptionError(f"the manifest's entry of a file is not as expected: {data!r}")
        return info


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def part_name(name: str) -> str:
    """What a file is called until it is complete."""
    return f".{name}.part"


def file_digest(path: Path) -> str:
    """XXH3-128 of a whole file, in hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_durably(folder: Path, name: str, data: bytes) -> None:
    """Gives a small file new bytes: whoever reads it finds the old ones or the new ones, also after a power failure."""
    temporary = folder / part_name(name)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        _write_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(folder / name)
    sync_folder(folder)


def write_sealed(
    folder: Path, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, str]
) -> SealedInfo:
    """Writes arrays as the root datasets of a new HDF5 file.

    Args:
        folder: an existing folder.
        name: the file's final name; nothing is under it unless the file is complete.
        arrays: dataset -> array; little-endian.
        attributes: of the file's root.

    Raises:
        OSError: the disk is full or refuses.
    """
    temporary = folder / f".{name}.part"
    try:
        offsets = _allocate(temporary, arrays, attributes)
        fd = os.open(temporary, os.O_RDWR)
        try:
            for key, array in arrays.items():
                if array.nbytes:
                    os.posix_fallocate(fd, offsets[key], array.nbytes)
                    _write_all(fd, np.ascontiguousarray(array).data.cast("B"), offsets[key])
            os.fsync(fd)
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        digest = file_digest(temporary)
        temporary.rename(folder / name)
        sync_folder(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return SealedInfo(name, size, digest, offsets)


def seal_file(temporary: Path, final: Path) -> SealedInfo:
    """Syncs, digests and renames a file that a library wrote in its own format."""
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    digest = file_digest(temporary)
    temporary.rename(final)
    sync_folder(final.parent)
    return SealedInfo(final.name, size, digest, {})


class Arrival:
    """A sealed file that comes from elsewhere, in pieces; under its name only when it is complete and as it was sealed.

    Args:
        folder: where it goes.
        info: of the file.
        name: its name there.
    """

    def __init__(self, folder: Path, info: SealedInfo, name: str) -> None:
        self._final, self._info = folder / name, info
        self._temporary = folder / part_name(name)
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, offset: int, piece: memoryview) -> None:
        _write_all(self._fd, piece, offset)

    def seal(self) -> SealedInfo:
        """Raises CorruptionError where it is not as it was sealed; nothing is left then."""
        self.close()
        if file_digest(self._temporary) != self._info.digest:
            self._temporary.unlink()
            raise CorruptionError(f"{self._info.file} is not as it was sealed: restore it from a copy")
        return replace(seal_file(self._temporary, self._final), offsets=self._info.offsets)

    def close(self) -> None:
        """Gives the file handle back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def copy_sealed(source: Path, info: SealedInfo, folder: Path, name: str) -> SealedInfo:
    """Copies a sealed file into another folder, and compares the copy with its digest.

    Raises:
        CorruptionError: the file is not as it was sealed.
    """
    with closing(SealedFile(source, info)) as file, closing(Arrival(folder, info, name)) as copy:
        for at in range(0, info.size, _CHUNK):
            chunk = bytearray(min(_CHUNK, info.size - at))
            file.read(at, memoryview(chunk))
            copy.write(at, memoryview(chunk))
        try:
            return copy.seal()
        except CorruptionError:
            raise CorruptionError(f"{source / info.file} is not as it was sealed: restore it from a copy") from None


def _allocate(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, str]) -> dict[str, int]:
    """Creates the file with its datasets allocated but not filled; their offsets."""
    offsets = {}
    # Late: half of what importing the package takes beside torch, and whoever only asks writes no file.
    import h5py

    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs.update(attributes)
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        # The same rows give the same bytes, whenever they are written.
        layout.set_obj_track_times(False)
        for key, array in arrays.items():
            space = h5py.h5s.create_simple(array.shape)
            kind = h5py.h5t.py_create(array.dtype.newbyteorder("<"))
            # HDF5 has no place for an empty one.
            offsets[key] = int(h5py.h5d.create(file.id, key.encode(), kind, space, layout).get_offset() or 0)
    return offsets


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view[:_CHUNK], offset)
        view, offset = view[written:], offset + written


class _Descriptor:
    """An open file, closed when nobody holds this object any longer: never under a thread that is reading."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)


class SealedFile:
    """A sealed file, opened when first read; safe to use from several threads."""

    def __init__(self, folder: Path, info: SealedInfo) -> None:
        self.path = folder / info.file
        self.info = info
        self._file: _Descriptor | None = None
        self._scattered: _Descriptor | None = None
        self._verified = False
        self._lock = threading.Lock()

    @classmethod
    def of_entry(cls, folder: Path, entry: Any) -> SealedFile:
        """The file that a manifest's entry names by `file`.

        Raises:
            CorruptionError: the entry names none.
        """
        try:
            return cls(folder, SealedInfo.from_json(entry["file"]))
        except (KeyError, TypeError) as error:
            raise CorruptionError(f"the manifest's entry of a file is damaged ({error!r}): restore it") from None

    def require(self, dataset: str, size: int) -> int:
        """Offset of a dataset of that many bytes, checked to lie inside the file."""
        offset = self.info.offsets.get(dataset)
        if offset is None or size < 0 or offset + size > self.info.size:
            raise CorruptionError(
                f"{self.path} has {self.info.size} bytes, but its dataset {dataset!r} of {size} bytes is said to begin "
                f"at {offset}: the manifest is damaged, restore it"
            )
        return offset

    def read(self, offset: int, view: memoryview) -> None:
        """Fills a buffer of bytes from an offset."""
        file = self._opened()
        while view:
            got = os.preadv(file.fd, [view], offset)
            if got == 0:
                raise CorruptionError(f"{self.path} ended at byte {offset}: was it truncated while in use?")
            view, offset = view[got:], offset + got

    def read_scattered(self, offsets: list[int], views: list[memoryview]) -> None:
        """Fills buffers of bytes from as many offsets, given in rising order.

        What is in the page cache is copied at once. The rest is asked for all together, so that the disk sees every
        request before the first is waited for, without reading ahead of any.
        """
        with self._lock:
            if self._scattered is None:
                self._scattered = self._open()
                os.posix_fadvise(self._scattered.fd, 0, 0, os.POSIX_FADV_RANDOM)
            file = self._scattered
        fd, preadv = file.fd, os.preadv
        missing = []
        for i, offset in enumerate(offsets):
            try:
                if preadv(fd, (views[i],), offset, _NO_WAIT) != len(views[i]):
                    missing.append(i)
            except OSError:
                # Not in the cache, or a file system that cannot say.
                missing.append(i)
        for i in missing:
            os.posix_fadvise(fd, offsets[i], len(views[i]), os.POSIX_FADV_WILLNEED)
        for i in missing:
            self.read(offsets[i], views[i])

    def read_array(self, dataset: str, shape: tuple[int, ...], dtype: str, out: np.ndarray | None = None) -> np.ndarray:
        """A whole dataset as an array, into `out` (contiguous, of that shape and type) if given."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        offset = self.require(dataset, size)
        out = np.empty(shape, dtype=dtype) if out is None else out
        if size:
            self.read(offset, out.data.cast("B"))
        return out

    def fileno(self) -> int:
        """The file's descriptor, after checking that it is the regular file of the size that was sealed."""
        return self._opened().fd

    def _opened(self) -> _Descriptor:
        with self._lock:
            if self._file is None:
                self._file = self._open()
            return self._file

    def _open(self) -> _Descriptor:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StoreError(
                    f"{self.path} cannot be opened ({error.strerror}): every shard that is read stays open, so "
                    "raise the limit (ulimit -n), share the index among more ranks, or build with larger shard_bytes"
                ) from None
            raise CorruptionError(
                f"{self.path} cannot be opened ({error.strerror}): restore it, or open the index again if it was "
                "changed since"
            ) from None
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self.info.size:
            os.close(fd)
            raise CorruptionError(
                f"{self.path} has {found.st_size} bytes where {self.info.size} were sealed: restore it"
            )
        return _Descriptor(fd)

    def verify(self) -> None:
        """Compares the whole file with its digest.

        Raises:
            CorruptionError: it differs.
        """
        found = self._digest()
        if found != self.info.digest:
            raise CorruptionError(
                f"{self.path} has digest {found} where {self.info.digest} was sealed: restore it from a copy"
            )

    def _digest(self) -> str:
        digest, at, buffer = xxhash.xxh3_128(), 0, bytearray(min(_DIGEST_CHUNK, self.info.size))
        self._opened()
        while at < self.info.size:
            view = memoryview(buffer)[: min(_DIGEST_CHUNK, self.info.size - at)]
            self.read(at, view)
            digest.update(view)
            at += len(view)
        return str(digest.hexdigest())

    def verify_once(self) -> None:
        """`verify`, the first time that it is called."""
        if not self._verified:
            self.verify()
            self._verified = True

    def close(self) -> None:
        with self._lock:
            self._file = self._scattered = None

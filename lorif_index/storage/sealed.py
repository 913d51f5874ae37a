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
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CorruptionError, StoreError
from .scattered import NO_WAIT

_CHUNK = 8 << 20
# What stays in a core's cache between being read and being digested.
_DIGEST_CHUNK = 256 << 10


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
        with entry_of("a file"):
            info = cls(**data)
            # As builds give them: nothing that the system might take for something else.
            plain = info.file.isascii() and info.file.isprintable() and "/" not in info.file
            if not plain or info.file in ("", ".", "..") or not isinstance(info.digest, str):
                raise ValueError(f"{data!r} as a file")
            for value in (info.size, *info.offsets.values()):
                as_count(value)
        return info


def as_count(value: Any) -> int:
    """A value of the manifest's that must be a number of things.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise TypeError(f"{str(value)[:80]!r} where a count was expected")
    return value


@contextmanager
def entry_of(what: str) -> Iterator[None]:
    """Reads an entry of the manifest inside: one of another form is damage.

    Raises:
        CorruptionError: fields are missing, or of the wrong form.
    """
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise CorruptionError(
            f"the manifest's entry of {what} is damaged ({error!r}): restore it from a copy"
        ) from None


def part_name(name: str) -> str:
    """What a file is called until it is complete."""
    return f".{name}.part"


def _digest(fd: int) -> str:
    """XXH3-128 of a whole open file, in hex."""
    digest, at, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(_DIGEST_CHUNK))
    while got := os.preadv(fd, [buffer], at):
        digest.update(buffer[:got])
        at += got
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


def write_sealed(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> SealedInfo:
    """Writes arrays as the root datasets of a new HDF5 file; those without elements are left out.

    Raises:
        OSError: the disk is full or refuses; nothing is under the name then.
    """
    temporary = folder / part_name(name)
    arrays = {key: array for key, array in arrays.items() if array.size}
    try:
        offsets = _allocate(temporary, arrays)
        fd = os.open(temporary, os.O_RDWR)
        try:
            for key, array in arrays.items():
                os.posix_fallocate(fd, offsets[key], array.nbytes)
                _write_all(fd, np.ascontiguousarray(array).data.cast("B"), offsets[key])
        finally:
            os.close(fd)
        return _seal(temporary, folder / name, offsets)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _seal(temporary: Path, final: Path, offsets: dict[str, int], expected: str | None = None) -> SealedInfo:
    """Syncs, digests and renames a complete file.

    Raises:
        CorruptionError: its digest is not the expected one; it keeps its name.
    """
    fd = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(fd)
        info = SealedInfo(final.name, os.fstat(fd).st_size, _digest(fd), offsets)
    finally:
        os.close(fd)
    if expected not in (None, info.digest):
        raise CorruptionError(f"{final.name} is not as it was sealed: restore it from a copy")
    temporary.rename(final)
    sync_folder(final.parent)
    return info


class Arrival:
    """A sealed file that comes from elsewhere in pieces; under its name only when complete and as it was sealed."""

    def __init__(self, folder: Path, info: SealedInfo, name: str) -> None:
        self._final, self._info = folder / name, info
        self._temporary = folder / part_name(name)
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, offset: int, piece: memoryview) -> None:
        _write_all(self._fd, piece, offset)

    def seal(self) -> SealedInfo:
        """Raises CorruptionError where it is not as it was sealed; nothing is left then."""
        self.close()
        try:
            return _seal(self._temporary, self._final, self._info.offsets, self._info.digest)
        except CorruptionError:
            self._temporary.unlink()
            raise

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
        return copy.seal()


def _allocate(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Creates the file with its datasets allocated but not filled; their offsets."""
    offsets = {}
    # Late: half of what importing the package takes beside torch, and whoever only asks writes no file.
    import h5py

    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_layout(h5py.h5d.CONTIGUOUS)
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        # The same rows give the same bytes, whenever they are written.
        layout.set_obj_track_times(False)
        for key, array in arrays.items():
            space = h5py.h5s.create_simple(array.shape)
            kind = h5py.h5t.py_create(array.dtype.newbyteorder("<"))
            offsets[key] = int(h5py.h5d.create(file.id, key.encode(), kind, space, layout).get_offset())
    return offsets


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view[:_CHUNK], offset)
        view, offset = view[written:], offset + written


class OpenFile:
    """An open file, closed when nobody holds this object any longer: never under a thread that is reading."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)


class SealedFile:
    """A sealed file, opened when first read; safe to use from several threads."""

    def __init__(self, folder: Path, info: SealedInfo) -> None:
        self.path = folder / info.file
        self.info = info
        self._file: OpenFile | None = None
        self._scattered: OpenFile | None = None
        self._verified = False
        self._lock = threading.Lock()

    @classmethod
    def of_entry(cls, folder: Path, entry: Any) -> SealedFile:
        """The file that a manifest's entry names by `file`.

        Raises:
            CorruptionError: the entry names none.
        """
        with entry_of("a file"):
            return cls(folder, SealedInfo.from_json(entry["file"]))

    def require(self, dataset: str, size: int) -> int:
        """Offset of a dataset of that many bytes, checked to lie inside the file; one of no bytes need not be there."""
        offset = self.info.offsets.get(dataset, None if size else 0)
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

    def for_scattered(self) -> OpenFile:
        """The file, open for small reads: the disk reads no more than is asked for."""
        with self._lock:
            if self._scattered is None:
                self._scattered = self._open()
                os.posix_fadvise(self._scattered.fd, 0, 0, os.POSIX_FADV_RANDOM)
            return self._scattered

    def read_scattered(self, offsets: list[int], views: list[memoryview]) -> None:
        """Fills buffers of bytes from as many offsets, given in rising order.

        What is in the page cache is copied at once. The rest is asked for all together, so that the disk sees every
        request before the first is waited for, without reading ahead of any.
        """
        file = self.for_scattered()
        fd, preadv = file.fd, os.preadv
        missing = []
        for i, offset in enumerate(offsets):
            try:
                if preadv(fd, (views[i],), offset, NO_WAIT) != len(views[i]):
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

    def _opened(self) -> OpenFile:
        with self._lock:
            if self._file is None:
                self._file = self._open()
            return self._file

    def _open(self) -> OpenFile:
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
        return OpenFile(fd)

    def verify(self) -> None:
        """Compares the whole file with its digest.

        Raises:
            CorruptionError: it differs.
        """
        file = self._opened()
        found = _digest(file.fd)
        if found != self.info.digest:
            raise CorruptionError(
                f"{self.path} has digest {found} where {self.info.digest} was sealed: restore it from a copy"
            )

    def verify_once(self) -> None:
        """`verify`, the first time that it is called."""
        if not self._verified:
            self.verify()
            self._verified = True

    def close(self) -> None:
        with self._lock:
            self._file = self._scattered = None

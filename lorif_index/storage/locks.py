"""Locks: one writer, many readers. Both are `flock`s, which the kernel takes back when a process ends, however it ends.

A writer locks `writer.lock`. A reader holds a shared lock on the very manifest file that it has read. Whoever replaces
the manifest keeps the old one under another name as long as such a lock is on it, and with it the files that it names:
so a reader keeps what it has opened whole, while the index moves on.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import CorruptionError, LockedError, NotAnIndexError

WRITER = "writer.lock"


class WriterLock:
    """The right to change an index's folder, held from `acquire`, which makes the folder if need be, to `release`; a
    context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WRITER
        self._fd = -1

    def acquire(self) -> WriterLock:
        """Takes the lock, which this object then holds; nothing where it does already.

        Raises:
            LockedError: another process, or another writer in this one, holds it.
        """
        if self._fd >= 0:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S")}
            # It says who holds the lock, and is not the lock: a full disk must not keep one from removing rows.
            with suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(who).encode(), 0)
        except BaseException as error:
            holder = os.pread(fd, 256, 0).decode("utf-8", errors="replace").strip()
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise
            raise LockedError(
                f"{self._path.parent} is being changed by another writer ({holder or 'unknown'}): wait until it has "
                "finished, or stop it"
            ) from None
        self._fd = fd
        return self

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> WriterLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Lease:
    """A reader's hold on one version of an index: an open manifest with a shared lock on it.

    Attributes:
        data: the manifest's bytes.
    """

    def __init__(self, folder: Path, name: str, largest: int) -> None:
        path = folder / name
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise NotAnIndexError(f"{path} cannot be opened ({error.strerror}): is it an index?") from None
            self._release = weakref.finalize(self, os.close, fd)
            # A file system may have no locks: files that a later version drops may vanish under this reader, which is
            # told so.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)
            # Replaced between opening and locking, it may have lost its files by now: then the new one is taken.
            if _is_still(path, fd):
                break
            self._release()
        found = os.fstat(fd)
        try:
            if not stat.S_ISREG(found.st_mode):
                raise NotAnIndexError(f"{path} is no regular file: is it an index?")
            if found.st_size > largest:
                raise CorruptionError(f"{path} has {found.st_size} bytes, more than any manifest's {largest}")
            self.data = os.pread(fd, found.st_size, 0)
        except BaseException:
            self._release()
            raise

    def release(self) -> None:
        """Gives the version up: its files may be removed when a later one no longer needs them."""
        self._release()


def _is_still(path: Path, fd: int) -> bool:
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def is_read(path: Path) -> bool:
    """Whether a reader holds a lease on a manifest."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False

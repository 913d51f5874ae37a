"""Scattered: many small reads of what lies in the page cache, by a compiled loop on all threads.

Python takes as long for such a read as the read itself. The loop needs numba, which takes a second to load: it is
loaded with the kernel that scores rows (`codecs.compiled`). Without it, and for what is not in the cache,
`SealedFile.read_scattered` reads.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, call-overload"

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import numpy as np

from ..linalg.threads import in_parts

NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""Makes a read of what is not in the cache fail, rather than wait for the disk; 0 where the system does not know it."""
# Linux's C library has it, with this meaning of its arguments on 64-bit machines.
_CALL = "preadv2"


class Scattered:
    """The compiled loop of a process, once it is loaded."""

    def __init__(self) -> None:
        self._loop: Callable[..., None] | None = None

    def load(self) -> None:
        """Compiles the loop, where the system has such reads.

        Raises:
            ImportError: numba is not installed.
        """
        if NO_WAIT and ctypes.sizeof(ctypes.c_long) == 8 and hasattr(ctypes.CDLL(None), _CALL):
            self._loop = _made()

    def read(self, files: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Reads a row of bytes from each offset of a file, as far as they are in the cache.

        Args:
            files: (m,) int32: descriptors.
            offsets: (m,) int64.
            out: (m, size) uint8, contiguous, to be filled; of rows that were not read it may hold anything.

        Returns:
            (m,) bool: which rows were read; all are False where the loop is not loaded.
        """
        done = np.zeros(len(files), dtype=bool)
        loop = self._loop
        if loop is not None:
            in_parts(len(files), lambda part: loop(files[part], offsets[part], out[part], done[part]))
        return done


def _made() -> Callable[..., None]:
    from numba import njit, types

    call = types.ExternalFunction(_CALL, types.int64(types.int32, types.uint64, types.int32, types.int64, types.int32))
    flags = np.int32(NO_WAIT)

    @njit(nogil=True)
    def loop(files, offsets, out, done):
        size, first = out.shape[1], np.uint64(out.ctypes.data)
        # A C `iovec`: where to, and how much.
        room = np.empty(2, np.uint64)
        room[1] = size
        at = np.uint64(room.ctypes.data)
        for i in range(len(offsets)):
            room[0] = first + np.uint64(i * size)
            done[i] = call(files[i], at, np.int32(1), offsets[i], flags) == size

    # Compiled now, not by whoever reads first.
    nothing = np.zeros(0, np.int32)
    loop(nothing, nothing.astype(np.int64), np.zeros((0, 1), np.uint8), np.zeros(0, bool))
    return loop


SCATTERED = Scattered()

"""Compiled: when and how rows are scored by the kernel, which needs numba.

Loading it takes a second, and compiling it several, once on a machine. So it is loaded in the background when a process
has scored much; until then, and without numba, torch scores. The two differ by float32's rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

from ..linalg.threads import in_parts
from ..storage.scattered import SCATTERED

WORTH = 1 << 30
"""Bytes of rows, times questions, that a process scores before the kernel is loaded: a second's work or two."""


class Kernel:
    """The kernel of a process, loaded when there is work for it.

    Attributes:
        module: `kernel`, once it is loaded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scored, self._asked = 0, False
        self.module: ModuleType | None = None
        self._loading, self._failed = threading.Lock(), False

    def ready(self, work: int) -> bool:
        """Whether it can be used; `work` more bytes of rows, times questions, are to be scored."""
        if self.module is not None:
            return True
        with self._lock:
            self._scored += work
            if self._scored < WORTH or self._asked:
                return False
            self._asked = True
        if importlib.util.find_spec("numba") is not None:
            threading.Thread(target=self.load_once, name="lorif-kernel", daemon=True).start()
        return False

    def load(self) -> None:
        """Imports and compiles it.

        Raises:
            ImportError: numba is not installed.
        """
        module = importlib.import_module(".kernel", __package__)
        one = np.zeros(1, np.int64)
        tiny = Planes(module, torch.zeros(1, 8), one, one + 8, one + 1, 1)
        tiny.score(torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        row, numbers = np.zeros((1, 5), np.uint8), np.zeros(32, np.float32)
        module.named(row, 1, numbers, numbers, numbers, 0, numbers.copy())
        starts, rows, levels = np.zeros(3, np.int32), np.zeros(1, np.uint16), np.zeros(1, np.uint8)
        module.count_named(row, 1, starts)
        module.turn_named(row, 1, starts[:-1].copy(), rows, levels)
        module.add_named(starts, rows, levels, one[:0], numbers[:0], numbers, numbers.copy())
        module.take_better(numbers.copy(), numbers[:1], np.float32(0.0), np.zeros(1, np.int32), numbers.copy())
        self.module = module

    def load_once(self) -> None:
        """The same, where it is not loaded yet; without it where it cannot be compiled."""
        with self._loading:
            if self.module is not None or self._failed:
                return
            try:
                self.load()
                # Rows that are to be scored must be read first.
                SCATTERED.load()
            except Exception as error:
                self._failed = True
                what = "reads of rows, so that Python reads" if self.module else "the kernel, so that torch scores"
                warnings.warn(f"numba could not compile {what}: {error}", stacklevel=2)

    def planes(
        self, queries: torch.Tensor, firsts: Sequence[int], counts: Sequence[int], sizes: Sequence[int], bits: int
    ) -> Planes:
        """Questions cut for it, once it is ready; the arguments are those of `Planes`."""
        if self.module is None:
            raise RuntimeError("the kernel is not loaded: call load() first")
        first, count, size = (np.array(part, dtype=np.int64) for part in (firsts, counts, sizes))
        return Planes(self.module, queries, first, count, size, bits)

    def named(
        self,
        rows: torch.Tensor,
        entries: int,
        queries: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Scores rows that name so many coordinates, once it is ready; fills and gives back `out`.

        Args:
            rows: (n, row_bytes) uint8.
            entries: how many a row names.
            queries: (q, dim + 1) float32, the last 0.
            values: (32,) float32: what the low bits of an entry stand for.
            scales: (n,) float32.
            out: (q, n) float32.
        """
        if self.module is None:
            raise RuntimeError("the kernel is not loaded: call load() first")
        module, low = self.module, values.numpy()
        numbers, sizes = rows.contiguous().numpy(), scales.contiguous().numpy()
        for query, to in zip(queries.contiguous().numpy(), out.numpy(), strict=True):

            def some(part: slice, query: np.ndarray = query, to: np.ndarray = to) -> None:
                module.named(numbers[part], entries, query, low, sizes[part], part.start, to)

            in_parts(len(rows), some)
        return out


class Planes:
    """Questions, cut into bit planes for rows of one layout.

    Args:
        kernel: the module `kernel`.
        queries: (q, dim) float32.
        firsts, counts, sizes: (pieces,) int64: each piece's first coordinate, coordinates and bytes.
        bits: of a coordinate in a row.
    """

    def __init__(
        self,
        kernel: ModuleType,
        queries: torch.Tensor,
        firsts: np.ndarray,
        counts: np.ndarray,
        sizes: np.ndarray,
        bits: int,
    ) -> None:
        self._kernel, self._count = kernel, len(queries)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._words = np.concatenate([[0], np.cumsum(-(-sizes // 8))])
        self._planes = np.zeros((len(queries), self._words[-1], kernel.PLANES), np.uint64)
        self._steps = np.zeros((len(queries), len(counts)), np.float32)
        given = queries.contiguous().numpy()
        kernel.cut(given, firsts, counts, sizes, self._words, bits, self._planes, self._steps)

    def score(self, rows: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fills and gives back `out`, by as many threads as torch has.

        Args:
            rows: (n, row_bytes) uint8.
            scales: (n, pieces) float32.
            offsets: (q, pieces) float32, taken off a piece's product before its scale.
            out: (q, n) float32.
        """
        numbers, sizes, to = rows.contiguous().numpy(), scales.contiguous().numpy(), out.numpy()
        off = offsets.contiguous().numpy()

        def some(part: slice) -> None:
            self._kernel.score(
                numbers[part], self._starts, self._words, self._planes, self._steps, off, sizes[part], part.start, to
            )

        in_parts(len(rows), some)
        return out


KERNEL = Kernel()

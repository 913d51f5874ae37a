"""Resident: rows on the device that scores them, a GPU or the CPU.

A GPU keeps the first rows in its memory, as far as they fit; the rest is read from disk and sent there. On a CPU the
small codes stay in memory, and factors are read. Either way the same rows are scored by the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..codecs.layout import Rows
from ..codecs.scratch import CPU, SCRATCH
from .store import Store

# Codes of all rows are kept in the CPU's memory up to so many bytes; beyond, those asked for are read by position.
CODE_BYTES = 4 << 30
# Of kept rows, so many bytes are scored at once.
_KEPT_BLOCK_BYTES = 256 << 20


class Resident:
    """The rows of a store where they are scored.

    Args:
        store: the rows.
        device: where they are scored.
        room: bytes of the device's memory that rows may take to stay there; 0 keeps none.

    Attributes:
        kept: how many rows stay on the device: the first ones.
    """

    def __init__(self, store: Store, device: torch.device = CPU, room: int = 0) -> None:
        self.store, self.layout, self.device = store, store.layout, device
        self.kept = min(room // max(self.layout.row_bytes, 1), len(store))
        self._on_device: Rows | None = None
        self._codes: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.store)

    def stream(self) -> Iterator[tuple[int, Rows, int]]:
        """All rows in order, as (position of the first, rows on the device, bytes read for them).

        A block is good until the next one is asked for.
        """
        if self.kept:
            kept, step = self._kept(), max(_KEPT_BLOCK_BYTES // self.layout.row_bytes, 1)
            for start in range(0, self.kept, step):
                yield start, kept[start : min(start + step, self.kept)], 0
        for start, rows in self.store.stream(self.kept):
            yield start, rows.to(self.device), len(rows) * self.layout.row_bytes

    def factors(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """The factors of rows at rising positions, (m, width) on the device, and bytes read; good until the next call.

        Raises:
            CorruptionError: a row that was read does not match its checksum.
        """
        near = self._near(positions)
        far = positions[near:]
        parts = [SCRATCH.select("near", self._kept().factors, torch.from_numpy(positions[:near]))] if near else []
        if len(far) or not near:
            room = SCRATCH.take("gathered", len(far), self.layout.width, dtype=self.layout.torch_dtype)
            parts.append(self.store.gather_factors(far, out=room).to(self.device))
        return _joined(parts), len(far) * self.layout.factor_bytes

    def codes(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """The codes of rows at rising positions, (m, code bytes) uint8 on the device, and bytes read; as `factors`."""
        near = self._near(positions)
        far = positions[near:]
        parts = [SCRATCH.select("near", self._kept().codes, torch.from_numpy(positions[:near]))] if near else []
        read = 0
        if len(far) or not near:
            if self._codes is None and len(self.store) * self.layout.code_bytes <= CODE_BYTES:
                self._codes = self.store.all_codes()
            if self._codes is None:
                read = len(far) * self.layout.code_bytes
                part = self.store.gather_codes(far)
            else:
                part = SCRATCH.select("codes", self._codes, torch.from_numpy(far))
            parts.append(part.to(self.device))
        return _joined(parts), read

    def _near(self, positions: np.ndarray) -> int:
        """How many of the positions are kept on the device."""
        return int(np.searchsorted(positions, self.kept)) if self.kept else 0

    def _kept(self) -> Rows:
        if self._on_device is None:
            room = self.layout.empty(self.kept, self.device)
            for start, rows in self.store.stream():
                taken = rows[: max(self.kept - start, 0)]
                if not len(taken):
                    break
                room.factors[start : start + len(taken)] = taken.factors.to(self.device)
                room.codes[start : start + len(taken)] = taken.codes.to(self.device)
            self._on_device = room
        return self._on_device


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

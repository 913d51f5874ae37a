"""Resident: rows on the device that scores them, a GPU or the CPU.

A GPU keeps the first rows in its memory, as far as they fit; the rest is read from disk and sent there. Either way the
same rows are scored by the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..linalg.scratch import CPU, SCRATCH
from .store import Store

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
        self.store, self.device = store, device
        self.kept = min(room // store.row_bytes, len(store))
        self._on_device: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.store)

    def stream(self) -> Iterator[tuple[int, torch.Tensor, int]]:
        """All rows in order, as (position of the first, rows on the device, bytes read for them).

        A block is good until the next one is asked for.
        """
        if self.kept:
            kept, step = self._kept(), max(_KEPT_BLOCK_BYTES // self.store.row_bytes, 1)
            for start in range(0, self.kept, step):
                yield start, kept[start : min(start + step, self.kept)], 0
        for start, rows in self.store.stream(self.kept):
            yield start, rows.to(self.device), len(rows) * self.store.row_bytes

    def gather(self, positions: np.ndarray) -> tuple[torch.Tensor, int]:
        """Rows at rising positions, (m, row_bytes) uint8 on the device, and bytes read; good until the next call.

        Raises:
            CorruptionError: a row that was read does not match its checksum.
        """
        near = int(np.searchsorted(positions, self.kept)) if self.kept else 0
        far = positions[near:]
        parts = [SCRATCH.select("near", self._kept(), torch.from_numpy(positions[:near]))] if near else []
        if len(far) or not near:
            room = SCRATCH.take("gathered", len(far), self.store.row_bytes, dtype=torch.uint8)
            parts.append(self.store.gather(far, out=room).to(self.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts), len(far) * self.store.row_bytes

    def _kept(self) -> torch.Tensor:
        if self._on_device is None:
            room = torch.empty(self.kept, self.store.row_bytes, dtype=torch.uint8, device=self.device)
            for start, rows in self.store.stream():
                taken = rows[: max(self.kept - start, 0)]
                if not len(taken):
                    break
                room[start : start + len(taken)] = taken.to(self.device)
            self._on_device = room
        return self._on_device

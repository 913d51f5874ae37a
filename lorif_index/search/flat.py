"""Flat: coordinates of all rows in half precision on a GPU, simply scanned (faiss's fast-scan indexes are CPU only).

It proposes candidates in place of the coarse index where a GPU has room, by better scores: coordinates are not
compressed any further.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

# Scores of so many (query, row) pairs are held at once.
_PAIRS = 1 << 26
_TINY = 1e-30


class FlatSketch:
    """Coordinates on a device, searched by position like a `Coarse`.

    Args:
        blocks: coordinates (n, k) float32 of all rows, in order.
        count, dim: rows and k in all.
        device: where they are kept, in half precision; scores are summed in float32.
    """

    def __init__(self, blocks: Iterable[torch.Tensor], count: int, dim: int, device: torch.device) -> None:
        # Directions in half precision, and norms beside them: neither overflows, whatever the gradients' scale.
        self._rows = torch.empty(count, dim, dtype=torch.float16, device=device)
        self._norms = torch.empty(count, device=device)
        at = 0
        for block in blocks:
            norms = block.norm(dim=1)
            self._rows[at : at + len(block)] = (block / norms.clamp(min=_TINY)[:, None]).to(device)
            self._norms[at : at + len(block)] = norms.to(device)
            at += len(block)

    @property
    def tilts(self) -> bool:
        """Whether searches can be tilted."""
        return True

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def search(self, x: np.ndarray, count: int, tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best of queries (q, k) by <x, z> + tilt |x| |z|.

        Returns:
            positions (q, count) int64, and scores (q, count) float32, falling.
        """
        queries = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(self._rows.device)
        sizes = queries.norm(dim=1, keepdim=True)
        queries = queries / sizes.clamp(min=_TINY)
        count = min(count, len(self))
        step = max(_PAIRS // max(len(queries), 1), count)
        best = torch.empty(len(queries), 0, device=self._rows.device)
        where = torch.empty(len(queries), 0, dtype=torch.int64, device=self._rows.device)
        for start in range(0, len(self), step):
            part = self._rows[start : start + step]
            # On a GPU the product itself sums halves in float32; elsewhere they are converted first.
            cosines = (queries.half() @ part.T).float() if part.is_cuda else queries @ part.float().T
            scores = cosines.add_(tilt).mul_(self._norms[start : start + len(part)]).mul_(sizes)
            places = torch.arange(start, start + len(part), device=part.device).expand_as(scores)
            best, where = torch.cat([best, scores], dim=1), torch.cat([where, places], dim=1)
            if best.shape[1] > count:
                best, chosen = torch.topk(best, count, dim=1)
                where = torch.gather(where, 1, chosen)
        order = torch.argsort(best, dim=1, descending=True, stable=True)
        return torch.gather(where, 1, order).cpu().numpy(), torch.gather(best, 1, order).cpu().numpy()

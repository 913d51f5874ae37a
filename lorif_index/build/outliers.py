"""Outliers: whether a few examples hold most of the self-influence, and so come first for every question.

Scores are products of gradients, and a few examples' may be a thousand times the others': those of a confident
classifier's mistakes, for instance (globally influential outliers: RelatIF, Barshan, Brunet and Dziugaite,
arXiv:2003.11630). `search(..., normalize="relatif")` takes that out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..damping import Damping
from ..search.reader import Reader, positions_of

# Rows looked at, and how many of them are few. Below so many there is nothing to say of a hundredth of them.
EXAMPLES, _FEW, _LEAST = 500, 0.01, 100
# Read and scored together.
_BLOCK_ROWS = 100


def measure_outliers(reader: Reader, shuffled: np.ndarray) -> dict[str, Any] | None:
    """What the hundredth of the examples with the largest self-influence g^T H^-1 g holds of it.

    Args:
        reader: the index.
        shuffled: ids in random order; the first `EXAMPLES` that have rows are looked at.

    Returns:
        {"share": of their summed self-influence, in [0, 1], "examples": how many were looked at}, as plain JSON values;
        None where there are no rows, fewer than 100, or no self-influence.
    """
    positions = positions_of(reader.store, shuffled)
    positions = np.sort(positions[positions >= 0][:EXAMPLES])
    if not reader.layout.row_bytes or len(positions) < _LEAST:
        return None
    damping: Damping = reader.config.damping  # type: ignore[assignment]
    preconditioners = reader.preconditioners(reader.specs, damping)
    parts = []
    for start in range(0, len(positions), _BLOCK_ROWS):
        rows = reader.store.gather(positions[start : start + _BLOCK_ROWS])
        parts.append(reader.self_scores(rows, preconditioners))
    own = torch.cat(parts).double().clamp_min(0.0).sort(descending=True).values
    total = float(own.sum())
    if not 0 < total < float("inf"):
        return None
    return {"share": round(float(own[: int(len(own) * _FEW)].sum()) / total, 6), "examples": len(own)}

"""Outliers: whether a few examples hold most of the self-influence, and so come first for every question.

Scores are products of gradients, and a few examples' may be a thousand times the others': those of a confident
classifier's mistakes, for instance (globally influential outliers: RelatIF, Barshan, Brunet and Dziugaite,
arXiv:2003.11630). `search(..., normalize="relatif")` takes that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..curvature.inverse import Preconditioner
from ..search.rows import IndexRows

# Rows looked at, and how many of them are few. Below so many there is nothing to say of a hundredth of them.
_EXAMPLES, _FEW, _LEAST = 500, 0.01, 100


def measure_outliers(rows: IndexRows, preconditioners: Mapping[str, Preconditioner]) -> dict[str, Any] | None:
    """What the hundredth of the examples with the largest self-influence g^T H^-1 g holds of it, of 500 random rows;
    over several ranks, of all ranks' rows, and the same on each.

    Returns:
        {"share": of their summed self-influence, in [0, 1], "examples": how many were looked at}, as plain JSON values;
        None where there are fewer than 100 rows, or no self-influence.
    """
    positions, count = rows.drawn("outliers", _EXAMPLES)
    if count < _LEAST:
        return None
    found = [torch.empty(0)]
    with rows.ranks.jointly():
        found += [rows.codec.self_influence(part, preconditioners) for part in rows.blocks(positions)]
    own = np.concatenate(rows.ranks.gather(torch.cat(found).numpy())).astype(np.float64)
    own = np.sort(own.clip(min=0.0))[::-1]
    total = float(own.sum())
    if not 0 < total < float("inf"):
        return None
    return {"share": round(float(own[: int(len(own) * _FEW)].sum()) / total, 6), "examples": len(own)}

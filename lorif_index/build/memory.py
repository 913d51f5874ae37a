"""Memory: bytes that each stage of a build, and an open index, hold at once, from shapes and choices alone.

The model, its activations and what Python itself takes come on top.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..capture.gradients import LayerSpec
from ..config import BuildConfig
from ..linalg.subspace import GROUP_BYTES, SubspaceFit
from ..search.candidates import most_proposed
from ..search.coarse import TRAIN_ROWS
from ..search.joint import BYTES_ORDERED, ORDERED_BYTES
from ..storage.resident import CODE_BYTES
from .coarse_build import TILT_QUERIES
from .sizes import code_bytes, curvature_bytes, directions_kept, disk_sizes, fit_sizes, query_count

# Of a proposed row: its position and score.
_PROPOSED = 12
_ID_BYTES = 8


def stage_memory(
    config: BuildConfig,
    specs: Mapping[str, LayerSpec],
    stored: str,
    count: int,
    *,
    coarse: bool = True,
    ranks: int = 1,
    shared: bool = True,
    curvature_rows: int | None = None,
) -> dict[str, int]:
    """Stage -> most bytes that one rank holds.

    Args:
        config, specs, stored, coarse, curvature_rows: as in `disk_sizes`.
        count: n, of all ranks.
        ranks: how many.
        shared: they share a folder: its leader puts the whole coarse index together. Else each has its own.
    """
    own = -(-count // ranks)
    sizes = disk_sizes(config, specs, stored, own, coarse=coarse, curvature_rows=curvature_rows)
    fit = fit_sizes(config, specs, stored, coarse=coarse, curvature_rows=curvature_rows)
    total = directions_kept(config, specs, stored, curvature_rows)
    dim = min(config.sketch_dim, max(total, 1))
    wide = sum(spec.dim for spec in specs.values())
    found = {
        "gradients": 4 * wide * config.batch_size,
        "curvature": curvature_bytes(config, specs, stored, GROUP_BYTES) + fit["curvature"],
        "encode": 2 * sizes.fit + 2 * min(config.shard_bytes, own * max(sizes.row, 8)),
    }
    if fit["sketch"]:
        pca = SubspaceFit((), total, dim, count, 0, torch.device("cpu"))
        # Coordinates are taken of gradients, with all bases made ready at once; else of the rows.
        bases = fit["curvature"] if stored in ("both", "coordinates", "coarse") else 0
        found["sketch"] = 2 * bases + pca.nbytes
    if coarse or stored == "coarse":
        codes = (count if shared else own) * code_bytes(dim)
        # What makes coordinates of rows of eigencodes is one matrix, put together of its layers'.
        sketcher = 2 * 4 * total * dim if stored == "eigen" else 0
        found["coarse"] = sizes.fit + sketcher + 2 * codes + 8 * min(count, TRAIN_ROWS) * dim
        if config.calibration_queries:
            queries = query_count(config, specs, count)
            found["calibrate"] = (
                sizes.fit
                + own * code_bytes(dim)
                + 2 * 4 * wide * queries
                + (3 * 4 * total * queries if stored == "eigen" else 0)
                + _proposals(count, own, ranks, min(queries, TILT_QUERIES))
            )
    coordinates = (
        min(own * (dim * config.coordinate_bits // 8 + 4), CODE_BYTES) if stored in ("both", "coordinates") else 0
    )
    found["search"] = sizes.fit + own * (_ID_BYTES + (code_bytes(dim) if coarse else 0)) + coordinates
    return found


def _proposals(count: int, own: int, ranks: int, queries: int) -> int:
    """Of rows that are proposed to some queries together, as many as may be proposed at all."""
    whole = 2 * _PROPOSED * queries * most_proposed(count)
    if ranks == 1:
        return whole
    own = min(most_proposed(count), own)
    together = min(max(ORDERED_BYTES, BYTES_ORDERED * ranks * own), BYTES_ORDERED * ranks * own * queries)
    return whole + _PROPOSED * queries * own + together

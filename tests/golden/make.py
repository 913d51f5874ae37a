"""Makes a golden index: `python tests/golden/make.py FOLDER STORE`, run once with the library of the version it is of.

With `wide` behind it, one layer is so wide that its curvature is fitted within a grid, with a diagonal from version 6
on; with `largest`, rows have the largest of groups of its directions, too.

What is in this folder is never made again: it is what users' disks hold.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch

from lorif_index import BuildConfig, Index

N, QUERIES = 48, 2
SHAPES = {"first": (6, 5), "second": (4, 4)}
WIDE = {"first": (34, 34), "second": (4, 4)}


def gradients(count: int, seed: int, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, torch.Tensor]:
    """Gradients that numpy's generator, which does not change, gives: (count, d_in, d_out) a layer."""
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(generator.standard_normal((count, *shape)).astype(np.float32))
        for name, shape in shapes.items()
    }


def main() -> None:
    folder, store, wide = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] in (["wide"], ["largest"])
    shapes = WIDE if wide else SHAPES
    wanted = {
        "store": store, "rank": 1, "curvature_rank": "auto" if wide else 8, "sketch_dim": 8, "eigen_bytes": 12,
        "eigen_code": "largest" if sys.argv[3:] == ["largest"] else "levels",
        "shard_bytes": 1000, "calibration_queries": 4, "coarse": "PQ4x4fs", "curvature": "empirical",
    }  # fmt: skip
    known = inspect.signature(BuildConfig).parameters
    index = Index.build(
        folder,
        gradients=[gradients(N, 0, shapes)],
        config=BuildConfig(**{name: value for name, value in wanted.items() if name in known}),
        metadata={"made": "golden"},
        **({"payloads": [{"number": i} for i in range(N)]} if hasattr(Index, "add") else {}),
    )
    if hasattr(index, "remove"):
        # From version 5 on, an index that has lived.
        index.remove([1, 30])
    query = gradients(QUERIES, 1, shapes)
    found = {"ids": index.ids.tolist(), "self": None, "scores": None}
    if store != "coarse":
        found |= {"scores": index.scores(query).tolist(), "self": index.self_influence().tolist()}
    found["hits"] = index.search(query, k=5).ids.tolist()
    (folder / "expected.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

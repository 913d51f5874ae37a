"""Makes a golden index: `python tests/golden/make.py WAY`, run once with the library that first wrote the format.

What is in this folder is never made again: it is what users' disks hold. A new version of the format gets indexes of
its own beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorif_index import BuildConfig, Index
from lorif_index.storage.manifest import FORMAT_VERSION

N, QUERIES = 48, 2
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "factors": {"first": (6, 5), "second": (4, 4)},
    "eigen": {"first": (12, 10), "second": (4, 4)},
    # A side too wide to be turned, as a head's words are.
    "sparse": {"first": (1030, 2), "second": (4, 4)},
}
WAYS: dict[str, dict[str, Any]] = {
    "factors": {"store": "factors", "rank": 1, "curvature_rank": 8, "projection_dim": 4},
    "eigen": {"store": "eigen", "eigen_bytes": 60, "curvature_rank": 6},
    "sparse": {"store": "eigen", "eigen_bytes": 32, "curvature_rank": 6},
}


def gradients(count: int, seed: int, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Gradients that numpy's generator, which does not change, gives: (count, d_in, d_out) a layer."""
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(generator.standard_normal((count, *shape)).astype(np.float32))
        for name, shape in shapes.items()
    }


def config_of(way: str) -> BuildConfig:
    """The choices of a golden index."""
    return BuildConfig(
        curvature="empirical",
        coarse={"kind": "flat" if way == "factors" else "auto", "dim": 8, "queries": 2},
        compute={"shard_bytes": 1000},
        **WAYS[way],
    )


def main() -> None:
    way = sys.argv[1]
    folder, shapes = Path(__file__).parent / f"v{FORMAT_VERSION}-{way}", SHAPES[way]
    payloads = [{"number": i} for i in range(N)]
    with Index.build(
        folder,
        gradients=[gradients(N, 0, shapes)],
        config=config_of(way),
        metadata={"made": "golden"},
        payloads=payloads,
        progress=False,
    ) as index:
        # "auto" makes none of so few rows.
        index.rebuild_coarse(index.config.coarse.kind, progress=False)
        index.remove([1, 30])
        query = gradients(QUERIES, 1, shapes)
        found = {
            "ids": index.ids.tolist(),
            "scores": index.scores(query).tolist(),
            "self": index.self_influence().tolist(),
            "hits": index.search(query, k=5).ids.tolist(),
            "near": index.search(query, k=5, exact=False).ids.tolist(),
        }
    (folder / "writer.lock").unlink()
    (folder / "expected.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

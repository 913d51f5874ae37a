"""Makes a golden index: `python tests/golden/make.py CODEC`, run once with the library that first wrote the format.

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
    # One layer so wide that its curvature is fitted within a grid, with a diagonal.
    "eigen": {"first": (33, 32), "second": (4, 4)},
    # So many directions that one of a group is kept.
    "largest": {"first": (7, 7), "second": (7, 7), "third": (7, 7)},
}
CODECS: dict[str, dict[str, Any]] = {
    "factors": {"rank": 1, "curvature_rank": 8, "projection_dim": 4},
    "eigen": {"eigen_bytes": 60, "sample": 4},
    "largest": {"curvature_rank": None, "eigen_bytes": 12},
}


def gradients(count: int, seed: int, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Gradients that numpy's generator, which does not change, gives: (count, d_in, d_out) a layer."""
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(generator.standard_normal((count, *shape)).astype(np.float32))
        for name, shape in shapes.items()
    }


def config_of(codec: str) -> BuildConfig:
    """The choices of a codec's golden index."""
    return BuildConfig(
        store=codec,
        curvature="empirical",
        coarse={"kind": "flat" if codec == "factors" else "auto", "dim": 8, "queries": 2},
        compute={"shard_bytes": 1000},
        **CODECS[codec],
    )


def main() -> None:
    codec = sys.argv[1]
    folder, shapes = Path(__file__).parent / f"v{FORMAT_VERSION}-{codec}", SHAPES[codec]
    payloads = [{"number": i} for i in range(N)]
    with Index.build(
        folder,
        gradients=[gradients(N, 0, shapes)],
        config=config_of(codec),
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

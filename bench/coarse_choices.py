"""Question: which FAISS index should propose candidates? Recall per byte and per millisecond, at two sizes.

Every kind of index over the same stored coordinates; recall of the index's exact top 100 among the first T of the
coarse order, tilted as calibrated, on held-out queries; milliseconds for one query at a time; bytes of the sealed file
per example.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lorif_index.build.coarse_build import random_positions

from bench.environment import CACHE, arguments, keep, table, timed
from bench.scale_data import FOLDER
from bench.scale_index import FULL_RANK, derived, full_index
from bench.search_at_scale import answers, asked, some
from lorif_index import Index
from lorif_index.search.coarse import Coarse

DEPTHS = (400, 1600, 6400)
FACTORIES = (
    "PQ256x4fs",
    "PQ128x4fs",
    "PQ128x8",
    "PQ64x8",
    "OPQ256,PQ256x4fs",
    "RaBitQ",
    "RaBitQfs",
    "RaBitQfs2",
    "RaBitQfs4",
    "SQ4",
    "SQ8",
    "PRQ32x8x4fs",
    "PLSQ32x8x4fs",
    "IVF256,PQ256x4fs",
    "HNSW32,SQ8",
    "Flat",
)


def measure(index: Index, queries: Any, factory: str, slow: float) -> dict[str, Any]:
    """Recall, milliseconds and bytes; or why it did not run. `slow`: seconds of training above which it is left."""
    reader = index._reader
    truth = answers(index, queries, 100, index.path / "answers-choices.npz")["proponents"]
    x = index._questions.prepare(queries, None, index.config.damping, index.layers).question.x  # type: ignore[arg-type]
    if x is None:
        raise RuntimeError("the index has no sketch")
    asked, out = x.numpy(), {"factory": factory, "n": len(index)}
    try:
        sample = reader.coordinates(reader.store.gather(random_positions(reader, "coarse-sample", 20_000))).numpy()
        began = time.perf_counter()
        # A tenth first: some additive quantisers train for hours.
        Coarse.train(factory, sample[: max(len(sample) // 10, 64)])
        if 10 * (time.perf_counter() - began) > slow:
            return out | {"error": f"training on {len(sample):,} rows would take over {slow:.0f} s"}
        began = time.perf_counter()
        coarse = Coarse.train(factory, sample)
        out["train_seconds"] = time.perf_counter() - began
        began, added = time.perf_counter(), 0
        for z in reader.all_coordinates():
            coarse.add(z.numpy())
            added += len(z)
            if added >= 4096 and (time.perf_counter() - began) / added * len(index) > slow:
                return out | {"error": f"adding {len(index):,} rows would take over {slow:.0f} s"}
        out["add_seconds"] = time.perf_counter() - began
    except Exception as error:  # a table of what works: what does not is shown with its reason
        return out | {"error": str(error)[:160]}
    if factory.startswith("IVF"):
        coarse._index.nprobe = coarse._index.nlist // 2
    with tempfile.TemporaryDirectory() as folder:
        out["bytes"] = coarse.save(Path(folder), "c").size / len(index)
    deepest = min(DEPTHS[-1], len(index))
    tilt = reader.candidates.calibration.orders["proponents"].tilt  # type: ignore[union-attr]
    positions, _ = coarse.search(asked, deepest, tilt)
    ids = np.where(positions >= 0, index.ids[positions], -1)
    for depth in DEPTHS:
        hit = [np.intersect1d(row[:depth], best).size / 100 for row, best in zip(ids, truth, strict=True)]
        out[f"recall_{depth}"] = float(np.mean(hit))
    singles = [timed(lambda i=i: coarse.search(asked[i : i + 1], DEPTHS[1], tilt)) for i in range(min(len(asked), 30))]
    out["ms"] = 1e3 * statistics.median(singles)
    return out


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        sizes={"type": int, "nargs": 2, "default": [20_000, 100_000]},
        full={"type": int, "default": 1_000_000},
        slow={"type": float, "default": 120.0},
        steps={"type": int, "default": 2000},
    )
    folder, most, steps, sizes, full, count = FOLDER, None, parsed.steps, parsed.sizes, parsed.full, 100
    factories, settings = FACTORIES, {}
    if parsed.smoke:
        folder, most, steps, sizes, full, count = CACHE / "smoke" / "choices", 60, 3, [1100, 1500], 1500, 10
        factories = ("PQ32x4fs", "SQ4", "nonsense")
        settings = {"curvature_rank": 32, "sketch_dim": 64, "curvature_sample": 400, "calibration_queries": 4}
        shutil.rmtree(folder, ignore_errors=True)
    whole = full_index(full, steps, folder, most, settings)
    queries = some(asked("held-out", count, steps, folder, most), 0, count)
    results = []
    for n in sizes:
        index = derived(whole, FULL_RANK, n)
        for factory in factories:
            failed = [r for r in results if r["factory"] == factory and "error" in r]
            # Training is the same at every size: what failed once is not tried again.
            results.append(failed[0] | {"n": n} if failed else measure(index, queries, factory, parsed.slow))
            print(results[-1], flush=True)
    rows = [["n", "index", "bytes", *(f"T={d}" for d in DEPTHS), "ms", "train s", "add s"]]
    for r in results:
        if "error" in r:
            rows.append([f"{r['n']:,}", r["factory"], r["error"], *[""] * 6])
        else:
            found = [f"{r[f'recall_{d}']:.3f}" for d in DEPTHS]
            times = [f"{r['ms']:.2f}", f"{r['train_seconds']:.0f}", f"{r['add_seconds']:.0f}"]
            rows.append([f"{r['n']:,}", r["factory"], f"{r['bytes']:.0f}", *found, *times])
    table(rows)
    keep("coarse_choices", {"results": results}, parsed)


if __name__ == "__main__":
    main()

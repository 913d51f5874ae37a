"""Question: what does a stored byte buy? Agreement with unfactored gradients' scores, representation by representation.

Curvature (full rank) and sketch are fitted on a random half, agreement is measured on the other half: mean Spearman and
overlap of the top 100 over held-out queries. Two models: the scale benchmark's (32-word windows of all packages) and
the standard library's (64-word windows).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import corpus
from bench.agreement import agreement
from bench.environment import CACHE, arguments, keep, table
from bench.scale_data import FOLDER, gradients
from lorif_index import BuildConfig, Index
from lorif_index.capture.sources import ModelCapture
from lorif_index.curvature.inverse import transform
from lorif_index.linalg.projection import keyed_generator

Gradients = dict[str, torch.Tensor]
FACTORS = [("factors", {"rank": c}) for c in (1, 2, 4, 8)]
COORDINATES = [
    ("coordinates", {"sketch_dim": k, "coordinate_bits": b})
    for k, b in ((512, 1), (1024, 1), (512, 2), (1024, 2), (256, 4), (512, 4), (1024, 4), (512, 8), (1024, 8))
]
BOTH = [("both", {"rank": c, "sketch_dim": k}) for c, k in ((1, 512), (1, 1024), (4, 512), (4, 1024))]


def scale_model(n: int, queries: int, folder: Path, steps: int, most: int | None) -> tuple[Gradients, Gradients]:
    data = gradients("train", n, steps, folder, most).block(0, n)
    asked = gradients("held-out", queries, steps, folder, most).block(0, queries)
    return {k: v.clone() for k, v in data.items()}, {k: v.float() for k, v in asked.items()}


def library_model(n: int, queries: int, steps: int, small: bool) -> tuple[Gradients, Gradients]:
    ids = corpus.sequences(n + queries)
    model = corpus.gpt(1, 16) if small else corpus.gpt()
    corpus.train(model, ids[:n], steps)
    taken = ModelCapture(model, BuildConfig(projection_dim=32))
    capture = taken.capture(None)
    parts = [
        {name: g.dense().half() for name, g in capture.gradients(np.arange(len(b)), {"input_ids": b}).layers.items()}
        for b in ids.split(64)
    ]
    whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    return {k: v[:n] for k, v in whole.items()}, {k: v[n:].float() for k, v in whole.items()}


def measure(
    data: Gradients, queries: Gradients, k: int, cases: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    n = len(next(iter(data.values())))
    sample = np.sort(np.random.Generator(keyed_generator(0, "curvature-sample", n)).permutation(n)[: n // 2])
    others = np.setdiff1d(np.arange(n), sample)
    blocks = [{name: g[i : i + 512] for name, g in data.items()} for i in range(0, n, 512)]
    truth: np.ndarray | None = None
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, (store, settings) in enumerate(cases):
            config = BuildConfig(store=store, curvature_rank=None, curvature_sample=n // 2, coarse=None, **settings)  # type: ignore[arg-type]
            index = Index.build(Path(temporary) / str(number), gradients=blocks, config=config, progress=False)
            if truth is None:
                pre = index._reader.preconditioners(index.layers, index.config.damping)  # type: ignore[arg-type]
                asked = transform(queries, pre)
                truth = sum(
                    (asked[m].flatten(1) @ data[m][torch.from_numpy(others)].float().flatten(1).T).numpy() for m in data
                )
            spearman, overlap = agreement(index.scores(queries)[:, others], truth, k)
            rows.append(
                {"store": store, **settings, "bytes": index.bytes_per_example, "spearman": spearman, "overlap": overlap}
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parsed = arguments(__doc__ or "", n={"type": int, "default": 8000}, steps={"type": int, "default": 2000})
    n, queries, k, cases = parsed.n, 256, 100, FACTORS + COORDINATES + BOTH
    folder, most, steps = FOLDER, None, parsed.steps
    if parsed.smoke:
        n, queries, k, folder, most, steps = 160, 8, 10, CACHE / "smoke" / "fidelity", 40, 3
        cases = [FACTORS[0], ("coordinates", {"sketch_dim": 64}), ("both", {"rank": 1, "sketch_dim": 64})]
    results = {
        "all packages, 32 words": measure(*scale_model(n, queries, folder, steps, most), k, cases),
        "standard library, 64 words": measure(
            *library_model(n, queries, 3 if parsed.smoke else 300, parsed.smoke), k, cases
        ),
    }
    for name, rows in results.items():
        print(name)
        lines = [["stored", "bytes", "spearman", f"top-{k} overlap"]]
        for r in rows:
            what = ", ".join(f"{key}={r[key]}" for key in ("rank", "sketch_dim", "coordinate_bits") if key in r)
            lines.append([f"{r['store']} {what}", str(r["bytes"]), f"{r['spearman']:.3f}", f"{r['overlap']:.3f}"])
        table(lines)
    keep("fidelity", {"n": n, "queries": queries, "results": results}, parsed)


if __name__ == "__main__":
    main()

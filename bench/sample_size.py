"""Question: what do the size of the curvature's sample, its rank r and the factors' rank c cost?

Agreement with the scores of unfactored gradients under the full-rank curvature of all rows (no rank cut anywhere):
mean Spearman over held-out queries, and overlap of the top 100. What the sample's size costs, what the curvature rank r
costs with either complement, and what the factor rank c costs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.agreement import agreement
from bench.corpus import gpt, sequences, train
from bench.environment import arguments, keep, table
from lorif_index import BuildConfig, Index
from lorif_index.curvature.inverse import Preconditioner, transform
from lorif_index.damping import RelativeDamping

QUERIES = 64


def dense_scores(index: Index, queries: dict[str, torch.Tensor], gradients: Index, complement: str) -> np.ndarray:
    """Scores of unfactored gradients (kept in another, full-rank index) under this index's curvature."""
    policy = RelativeDamping(0.1)
    preconditioners = {n: Preconditioner.of(n, index.curvature[n], policy, complement) for n in index.layers}
    return gradients_scores(gradients, transform(queries, preconditioners))


def gradients_scores(gradients: Index, transformed: dict[str, torch.Tensor]) -> np.ndarray:
    from lorif_index.search.scoring import Question, stream_scores

    question = Question(transformed, None, len(next(iter(transformed.values()))))
    return np.concatenate([part.numpy() for _, part, _ in stream_scores(gradients._reader.rows, question)], axis=1)


def main() -> None:
    parsed = arguments(__doc__ or "", n={"type": int, "default": 6000})
    n, steps, k, dim = (150, 3, 20, 8) if parsed.smoke else (parsed.n, 300, 100, 32)
    ids = sequences(n + QUERIES)
    data, asked = {"input_ids": ids[:n]}, {"input_ids": ids[n:]}
    model = gpt(1, 16) if parsed.smoke else gpt()
    loss = train(model, ids[:n], steps)
    results: dict[str, Any] = {"n": n, "queries": QUERIES, "loss_per_token": loss, "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def build(name: str, **settings: Any) -> Index:
            # Random projections: all indexes must see the same gradients, whatever their sample.
            fixed = {"projection": "random", "projection_dim": dim, "curvature": "empirical", "store": "factors"}
            config = BuildConfig(**(fixed | {"batch_size": 64, "rank": 1, "coarse": None} | settings))
            return Index.build(folder / name, model=model, data=data, config=config, progress=False)

        full = build("full", rank=None, dtype="float32", curvature_rank=None, curvature_sample=n)
        queries = full._questions.gradients(asked, None, full.layers)
        truth = dense_scores(full, queries, full, "truncated")

        def note(what: str, value: Any, scores: np.ndarray) -> None:
            spearman, overlap = agreement(scores, truth, k)
            results["rows"].append({"varied": what, "value": value, "spearman": spearman, "overlap": overlap})

        for sample in [s for s in (100, 250, 500, 1000, 2000, 4000) if s < n] + [n]:
            index = build(f"s{sample}", curvature_rank=None, curvature_sample=sample)
            note("sample, r full", sample, dense_scores(index, queries, full, "tail-corrected"))
        for r in (32, 64, 128, 256, 512, 768) if not parsed.smoke else (32, 256):
            index = build(f"r{r}", curvature_rank=r, curvature_sample=n)
            for complement in ("truncated", "tail-corrected"):
                note(f"r, {complement}", r, dense_scores(index, queries, full, complement))
        for c in (1, 2, 4, 8):
            index = build(f"c{c}", rank=c, curvature_rank=None, curvature_sample=n)
            note("factors c, r full", c, index.scores(queries))
    rows = [["varied", "value", "spearman", f"top-{k} overlap"]]
    rows += [[r["varied"], str(r["value"]), f"{r['spearman']:.3f}", f"{r['overlap']:.3f}"] for r in results["rows"]]
    table(rows)
    keep("sample_size", results, parsed)


if __name__ == "__main__":
    main()

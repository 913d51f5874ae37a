"""Claim: taking 20 hits apart costs at most 1.5 times a plain forward and backward pass of the same 20 examples.

One run, interleaved: the plain pass with parameter gradients, the explanation with and without the query's tokens, and
the query's own pass, which an explanation repeats. What coverage adds to a build is measured beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.corpus import gpt, sequences, train
from bench.environment import arguments, keep, table, timed
from lorif_index import BuildConfig, Index, default_loss

HITS = 20
LIMIT = 1.5


def plain(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward with parameter gradients, in eval mode like capture."""
    model.eval()
    model.zero_grad(set_to_none=True)
    default_loss(model, {"input_ids": ids}).sum().backward()
    model.zero_grad(set_to_none=True)


def time_model(layers: int, width: int, count: int, steps: int, repeats: int, folder: Path, **config: Any) -> Any:
    ids = sequences(count + 1)
    model = gpt(layers, width)
    train(model, ids[:count], steps)
    data, query = {"input_ids": ids[:count]}, {"input_ids": ids[count:]}
    index = Index.build(
        folder / f"{layers}-{width}", model=model, data=data, config=BuildConfig(**config), progress=False
    )
    hits = index.search(query, k=HITS)
    of_hits = ids[hits.ids[0]]
    routes = {
        "plain forward+backward": lambda: plain(model, of_hits),
        "explain": lambda: index.explain(query, hits),
        "explain, without the query's tokens": lambda: index.explain(query, hits, query_tokens=False),
        "plain forward+backward of the query": lambda: plain(model, query["input_ids"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for function in routes.values():
        function()
    for _ in range(repeats):
        for name, function in routes.items():
            seconds[name].append(timed(function))
    base = seconds["plain forward+backward"]
    found = index.explain(query, hits)[0]
    most = max(abs(e.score) for e in found)
    errors = {
        "tokens": max(abs(float(e.tokens.sum()) - e.score) for e in found) / most,
        "query_tokens": max(abs(float(e.query_tokens.sum()) - e.score) for e in found) / most,
    }
    report = index.build_report
    coverage = report["coverage"]
    return {
        "model": f"GPT-2 architecture, {layers} layers, width {width}, sequences of 64",
        "examples": count,
        "repeats": repeats,
        "projected": sorted({(spec.d_in, spec.d_out) for spec in index.specs.values()}),
        "curvature_rank": max(index.curvature[name].rank for name in index.layers),
        "stored": index.codec,
        "ms": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "ratio_to_plain": {
            n: statistics.median(a / b for a, b in zip(s, base, strict=True)) for n, s in seconds.items()
        },
        "error_of_sums": errors,
        "coverage": coverage,
        "coverage_share_of_build": coverage["seconds"] / sum(report["seconds"].values()),
    }


def main() -> None:
    parsed = arguments(__doc__ or "")
    sizes = [(1, 16, 64, 5, 1)] if parsed.smoke else [(4, 64, 200, 20, 9), (6, 256, 100, 3, 7)]
    with tempfile.TemporaryDirectory() as folder:
        models = [time_model(*size, Path(folder)) for size in sizes]
    rows = [["model", "route", "ms", "ratio", "expected"]]
    for result in models:
        for name, ratio in result["ratio_to_plain"].items():
            expected = f"<= {LIMIT}" if name == "explain" else ""
            rows.append([result["model"][:42], name, f"{result['ms'][name]:.1f}", f"{ratio:.2f}", expected])
    table(rows)
    for result in models:
        print("sums are off by", {k: f"{v:.1e}" for k, v in result["error_of_sums"].items()}, "of the largest score")
        kept = {k: v for k, v in result["coverage"].items() if k != "layers"}
        print(f"coverage, {result['coverage_share_of_build']:.1%} of the build:", kept)
    keep("explain_cost", {"hits": HITS, "models": models}, parsed)
    if not parsed.smoke and any(m["ratio_to_plain"]["explain"] > LIMIT for m in models):
        print(f"above {LIMIT} in one of the models")


if __name__ == "__main__":
    main()

"""Claim: an exact scan costs little more than reading the factors, and far less than the published way.

One run over indexes of the same real gradients, c = 1 and 4: the scan with 1 and 32 queries, hot and cold, beside (a)
reading the same files, (b) the published way, projecting every training example on V at every query, (c) a dense store
of full projected gradients (LoGRA) scored by one matrix product, and the rate of a large float32 matrix product.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.corpus import gpt, once_trained, sequences, train
from bench.environment import (
    CACHE,
    arguments,
    drop_files,
    in_turn,
    keep,
    median_seconds,
    medians,
    read_files,
    resident_fraction,
    shards,
    table,
    timed,
)
from bench.methods import NO_HEAD, gathered, shaped
from lorif_index import BuildConfig, Index
from lorif_index.curvature.fit import LayerCurvature

DIM = 32
Gradients = dict[str, torch.Tensor]


def built(folder: Path, count: int, rank: int, curvature_rank: int, steps: int) -> tuple[Index, Gradients]:
    """The index of `count` sequences at rank c, built once and kept; and gradients of 32 held-out ones, so that a scan
    is timed without the model."""
    ids = sequences(count + 64)
    # Kept: another number of threads would train other weights, and the index would be of another model.
    model, _ = once_trained(folder / f"model-n{count}-{steps}.npz", gpt(), lambda m: train(m, ids[:count], steps))
    path = folder / f"c{rank}-n{count}"
    if not (path / "manifest.json").exists():
        config = BuildConfig(
            projection_dim=DIM,
            rank=rank,
            curvature_rank=curvature_rank,
            sample=min(4000, count),
            batch_size=64,
            store="factors",
            complement="truncated",
            layers=NO_HEAD,
            coarse=None,
        )
        Index.build(path, model=model, data={"input_ids": ids[:count]}, config=config).close()
    index = Index.open(path)
    asked = gathered(model, [{"input_ids": ids[count : count + 32]}], index.config, index)
    return index, shaped(asked, index.specs)


def flat(gradients: Gradients) -> torch.Tensor:
    """(n, D) gradients of all layers side by side."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def leading(layer: LayerCurvature) -> tuple[torch.Tensor, torch.Tensor]:
    """V (D, r) and S (r,) of a truncated curvature V S V^T."""
    values = layer.spectrum[: layer.rank].float()
    return layer.sides.turned_back((layer.factor / values.sqrt()).T).T.contiguous(), values


def published_way(index: Index, queries: Gradients, limit: int) -> tuple[float, float]:
    """Seconds for the first `limit` rows: rebuild, project on V, inner product of coordinates. Also the largest
    difference from the same scores without a projection of the rows, as a fraction of the largest."""
    bases, weights = {}, {}
    for name in index.layers:
        layer = index.curvature[name]
        bases[name], values = leading(layer)
        weights[name] = (queries[name].flatten(1) @ bases[name]) / (values + 0.1 * layer.trace / layer.dim)
    ids, out = index.ids[:limit], []

    def scan() -> None:
        for start in range(0, limit, 256):
            rows = index.gradients(ids[start : start + 256])
            parts = [w @ (rows[name].flatten(1) @ bases[name]).T for name, w in weights.items()]
            out.append(torch.stack(parts).sum(dim=0))

    seconds = timed(scan)
    got, rows = torch.cat(out, dim=1), index.gradients(ids)
    mine = {name: w @ bases[name].T for name, w in weights.items()}
    expected = torch.stack([mine[name] @ rows[name].flatten(1).T for name in mine]).sum(dim=0)
    return seconds, float((got - expected).abs().max() / expected.abs().max())


def dense_store(index: Index, path: Path, limit: int) -> Path:
    """`limit` rows of full projected gradients in half precision, as LoGRA keeps them."""
    if not path.exists():
        with path.open("wb") as file:
            for start in range(0, limit, 512):
                rows = index.gradients(index.ids[start : min(start + 512, limit)])
                file.write(flat(rows).half().numpy().tobytes())
            os.fsync(file.fileno())
    return path


def score_dense(path: Path, queries: torch.Tensor, rows: int = 256) -> None:
    """One matrix product a block, converted by copy_ into a buffer that is used again."""
    width = queries.shape[1]
    half, block = torch.empty(rows, width, dtype=torch.float16), torch.empty(rows, width)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(half.view(torch.uint8).numpy().reshape(-1).data):
            n = got // (2 * width)
            torch.mm(queries, block[:n].copy_(half[:n]).T)


def measure(index: Index, queries: Gradients, folder: Path, limit: int, repeats: int) -> dict[str, Any]:
    files, specs = shards(index.path), list(index.specs.values())
    asked = {1: {name: g[:1] for name, g in queries.items()}, 32: queries}
    routes: dict[str, Any] = {
        "read": lambda: read_files(files),
        **{f"scan {q}": lambda g=g: index.search(g, 10, exact=True) for q, g in asked.items()},
    }
    hot = in_turn(routes, repeats)
    cold: dict[str, list[float]] = {"read": [], "scan 1": []}
    resident: list[float] = []
    for _ in range(repeats):
        for name, seconds in cold.items():
            drop_files(files)
            resident.append(resident_fraction(files) or 0.0)
            seconds.append(timed(routes[name]))
    width = 2048 if repeats > 1 else 256
    square = torch.randn(width, width)
    rate = 2 * width**3 / median_seconds(lambda: square @ square, 9)
    result: dict[str, Any] = {
        "rank": index.config.rank,
        "rows": len(index),
        "bytes_per_row": index.bytes_per_example,
        "hot_seconds": medians(hot),
        "cold_seconds": medians(cold),
        "resident_after_drop": max(resident),
        "matmul_gflops": rate / 1e9,
        "scan_over_read": statistics.median(a / b for a, b in zip(hot["scan 1"], hot["read"], strict=True)),
        "cold_scan_over_read": statistics.median(a / b for a, b in zip(cold["scan 1"], cold["read"], strict=True)),
    }
    path = dense_store(index, folder / f"dense-{limit}-c{index.config.rank}.raw", limit)
    scale = len(index) / limit
    result["dense"] = {"bytes_per_row": 2 * flat(queries).shape[1], "measured_rows": limit}
    result["dense"]["times_more_bytes"] = result["dense"]["bytes_per_row"] / index.bytes_per_example
    for q, g in asked.items():
        # Useful operations by the cheaper way: U^T Q' and inner products with V singly, or U V^T shared by the queries
        # and one product with Q'.
        singly = sum(2 * s.dim * s.rank + 2 * s.d_out * s.rank for s in specs)
        operations = min(singly, sum(2 * s.dim * s.rank / q + 2 * s.dim for s in specs)) * len(index) * q
        taken = result["hot_seconds"][f"scan {q}"]
        result[f"rate_of_matmul_{q}"] = operations / taken / rate
        seconds, difference = published_way(index, g, limit)
        result[f"published_{q}"] = {
            "seconds_scaled": seconds * scale,
            "measured_rows": limit,
            "times_slower": seconds * scale / taken,
            "difference": difference,
        }
        dense = median_seconds(lambda g=g: score_dense(path, flat(g)), 3)  # type: ignore[misc]
        result["dense"][f"seconds_scaled_{q}"] = dense * scale
    return result


def main() -> None:
    parsed = arguments(__doc__, n={"type": int, "default": 50_000}, curvature_rank={"type": int, "default": 512})
    n, rank_r, steps, limit, repeats, folder = parsed.n, parsed.curvature_rank, 100, 4096, 5, CACHE / "scan_cost"
    if parsed.smoke:
        n, rank_r, steps, limit, repeats, folder = 300, 32, 3, 256, 1, CACHE / "smoke" / "scan_cost"
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for rank in (1, 4):
        index, queries = built(folder, n, rank, rank_r, steps)
        results.append(measure(index, queries, folder, limit, repeats))
    rows = [["figure", "expected", *(f"c={r['rank']}" for r in results)]]

    def row(name: str, expected: str, value: Any, form: str = "{:.2f}") -> None:
        rows.append([name, expected, *(form.format(value(r)) for r in results)])

    row("bytes per example", "", lambda r: r["bytes_per_row"], "{:,}")
    row("scan, 1 query, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["scan 1"], "{:.0f}")
    row("scan, 32 queries, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["scan 32"], "{:.0f}")
    row("(a) reading the files, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["read"], "{:.0f}")
    row("hot scan / hot read, 1 query", "", lambda r: r["scan_over_read"])
    row("cold scan / cold read, 1 query", "<= 1.5", lambda r: r["cold_scan_over_read"])
    row("resident after dropping, most", "0", lambda r: r["resident_after_drop"])
    row("rate of float32 matmul, 1 query", ">= 0.4", lambda r: r["rate_of_matmul_1"])
    row("rate of float32 matmul, 32 queries", ">= 0.4", lambda r: r["rate_of_matmul_32"])
    row("(b) published way, times slower, 1", ">= 5", lambda r: r["published_1"]["times_slower"], "{:.1f}")
    row("(b) published way, times slower, 32", ">= 5", lambda r: r["published_32"]["times_slower"], "{:.1f}")
    row("(c) dense store, times the bytes", "16 (c=1)", lambda r: r["dense"]["times_more_bytes"], "{:.1f}")
    row("(c) dense store, 1 query, hot, ms", "", lambda r: 1e3 * r["dense"]["seconds_scaled_1"], "{:.0f}")
    row("(c) dense store, 32 queries, hot, ms", "", lambda r: 1e3 * r["dense"]["seconds_scaled_32"], "{:.0f}")
    row("float32 matmul, GFLOP/s", "", lambda r: r["matmul_gflops"], "{:.0f}")
    table(rows)
    keep("scan_cost", {"n": n, "curvature_rank": rank_r, "d": DIM, "results": results}, parsed)


if __name__ == "__main__":
    main()

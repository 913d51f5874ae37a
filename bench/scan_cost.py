"""Claim: an exact scan costs little more than reading the factors, and far less than the published way.

One run over one index of real gradients: the scan with 1 and 32 queries, hot and cold, beside (a) reading the same
bytes, (b) the published way, projecting every training example on V at every query, (c) a dense store of full projected
gradients (LoGRA) scored by one matrix product, and the rate of a large float32 matrix product.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorif_index.codecs.layout import RowLayout

from bench.corpus import gpt, sequences, train
from bench.environment import CACHE, arguments, keep, median_seconds, table, timed
from bench.scale_index import commit_cut
from lorif_index import BuildConfig, Index
from lorif_index.search.scoring import stream_scores
from lorif_index.storage.store import Store, StoreWriter

DIM = 32


def built(folder: Path, count: int, rank: int, curvature_rank: int, steps: int) -> Index:
    """The index of `count` sequences, built once and kept."""
    path = folder / f"c{rank}-n{count}"
    ids = sequences(count + 64)
    model = gpt()
    weights = folder / f"model-n{count}-{steps}"
    if weights.exists():
        # Kept: another number of threads would train other weights, and the index would refuse them.
        model = type(model).from_pretrained(weights).eval()
    else:
        train(model, ids[:count], steps)
        model.save_pretrained(weights)
    if not (path / "manifest.json").exists():
        config = BuildConfig(
            projection_dim=DIM,
            rank=rank,
            curvature_rank=curvature_rank,
            curvature_sample=min(4000, count),
            batch_size=64,
            store="factors",
            coarse=None,
        )
        return Index.build(path, model=model, data={"input_ids": ids[:count]}, config=config)
    return Index.open(path, model=model)


def question(index: Index, count: int, n: int) -> dict[str, torch.Tensor]:
    """Gradients of held-out sequences, so that a search is timed without the model."""
    ids = sequences(n + 64)[n : n + count]
    return index._questions.gradients({"input_ids": ids}, None, index.layers)


def read_raw(store: Store) -> None:
    """The rows' bytes by preadv into one buffer that is used again."""
    buffer = memoryview(bytearray(8 << 20))
    for shard in store.shards:
        at, end = shard.factors.offset, shard.factors.offset + shard.count * store.layout.factor_bytes
        while at < end:
            at += os.preadv(shard.file.fileno(), [buffer[: min(len(buffer), end - at)]], at)


def drop(store: Store) -> None:
    """Asks the kernel to drop the files from its page cache (they were synced when sealed)."""
    for shard in store.shards:
        os.posix_fadvise(shard.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_fraction(store: Store) -> float | None:
    """Which part of the files is in the page cache, by util-linux's fincore; None where there is none."""
    program = shutil.which("fincore")
    if program is None:
        return None
    paths = [str(shard.file.path) for shard in store.shards]
    done = subprocess.run([program, "-b", "-n", "-o", "RES", *paths], capture_output=True, text=True, check=True)
    return sum(int(line) for line in done.stdout.split()) / store.nbytes


def stream(store: Store) -> None:
    for _ in store.stream():
        pass


def published_way(index: Index, queries: dict[str, torch.Tensor], limit: int) -> tuple[float, float]:
    """Seconds for the first `limit` rows: rebuild, project on V, inner product of coordinates. Also the largest
    difference from our own subspace part, as a fraction of the largest score, to show that it is the same number."""
    store, layout = index._reader.store, index._reader.layout
    weights = {}
    for name in index.layers:
        layer = index.curvature[name]
        lam = 0.1 * layer.trace / layer.dim
        weights[name] = (queries[name].flatten(1) @ layer.basis) / (layer.eigenvalues.float() + lam)
    out: list[torch.Tensor] = []

    def scan() -> None:
        out.clear()
        done = 0
        for _, rows in store.stream():
            for at in range(0, len(rows), 256):
                part = rows[at : at + 256]
                factors = layout.unpack(part)
                total = torch.zeros(next(iter(queries.values())).shape[0], len(part))
                for name, weight in weights.items():
                    coordinates = factors[name].dense().flatten(1) @ index.curvature[name].basis
                    total.addmm_(weight, coordinates.T)
                out.append(total)
                done += len(part)
                if done >= limit:
                    return

    seconds = timed(scan)
    got = torch.cat(out, dim=1)[:, :limit]
    mine = {n: (weights[n] @ index.curvature[n].basis.T).reshape(queries[n].shape) for n in weights}
    expected = torch.zeros_like(got)
    for name, part in layout.unpack(store.gather(np.arange(limit))).items():
        expected += mine[name].flatten(1) @ part.dense().flatten(1).T
    return seconds, float((got - expected).abs().max() / expected.abs().max())


def dense_store(index: Index, folder: Path, limit: int) -> Path:
    """`limit` rows of full projected gradients in half precision, as LoGRA keeps them."""
    path = folder / f"dense-{limit}.raw"
    width = sum(spec.dim for spec in index.specs.values())
    if not path.exists() or path.stat().st_size != limit * width * 2:
        with path.open("wb") as file:
            for start in range(0, limit, 512):
                rows = index._reader.store.gather(np.arange(start, min(start + 512, limit)), check=False)
                parts = index._reader.layout.unpack(rows)
                flat = torch.cat([parts[name].dense().flatten(1) for name in index.layers], dim=1)
                file.write(flat.half().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
    return path


def score_dense(path: Path, queries: torch.Tensor, rows: int) -> None:
    """One matrix product a block, converted by copy_ into a buffer that is used again."""
    width = queries.shape[1]
    half, block = torch.empty(rows, width, dtype=torch.float16), torch.empty(rows, width)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(half.view(torch.uint8).numpy().reshape(-1).data):
            n = got // (2 * width)
            torch.mm(queries, block[:n].copy_(half[:n]).T)


def measure(index: Index, n: int, folder: Path, limit: int, repeats: int) -> dict[str, Any]:
    store = index._reader.store
    one, many = question(index, 1, n), question(index, 32, n)
    specs = list(index.specs.values())

    def operations(q: int) -> float:
        """Useful ones per query and row, by the cheaper way: U^T Q' and inner products with V, or U V^T shared by the
        queries and one product with Q'."""
        singly = sum(2 * s.dim * s.rank + 2 * s.d_out * s.rank for s in specs)
        return min(singly, sum(2 * s.dim * s.rank / q + 2 * s.dim for s in specs))

    square = torch.randn(2048, 2048)
    prepared = [index._questions.prepare(q, None, index.config.damping, index.layers).question for q in (one, many)]

    def scan(which: int) -> None:
        for _ in stream_scores(index._reader.rows, prepared[which]):
            pass

    result: dict[str, Any] = {"rank": index.config.rank, "rows": len(index), "bytes_per_row": store.layout.row_bytes}
    rate = 2 * 2048**3 / median_seconds(lambda: square @ square, 9)
    hot: dict[str, list[float]] = {"read": [], "stream": [], "scan 1": [], "scan 32": []}
    routes = {
        "read": lambda: read_raw(store),
        "stream": lambda: stream(store),
        "scan 1": lambda: scan(0),
        "scan 32": lambda: scan(1),
    }
    for function in routes.values():
        function()
    for _ in range(repeats):
        for name, function in routes.items():
            hot[name].append(timed(function))
    cold: dict[str, list[float]] = {"read": [], "scan 1": []}
    resident: list[float | None] = []
    for _ in range(repeats):
        for name in cold:
            drop(store)
            resident.append(resident_fraction(store))
            cold[name].append(timed(routes[name]))
    result["hot_seconds"] = {k: statistics.median(v) for k, v in hot.items()}
    result["cold_seconds"] = {k: statistics.median(v) for k, v in cold.items()}
    result["resident_after_drop"] = None if None in resident else max(r for r in resident if r is not None)
    result["matmul_gflops"] = rate / 1e9
    for q, name in ((1, "scan 1"), (32, "scan 32")):
        result[f"rate_of_matmul_{q}"] = operations(q) * len(index) * q / result["hot_seconds"][name] / rate
    result["stream_rate_of_read"] = statistics.median(a / b for a, b in zip(hot["read"], hot["stream"], strict=True))
    result["cold_scan_over_read"] = statistics.median(a / b for a, b in zip(cold["scan 1"], cold["read"], strict=True))

    scale = len(index) / limit
    for q, queries in ((1, one), (32, many)):
        seconds, difference = published_way(index, queries, limit)
        result[f"published_{q}"] = {
            "seconds_scaled": seconds * scale,
            "measured_rows": limit,
            "times_slower": seconds * scale / result["hot_seconds"][f"scan {q}"],
            "difference": difference,
        }
    path = dense_store(index, folder, limit)
    flat = [torch.cat([g[name].flatten(1) for name in index.layers], dim=1) for g in (one, many)]
    width = flat[0].shape[1]
    result["dense"] = {
        "bytes_per_row": 2 * width,
        "times_more_bytes": 2 * width / store.layout.row_bytes,
        "measured_rows": limit,
        **{
            f"seconds_scaled_{q}": median_seconds(lambda q=q, f=f: score_dense(path, f, 256), 3) * scale
            for q, f in ((1, flat[0]), (32, flat[1]))
        },
    }
    return result


def main() -> None:
    parsed = arguments(__doc__ or "", n={"type": int, "default": 50_000}, curvature_rank={"type": int, "default": 512})
    n, steps, limit, repeats = parsed.n, 100, 4096, 5
    rank_r = parsed.curvature_rank
    folder = CACHE / "scan_cost"
    if parsed.smoke:
        n, steps, limit, repeats, rank_r, folder = 300, 3, 256, 1, 32, CACHE / "smoke" / "scan_cost"
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    # Captured once at c = 4; c = 1 are the leading pairs of it, which factors keep in falling order.
    four = built(folder, n, 4, rank_r, steps)
    indexes = [cut(four, folder / f"c1-n{n}", 1), four]
    for index in indexes:
        results.append(measure(index, n, folder, limit, repeats))
    rows = [["figure", "expected", *(f"c={r['rank']}" for r in results)]]

    def row(name: str, expected: str, value: Any, form: str = "{:.2f}") -> None:
        rows.append([name, expected, *(form.format(value(r)) for r in results)])

    row("bytes per example", "", lambda r: r["bytes_per_row"], "{:,}")
    row("scan, 1 query, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["scan 1"], "{:.0f}")
    row("scan, 32 queries, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["scan 32"], "{:.0f}")
    row("(a) reading the bytes, hot, ms", "", lambda r: 1e3 * r["hot_seconds"]["read"], "{:.0f}")
    row("streaming / preadv rate, hot", ">= 0.8", lambda r: r["stream_rate_of_read"])
    row("cold scan / cold read, 1 query", "<= 1.5", lambda r: r["cold_scan_over_read"])
    row("resident after dropping, most", "0", lambda r: r["resident_after_drop"] or 0.0)
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


def cut(index: Index, path: Path, rank: int) -> Index:
    """The same index at a lower rank: the leading pairs of every factor, with the same curvature."""
    if not (path / "manifest.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        specs = {n: dataclasses.replace(s, rank=rank) for n, s in index.specs.items()}
        layout = RowLayout(specs, index.config.dtype)
        writer = StoreWriter(path, layout, index.config.shard_bytes, [])
        for start, rows in index._reader.store.stream():
            parts = index._reader.layout.unpack(rows)
            kept = {n: type(p)(p.left[:, :rank], p.right[:, :rank]) for n, p in parts.items() if p.right is not None}
            cut_rows = layout.rows(layout.pack(kept).to(layout.torch_dtype), None)
            writer.append(cut_rows, index.ids[start : start + len(rows)])
        writer.flush()
        for name in ("curvature.h5", "projections.h5"):
            shutil.copy(index.path / name, path / name)
        commit_cut(index, path, specs, writer)
    cut_index = Index.open(path)
    cut_index._identity = index._identity
    return cut_index


if __name__ == "__main__":
    main()

"""Claim: the ten or hundred most influential of a million examples in milliseconds, with the recall that was asked for.

One run over indexes of real gradients at several sizes and ranks: recall against the same index's exact scores on
queries that calibration never saw (held-out files, and prose as a shifted source), latency of single queries hot and
cold beside the exact scan, batches, the coarse stage alone at ten million, a FAISS flat index over full gradients and
the published scorer.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import CACHE, ROOT, arguments, keep, table, timed
from bench.methods import gathered, shaped
from bench.scale_data import FOLDER, Dense, gradients, trained_model, windows
from bench.scale_index import FULL_RANK, derived, eigen_index, full_index, shorter
from bench.scan_cost import drop, published_way, read_raw, resident_fraction
from lorif_index import Index
from lorif_index.config import EIGEN_CODES
from lorif_index.curvature.inverse import transform
from lorif_index.search.coarse import Coarse, load_faiss
from lorif_index.search.planner import choose_plan
from lorif_index.search.scoring import TopK, stream_scores

TARGETS, KS, DAMPINGS = (0.9, 0.95, 0.99), (1, 10, 100), (0.01, 0.03, 0.1, 0.3, 1.0)
SIGNS = ("proponents", "opponents")
_ASKED_IN_BATCHES = 128
Gradients = dict[str, torch.Tensor]


def asked(split: str, count: int, steps: int, folder: Path, most: int | None) -> Gradients:
    """Gradients of queries, float32."""
    found = gradients(split, count, steps, folder, most)
    return {name: g.float() for name, g in found.block(0, count).items()}


def asked_of(index: Index, split: str, count: int, steps: int, folder: Path, most: int | None) -> Gradients:
    """The same of the index's own projections, taken from the model."""
    ids = torch.from_numpy(windows(split, folder, most)[:count].astype(np.int64))
    parts = ({"input_ids": part} for part in ids.split(64))
    return shaped(gathered(trained_model(steps, folder, most), parts, index.config, index), index.specs)


def some(queries: Gradients, start: int, stop: int) -> Gradients:
    return {name: g[start:stop] for name, g in queries.items()}


def answers(index: Index, queries: Gradients, most: int, path: Path) -> dict[str, np.ndarray]:
    """Exact answers (q, most) of both signs by one full scan, kept beside the index."""
    count = len(next(iter(queries.values())))
    if path.exists():
        kept = np.load(path, allow_pickle=False)
        if kept["proponents"].shape == (count, most):
            return {name: kept[name] for name in kept.files}
    question = index._questions.prepare(queries, None, index.config.damping, index.layers).question  # type: ignore[arg-type]
    tops = {"proponents": TopK(count, most), "opponents": TopK(count, most, largest=False)}
    for start, scores, _ in stream_scores(index._reader.rows, question):
        for top in tops.values():
            top.update(start, scores)
    found = {sign: index.ids[top.result()[0].numpy()] for sign, top in tops.items()}
    np.savez(path, **found)
    return found


def planned(index: Index, k: int, target: float, sign: str) -> str:
    """What a search that is left to choose does: "candidates" or "scan"."""
    plan = choose_plan(
        index._reader,
        k=k,
        recall=target,
        largest=sign == "proponents",
        rescore=True,
        exact=None,
        all_layers=True,
        damping=index.config.damping,  # type: ignore[arg-type]
    )
    return plan.way


def recalls(
    index: Index, queries: Gradients, truth: dict[str, np.ndarray], targets: Any, ks: Any, sign: str, **options: Any
) -> list[dict[str, Any]]:
    """Achieved and estimated recall of rescored candidates, and milliseconds a query, in batches of 10."""
    count, rows = len(next(iter(queries.values()))), []
    for k in ks:
        for target in targets:
            found, estimated, candidates, began = [], [], [], time.perf_counter()
            for start in range(0, count, 10):
                part = some(queries, start, start + 10)
                hits = index.search(part, k, recall=target, exact=False, opponents=sign == "opponents", **options)
                best = truth[sign][start : start + len(hits), :k]
                found += [np.intersect1d(a, b).size / k for a, b in zip(hits.ids, best, strict=True)]
                estimated += hits.stats.recall_by_query
                candidates += hits.stats.candidates_by_query
            rows.append(
                {
                    "sign": sign,
                    "k": k,
                    "target": target,
                    "queries": count,
                    "recall": float(np.mean(found)),
                    "standard_error": float(np.std(found, ddof=1) / len(found) ** 0.5),
                    "estimated": float(np.mean(estimated)),
                    "planned": planned(index, k, target, sign),
                    "candidates": float(np.mean(candidates)),
                    "candidates_median": float(np.median(candidates)),
                    "ms": 1e3 * (time.perf_counter() - began) / count,
                }
            )
            print(index.path.name, rows[-1], flush=True)
    return rows


def dampings(index: Index, queries: Gradients) -> list[dict[str, Any]]:
    """Other dampings than the sketch's: recall of the ten best as achieved and as estimated."""
    rows = []
    for multiple in DAMPINGS:
        scores = index.scores(queries, damping=multiple)
        truth = {"proponents": index.ids[np.argsort(-scores, axis=1, kind="stable")[:, :10]]}
        (row,) = recalls(index, queries, truth, TARGETS[-1:], KS[1:2], "proponents", damping=multiple)
        rows.append({"damping": multiple, **row})
    return rows


def latency(index: Index, queries: Gradients, singles: int, repeats: int) -> dict[str, Any]:
    """Medians over single queries, hot and cold, and of exact scans, in milliseconds."""
    one = [some(queries, i, i + 1) for i in range(singles)]
    out: dict[str, Any] = {}
    for k in (10, 100):
        read_raw(index._reader.store)
        out[f"resident_{k}"] = resident_fraction(index._reader.store)
        for query in one[:10]:
            index.search(query, k, exact=False)
        seconds, stages, candidates = [], [], []
        for query in one:
            began = time.perf_counter()
            hits = index.search(query, k, exact=False)
            seconds.append(time.perf_counter() - began)
            stages.append(hits.stats.seconds)
            candidates.append(hits.stats.candidates)
        out[f"hot_ms_{k}"] = 1e3 * statistics.median(seconds)
        out[f"hot_ms_{k}_mean"] = 1e3 * statistics.mean(seconds)
        out[f"hot_ms_{k}_p95"] = 1e3 * float(np.quantile(seconds, 0.95))
        out[f"stages_ms_{k}"] = {s: 1e3 * statistics.median(x[s] for x in stages) for s in stages[0]}
        out[f"candidates_{k}"] = statistics.median(candidates)
    read_raw(index._reader.store)
    index.search(one[0], 10, exact=True)
    out["scan_hot_ms"] = 1e3 * statistics.median(
        timed(lambda i=i: index.search(one[i], 10, exact=True)) for i in range(repeats)
    )
    cold = []
    for query in one[: max(singles // 4, 2)]:
        drop(index._reader.store)
        cold.append(timed(lambda query=query: index.search(query, 10, exact=False)))
    out["resident_after_drop"] = 0.0
    scans = []
    for i in range(max(repeats // 2, 1)):
        drop(index._reader.store)
        out["resident_after_drop"] = resident_fraction(index._reader.store)
        scans.append(timed(lambda i=i: index.search(one[i], 10, exact=True)))
    out["cold_ms_10"], out["scan_cold_ms"] = 1e3 * statistics.median(cold), 1e3 * statistics.median(scans)
    out["scan_over_hot"] = out["scan_hot_ms"] / out["hot_ms_10"]
    out["scan_over_cold"] = out["scan_cold_ms"] / out["cold_ms_10"]
    return out


def batches(index: Index, queries: Gradients, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Mean milliseconds a query of the same queries, asked one by one and together. (Some take many times longer than
    most: a median of single ones would say nothing about batches.)"""
    rows, count = [], len(next(iter(queries.values())))
    for size in sizes:
        if size > count:
            break
        asked = min(count, max(size, _ASKED_IN_BATCHES)) // size * size
        seconds = sum(
            timed(lambda i=i, n=size: index.search(some(queries, i, i + n), 10, exact=False))
            for i in range(0, asked, size)
        )
        rows.append({"batch": size, "queries": asked, "ms_per_query": 1e3 * seconds / asked})
    return rows


def flat_peer(index: Index, dense: Dense, queries: Gradients, singles: int) -> dict[str, Any]:
    """A FAISS flat index over full projected gradients in half precision, asked with the transformed query."""
    faiss = load_faiss()
    count = len(index)
    peer = faiss.IndexScalarQuantizer(dense.width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    rows = dense.array()
    for start in range(0, count, 4096):
        peer.add(rows[start : min(start + 4096, count)].astype(np.float32))
    pre = index._reader.preconditioners(index.layers, index.config.damping)  # type: ignore[arg-type]
    asked = transform(queries, pre)
    flat = torch.cat([asked[name].flatten(1) for name in index.layers], dim=1).numpy()
    peer.search(flat[:1], 10)
    one = statistics.median(timed(lambda i=i: peer.search(flat[i : i + 1], 10)) for i in range(singles))
    many = timed(lambda: peer.search(flat[:32], 10)) / min(32, len(flat))
    return {"rows": count, "bytes": 2 * dense.width, "ms": 1e3 * one, "ms_of_32": 1e3 * many}


def made_up(rng: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Coordinates whose norms differ, as real ones' do."""
    norms = np.exp(0.3 * rng.standard_normal((count, 1), dtype=np.float32))
    return rng.standard_normal((count, dim), dtype=np.float32) * norms


def synthetic(count: int, dim: int, factory: str) -> dict[str, Any]:
    """The coarse stage alone over made-up sketches."""
    rng = np.random.default_rng(0)
    coarse = Coarse.train(factory, made_up(rng, 20_000, dim))
    began = time.perf_counter()
    for start in range(0, count, 100_000):
        coarse.add(made_up(rng, min(100_000, count - start), dim))
    adding = time.perf_counter() - began
    x = rng.standard_normal((40, dim), dtype=np.float32)
    out: dict[str, Any] = {"count": count, "adding_seconds": adding}
    for most in (100, 4000, 20_000):
        coarse.search(x[:1], most)
        ms = 1e3 * statistics.median(timed(lambda i=i, m=most: coarse.search(x[i : i + 1], m)) for i in range(20))
        out[f"ms_{most}"] = ms
    out["ms_each_of_32"] = 1e3 * timed(lambda: coarse.search(x[:32], 100)) / 32
    out["ns_per_vector"] = 1e6 * out["ms_100"] / count
    return out


def exponent(xs: list[float], ys: list[float]) -> float:
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        sizes={"type": int, "nargs": "+", "default": [20_000, 100_000, 300_000, 1_000_000]},
        queries={"type": int, "default": 100},
        synthetic={"type": int, "default": 10_000_000},
        steps={"type": int, "default": 2000},
        first={
            "type": int,
            "default": 0,
            "help": "the first query of each source: others than settings were chosen by",
        },
        recall_only={"action": "store_true", "help": "recall at every size and no times; kept apart"},
        eigen={
            "nargs": "?",
            "const": "levels",
            "choices": EIGEN_CODES,
            "help": "indexes of eigencodes, the default rows, or of another eigen_code; kept apart",
        },
    )
    first, folder, most, steps, sizes, count, fake = (
        parsed.first, FOLDER, None, parsed.steps, sorted(parsed.sizes), parsed.queries, parsed.synthetic,
    )  # fmt: skip
    peer_rows, published_rows, singles, repeats, settings = 100_000, 20_000, 100, 5, {}
    if parsed.smoke:
        folder, most, steps, sizes, count, fake = CACHE / "smoke" / "scale", 60, 3, [1200, 2500], 20, 5000
        peer_rows, published_rows, singles, repeats = 1200, 256, 4, 1
        settings = {"curvature_rank": 32, "sketch_dim": 64, "curvature_sample": 600, "calibration_queries": 8}
        shutil.rmtree(folder, ignore_errors=True)
    queries: dict[str, Gradients] = {}
    result: dict[str, Any] = {"sizes": sizes, "queries": count, "indexes": []}

    def examine(index: Index, n: int, rank: int | str) -> None:
        entry: dict[str, Any] = {
            "n": n,
            "rank": rank,
            "row_bytes": index.bytes_per_example,
            "coarse": index.coarse,
            "build": index.build_report["seconds"],
        }
        last = n == sizes[-1]
        for source in SOURCES:
            mine = some(queries[source], first, first + count)
            truth = answers(index, mine, 100, index.path / f"answers-{source}-{first}.npz")
            targets, ks = (TARGETS, KS) if last else (TARGETS[-1:], KS[1:])
            entry[f"recall_{source}"] = [r for s in SIGNS for r in recalls(index, mine, truth, targets, ks, s)]
        if not parsed.recall_only:
            entry |= latency(index, queries["held-out"], min(singles, count), repeats)
            if last:
                entry["batches"] = batches(index, queries["held-out"], (1, 4, 16, 32, 64, 128, 256, 512, 1000))
        result["indexes"].append(entry)
        print(f"n={n:,} {rank}: done", flush=True)

    asking = (count if most else 1000, steps, folder, most)
    if parsed.eigen:
        whole = eigen_index(sizes[-1], steps, folder, most, settings | {"eigen_code": parsed.eigen})
        queries |= {s: asked_of(whole, s, *asking) for s in SOURCES}
        for n in sizes:
            examine(shorter(whole, n), n, parsed.eigen)
        show_recall(result)
        if not parsed.recall_only:
            show_times(result)
        keep(f"eigen_at_scale_{parsed.eigen}", result | {"first": first}, parsed)
        return
    queries |= {s: asked(s, *asking) for s in SOURCES}
    whole = full_index(sizes[-1], steps, folder, most, settings)
    for n in sizes:
        for rank in (1, FULL_RANK):
            examine(derived(whole, rank, n), n, rank)
    if parsed.recall_only:
        show_recall(result)
        keep("recall_at_scale", result | {"first": first}, parsed)
        return
    middle = derived(whole, 1, min(sizes, key=lambda n: abs(n - peer_rows)))
    result["dampings"] = dampings(middle, some(queries["held-out"], 0, count))
    dense = gradients("train", len(middle), steps, folder, most)
    result["flat"] = flat_peer(middle, dense, queries["held-out"], 10)
    ours = next(e for e in result["indexes"] if e["n"] == len(middle) and e["rank"] == 1)
    seconds, _ = published_way(middle, some(queries["held-out"], 0, 1), published_rows)
    result["published"] = {"rows": published_rows, "ms_scaled": 1e3 * seconds * len(middle) / published_rows}
    result["ours_there"] = {"n": len(middle), "bytes": ours["row_bytes"] + 130, "ms": ours["hot_ms_10"]}
    coarse = whole.coarse
    if coarse is None:
        raise RuntimeError("the index was built without faiss")
    for rank in (1, FULL_RANK):
        mine = [e for e in result["indexes"] if e["rank"] == rank]
        ns = [e["n"] for e in mine]
        result[f"growth_c{rank}"] = {
            "latency": exponent(ns, [e["hot_ms_10"] for e in mine]),
            "without_coarse": exponent(ns, [e["hot_ms_10"] - e["stages_ms_10"]["coarse"] for e in mine]),
            "candidates_100": exponent(ns, [e["candidates_100"] for e in mine]),
        }
    keep("search_at_scale", result, parsed)
    result["synthetic"] = synthetic(fake, coarse["dim"], coarse["factory"])
    show(result)
    keep("search_at_scale", result, parsed)
    if not parsed.smoke:
        plots(result, ROOT / "docs")


SOURCES = ("held-out", "shifted")


def show_times(result: dict[str, Any]) -> None:
    rows = [["n", "c", "bytes", "recall@10", "@100", "hot ms", "scan ms", "x", "cold ms", "cold scan", "x", "rescored"]]
    for e in result["indexes"]:
        at = {r["k"]: r["recall"] for r in e["recall_held-out"] if r["target"] == 0.99 and r["sign"] == "proponents"}
        rows.append(
            [
                f"{e['n']:,}",
                str(e["rank"]),
                str(e["row_bytes"]),
                f"{at[10]:.4f}",
                f"{at[100]:.4f}",
                f"{e['hot_ms_10']:.1f}",
                f"{e['scan_hot_ms']:.0f}",
                f"{e['scan_over_hot']:.0f}",
                f"{e['cold_ms_10']:.1f}",
                f"{e['scan_cold_ms']:.0f}",
                f"{e['scan_over_cold']:.0f}",
                f"{e['candidates_10']:.0f} / {e['candidates_100']:.0f}",
            ]
        )
    table(rows)
    show_recall(result)
    for e in result["indexes"]:
        for b in e.get("batches", []):
            print(f"n={e['n']:,} c={e['rank']} batch {b['batch']}: {b['ms_per_query']:.2f} ms a query")


def show(result: dict[str, Any]) -> None:
    show_times(result)
    for r in result["dampings"]:
        found = f"{r['recall']:.4f} (estimated {r['estimated']:.4f})"
        print(f"damping {r['damping']}: {found}, {r['candidates']:.0f} rescored")
    for name in ("flat", "published", "ours_there", "synthetic", "growth_c1", "growth_c4"):
        print(name, result[name])


def show_recall(result: dict[str, Any]) -> None:
    for e in result["indexes"]:
        for source in SOURCES:
            for r in e[f"recall_{source}"]:
                print(
                    f"n={e['n']:,} c={e['rank']} {source} {r['sign']} k={r['k']} asked {r['target']}: "
                    f"{r['recall']:.4f} (estimated {r['estimated']:.4f}), {r['candidates']:.0f} rescored, "
                    f"{r['ms']:.1f} ms; by itself: {r['planned']}"
                )


def plots(result: dict[str, Any], folder: Path) -> None:
    """Candidates and latency against N, as SVG."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install matplotlib")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "svg.hashsalt": "lorif"})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
    last = [e for e in result["indexes"] if "batches" in e]
    for e in last:
        for k, marker in ((10, "o"), (100, "s")):
            mine = [r for r in e["recall_held-out"] if r["k"] == k and r["sign"] == "proponents"]
            axes[0].plot([r["candidates"] for r in mine], [r["recall"] for r in mine], marker=marker,
                         label=f"c={e['rank']}, k={k}")  # fmt: skip
    axes[0].set(xscale="log", xlabel="rows rescored", ylabel="recall", title=f"N = {last[0]['n']:,}")
    for rank, style in ((1, "-"), (FULL_RANK, "--")):
        mine = [e for e in result["indexes"] if e["rank"] == rank]
        ns = [e["n"] for e in mine]
        axes[1].plot(ns, [e["hot_ms_10"] for e in mine], f"o{style}", label=f"search, c={rank}")
        axes[1].plot(ns, [e["scan_hot_ms"] for e in mine], f"s{style}", label=f"scan, c={rank}")
    axes[1].set(xscale="log", yscale="log", xlabel="N", ylabel="ms, one query, warm")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "search_at_scale.svg", metadata={"Date": None})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3))
    for rank in (1, FULL_RANK):
        mine = [e for e in result["indexes"] if e["rank"] == rank]
        ns, ts = [e["n"] for e in mine], [e["candidates_100"] for e in mine]
        slope = exponent(ns, ts)
        (points,) = axes[0].plot(ns, ts, "o", label=f"c={rank}: N^{slope:.2f}")
        middle = np.exp(np.mean(np.log(ts)) - slope * np.mean(np.log(ns)))
        axes[0].plot(ns, [middle * n**slope for n in ns], "-", color=points.get_color())
    axes[0].set(xscale="log", yscale="log", xlabel="N", ylabel="rows rescored for .99, k=100")
    for e in last:
        sizes, rates = [b["batch"] for b in e["batches"]], [1e3 / b["ms_per_query"] for b in e["batches"]]
        axes[1].plot(sizes, rates, "o-", label=f"c={e['rank']}")
    axes[1].set(xscale="log", xlabel="queries together", ylabel="queries per second", title=f"N = {last[0]['n']:,}")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(folder / "candidates_at_scale.svg", metadata={"Date": None})
    print(f"plots in {os.path.relpath(folder, ROOT)}")


if __name__ == "__main__":
    main()

"""Claim: the ten or hundred most influential of a million examples in milliseconds, with the recall that was asked for.

A small GPT over the sources of all installed packages: documents are files, windows of 32 words do not overlap,
duplicates are dropped. Whole files are held out for questions, and the packages' prose (licences, readmes, metadata)
gives questions from another distribution. One index of the largest size is built of the model, and smaller ones are its
first rows with a coarse index and a calibration of their own. Measured are recall against the same index's exact
answers, on questions that calibration never saw; single questions hot and cold beside the exact scan; batches; other
dampings; FAISS alone at ten million codes and over full gradients. `bench.plots` draws it.
"""

from __future__ import annotations

import collections
import hashlib
import shutil
import site
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.corpus import descend, gpt, once_trained, tokens
from bench.environment import (
    CACHE,
    arguments,
    drop_files,
    keep,
    median_seconds,
    read_files,
    resident_fraction,
    shards,
    table,
    timed,
)  # fmt: skip
from bench.methods import NO_HEAD, gathered, shaped
from lorif_index import BuildConfig, CoarseIndex, Index, default_loss

LENGTH, VOCABULARY = 32, 2000
TARGETS, KS, DAMPINGS = (0.9, 0.95, 0.99), (1, 10, 100), (0.01, 0.03, 0.1, 0.3, 1.0)
SOURCES = ("held-out", "shifted")
SIGNS = ("proponents", "opponents")
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512, 1000)
STORES: dict[str, dict[str, Any]] = {
    "eigen": {"store": "eigen"},
    # As published: a head's factors would be as long as its words are many.
    "factors": {"store": "factors", "projection_dim": 32, "layers": NO_HEAD},
}
_CODE = ("*.py",)
_PROSE = ("METADATA", "LICENSE*", "*.md", "*.rst", "NOTICE*", "*.txt")
_FOLDER = CACHE / "scale"
_SMOKE = {"curvature_rank": 32, "sample": 600, "coarse": CoarseIndex(kind="pq", dim=64, queries=8), "eigen_bytes": 200}
Gradients = dict[str, torch.Tensor]


# -- text, model and indexes ---------------------------------------------------------------------------------------


class Corpus:
    """Windows of text, the model that was trained on them, and indexes of it; all kept in a folder.

    Args:
        steps: of the model's training.
        smoke: a few files, a few steps, and a folder that begins empty.
    """

    def __init__(self, steps: int, smoke: bool) -> None:
        self.smoke = smoke
        self.folder = CACHE / "smoke" / "scale" if smoke else _FOLDER
        if smoke:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"model-{steps}.npz"
        self.model, _ = once_trained(path, gpt(vocabulary=VOCABULARY, length=LENGTH), lambda m: self._train(m, steps))

    def windows(self, split: str, count: int) -> dict[str, torch.Tensor]:
        """`input_ids` (count, 32) of a split ("train", "held-out" or "shifted"), shuffled over files.

        Raises:
            ValueError: the installed packages have fewer.
        """
        path = self.folder / f"windows-{split}.npy"
        if not path.exists():
            for name, array in self._read_everything().items():
                np.save(self.folder / f"windows-{name}.npy", array, allow_pickle=False)
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(found) < count:
            raise ValueError(f"{count} windows of {split!r} were asked for, the installed packages have {len(found)}")
        return {"input_ids": torch.from_numpy(found[:count].astype(np.int64))}

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        roots = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
        if self.smoke:
            # A tiny run does not walk through everything.
            here = {"METADATA": "*.dist-info/METADATA"}
            found = sorted({path for root in roots for name in patterns for path in root.glob(here.get(name, name))})
            return found[:: max(len(found) // 60, 1)][:60]
        # A virtual environment's standard library lies elsewhere than its packages; one may contain the other.
        return sorted({path for root in roots for name in patterns for path in root.rglob(name) if path.is_file()})

    def _read_everything(self) -> dict[str, np.ndarray]:
        code, prose = self._files(_CODE), self._files(_PROSE)

        def words(path: Path) -> list[str]:
            return tokens(path.read_text(encoding="utf-8", errors="ignore"))

        counts: collections.Counter[str] = collections.Counter()
        # Every fourth file is plenty for counting words.
        for path in code if self.smoke else code[::4]:
            counts.update(words(path))
        number = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *SOURCES)}
        for path in [*code, *prose]:
            ids = np.array([number.get(word, 0) for word in words(path)], dtype=np.int16)
            apart = hashlib.sha256(path.name.encode()).digest()[0] < (60 if self.smoke else 5)
            name = ("held-out" if apart else "train") if path.suffix == ".py" else "shifted"
            parts[name].append(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))
        out: dict[str, np.ndarray] = {}
        known: set[bytes] = set()
        for name, found in parts.items():
            unique = np.unique(np.concatenate(found), axis=0)
            # Windows that are mostly rare words say nothing; questions are not to be among what was trained on.
            fresh = [(row == 0).mean() < 0.5 and row.tobytes() not in known for row in unique]
            unique = unique[fresh]
            if name == "train":
                known = {row.tobytes() for row in unique}
            out[name] = unique[np.random.default_rng(0).permutation(len(unique))]
        return out

    def _train(self, model: Any, steps: int) -> None:
        self.windows("train", 1)
        ids = np.load(self.folder / "windows-train.npy", mmap_mode="r", allow_pickle=False)
        rng = np.random.default_rng(0)
        chosen = (np.sort(rng.integers(len(ids), size=64)) for _ in range(steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

        def loss(rows: np.ndarray) -> torch.Tensor:
            return default_loss(model, {"input_ids": torch.from_numpy(ids[rows].astype(np.int64))}).mean() / (
                LENGTH - 1
            )

        descend(model, optimizer, chosen, loss, schedule)

    def index(self, store: str, count: int) -> Index:
        """The index of the first `count` training windows; an interrupted build is gone on with."""
        path = self.folder / f"{store}-{count}"
        if not (path / "manifest.json").exists():
            config = BuildConfig(**STORES[store], **(_SMOKE if self.smoke else {}))
            data = self.windows("train", count)
            Index.build(path, model=self.model, data=data, config=config, progress=False).close()
        return Index.open(path)

    def questions(self, index: Index, source: str, count: int) -> Gradients:
        """Gradients of held-out windows, (count, d_in, d_out) float32 a layer, in the index's projections."""
        ids = self.windows(source, count)["input_ids"]
        parts = ({"input_ids": part} for part in ids.split(64))
        return shaped(gathered(self.model, parts, index.config, index), index.specs)


def first_rows(whole: Index, count: int) -> Index:
    """The index of the first `count` rows as they are, with a coarse index and a calibration of its own."""
    if count == len(whole):
        return whole
    path = whole.path.with_name(f"{whole.path.name}-first-{count}")
    if not path.exists():
        partial = path.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(whole.path, partial)
        with Index.open(partial) as index:
            index.remove(index.ids[count:])
            index.compact(progress=False)
            index.rebuild_coarse(progress=False)
        partial.rename(path)
    return Index.open(path)


# -- what is measured ----------------------------------------------------------------------------------------------


def some(queries: Gradients, start: int, stop: int) -> Gradients:
    return {name: g[start:stop] for name, g in queries.items()}


def answers(index: Index, queries: Gradients, most: int, path: Path) -> dict[str, np.ndarray]:
    """Exact answers (q, most) of both signs by full scans, kept beside the index."""
    if not path.exists():
        found = {s: index.search(queries, most, exact=True, opponents=s == "opponents").ids for s in SIGNS}
        np.savez(path, **found)
    with np.load(path, allow_pickle=False) as file:
        return {sign: file[sign] for sign in SIGNS}


def recalls(
    index: Index, queries: Gradients, truth: dict[str, np.ndarray], targets: Any, ks: Any, sign: str, **options: Any
) -> list[dict[str, Any]]:
    """Achieved and estimated recall of rescored candidates, and milliseconds a query, in batches of 10."""
    count, rows = len(next(iter(queries.values()))), []
    options |= {"opponents": sign == "opponents"}
    for k in ks:
        for target in targets:
            found, estimated, candidates, began = [], [], [], time.perf_counter()
            for start in range(0, count, 10):
                hits = index.search(some(queries, start, start + 10), k, recall=target, exact=False, **options)
                best = truth[sign][start : start + len(hits), :k]
                found += [np.intersect1d(a, b).size / k for a, b in zip(hits.ids, best, strict=True)]
                estimated += hits.stats.recall_by_query
                candidates += hits.stats.candidates_by_query
            ms = 1e3 * (time.perf_counter() - began) / count
            left_to_choose = index.search(some(queries, 0, 1), k, recall=target, **options).stats
            rows.append(
                {
                    "sign": sign,
                    "k": k,
                    "target": target,
                    "queries": count,
                    "recall": float(np.mean(found)),
                    "standard_error": float(np.std(found, ddof=1) / len(found) ** 0.5),
                    "estimated": float(np.mean(estimated)),
                    "planned": "scan" if left_to_choose.exact else "candidates",
                    "candidates": float(np.mean(candidates)),
                    "candidates_median": float(np.median(candidates)),
                    "ms": ms,
                }
            )
            print(index.path.name, rows[-1], flush=True)
    return rows


def dampings(index: Index, queries: Gradients) -> list[dict[str, Any]]:
    """Other dampings than the sketch's: recall of the ten best as achieved and as estimated."""
    rows = []
    for multiple in DAMPINGS:
        truth = {"proponents": index.search(queries, 10, exact=True, damping=multiple).ids}
        (row,) = recalls(index, queries, truth, TARGETS[-1:], KS[1:2], "proponents", damping=multiple)
        rows.append({"damping": multiple, **row})
    return rows


def latency(index: Index, queries: Gradients, singles: int, repeats: int) -> dict[str, Any]:
    """Medians over single queries, hot and cold, and of exact scans, in milliseconds."""
    one = [some(queries, i, i + 1) for i in range(singles)]
    files = shards(index.path)
    out: dict[str, Any] = {}
    for k in (10, 100):
        read_files(files)
        out[f"resident_{k}"] = resident_fraction(files)
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
    read_files(files)
    index.search(one[0], 10, exact=True)
    hot, read = [], []
    for query in one[:repeats]:
        hot.append(timed(lambda query=query: index.search(query, 10, exact=True)))
        read.append(timed(lambda: read_files(files)))
    cold, scans = [], []
    for query in one[: max(singles // 4, 2)]:
        drop_files(files)
        cold.append(timed(lambda query=query: index.search(query, 10, exact=False)))
    for query in one[: max(repeats // 2, 1)]:
        drop_files(files)
        out["resident_after_drop"] = resident_fraction(files)
        scans.append(timed(lambda query=query: index.search(query, 10, exact=True)))
    measured = {"scan_hot_ms": hot, "read_hot_ms": read, "cold_ms_10": cold, "scan_cold_ms": scans}
    out |= {name: 1e3 * statistics.median(values) for name, values in measured.items()}
    out["scan_over_reading"] = out["scan_hot_ms"] / out["read_hot_ms"]
    out["scan_over_hot"] = out["scan_hot_ms"] / out["hot_ms_10"]
    out["scan_over_cold"] = out["scan_cold_ms"] / out["cold_ms_10"]
    return out


def together(index: Index, queries: Gradients) -> list[dict[str, float]]:
    """Mean milliseconds a query of the same queries, asked one by one and together. (Some take many times longer than
    most: a median of single ones would say nothing about batches.)"""
    rows, count = [], len(next(iter(queries.values())))
    for size in BATCHES:
        if size > count:
            break
        asked = min(count, max(size, 128)) // size * size
        parts = [some(queries, start, start + size) for start in range(0, asked, size)]
        seconds = sum(timed(lambda part=part: index.search(part, 10, exact=False)) for part in parts)
        rows.append({"batch": size, "queries": asked, "ms_per_query": 1e3 * seconds / asked})
    return rows


def flat_peer(index: Index, queries: Gradients, count: int) -> dict[str, Any]:
    """A FAISS flat index over the rows' whole gradients in half precision; a question is any vector of that width."""
    import faiss

    flat = torch.cat([g.flatten(1) for g in queries.values()], dim=1).numpy()
    width = flat.shape[1]
    peer = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for start in range(0, count, 1024):
        rows = index.gradients(index.ids[start : min(start + 1024, count)])
        peer.add(torch.cat([g.flatten(1) for g in rows.values()], dim=1).numpy())
    one = median_seconds(lambda: peer.search(flat[:1], 10), 10)
    many = timed(lambda: peer.search(flat[:32], 10)) / min(32, len(flat))
    return {"rows": count, "bytes": 2 * width, "ms": 1e3 * one, "ms_of_32": 1e3 * many}


def synthetic(count: int, dim: int) -> dict[str, Any]:
    """FAISS's 4-bit product quantiser alone, two dimensions a code, over made-up coordinates of differing norms."""
    import faiss

    rng = np.random.default_rng(0)

    def made_up(rows: int) -> np.ndarray:
        norms = np.exp(0.3 * rng.standard_normal((rows, 1), dtype=np.float32))
        return rng.standard_normal((rows, dim), dtype=np.float32) * norms

    coarse = faiss.IndexPQFastScan(dim, dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    coarse.train(made_up(20_000))
    began = time.perf_counter()
    for start in range(0, count, 100_000):
        coarse.add(made_up(min(100_000, count - start)))
    out: dict[str, Any] = {"count": count, "adding_seconds": time.perf_counter() - began}
    x = rng.standard_normal((32, dim), dtype=np.float32)
    for most in (100, 4000, 20_000):
        out[f"ms_{most}"] = 1e3 * median_seconds(lambda most=most: coarse.search(x[:1], most), 20)
    out["ms_each_of_32"] = 1e3 * timed(lambda: coarse.search(x, 100)) / 32
    out["ns_per_vector"] = 1e6 * out["ms_100"] / count
    return out


# -- the command ---------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    rows = [["n", "bytes", "recall@10", "@100", "hot ms", "scan ms", "x", "cold ms", "cold scan", "x", "rescored"]]
    for e in (e for e in result["indexes"] if "hot_ms_10" in e):
        at = {r["k"]: r["recall"] for r in e["recall_held-out"] if r["target"] == 0.99 and r["sign"] == "proponents"}
        rows.append(
            [f"{e['n']:,}", str(e["row_bytes"]), f"{at[10]:.4f}", f"{at[100]:.4f}", f"{e['hot_ms_10']:.1f}"]
            + [f"{e['scan_hot_ms']:.0f}", f"{e['scan_over_hot']:.0f}", f"{e['cold_ms_10']:.1f}"]
            + [f"{e['scan_cold_ms']:.0f}", f"{e['scan_over_cold']:.0f}"]
            + [f"{e['candidates_10']:.0f} / {e['candidates_100']:.0f}"]
        )
    table(rows)
    rows = [["n", "questions", "k", "asked", "recall", "estimated", "rescored", "ms", "by itself"]]
    for e in result["indexes"]:
        for source in SOURCES:
            for r in e[f"recall_{source}"]:
                rows.append(
                    [f"{e['n']:,}", f"{source}, {r['sign']}", str(r["k"]), str(r["target"]), f"{r['recall']:.4f}"]
                    + [f"{r['estimated']:.4f}", f"{r['candidates']:.0f}", f"{r['ms']:.1f}", r["planned"]]
                )
    table(rows)
    for b in result["indexes"][-1].get("batches", []):
        print(f"batch {b['batch']}: {b['ms_per_query']:.2f} ms a query")
    for r in result.get("dampings", []):
        found = f"{r['recall']:.4f} (estimated {r['estimated']:.4f})"
        print(f"damping {r['damping']}: {found}, {r['candidates']:.0f} rescored")
    for name in ("flat", "synthetic"):
        print(name, result.get(name))


def main() -> None:
    parsed = arguments(
        __doc__,
        store={"default": "eigen", "choices": sorted(STORES), "help": "what rows hold; each keeps a result of its own"},
        sizes={"type": int, "nargs": "+", "default": [20_000, 100_000, 300_000, 1_000_000]},
        queries={"type": int, "default": 100},
        synthetic={"type": int, "default": 10_000_000, "help": "codes that FAISS alone scans"},
        steps={"type": int, "default": 2000, "help": "of the model's training"},
        first={"type": int, "default": 0, "help": "the first query: others than settings were chosen by"},
        recall_only={"action": "store_true", "help": "recall at every size and no times; kept apart"},
    )
    sizes, count, steps, fake = sorted(parsed.sizes), parsed.queries, parsed.steps, parsed.synthetic
    singles, repeats, asked = 100, 5, 1000
    if parsed.smoke:
        sizes, count, steps, fake = [1200, 1500], 10, 3, 5000
        singles, repeats, asked = 4, 1, 20
    corpus = Corpus(steps, parsed.smoke)
    whole = corpus.index(parsed.store, sizes[-1])
    queries = {source: corpus.questions(whole, source, asked) for source in SOURCES}
    held_out = queries["held-out"]
    result: dict[str, Any] = {"sizes": sizes, "queries": count, "first": parsed.first, "indexes": []}
    for n in sizes:
        index, last = first_rows(whole, n), n == sizes[-1]
        entry: dict[str, Any] = {
            "n": n,
            "store": parsed.store,
            "row_bytes": index.bytes_per_example,
            "coarse": index.coarse,
            "build": index.build_report["seconds"],
        }
        targets, ks = (TARGETS, KS) if last else (TARGETS[-1:], KS[1:])
        for source, every in queries.items():
            mine = some(every, parsed.first, parsed.first + count)
            truth = answers(index, mine, 100, index.path.with_suffix(f".{source}-{parsed.first}-{count}.npz"))
            entry[f"recall_{source}"] = [r for s in SIGNS for r in recalls(index, mine, truth, targets, ks, s)]
        if not parsed.recall_only:
            entry |= latency(index, held_out, singles, repeats)
            if last:
                entry["batches"] = together(index, held_out)
        result["indexes"].append(entry)
        print(f"n={n:,} {parsed.store}: done", flush=True)
    if not parsed.recall_only:
        middle = first_rows(whole, min(sizes, key=lambda n: abs(n - 100_000)))
        result["dampings"] = dampings(middle, some(held_out, 0, count))
        if parsed.store == "factors":
            result["flat"] = flat_peer(middle, held_out, len(middle))
        result["synthetic"] = synthetic(fake, 256)
    show(result)
    part = f"{parsed.store}{'_recall' if parsed.recall_only else ''}"
    keep("search_at_scale", result, parsed, part)


if __name__ == "__main__":
    main()

"""Claim: a GPU gives the CPU's answers, and no part leaves most of it idle.

Answers of indexes that were built and searched on either; a default index's searches by rows, whole gradients and
refined questions, with the model on either; capture beside a plain forward and backward pass; the curvature's products
beside a large matrix product; searches over a million and ten million sketches; bytes from disk to scores, of rows in
levels and of their largest coordinates. On a machine without a GPU it says so and ends with code 2; `--device cpu
--smoke` runs every part, tiny, on the CPU, which shows that the code runs and nothing else.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.corpus import gpt
from bench.costs import BATCH, capture, plain
from bench.environment import arguments, drop_files, keep, read_files, shards, table, timed
from bench.methods import WAYS, only, unrounded
from lorif_index import BuildConfig, CoarseIndex, Index
from lorif_index.codecs.bits import SCALE_BYTES
from lorif_index.errors import ConfigError
from lorif_index.linalg.subspace import SubspaceFit
from lorif_index.search.devices import search_device
from lorif_index.search.proposers import FlatSketch

# Of scores, beside the largest, and of ranks: by rounding alone.
_DIFFERENCE, _CORRELATION = 1e-2, 0.98


def seconds(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """The median of some calls with the end of all that they begin on the device, after one that warms up."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    return statistics.median(timed(run) for _ in range(repeats))


def tokens(count: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def agreement(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Indexes of the same model and data, built on the CPU and on the device; and one of them scored on both."""
    count, vocabulary = (160, 50) if smoke else (2000, 1000)
    ids = tokens(count + 8, 16, vocabulary)
    found: dict[str, Any] = {}
    # Rows of the two ways have room for some coordinates of each layer.
    size = 128 if smoke else 400
    for store in ("factors", *WAYS):
        scores, seen = [], {}
        with tempfile.TemporaryDirectory() as place:
            for name in ("cpu", str(device)):
                # The same weights on both, and bases that rounding cannot turn.
                model = gpt(1 if smoke else 4, 16 if smoke else 64, vocabulary=vocabulary, length=16, dropout=False)
                config = BuildConfig(
                    store="eigen" if store in WAYS else store,
                    eigen_bytes=size,
                    projection="random",
                    projection_dim=8,
                    curvature="empirical",
                    sample=count,
                    dtype="float32",
                    coarse=None,
                )
                path = Path(place) / f"{store}-{len(scores)}"
                data, query = {"input_ids": ids[:count]}, {"input_ids": ids[count:]}
                with ExitStack() as held_open:
                    if store in WAYS:
                        held_open.enter_context(only(store))
                    built = Index.build(path, model=model.to(name).eval(), data=data, config=config, progress=False)
                    scores.append(held_open.enter_context(built).scores(query))
            scale = np.abs(scores[0]).max()
            seen["difference"] = float(np.abs(scores[1] - scores[0]).max() / scale)
            seen["correlation"] = float(np.corrcoef(scores[0].ravel(), scores[1].ravel())[0, 1])
            try:
                with Index.open(Path(place) / f"{store}-0", model=model.to("cpu"), device=device) as held:
                    seen["scored there"] = float(np.abs(held.scores(query) - scores[0]).max() / scale)
            except ConfigError as error:
                seen["not scored there"] = str(error)
        found[store] = seen
    return found


def rows_device(device: torch.device) -> torch.device:
    """Where rows are scored: the device where faiss sees it, too; else the CPU."""
    try:
        return search_device(device)
    except ConfigError:
        return torch.device("cpu")


def asking(device: torch.device, smoke: bool, repeats: int) -> dict[str, Any]:
    """Searches of default indexes, built on the CPU, with the model on either: how far scores are apart, of the
    largest, how they correlate, and milliseconds of 8 questions together."""
    count, length, vocabulary, size = (160, 16, 50, 256) if smoke else (4000, 64, 2000, 4096)
    ids = tokens(count + 8, length, vocabulary)
    data, query = {"input_ids": ids[:count]}, {"input_ids": ids[count:]}
    model = gpt(1 if smoke else 4, 16 if smoke else 256, vocabulary=vocabulary, length=length, dropout=False).eval()
    coarse = CoarseIndex(kind="flat", dim=32, queries=4) if smoke else CoarseIndex(kind="pq")
    config, k, most, found = BuildConfig(store="eigen", eigen_bytes=size, coarse=coarse), 20, 100, {}
    for way in WAYS:
        scores: dict[str, list[np.ndarray]] = {}
        times: dict[str, dict[str, float]] = {}
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / way
            with only(way):
                Index.build(path, model=model.to("cpu"), data=data, config=config, progress=False).close()
            for on in (torch.device("cpu"), device):
                there = {"model": model.to(on), "data": data, "device": rows_device(on)}
                with Index.open(path, **there) as index:
                    kinds: dict[str, Callable[[], np.ndarray]] = {
                        "rows": lambda i=index: i.scores(query),
                        "whole gradients": lambda i=index: unrounded(i, query),
                        "refined": lambda i=index: i.scores(query, refine=True),
                        "refined, whole gradients": lambda i=index: unrounded(i, query, refine=True),
                    }
                    for name, function in kinds.items():
                        scores.setdefault(name, []).append(function())
                    searches: dict[str, Callable[[], Any]] = {
                        "scan": lambda i=index: i.search(query, k, exact=True),
                        "candidates": lambda i=index: i.search(query, k, exact=False),
                        "candidates, reranked": lambda i=index: i.search(query, k, exact=False, rerank=most),
                        "refined scan": lambda i=index: i.search(query, k, exact=True, refine=True),
                    }
                    times[str(on)] = {name: 1e3 * seconds(on, f, repeats) for name, f in searches.items()}
        found[way] = {
            "rows on": str(rows_device(device)),
            "ms": times,
            "scores": {
                name: {
                    "difference": float(np.abs(b - a).max() / np.abs(a).max()),
                    "correlation": float(np.corrcoef(a.ravel(), b.ravel())[0, 1]),
                }
                for name, (a, b) in scores.items()
            },
        }
    return found


def capturing(device: torch.device, smoke: bool, repeats: int) -> dict[str, Any]:
    """Seconds an example of a plain pass with parameters' gradients, and of capture."""
    layers, width, length, vocabulary = (1, 16, 16, 50) if smoke else (12, 768, 512, 50_000)
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = gpt(layers, width, vocabulary=vocabulary, length=length, dropout=False)
        model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
        ids = tokens(BATCH * (2 if smoke else 8), length, vocabulary).to(device)
        config = BuildConfig(projection_dim=8 if smoke else 64, projection="random")
        routes: dict[str, Callable[[], None]] = {
            "plain": lambda model=model, ids=ids: plain(model, ids),
            "capture": lambda model=model, ids=ids, config=config: capture(model, ids, config),
        }
        times = {name: seconds(device, function, repeats) for name, function in routes.items()}
        found[dtype] = {name: value / len(ids) for name, value in times.items()}
        found[dtype]["ratio"] = times["capture"] / times["plain"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            routes["capture"]()
            found[dtype]["memory"] = torch.cuda.max_memory_allocated(device)
    return found


def fitting(device: torch.device, smoke: bool, repeats: int) -> dict[str, Any]:
    """Operations a second of a curvature's walk, by blocks of D x r and by dense matrices, beside a matrix product."""
    size, dim, rank, rows = (128, 128, 8, 256) if smoke else (8192, 16_384, 512, 4096)
    square = torch.randn(size, size, device=device)
    rates = {"matmul": 2 * size**3 / seconds(device, lambda: square @ square, repeats)}
    for name, width in (("blocks", dim), ("dense", dim // 4)):
        g = torch.randn(rows, width, device=device)
        fit = SubspaceFit((name,), width, rank, rows, 0, device, whole_up_to=width if name == "dense" else 0)
        # The first pass counts squared norms, too; the dense matrix has one pass only.
        fit.begin(0, 1 if fit.exact else 4)

        def walk(fit: SubspaceFit = fit, g: torch.Tensor = g) -> None:
            for part in g.split(256):
                fit.add(part)

        operations = 2 * rows * width**2 if fit.exact else 4 * rows * width * fit.block
        rates[name] = operations / seconds(device, walk, repeats)
    return {
        "operations_a_second": rates,
        "of_matmul": {name: rate / rates["matmul"] for name, rate in rates.items()},
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def searching(device: torch.device, smoke: bool, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a query over sketches in half precision; and how many of the best it misses, by float64."""
    dim, found = (32 if smoke else 512), []
    for count in (2000, 4000) if smoke else (10**6, 10**7):
        if device.type == "cuda" and 2 * dim * count > torch.cuda.mem_get_info(device)[0] // 2:
            found.append({"rows": count, "skipped": "does not fit into half of the free memory"})
            continue
        generator = torch.Generator(device).manual_seed(0)
        head: list[torch.Tensor] = []

        def blocks(
            count: int = count, head: list[torch.Tensor] = head, g: torch.Generator = generator
        ) -> Iterator[Any]:
            for start in range(0, count, 1 << 16):
                part = torch.randn(min(1 << 16, count - start), dim, generator=g, device=device)
                head.extend([part.cpu()] if not head else [])
                yield part

        flat = FlatSketch(blocks(), count, dim, device)
        x = np.random.default_rng(0).standard_normal((32, dim), dtype=np.float32)
        times = {
            q: seconds(device, lambda q=q, flat=flat, x=x: flat.search(x[:q], 1000, 0.05), repeats) for q in (1, 32)
        }
        known = FlatSketch(head, len(head[0]), dim, device).search(x, 100)[0]
        best = torch.topk(torch.from_numpy(x).double() @ head[0].double().T, 100, dim=1).indices.numpy()
        same = [len(np.intersect1d(a, b)) for a, b in zip(known, best, strict=True)]
        found.append(
            {
                "rows": count,
                "ms": 1e3 * times[1],
                "ms_each_of_32": 1e3 * times[32] / 32,
                "bytes_a_second": 2 * dim * count / times[1],
                "found": float(np.mean(same)) / best.shape[1],
            }
        )
    return found


def scoring(device: torch.device, smoke: bool, repeats: int, folder: Path, way: str) -> dict[str, Any]:
    """Bytes a second of rows of eigencodes, in one way: read alone, cold and from the page cache; to scores by a fresh
    index, that reads them; and by one that holds them on the device. Many rows are copies of few."""
    layers, width, rows, copies = (3, 24, 500, 2) if smoke else (8, 40, 20_000, 8)
    generator = torch.Generator().manual_seed(0)
    blocks = [
        {str(i): torch.randn(500, width, width, generator=generator) for i in range(layers)} for _ in range(rows // 500)
    ]
    # In levels one bit of each direction, and a scale of each layer.
    room = layers * width**2 // 8 + layers * SCALE_BYTES
    config = BuildConfig(store="eigen", curvature_rank=None, eigen_bytes=room, coarse=None)
    with only(way):
        Index.build(folder / "0", gradients=blocks, config=config, progress=False).close()
    for step in (1, 2):
        Index.merge(folder / str(step), [folder / str(step - 1)] * copies, progress=False).close()
    path = folder / "2"
    files, query = shards(path), {name: g[:1] for name, g in blocks[0].items()}
    size = sum(file.stat().st_size for file in files)
    held = Index.open(path, device=device, verify="never")

    def fresh() -> np.ndarray:
        with Index.open(path, device=device, verify="never") as index:
            return index.scores(query)

    with Index.open(path, device="cpu") as index:
        expected = index.scores(query)
    times = {
        "read": seconds(device, lambda: read_files(files), repeats),
        "read and scored": seconds(device, fresh, repeats),
        "scored on the device": seconds(device, lambda: held.scores(query), repeats),
    }
    cold: dict[str, list[float]] = {"read, cold": [], "read and scored, cold": []}
    for _ in range(repeats):
        for name, function in (("read, cold", lambda: read_files(files)), ("read and scored, cold", fresh)):
            drop_files(files)
            cold[name].append(timed(function))
    times |= {name: statistics.median(values) for name, values in cold.items()}
    difference = float(np.abs(held.scores(query) - expected).max() / np.abs(expected).max())
    held.close()
    bytes_a_second = {name: size / value for name, value in times.items()}
    return {"bytes": size, "bytes_a_second": bytes_a_second, "difference": difference}


def main() -> None:
    parsed = arguments(__doc__, device={"default": "cuda", "help": "cpu with --smoke only"})
    device = torch.device(parsed.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here that torch sees: nothing was measured (--device cpu --smoke shows that it runs)")
        raise SystemExit(2)
    if device.type != "cuda" and not parsed.smoke:
        print(f"--device {device} is for --smoke: its figures would mean nothing")
        raise SystemExit(2)
    repeats = 1 if parsed.smoke else 5
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "agreement": agreement(device, parsed.smoke),
        "asking": asking(device, parsed.smoke, repeats),
        "capture": capturing(device, parsed.smoke, repeats),
        "curvature": fitting(device, parsed.smoke, repeats),
        "search": searching(device, parsed.smoke, repeats),
    }
    result["scan"] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as place:
            try:
                result["scan"][way] = scoring(device, parsed.smoke, repeats, Path(place), way)
            except ConfigError as error:
                # Rows are scored on a GPU only where faiss sees it, too.
                result["scan"][way] = {"not scored there": str(error), "bytes_a_second": {}, "difference": 0.0}

    rows = [["figure", "expected", result["device"]]]
    for store, seen in result["agreement"].items():
        rows.append([f"{store}: correlation with the CPU's scores", f">= {_CORRELATION}", f"{seen['correlation']:.6f}"])
        for name in ("difference", "scored there"):
            if name in seen:
                rows.append([f"{store}: {name}, of the largest score", f"<= {_DIFFERENCE}", f"{seen[name]:.1e}"])
        if "not scored there" in seen:
            rows.append([f"{store}: not scored there", "", seen["not scored there"][:70]])
    for way, part in result["asking"].items():
        for name, seen in part["scores"].items():
            line = f"{seen['difference']:.1e}, correlation {seen['correlation']:.6f}"
            rows.append([f"{way}, {name}: difference, of the largest score", f"<= {_DIFFERENCE}", line])
        for name in part["ms"]["cpu"]:
            line = " / ".join(f"{times[name]:.3g}" for times in part["ms"].values())
            rows.append([f"{way}, {name}: ms of 8 questions, model on {' / '.join(part['ms'])}", "", line])
    for dtype, part in result["capture"].items():
        rows.append([f"capture / plain pass, {dtype}", "<= 1.3", f"{part['ratio']:.2f}"])
    for name, share in result["curvature"]["of_matmul"].items():
        rate = result["curvature"]["operations_a_second"][name] / 1e12
        rows.append([f"{name}, TFLOP/s (of a large product)", ">= 0.4", f"{rate:.3g} ({share:.2f})"])
    for part in result["search"]:
        if "ms" in part:
            line = f"{part['ms']:.3g} / {part['ms_each_of_32']:.3g} ({part['bytes_a_second'] / 1e9:.3g} GB/s)"
            rows.append([f"{part['rows']:,} sketches, ms a query, 1 / of 32", "", line])
            rows.append(["of the best 100, found", ">= 0.98", f"{part['found']:.4f}"])
    for way, part in result["scan"].items():
        for name, rate in part["bytes_a_second"].items():
            rows.append([f"rows, {way}, {name}, GB/s", "", f"{rate / 1e9:.3g}"])
        rows.append([f"scan, {way}: difference, of the largest score", "<= 1e-3", f"{part['difference']:.1e}"])
    table(rows)
    keep("gpu", result, parsed)
    # NaN is no agreement either.
    wrong = [
        *(s for s, seen in result["agreement"].items() if not seen["correlation"] >= _CORRELATION),
        *(s for s, seen in result["agreement"].items() if not seen.get("scored there", 0.0) <= _DIFFERENCE),
        *([] if result["agreement"]["factors"]["difference"] <= _DIFFERENCE else ["factors"]),
        *(f"{part['rows']} sketches" for part in result["search"] if not part.get("found", 1.0) >= 0.98),
        *(
            f"{way}, {name}"
            for way, part in result["asking"].items()
            for name, seen in part["scores"].items()
            if not seen["difference"] <= _DIFFERENCE
        ),
        *(f"scan, {way}" for way, part in result["scan"].items() if not part["difference"] <= 1e-3),
    ]
    if wrong:
        raise SystemExit(f"not the CPU's answers: {', '.join(wrong)}")


if __name__ == "__main__":
    main()

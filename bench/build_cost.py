"""Claim: capture costs at most 1.3 times a plain forward and backward pass, and memory does not grow with N.

One run, interleaved: a plain pass with parameter gradients, capture alone, and capture with factoring and packing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorif_index.codecs.layout import RowLayout

from bench.corpus import gpt, sequences, train
from bench.environment import ROOT, arguments, keep, peak_rss, table, timed
from lorif_index import BuildConfig, Index, default_loss
from lorif_index.capture.data import as_source
from lorif_index.capture.sources import ModelCapture, ModelGradients
from lorif_index.codecs.truncation import factorise

BATCH = 32


def plain(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward with parameter gradients, in eval mode like capture."""
    model.eval()
    for part in ids.split(BATCH):
        model.zero_grad(set_to_none=True)
        default_loss(model, {"input_ids": part}).sum().backward()
    model.zero_grad(set_to_none=True)


def capture(model: Any, ids: torch.Tensor) -> None:
    whole = ModelCapture(model, BuildConfig(projection_dim=32))
    for _ in ModelGradients(whole.capture(None), as_source({"input_ids": ids}, BATCH)).blocks():
        pass


def encode(model: Any, ids: torch.Tensor, rank: int) -> None:
    config = BuildConfig(projection_dim=32, rank=rank, store="factors")
    whole = ModelCapture(model, config)
    layout = RowLayout(whole.specs, config.dtype)
    for block in ModelGradients(whole.capture(None), as_source({"input_ids": ids}, BATCH)).blocks():
        layout.pack(factorise(block, whole.specs)).to(layout.torch_dtype)


def time_model(layers: int, width: int, count: int, repeats: int) -> dict[str, Any]:
    model, ids = gpt(layers, width), sequences(count)
    routes = {
        "plain forward+backward": lambda: plain(model, ids),
        "capture": lambda: capture(model, ids),
        "capture + encode c=1": lambda: encode(model, ids, 1),
        "capture + encode c=4": lambda: encode(model, ids, 4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for function in routes.values():
        function()
    for _ in range(repeats):
        for name, function in routes.items():
            seconds[name].append(timed(function))
    base = seconds["plain forward+backward"]
    return {
        "model": f"GPT-2 architecture, {layers} layers, width {width}, sequences of 64, batches of {BATCH}",
        "examples": count,
        "repeats": repeats,
        "ms_per_example": {n: 1e3 * statistics.median(s) / count for n, s in seconds.items()},
        "ratio_to_plain": {
            n: statistics.median(a / b for a, b in zip(s, base, strict=True)) for n, s in seconds.items()
        },
    }


def child(route: str, layers: int, width: int, count: int) -> None:
    """Peak memory of one route, above what the process had before it; one route a process."""
    torch.set_num_threads(1 if count < 1000 else 2)
    model, ids = gpt(layers, width), sequences(count)
    before = peak_rss()
    if route == "plain":
        plain(model, ids)
    elif route == "capture":
        capture(model, ids)
    else:
        with tempfile.TemporaryDirectory() as folder:
            config = BuildConfig(
                projection_dim=32,
                rank=4,
                curvature_rank=128,
                curvature_sample=256,
                shard_bytes=4 << 20,
                batch_size=BATCH,
                store="factors",
                coarse=None,
            )
            Index.build(Path(folder) / "i", model=model, data={"input_ids": ids}, config=config, progress=False)
    print(json.dumps({"before": before, "peak": peak_rss()}))


def memory(route: str, layers: int, width: int, count: int) -> dict[str, int]:
    code = f"from bench.build_cost import child; child({route!r}, {layers}, {width}, {count})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parsed = arguments(__doc__ or "")
    sizes = [(1, 16, 64, 1)] if parsed.smoke else [(4, 64, 512, 5), (6, 256, 96, 3)]
    models = [time_model(*size) for size in sizes]
    rows = [["model", "route", "ms/example", "ratio", "expected"]]
    for result in models:
        for name, ratio in result["ratio_to_plain"].items():
            expected = "<= 1.3" if name != "plain forward+backward" else ""
            rows.append([result["model"][:42], name, f"{result['ms_per_example'][name]:.2f}", f"{ratio:.2f}", expected])
    table(rows)
    layers, width, count, _ = sizes[0]
    peaks = {
        r: memory(r, layers, width, min(count, 256)) for r in (("capture",) if parsed.smoke else ("plain", "capture"))
    }
    growth = {n: memory("build", layers, width, n) for n in ((64,) if parsed.smoke else (1000, 4000))}
    print("peak memory above the start, MB:", {r: round((p["peak"] - p["before"]) / 1e6, 1) for r, p in peaks.items()})
    print("peak memory of a build at N, MB:", {n: round(p["peak"] / 1e6, 1) for n, p in growth.items()})

    ids = sequences(128 if parsed.smoke else 2000)
    model = gpt(layers, width)
    train(model, ids, 5 if parsed.smoke else 100)
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(projection_dim=32, rank=4, store="both", curvature_rank=16 if parsed.smoke else 512)
        index = Index.build(Path(folder) / "i", model=model, data={"input_ids": ids}, config=config, progress=False)
        report = index.build_report | {"bytes_per_example": index.bytes_per_example, "nbytes": index.nbytes}
    print("a whole build:", report)
    keep("build_cost", {"models": models, "memory": peaks, "memory_by_n": growth, "build": report}, parsed)
    if not all(np.isfinite(list(m["ratio_to_plain"].values())).all() for m in models):
        raise SystemExit("a ratio is not finite")


if __name__ == "__main__":
    main()

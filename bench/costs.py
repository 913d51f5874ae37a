"""Claims about small costs, each measured beside what it is a multiple of, in turn, so that both meet the same machine.

build: capture costs at most 1.3 times a plain forward and backward pass, and memory does not grow with N.
explain: taking 20 hits apart costs at most 1.5 times a plain forward and backward pass of the same 20 examples.
import: importing lorif_index takes at most 1.25 times as long as importing torch, and imports no other package of
weight.
estimate: what `Index.estimate` says of a build before it starts is within 20% of what the build then takes. An estimate
is made again after the build, so that a machine that is busier at one time than at another is seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.corpus import gpt, sequences, train
from bench.environment import ROOT, arguments, in_child, in_turn, keep, medians, peak_rss, ratios, table
from bench.tasks import TASKS, take
from lorif_index import BuildConfig, Compute, Estimate, Index, default_loss
from lorif_index.capture.data import as_source
from lorif_index.capture.sources import ModelCapture, ModelGradients

BATCH, HITS = 32, 20
PLAIN = "plain forward+backward"


def plain(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward with parameter gradients, in eval mode like capture."""
    model.eval()
    for part in ids.split(BATCH):
        model.zero_grad(set_to_none=True)
        default_loss(model, {"input_ids": part}).sum().backward()
    model.zero_grad(set_to_none=True)


def capture(model: Any, ids: torch.Tensor, config: BuildConfig) -> None:
    """Projected gradients of every sequence, which are then forgotten."""
    whole = ModelCapture(model, config)
    for _ in ModelGradients(whole.capture(None), as_source({"input_ids": ids}, BATCH)).blocks():
        pass


def of_model(layers: int, width: int, routes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Routes beside the plain pass."""
    seconds = in_turn(routes, repeats)
    return {
        "model": f"GPT-2 architecture, {layers} layers, width {width}, sequences of 64",
        "repeats": repeats,
        "ms": medians(seconds, 1e3),
        "ratio_to_plain": ratios(seconds, PLAIN),
    }


def show(models: list[dict[str, Any]], limits: dict[str, float]) -> None:
    rows = [["model", "route", "ms", "ratio", "expected"]]
    for result in models:
        for name, ratio in result["ratio_to_plain"].items():
            expected = f"<= {limits[name]}" if name in limits else ""
            rows.append([result["model"][:42], name, f"{result['ms'][name]:.1f}", f"{ratio:.2f}", expected])
    table(rows)


# -- build ---------------------------------------------------------------------------------------------------------


def peak(work: Callable[[], Any]) -> dict[str, int]:
    """Peak memory of a process before some work, and after it."""
    before = peak_rss()
    work()
    return {"before": before, "peak": peak_rss()}


def built(folder: str, model: Any, ids: torch.Tensor, **settings: Any) -> Index:
    config = BuildConfig(projection_dim=32, store="factors", rank=4, batch_size=BATCH, **settings)
    return Index.build(Path(folder) / "i", model=model, data={"input_ids": ids}, config=config, progress=False)


def build(smoke: bool) -> dict[str, Any]:
    models = []
    config = BuildConfig(projection_dim=32)
    for layers, width, count, repeats in [(1, 16, 64, 1)] if smoke else [(4, 64, 512, 5), (6, 256, 96, 3)]:
        model, ids = gpt(layers, width), sequences(count)
        routes = {
            PLAIN: lambda m=model, i=ids: plain(m, i),
            "capture": lambda m=model, i=ids: capture(m, i, config),
        }
        models.append(of_model(layers, width, routes, repeats) | {"examples": count})
    show(models, {"capture": 1.3})

    layers, width, count = (1, 16, 64) if smoke else (4, 64, 256)
    model, ids = gpt(layers, width), sequences(count if smoke else 4000)
    train(model, ids, 5 if smoke else 100)
    small: dict[str, Any] = {
        "sample": 256,
        "curvature_rank": 128,
        "coarse": None,
        "compute": Compute(shard_bytes=4 << 20),
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        peaks = {
            "plain": in_child(lambda: peak(lambda: plain(model, ids[:count])), out),
            "capture": in_child(lambda: peak(lambda: capture(model, ids[:count], config)), out),
        }
    growth = {}
    for n in (count,) if smoke else (1000, 4000):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "facts.json"
            growth[n] = in_child(lambda n=n, f=folder: peak(lambda: built(f, model, ids[:n], **small)), out)
    with tempfile.TemporaryDirectory() as folder:
        index = built(folder, model, ids[:2000], curvature_rank=16 if smoke else 512)
        report = index.build_report | {"bytes_per_example": index.bytes_per_example, "nbytes": index.nbytes}
    print("peak memory above the start, MB:", {r: round((p["peak"] - p["before"]) / 1e6, 1) for r, p in peaks.items()})
    print("peak memory of a build at N, MB:", {n: round(p["peak"] / 1e6, 1) for n, p in growth.items()})
    print("a whole build:", report)
    return {"models": models, "memory": peaks, "memory_by_n": growth, "build": report}


# -- explain -------------------------------------------------------------------------------------------------------


def explain(smoke: bool) -> dict[str, Any]:
    """Explanations with and without the query's tokens, and what coverage adds to a build."""
    models = []
    for layers, width, count, steps, repeats in (
        [(1, 16, 64, 5, 1)] if smoke else [(4, 64, 200, 20, 9), (6, 256, 100, 3, 7)]
    ):
        ids, model = sequences(count + 1), gpt(layers, width)
        train(model, ids[:count], steps)
        data, query = {"input_ids": ids[:count]}, {"input_ids": ids[count:]}
        with tempfile.TemporaryDirectory() as folder:
            index = Index.build(Path(folder) / "i", model=model, data=data, progress=False)
            hits = index.search(query, k=HITS)
            routes = {
                PLAIN: lambda m=model, i=ids[hits.ids[0]]: plain(m, i),
                "explain": lambda i=index, q=query, h=hits: i.explain(q, h),
                "explain, without the query's tokens": lambda i=index, q=query, h=hits: i.explain(
                    q, h, query_tokens=False
                ),
                "plain forward+backward of the query": lambda m=model, q=query: plain(m, q["input_ids"]),
            }
            result = of_model(layers, width, routes, repeats)
            found, report = index.explain(query, hits)[0], index.build_report
        most = max(abs(e.score) for e in found)
        result |= {
            "examples": count,
            "projected": sorted({(spec.d_in, spec.d_out) for spec in index.specs.values()}),
            "stored": index.codec,
            "error_of_sums": {
                what: max(abs(float(getattr(e, what).sum()) - e.score) for e in found) / most
                for what in ("tokens", "query_tokens")
            },
            "coverage": report["coverage"],
            "coverage_share_of_build": report["coverage"]["seconds"] / sum(report["seconds"].values()),
        }
        models.append(result)
    show(models, {"explain": 1.5})
    for result in models:
        print("sums are off by", {k: f"{v:.1e}" for k, v in result["error_of_sums"].items()}, "of the largest score")
        kept = {k: v for k, v in result["coverage"].items() if k != "layers"}
        print(f"coverage, {result['coverage_share_of_build']:.1%} of the build:", kept)
    return {"hits": HITS, "models": models}


# -- import --------------------------------------------------------------------------------------------------------


def importing(smoke: bool) -> dict[str, Any]:
    """Each import in a process of its own, the two in turn."""

    def run(code: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    codes = {
        "the interpreter alone": "pass",
        "import torch": "import torch",
        "import lorif_index": "import lorif_index",
    }
    routes = {name: lambda code=code: run(code) for name, code in codes.items()}
    seconds = medians(in_turn(routes, 1 if smoke else 7, warm=not smoke))
    ratio = seconds["import lorif_index"] / seconds["import torch"]
    told = run(
        "import sys, json, torch; before = set(sys.modules); import lorif_index; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new: list[str] = json.loads(told)
    packages = sorted({name.partition(".")[0] for name in new})
    table([["", "s"], *([name, f"{value:.2f}"] for name, value in seconds.items())])
    print(f"{ratio:.2f} times (expected: <= 1.25); {len(new)} modules beside torch's, of {', '.join(packages)}")
    return {"seconds": seconds, "ratio": ratio, "modules": len(new), "packages": packages}


# -- estimate ------------------------------------------------------------------------------------------------------


def estimate(smoke: bool) -> dict[str, Any]:
    """Of the models of tasks before their training, whose gradients cost the same."""
    found = {name: estimated(name, 256 if smoke else 2048, smoke) for name in (["digits", "scratch"][: 2 - smoke])}
    rows = [["task", "", "bytes on disk", "seconds", "GB of memory"]]
    for name, facts in found.items():
        for kind in ("before", "built", "after"):
            part = facts[kind]
            rows.append([name, kind, f"{part['disk']:,}", f"{part['seconds']}", f"{part['memory'] / 1e9:.2f}"])
    table(rows)
    return {"tasks": found}


def estimated(name: str, count: int, smoke: bool) -> dict[str, Any]:
    """One task's figures."""
    task = TASKS[name](smoke)
    model, data = task.begin(0).eval(), take(task.data, slice(0, count))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def work() -> dict[str, Any]:
            with Index.build(place / "i", model=model, data=data) as index:
                return {"report": index.build_report, "nbytes": index.nbytes, "rows": len(index)}

        before = Index.estimate(model=model, data=data)
        built = in_child(work, place / "facts.json")
        after = Index.estimate(model=model, data=data)
    report, nbytes = built["report"], built["nbytes"]
    taken, memory = sum(report["seconds"].values()), report["peak_rss_bytes"]

    def said(value: Estimate) -> dict[str, Any]:
        return {"disk": value.disk_total, "seconds": round(value.seconds_total, 1), "memory": value.memory}

    return {
        "examples": built["rows"],
        "before": said(before),
        "built": {"disk": nbytes, "seconds": round(taken, 1), "memory": memory},
        "after": said(after),
        "stages": {"before": before.seconds, "built": report["seconds"], "after": after.seconds},
        "ratios": {
            "disk": before.disk_total / nbytes,
            "seconds": [before.seconds_total / taken, after.seconds_total / taken],
            "memory": before.memory / memory,
        },
    }


KINDS: dict[str, tuple[Callable[[bool], dict[str, Any]], str]] = {
    "build": (build, "build_cost"),
    "explain": (explain, "explain_cost"),
    "import": (importing, "import_cost"),
    "estimate": (estimate, "estimate_accuracy"),
}


def main() -> None:
    parsed = arguments(__doc__, what={"positional": True, "choices": list(KINDS)})
    # A child that is forked must not wait for threads that it has not.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure, name = KINDS[parsed.what]
    keep(name, measure(parsed.smoke), parsed)


if __name__ == "__main__":
    main()

"""Claims about small costs, each measured beside what it is a multiple of, in turn, so that both meet the same machine.

build: capture costs at most 1.3 times a plain forward and backward pass, and memory does not grow with N.
explain: taking 20 hits apart costs at most 1.5 times a plain forward and backward pass of the same 20 examples.
import: importing lorif_index takes at most 1.25 times as long as importing torch, and imports no other package of
weight.
layers: what capture takes of each kind of layer, in time and memory, beside a plain pass of the same model.
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

import numpy as np
import torch
from torch import nn

from bench.corpus import gpt, sequences, train
from bench.environment import ROOT, arguments, in_child, in_turn, keep, medians, peak_rss, ratios, table
from bench.tasks import TASKS, take
from lorif_index import BuildConfig, Compute, Estimate, Index, LayerSelection, default_loss
from lorif_index.capture.data import as_source, batch_count
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


# -- kinds of layers -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens to classes, by torch's own attention modules."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.tokens(ids)).mean(1))


WORDS = 1000
Case = tuple[Callable[[], Any], Any, LayerSelection]
"""What makes the model, a batch, and which layers are tracked."""


def layer_cases(smoke: bool) -> dict[str, Case]:
    import transformers

    width, depth, count, length = (32, 1, 4, 16) if smoke else (256, 4, 16, 128)
    sizes: dict[str, Any] = dict(
        vocab_size=WORDS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth
    )
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    ids = torch.randint(3, WORDS, (count, length))
    tokens, labelled = {"input_ids": ids}, (ids, torch.randint(0, 10, (count,)))
    images = (torch.randn(count, 3, 4 * depth, 4 * depth), torch.randint(0, 10, (count,)))

    def llama() -> Any:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    def mixtral() -> Any:
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=8))

    def convolutional() -> Any:
        parts = [part for _ in range(depth) for part in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        return nn.Sequential(nn.Conv2d(3, width, 3), *parts, pooled)

    usual = LayerSelection()
    return {
        "linear maps (Llama)": (llama, tokens, usual),
        "and norms": (llama, tokens, LayerSelection(norms=True)),
        "and embeddings": (llama, tokens, LayerSelection(embeddings=True)),
        "fused experts, routers (Mixtral)": (mixtral, tokens, usual),
        "attention modules (nn.TransformerEncoder)": (lambda: Encoder(width, depth), labelled, usual),
        "convolutions": (convolutional, images, usual),
    }


def routes_of(case: Case, smoke: bool) -> tuple[dict[str, Callable[[], Any]], int]:
    """A plain pass and capture of one batch, and how many layers are tracked."""
    make, batch, selection = case
    torch.manual_seed(0)
    model = make().eval()
    taken = ModelCapture(model, BuildConfig(projection="random", projection_dim=16 if smoke else 32, layers=selection))
    kept, numbers = taken.capture(None).trust(), np.arange(batch_count(batch))

    def once() -> None:
        model.zero_grad(set_to_none=True)
        default_loss(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    return {PLAIN: once, "capture": lambda: kept.gradients(numbers, batch)}, len(taken.layers)


def layers(smoke: bool) -> dict[str, Any]:
    cases, peaks, found = layer_cases(smoke), {}, {}
    # Before this process has made anything: a child's peak begins with its parent's.
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            for route in (PLAIN, "capture"):

                def work(case: Case = case, route: str = route) -> dict[str, int]:
                    return peak(routes_of(case, smoke)[0][route])

                facts = in_child(work, Path(folder) / "facts.json")
                peaks[name, route] = facts["peak"] - facts["before"]
    for name, case in cases.items():
        routes, count = routes_of(case, smoke)
        seconds = in_turn(routes, 1 if smoke else 7)
        above = {route: peaks[name, route] for route in routes}
        found[name] = {
            "layers": count,
            "ms": medians(seconds, 1e3),
            "ratio_to_plain": ratios(seconds, PLAIN)["capture"],
            "bytes_above_start": above,
            "bytes_above_plain": above["capture"] - above[PLAIN],
        }
    table(
        [
            ["kind", "layers", "plain, ms", "capture over plain", "plain, MB", "capture, MB"],
            *(
                [
                    name,
                    str(f["layers"]),
                    f"{f['ms'][PLAIN]:.0f}",
                    f"{f['ratio_to_plain']:.2f}",
                    *(f"{f['bytes_above_start'][route] / 1e6:.0f}" for route in (PLAIN, "capture")),
                ]
                for name, f in found.items()
            ),
        ]
    )
    return {"examples": "16 of 128 tokens or 16 x 16 pixels, width 256, 4 blocks, one thread", "kinds": found}


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
    "layers": (layers, "layer_cost"),
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

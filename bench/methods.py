"""Methods of the attribution benchmarks: references of our own, this library's settings, and other libraries'.

Each gives scores of every training example for every query, at its own default damping and over one common sweep, and
what it costs. References are dense and short; they share the library's capture of projected gradients, and nothing
behind it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.peers import PEERS, Peer
from bench.tasks import Task, size, take
from lorif_index import AbsoluteDamping, BuildConfig, Index, PaperDamping, ReleaseDamping
from lorif_index.sources import ModelCapture

SWEEP = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
Method = Callable[[Task, nn.Module], Peer]


def random(task: Task, model: nn.Module) -> Peer:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((size(task.queries), task.count)).astype(np.float32)
    return Peer({"default": scores}, "default", 0.0, 0.0, 0.0, "")


def blocks(
    model: nn.Module, data: Any, config: BuildConfig, batch: int = 64, index: Index | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Layer -> (b, D) projected gradients of the data, batch after batch, in the projections of an index if given."""
    taken = ModelCapture(model, config, None if index is None else index._projections)
    capture = taken.capture(None)
    for start in range(0, size(data), batch):
        part = take(data, slice(start, start + batch))
        block = capture.gradients(np.arange(size(part)), part)
        yield {name: g.flat() for name, g in block.layers.items()}


def dot(task: Task, model: nn.Module, *, cosine: bool = False) -> Peer:
    """Inner products (TracIn of the last checkpoint, Pruthi et al., arXiv:2002.08484) of unprojected gradients."""
    config = BuildConfig(projection_dim=None)
    asked = torch.cat([torch.cat(list(b.values()), dim=1) for b in blocks(model, task.queries, config)])
    parts = []
    began = time.perf_counter()
    for block in blocks(model, task.data, config):
        rows = torch.cat(list(block.values()), dim=1)
        parts.append(asked @ (nn.functional.normalize(rows, dim=1) if cosine else rows).T)
    seconds = time.perf_counter() - began
    scores = torch.cat(parts, dim=1).numpy()
    note = "gradients are computed again for each batch of queries: nothing is stored"
    return Peer({"default": scores}, "default", 0.0, 0.0, 1e3 * seconds / len(asked), note)


def logra(task: Task, model: nn.Module, *, dim: int = 32) -> Peer:
    """Dense projected gradients, and the full inverse of each layer's second moment (LoGRA, arXiv:2405.13954)."""
    config = BuildConfig(projection_dim=dim, projection="random")
    began = time.perf_counter()
    found = list(blocks(model, task.data, config))
    rows = {name: torch.cat([b[name] for b in found]) for name in found[0]}
    del found
    decomposed = {}
    for name, g in rows.items():
        values, vectors = torch.linalg.eigh((g.T @ g).double() / len(g))
        decomposed[name] = (values.clamp_min(0.0).float(), vectors.float())
    built = time.perf_counter() - began
    found = list(blocks(model, task.queries, config))
    asked = {name: torch.cat([b[name] for b in found]) for name in rows}
    scores = {}
    seconds = 0.0
    for multiple in SWEEP:
        began = time.perf_counter()
        total = torch.zeros(size(task.queries), task.count)
        for name, (values, vectors) in decomposed.items():
            lam = multiple * float(values.mean())
            total += ((asked[name] @ vectors) / (values + lam)) @ vectors.T @ rows[name].T
        scores[str(multiple)] = total.numpy()
        seconds = time.perf_counter() - began
    wide = sum(g.shape[1] for g in rows.values())
    return Peer(scores, "0.1", 2.0 * wide, built, 1e3 * seconds / size(task.queries), "stored in half precision")


def library(
    task: Task, model: nn.Module, *, rules: dict[str, Any] | None = None, default: str = "default", **settings: Any
) -> Peer:
    """This library; with `rules`, other damping rules beside the sweep, of which `default` names the default."""
    config = settings.pop("config", None) or BuildConfig(coarse=None, **settings)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        index = Index.build(Path(folder) / "i", model=model, data=task.data, config=config, progress=False)
        built = time.perf_counter() - began
        sweep: dict[str, Any] = {"default": None} | {str(m): m for m in SWEEP} | (rules or {})
        index.scores(take(task.queries, slice(0, 1)))
        scores, seconds = {}, 0.0
        for label, damping in sweep.items():
            began = time.perf_counter()
            scores[label] = index.scores(task.queries, damping=damping)
            if label == default:
                seconds = time.perf_counter() - began
        shared = index.nbytes - sum(shard.file.info.size for shard in index._store.shards)
        note = f"store={index.representation}; {shared:,} bytes are shared by all examples"
        return Peer(scores, default, float(index.bytes_per_example), built, 1e3 * seconds / size(task.queries), note)


def paper(task: Task, model: nn.Module, *, rank: int = 1, rule: str = "paper") -> Peer:
    """LoRIF as published (arXiv:2601.21929) at the library's d: damping of the paper, or of the authors' release."""
    config = BuildConfig.paper(projection_dim=1 / 16, projection_floor=32, rank=rank, coarse=None)
    rules = {"paper": PaperDamping(), "release": ReleaseDamping()}
    return library(task, model, rules=rules, default=rule, config=config)


def decay(task: Task, model: nn.Module) -> Peer:
    """The library's default with the training's own weight decay as lambda, where that is an l2 term of the loss."""
    rules = {"decay": AbsoluteDamping(task.recipe.decay)} if task.recipe.optimizer == "sgd" else {}
    return library(task, model, rules=rules)


METHODS: dict[str, Method] = {
    "random": random,
    "gradient dot": dot,
    "gradient cosine": lambda t, m: dot(t, m, cosine=True),
    "LoGRA d=16": lambda t, m: logra(t, m, dim=16),
    "LoGRA d=32": logra,
    "LoRIF c=1": paper,
    "LoRIF c=1, release's damping": lambda t, m: paper(t, m, rule="release"),
    "LoRIF c=4": lambda t, m: paper(t, m, rank=4),
    "library default": decay,
    "library, pure GGN": lambda t, m: library(t, m, curvature="ggn"),
    "library, random projection": lambda t, m: library(t, m, projection="random"),
    "library, empirical curvature": lambda t, m: library(t, m, curvature="empirical"),
    "library, random and empirical": lambda t, m: library(t, m, projection="random", curvature="empirical"),
    "library, factors alone": lambda t, m: library(t, m, store="factors"),
    "library, coordinates alone": lambda t, m: library(t, m, store="coordinates"),
    "library, one probe": lambda t, m: library(t, m, probes=1),
    "library, four probes": lambda t, m: library(t, m, probes=4),
    "library, rank 4": lambda t, m: library(t, m, rank=4),
    "library, truncated": lambda t, m: library(t, m, complement="truncated"),
    "library, mean tail": lambda t, m: library(t, m, complement="tail-corrected"),
    "library, all directions": lambda t, m: library(t, m, curvature_rank=None),
    **{f"TRAK p={p}": (lambda t, m, p=p: PEERS["trak"](t, m, proj_dim=p)) for p in (1024, 2048)},
    "EK-FAC (kronfluence)": PEERS["ekfac"],
    "LoGRA (dattri)": PEERS["dattri-logra"],
}

"""Methods of the attribution benchmarks: references of our own, this library's settings, and other libraries'.

Each gives scores of every training example for every query, at its own default damping and over one common sweep, and
what it costs. References are dense and short; they share the library's capture of projected gradients, and nothing
behind it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from bench import bergson_peer
from bench.environment import shards
from bench.peers import PEERS, Peer
from bench.tasks import Task, batches, size, take
from lorif_index import AbsoluteDamping, BuildConfig, Index, LayerSelection, RelativeDamping, Sample
from lorif_index.capture.gradients import LayerSpec
from lorif_index.capture.sources import ModelCapture
from lorif_index.codecs.eigencodes import EigenCodec
from lorif_index.linalg.projection import Projections
from lorif_index.storage.fitted import FittedProjections
from lorif_index.storage.manifest import read_manifest

SWEEP = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
# Of refined questions, each of which takes passes of the model.
REFINED = (0.01, 0.1)
NO_HEAD = LayerSelection(head=False)
"""What published methods are run on: all linear maps but a language model's head."""
AGAIN = "gradients are computed again for each batch of queries: nothing is stored"
WAYS = ("levels", "largest")
"""How eigencodes may write rows."""
Method = Callable[[Task, nn.Module], Peer]


def kinds_of_index() -> dict[str, BuildConfig]:
    """Kinds of index that the suites on flipped labels, triggers and duplicates build of one model and its data."""
    return {
        "default": BuildConfig(),
        "paper": BuildConfig.paper(),
    }


def random(task: Task, model: nn.Module) -> Peer:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((size(task.queries), task.count)).astype(np.float32)
    return Peer({"default": scores}, "default", 0.0, 0.0, 0.0, "")


def projections(index: Index) -> Projections:
    """Those of an index, by which gradients of its questions are projected."""
    learnt = read_manifest(index.path).fits.get("projections")
    fitted = None if learnt is None else FittedProjections(index.path, learnt, index.specs)
    return Projections(index.specs, index.config.seed, fitted)


def blocks(
    model: nn.Module, parts: Iterable[Any], config: BuildConfig, index: Index | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Layer -> (b, D) projected gradients of each batch, in the projections of an index if given."""
    capture = ModelCapture(model, config, None if index is None else projections(index)).capture(None)
    for part in parts:
        block = capture.gradients(np.arange(size(part)), part)
        yield {name: g.flat() for name, g in block.layers.items()}


def gathered(
    model: nn.Module, parts: Iterable[Any], config: BuildConfig, index: Index | None = None
) -> dict[str, torch.Tensor]:
    """Layer -> (n, D): the same of all batches together."""
    found = list(blocks(model, parts, config, index))
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def shaped(gradients: dict[str, torch.Tensor], specs: dict[str, LayerSpec]) -> dict[str, torch.Tensor]:
    """Layer -> (n, d_in, d_out), from (n, D)."""
    return {name: g.reshape(-1, specs[name].d_in, specs[name].d_out) for name, g in gradients.items()}


def shared_bytes(index: Index) -> int:
    """Bytes of an index that are not its rows'."""
    return index.nbytes - sum(path.stat().st_size for path in shards(index.path))


@contextmanager
def only(way: str) -> Iterator[None]:
    """Eigencodes that are fitted meanwhile have rows in this way alone, of `WAYS`; a `CurvatureError` where it has no
    room."""
    ways = EigenCodec._ways

    def some(*given: Any) -> list[EigenCodec]:
        return [codec for codec in ways(*given) if (codec.way.bits > 0) == (way == "levels")]

    with mock.patch.object(EigenCodec, "_ways", some):
        yield


def unrounded(index: Index, queries: Any, **options: Any) -> np.ndarray:
    """(q, n) scores of whole projected gradients, all of which are computed again; the index has no gaps."""
    every = len(index)
    hits = index.search(queries, every, exact=True, rerank=every, **options)
    return np.take_along_axis(hits.scores, hits.ids.argsort(axis=1), axis=1)


def dot(task: Task, model: nn.Module, *, cosine: bool = False, layers: LayerSelection = NO_HEAD) -> Peer:
    """Inner products (TracIn of the last checkpoint, Pruthi et al., arXiv:2002.08484) of unprojected gradients."""
    config = BuildConfig(projection_dim=None, layers=layers)
    asked = torch.cat(list(gathered(model, batches(task.queries), config).values()), dim=1)
    parts = []
    began = time.perf_counter()
    for block in blocks(model, batches(task.data), config):
        rows = torch.cat(list(block.values()), dim=1)
        parts.append(asked @ (nn.functional.normalize(rows, dim=1) if cosine else rows).T)
    seconds = time.perf_counter() - began
    scores = torch.cat(parts, dim=1).numpy()
    return Peer({"default": scores}, "default", 0.0, 0.0, 1e3 * seconds / len(asked), AGAIN)


def logra(task: Task, model: nn.Module, *, dim: int = 32) -> Peer:
    """Dense projected gradients, and the full inverse of each layer's second moment (LoGRA, arXiv:2405.13954)."""
    config = BuildConfig(projection_dim=dim, projection="random", layers=NO_HEAD)
    began = time.perf_counter()
    rows = gathered(model, batches(task.data), config)
    decomposed = {}
    for name, g in rows.items():
        values, vectors = torch.linalg.eigh((g.T @ g).double() / len(g))
        decomposed[name] = (values.clamp_min(0.0).float(), vectors.float())
    built = time.perf_counter() - began
    asked = gathered(model, batches(task.queries), config)
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
    task: Task,
    model: nn.Module,
    *,
    config: BuildConfig | None = None,
    rules: dict[str, Any] | None = None,
    refine: bool = False,
    whole: bool = False,
    **settings: Any,
) -> Peer:
    """This library, with a config or settings of one.

    Args:
        task, model: what is asked about.
        config: as it is; or `settings` of one.
        rules: other damping rules to try beside the sweep.
        refine: questions are refined with the model; the sweep is short then.
        whole: of every example the score of its whole projected gradient, not of its row.
    """
    config = BuildConfig(coarse=None, **settings) if config is None else config
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        index = Index.build(Path(folder) / "i", model=model, data=task.data, config=config, progress=False)
        built = time.perf_counter() - began

        def scored(damping: Any) -> np.ndarray:
            if whole:
                return unrounded(index, task.queries, damping=damping, refine=refine)
            return index.scores(task.queries, damping=damping, refine=refine)

        multiples = REFINED if refine else SWEEP
        sweep: dict[str, Any] = {"default": None} | {str(m): m for m in multiples} | (rules or {})
        index.scores(take(task.queries, slice(0, 1)))
        scores, seconds = {}, 0.0
        for label, damping in sweep.items():
            began = time.perf_counter()
            scores[label] = scored(damping)
            if label == "default":
                seconds = time.perf_counter() - began
        shared = f"{shared_bytes(index):,} bytes are shared by all examples"
        note = f"{AGAIN} but rows that are not used; {shared}" if whole else f"store={index.codec}; {shared}"
        each = 0.0 if whole else float(index.bytes_per_example)
        return Peer(scores, "default", each, built, 1e3 * seconds / size(task.queries), note)


def paper(task: Task, model: nn.Module, *, rank: int = 1) -> Peer:
    """LoRIF as published (arXiv:2601.21929) at the library's d, and with the damping of the authors' release."""
    config = BuildConfig.paper(projection_dim=1 / 16, projection_floor=32, rank=rank, coarse=None)
    return library(task, model, rules={"release": RelativeDamping(0.5)}, config=config)


def decay(task: Task, model: nn.Module) -> Peer:
    """The library's default with the training's own weight decay as lambda, where that is an l2 term of the loss."""
    rules = {"decay": AbsoluteDamping(task.recipe.decay)} if task.recipe.optimizer == "sgd" else {}
    return library(task, model, rules=rules)


METHODS: dict[str, Method] = {
    "random": random,
    "gradient dot": dot,
    "gradient cosine": lambda t, m: dot(t, m, cosine=True),
    "gradient cosine, with the head": lambda t, m: dot(t, m, cosine=True, layers=LayerSelection()),
    "LoGRA d=16": lambda t, m: logra(t, m, dim=16),
    "LoGRA d=32": logra,
    "LoRIF c=1": paper,
    "LoRIF c=4": lambda t, m: paper(t, m, rank=4),
    "library default": decay,
    "LoGRA d=64": lambda t, m: logra(t, m, dim=64),
    "library, d=32": lambda t, m: library(t, m, projection_floor=32),
    "library, d=64": lambda t, m: library(t, m, projection_floor=64),
    **{
        f"library, {b} bytes": (lambda t, m, b=b: library(t, m, eigen_bytes=b))
        for b in (256, 512, 1024, 1600, 2048, 4096, 8192, 16384, 32768)
    },
    "library, 8192 bytes, refine": lambda t, m: library(t, m, eigen_bytes=8192, refine=True),
    "library, unrounded": lambda t, m: library(t, m, whole=True),
    "library, unrounded, refine": lambda t, m: library(t, m, whole=True, refine=True),
    "library, without the head": lambda t, m: library(t, m, layers=NO_HEAD),
    "library, pure GGN": lambda t, m: library(t, m, curvature="ggn"),
    "library, empirical curvature": lambda t, m: library(t, m, curvature="empirical"),
    "library, random projection": lambda t, m: library(t, m, projection="random"),
    **{f"library, factors, c={c}": (lambda t, m, c=c: library(t, m, store="factors", rank=c)) for c in (1, 4)},
    "library, one probe": lambda t, m: library(t, m, sample=Sample(probes=1)),
    "library, four probes": lambda t, m: library(t, m, sample=Sample(probes=4)),
    **{f"TRAK p={p}": (lambda t, m, p=p: PEERS["trak"](t, m, proj_dim=p)) for p in (1024, 2048)},
    "EK-FAC (kronfluence)": PEERS["ekfac"],
    "EK-FAC (kronfluence), with the head": lambda t, m: PEERS["ekfac"](t, m, head=True),
    "LoGRA (dattri)": PEERS["dattri-logra"],
    "EK-FAC (bergson)": bergson_peer.ekfac,
    "EK-FAC and CG (bergson)": lambda t, m: bergson_peer.ekfac(t, m, steps=10, multiples=()),
    "TrackStar (bergson)": bergson_peer.trackstar,
}

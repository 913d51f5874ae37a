"""Coarse build: trains and fills the coarse index from what is stored, and calibrates it on known answers.

Everything is made from the stored rows, so that it can be made again without the model, and approximates exactly what
the index rescores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerGradient
from ..codecs.eigencodes import half_whitened_rows
from ..config import BuildConfig
from ..curvature.fit import LayerCurvature
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import Sketch, Whitened, fit_sketch, half_whitened, sketch_method
from ..damping import as_damping
from ..errors import ConfigError, StoreError
from ..linalg.sampling import drawn
from ..progress import Reporter, Stage
from ..ranks import ALONE, Ranks
from ..search.calibration import KS, SIGNS, Calibration, Orders, learn, loss_curve
from ..search.candidates import CandidateSearch
from ..search.coarse import TRAIN_ROWS, Coarse, NormAxis, default_factory, load_faiss
from ..search.reader import Reader
from ..search.scoring import Question, TopK, stream_scores
from ..storage.fitted import save_queries, save_sketch
from ..storage.manifest import Manifest
from ..storage.sealed import part_name
from ..storage.store import Store

TILT_QUERIES = 32
"""Queries that the tilt is chosen by."""
# Rows read together.
_BLOCK_ROWS = 512
TILTS = (0.0, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
"""Tilts that calibration chooses from."""
TRIED_KS, TRIED_RECALLS = (10, 100), (0.5, 0.8, 0.9, 0.95, 0.99)
"""Searches that calibration compares with their estimates."""


def random_positions(reader: Reader, what: str, most: int) -> tuple[np.ndarray, int]:
    """Random live rows of the whole index: sorted positions, in this rank's shards, of those that it holds, and how
    many all ranks have."""
    if reader.ranks.size == 1:
        live = reader.store.live
        chosen = np.sort(drawn(len(live), most, reader.config.seed, what, len(live)))
        return live[chosen], len(chosen)
    total = len(reader.team)
    _, local = reader.team.locally(np.sort(drawn(total, most, reader.config.seed, what, total)))
    dead = reader.store.dead
    local = local if dead is None else local[~dead[local]]
    return local, reader.ranks.count(len(local))


def make_coarse(reader: Reader, factory: str, stage: Stage) -> dict[str, Any]:
    """Trains on a random sample of the rows, adds them all, and seals the file, of each folder where there are several.

    Over several ranks rank 0 trains, all add their own rows, and the leader of each folder puts these together.

    Returns:
        the manifest's entry, of this rank's folder.

    Raises:
        ConfigError: faiss refuses the factory string for these rows, or no inner product was found in it.
    """
    ranks = reader.ranks
    positions, _ = random_positions(reader, "coarse-sample", TRAIN_ROWS)
    with ranks.jointly():
        mine = reader.coordinates(reader.store.gather(positions)).numpy()
    sample = ranks.collected(mine)
    coarse = _trained(ranks, factory, sample)
    with ranks.jointly():
        for z in reader.all_coordinates():
            coarse.add(z.numpy())
            stage.advance(len(z))
    if len(coarse) != len(reader.store):
        raise ConfigError(f"coarse={factory!r} kept {len(coarse)} of {len(reader.store)} rows: choose another")
    if ranks.size == 1:
        return reader.keep_coarse(coarse)
    return _put_together(reader, coarse)


def _trained(ranks: Ranks, factory: str, sample: list[np.ndarray]) -> Coarse:
    """An empty index on each rank, as rank 0 has trained it."""
    trained: Coarse | None = None
    with ranks.jointly():
        if ranks.first:
            trained = Coarse.train(factory, np.concatenate(sample))
    if ranks.size == 1 and trained is not None:
        return trained
    axis = ranks.told(None if trained is None or trained.axis is None else trained.axis.to_json())
    raw = torch.from_numpy(trained.to_bytes()) if trained is not None else torch.empty(0, dtype=torch.uint8)
    size = int(ranks.told(len(raw)))
    raw = ranks.spread(raw if ranks.first else torch.empty(size, dtype=torch.uint8), 0)
    return Coarse.from_bytes(raw.numpy(), factory, NormAxis.from_json(axis))


def _put_together(reader: Reader, coarse: Coarse) -> dict[str, Any]:
    """The leader of each folder seals the rows of all ranks there; the entry of this rank's folder."""
    ranks, folder = reader.ranks, reader.folder
    said = ranks.gather_values([reader.team.folder, reader.team.offset, len(reader.store)])
    sharing = sorted((offset, rank) for rank, (where, offset, _) in enumerate(said) if where == reader.team.folder)
    leader = sharing[0][1]
    with ranks.jointly():
        if ranks.rank != leader and len(reader.store):
            coarse.write(folder / _piece(ranks.rank))
    entry: dict[str, Any] | None = None
    with ranks.jointly():
        if ranks.rank == leader:
            others = [rank for _, rank in sharing[1:] if said[rank][2]]
            if not all(coarse.take(folder / _piece(rank)) for rank in others):
                # Graphs are no sum of their parts: they are made of all rows at once.
                coarse.clear()
                for z in reader.coordinates_of_folder():
                    coarse.add(z.numpy())
            for rank in others:
                (folder / _piece(rank)).unlink()
            entry = reader.keep_coarse(coarse)
    return ranks.gather_values(entry)[leader]


def _piece(rank: int) -> str:
    return part_name(f"coarse-rank-{rank}")


def position_blocks(positions: np.ndarray) -> Iterator[np.ndarray]:
    """Some hundred positions at a time: bounds memory."""
    for start in range(0, len(positions), _BLOCK_ROWS):
        yield positions[start : start + _BLOCK_ROWS]


def stored_blocks(store: Store, positions: np.ndarray) -> Iterator[GradientBlock]:
    """Stored gradients of some rows, a block at a time."""
    for part in position_blocks(positions):
        factors = store.layout.unpack(store.gather(part))
        yield GradientBlock(part, {name: LayerGradient.from_dense(f.dense()) for name, f in factors.items()})


def sketch_of_rows(reader: Reader, stage: Stage, device: torch.device) -> Sketch:
    """A sketch fitted on the stored factors or eigencodes of a random sample, where rows hold nothing else; over
    several ranks it is rank 0's."""
    curvature, store, config = reader.curvature, reader.store, reader.config
    lams = lambdas(curvature, config)
    chosen, count = random_positions(reader, "curvature-sample", config.curvature_sample)
    if reader.eigen is None:
        whitened = half_whitened(partial(stored_blocks, store, chosen), count, curvature, lams, device)
    else:
        whitened = half_whitened_rows(
            reader.eigen,
            lambda: (store.gather_factors(part) for part in position_blocks(chosen)),
            count,
            curvature,
            lams,
        )
    return new_sketch(whitened, curvature, config, stage, device, reader.ranks)


def lambdas(curvature: Mapping[str, LayerCurvature], config: BuildConfig) -> dict[str, float]:
    """Layer -> lambda of the config's damping."""
    policy = as_damping(config.damping)
    made = {n: Preconditioner.of(n, layer, policy, config.complement) for n, layer in curvature.items()}
    return {n: one.usable(n).lam for n, one in made.items()}


def new_sketch(
    whitened: Whitened,
    curvature: Mapping[str, LayerCurvature],
    config: BuildConfig,
    stage: Stage,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Sketch:
    """A sketch as the config has it (see `fit_sketch`)."""
    method = sketch_method(config.sketch, whitened.width)
    return fit_sketch(
        whitened,
        curvature,
        dim=config.sketch_dim,
        method=method,
        seed=config.seed,
        stage=stage,
        device=device,
        ranks=ranks,
    )


def stored_queries(reader: Reader, most: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Ids and gradients, as the rows have them, of random rows."""
    positions, _ = random_positions(reader, "calibration-queries", most)
    ids, specs = reader.store.ids[positions], reader.specs
    if reader.eigen is not None:
        flat = reader.eigen.dense(reader.store.gather_factors(positions), reader.curvature)
        return ids, {n: g.reshape(-1, specs[n].d_in, specs[n].d_out) for n, g in flat.items()}
    if reader.layout.groups:
        parts = reader.layout.unpack(reader.store.gather(positions))
        return ids, {name: parts[name].dense() for name in specs}
    flat = _from_coordinates(reader, torch.from_numpy(np.asarray(reader.coordinates(reader.store.gather(positions)))))
    return ids, {n: g.reshape(-1, specs[n].d_in, specs[n].d_out) for n, g in flat.items()}


def _from_coordinates(reader: Reader, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer -> (n, D) float32: the gradients V (S + lambda)^1/2 W z that coordinates stand for."""
    if reader.sketch is None:
        raise StoreError("the index has no sketch: build it anew")
    return {name: part.gradients(z, reader.curvature[name]) for name, part in reader.sketch.layers.items()}


def calibrate(reader: Reader, extra: Mapping[str, torch.Tensor] | None, stage: Stage) -> Calibration | None:
    """Learns T(k, recall) from training examples, left out of their own answers, and from sample queries if given.

    One full scan for all queries together; `None` where there are no queries. Over several ranks what is learnt is
    rank 0's.
    """
    search, queries = reader.candidates, reader.queries
    if search is None or queries is None:
        raise StoreError("the index has no coarse stage to calibrate: make one with rebuild_coarse()")
    gradients = queries.gradients()
    own = reader.positions_of(queries.ids())
    if extra is not None:
        gradients = {name: torch.cat([g, extra[name].float()]) for name, g in gradients.items()}
        own = np.concatenate([own, np.full(next(iter(extra.values())).shape[0], -1)])
    if not len(own):
        return None
    policy = as_damping(reader.config.damping)
    question = reader.ask(gradients, reader.preconditioners(reader.specs, policy))
    count, ranks = reader.live_count, reader.ranks
    # Answers beyond a tenth of the rows are no search.
    most = max(min(KS[-1], count // 10), 1)
    tops = {sign: TopK(question.count, min(most + 1, count), largest=sign == SIGNS[0]) for sign in SIGNS}
    stage.total = (stage.total or 0) + count
    with ranks.jointly():
        for positions, scores, size in stream_scores(reader.rows, question):
            for top in tops.values():
                top.update(positions, scores)
            stage.advance(scores.shape[1], size)
    bare = CandidateSearch(reader.rescorer, reader.proposer, None)
    orders = {}
    for sign, top in tops.items():
        largest = sign == SIGNS[0]
        found, scored = (part.numpy() for part in top.result())
        mine = (reader.team.globally(found), scored)
        best, _ = reader.team.best(lambda mine=mine: mine, min(most + 1, count), largest=largest)  # type: ignore[misc]
        answers = _without(best, own, most)
        # Processors of different makes may round differently: what decides is rank 0's.
        tilt = ranks.told(_best_tilt(bare, question, answers, largest=largest))
        coarse, fine = (
            ranks.spread(torch.from_numpy(part), 0).numpy()
            for part in _ranks(bare, question, answers, own, tilt, largest=largest)
        )
        learnt = learn(coarse, fine if bare.layout.narrows else None, bare.limit)
        orders[sign] = _corrected(dataclasses.replace(learnt, tilt=tilt), bare, question, answers, own, largest=largest)
    return Calibration(orders, question.count, count, bare.limit, policy.to_json())


def _without(positions: np.ndarray, own: np.ndarray, most: int) -> np.ndarray:
    """The first `most` of each row of positions, leaving out the query's own."""
    out = np.empty((len(positions), most), dtype=np.int64)
    for i, row in enumerate(positions):
        kept = row[row != own[i]][:most]
        # Where rows are so few that one is lacking, the last stands for it.
        out[i] = np.pad(kept, (0, most - len(kept)), mode="edge")
    return out


def _best_tilt(search: CandidateSearch, question: Question, answers: np.ndarray, *, largest: bool) -> float:
    """The tilt under which answers stand first in the coarse order: by the depths that hold most of the 10 and of the
    100 best, over some of the queries."""
    if not search.tilts:
        return 0.0
    question = question.some(slice(0, TILT_QUERIES))
    answers = answers[: question.count]
    costs = []
    for tilt in TILTS:
        order = search.order(question, search.limit, tilt, largest=largest)
        places = np.stack([_places(row, best) for row, best in zip(order, answers, strict=True)])
        depths = [np.quantile(places[:, :k], (0.95, 0.99)) for k in (10, 100)]
        costs.append(float(np.log1p(depths).sum()))
    return TILTS[int(np.argmin(costs))]


def _places(order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(m,) where each of some positions stands in an order of positions; its length where it is not there."""
    if not len(order):
        return np.zeros(len(wanted), dtype=np.int64)
    by_position = np.argsort(order, kind="stable")
    ranked = order[by_position]
    at = np.minimum(np.searchsorted(ranked, wanted), len(order) - 1)
    return np.where(ranked[at] == wanted, by_position[at], len(order))


def _ranks(
    search: CandidateSearch, question: Question, answers: np.ndarray, own: np.ndarray, tilt: float, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(q, m) each: rank of each answer by coarse order, `limit` where it is not among the first, and by coordinates
    among the rows that the coarse order proposes; the query's own row not counted."""
    limit = search.limit
    coarse, fine = np.full(answers.shape, limit, dtype=np.int64), np.zeros(answers.shape, dtype=np.int64)
    for q in range(question.count):
        one = question.some(slice(q, q + 1))
        positions = search.order(one, limit, tilt, largest=largest)[0]
        positions = positions[(positions >= 0) & (positions != own[q])]
        places = _places(positions, answers[q])
        coarse[q] = np.where(places < len(positions), places, limit)
        if search.layout.narrows:
            proposed, mine = (
                search.by_coordinates(one, rows, tilt, largest=largest) for rows in (positions, answers[q])
            )
            proposed.sort()
            # How many of the proposed score higher.
            fine[q] = len(proposed) - np.searchsorted(proposed, mine, side="right")
    return coarse, fine


def _corrected(
    orders: Orders, search: CandidateSearch, question: Question, answers: np.ndarray, own: np.ndarray, *, largest: bool
) -> Orders:
    """The tables with what is to be corrected in estimates, from searches at several depths without going on."""
    losses = []
    for k in [k for k in orders.ks if k in TRIED_KS] or [orders.ks[-1]]:
        estimated, real = [], []
        for recall in TRIED_RECALLS:
            if orders.needed(k, recall) is None:
                # Beyond what was followed: there a search takes all that it may.
                continue
            counts = search.counts_by(orders, k, recall)
            for start in range(0, question.count, search.together):
                part = slice(start, start + search.together)
                found = search.trial(
                    question.some(part), k, largest=largest, counts=counts, tilt=orders.tilt, without=own[part]
                )
                pairs = zip(found.positions, answers[part], strict=True)
                kept = [len(np.intersect1d(row, answer[:k])) for row, answer in pairs]
                estimated.append(1.0 - found.recall)
                real.append(1.0 - np.array(kept) / k)
        if estimated:
            # Where a group lost nothing, it could not have shown less than half an answer.
            least = 0.5 / (k * question.count)
            curve = loss_curve(np.concatenate(estimated), np.concatenate(real), least)
            losses += [(k, lost, gone) for lost, gone in curve]
    return dataclasses.replace(orders, losses=tuple(losses))


def rebuild(
    reader: Reader, factory: str, report: Reporter, extra: Mapping[str, torch.Tensor] | None = None
) -> Manifest:
    """A coarse index made anew, calibrated (also on `extra` queries, as in `calibrate`), and committed.

    Raises:
        ConfigError: as in `make_coarse`, or faiss is not installed.
    """
    load_faiss()
    manifest = reader.manifest
    if manifest.sketch is None:
        with report.stage("sketch") as stage:
            manifest = dataclasses.replace(manifest)
            sketch = sketch_of_rows(reader, stage, torch.device("cpu"))
        manifest.sketch = save_sketch(reader.folder, sketch, manifest.new_name("sketch"))
        reader = Reader(reader.folder, manifest)
    fresh = dataclasses.replace(manifest, calibration=None, config=manifest.config | {"coarse": factory})
    if factory == "auto":
        factory = default_factory(reader.sketch.dim, reader.live_count)  # type: ignore[union-attr]
    if fresh.queries is None:
        ids, gradients = stored_queries(reader, reader.config.calibration_queries)
        fresh.queries = save_queries(reader.folder, ids, gradients, fresh.new_name("calibration"))
    with report.stage("coarse", len(reader.store)) as stage:
        fresh.coarse = make_coarse(reader, factory, stage)
    return recalibrate(Reader(reader.folder, fresh), extra, report)


def recalibrate(reader: Reader, extra: Mapping[str, torch.Tensor] | None, report: Reporter) -> Manifest:
    """The manifest with a calibration learnt anew, committed."""
    with report.stage("calibrate") as stage:
        learnt = calibrate(reader, extra, stage)
    fresh = dataclasses.replace(reader.manifest, calibration=learnt.to_json() if learnt is not None else None)
    fresh.commit(reader.folder)
    return fresh

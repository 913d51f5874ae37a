"""Candidates: makes what proposes candidates from the stored rows, and calibrates it on known answers.

Sketch, calibration queries, coarse codes and calibration are made by one function, of a build that is under way and of
an index that is changed alike. All but the queries are made from what is stored, so that they can be made again without
the model, and approximate exactly what the index scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codecs.base import Transformed
from ..config import BuildConfig
from ..curvature.fit import LayerCurvature
from ..curvature.inverse import inverses, lambdas
from ..curvature.sketch import Named, Sketch, fit_sketch, sketch_method
from ..damping import Damping
from ..linalg.scratch import CPU
from ..progress import Stage
from ..search.calibration import KS, SIGNS, Calibration, Orders, learn, loss_curve
from ..search.candidates import CandidateSearch
from ..search.coarse import TRAIN_ROWS, Coarse, Codes, NormAxis, coarse_fingerprint, faiss_is_installed, load_faiss
from ..search.planner import SCAN_UP_TO
from ..search.reader import ask, policy_for, proposer_of
from ..search.rows import IndexRows
from ..search.scoring import Question, TopK, stream_scores
from ..storage.fitted import CalibrationQueries, load_sketch, query_bytes, save_queries, save_sketch
from ..storage.manifest import Manifest
from ..storage.sealed import part_name
from .state import Publish

COARSE_FROM = SCAN_UP_TO + 1
"""Below so many rows searches scan all of them, and "auto" makes no coarse index."""
QUERY_BYTES = 256 << 20
"""Calibration queries of large models are fewer, so that their file takes no more than this."""
TILT_QUERIES = 32
"""Queries that the tilt is chosen by."""
TILTS = (0.0, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
"""Tilts that calibration chooses from."""
_LOOKED_AT = 512
"""Rows by which a shortened one's share of the whole is measured."""
TRIED_KS, TRIED_RECALLS = (10, 100), (0.5, 0.8, 0.9, 0.95, 0.99)
"""Searches that calibration compares with their estimates."""

Queries = tuple[np.ndarray, dict[str, torch.Tensor]]
"""Ids (m,) of training examples, and layer -> their gradients (m, d_in, d_out) float32."""


def wants_coarse(config: BuildConfig, count: int) -> bool:
    """Whether an index of `count` rows gets a coarse index."""
    if config.coarse.kind == "auto":
        return count >= COARSE_FROM and faiss_is_installed()
    return bool(config.coarse.kind != "none")


def query_count(config: BuildConfig, each: int, count: int) -> int:
    """Calibration queries of so many bytes that are kept, of `count` examples."""
    return min(config.coarse.queries, max(QUERY_BYTES // each, 1), count)


@dataclass(frozen=True)
class Making:
    """What candidates are made with.

    Attributes:
        folder: of this rank.
        manifest: what is absent in it is made: the fits "sketch" and "queries", the coarse index, the calibration.
        config: the choices.
        curvature: layer -> fitted curvature.
        rows: those of the index.
        publish: seals what was fitted.
        stage: begins a stage of the work.
        queries: gives so many calibration queries, the same on all ranks; None: what stored rows stand for.
        extra: layer -> (m, d_in, d_out) gradients of further queries to calibrate with, or None.
        name: gives the coarse file's name.
        note: writes down how far the work is.
        device: where the sketch's products are computed.
    """

    folder: Path
    manifest: Manifest
    config: BuildConfig
    curvature: Mapping[str, LayerCurvature]
    rows: IndexRows
    publish: Publish
    stage: Callable[[str, int | None], AbstractContextManager[Stage]]
    queries: Callable[[int], Queries] | None = None
    extra: Mapping[str, torch.Tensor] | None = None
    name: Callable[[], str] = lambda: "coarse.h5"
    note: Callable[[], None] = lambda: None
    device: torch.device = CPU

    @property
    def by_name(self) -> bool:
        """Whether shortened rows propose candidates, in place of a sketch's coordinates."""
        return self.config.coarse.by_name and self.rows.codec.short_entries > 0

    @property
    def policy(self) -> Damping:
        """The damping of searches."""
        return policy_for(self.manifest, self.rows.codec, self.config.damping)

    @property
    def asks(self) -> int:
        """How many calibration queries there are to be."""
        each = query_bytes({spec.name: spec for spec in self.manifest.layers})
        return query_count(self.config, each, self.rows.live_count)


def make_candidates(making: Making) -> None:
    """Makes what is absent of sketch, queries, coarse index and calibration. Over several ranks all call this: rank 0
    learns, all encode their own rows, and the leader of each folder puts these together.

    Raises:
        ConfigError: faiss is not installed. CurvatureError: all rows are zero.
    """
    manifest, rows, ranks = making.manifest, making.rows, making.rows.ranks
    with ranks.jointly():
        load_faiss()
    if "sketch" in manifest.fits and (manifest.fits["sketch"]["method"] == Named.method) != making.by_name:
        # Another kind is asked for.
        del manifest.fits["sketch"]
        manifest.coarse = manifest.calibration = None
    if "sketch" not in manifest.fits:
        with making.stage("sketch", None) as stage:
            fitted = _sketch(making, stage)
        making.publish("sketch", lambda name: save_sketch(making.folder, name, fitted))
    if "queries" not in manifest.fits:
        with making.stage("queries", None):
            ids, gradients = making.queries(making.asks) if making.queries else stored_queries(rows, making.asks)
        making.publish("queries", lambda name: save_queries(making.folder, name, ids, gradients))
    sketch = load_sketch(making.folder, manifest.fits["sketch"], {spec.name: spec for spec in manifest.layers})
    if manifest.coarse is None:
        with making.stage("coarse", len(rows.store)) as stage:
            manifest.coarse = _codes(making, sketch, stage)
        making.note()
    if manifest.calibration is None:
        with making.stage("calibration", None) as stage:
            learnt = _calibrate(making, sketch, stage)
        manifest.calibration = ranks.told(None if learnt is None else learnt.to_json())
        making.note()


def _sketch(making: Making, stage: Stage) -> Sketch | Named:
    """A sketch fitted on a random sample of the stored rows; over several ranks it is rank 0's."""
    rows, config = making.rows, making.config
    if making.by_name:
        positions, _ = rows.drawn("coarse-sample", _LOOKED_AT)
        with rows.ranks.jointly():
            return rows.codec.named(rows.store.gather(positions))
    lams = lambdas(making.curvature, making.policy)
    chosen, count = rows.drawn("curvature-sample", config.sample.size)
    whitened = rows.codec.whitened(lambda: rows.blocks(chosen), count, lams, making.device)
    return fit_sketch(
        whitened,
        making.curvature,
        dim=config.coarse.dim,
        method=sketch_method(config.coarse.sketch, whitened.width),
        seed=config.seed,
        stage=stage,
        device=making.device,
        ranks=rows.ranks,
    )


def stored_queries(rows: IndexRows, most: int) -> Queries:
    """Ids and gradients, as the rows have them, of random rows."""
    positions, _ = rows.drawn("calibration-queries", most)
    found = {name: g.dense() for name, g in rows.codec.gradients(rows.store.gather(positions)).items()}
    return rows.store.ids[positions], found


def _codes(making: Making, sketch: Sketch | Named, stage: Stage) -> dict[str, Any]:
    """Learns codebooks on a random sample, encodes all rows, and seals the file, of each folder if there are several.

    Returns:
        the manifest's entry, of this rank's folder.
    """
    rows, ranks = making.rows, making.rows.ranks
    if isinstance(sketch, Named):
        codes = Codes.named(sketch.dim, sketch.entries)
    else:
        positions, _ = rows.drawn("coarse-sample", TRAIN_ROWS)
        with ranks.jointly():
            mine = rows.codec.sketcher(sketch)(rows.store.gather(positions)).numpy()
        codes = _trained(making, ranks.collected(mine), sketch.dim)
    parts = [codes.rows]
    with ranks.jointly():
        for z in rows.coordinates(sketch):
            parts.append(codes.encode(z.numpy()))
            stage.advance(len(z))
    return _put_together(making, codes.with_rows(np.concatenate(parts)))


def _trained(making: Making, sample: list[np.ndarray], dim: int) -> Codes:
    """Codebooks on each rank, as rank 0 has learnt them."""
    ranks, trained = making.rows.ranks, None
    kind = "auto" if making.config.coarse.kind == "none" else making.config.coarse.kind
    with ranks.jointly():
        if ranks.first:
            trained = Codes.train(kind, np.concatenate(sample))
    if ranks.size == 1 and trained is not None:
        return trained
    facts = None
    if trained is not None:
        axis = None if trained.axis is None else trained.axis.to_json()
        facts = [axis, list(trained.books.shape), trained.rows.shape[1], str(trained.rows.dtype)]
    axis, shape, width, kept = ranks.told(facts)
    books = torch.from_numpy(trained.books) if trained is not None else torch.empty(shape)
    books = ranks.spread(books.contiguous(), 0)
    return Codes(dim, NormAxis.from_json(axis), books.numpy(), np.empty((0, width), kept))


def save_codes(folder: Path, name: str, manifest: Manifest, codes: Codes) -> dict[str, Any]:
    """Seals the codes of all rows of a folder; the manifest's entry, which says what they were made from."""
    return codes.save(folder, name) | {"fingerprint": coarse_fingerprint(manifest)}


def _put_together(making: Making, codes: Codes) -> dict[str, Any]:
    """The leader of each folder seals the codes of all ranks there; the entry of this rank's folder."""
    rows, ranks, folder, name = making.rows, making.rows.ranks, making.folder, making.name()
    if ranks.size == 1:
        return save_codes(folder, name, making.manifest, codes)
    said = ranks.gather_values([rows.team.folder, rows.team.offset, len(rows.store)])
    sharing = sorted((offset, rank) for rank, (where, offset, _) in enumerate(said) if where == rows.team.folder)
    leader, others = sharing[0][1], [rank for _, rank in sharing[1:] if said[rank][2]]
    with ranks.jointly():
        if ranks.rank in others:
            codes.rows.tofile(folder / _piece(ranks.rank))
    entry: dict[str, Any] | None = None
    with ranks.jointly():
        if ranks.rank == leader:
            kept, width = codes.rows.dtype, codes.rows.shape[1]
            parts = [np.fromfile(folder / _piece(rank), dtype=kept).reshape(-1, width) for rank in others]
            entry = save_codes(folder, name, making.manifest, codes.with_rows(np.concatenate([codes.rows, *parts])))
            for rank in others:
                (folder / _piece(rank)).unlink()
    return ranks.gather_values(entry)[leader]


def _piece(rank: int) -> str:
    return part_name(f"coarse-rank-{rank}")


def _calibrate(making: Making, sketch: Sketch | Named, stage: Stage) -> Calibration | None:
    """Learns T(k, recall) from training examples, left out of their own answers, and from further queries if given.

    One full scan for all queries together; `None` where there are no queries. Over several ranks what is learnt is
    rank 0's.
    """
    rows, manifest, policy = making.rows, making.manifest, making.policy
    specs = {spec.name: spec for spec in manifest.layers}
    queries = CalibrationQueries(making.folder, manifest.fits["queries"], specs)
    gradients, own = queries.gradients(), rows.positions_of(queries.ids())
    queries.file.close()
    if making.extra is not None:
        gradients = {name: torch.cat([g, making.extra[name].float()]) for name, g in gradients.items()}
        own = np.concatenate([own, np.full(next(iter(making.extra.values())).shape[0], -1)])
    if not len(own):
        return None
    preconditioners = inverses(making.curvature, policy)
    question = ask(rows.codec, sketch, Transformed.of(gradients, preconditioners, making.curvature))
    count, ranks, team = rows.live_count, rows.ranks, rows.team
    coarse = Coarse(Codes.load(making.folder, manifest.coarse, team.own))
    search = CandidateSearch(rows.rescorer, proposer_of(rows, coarse, sketch), None)
    # Answers beyond a tenth of the rows are no search.
    most = max(min(KS[-1], count // 10), 1)
    tops = {sign: TopK(question.count, min(most + 1, count), largest=sign == SIGNS[0]) for sign in SIGNS}
    stage.total = (stage.total or 0) + count
    scorer = rows.codec.scorer(question.parts, rows.device)
    with ranks.jointly():
        for positions, scores, size in stream_scores(rows.resident, scorer, question):
            for top in tops.values():
                top.update(positions, scores)
            stage.advance(scores.shape[1], size)
    orders = {}
    for sign, top in tops.items():
        largest = sign == SIGNS[0]
        found, scored = (part.numpy() for part in top.result())
        mine = (team.globally(found), scored)
        best, _ = team.best(lambda mine=mine: mine, min(most + 1, count), largest=largest)  # type: ignore[misc]
        answers = _without(best, own, most)
        # Processors of different makes may round differently: what decides is rank 0's.
        tilt = ranks.told(_best_tilt(search, question, answers, largest=largest))
        places = torch.from_numpy(_coarse_places(search, question, answers, own, tilt, largest=largest))
        learnt = dataclasses.replace(learn(ranks.spread(places, 0).numpy(), search.limit), tilt=tilt)
        orders[sign] = _corrected(learnt, search, question, answers, own, largest=largest)
    return Calibration(orders, question.count, count, search.limit, policy.to_json())


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


def _coarse_places(
    search: CandidateSearch, question: Question, answers: np.ndarray, own: np.ndarray, tilt: float, *, largest: bool
) -> np.ndarray:
    """(q, m) int64: place of each answer in the coarse order, `limit` where it is not among the first; the query's own
    row is not counted."""
    limit = search.limit
    out = np.full(answers.shape, limit, dtype=np.int64)
    for q in range(question.count):
        positions = search.order(question.some(slice(q, q + 1)), limit, tilt, largest=largest)[0]
        positions = positions[(positions >= 0) & (positions != own[q])]
        places = _places(positions, answers[q])
        out[q] = np.where(places < len(positions), places, limit)
    return out


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
            wide = search.count_by(orders, k, recall)
            for start in range(0, question.count, search.together):
                part = slice(start, start + search.together)
                found = search.trial(
                    question.some(part), k, largest=largest, wide=wide, tilt=orders.tilt, without=own[part]
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

"""Planner: whether a search scans, rescores candidates or answers from the coarse index alone; and the three ways.

A plan always says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch

from ..damping import Damping, damping_from_json
from ..errors import QueryError
from ..progress import Reporter
from .reader import Reader
from .scoring import Question, TopK, stream_scores
from .shrinkage import shrink

# Below so many rows a scan takes a few milliseconds, and is always right.
SCAN_UP_TO = 10_000
# What a candidate costs beside its bytes, to be read by itself, counted in bytes that a scan gets through meanwhile.
_GATHER_BYTES = 6000


@dataclass(frozen=True)
class Plan:
    """How a search will be done.

    Attributes:
        way: "scan", "candidates" or "coarse".
        reason: in words.
        recall: asked for.
    """

    way: str
    reason: str
    recall: float


@dataclass
class Answer:
    """Positions (q, k) int64, scores (q, k) float32, candidates (q,) and estimated recall (q,), bytes, seconds."""

    positions: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray
    recall: np.ndarray
    bytes_read: int
    seconds: dict[str, float] = field(default_factory=dict)


def choose_plan(
    reader: Reader,
    *,
    k: int,
    recall: float,
    largest: bool,
    rescore: bool,
    exact: bool | None,
    all_layers: bool,
    damping: Damping,
    normalize: str | None = None,
) -> Plan:
    """The way to answer.

    Args:
        reader: the index.
        k: at most the number of rows.
        recall: asked for.
        largest: proponents are wanted, or opponents.
        rescore: False asks for coarse scores.
        exact: True for a scan, False for candidates, None to choose.
        all_layers: the query counts every layer.
        damping: the query's.
        normalize: scores are to be normalised, which takes every row; None: as they are.

    Raises:
        QueryError: the index cannot do what was asked for.
    """
    if normalize is not None:
        if exact is False or not rescore:
            raise QueryError(f"normalize={normalize!r} scans every row: leave exact=False or rescore=False out")
        return Plan("scan", f"scan of every row, for normalize={normalize!r}", 1.0)
    has_coarse = reader.manifest.coarse is not None
    if not rescore:
        if not has_coarse:
            raise QueryError(
                "rescore=False answers from the coarse index, and this index has none: make one with rebuild_coarse()"
            )
        return Plan("coarse", "coarse scores, as asked by rescore=False", recall)
    if exact is False:
        if not has_coarse:
            raise QueryError("exact=False, but this index has no coarse stage: make one with rebuild_coarse()")
        return Plan("candidates", f"candidates, as asked by exact=False{_caveat(reader, damping)}", recall)
    count = reader.live_count
    if exact:
        return Plan("scan", "scan of every row, as asked by exact=True", 1.0)
    if not has_coarse:
        return Plan("scan", "scan of every row, as there is no coarse stage", 1.0)
    if recall >= 1:
        return Plan("scan", "scan of every row: nothing less is certain of recall=1", 1.0)
    if count <= SCAN_UP_TO:
        return Plan("scan", f"scan of every row: quick enough for {count:,}", 1.0)
    if not all_layers:
        return Plan("scan", "scan of every row: the coarse stage is calibrated for all layers together", 1.0)
    search = reader.candidates
    if search is None:
        return Plan("scan", "scan of every row, as there is no coarse stage", 1.0)
    if not search.reaches(k, recall, largest=largest):
        return Plan(
            "scan",
            f"scan of every row: calibration found no number of candidates, of up to {search.limit:,}, that reaches "
            f"recall={recall:g} at k={k:,}",
            1.0,
        )
    wide, row_bytes = search.first_count(k, recall, largest=largest), reader.codec.row_bytes
    if wide * (row_bytes + _GATHER_BYTES) >= count * row_bytes:
        return Plan("scan", f"scan of every row: {wide:,} candidates of {count:,} rows would cost as much", 1.0)
    return Plan("candidates", f"candidates of the coarse index, rescored{_caveat(reader, damping)}", recall)


def _caveat(reader: Reader, damping: Damping) -> str:
    """What calibration cannot speak for."""
    search = reader.candidates
    if search is None or search.calibration is None:
        return "; never calibrated: their number is a guess, and their recall is estimated from this search alone"
    learnt = search.calibration.damping
    if learnt == damping.to_json():
        return ""
    return (
        f"; calibrated under {damping_from_json(learnt)}, not under {damping}: further from that, recall takes more "
        "candidates, and is estimated from this search alone"
    )


def scan(reader: Reader, question: Question, report: Reporter) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(positions (m,), scores (q, m), bytes read) of the live rows of every block that this rank holds."""
    with report.stage("scan", reader.store.live_count) as stage:
        resident = reader.rows.resident
        scorer = reader.codec.scorer(question.parts, resident.device)
        for positions, scores, size in stream_scores(resident, scorer, question):
            if question.thresholds is not None:
                shrink(scores, question.thresholds)
            yield positions, scores, size
            stage.advance(scores.shape[1], size)


def _by_scan(
    reader: Reader, question: Question, plan: Plan, k: int, largest: bool, report: AbstractContextManager[Reporter]
) -> Answer:
    read, began = 0, time.perf_counter()

    def find() -> tuple[np.ndarray, np.ndarray]:
        nonlocal read
        top = TopK(question.count, k, largest=largest)
        with report as opened:
            for at, scores, size in scan(reader, question, opened):
                top.update(at, scores)
                read += size
        mine, scored = top.result()
        return reader.rows.team.globally(mine.numpy()), scored.numpy()

    positions, best = reader.rows.team.best(find, k, largest=largest)
    examined, certain = np.full(question.count, reader.live_count), np.ones(question.count)
    seconds = {"scan": time.perf_counter() - began}
    return Answer(positions, best, examined, certain, read, seconds)


def _by_candidates(
    reader: Reader, question: Question, plan: Plan, k: int, largest: bool, report: AbstractContextManager[Reporter]
) -> Answer:
    search = reader.candidates
    if search is None:
        raise QueryError("the index has no coarse stage: make one with rebuild_coarse()")
    wide = search.first_count(k, plan.recall, largest=largest)
    parts = []
    with report as opened, opened.stage("search", question.count) as stage:
        for start in range(0, question.count, search.together):
            some = question.some(slice(start, start + search.together))
            parts.append(search.run(some, k, plan.recall, largest=largest, wide=wide))
            stage.advance(some.count, parts[-1].bytes_read)
    seconds = {name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds}
    read = sum(part.bytes_read for part in parts)
    positions, scores, candidates, recall = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("positions", "scores", "candidates", "recall")
    )
    if reader.ranks.size > 1:
        # Estimates as rank 0 has them.
        recall = reader.ranks.spread(torch.from_numpy(recall), 0).numpy()
    return Answer(positions, scores, candidates, recall, read, seconds)


def _by_coarse(
    reader: Reader, question: Question, plan: Plan, k: int, largest: bool, report: AbstractContextManager[Reporter]
) -> Answer:
    search = reader.candidates
    if search is None:
        raise QueryError("the index has no coarse stage: make one with rebuild_coarse()")
    began = time.perf_counter()
    positions, scores, recall = search.coarse_only(question, k, largest=largest)
    seconds = {"coarse": time.perf_counter() - began}
    return Answer(positions, scores, np.zeros(question.count, np.int64), np.full(question.count, recall), 0, seconds)


Way = Callable[[Reader, Question, Plan, int, bool, AbstractContextManager[Reporter]], Answer]
ANSWERS: dict[str, Way] = {"scan": _by_scan, "candidates": _by_candidates, "coarse": _by_coarse}
"""Way -> the function that goes it."""

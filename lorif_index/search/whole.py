"""Whole: what is said of every row, in the order of ids: exact scores, and self-influence."""

from __future__ import annotations

import numpy as np

from ..damping import Damping
from ..errors import QueryError
from ..progress import Reporter
from .planner import scan
from .reader import Reader
from .scoring import Question

# Of scores that ranks send each other at once.
_GATHERED_BYTES = 64 << 20


def in_order(reader: Reader, values: np.ndarray) -> np.ndarray:
    """(n, ...) of all ranks, in the order of ids, of (m, ...) for the live rows that this rank holds."""
    ranks = reader.ranks
    if ranks.size == 1:
        return values
    order = np.argsort(np.concatenate(ranks.gather(reader.store.live_ids)), kind="stable")
    return np.concatenate(ranks.gather(values))[order]


def all_scores(
    reader: Reader, question: Question, out: np.ndarray | None, report: Reporter, *, gather: bool
) -> np.ndarray:
    """Exact scores of every row, (q, n) float32, or of the rows that this rank holds, (q, m).

    Args:
        reader: the index.
        question: to the rows; its thresholds shrink scores.
        out: what to write to, or None.
        report: is told.
        gather: the scores of all ranks' rows, on each rank.

    Raises:
        QueryError: an `out` of another shape or dtype.
    """
    held = reader.store.live_count
    shape = (question.count, reader.live_count if gather else held)
    if out is None:
        out = np.empty(shape, dtype=np.float32)
    elif getattr(out, "shape", None) != shape or getattr(out, "dtype", None) != np.float32:
        got = f"{out.shape} {out.dtype}" if hasattr(out, "shape") and hasattr(out, "dtype") else type(out).__name__
        raise QueryError(f"out must be {shape} float32, got {got}")
    whole = reader.ranks.size > 1 and gather
    mine = np.empty((question.count, held), dtype=np.float32) if whole else out
    with reader.ranks.jointly():
        at = 0
        for _, scores, _ in scan(reader, question, report):
            mine[:, at : at + scores.shape[1]] = scores.cpu().numpy()
            at += scores.shape[1]
    if whole:
        # Some questions at a time: nobody holds the whole twice.
        step = max(_GATHERED_BYTES // (4 * max(reader.live_count, 1)), 1)
        for start in range(0, question.count, step):
            out[start : start + step] = in_order(reader, mine[start : start + step].T).T
    return out


def self_influence(reader: Reader, policy: Damping, chosen: tuple[str, ...], report: Reporter) -> np.ndarray:
    """g^T H^-1 g, (m,) float32, of the live rows that this rank holds; of several models the mean over them."""
    preconditioners, members, store = reader.preconditioners(chosen, policy), reader.manifest.members, reader.store
    out = np.empty(store.live_count, dtype=np.float32)
    dead, at = store.dead, 0
    with report.stage("scan", store.live_count) as stage, reader.ranks.jointly():
        for start, rows in store.stream():
            own = reader.codec.self_influence(rows, preconditioners) / members
            alive = own.numpy() if dead is None else own.numpy()[~dead[start : start + len(rows)]]
            out[at : at + len(alive)] = alive
            at += len(alive)
            stage.advance(len(alive), rows.numel())
    return out

"""Select: which training examples to take for several questions together: by turns, by sums, or against redundancy.

"greedy" grows a set S by the example that brings the sum of its gradients closest to that of the questions, by the
cosine in H^-1's inner product,

    sum_S <q, g_i> / sqrt(sum_S sum_S <g_i, g_j>),    <a, b> = a^T H^-1 b:

an example like those that are there adds to the root as much as to the sum, and one that says something else, less.
(Matching a target's gradient by a subset's: GRAD-MATCH, Killamsetty et al., arXiv:2103.00123, with weights there.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..codecs.base import Transformed
from ..damping import Damping
from ..errors import QueryError
from ..progress import Reporter
from .planner import scan
from .reader import Reader
from .scoring import Question, TopK

METHODS = ("round-robin", "sum", "greedy")
# Examples of the largest sums that a greedy selection is made of, for each that it takes.
_POOL = 4
# Rows whose gradients are asked about the others together.
_TOGETHER = 64


@dataclass(frozen=True)
class Picked:
    """What was chosen.

    Attributes:
        places: (n,) int64 into the rows that there were, in the order in which they were taken.
        scores: (n,) float32: of the question that took each, or their sums.
        question_of: (n,) int64: which question took each.
        exhausted: questions that had no example left that lowers their loss when it was their turn.
        ties: how often another example had the very score of the one that was taken.
    """

    places: np.ndarray
    scores: np.ndarray
    question_of: np.ndarray
    exhausted: list[int]
    ties: int


def check_select(n: int, method: str, live: int) -> None:
    """Refuses what cannot be chosen.

    Raises:
        QueryError: no such method; n is no count, or more than there are.
    """
    if method not in METHODS:
        raise QueryError(f"method must be one of {METHODS}, got {method!r}")
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= live:
        raise QueryError(f"n must be an integer from 1 to the index's {live:,} examples, got {n!r}")


def by_turns(positions: np.ndarray, scores: np.ndarray, n: int) -> Picked:
    """Each question in turn takes its best example that is not taken yet ("round-robin", arXiv:2602.14696).

    Args:
        positions, scores: (q, at least n) of the questions' best, falling.
        n: how many to take.
    """
    queries = len(positions)
    at, taken = [0] * queries, set[int]()
    found: list[tuple[int, float, int]] = []
    exhausted, ties = dict[int, None](), 0
    while len(found) < n:
        for q in range(queries):
            row = positions[q]
            while int(row[at[q]]) in taken:
                at[q] += 1
            place = at[q]
            if scores[q, place] <= 0:
                exhausted[q] = None
            after = next((i for i in range(place + 1, len(row)) if int(row[i]) not in taken), place)
            ties += int(after > place and scores[q, after] == scores[q, place])
            taken.add(int(row[place]))
            found.append((int(row[place]), float(scores[q, place]), q))
            if len(found) == n:
                break
    places, its, question_of = (np.array(column) for column in zip(*found, strict=True))
    return Picked(places, its.astype(np.float32), question_of, sorted(exhausted), ties)


def select(reader: Reader, question: Question, n: int, method: str, policy: Damping, report: Reporter) -> Picked:
    """What a method takes of an index's rows.

    Args:
        reader: the index; one process holds all of it.
        question: the questions.
        n, method: as `check_select` has found them.
        policy: the damping.
        report: is told.
    """
    if method == "round-robin":
        top = TopK(question.count, n)
        for at, scores, _ in scan(reader, question, report):
            top.update(at, scores)
        positions, best = (part.numpy() for part in top.result())
        return by_turns(positions, best, n)
    wide = n if method == "sum" else min(_POOL * n, reader.live_count)
    # One more, by which ties with what is left are seen.
    top = TopK(1, min(wide + 1, reader.live_count))
    for at, scores, _ in scan(reader, question, report):
        top.update(at, scores.sum(dim=0, keepdim=True))
    positions, sums = (part[0].numpy() for part in top.result())
    ties = int((sums[1 : n + 1] == sums[:n][: len(sums) - 1]).sum()) if method == "sum" else 0
    positions, sums = positions[:wide], sums[:wide]
    rows = reader.store.gather(positions)
    if method == "greedy":
        order = against_redundancy(reader, rows, sums, n, policy, report)
        positions, sums, rows = positions[order], sums[order], rows[torch.from_numpy(order)]
    each = scores_of(reader, question, rows)
    exhausted = list(range(question.count)) if float(sums.min()) <= 0 else []
    return Picked(positions, sums.astype(np.float32), each.argmax(axis=0), exhausted, ties)


def scores_of(reader: Reader, question: Question, rows: torch.Tensor) -> np.ndarray:
    """(q, m) float32 of some stored rows (m, row_bytes)."""
    return reader.codec.scorer(question.parts, torch.device("cpu")).score(rows).cpu().numpy().copy()


def against_redundancy(
    reader: Reader, rows: torch.Tensor, sums: np.ndarray, n: int, policy: Damping, report: Reporter
) -> np.ndarray:
    """(n,) places among some rows, in the order in which a greedy selection takes them.

    Args:
        reader: the index.
        rows: (m, row_bytes), of the largest sums.
        sums: (m,) of their scores over the questions.
        n: how many to take.
        policy: the damping.
        report: is told of every row.
    """
    preconditioners = reader.preconditioners(tuple(reader.specs), policy)
    products = np.empty((len(rows), len(rows)), dtype=np.float32)
    with report.stage("redundancy", len(rows)) as stage:
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            gradients = {name: g.dense() for name, g in reader.codec.gradients(some).items()}
            asked = reader.ask(Transformed.of(gradients, preconditioners, reader.curvature))
            products[start : start + len(some)] = scores_of(reader, asked, rows)
            stage.advance(len(some))
    inner = (products.astype(np.float64) + products.T) / 2
    own, total, among, square = np.maximum(np.diag(inner), 0.0), 0.0, np.zeros(len(rows)), 0.0
    left, found = np.ones(len(rows), dtype=bool), []
    for _ in range(n):
        norms = np.sqrt(np.maximum(square + 2 * among + own, 1e-30 + 1e-6 * own.max()))
        values = np.where(left, (total + sums) / norms, -np.inf)
        best = int(values.argmax())
        found.append(best)
        left[best] = False
        total, square = total + float(sums[best]), float(square + 2 * among[best] + own[best])
        among = among + inner[best]
    return np.array(found, dtype=np.int64)

"""Rerank: the best hits by rows, computed again with the model, and put in order by the scores of whole gradients.

A row stands for a gradient that was cut and rounded. The T best by rows are few, so that their gradients G_i can be
taken whole, in the same projections: <x, G_i> with x = H^-1 g_q is the score that no row has touched.

Two things keep an example out of such an answer. The search may not have found it among the T best by rows: its own
estimate of recall says how often. Or its row scores it too low to be among them, and how many such there are is
estimated from the T (`missed_by_rows`). The estimated recall of both is the product of the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..capture.gradients import GradientBlock
from ..progress import Reporter
from ..ranks import share
from ..results import Reranked
from .examples import Examples
from .planner import Answer
from .reader import Reader
from .scoring import Question

# Of the integral over rows that were not found.
_STEPS = 200


def rerank(
    reader: Reader,
    examples: Examples,
    inverse: Mapping[str, torch.Tensor],
    question: Question,
    found: Answer,
    k: int,
    largest: bool,
    report: Reporter,
) -> tuple[Answer, Reranked]:
    """The k best of what was found, by scores of whole gradients. An example that several queries share is computed
    once; of several ranks each computes a part, and all get the answer.

    Args:
        reader: the index.
        examples: computes them.
        inverse: layer -> (q, d_in, d_out) float32, H^-1 of the queries, scaled as their scores are.
        question: the queries; its scale divides scores of whole gradients as it does those of rows.
        found: the T best by rows.
        k: at most T.
        largest: proponents are wanted, or opponents.
        report: is told.

    Returns:
        the answer, and what has changed.

    Raises:
        DataError: the data do not hold an example, or hold another than was indexed.
    """
    ranks, sign = reader.ranks, 1.0 if largest else -1.0
    positions = found.positions
    unique, places = np.unique(reader.rows.ids_at(positions), return_inverse=True)
    places = places.reshape(positions.shape)
    stored, mine = reader.rows.energies_of(unique), share(len(unique), ranks.rank, ranks.size)
    whole = np.zeros(positions.shape)
    inverse = {name: x.flatten(1).to(examples.capture.device) for name, x in inverse.items()}
    with report.stage("rerank", mine.stop - mine.start) as stage:
        with ranks.jointly():
            for _, block in examples.gradients(unique[mine], stored[mine]):
                columns = np.full(len(unique), -1)
                columns[np.searchsorted(unique, block.ids)] = np.arange(block.count)
                query, place = np.nonzero(columns[places] >= 0)
                whole[query, place] = whole_scores(inverse, block)[query, columns[places[query, place]]]
                stage.advance(block.count)
        # Each is one rank's, and zero elsewhere.
        whole = ranks.sum(torch.from_numpy(whole)).numpy()
        seconds = stage.seconds
    if question.scale is not None:
        whole *= _scales(reader, question.scale.numpy(), positions)
    recall = np.array(
        [
            first * k / (k + missed_by_rows(by_rows, scores, k, reader.live_count))
            if positions.shape[1] < reader.live_count
            else 1.0
            for first, by_rows, scores in zip(found.recall, sign * found.scores, sign * whole, strict=True)
        ]
    )
    order = np.lexsort((positions, -sign * whole), axis=1)[:, :k]
    told = Reranked(
        candidates=positions.shape[1],
        computed=len(unique),
        changed=(order >= k).sum(axis=1).tolist(),
        rows_recall=float(found.recall.mean()),
        seconds=seconds,
    )
    best = np.take_along_axis(whole, order, axis=1).astype(np.float32)
    kept = np.take_along_axis(positions, order, axis=1)
    spent = found.seconds | {"rerank": seconds}
    return replace(found, positions=kept, scores=best, recall=recall, seconds=spent), told


def whole_scores(inverse: Mapping[str, torch.Tensor], block: GradientBlock) -> np.ndarray:
    """(q, n) float64: <x, G_i>, summed over the layers of x (q, D) float32; products are in float32."""
    parts = [(x @ block.layers[name].flat().T).double() for name, x in inverse.items()]
    return torch.stack(parts).sum(dim=0).cpu().numpy()


def _scales(reader: Reader, scale: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What scores of rows at positions (q, T) are multiplied by, of the (m,) for this rank's live rows."""
    team, live = reader.rows.team, reader.store.live
    places, local = team.locally(positions.ravel())
    found = team.assembled(lambda: [scale[np.searchsorted(live, local)]], [places], [positions.size])
    return found[0].reshape(positions.shape)


def missed_by_rows(by_rows: np.ndarray, whole: np.ndarray, k: int, total: int) -> float:
    """How many examples are expected to score as high as the k-th best that was found, and to have rows that score too
    low to be found; NaN of fewer than 3, which say nothing.

    The T were chosen by their rows' scores, so that the regression of whole scores on them is not biased by the choice:
    w = a + b r, with normal residuals, goes on below the T-th. How many rows there are is not known there; as a tail of
    scores falls exponentially, e^u T of them lie within u h of the T-th, with h from the lower half of the T, until all
    are counted. Of few candidates the estimate is rather too many; of many, and of rows that name few coordinates, too
    few, as examples that a row says little of have larger residuals (recall .97 was said where .92 was found).

    Args:
        by_rows, whole: (T,) scores of one query, such that large is wanted.
        k: at most T.
        total: how many rows there are.
    """
    count = len(whole)
    if count < 3:
        return float("nan")
    r, w = by_rows.astype(np.float64), whole.astype(np.float64)
    kth, cut = np.partition(w, count - k)[count - k], r.min()
    centred, spread = r - r.mean(), float(np.square(r - r.mean()).sum())
    slope = float(centred @ w) / spread if spread > 0 else 0.0
    residuals = w - w.mean() - slope * centred
    sigma = math.sqrt(float(residuals @ residuals) / (count - 2))
    height = (np.partition(r, count // 2)[count // 2] - cut) / math.log(2)
    u = np.linspace(0.0, math.log(total / count), _STEPS)
    expected = w.mean() + slope * (cut - height * u - r.mean())
    with np.errstate(over="ignore"):
        far = (expected - kth) / max(sigma, np.finfo(np.float64).tiny)
    chances = torch.special.ndtr(torch.from_numpy(far)).numpy()
    return float(np.trapezoid(count * np.exp(u) * chances, u))

"""What tests share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

# Seconds that a test waits for a process that works, on a machine ten times slower: only a hang takes as long.
PATIENCE = 1200


class Answers(Protocol):
    """Hits, or what has as much of them: ids (q, k) and scores (q, k)."""

    ids: np.ndarray
    scores: np.ndarray


def share_of_best(
    hits: Answers, scores: np.ndarray, ids: np.ndarray | None = None, *, opponents: bool = False, within: float = 1e-5
) -> float:
    """The share of hits that are among the k best, or as good as the k-th.

    Args:
        scores: (q, n), of all rows.
        ids: (n,) of the rows, in order; None: their places.
        within: the difference of scores that is none, in units of the largest.
    """
    towards = -1.0 if opponents else 1.0
    places = hits.ids if ids is None else np.searchsorted(ids, hits.ids)
    found, last = towards * np.take_along_axis(scores, places, axis=1), scores.shape[1] - hits.ids.shape[1]
    worst = np.partition(towards * scores, last, axis=1)[:, last]
    return float(np.mean(found >= worst[:, None] - within * np.abs(scores).max()))


def assert_best(
    hits: Answers, scores: np.ndarray, ids: np.ndarray | None = None, *, opponents: bool = False, within: float = 1e-5
) -> None:
    """Hits are the best of all; near ties may stand in any order. The arguments are those of `share_of_best`."""
    places = hits.ids if ids is None else np.searchsorted(ids, hits.ids)
    none, k = within * np.abs(scores).max(), hits.ids.shape[1]
    best = np.sort(scores, axis=1)[:, :k] if opponents else -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_allclose(hits.scores, best, rtol=0, atol=none)
    np.testing.assert_allclose(np.take_along_axis(scores, places, axis=1), hits.scores, rtol=0, atol=none)
    assert all(len(set(row)) == k for row in hits.ids.tolist())


def assert_same_hits(found: Answers, wanted: Answers, within: float = 1e-5) -> None:
    """The same scores, place by place, of the same ids; near ties may stand in any order, and either be the last."""
    assert found.ids.shape == wanted.ids.shape
    none = within * np.abs(wanted.scores).max()
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=none)
    for q, row in enumerate(found.ids.tolist()):
        known = dict(zip(wanted.ids[q].tolist(), wanted.scores[q].tolist(), strict=True))
        for i, score in zip(row, found.scores[q].tolist(), strict=True):
            assert abs(known.get(i, float(wanted.scores[q, -1])) - score) <= none, (q, i)

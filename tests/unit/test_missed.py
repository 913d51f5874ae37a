"""The estimate of what a search has missed, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lorif_index.search.missed import Missed, Seen, expected_missed

N, K = 30_000, 50


def searched(
    seed: int, wide: int, deep_count: int, *, noise: float, spread: float, coordinates: bool = True
) -> tuple[Seen, float, int]:
    """A search among rows of many sizes whose errors grow with size and cosine; its threshold, and what it missed."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.4 * rng.standard_normal(N))
    cosine = np.clip(0.12 * rng.standard_normal(N) + 0.05, -1, 1)
    error = 0.8 * cosine * np.abs(cosine) + np.sqrt(spread**2 + (0.3 * cosine) ** 2) * rng.standard_normal(N)
    fine, exact = size * cosine, size * (cosine + error)
    tilt = 0.1
    order = fine + tilt * size if coordinates else exact
    coarse = order + noise * (size if coordinates else 1.0) * rng.standard_normal(N)
    proposed = np.argsort(-coarse)[:wide]
    deep = np.argsort(-order[proposed])[:deep_count]
    known = exact[proposed[deep]]
    threshold = float(np.sort(known)[-K])
    scale = size[proposed] if coordinates else np.ones(wide)
    seen = Seen(coarse[proposed], order[proposed], fine[proposed], scale, deep, known, complete=False)
    unseen = np.setdiff1d(np.arange(N), proposed[deep])
    return seen, threshold, int((exact[unseen] > threshold).sum())


@pytest.mark.parametrize("wide", [300, 1500])
@pytest.mark.parametrize("noise", [0.02, 0.05])
@pytest.mark.parametrize("spread", [0.04, 0.12])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_estimate_is_right_on_average(wide: int, noise: float, spread: float, share: float) -> None:
    """Whatever loses answers: the coarse order, too few exact scores, or both."""
    real, estimated = 0, 0.0
    for seed in range(20):
        seen, threshold, missed = searched(seed, wide, int(share * wide), noise=noise, spread=spread)
        found = expected_missed(seen, threshold)
        assert found.unproposed >= 0 and found.unscored >= 0 and (found.unscored == 0) == (share == 1.0)
        assert found.recall(K) == pytest.approx(K / (K + found.unproposed + found.unscored))
        real, estimated = real + missed, estimated + found.unproposed + found.unscored
    assert 0.6 * real - 20 <= estimated <= 1.7 * real + 20


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_without_coordinates_the_coarse_order_stands_for_exact_scores(noise: float) -> None:
    real, estimated = 0, 0.0
    for seed in range(20):
        seen, threshold, missed = searched(seed, 400, 400, noise=noise, spread=0.05, coordinates=False)
        real, estimated = real + missed, estimated + expected_missed(seen, threshold).unproposed
    assert 0.6 * real - 20 <= estimated <= 1.7 * real + 20


def test_nothing_is_missed_of_what_was_scored_whole() -> None:
    seen, threshold, _ = searched(0, N, N, noise=0.1, spread=0.1)
    whole = Seen(seen.coarse, seen.order, seen.fine, seen.size, seen.deep, seen.exact, complete=True)
    assert expected_missed(whole, threshold).recall(K) == 1.0


def test_rows_that_are_likely_answers_come_first() -> None:
    chances = np.array([0.0, 0.5, 0.01, 0.9, 0.0, 0.09])
    missed = Missed(0.2, float(chances.sum()), chances)
    assert missed.likely(1.6).tolist() == [] and missed.likely(1.0).tolist() == [3]
    assert missed.likely(0.2).tolist() == [3, 1] and missed.likely(0.0).tolist() == [3, 1, 5, 2]


def test_equal_and_zero_scores_are_no_trouble() -> None:
    ones, none = np.ones(100, dtype=np.float32), np.zeros(100, dtype=np.float32)
    for scores in (ones, none):
        seen = Seen(scores, scores, scores, scores, np.arange(60), scores[:60], complete=False)
        assert 0.0 <= expected_missed(seen, float(scores[0])).recall(10) <= 1.0

"""The estimate of what a search has missed, on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lorif_index.search.missed import expected_missed

N, K = 30_000, 50


def searched(seed: int, wide: int, noise: float) -> tuple[np.ndarray, np.ndarray, float, int]:
    """A search among rows of many sizes: coarse and exact scores of what was proposed, threshold, what it missed."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.4 * rng.standard_normal(N))
    cosine = np.clip(0.12 * rng.standard_normal(N) + 0.05, -1, 1)
    spread = np.sqrt(0.05**2 + (0.3 * cosine) ** 2)
    exact = size * (cosine + 0.8 * cosine * np.abs(cosine) + spread * rng.standard_normal(N))
    coarse = exact + noise * rng.standard_normal(N)
    proposed = np.argsort(-coarse)[:wide]
    threshold = float(np.sort(exact[proposed])[-K])
    unseen = np.setdiff1d(np.arange(N), proposed)
    return coarse[proposed], exact[proposed], threshold, int((exact[unseen] >= threshold).sum())


def summed(wide: int, noise: float) -> tuple[int, float]:
    """What 12 searches missed, and what was estimated."""
    real, estimated = 0, 0.0
    for seed in range(12):
        coarse, exact, threshold, missed = searched(seed, wide, noise)
        real, estimated = real + missed, estimated + expected_missed(coarse, exact, threshold)
    return real, estimated


def test_the_estimate_is_about_what_was_missed() -> None:
    """Where little was; of much it sees less, and calibration learns how much less."""
    found = {(wide, noise): summed(wide, noise) for wide in (100, 300, 1500) for noise in (0.02, 0.1, 0.15, 0.25)}
    assert min(found.values())[0] == 0 and max(found.values())[0] > 12 * K
    for real, estimated in found.values():
        if real < 0.05 * 12 * K:
            assert 0.4 * real - 5 <= estimated <= 1.2 * real + 5
        assert 0.2 * real <= estimated + 5
    # The more was estimated, the more was missed.
    real, estimated = (np.argsort(np.argsort(column)) for column in zip(*found.values(), strict=True))
    assert np.corrcoef(real, estimated)[0, 1] > 0.9


def test_units_do_not_matter_and_an_offset_of_coarse_scores_is_seen() -> None:
    coarse, exact, threshold, _ = searched(0, 100, 0.15)
    once = expected_missed(coarse, exact, threshold)
    assert once > 0.5
    for change in (1e-6, 1e6):
        assert expected_missed(change * coarse, change * exact, change * threshold) == pytest.approx(once, rel=1e-6)
    for offset in (-3.0, 3.0):
        assert expected_missed(coarse + offset, exact, threshold) == pytest.approx(once, rel=1e-6)


def test_an_exact_order_misses_nothing() -> None:
    exact = np.sort(np.random.default_rng(0).standard_normal(500))[::-1]
    assert expected_missed(exact, exact, float(exact[9])) == 0.0


@pytest.mark.parametrize("count", [1, 10, 100])
def test_equal_and_zero_scores_are_no_trouble(count: int) -> None:
    ones, none = np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    for scores in (ones, none):
        assert expected_missed(scores, scores, float(scores[0])) == 0.0
        assert np.isfinite(expected_missed(none, scores, float(scores[0])))

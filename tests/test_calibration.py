"""Calibration on numbers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from lorif_index.calibration import (
    TARGETS,
    Calibration,
    Orders,
    Seen,
    Table,
    expected_missed,
    learn,
    learn_correction,
    recall_from_missed,
)
from lorif_index.errors import CorruptionError


def test_enough_candidates_are_the_least_that_reach_the_target() -> None:
    # Every query's j-th answer has coarse rank 10 j: after T candidates, about T / 10 of them are found.
    ranks = np.tile(10 * np.arange(100), (50, 1))
    table = learn(ranks, 5000)
    assert table.ks == (1, 3, 10, 30, 100)
    assert table.needed(1, 0.99) == 1
    assert 890 <= table.needed(100, 0.9) <= 920  # type: ignore[operator]
    assert 890 <= table.needed(60, 0.9) <= 920  # type: ignore[operator]
    assert table.recall_alone(100) == pytest.approx(0.1)
    assert table.needed(1000, 0.9) is None and table.needed(10, 0.9999) is None


def test_what_was_never_found_is_not_promised() -> None:
    ranks = np.zeros((40, 10), dtype=np.int64)
    ranks[:, 9] = 700  # the limit: not found at all
    table = learn(ranks, 700)
    assert table.needed(10, 0.9) == 10 and table.needed(10, 0.95) is None


def test_few_queries_are_held_to_more() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.geometric(0.01, (400, 10))
    few, many = learn(ranks[:10], 10_000), learn(ranks, 10_000)
    assert few.needed(10, 0.9) > many.needed(10, 0.9)  # type: ignore[operator]
    found = (ranks < many.needed(10, 0.9)).mean()
    assert 0.9 <= found < 0.93


@pytest.mark.parametrize("wide", [500, 2000])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_the_estimate_is_right_where_errors_are_gaussian(wide: int, noise: float) -> None:
    """Exact = fine + noise, fine = 0.9 coarse + noise: the expected number of missed rows against the real one."""
    real, estimated, n, k, deep_count = 0, 0.0, 20_000, 50, wide // 4
    for seed in range(20):
        rng = np.random.default_rng(seed)
        coarse = rng.standard_normal(n)
        fine = 0.9 * coarse + noise * rng.standard_normal(n)
        exact = fine + noise * rng.standard_normal(n)
        order = np.argsort(-coarse)
        proposed, rest = order[:wide], order[wide:]
        deep = np.argsort(-fine[proposed])[:deep_count]
        threshold = np.sort(exact[proposed[deep]])[-k]
        unseen = np.setdiff1d(np.arange(n), proposed[deep])
        real += int((exact[unseen] > threshold).sum())
        seen = Seen(coarse[proposed], fine[proposed], deep, exact[proposed[deep]], coarse[rest], np.ones(len(rest)))
        estimated += expected_missed(seen, threshold)
    assert 0.6 * real - 10 <= estimated <= 1.6 * real + 10


def test_corrections_are_a_line_between_logarithms() -> None:
    lost = np.array([0.3, 0.1, 0.03, 0.01])
    scale, power = learn_correction(lost**0.5 / 2, lost, np.full(4, 1e-4))
    orders = Orders(Table((1,), TARGETS, ((1,) * len(TARGETS),), (1.0,)), None, scale, power)
    for value in lost:
        assert orders.corrected(1 - value**0.5 / 2) == pytest.approx(1 - value, abs=1e-6)
    assert learn_correction(np.zeros(3), np.zeros(3), np.full(3, 0.01)) == (1.0, 1.0)
    assert orders.corrected(1.0) == 1.0


def test_two_orders_share_what_may_be_lost() -> None:
    table = learn(np.tile(10 * np.arange(100), (50, 1)), 5000)
    assert Orders(table, None).needed(100, 0.9)[0] == table.needed(100, 0.9)
    assert Orders(table, table).needed(100, 0.9) == (table.needed(100, 0.95),) * 2


def test_recall_from_missed() -> None:
    assert recall_from_missed(10, 0.0) == 1.0 and recall_from_missed(10, 10.0) == 0.5


def test_it_comes_back_from_json_or_is_refused() -> None:
    orders = Orders(learn(np.tile(np.arange(10), (4, 1)), 100), None, 0.5, 1.5)
    made = Calibration({"proponents": orders, "opponents": orders}, 4, 1000, 100, {"rule": "relative", "multiple": 0.1})
    import json

    assert Calibration.from_json(json.loads(json.dumps(made.to_json()))) == made
    for damage in ({}, None, {"orders": {}}, made.to_json() | {"orders": {"proponents": {}}}):
        with pytest.raises(CorruptionError):
            Calibration.from_json(damage)

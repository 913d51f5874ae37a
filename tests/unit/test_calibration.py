"""Calibration on numbers whose answer is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lorif_index.errors import CorruptionError
from lorif_index.search.calibration import SIGNS, TARGETS, Calibration, Orders, learn, loss_curve


def test_enough_candidates_are_the_least_that_reach_the_target() -> None:
    # Every query's j-th answer has coarse rank 10 j: after T candidates, about T / 10 of them are found.
    ranks = np.tile(10 * np.arange(100), (50, 1))
    table = learn(ranks, 5000)
    assert table.ks == (1, 3, 10, 30, 100)
    assert table.needed(1, 0.5) == table.needed(10, 0.5)
    for k in (100, 60):
        assert 880 <= table.needed(k, 0.9) <= 960  # type: ignore[operator]
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
    assert 0.9 <= found < 0.94


def test_corrections_are_those_of_like_estimates() -> None:
    ones = ((1,) * len(TARGETS),)
    orders = Orders((1,), TARGETS, ones, (1.0,), ((10, 0.001, 0.002), (10, 0.1, 0.05), (100, 0.01, 0.03)))
    assert orders.corrected(0.9, 10) == pytest.approx(0.95) and orders.corrected(0.999, 8) == pytest.approx(0.998)
    assert orders.corrected(0.99, 10) == pytest.approx(0.99)  # between the two, on a line of logarithms
    assert orders.corrected(0.999999, 10) == pytest.approx(1 - 2e-6, abs=1e-9)
    assert orders.corrected(0.99, 300) == pytest.approx(0.97)
    assert orders.corrected(0.0, 100) == 0.0
    # What an estimate cannot see is corrected like the smallest one that was.
    blind = Orders((1,), TARGETS, ones, (1.0,), ((10, 1e-6, 0.3), (10, 0.1, 0.4)))
    assert blind.corrected(1.0, 10) == pytest.approx(0.7)
    assert Orders((1,), TARGETS, ones, (1.0,)).corrected(0.7, 1) == 0.7


def test_an_estimate_says_no_more_than_calibration_has_seen() -> None:
    wide = ((10, 50, None), (20, 60, 900))
    orders = Orders((1, 10), (0.5, 0.9, 0.99), wide, (0.1, 0.1))
    assert [orders.at_most(1, w) for w in (5, 10, 49, 50, 10_000)] == [0.5, 0.9, 0.9, 0.99, 0.99]
    assert [orders.at_most(k, 900) for k in (1, 2, 10, 500)] == [0.99, 1.0, 1.0, 1.0]


def test_one_answer_is_given_what_ten_take() -> None:
    coarse = np.tile(np.r_[0, 50 * np.ones(9, dtype=int)], (30, 1))
    assert learn(coarse, 100).needed(1, 0.99) == learn(coarse, 100).needed(10, 0.99) == 51


def test_like_estimates_are_grouped_and_chance_is_smoothed() -> None:
    estimated = np.repeat([0.0, 0.01, 0.1, 0.4], 39)
    real = np.repeat([0.002, 0.03, 0.02, 0.2], 39)
    curve = loss_curve(estimated, real, 0.001)
    assert len(curve) == 12
    lost, gone = zip(*curve, strict=True)
    assert list(lost) == sorted(lost) and list(gone) == sorted(gone)
    assert lost[0] == pytest.approx(1e-6) and gone[0] == pytest.approx(0.002)
    # .02 after .03 is taken for chance: both are .025.
    assert gone[-4] == pytest.approx(0.025) and gone[4] == pytest.approx(0.025) and gone[-1] == pytest.approx(0.2)
    assert loss_curve(np.full(9, 0.5), np.zeros(9), 0.01) == [(pytest.approx(0.5), 0.01)]


def test_it_comes_back_from_json() -> None:
    orders = learn(np.tile(np.arange(10), (4, 1)), 100)
    made = Calibration({"proponents": orders, "opponents": orders}, 4, 1000, 100, {"rule": "relative", "multiple": 0.1})
    assert Calibration.from_json(json.loads(json.dumps(made.to_json()))) == made


def broken(orders: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"orders": dict.fromkeys(SIGNS, orders | fields)}


@pytest.mark.parametrize(
    "fields",
    [
        {"ks": []},
        {"ks": [3, 1]},
        {"ks": [0, 3]},
        {"ks": [1]},
        {"wide": [[1] * len(TARGETS)]},
        {"wide": [[-1] * len(TARGETS)] * 2},
        {"wide": [[1e308] * len(TARGETS)] * 2},
        {"alone": [0.5]},
        {"alone": [0.5, float("nan")]},
        {"targets": ["most"]},
        {"tilt": float("inf")},
        {"losses": [[10, 0.0, 0.1]]},
        {"losses": [[10, 0.5]]},
    ],
)
def test_tables_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    orders = learn(np.tile(np.arange(5), (4, 1)), 100)
    made = Calibration(dict.fromkeys(SIGNS, orders), 4, 1000, 100, {}).to_json()
    assert orders.ks == (1, 3) and Calibration.from_json(made | broken(made["orders"][SIGNS[0]])).rows == 1000
    with pytest.raises(CorruptionError, match="calibration"):
        Calibration.from_json(made | broken(made["orders"][SIGNS[0]], **fields))


@pytest.mark.parametrize("damage", [{}, None, {"orders": {}}, {"orders": None}, {"queries": "few"}, {"damping": 3}])
def test_other_damage_is_refused(damage: Any) -> None:
    orders = learn(np.tile(np.arange(5), (4, 1)), 100)
    made = Calibration(dict.fromkeys(SIGNS, orders), 4, 1000, 100, {}).to_json()
    with pytest.raises(CorruptionError, match="calibration"):
        Calibration.from_json(made | damage if damage else damage)

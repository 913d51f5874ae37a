"""Shrunk scores: by their formula in float64, in order, in any unit, and better sums where few examples count."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_index import make_data, make_model

from lorif_index import Index
from lorif_index.search.shrinkage import shrink


def oracle(row: np.ndarray) -> np.ndarray:
    s = [float(x) for x in row]
    sigma = statistics.median(map(abs, s)) / statistics.NormalDist().inv_cdf(0.75)
    t2 = sigma**2 * 2 * np.log(len(s))
    return np.array([x**3 / (x**2 + t2) if x else 0.0 for x in s])


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 500]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_it_is_the_formula_and_keeps_order(seed: int, n: int, unit: float) -> None:
    plain = np.random.default_rng(seed).standard_t(2, (3, n))
    plain[0, 0] = 0.0
    scores = (plain * unit).astype(np.float32)
    shrink(scores)
    for row, before in zip(scores, plain.astype(np.float32), strict=True):
        assert np.allclose(row / unit, oracle(before), rtol=1e-4, atol=1e-6)
        # Up to what float32 rounds of two scores that are nearly one.
        assert (np.diff(row[np.argsort(before, kind="stable")].astype(np.float64)) >= -1e-5 * np.abs(row).max()).all()


def test_most_zeros_and_one_example_stay() -> None:
    scores = np.array([[0.0, 0.0, 0.0, 5.0, -1.0]], dtype=np.float32)
    shrink(scores)
    assert scores.tolist() == [[0.0, 0.0, 0.0, 5.0, -1.0]]
    one = np.array([[2.0]], dtype=np.float32)
    shrink(one)
    assert one.tolist() == [[2.0]]


def test_sums_of_few_that_count_among_noise_are_better() -> None:
    generator = np.random.default_rng(5)
    true = np.zeros((40, 2000))
    for row in true:
        row[generator.permutation(2000)[:10]] = generator.uniform(5, 15, 10)
    scores = (true + generator.standard_normal(true.shape)).astype(np.float32)
    halves = (generator.random((200, 2000)) < 0.5).astype(np.float64)

    def agreement(found: np.ndarray) -> float:
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found @ halves.T, true @ halves.T, strict=True)]))

    before = agreement(scores)
    shrink(scores)
    assert before < 0.7 and agreement(scores) > 0.95


def test_scores_are_shrunk_on_request(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", model=make_model(), data=make_data(60), progress=False)
    query: Any = make_data(3, seed=9)
    plain = index.scores(query)
    out = np.empty_like(plain)
    assert index.scores(query, out=out, shrink=True) is out
    assert np.allclose(out, [oracle(row) for row in plain], rtol=1e-4, atol=1e-6 * np.abs(plain).max())
    assert np.array_equal(np.argsort(out, axis=1)[:, -5:], np.argsort(plain, axis=1)[:, -5:])
    assert np.array_equal(index.scores(query), plain)
    assert np.array_equal(index.scores(query, shrink=True, gather=False), out)


def test_scores_shrink_by_whole_rows_of_other_options(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", model=make_model(), data=make_data(60), progress=False)
    query = make_data(2, seed=9)
    plain = index.scores(query, normalize="relatif", layers="0")
    shrunk = index.scores(query, normalize="relatif", layers="0", shrink=True)
    assert np.allclose(shrunk, [oracle(row) for row in plain], rtol=1e-4, atol=1e-6 * np.abs(plain).max())

"""Shrunk scores: by their formula in float64, in order, in any unit, and better sums where few examples count."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_data, small_model
from hypothesis import given
from hypothesis import strategies as st

from lorif_index import BuildConfig, Compute, Index
from lorif_index.search import shrinkage


def oracle(row: np.ndarray) -> np.ndarray:
    s = [float(x) for x in row]
    sigma = statistics.median(map(abs, s)) / statistics.NormalDist().inv_cdf(0.75)
    t2 = sigma**2 * 2 * np.log(len(s))
    return np.array([x**3 / (x**2 + t2) if x else 0.0 for x in s])


def shrunk(scores: np.ndarray) -> np.ndarray:
    found = torch.from_numpy(scores.copy())
    shrinkage.shrink(found, shrinkage.thresholds(scores, scores.shape[1]))
    return found.numpy()


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 500]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_it_is_the_formula_and_keeps_order(seed: int, n: int, unit: float) -> None:
    plain = np.random.default_rng(seed).standard_t(2, (3, n))
    plain[0, 0] = 0.0
    scores = shrunk((plain * unit).astype(np.float32))
    for row, before in zip(scores, plain.astype(np.float32), strict=True):
        assert np.allclose(row / unit, oracle(before), rtol=1e-4, atol=1e-6)
        # Up to what float32 rounds of two scores that are nearly one.
        assert (np.diff(row[np.argsort(before, kind="stable")].astype(np.float64)) >= -1e-5 * np.abs(row).max()).all()


def test_most_zeros_and_one_example_stay() -> None:
    for scores in ([[0.0, 0.0, 0.0, 5.0, -1.0]], [[2.0]], [[0.0]]):
        assert shrunk(np.array(scores, dtype=np.float32)).tolist() == scores
    assert shrunk(np.empty((2, 0), dtype=np.float32)).shape == (2, 0)


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
    assert before < 0.7 and agreement(shrunk(scores)) > 0.95


@pytest.mark.parametrize("store", ["eigen", "factors"])
def test_scores_are_shrunk_on_request(store: str, tmp_path: Path) -> None:
    config = BuildConfig(store=store, compute=Compute(shard_bytes=6000), batch_size=8)
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(60), config=config, progress=False)
    query: Any = small_data(3, seed=9)
    plain = index.scores(query)
    out = np.empty_like(plain)
    assert index.scores(query, out=out, shrink=True) is out
    assert np.allclose(out, [oracle(row) for row in plain], rtol=1e-3, atol=1e-5 * np.abs(plain).max())
    leading = np.take_along_axis(plain, np.argsort(out, axis=1)[:, -5:], axis=1)
    assert np.allclose(leading, np.sort(plain, axis=1)[:, -5:], rtol=0, atol=1e-5 * np.abs(plain).max())
    assert np.array_equal(index.scores(query), plain)
    assert np.array_equal(index.scores(query, shrink=True, gather=False), out)


def test_other_options_and_removed_rows_count_in_the_threshold(tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(60), progress=False)
    index.remove(range(0, 60, 3))
    query = small_data(2, seed=9)
    for settings in ({}, {"normalize": "relatif", "layers": "0"}, {"damping": 3.0}):
        plain = index.scores(query, **settings)  # type: ignore[arg-type]
        found = index.scores(query, shrink=True, **settings)  # type: ignore[arg-type]
        assert np.allclose(found, [oracle(row) for row in plain], rtol=1e-3, atol=1e-5 * np.abs(plain).max())


def test_groups_sum_shrunk_scores(tmp_path: Path) -> None:
    payloads = [{"source": "abc"[i % 3]} for i in range(60)]
    index = Index.build(
        tmp_path / "i",
        model=small_model(),
        data=small_data(60),
        payloads=payloads,
        config=BuildConfig(compute=Compute(shard_bytes=6000)),
    )
    query = small_data(2, seed=9)
    scores = index.scores(query, shrink=True)
    for row, groups in zip(scores, index.groups(query, "source", shrink=True), strict=True):
        assert not np.allclose([g.sum for g in groups], [g.sum for g in index.groups(query, "source")[0]], rtol=1e-2)
        for group in groups:
            mine = row["abc".index(group.value) :: 3].astype(np.float64)
            assert abs(group.sum - mine.sum()) <= 1e-5 * np.abs(row).sum() and group.count == 20


def test_of_many_rows_a_sample_tells_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BuildConfig(compute=Compute(shard_bytes=60_000), coarse=None)
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(1500), config=config, progress=False)
    index.remove(range(500))
    query = small_data(2, seed=9)
    plain, exact = index.scores(query), index.scores(query, shrink=True)
    monkeypatch.setattr(shrinkage, "SAMPLED", 400)
    found = index.scores(query, shrink=True)
    assert not np.array_equal(found, exact) and np.array_equal(found, index.scores(query, shrink=True))
    # t^2 = s^3 / found - s^2, the same for all of a question's rows.
    for row, smaller, whole in zip(plain.astype(np.float64), found.astype(np.float64), exact, strict=True):
        some = np.abs(row) > np.quantile(np.abs(row), 0.3)
        t2 = (row**3 / smaller - row**2)[some]
        assert np.allclose(t2, np.median(t2), rtol=0.02)
        expected = (row**3 / whole - row**2)[some]
        assert 0.7 < np.median(t2) / np.median(expected) < 1.4

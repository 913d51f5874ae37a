"""The main path against the dense float64 oracle, on real models and on anything Hypothesis finds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import (
    CASES,
    Case,
    assert_best,
    dense_inverse,
    expected_scores,
    lambdas,
    products_of,
    projected,
    with_gradients,
    within,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorif_index import AbsoluteDamping, BuildConfig, Compute, Damping, Index, PaperDamping, RelativeDamping

SMALL_RANK = 12


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    return with_gradients(request.param)


def stored(index: Index) -> dict[str, np.ndarray]:
    return {name: g.double().numpy() for name, g in index.gradients(index.ids).items()}


# Any two choices meet.
@pytest.mark.parametrize(
    ("rank", "curvature_rank", "projection", "dtype"),
    [
        (1, SMALL_RANK, None, "float32"), (1, None, 6, "float16"), (3, SMALL_RANK, 6, "float16"),
        (3, None, None, "float32"), (None, SMALL_RANK, 6, "float32"), (None, None, None, "float16"),
    ],
)  # fmt: skip
def test_main_path(
    case: Any, tmp_path: Path, rank: int | None, curvature_rank: int | None, projection: int | None, dtype: str
) -> None:
    made, train_gradients, query_gradients = case
    config = BuildConfig(
        projection_dim=projection,
        rank=rank,
        curvature_rank=curvature_rank,
        power_iterations=2,
        dtype=dtype,
        layers=made.selection,
        batch_size=16,
        store="factors",
        projection="random",
        curvature="empirical",
    )
    index = Index.build(tmp_path / "i", model=made.model, data=made.data, config=config)
    assert set(index.layers) == set(made.weights)
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    kept = stored(index)
    lam = {}
    for name, spec in index.specs.items():
        # Factors: within 1% of the best rank-c error, but for what the stored dtype rounds.
        best = oracle.truncate(rows[name], rank)
        size = np.linalg.norm(rows[name])
        rounding = (2e-6 if dtype == "float32" else 1.5e-3) * size
        assert np.linalg.norm(kept[name] - rows[name]) <= 1.01 * np.linalg.norm(best - rows[name]) + rounding, name
        # L and B by themselves.
        layer, turn = index.curvature[name], products_of(index.curvature[name])
        c = oracle.second_moment(rows[name])
        inside = turn.T @ c @ turn
        r = layer.rank
        assert r == min(spec.dim, len(rows[name]), curvature_rank or spec.dim)
        assert layer.share == (0.3 if curvature_rank else 0)
        assert np.abs(turn.T @ turn - np.eye(spec.dim)).max() < 1e-4
        assert layer.squares.numpy() == pytest.approx(np.diag(inside), rel=1e-3, abs=1e-6 * np.diag(inside).max())
        assert layer.trace == pytest.approx(np.trace(c), rel=1e-4)
        d = layer.share * np.diag(inside) + 1e-3 * np.diag(inside).mean() if layer.share else np.ones(spec.dim)
        factor, best = layer.factor.double().numpy(), oracle.low_rank(inside, r, layer.share)
        left, must = (np.linalg.norm((inside - f @ f.T) / np.sqrt(np.outer(d, d))) for f in (factor, best))
        whole = np.linalg.norm(inside / np.sqrt(np.outer(d, d)))
        # What stands out against a diagonal falls slowly: iterations leave a little more than they must.
        assert left <= (1.03 if layer.share else 1.01) * must + 1e-3 * whole, name
        lam[name] = oracle.damping("auto", c, row_bytes=index.bytes_per_example)
    # Scores and search, given the stored curvature and factors.
    expected = expected_scores(index, queries, kept, lam)
    got = index.scores(made.query)
    assert within(got, expected)
    for opponents in (False, True):
        hits = index.search(made.query, k=9, opponents=opponents)
        best_scores = np.sort(-expected if not opponents else expected, axis=1)[:, :9] * (-1 if not opponents else 1)
        assert within(hits.scores, best_scores)
        assert within(np.take_along_axis(expected, hits.ids, axis=1), best_scores, 2e-3)
    own = np.zeros(len(index))
    for name in index.layers:
        h = dense_inverse(index.curvature[name], lam[name])
        flat = kept[name].reshape(len(index), -1)
        own += ((flat @ h) * flat).sum(axis=1)
    assert within(index.self_influence(), own)


def test_full_rank_is_the_dense_influence_end_to_end(case: Any, tmp_path: Path) -> None:
    """Nothing of the package's in the reference: its own gradients, its own eigendecomposition."""
    made, train_gradients, query_gradients = case
    config = BuildConfig(
        projection_dim=None,
        rank=None,
        curvature_rank=None,
        curvature="empirical",
        dtype="float32",
        layers=made.selection,
    )
    index = Index.build(tmp_path / "i", model=made.model, data=made.data, config=config)
    expected: np.ndarray = np.zeros(
        (len(made.query["input_ids"] if isinstance(made.query, dict) else made.query[0]), len(index))
    )
    for name, g in train_gradients.items():
        c = oracle.second_moment(g)
        h = np.linalg.inv(c + oracle.damping("auto", c, row_bytes=index.bytes_per_example) * np.eye(len(c)))
        expected += oracle.scores(query_gradients[name], g, h)
    # The curvature is kept in half precision.
    assert within(index.scores(made.query), expected, 5e-3)


@pytest.mark.parametrize("complement", ["truncated", "diagonal"])
def test_damping_and_layers_at_search_time(tmp_path: Path, complement: str) -> None:
    made, train_gradients, query_gradients = with_gradients("mlp")
    config = BuildConfig(
        projection_dim=9,
        projection="random",
        curvature_rank=SMALL_RANK,
        curvature="empirical",
        dtype="float32",
        complement=complement,
        store="factors",
    )
    index = Index.build(tmp_path / "i", model=made.model, data=made.data, config=config)
    rows, queries, kept = projected(index, train_gradients), projected(index, query_gradients), stored(index)
    policies: list[tuple[Damping | float, str, float]] = [
        (RelativeDamping(0.4), "relative", 0.4),
        (0.02, "relative", 0.02),
        (AbsoluteDamping(0.003), "absolute", 0.003),
        (PaperDamping(), "paper", 0.0),
    ]
    for policy, rule, value in policies:
        lam = {n: oracle.damping(rule, oracle.second_moment(g), SMALL_RANK, value) for n, g in rows.items()}
        if rule == "paper" and complement == "diagonal":
            # Beside a diagonal there are no eigenvalues of C: the sizes of B's columns stand for them.
            factors = {n: index.curvature[n].factor.double().numpy() for n in rows}
            lam = {n: 0.1 * float((b**2).sum(axis=0).mean()) for n, b in factors.items()}
        fraction = 5e-3 if rule == "paper" else 1e-3  # its mean is over eigenvalues that the sketch estimates
        assert within(index.scores(made.query, damping=policy), expected_scores(index, queries, kept, lam), fraction)
        only = expected_scores(index, queries, kept, lam, ["2"])
        assert within(index.scores(made.query, damping=policy, layers="2"), only, fraction)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_given_as_gradients(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sides = st.integers(1, 9)
    shapes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    n = draw(st.integers(2, 40))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    rank, r = draw(st.sampled_from([1, 2, 3, None])), draw(st.sampled_from([1, 4, 20, None]))
    dtype, complement = (
        draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        draw(st.sampled_from(["truncated", "diagonal"])),
    )
    scale = 10.0 ** draw(st.integers(-5, 2))
    pairs = draw(st.booleans())
    names = [f"layer/{i}.w" for i in range(len(shapes))]
    left = {k: generator.standard_normal((n, a, 4)) for k, (a, b) in zip(names, shapes, strict=True)}
    right = {k: scale * generator.standard_normal((n, b, 4)) for k, (a, b) in zip(names, shapes, strict=True)}
    whole = {k: left[k] @ right[k].transpose(0, 2, 1) for k in names}

    def block(rows: slice) -> dict[str, Any]:
        if pairs:
            return {k: (left[k][rows].astype("f4"), right[k][rows].astype("f4")) for k in names}
        return {k: torch.from_numpy(whole[k][rows]) for k in names}

    edges = [0, *cuts, n]
    blocks = [block(slice(a, b)) for a, b in itertools.pairwise(edges)]
    config = BuildConfig(
        rank=rank,
        curvature_rank=r,
        dtype=dtype,
        complement=complement,
        store="factors",
        compute=Compute(shard_bytes=draw(st.sampled_from([1, 500, 1 << 20]))),
    )
    index = Index.build(tmp_path_factory.mktemp("h") / "i", gradients=blocks, config=config)
    assert len(index) == n
    kept = stored(index)
    rounding = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for name in names:
        best = oracle.truncate(whole[name], rank)
        floor = np.linalg.norm(best - whole[name])
        # Per matrix the iteration may stop a little above the optimum (close singular values).
        assert np.linalg.norm(kept[name] - whole[name]) <= 1.05 * floor + rounding * np.linalg.norm(whole[name])
    queries = {k: generator.standard_normal((3, *g.shape[1:])) for k, g in whole.items()}
    lam = lambdas(index, whole)
    got = index.scores({k: q.astype("f4") for k, q in queries.items()})
    assert within(got, expected_scores(index, queries, kept, lam))
    hits = index.search({k: q.astype("f4") for k, q in queries.items()}, k=5)
    assert_best(hits, got)

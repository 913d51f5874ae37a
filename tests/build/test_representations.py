"""What is stored decides what a score is exact for: each representation against the dense float64 oracle.

Rows with coordinates z stand for the gradient G~ = U V^T + V (S + lambda)^1/2 W (z - z_f), z_f being the coordinates of
U V^T (0 where no factors are kept): its inner products with H^-1 g are the scores, for any damping and any layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import CASES, Case, expected_scores, projected, within

from lorif_index import BuildConfig, Index
from lorif_index.curvature.fit import LayerCurvature
from lorif_index.errors import QueryError

STORES = [("both", 4), ("both", 1), ("coordinates", 8), ("coordinates", 4), ("coordinates", 2), ("coordinates", 1)]


@pytest.fixture(scope="module")
def case() -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    made = CASES["gpt2"]()
    return made, made.gradients(made.data), made.gradients(made.query)


def build(made: Case, folder: Path, **settings: object) -> Index:
    fixed = dict(projection_dim=6, projection="random", curvature="empirical", curvature_rank=9)
    config = BuildConfig(layers=made.selection, batch_size=16, **fixed, **settings)  # type: ignore[arg-type]
    return Index.build(folder / "i", model=made.model, data=made.data, config=config)


def lambdas(index: Index, rows: dict[str, np.ndarray], multiple: float) -> dict[str, float]:
    return {n: oracle.damping("relative", oracle.second_moment(rows[n]), value=multiple) for n in index.layers}


def half_whitening(index: Index, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V (D, r), sqrt(S + lambda) (r,) and W_l (r, k), in float64, with the build's lambda."""
    layer, sketch = index.curvature[name], index._reader.sketch
    assert sketch is not None
    part = sketch.layers[name]
    assert part.directions.tolist() == list(range(len(part.weights)))
    s = np.sqrt(layer.eigenvalues.numpy()[: len(part.weights)] + part.lam)
    return layer.basis.double().numpy()[:, : len(part.weights)], s, part.weights.double().numpy()


def effective(index: Index) -> dict[str, np.ndarray]:
    """G~ of every row, (n, d_in, d_out) a layer."""
    z = index.coordinates().astype(np.float64)
    if index.config.store == "both":
        kept = {n: torch.bmm(u.double(), v.double().transpose(1, 2)).numpy() for n, (u, v) in index.factors().items()}
    else:
        kept = {n: np.zeros((len(index), spec.d_in, spec.d_out)) for n, spec in index.specs.items()}
    missing = z.copy()
    for name in index.layers:
        v, root, w = half_whitening(index, name)
        missing -= (kept[name].reshape(len(index), -1) @ v / root) @ w
    out = {}
    for name in index.layers:
        v, root, w = half_whitening(index, name)
        more = (missing @ w.T * root) @ v.T
        out[name] = kept[name] + more.reshape(kept[name].shape)
    return out


@pytest.mark.parametrize(("store", "bits"), STORES)
@pytest.mark.parametrize("method", ["pca", "per-layer"])
def test_scores_are_exact_for_what_is_stored(case: object, tmp_path: Path, store: str, bits: int, method: str) -> None:
    made, train_gradients, query_gradients = case  # type: ignore[misc]
    index = build(
        made, tmp_path, store=store, coordinate_bits=bits, sketch_dim=24, sketch=method, complement="truncated"
    )
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    stands_for = effective(index)
    for multiple in (0.1, 0.7):
        lam = lambdas(index, rows, multiple)
        got = index.scores(made.query, damping=multiple)
        if store == "both":
            assert within(got, expected_scores(index, queries, stands_for, lam))
        else:
            inside = inside_scores(index, queries, stands_for, lam, index.layers)
            assert within(got, inside)
    # Fewer layers: the coordinates mix layers, and the score counts what of the chosen ones is in them.
    some = index.layers[:1]
    lam = lambdas(index, rows, 0.1)
    got = index.scores(made.query, layers=some)
    if store == "both":
        assert within(got, expected_scores(index, queries, stands_for, lam, list(some)))
    else:
        assert within(got, inside_scores(index, queries, stands_for, lam, some))
    hits = index.search(made.query, k=7)
    assert within(hits.scores, -np.sort(-index.scores(made.query), axis=1)[:, :7], 1e-5)
    assert hits.stats.exact and hits.stats.store == store and f"{bits} bits" in hits.stats.dtype


def inside_scores(
    index: Index, queries: dict[str, np.ndarray], rows: dict[str, np.ndarray], lam: dict[str, float], names: object
) -> np.ndarray:
    """Scores counted inside the curvature's subspace only: coordinates say nothing of the rest."""
    total = 0.0
    for name in names:  # type: ignore[attr-defined]
        layer = index.curvature[name]
        v = layer.basis.double().numpy()
        q, g = queries[name].reshape(len(queries[name]), -1) @ v, rows[name].reshape(len(rows[name]), -1) @ v
        total = total + (q / damped(layer, lam[name])) @ g.T
    return np.asarray(total)


def damped(layer: LayerCurvature, lam: float) -> np.ndarray:
    """S + lambda of found directions, S + lambda / 100 on the diagonal."""
    alone = np.arange(layer.rank) >= layer.rank - len(layer.diagonal)
    return np.asarray(layer.eigenvalues.numpy() + np.where(alone, 0.01 * lam, lam))


@pytest.mark.parametrize("store", ["both", "coordinates"])
def test_self_influence_is_that_of_what_is_stored(case: object, tmp_path: Path, store: str) -> None:
    made, train_gradients, _ = case  # type: ignore[misc]
    index = build(made, tmp_path, store=store, sketch_dim=24)
    rows, stands_for = projected(index, train_gradients), effective(index)
    lam = lambdas(index, rows, 0.3)
    own = np.zeros(len(index))
    for name in index.layers:
        layer = index.curvature[name]
        v, s = layer.basis.double().numpy(), layer.eigenvalues.numpy()
        h = oracle.inverse(v, s, layer.trace, lam[name], index.config.complement)
        flat = stands_for[name].reshape(len(index), -1)
        own += ((flat @ h) * flat).sum(axis=1)
    assert within(index.self_influence(damping=0.3), own)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stored_coordinates_are_those_of_the_unfactored_gradient(case: object, tmp_path: Path, bits: int) -> None:
    made, train_gradients, _ = case  # type: ignore[misc]
    index = build(made, tmp_path, store="both", coordinate_bits=bits, sketch_dim=24)
    rows = projected(index, train_gradients)
    z = np.zeros(index.coordinates().shape)
    for name in index.layers:
        v, root, w = half_whitening(index, name)
        z += (rows[name].reshape(len(index), -1) @ v / root) @ w
    lost = ((index.coordinates() - z) ** 2).sum() / (z**2).sum()
    # Few coordinates are not quite Gaussian: up to twice what Max (1960) has for those that are.
    assert lost < 2 * {2: 0.1348, 4: 0.01168, 8: 1e-4}[bits]


def test_both_is_nearer_to_the_unfactored_score_than_either(tmp_path: Path) -> None:
    made = CASES["gpt2"]()
    correlations = {}
    for store in ("both", "factors", "coordinates"):
        index = build(made, tmp_path / store, store=store, sketch_dim=16)
        rows, queries = projected(index, made.gradients(made.data)), projected(index, made.gradients(made.query))
        whole = expected_scores(index, queries, rows, lambdas(index, rows, 0.1))
        correlations[store] = np.corrcoef(index.scores(made.query).ravel(), whole.ravel())[0, 1]
    assert correlations["both"] > max(correlations["factors"], correlations["coordinates"])
    assert correlations["both"] > 0.85


def test_whole_gradients_need_no_coordinates(tmp_path: Path) -> None:
    made = CASES["mlp"]()
    index = build(made, tmp_path, rank=None)
    assert index.config.store == "auto" and index.search(made.query, k=3).stats.store == "factors"
    with pytest.raises(QueryError, match="no coordinates"):
        index.coordinates()
    # One position an example: a single pair is the gradient itself.
    for store in ("auto", "both"):
        index = build(made, tmp_path / store, rank=1, store=store)
        assert index.representation == "factors" and index.config.store == store
    assert build(made, tmp_path / "c", rank=1, store="coordinates").representation == "coordinates"


def test_what_a_representation_lacks_is_refused(tmp_path: Path) -> None:
    made = CASES["mlp"]()
    index = build(made, tmp_path / "c", store="coordinates", sketch_dim=16)
    with pytest.raises(QueryError, match="keeps no factors.*store='both' or 'factors'"):
        index.factors()
    assert index.bytes_per_example == 16 // 2 + 4
    coarse = build(made, tmp_path / "coarse", store="coarse", sketch_dim=16)
    for call in (
        lambda: coarse.scores(made.query),
        lambda: coarse.self_influence(),
        lambda: coarse.rebuild_coarse(),
        lambda: coarse.calibrate(),
    ):
        with pytest.raises(QueryError, match="coarse code alone"):
            call()
    with pytest.raises(QueryError, match="exact=True needs stored rows"):
        coarse.search(made.query, exact=True)
    hits = coarse.search(made.query, k=5)
    assert hits.stats.approximate and hits.stats.store == "coarse" and coarse.bytes_per_example == 0
    assert hits.ids.shape == (len(hits), 5)


@pytest.mark.parametrize("store", ["factors", "both"])
def test_normalised_scores(case: object, tmp_path: Path, store: str) -> None:
    made, _, query_gradients = case  # type: ignore[misc]
    index = build(made, tmp_path, store=store, sketch_dim=24)
    plain, own = index.scores(made.query, damping=0.3), index.self_influence(damping=0.3)
    relatif = index.scores(made.query, damping=0.3, normalize="relatif")
    assert np.allclose(relatif, plain / np.sqrt(own), rtol=1e-4, atol=1e-5 * np.abs(relatif).max())
    asked = np.zeros(len(plain))
    for name, g in projected(index, query_gradients).items():
        layer = index.curvature[name]
        lam = 0.3 * layer.trace / layer.dim
        h = oracle.inverse(
            layer.basis.double().numpy(), layer.eigenvalues.numpy(), layer.trace, lam, index.config.complement
        )
        flat = g.reshape(len(g), -1)
        asked += ((flat @ h) * flat).sum(axis=1)
    cosine = index.scores(made.query, damping=0.3, normalize="cosine")
    assert np.allclose(cosine, plain / np.sqrt(np.outer(asked, own)), rtol=2e-3, atol=1e-4)
    if store == "factors":
        assert np.abs(cosine).max() <= 1.0
    for normalize, scores in (("relatif", relatif), ("cosine", cosine)):
        for opponents in (False, True):
            hits = index.search(made.query, 5, damping=0.3, normalize=normalize, opponents=opponents)
            best = np.sort(scores, axis=1)[:, :5] if opponents else -np.sort(-scores, axis=1)[:, :5]
            assert np.allclose(hits.scores, best, rtol=1e-5)
            assert hits.stats.exact and normalize in hits.stats.plan
    with pytest.raises(QueryError, match="normalize must be one of"):
        index.search(made.query, normalize="l2")
    with pytest.raises(QueryError, match="scans every row"):
        index.search(made.query, normalize="cosine", exact=False)

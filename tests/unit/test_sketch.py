"""The sketch against a dense PCA, and what it promises of scores: an identity where nothing is left out."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from conftest import dense_inverse, products_of

from lorif_index import AbsoluteDamping
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs.base import Transformed
from lorif_index.codecs.factors import FactorCodec
from lorif_index.curvature import sketch as sketches
from lorif_index.curvature.fit import DIAGONAL_SHARE, CurvatureShape, fit_curvature
from lorif_index.curvature.inverse import Preconditioner, transform
from lorif_index.curvature.sketch import (
    PCA_UP_TO,
    LayerSketch,
    Sketch,
    SketchEncoder,
    fit_sketch,
    half_whitened,
    sketch_method,
)
from lorif_index.progress import Stage
from lorif_index.search.reader import ask

SPECS = {"a": LayerSpec("a", 5, 4, 5, 4, 1), "b": LayerSpec("b", 6, 3, 6, 3, 1), "c": LayerSpec("c", 3, 3, 3, 3, 1)}
N = 300


def gradients(n: int = N, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients that layers share directions in, so that one PCA over all of them has something to find."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 6)) * 0.5 ** np.arange(6)
    mix = np.random.default_rng(99)
    out = {}
    for name, spec in SPECS.items():
        flat = common @ mix.standard_normal((6, spec.dim)) + 0.3 * rng.standard_normal((n, spec.dim))
        out[name] = torch.from_numpy(flat.reshape(n, spec.d_in, spec.d_out)).float()
    return out


def fitted(dim: int, method: str = "pca", share: float = DIAGONAL_SHARE):  # type: ignore[no-untyped-def]
    g = gradients()
    block = GradientBlock(np.arange(N), {k: LayerGradient.from_dense(v) for k, v in g.items()})
    stage, device = Stage(None, "x", None), torch.device("cpu")
    curvature = fit_curvature(
        lambda: [block],
        N,
        SPECS,
        shape=CurvatureShape(7, 3, share),
        power_iterations=3,
        seed=0,
        examples=N,
        stage=stage,
        device=device,
    )
    lams = {k: 0.1 * layer.trace / layer.dim for k, layer in curvature.items()}
    rows = half_whitened(lambda: [block.layers], N, curvature, lams, device)
    sketch = fit_sketch(rows, curvature, dim=dim, method=method, seed=0, stage=stage, device=device)
    return g, block, curvature, lams, sketch


def whitened(g: dict[str, torch.Tensor], curvature, lams) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Half-whitened coordinates in float64."""
    parts = []
    for name, layer in curvature.items():
        turned = g[name].flatten(1).double().numpy() @ products_of(layer)
        parts.append(turned / np.sqrt(layer.squares.double().numpy() + lams[name]))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("dim", [8, 16])
def test_it_is_the_uncentred_pca(dim: int) -> None:
    g, block, curvature, lams, sketch = fitted(dim)
    e = whitened(g, curvature, lams)
    values = np.linalg.eigvalsh(e.T @ e / N)[::-1]
    assert sketch.dim == dim and sketch.method == "pca"
    assert sketch.energy == pytest.approx(values[:dim].sum() / values.sum(), rel=1e-3)
    w = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    assert np.abs(w.T @ w - np.eye(dim)).max() < 1e-5
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    assert np.abs(z - e @ w).max() < 1e-4 * np.abs(z).max()
    # Rotated: no coordinate carries much more than another, as principal components would.
    assert (z**2).mean(axis=0).max() < 0.8 * values[0]


def test_per_layer_keeps_the_largest_shares_of_all_layers() -> None:
    g, block, curvature, lams, sketch = fitted(8, "per-layer")
    shares = np.concatenate([(s := layer.squares.double().numpy()) / (s + lams[n]) for n, layer in curvature.items()])
    best = np.sort(np.argsort(-shares)[:8])
    e = whitened(g, curvature, lams)
    w = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    assert w.shape == (8, 8) and np.abs(w.T @ w - np.eye(8)).max() < 1e-5
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    assert np.abs(z - e[:, best] @ w).max() < 1e-4 * np.abs(z).max()
    assert sketch.energy == pytest.approx((e[:, best] ** 2).sum() / (e**2).sum(), rel=1e-3)


WIDTHS = [spec.dim for spec in SPECS.values()]


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
@pytest.mark.parametrize("lam", [None, 0.7])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("b",)])
def test_all_coordinates_are_the_score(share: float, lam: float | None, names: tuple[str, ...]) -> None:
    """Where nothing is reduced, <x, z> is the score under any damping and any layers."""
    g, block, curvature, lams, sketch = fitted(8, share=share)
    identity = torch.eye(sum(WIDTHS)).split(WIDTHS)
    layers = {
        n: LayerSketch(p.lam, w, torch.arange(len(w)))
        for (n, p), w in zip(sketch.layers.items(), identity, strict=True)
    }
    whole = Sketch(layers, sum(WIDTHS), "pca", 1.0)
    query = {name: v for name, v in gradients(4, seed=5).items() if name in names}
    pre = {n: Preconditioner.of(n, curvature[n], AbsoluteDamping(lam or lams[n])) for n in names}
    asked = Transformed(transform(query, pre), curvature)
    x, z = whole.query(asked.turned, curvature), SketchEncoder(whole, curvature).encode(block.layers)
    expected = sum(
        oracle.scores(query[n].double().numpy(), g[n].double().numpy(), dense_inverse(curvature[n], lam or lams[n]))
        for n in names
    )
    assert np.abs((x @ z.T).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    # A question puts the same to the coordinates, and to the rows what their codec makes of it.
    codec = FactorCodec(SPECS, curvature, "float32")
    question = ask(codec, whole, asked)
    assert question.count == 4 and question.x is not None
    assert torch.allclose(question.x, x, atol=1e-4 * float(x.abs().max()))
    assert set(question.parts) == set(names)
    without = ask(codec, None, asked)
    assert without.x is None and all(torch.equal(without.parts[n], question.parts[n]) for n in names)


@pytest.mark.parametrize("method", ["pca", "per-layer"])
def test_a_questions_side_is_projected_where_the_rows_is(method: str) -> None:
    """x = W^T (L + lambda)^1/2 of the transformed question: <x, z> counts what the sketch keeps, and no more."""
    g, block, curvature, lams, sketch = fitted(8, method)
    query = gradients(3, seed=7)
    pre = {n: Preconditioner.of(n, curvature[n], AbsoluteDamping(0.4)) for n in SPECS}
    x = sketch.query(Transformed(transform(query, pre), curvature).turned, curvature).double().numpy()
    parts, matrix, at = [], np.zeros((sum(WIDTHS), 8)), 0
    for name, part in sketch.layers.items():
        layer, flat = curvature[name], query[name].flatten(1).double().numpy()
        transformed = flat @ dense_inverse(layer, 0.4) @ products_of(layer)
        parts.append(transformed * np.sqrt(layer.squares.double().numpy() + lams[name]))
        matrix[at + part.directions.numpy()] = part.weights.double().numpy()
        at += layer.dim
    expected = np.concatenate(parts, axis=1) @ matrix
    assert np.abs(x - expected).max() < 1e-4 * np.abs(expected).max()
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    kept = whitened(g, curvature, lams) @ matrix
    assert np.abs(x @ z.T - expected @ kept.T).max() < 1e-4 * np.abs(expected @ kept.T).max()


def test_of_many_coordinates_the_strongest_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "MOST_DIRECTIONS", 24)
    monkeypatch.setattr(sketches, "_LEAST_DIRECTIONS", 6)
    g, block, curvature, lams, sketch = fitted(8)
    assert sketches.sketched_directions(WIDTHS) == 24
    e, at, chosen = whitened(g, curvature, lams), 0, []
    for name, part in sketch.layers.items():
        squares = curvature[name].squares
        assert part.directions.tolist() == sorted(squares.argsort(descending=True)[:8].tolist())
        chosen.extend((at + part.directions).tolist())
        at += len(squares)
    values = np.linalg.eigvalsh(e[:, chosen].T @ e[:, chosen] / N)[::-1]
    assert sketch.energy == pytest.approx(values[:8].sum() / values.sum(), rel=1e-3)
    w = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    assert np.abs(z - e[:, chosen] @ w).max() < 1e-4 * np.abs(z).max()


def test_large_models_take_the_per_layer_way() -> None:
    assert sketch_method("auto", PCA_UP_TO) == "pca" and sketch_method("per-layer", 8) == "per-layer"
    assert sketch_method("auto", PCA_UP_TO + 1) == "per-layer"


def test_few_rows_give_few_coordinates() -> None:
    g = gradients(5)
    block = GradientBlock(np.arange(5), {k: LayerGradient.from_dense(v) for k, v in g.items()})
    stage, device = Stage(None, "x", None), torch.device("cpu")
    curvature = fit_curvature(
        lambda: [block],
        5,
        SPECS,
        shape=CurvatureShape(7, 3),
        power_iterations=1,
        seed=0,
        examples=5,
        stage=stage,
        device=device,
    )
    lams = {k: 0.1 * layer.trace / layer.dim for k, layer in curvature.items()}
    rows = half_whitened(lambda: [block.layers], 5, curvature, lams, device)
    sketch = fit_sketch(rows, curvature, dim=512, method="pca", seed=0, stage=stage, device=device)
    assert sketch.dim == 5 and sketch.energy == pytest.approx(1.0, abs=1e-5)

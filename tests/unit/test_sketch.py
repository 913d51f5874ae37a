"""The sketch against a dense PCA, and what it promises of scores: an identity where nothing is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorif_index import AbsoluteDamping
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs.base import QueryGradients
from lorif_index.codecs.factors import FactorCodec
from lorif_index.curvature.fit import CurvatureShape, fit_curvature
from lorif_index.curvature.inverse import Preconditioner
from lorif_index.curvature.sketch import PCA_UP_TO, Sketch, SketchEncoder, fit_sketch, half_whitened, sketch_method
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


def fitted(dim: int, method: str = "pca", rank: int | None = 7):  # type: ignore[no-untyped-def]
    g = gradients()
    block = GradientBlock(np.arange(N), {k: LayerGradient.from_dense(v) for k, v in g.items()})
    stage, device = Stage(None, "x", None), torch.device("cpu")
    curvature = fit_curvature(
        lambda: [block],
        N,
        SPECS,
        shapes=dict.fromkeys(SPECS, CurvatureShape(rank)),
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
        v, s = layer.basis.double().numpy(), layer.eigenvalues.numpy()
        parts.append(g[name].flatten(1).double().numpy() @ v / np.sqrt(s + lams[name]))
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


def test_per_layer_keeps_the_largest_eigenvalues_of_all_layers() -> None:
    g, block, curvature, lams, sketch = fitted(8, "per-layer")
    shares = np.concatenate([(s := layer.eigenvalues.numpy()) / (s + lams[n]) for n, layer in curvature.items()])
    best = np.sort(np.argsort(-shares)[:8])
    e = whitened(g, curvature, lams)
    w = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    assert w.shape == (8, 8) and np.abs(w.T @ w - np.eye(8)).max() < 1e-5
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    assert np.abs(z - e[:, best] @ w).max() < 1e-4 * np.abs(z).max()
    assert sketch.energy == pytest.approx((e[:, best] ** 2).sum() / (e**2).sum(), rel=1e-3)


@pytest.mark.parametrize("method", ["pca", "per-layer"])
@pytest.mark.parametrize("lam", [None, 0.7])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("b",)])
def test_all_coordinates_are_the_subspace_part_of_influence(
    method: str, lam: float | None, names: tuple[str, ...]
) -> None:
    """With k = L r nothing is reduced: <x, z> is the truncated score under any damping and any layers."""
    g, block, curvature, lams, sketch = fitted(21, method)
    sketch = Sketch(sketch.layers, sketch.dim, sketch.method, sketch.energy)
    # 21 coordinates are cut to 16, a multiple of 8: take the rest with full weights instead.
    identity = torch.eye(21).split([7, 7, 7])
    layers = {n: type(p)(p.lam, w, torch.arange(7)) for (n, p), w in zip(sketch.layers.items(), identity, strict=True)}
    whole = Sketch(layers, 21, method, 1.0)
    query = {name: v for name, v in gradients(4, seed=5).items() if name in names}
    damping = AbsoluteDamping(lam) if lam else None
    pre = {n: Preconditioner.of(n, curvature[n], damping or AbsoluteDamping(lams[n]), "tail-corrected") for n in names}
    x = whole.query({n: g_.flatten(1) @ curvature[n].basis for n, g_ in query.items()}, curvature, pre)
    z = SketchEncoder(whole, curvature).encode(block.layers)
    expected = np.zeros((4, N))
    for n in names:
        v = curvature[n].basis.double().numpy()
        inside = (query[n].flatten(1).double().numpy() @ v) * pre[n].inside.double().numpy()
        expected += inside @ (g[n].flatten(1).double().numpy() @ v).T
    assert np.abs((x @ z.T).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    # A question puts the same to the coordinates, and to the rows what their codec makes of it.
    codec, asked = FactorCodec(SPECS, curvature, "float32"), QueryGradients(query, curvature)
    question = ask(codec, whole, asked, pre)
    assert question.count == 4 and question.x is not None
    assert torch.allclose(question.x, x, atol=1e-4 * float(x.abs().max()))
    assert set(question.parts) == set(names)
    without = ask(codec, None, asked, pre)
    assert without.x is None and all(torch.equal(without.parts[n], question.parts[n]) for n in names)


@pytest.mark.parametrize("dim", [8, 16])
def test_coordinates_and_what_they_leave_out_add_up(dim: int) -> None:
    """<x, z> is the score of what the sketch keeps: the rest is orthogonal to it under the sketch's damping."""
    g, block, curvature, lams, sketch = fitted(dim)
    query = gradients(3, seed=7)
    pre = {n: Preconditioner.of(n, curvature[n], AbsoluteDamping(lams[n]), "truncated") for n in SPECS}
    inside = {n: q.flatten(1) @ curvature[n].basis for n, q in query.items()}
    x = sketch.query(inside, curvature, pre).double().numpy()
    z = SketchEncoder(sketch, curvature).encode(block.layers).double().numpy()
    e, asked = whitened(g, curvature, lams), whitened(query, curvature, lams)
    w = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    rest = (asked - asked @ w @ w.T) @ (e - e @ w @ w.T).T
    assert np.abs(x @ z.T + rest - asked @ e.T).max() < 1e-4 * np.abs(asked @ e.T).max()


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
        shapes=dict.fromkeys(SPECS, CurvatureShape(7)),
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

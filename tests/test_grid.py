"""Curvature within a grid of sides' eigenvectors, against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.damping import RelativeDamping
from lorif_index.fit.curvature import LayerCurvature, fit_curvature
from lorif_index.fit.grid import Grid
from lorif_index.fit.query import Preconditioner, transform, transform_precisely, turned_precisely
from lorif_index.progress import Stage

A, B = 12, 9


def gradients(n: int, seed: int = 0) -> torch.Tensor:
    """(n, A, B) whose sides have falling spectra, in bases of their own."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (A, B))
    fall = torch.exp(-0.4 * torch.arange(A))[:, None] * torch.exp(-0.5 * torch.arange(B))
    return left @ (torch.randn(n, A, B, generator=generator) * fall) @ right


def fit(g: torch.Tensor, size: int, rank: int | None = None, block: int = 64) -> LayerCurvature:
    def walk() -> Iterator[GradientBlock]:
        for i in range(0, len(g), block):
            part = g[i : i + block]
            yield GradientBlock(np.arange(i, i + len(part)), {"x": LayerGradient.from_dense(part)})

    return fit_curvature(
        walk,
        len(g),
        {"x": LayerSpec("x", A, B, A, B, 1)},
        rank=rank,
        power_iterations=2,
        seed=0,
        examples=len(g),
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
        within={"x": size},
    )["x"]


def products(g: torch.Tensor, size: int) -> np.ndarray:
    """(D, M) float64: the products of most energy, of eigenvectors of both sides' second moments."""
    x = g.double().numpy()
    u = np.linalg.eigh(np.einsum("nij,nkj->ik", x, x))[1]
    w = np.linalg.eigh(np.einsum("nji,njk->ik", x, x))[1]
    every = np.einsum("ia,jb->ijab", u, w).reshape(A * B, A * B)
    energy = ((x.reshape(len(x), -1) @ every) ** 2).sum(axis=0)
    return every[:, np.argsort(-energy)[:size]]


@pytest.mark.parametrize(("size", "rank"), [(20, None), (60, 40), (60, None)])
def test_eigenpairs_are_those_of_the_second_moment_within_the_products(size: int, rank: int | None) -> None:
    g = gradients(700)
    layer, p = fit(g, size, rank), products(g, size)
    flat = g.double().flatten(1).numpy()
    moment = flat.T @ flat / len(g)
    values, inside = np.linalg.eigh(p.T @ moment @ p)
    r = rank or size
    assert layer.rank == r and layer.dim == A * B and layer.core.shape == (size, r)
    assert layer.eigenvalues.numpy() == pytest.approx(values[::-1][:r], abs=1e-6 * values[-1])
    assert layer.trace == pytest.approx(np.trace(moment), rel=1e-6)
    basis = layer.basis.double().numpy()
    assert np.abs(basis.T @ basis - np.eye(r)).max() < 1e-5
    # The leading directions one by one, whose eigenvalues are apart.
    lead = (p @ inside)[:, ::-1][:, :5]
    assert np.abs(np.abs((basis[:, :5] * lead).sum(axis=0)) - 1).max() < 1e-4
    # And hardly less than the best of all directions.
    best = np.linalg.eigvalsh(moment)[::-1]
    assert layer.eigenvalues.sum() > (0.97 if size < 40 else 0.995) * best[:r].sum()


def test_all_products_are_no_grid() -> None:
    g = gradients(300)
    layer, whole = fit(g, A * B), fit(g, 10 * A * B)
    assert layer.grid is None and whole.grid is None and layer.rank == A * B


def test_blocks_do_not_matter() -> None:
    g = gradients(5000)
    one, two = fit(g, 40, block=5000), fit(g, 40, block=7)
    assert one.grid is not None and two.grid is not None
    assert torch.equal(one.grid.chosen, two.grid.chosen)
    assert torch.allclose(one.spectrum, two.spectrum, rtol=1e-4)
    # Every other row tells the sides; the trace and the eigenvalues are of all.
    assert one.trace == pytest.approx(float(g.double().square().sum()) / 5000, rel=1e-6)


def test_reduced_and_expanded_are_the_basis() -> None:
    layer = fit(gradients(400), 30, 20)
    g = gradients(6, seed=1).flatten(1)
    within = layer.reduced(g) @ layer.core
    assert torch.allclose(within, g @ layer.basis, atol=1e-5)
    assert torch.allclose(layer.expanded(within @ layer.core.T), within @ layer.basis.T, atol=1e-5)


@pytest.mark.parametrize("complement", ["truncated", "tail-corrected", "log-mean"])
def test_the_inverse_is_that_of_the_dense_basis(complement: str) -> None:
    layer = fit(gradients(400), 30, 20)
    plain = LayerCurvature(layer.basis.contiguous(), layer.spectrum, layer.trace, layer.rows, layer.examples)
    g = gradients(6, seed=1).flatten(1)
    made, dense = (Preconditioner.of("x", one, RelativeDamping(0.1), complement) for one in (layer, plain))
    assert torch.allclose(made.apply(g), dense.apply(g), rtol=1e-3, atol=1e-4 * float(dense.apply(g).abs().max()))
    assert torch.allclose(made.quadratic(g), dense.quadratic(g), rtol=1e-4)


def test_the_inverse_is_symmetric_where_large_terms_cancel() -> None:
    """<H^-1 a, b> = <a, H^-1 b> up to rounding, along the sides as well; a search's transform is not so exact."""
    layer = fit(gradients(400), 60, 40)
    made = {"x": Preconditioner.of("x", layer, RelativeDamping(1e-7), "truncated")}
    # Large in the direction of the most curvature, which H^-1 takes away.
    large = 300 * layer.basis[:, 0].reshape(A, B)
    a, b = (gradients(5, seed) + large for seed in (1, 2))
    forth, back = transform_precisely({"x": a}, made)["x"], transform_precisely({"x": b}, made)["x"]
    one, other = (
        forth.double().flatten(1) @ b.double().flatten(1).T,
        a.double().flatten(1) @ back.double().flatten(1).T,
    )
    most = float(one.abs().max())
    assert float((one - other).abs().max()) < 1e-4 * most
    turned = turned_precisely({"x": b}, made)["x"].double().flatten(1)
    along = layer.grid.turned(a.flatten(1)).double()
    assert float((along @ turned.T - one).abs().max()) < 1e-4 * most
    plain = transform({"x": a}, made)["x"].double().flatten(1) @ b.double().flatten(1).T
    assert float((plain - one).abs().max()) > 1e-3 * most


def test_a_grid_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (4, 3))
    grid = Grid(left, right, torch.tensor([0, 5, 7]))
    x = torch.randn(2, 3, generator=generator)
    assert grid.dim == 12 and grid.size == 3
    assert torch.allclose(grid.coordinates(grid.gradients(x)), x, atol=1e-5)
    assert torch.allclose(grid.gradients(x)[0].reshape(4, 3), left @ grid_of(x[0]) @ right.T, atol=1e-5)


def grid_of(x: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(12)
    whole[[0, 5, 7]] = x
    return whole.reshape(4, 3)

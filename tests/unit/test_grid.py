"""Curvature within a grid of sides' eigenvectors, against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lorif_index.curvature.grid import Grid

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.curvature.fit import CurvatureShape, LayerCurvature, fit_curvature
from lorif_index.curvature.inverse import (
    Preconditioner,
    combined,
    inside_of,
    log_mean,
    transform,
    transform_precisely,
)
from lorif_index.damping import RelativeDamping
from lorif_index.progress import Stage

A, B = 12, 9


def gradients(n: int, seed: int = 0) -> torch.Tensor:
    """(n, A, B) whose sides have falling spectra, in bases of their own."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (A, B))
    fall = torch.exp(-0.4 * torch.arange(A))[:, None] * torch.exp(-0.5 * torch.arange(B))
    return left @ (torch.randn(n, A, B, generator=generator) * fall) @ right


def fit(g: torch.Tensor, size: int, rank: int | None = None, block: int = 64, alone: int = 0) -> LayerCurvature:
    def walk() -> Iterator[GradientBlock]:
        for i in range(0, len(g), block):
            part = g[i : i + block]
            yield GradientBlock(np.arange(i, i + len(part)), {"x": LayerGradient.from_dense(part)})

    return fit_curvature(
        walk,
        len(g),
        {"x": LayerSpec("x", A, B, A, B, 1)},
        shapes={"x": CurvatureShape(rank, size, alone)},
        power_iterations=2,
        seed=0,
        examples=len(g),
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
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
    assert torch.allclose(one.spectrum, two.spectrum, rtol=1e-4)
    # Every other row tells the sides; the trace and the eigenvalues are of all.
    assert one.trace == pytest.approx(float(g.double().square().sum()) / 5000, rel=1e-6)


@pytest.mark.parametrize("alone", [1, 35, 500])
def test_further_products_are_directions_by_themselves(alone: int) -> None:
    g = gradients(700)
    layer = fit(g, 40, 30, alone=alone)
    most = min(alone, A * B - 40)
    assert layer.rank == 30 + most and layer.core.shape == (40, 30) and layer.dim == A * B
    p, flat = products(g, 40 + most), g.double().flatten(1).numpy()
    # Those of the next most energy, and of them the mean squares; the eigenvectors are what they were without them.
    squares = ((flat @ p[:, 40:]) ** 2).mean(axis=0)
    assert layer.diagonal.numpy() == pytest.approx(np.sort(squares)[::-1], rel=1e-4)
    without = fit(g, 40, 30)
    assert torch.allclose(layer.spectrum, without.spectrum, rtol=1e-5)
    assert torch.allclose(layer.core @ layer.core.T, without.core @ without.core.T, atol=1e-3)
    assert layer.trace == without.trace == pytest.approx((flat**2).sum() / 700, rel=1e-6)
    basis = layer.basis.double().numpy()
    assert basis.shape == (A * B, 30 + most) and np.abs(basis.T @ basis - np.eye(30 + most)).max() < 1e-5
    moments = ((flat @ basis) ** 2).mean(axis=0)
    assert layer.eigenvalues.numpy() == pytest.approx(moments, rel=1e-3, abs=1e-6 * moments[0])
    left = A * B - layer.rank
    assert layer.tail_mean == pytest.approx((layer.trace - moments.sum()) / left if left else 0.0, rel=1e-3)


@pytest.mark.parametrize("alone", [0, 25])
def test_coordinates_and_what_they_stand_for_are_the_basis(alone: int) -> None:
    layer = fit(gradients(400), 30, 20, alone=alone)
    g = gradients(6, seed=1).flatten(1)
    within = layer.coordinates(g)
    assert torch.allclose(within, g @ layer.basis, atol=1e-5)
    assert torch.allclose(inside_of({"x": g}, {"x": layer})["x"], within, atol=1e-5)
    for count in {5, 20, 20 + alone // 2, 20 + alone}:
        expected = within[:, :count] @ layer.basis[:, :count].T
        assert torch.allclose(layer.combined(within[:, :count]), expected, atol=1e-5)
    assert torch.allclose(combined({"x": within}, {"x": layer})["x"], within @ layer.basis.T, atol=1e-5)
    some = torch.tensor([0, 3, 19] + [20, 20 + alone - 1] * (alone > 0))
    assert torch.allclose(layer.restricted(some).basis, layer.basis[:, some], atol=1e-6)
    assert torch.equal(layer.restricted(some).eigenvalues, layer.eigenvalues[some])


@pytest.mark.parametrize("alone", [0, 25])
@pytest.mark.parametrize("complement", ["truncated", "tail-corrected", "log-mean"])
def test_the_inverse_is_that_of_the_dense_basis(complement: str, alone: int) -> None:
    layer = fit(gradients(400), 30, 20, alone=alone)
    g = gradients(6, seed=1).flatten(1)
    made = Preconditioner.of("x", layer, RelativeDamping(0.1), complement)
    v, s = layer.basis.double(), layer.eigenvalues
    lam, tail = 0.1 * layer.trace / (A * B), (layer.trace - float(s.sum())) / (A * B - 20 - alone)
    mu = {"truncated": lam, "tail-corrected": lam + tail, "log-mean": log_mean(lam, float(s[-1]), tail)}[complement]
    # Products by themselves have a hundredth of the damping.
    h = s + lam * torch.cat([torch.ones(20), 0.01 * torch.ones(alone)])
    inverse = v @ torch.diag(1 / h - 1 / mu) @ v.T + torch.eye(A * B) / mu
    expected = g.double() @ inverse
    assert torch.allclose(made.apply(g).double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(made.quadratic(g).double(), (expected * g).sum(dim=1), rtol=1e-4)
    turned = transform({"x": g.reshape(-1, A, B)}, {"x": made})["x"].flatten(1).double()
    assert torch.allclose(turned, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    precise = transform_precisely({"x": g.reshape(-1, A, B)}, {"x": made})["x"].flatten(1).double()
    assert torch.allclose(precise, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("alone", [0, 30])
def test_the_inverse_is_symmetric_where_large_terms_cancel(alone: int) -> None:
    """<H^-1 a, b> = <a, H^-1 b> up to rounding; a search's transform is not so exact."""
    layer = fit(gradients(400), 60, 40, alone=alone)
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

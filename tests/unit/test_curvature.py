"""Streamed curvature against a dense eigendecomposition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lorif_index import AbsoluteDamping, BuildConfig, CurvatureRows, Index, PaperDamping, RelativeDamping
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.curvature.fit import CurvatureShape, LayerCurvature, fit_curvature
from lorif_index.curvature.inverse import Preconditioner, log_mean
from lorif_index.errors import ConfigError, CurvatureError
from lorif_index.progress import Stage


def decaying_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(-torch.arange(d) / (d / 5))
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return (torch.randn(n, d, generator=generator) * scale) @ rotation


def fit(rows: torch.Tensor, a: int, b: int, rank: int | None, iterations: int = 2, block: int = 37) -> LayerCurvature:
    spec = LayerSpec("x", a, b, a, b, 1)

    def walk() -> Iterator[GradientBlock]:
        for i in range(0, len(rows), block):
            part = rows[i : i + block]
            yield GradientBlock(np.arange(i, i + len(part)), {"x": LayerGradient.from_dense(part.reshape(-1, a, b))})

    return fit_curvature(
        walk,
        len(rows),
        {"x": spec},
        shapes={"x": CurvatureShape(rank)},
        power_iterations=iterations,
        seed=0,
        examples=len(rows),
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
    )["x"]


def dense(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    g = rows.double().numpy()
    values, vectors = np.linalg.eigh(g.T @ g / len(g))
    return values[::-1], vectors[:, ::-1]


@pytest.mark.parametrize("rank", [4, 30, 60, None])
def test_eigenpairs_agree_with_the_dense_ones(rank: int | None) -> None:
    rows = decaying_rows(900, 96)
    layer, (values, vectors) = fit(rows, 12, 8, rank), dense(rows)
    r = 96 if rank is None else rank
    assert layer.rank == r and layer.dim == 96
    assert np.abs(layer.eigenvalues.numpy() - values[:r]).max() <= 1e-3 * values[0]
    assert layer.trace == pytest.approx(values.sum(), rel=1e-5)
    basis = layer.basis.double().numpy()
    assert np.abs(basis.T @ basis - np.eye(r)).max() < 1e-5
    # Subspaces, not vectors: the leading half lies in the fitted span, whatever happens at the cut.
    lead = vectors[:, : max(r // 2, 1)]
    assert np.linalg.norm(lead - basis @ (basis.T @ lead), 2) < 0.02
    # What it leaves out of C is hardly more than the best approximation of its rank must.
    got = (basis * layer.eigenvalues.numpy()) @ basis.T
    full = (vectors * values) @ vectors.T
    assert np.linalg.norm(full - got) <= 1.001 * np.linalg.norm(values[r:]) + 1e-5 * values[0]


def test_fewer_rows_than_directions() -> None:
    rows = decaying_rows(20, 96)
    layer, (values, _) = fit(rows, 12, 8, None), dense(rows)
    assert layer.rank == 20
    assert np.abs(layer.eigenvalues.numpy() - values[:20]).max() <= 1e-5 * values[0]
    assert layer.tail_mean <= 1e-6 * values[0]


def test_blocks_do_not_matter_and_nothing_is_dense_when_r_is_small() -> None:
    rows = decaying_rows(300, 4096 // 4)
    one, two = fit(rows, 32, 32, 16, block=300), fit(rows, 32, 32, 16, block=11)
    assert torch.allclose(one.eigenvalues, two.eigenvalues, rtol=1e-4)
    assert len(one.spectrum) == 26


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e12])
def test_scale_of_gradients_does_not_matter(scale: float) -> None:
    rows = decaying_rows(200, 64)
    base, scaled = fit(rows, 8, 8, 10), fit(rows * scale, 8, 8, 10)
    assert torch.allclose(scaled.eigenvalues / scale**2, base.eigenvalues, rtol=1e-3)


def test_zero_rows_are_refused() -> None:
    with pytest.raises(CurvatureError, match="'x' has zero gradients in all 9 curvature rows"):
        fit(torch.zeros(9, 16), 4, 4, 3)


def test_woodbury_is_the_dense_inverse() -> None:
    rows = decaying_rows(500, 48)
    values, _ = dense(rows)
    g = torch.randn(5, 48)
    for complement in ("truncated", "tail-corrected"):
        for rank in (10, None):
            layer = fit(rows, 8, 6, rank, iterations=4)
            lam = 0.1 * values.mean()
            p = Preconditioner.of("x", layer, RelativeDamping(0.1), complement)
            assert p.lam == pytest.approx(lam, rel=1e-5)
            r = layer.rank
            tail = values[r:].mean() if complement == "tail-corrected" and r < 48 else 0.0
            basis, s = layer.basis.double().numpy(), layer.eigenvalues.numpy()
            h = (basis * s) @ basis.T + lam * np.eye(48) + tail * (np.eye(48) - basis @ basis.T)
            expected = np.linalg.solve(h, g.double().numpy().T).T
            got = p.apply(g).double().numpy()
            assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()
            assert p.quadratic(g).numpy() == pytest.approx((g.numpy() * expected).sum(axis=1), rel=1e-3)


def test_damping_rules() -> None:
    layer = fit(decaying_rows(500, 48), 8, 6, 10)
    s = layer.spectrum.numpy()
    assert len(s) == 20
    assert RelativeDamping(0.3).value(layer) == pytest.approx(0.3 * layer.trace / 48)
    assert AbsoluteDamping(0.7).value(layer) == 0.7
    assert PaperDamping().value(layer) == pytest.approx(0.1 * s[:20].mean())
    for bad in (0, -1, float("nan"), float("inf"), "0.1", True):
        with pytest.raises(ConfigError):
            BuildConfig(damping=bad)  # type: ignore[arg-type]


def blocks_of(rows: torch.Tensor, size: int = 50) -> list[dict[str, Any]]:
    return [{"x": part.reshape(-1, 8, 6)} for part in rows.split(size)]


def test_curvature_from_given_rows_and_rows_per_example(tmp_path: Any) -> None:
    data, rows = decaying_rows(100, 48, 1), decaying_rows(300, 48, 2)
    config = BuildConfig(rank=None, curvature_rank=None, dtype="float32")
    plain = Index.build(tmp_path / "a", gradients=blocks_of(data), curvature=blocks_of(rows), config=config)
    three = CurvatureRows(blocks_of(rows), rows_per_example=3)
    summed = Index.build(tmp_path / "b", gradients=blocks_of(data), curvature=three, config=config)
    one_shot = Index.build(tmp_path / "c", gradients=blocks_of(data), curvature=iter(blocks_of(rows)), config=config)
    values, _ = dense(rows)
    assert plain.curvature["x"].eigenvalues.numpy() == pytest.approx(values, abs=1e-5 * values[0])
    assert summed.curvature["x"].trace == pytest.approx(3 * plain.curvature["x"].trace, rel=1e-6)
    assert summed.curvature["x"].examples == 100 and summed.curvature["x"].rows == 300
    assert torch.equal(one_shot.curvature["x"].basis, plain.curvature["x"].basis)


def test_the_published_recipe_fits_all_stored_factors(tmp_path: Any) -> None:
    rows = decaying_rows(200, 48)
    config = BuildConfig.paper(projection_dim=None, dtype="float32")
    index = Index.build(tmp_path / "a", gradients=blocks_of(rows), config=config)
    values, _ = dense(index.gradients(index.ids)["x"].flatten(1))
    assert index.curvature["x"].eigenvalues.numpy() == pytest.approx(values, abs=1e-4 * values[0])
    assert index.config.damping == PaperDamping() and index.config.complement == "truncated"
    assert not list((tmp_path / "a").glob(".spool*"))


def test_the_sample_is_random_bounded_and_of_the_seed(tmp_path: Any) -> None:
    rows = decaying_rows(400, 48)

    def traces(seed: int, sample: int, name: str) -> float:
        config = BuildConfig(seed=seed, sample=sample, curvature_rank=8)
        index = Index.build(tmp_path / name, gradients=blocks_of(rows), config=config)
        assert index.curvature["x"].rows == min(sample, 400)
        return float(index.curvature["x"].trace)

    a, b, again, whole = traces(0, 100, "a"), traces(1, 100, "b"), traces(0, 100, "c"), traces(0, 10_000, "d")
    assert a == again and a != b
    assert a == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("fall", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("lam", [1e-4, 0.05, 10.0])
def test_log_mean_is_what_an_exponential_tail_divides_a_gradient_by(fall: float, lam: float) -> None:
    tail = 0.7 * np.exp(-fall * (np.arange(20_000) + 0.5) / 20_000)
    expected = tail.sum() / (tail / (tail + lam)).sum()
    assert log_mean(lam, 0.7, float(tail.mean())) == pytest.approx(expected, rel=1e-4)
    # Between the mean tail eigenvalue and the largest.
    assert lam + tail.mean() <= log_mean(lam, 0.7, float(tail.mean())) * (1 + 1e-9) <= (lam + 0.7) * (1 + 2e-9)


def test_log_mean_at_the_edges() -> None:
    assert log_mean(0.1, 0.5, 0.5) == pytest.approx(0.6)
    assert log_mean(0.1, 0.5, 0.0) == 0.1
    assert log_mean(0.1, 0.0, 0.0) == 0.1
    assert 0.1 < log_mean(0.1, 0.5, 1e-12) < 0.6


def test_rows_may_lie_in_memory_that_is_used_again() -> None:
    """As a store's blocks do: dense fits keep rows for a while, and must keep their values."""
    torch.manual_seed(0)
    rows, room = torch.randn(1200, 12), torch.empty(100, 12)

    def reused() -> Iterator[GradientBlock]:
        for start in range(0, len(rows), 100):
            room.copy_(rows[start : start + 100])
            ids = np.arange(start, start + 100, dtype=np.int64)
            yield GradientBlock(ids, {"a": LayerGradient.from_dense(room.view(-1, 4, 3))})
        room.zero_()

    fitted = fit_curvature(
        reused,
        1200,
        {"a": LayerSpec("a", 4, 3, 4, 3, 1)},
        shapes={"a": CurvatureShape(4)},
        power_iterations=1,
        seed=0,
        examples=1200.0,
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
    )["a"]
    expected = torch.linalg.eigvalsh(rows.double().T @ rows.double() / 1200).flip(0)
    torch.testing.assert_close(fitted.spectrum[:4], expected[:4], rtol=1e-5, atol=0)

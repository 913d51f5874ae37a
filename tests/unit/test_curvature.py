"""Streamed curvature and its inverse against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import dense_inverse, low_rank_part, products_of

from lorif_index import AbsoluteDamping, BuildConfig, CurvatureRows, Index, PaperDamping, RelativeDamping
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.curvature import sides
from lorif_index.curvature.fit import DIAGONAL_SHARE, CurvatureShape, LayerCurvature, fit_curvature, thinning
from lorif_index.curvature.inverse import Preconditioner, multiply, transform, transform_precisely
from lorif_index.errors import ConfigError, CurvatureError
from lorif_index.progress import Stage


def decaying_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(-torch.arange(d) / (d / 5))
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return (torch.randn(n, d, generator=generator) * scale) @ rotation


def fit(
    rows: torch.Tensor,
    a: int,
    b: int,
    rank: int | None,
    share: float = DIAGONAL_SHARE,
    iterations: int = 2,
    block: int = 37,
    examples: float | None = None,
) -> LayerCurvature:
    spec = LayerSpec("x", a, b, a, b, 1)

    def walk() -> Iterator[GradientBlock]:
        for i in range(0, len(rows), block):
            part = rows[i : i + block]
            yield GradientBlock(np.arange(i, i + len(part)), {"x": LayerGradient.from_dense(part.reshape(-1, a, b))})

    return fit_curvature(
        walk,
        len(rows),
        {"x": spec},
        shape=CurvatureShape(rank, 1, share),
        power_iterations=iterations,
        seed=0,
        examples=examples or len(rows),
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
    )["x"]


def dense(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    vectors, values = oracle.eigen(oracle.second_moment(rows.double().numpy()))
    return values, vectors


@pytest.mark.parametrize("rank", [4, 30, 60, None])
def test_without_a_diagonal_the_factor_is_of_the_leading_eigenpairs(rank: int | None) -> None:
    rows = decaying_rows(900, 96)
    layer, (values, vectors) = fit(rows, 12, 8, rank, share=0, iterations=4), dense(rows)
    r = 96 if rank is None else rank
    assert layer.rank == r and layer.dim == 96 and layer.share == 0
    factor = products_of(layer) @ layer.factor.double().numpy()
    norms = np.linalg.norm(factor, axis=0)
    assert np.abs(norms**2 - values[:r]).max() <= 1e-3 * values[0]
    assert np.abs(layer.spectrum.numpy()[:r] - norms**2).max() <= 1e-5 * values[0]
    assert layer.trace == pytest.approx(values.sum(), rel=1e-5)
    assert layer.energy == pytest.approx(values[:r].sum() / values.sum(), rel=1e-3)
    basis = factor / norms
    assert np.abs(basis.T @ basis - np.eye(r)).max() < 1e-4
    # Subspaces, not vectors: the leading half lies in the fitted span, whatever happens at the cut.
    lead = vectors[:, : max(r // 2, 1)]
    assert np.linalg.norm(lead - basis @ (basis.T @ lead), 2) < 0.02
    # What it leaves out of C is hardly more than the best approximation of its rank must.
    full = (vectors * values) @ vectors.T
    assert np.linalg.norm(full - factor @ factor.T) <= 1.001 * np.linalg.norm(values[r:]) + 1e-5 * values[0]


@pytest.mark.parametrize("share", [0.1, DIAGONAL_SHARE])
@pytest.mark.parametrize("rank", [4, 30, None])
def test_with_a_diagonal_the_factor_is_of_what_stands_out_against_it(rank: int | None, share: float) -> None:
    rows = decaying_rows(900, 96)
    layer = fit(rows, 12, 8, rank, share, iterations=4)
    basis = products_of(layer)
    c = basis.T @ oracle.second_moment(rows.double().numpy()) @ basis
    assert layer.squares.numpy() == pytest.approx(np.diag(c), rel=1e-4)
    assert layer.share == share and layer.trace == pytest.approx(np.trace(c), rel=1e-5)
    factor, best = layer.factor.double().numpy(), oracle.low_rank(c, rank, share)
    assert factor.shape == best.shape
    root = np.sqrt(share * np.diag(c) + 1e-3 * np.diag(c).mean())
    scaled, found, least = (m / np.outer(root, root) for m in (c, factor @ factor.T, best @ best.T))
    left, must = np.linalg.norm(scaled - found), np.linalg.norm(scaled - least)
    assert left <= 1.01 * must + 1e-4 * np.linalg.norm(scaled)
    spectrum = np.sort((best**2).sum(axis=0))[::-1]
    assert len(layer.spectrum) == layer.rank
    assert layer.spectrum.numpy() == pytest.approx(spectrum, abs=(0.05 if rank == 4 else 2e-3) * spectrum[0])
    assert bool((layer.spectrum.diff() <= 0).all())


def test_the_diagonal_takes_what_the_low_rank_part_leaves() -> None:
    """Of directions outside of the low-rank part H holds its share."""
    generator = torch.Generator().manual_seed(1)
    fall = torch.exp(-0.3 * torch.arange(12))[:, None] * torch.exp(-0.4 * torch.arange(8))
    rows = (torch.randn(4000, 12, 8, generator=generator) * fall).flatten(1)
    layer, c = fit(rows, 12, 8, 4), oracle.second_moment(rows.double().numpy())
    h = np.linalg.inv(dense_inverse(layer, 1e-9))
    outside = np.ones(96, dtype=bool)
    outside[np.argsort(-np.diag(c))[:6]] = False
    assert 0.29 < np.diag(h)[outside].sum() / np.diag(c)[outside].sum() < 0.5


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
def test_fewer_rows_than_directions(share: float) -> None:
    rows = decaying_rows(20, 96)
    layer, (values, _) = fit(rows, 12, 8, None, share), dense(rows)
    assert layer.rank == 20
    c = oracle.second_moment(rows.double().numpy())
    assert np.abs(low_rank_part(layer) - c).max() <= 1e-4 * np.abs(c).max()
    if share == 0:
        assert np.abs(layer.spectrum.numpy()[:20] - values[:20]).max() <= 1e-5 * values[0]


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
def test_blocks_do_not_matter_and_nothing_is_dense_when_r_is_small(share: float) -> None:
    rows = decaying_rows(300, 4096 // 4)
    one, two = fit(rows, 32, 32, 16, share, block=300), fit(rows, 32, 32, 16, share, block=11)
    assert torch.allclose(one.spectrum, two.spectrum, rtol=1e-3)
    assert len(one.spectrum) == (16 if share else 26)


def test_rows_of_large_layers_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = decaying_rows(100, 48)
    whole = fit(rows, 8, 6, 10)
    monkeypatch.setattr("lorif_index.curvature.fit._PIECE_BYTES", 4 * 48 * 7)
    pieces = fit(rows, 8, 6, 10)
    torch.testing.assert_close(pieces.squares, whole.squares)
    torch.testing.assert_close(pieces.factor @ pieces.factor.T, whole.factor @ whole.factor.T, rtol=1e-4, atol=1e-6)


def test_the_rows_themselves_are_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where no side is turned, and coordinates are the gradients, either."""
    monkeypatch.setattr(sides, "TURNED_UP_TO", 1)
    rows = decaying_rows(100, 48)
    before = rows.clone()
    layer = fit(rows, 8, 6, 10)
    assert layer.sides.left is None and layer.sides.right is None
    assert torch.equal(rows, before)
    assert layer.squares.numpy() == pytest.approx(before.double().square().mean(dim=0).numpy(), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e12])
def test_scale_of_gradients_does_not_matter(scale: float, share: float) -> None:
    rows = decaying_rows(200, 64)
    base, scaled = fit(rows, 8, 8, 10, share), fit(rows * scale, 8, 8, 10, share)
    assert torch.allclose(scaled.spectrum / scale**2, base.spectrum, rtol=1e-3)
    assert torch.allclose(scaled.squares / scale**2, base.squares, rtol=1e-3)


def test_zero_rows_are_refused() -> None:
    with pytest.raises(CurvatureError, match="'x' has zero gradients in all 9 curvature rows"):
        fit(torch.zeros(9, 16), 4, 4, 3)


def test_directions_that_are_always_zero_have_no_curvature() -> None:
    rows = decaying_rows(200, 48).reshape(200, 8, 6)
    rows[:, :, 4:] = 0
    layer = fit(rows.flatten(1), 8, 6, 10)
    one = Preconditioner.of("x", layer, RelativeDamping(0.1))
    g = torch.zeros(1, 8, 6)
    g[0, 3, 5] = 1.0
    torch.testing.assert_close(one.apply(g.flatten(1)), g.flatten(1) / one.lam, rtol=1e-3, atol=1e-3 / one.lam)


def test_shapes_of_the_low_rank_part() -> None:
    one, sixteen = CurvatureShape("auto", 1), CurvatureShape("auto", 16)
    # As many directions as four and a half million numbers hold; all there are; no fewer than 8.
    assert one.directions(100_000) == 45 and sixteen.directions(4096) == 68
    assert one.directions(1024) == 1024 and one.directions(1024, rows=50) == 50
    assert sixteen.directions(100_000) == 8
    assert CurvatureShape(7, 3).directions(4096) == 7 and CurvatureShape(7, 3).directions(5) == 5
    assert CurvatureShape(None, 3).directions(4096) == 4096
    for config, share in (
        (BuildConfig(), DIAGONAL_SHARE),
        (BuildConfig(curvature_rank=9), DIAGONAL_SHARE),
        (BuildConfig(curvature_rank=None), 0),
        (BuildConfig(complement="truncated"), 0),
        (BuildConfig.paper(), 0),
    ):
        assert CurvatureShape.of(config, 3) == CurvatureShape(config.curvature_rank, 3, share)


# -- the inverse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
@pytest.mark.parametrize("rank", [1, 10, None])
@pytest.mark.parametrize("multiple", [1e-3, 0.1, 30.0])
def test_woodbury_is_the_dense_inverse(rank: int | None, share: float, multiple: float) -> None:
    rows = decaying_rows(500, 48)
    layer, g = fit(rows, 8, 6, rank, share), torch.randn(5, 48)
    lam = multiple * layer.trace / 48
    one = Preconditioner.of("x", layer, RelativeDamping(multiple))
    assert one.lam == pytest.approx(lam, rel=1e-5)
    inverse = dense_inverse(layer, lam)
    expected = g.double().numpy() @ inverse
    most = np.abs(expected).max()
    assert np.abs(one.apply(g).double().numpy() - expected).max() <= 1e-3 * most
    # H^-1's parts are float32.
    assert np.abs(one.apply(g.double()).numpy() - expected).max() <= 1e-3 * most
    assert one.apply(g).dtype == torch.float32 and one.apply(g.double()).dtype == torch.float64
    assert one.quadratic(g).numpy() == pytest.approx((g.numpy() * expected).sum(axis=1), rel=1e-3)
    inside = layer.sides.turned(g)
    assert torch.allclose(layer.sides.turned_back(one.divided(inside)), one.apply(g), atol=1e-5 * float(most))
    forth = g.double().numpy() @ np.linalg.inv(inverse)
    assert np.abs(one.multiply(g).double().numpy() - forth).max() <= 1e-4 * np.abs(forth).max()


def test_all_directions_are_the_exact_inverse() -> None:
    """With nothing of the package's in the reference."""
    rows, g = decaying_rows(500, 48), torch.randn(5, 48)
    c = oracle.second_moment(rows.double().numpy())
    lam = oracle.damping("relative", c, value=0.1)
    layer = fit(rows, 8, 6, None, share=0)
    expected = g.double().numpy() @ np.linalg.inv(c + lam * np.eye(48))
    got = Preconditioner.of("x", layer, RelativeDamping(0.1)).apply(g).numpy()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_default_inverse_is_the_dense_one_from_rows_alone() -> None:
    """With nothing of the package's in the reference, sides neither."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (8, 6))
    fall = torch.exp(-0.4 * torch.arange(8))[:, None] * torch.exp(-0.5 * torch.arange(6))
    rows = (left @ (torch.randn(1500, 8, 6, generator=generator) * fall) @ right).flatten(1)
    x = rows.double().numpy()
    basis = oracle.products(*oracle.sides(x.reshape(-1, 8, 6)))
    c = basis.T @ oracle.second_moment(x) @ basis
    lam = oracle.damping("relative", c, value=0.03)
    inverse = oracle.inverse(np.diag(c), oracle.low_rank(c, 10, 0.3), 0.3, lam, basis)
    g = torch.randn(5, 48, generator=generator)
    expected = g.double().numpy() @ inverse
    got = Preconditioner.of("x", fit(rows, 8, 6, 10), RelativeDamping(0.03)).apply(g).numpy()
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_transform_and_its_inverse_keep_shapes() -> None:
    layer = fit(decaying_rows(500, 48), 8, 6, 10)
    made = {"x": Preconditioner.of("x", layer, RelativeDamping(0.1))}
    g = torch.randn(4, 8, 6)
    x, back = transform({"x": g}, made)["x"], multiply(transform({"x": g}, made), made)["x"]
    assert x.shape == back.shape == (4, 8, 6)
    torch.testing.assert_close(back, g, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(transform_precisely({"x": g}, made)["x"], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, DIAGONAL_SHARE])
def test_the_inverse_is_symmetric_where_large_terms_cancel(share: float) -> None:
    """<H^-1 a, b> = <a, H^-1 b> up to rounding; a search's transform is not so exact."""
    layer = fit(decaying_rows(400, 108), 12, 9, 40, share)
    made = {"x": Preconditioner.of("x", layer, RelativeDamping(1e-7))}
    # Large in the direction of the most curvature, which H^-1 takes away.
    vectors, _ = oracle.eigen(low_rank_part(layer))
    large = torch.from_numpy(1000 * vectors[:, 0]).float()
    a, b = ((decaying_rows(5, 108, seed) + large).reshape(5, 12, 9) for seed in (1, 2))
    forth, back = transform_precisely({"x": a}, made)["x"], transform_precisely({"x": b}, made)["x"]
    one = forth.double().flatten(1) @ b.double().flatten(1).T
    other = a.double().flatten(1) @ back.double().flatten(1).T
    assert float((one - other).abs().max()) < 1e-4 * float(one.abs().max())


def test_a_curvature_that_float32_cannot_divide_by_is_told() -> None:
    layer = fit(decaying_rows(100, 48) * 1e-18, 8, 6, 10, share=0)
    with pytest.raises(CurvatureError, match="layer 'x' has an inverse beyond float32's range"):
        Preconditioner.of("x", layer, AbsoluteDamping(1e-42)).usable("x")


def test_damping_rules() -> None:
    layer = fit(decaying_rows(500, 48), 8, 6, 10, share=0)
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
    assert plain.curvature["x"].spectrum.numpy() == pytest.approx(values, abs=1e-5 * values[0])
    assert summed.curvature["x"].trace == pytest.approx(3 * plain.curvature["x"].trace, rel=1e-6)
    assert summed.curvature["x"].examples == 100 and summed.curvature["x"].rows == 300
    # Rows of a stream are kept, and come back in other blocks.
    streamed, factor = one_shot.curvature["x"].factor, plain.curvature["x"].factor
    assert torch.allclose(streamed, factor, atol=1e-5 * float(factor.abs().max()))


def test_the_published_recipe_fits_all_stored_factors(tmp_path: Any) -> None:
    rows = decaying_rows(200, 48)
    config = BuildConfig.paper(projection_dim=None, dtype="float32")
    index = Index.build(tmp_path / "a", gradients=blocks_of(rows), config=config)
    values, _ = dense(index.gradients(index.ids)["x"].flatten(1))
    assert index.curvature["x"].spectrum.numpy() == pytest.approx(values, abs=1e-4 * values[0])
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
        shape=CurvatureShape(4, 1, 0.0),
        power_iterations=1,
        seed=0,
        examples=1200.0,
        stage=Stage(None, "curvature", None),
        device=torch.device("cpu"),
    )["a"]
    expected = torch.linalg.eigvalsh(rows.double().T @ rows.double() / 1200).flip(0)
    torch.testing.assert_close(fitted.spectrum[:4], expected[:4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("each", [1, 2, 5, 33])
@pytest.mark.parametrize("count", [2000, 2046, 2048, 2455, 9999, 10_000])
def test_rows_that_are_left_are_not_thinned_again(count: int, each: int) -> None:
    """An example's probes and its gradient are left out together: what is left is a multiple of `each`."""
    specs = {"x": LayerSpec("x", 1 << 10, 1 << 10, 1 << 10, 1 << 10, 1)}
    left = -(-count // thinning(count, specs, each)) * each
    assert left <= 2048 and thinning(left, specs) == 1
    assert left >= min(count * each, 1000)

"""Truncation: rank-c factors against the SVD, the optimal approximation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs.truncation import factorise, truncate


def optimal_error(g: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svdvals(g.double())[:, rank:].square().sum(dim=1).sqrt()


def error(g: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (g.double() - torch.bmm(left.transpose(1, 2), right).double()).flatten(1).norm(dim=1)


def sequence_gradients(n: int, a: int, b: int, positions: int) -> torch.Tensor:
    """Sums over positions of outer products whose sizes fall off, as gradients over a sequence do."""
    weights = torch.exp(-torch.arange(positions) / 6.0)
    x = torch.randn(n, positions, a) * weights[None, :, None]
    return x.transpose(1, 2) @ torch.randn(n, positions, b)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(32, 32), (48, 20), (20, 48)])
def test_within_one_per_cent_of_the_svd(rank: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(rank)
    g = sequence_gradients(400, *shape, positions=40)
    left, right = truncate(g, rank)
    ratio = error(g, left, right).square().sum().sqrt() / optimal_error(g, rank).square().sum().sqrt()
    assert ratio <= 1.01


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_wide_layers(rank: int) -> None:
    torch.manual_seed(rank)
    g = sequence_gradients(60, 70, 90, positions=40)
    left, right = truncate(g, rank)
    assert error(g, left, right).square().sum() <= 1.01**2 * optimal_error(g, rank).square().sum()


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_steep_spectra(rank: int) -> None:
    """Singular values 1, .1, .01, ...: pairs far below the first are found too."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(50, 8, 8)).Q, torch.linalg.qr(torch.randn(50, 12, 12)).Q[:, :, :8]
    g = (u * 10.0 ** -torch.arange(8)) @ v.transpose(1, 2)
    left, right = truncate(g, rank)
    assert (error(g, left, right) <= 1.01 * optimal_error(g, rank) + 1e-6).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e15])
def test_scale_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    g = sequence_gradients(50, 16, 12, positions=20)
    left, right = truncate(g * scale, 2)
    base_left, base_right = truncate(g, 2)
    got, base = torch.bmm(left.transpose(1, 2), right) / scale, torch.bmm(base_left.transpose(1, 2), base_right)
    assert torch.allclose(got, base, atol=1e-4 * float(base.abs().max()))
    assert torch.allclose(left.norm(dim=2), right.norm(dim=2), rtol=1e-3)


def test_degenerate_matrices() -> None:
    zero = torch.zeros(1, 6, 5)
    rank_one = torch.outer(torch.randn(6), torch.randn(5))[None]
    mixed = torch.cat([zero, rank_one, torch.randn(1, 6, 5)])
    left, right = truncate(mixed, 3)
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    assert float(error(mixed, left, right)[0]) == 0
    assert float(error(mixed, left, right)[1]) < 1e-5


def test_first_pairs_are_the_lower_rank() -> None:
    """Pairs come in falling order, so that a rank can be cut down later."""
    torch.manual_seed(1)
    g = sequence_gradients(200, 24, 24, positions=30)
    left, right = truncate(g, 4)
    cut = error(g, left[:, :1], right[:, :1]).square().sum().sqrt()
    assert cut / optimal_error(g, 1).square().sum().sqrt() <= 1.01


def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(2)
    g = sequence_gradients(40, 16, 16, positions=10)
    left, right = truncate(g, 3)
    alone_left, alone_right = truncate(g[7:8], 3)
    assert torch.allclose(
        torch.bmm(left.transpose(1, 2), right)[7:8], torch.bmm(alone_left.transpose(1, 2), alone_right), atol=1e-5
    )


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 5),
    a=st.integers(1, 9),
    b=st.integers(1, 9),
    m=st.integers(1, 4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_exact_where_few_positions_or_full_rank(n: int, a: int, b: int, m: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(n, a, m, generator=generator), torch.randn(n, b, m, generator=generator)
    dense = torch.bmm(left, right.transpose(1, 2))
    spec = LayerSpec("x", a, b, a, b, min(rank, a, b))
    for gradient in (LayerGradient.from_pair(left, right), LayerGradient.from_dense(dense)):
        got = factorise(GradientBlock(np.arange(n), {"x": gradient}), {"x": spec})["x"].dense()
        size = float(dense.norm()) + 1e-12
        if spec.dense or m <= spec.rank:
            # A dense gradient of rank m <= c is found by iteration, to its precision.
            assert float((got - dense).norm()) <= 2e-3 * size
        else:
            best = float(optimal_error(dense, spec.rank).norm())
            assert float((got - dense).norm()) <= 1.2 * best + 1e-4 * size

"""Coordinates in few bits: errors as the theory has them, inner products not shrunk, nothing lost at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.codecs.bits import BITS, CodeLayout, CodeScorer

# Mean squared error of the best uniform quantiser of a unit Gaussian (Max, 1960); 8 bits: step^2 / 12 and clipping.
DISTORTION = {1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 1e-4}


@pytest.mark.parametrize("bits", BITS)
def test_gaussian_rows_lose_what_max_says(bits: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(400, 512) * torch.logspace(-6, 6, 400)[:, None]
    layout = CodeLayout(512, bits, (512,))
    codes = layout.encode(z)
    assert codes.shape == (400, 512 * bits // 8 + 2) and codes.dtype == torch.uint8
    back = layout.decode(codes)
    # The scale that keeps inner products unshrunk costs D / (1 - D) instead of D.
    lost = ((back - z).square().sum(1) / z.square().sum(1)).mean()
    expected = DISTORTION[bits] / (1 - DISTORTION[bits])
    assert 0.7 * expected < float(lost) < 1.3 * expected
    # Scales are bfloat16.
    along = (back * z).sum(1) / z.square().sum(1)
    assert torch.allclose(along, torch.ones(400), atol=2**-8)
    cosine = (back * z).sum(1) / back.norm(dim=1) / z.norm(dim=1)
    assert abs(float(cosine.mean()) - layout.cosine) < 3e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_pieces_have_their_own_scales(bits: int, queries: int) -> None:
    torch.manual_seed(0)
    widths = (33, 0, 5, 64)
    layout = CodeLayout(sum(widths), bits, widths)
    sizes = torch.cat([torch.full((w,), 10.0**e) for w, e in zip(widths, (-6, 0, 3, 1), strict=True)])
    z = torch.randn(700, layout.dim) * sizes
    z[5, :33] = 0.0
    codes, x = layout.encode(z), torch.randn(queries, layout.dim) / sizes
    assert codes.shape == (700, layout.row_bytes) and layout.row_bytes - layout.packed == 8
    back = layout.decode(codes)
    for piece in layout.pieces:
        # Each piece is rounded by itself.
        if piece.count:
            alone = CodeLayout(piece.count, bits, (piece.count,))
            assert torch.equal(back[:, piece.coordinates], alone.decode(alone.encode(z[:, piece.coordinates])))
    assert not back[5, :33].any()
    expected = x.double() @ back.double().T
    got = CodeScorer(layout, x).score(codes)
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert CodeScorer(layout, x).score(codes[:0]).shape == (queries, 0)
    weights = torch.rand(layout.dim) / sizes**2
    squares = back.double().square() @ weights.double()
    assert torch.allclose(layout.squares(codes, weights).double(), squares, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any),
    bits=st.sampled_from(BITS),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
    zero=st.booleans(),
)
def test_any_finite_row_comes_back_finite(widths: list[int], bits: int, exponent: int, seed: int, zero: bool) -> None:
    dim = sum(widths)
    z = np.random.default_rng(seed).standard_normal((3, dim)).astype("f4") * np.float32(10.0**exponent)
    z[0] *= not zero
    layout = CodeLayout(dim, bits, tuple(widths))
    codes = layout.encode(torch.from_numpy(z))
    back = layout.decode(codes).numpy()
    assert codes.shape == (3, layout.row_bytes) and layout.row_bytes % 2 == 0
    assert np.isfinite(back).all() and back.shape == z.shape
    assert not zero or not back[0].any()
    if bits == 8:
        size = np.abs(z).max(axis=1, keepdims=True)
        assert (np.abs(back - z) <= 0.2 * size + 1e-38).all()

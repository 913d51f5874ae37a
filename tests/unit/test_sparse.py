"""Rows that name their own largest coordinates: what they stand for, and that they are scored as that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.codecs import sparse
from lorif_index.codecs.sparse import ENTRY_BYTES, MOST_PLACES, SparseLayout


def by_hand(z: np.ndarray, entries: int) -> np.ndarray:
    """What rows stand for, in float64, without packing: of the largest the nearest power of 1.5 above a scale, which is
    the least of them, or 1.5^15 below the most."""
    out = np.zeros(z.shape)
    for row, made in zip(z.astype(np.float64), out, strict=True):
        named = np.argsort(-np.abs(row), kind="stable")[:entries]
        named = named[row[named] != 0]
        if len(named):
            sizes = np.abs(row[named])
            scale = float(torch.tensor(max(sizes.min(), sizes.max() / 1.5**15)).float().to(torch.bfloat16))
            levels = np.log(sizes / scale) / np.log(1.5)
            keep = levels > -0.5
            made[named[keep]] = np.sign(row[named[keep]]) * scale * 1.5 ** np.round(levels[keep]).clip(0, 15)
    return out


@pytest.mark.parametrize(("dim", "entries"), [(40, 7), (40, 40), (40, 60), (1, 1), (3000, 100)])
def test_rows_stand_for_their_largest_coordinates(dim: int, entries: int) -> None:
    torch.manual_seed(0)
    layout = SparseLayout(dim, entries)
    z = torch.randn(20, dim) ** 3 * torch.logspace(-6, 6, 20)[:, None]
    codes = layout.encode(z)
    assert codes.shape == (20, layout.row_bytes) and codes.dtype == torch.uint8
    assert layout.row_bytes == ENTRY_BYTES * entries + 2
    np.testing.assert_allclose(layout.decode(codes).numpy(), by_hand(z.numpy(), entries), rtol=1e-5)
    assert layout.label == f"{entries} largest" and layout.cosine == 1


def test_each_is_within_a_quarter_of_what_it_was() -> None:
    torch.manual_seed(0)
    z = torch.randn(300, 500)
    back = SparseLayout(500, 50).decode(SparseLayout(500, 50).encode(z))
    named = back != 0
    assert bool((named.sum(dim=1) == 50).all())
    assert bool((z.abs()[named].reshape(300, 50).amin(dim=1) >= z.abs().masked_fill(named, 0).amax(dim=1)).all())
    ratio = (back / z)[named]
    assert float(ratio.min()) > 1.5**-0.51 and float(ratio.max()) < 1.5**0.51
    # Neither longer nor shorter, together.
    kept = (back * z).sum(dim=1) / z.masked_fill(~named, 0).square().sum(dim=1)
    assert abs(float(kept.mean()) - 1) < 0.05


def test_rows_with_less_than_they_could_name() -> None:
    layout = SparseLayout(30, 10)
    z = torch.zeros(4, 30)
    z[1, 29], z[2, [0, 7]] = -3.0, torch.tensor([2.0, 4.5])
    z[3] = 1.0
    back = layout.decode(layout.encode(z))
    assert torch.equal(back[0], z[0]) and torch.equal(back[1], z[1]) and torch.equal(back[2], z[2])
    assert float(back[3].sum()) == 10.0 and int((back[3] != 0).sum()) == 10
    assert torch.equal(layout.scorer(torch.ones(1, 30)).score(layout.encode(z)), back.sum(dim=1)[None])


def test_what_is_far_below_the_largest_is_nothing() -> None:
    layout = SparseLayout(8, 3)
    z = torch.zeros(1, 8)
    z[0, 2], z[0, 5], z[0, 6] = 1.0, 1.5**-15, 1.5**-17
    back = layout.decode(layout.encode(z))[0]
    assert float(back[2]) == pytest.approx(1.0, rel=4e-3) and float(back[5]) == pytest.approx(1.5**-15, rel=4e-3)
    assert back.nonzero().flatten().tolist() == [2, 5]


def test_the_last_place_that_can_be_named() -> None:
    layout = SparseLayout(MOST_PLACES, 2)
    z = torch.zeros(2, MOST_PLACES)
    z[0, MOST_PLACES - 1], z[0, 0] = -1.0, 1.0
    codes = layout.encode(z)
    assert torch.equal(layout.decode(codes), z)
    x = torch.randn(3, MOST_PLACES)
    torch.testing.assert_close(layout.scorer(x).score(codes), x @ z.T)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("dim", "entries"), [(300, 20), (10, 16)])
def test_scores_are_inner_products_with_what_is_stored(queries: int, dim: int, entries: int) -> None:
    torch.manual_seed(0)
    layout = SparseLayout(dim, entries)
    z = torch.randn(1100, dim)
    z[5] = 0
    codes, x = layout.encode(z), torch.randn(queries, dim)
    expected = x.double() @ layout.decode(codes).double().T
    scorer = layout.scorer(x)
    found = scorer.score(codes)
    assert found.shape == (queries, 1100) and found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    # What was answered stays when more is asked.
    other, kept = scorer.score(codes.flip(0)), found.clone()
    assert torch.equal(found, kept) and torch.allclose(other.flip(1), found, atol=1e-4)
    assert scorer.score(codes[:0]).shape == (queries, 0)


def test_places_are_in_rising_order() -> None:
    places, _ = SparseLayout(300, 20).unpacked(SparseLayout(300, 20).encode(torch.randn(50, 300)))
    assert bool((places.diff(dim=1) > 0).all())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-37, 1e-30, 1.0, 1e30, 1e37]),
)
def test_nothing_overflows_and_ties_have_a_place(dim: int, entries: int, seed: int, size: float) -> None:
    layout = SparseLayout(dim, entries)
    values = np.random.default_rng(seed).integers(-2, 3, size=(4, dim)).astype(np.float32)
    z = torch.from_numpy(values * np.float32(size))
    codes = layout.encode(z)
    back = layout.decode(codes).numpy()
    assert np.isfinite(back).all() and codes.shape == (4, layout.row_bytes)
    named = back != 0
    assert (named.sum(axis=1) == np.minimum((values != 0).sum(axis=1), entries)).all()
    assert (np.sign(back)[named] == np.sign(values)[named]).all()
    # What is not named is not larger than what is.
    least = np.where(named, np.abs(values), np.inf).min(axis=1)
    assert (np.where(named, 0, np.abs(values)).max(axis=1) <= least).all()
    assert np.allclose(back[named], z.numpy()[named], rtol=0.25)
    again = layout.decode(layout.encode(torch.from_numpy(back))).numpy()
    np.testing.assert_allclose(again, back, rtol=1e-2)


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SparseLayout(60, 9)
    codes, x = layout.encode(torch.randn(33, 60)), torch.randn(5, 60)
    whole = layout.scorer(x).score(codes)
    monkeypatch.setattr(sparse, "_BLOCK_ROWS", 4)
    torch.testing.assert_close(layout.scorer(x).score(codes), whole)

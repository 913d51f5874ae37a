"""The largest of each group: stored as said, lost as theory has it, scored as decoded, nothing lost at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorif_index.codecs.largest import GROUPS, LargestLayout, code_bits, codes_of_whole_bytes, kept_share


def layout_of(group: int, *units: int) -> LargestLayout:
    """Pieces of so many groups."""
    return LargestLayout(sum(units) * group, group, tuple(count * group for count in units))


def by_hand(z: np.ndarray, layout: LargestLayout) -> np.ndarray:
    """What rows stand for, in float64, without packing: the largest of each group, |z|^2 / sum |largest| long."""
    out = np.zeros_like(z, dtype=np.float64)
    for row, made in zip(z.astype(np.float64), out, strict=True):
        at = 0
        for width in layout.widths:
            piece = row[at : at + width]
            places = [g + int(np.abs(piece[g : g + layout.group]).argmax()) for g in range(0, width, layout.group)]
            if np.abs(piece[places]).sum() > 0:
                scale = (piece**2).sum() / np.abs(piece[places]).sum()
                made[[at + p for p in places]] = scale * np.where(piece[places] >= 0, 1.0, -1.0)
            at += width
    return out


@pytest.mark.parametrize("group", GROUPS)
def test_rows_stand_for_the_largest_of_each_group(group: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 17, 0, 1, 9)
    z = torch.randn(20, layout.dim) * torch.logspace(-6, 6, 20)[:, None]
    z[3, : layout.widths[0]] = 0.0
    z[4] = 0.0
    codes = layout.encode(z)
    assert codes.shape == (20, layout.row_bytes) and codes.dtype == torch.uint8
    assert layout.row_bytes - layout.packed == 2 * 4
    least = -(-27 * code_bits(group) // 8)
    assert least <= layout.packed <= least + codes_of_whole_bytes(code_bits(group)) and layout.packed % 2 == 0
    expected = by_hand(z.numpy(), layout)
    # Scales are bfloat16.
    np.testing.assert_allclose(layout.decode(codes).numpy(), expected, rtol=2**-8)
    assert bool((layout.decode(codes)[4] == 0).all())


@pytest.mark.parametrize("group", GROUPS)
def test_gaussian_rows_keep_what_theory_says(group: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 64)
    z = torch.randn(300, layout.dim)
    back = layout.decode(layout.encode(z))
    cosine = (back * z).sum(1) / back.norm(dim=1) / z.norm(dim=1)
    assert abs(float(cosine.square().mean()) / kept_share(group) - 1) < 0.03
    assert abs(float(cosine.mean()) / layout.cosine - 1) < 0.02
    along = (back * z).sum(1) / z.square().sum(1)
    assert torch.allclose(along, torch.ones(300), atol=5e-3)


def test_a_bit_keeps_more_in_larger_groups() -> None:
    by_bit = [0.6366, *(kept_share(g) * g / code_bits(g) for g in GROUPS)]
    assert by_bit == sorted(by_bit) and 0.99 < by_bit[-1] < 2 * np.log(2)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("queries", [1, 8, 9, 70])
def test_scores_are_inner_products_with_what_is_stored(group: int, queries: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(group, 7, 0, 12)
    codes, x = layout.encode(torch.randn(1100, layout.dim)), torch.randn(queries, layout.dim)
    expected = x.double() @ layout.decode(codes).double().T
    scorer = layout.scorer(x)
    assert float((scorer.score(codes) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert scorer.score(codes[:0]).shape == (queries, 0)
    weights = torch.rand(layout.dim)
    squares = layout.decode(codes).double().square() @ weights.double()
    assert torch.allclose(layout.squares(codes, weights).double(), squares, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(GROUPS), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_nothing_overflows_and_ties_have_a_place(group: int, seed: int, size: float) -> None:
    layout = layout_of(group, 5)
    values = np.random.default_rng(seed).integers(-2, 3, size=(4, layout.dim)).astype(np.float32)
    z = torch.from_numpy(values * np.float32(size))
    back = layout.decode(layout.encode(z))
    assert bool(torch.isfinite(back).all())
    kept = back.numpy() != 0
    assert (kept.reshape(4, -1, group).sum(axis=2) <= 1).all()
    # What is kept is one of the largest, with its sign (+ where all of a group is zero).
    largest = np.abs(values).reshape(4, -1, group).max(axis=2).repeat(group, axis=1)
    assert (np.abs(values)[kept] == largest[kept]).all()
    assert ((np.sign(back.numpy()) == np.sign(values)) | (values == 0))[kept].all()

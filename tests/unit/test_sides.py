"""Sides: eigenvectors of both sides of a layer's gradients, against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.curvature import sides
from lorif_index.curvature.sides import Sides, fit_sides, turns

A, B = 12, 9
CPU = torch.device("cpu")


def gradients(n: int, seed: int = 0) -> torch.Tensor:
    """(n, A, B) whose sides have falling spectra, in bases of their own."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in (A, B))
    fall = torch.exp(-0.4 * torch.arange(A))[:, None] * torch.exp(-0.5 * torch.arange(B))
    return left @ (torch.randn(n, A, B, generator=generator) * fall) @ right


def fit(g: torch.Tensor, block: int = 64) -> Sides:
    spec = LayerSpec("x", g.shape[1], g.shape[2], g.shape[1], g.shape[2], 1)
    walked = []

    def walk() -> Iterator[GradientBlock]:
        for i in range(0, len(g), block):
            part = g[i : i + block]
            yield GradientBlock(np.arange(i, i + len(part)), {"x": LayerGradient.from_dense(part)})

    found = fit_sides(walk, len(g), {"x": spec}, walked.append, CPU)[0]["x"]
    assert sum(walked) == len(g)
    return found


def test_they_are_the_eigenvectors_of_both_sides() -> None:
    g = gradients(700)
    found = fit(g)
    assert found.shape == (A, B) and found.dim == A * B
    for side, expected in zip((found.left, found.right), oracle.sides(g.double().numpy()), strict=True):
        assert side is not None and side.dtype == torch.float32
        assert np.abs(np.abs((side.double().numpy() * expected).sum(axis=0)) - 1).max() < 1e-4
        assert torch.allclose(side.T @ side, torch.eye(len(side)), atol=1e-5)
        # The same rows give the same signs.
        assert bool((side.gather(0, side.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_turned_coordinates_are_products_with_the_eigenvectors() -> None:
    found, g = fit(gradients(300)), gradients(6, seed=1).flatten(1)
    assert found.left is not None and found.right is not None
    basis = oracle.products(found.left.double().numpy(), found.right.double().numpy())
    for flat in (g, g.double()):
        turned = found.turned(flat)
        assert turned.dtype == flat.dtype
        np.testing.assert_allclose(turned.numpy(), flat.numpy() @ basis, atol=1e-6 * float(g.abs().max()) * A)
        torch.testing.assert_close(found.turned_back(turned), flat, rtol=0, atol=1e-5)
    assert found.turned(g[:0]).shape == found.turned_back(g[:0]).shape == (0, A * B)


@pytest.mark.parametrize("wide", [(True, False), (False, True), (True, True)])
def test_a_wide_side_stays_as_it_was(wide: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the words of a head do."""
    g = torch.randn(40, *(12 if side else 5 for side in wide))
    whole = fit(g)
    monkeypatch.setattr(sides, "TURNED_UP_TO", 11)
    assert turns(11) and not turns(12)
    found = fit(g)
    assert [side is None for side in (found.left, found.right)] == list(wide)
    for side, other in ((found.left, whole.left), (found.right, whole.right)):
        assert side is None or other is None or torch.equal(side, other)
    parts = (np.eye(w) if m is None else m.numpy() for m, w in zip((found.left, found.right), g.shape[1:], strict=True))
    np.testing.assert_allclose(
        found.turned(g.flatten(1)).numpy(), g.flatten(1).numpy() @ oracle.products(*parts), atol=1e-5
    )
    torch.testing.assert_close(found.turned_back(found.turned(g.flatten(1))), g.flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [5000, 7, 1])
def test_of_many_rows_some_are_taken_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "_NUMBERS", 2500 * A * B)
    g = gradients(5000)
    # Every other row is looked at.
    g[1::2] *= 1e3
    found = fit(g, block)
    expected = fit(g[::2].clone())
    assert found.left is not None and expected.left is not None
    assert float((found.left - expected.left).abs().max()) < 1e-3


def test_rows_that_overflow_leave_a_basis() -> None:
    """What is fitted in it says which layer it was."""
    found = fit(torch.full((3, 4, 2), 1e30))
    assert found.left is not None and torch.equal(found.left, torch.eye(4))

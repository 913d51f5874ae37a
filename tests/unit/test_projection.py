"""Projections are the same numbers everywhere, for ever."""

from __future__ import annotations

import numpy as np
import torch

from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.linalg.projection import Projections, projection_matrix


def test_golden_values() -> None:
    """Pinned: a change here would make every stored index unreadable in silence."""
    signs = projection_matrix(0, "layer", "in", 4, 3).sign().int().tolist()
    assert signs == GOLDEN_IN
    signs = projection_matrix(7, "transformer.h.0.mlp.c_fc", "out", 3, 2).sign().int().tolist()
    assert signs == GOLDEN_OUT


GOLDEN_IN = [[-1, -1, -1], [1, -1, 1], [1, -1, 1], [1, -1, -1]]
GOLDEN_OUT = [[-1, 1], [1, 1], [-1, -1]]


def test_entries_and_keys() -> None:
    p = projection_matrix(1, "a", "in", 500, 40)
    assert p.shape == (500, 40) and p.dtype == torch.float32
    assert torch.equal(p.abs(), torch.full_like(p, 40**-0.5))
    assert abs(float(p.mean())) < 4 * 40**-0.5 / (500 * 40) ** 0.5
    for other in (
        projection_matrix(2, "a", "in", 500, 40),
        projection_matrix(1, "b", "in", 500, 40),
        projection_matrix(1, "a", "out", 500, 40),
    ):
        agree = float((other == p).float().mean())
        assert 0.45 < agree < 0.55
    # Rows are nearly orthonormal in expectation: (P P^T) has unit diagonal.
    assert torch.allclose((p @ p.T).diagonal(), torch.ones(500))


def test_no_device_generator_is_used() -> None:
    torch.manual_seed(0)
    a = projection_matrix(3, "x", "in", 70, 9)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(a, projection_matrix(3, "x", "in", 70, 9))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_identity_where_not_smaller() -> None:
    assert torch.equal(projection_matrix(0, "x", "in", 5, 5), torch.eye(5))


def test_pairs_and_dense_gradients_project_alike() -> None:
    spec = LayerSpec("x", 12, 9, 5, 4, 1)
    projections = Projections({"x": spec}, seed=3)
    left, right = torch.randn(6, 12, 2), torch.randn(6, 9, 2)
    dense = torch.bmm(left, right.transpose(1, 2))
    ids = np.arange(6)
    one = projections.project(GradientBlock(ids, {"x": LayerGradient.from_pair(left, right)})).layers["x"].dense()
    two = projections.project(GradientBlock(ids, {"x": LayerGradient.from_dense(dense)})).layers["x"].dense()
    expected = projection_matrix(3, "x", "in", 12, 5).T @ dense @ projection_matrix(3, "x", "out", 9, 4)
    assert torch.allclose(one, expected, atol=1e-5) and torch.allclose(two, expected, atol=1e-5)

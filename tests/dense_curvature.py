"""A layer's fitted curvature as a dense float64 matrix: only what the parts of `LayerCurvature` mean, by NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lorif_index import Index
from lorif_index.curvature.fit import LayerCurvature


def dense(layer: LayerCurvature, lam: float) -> np.ndarray:
    """H (D, D) in the coordinates of gradients."""
    left, right = (
        np.eye(width) if side is None else side.double().numpy()
        for side, width in zip((layer.sides.left, layer.sides.right), layer.sides.shape, strict=True)
    )
    # Column (a, b) is vec(u_a w_b^T).
    basis = np.einsum("ia,jb->ijab", left, right).reshape(layer.dim, layer.dim)
    factor, squares = layer.factor.double().numpy(), layer.squares.double().numpy()
    inside = layer.share * np.diag(squares) + (1 - layer.share) * factor @ factor.T + lam * np.eye(layer.dim)
    return np.asarray(basis @ inside @ basis.T)


def relative(index: Index, multiple: float | None = None) -> dict[str, float]:
    """Layer -> lambda, a multiple of trace(C) / D; None: of the index's own."""
    multiple = index.damping.to_json()["multiple"] if multiple is None else multiple
    return {name: multiple * index.curvature[name].trace / index.curvature[name].dim for name in index.layers}


def scores(
    index: Index,
    queries: dict[str, Any],
    rows: dict[str, Any],
    lam: dict[str, float],
    names: Iterable[str] | None = None,
) -> np.ndarray:
    """(q, n): <H^-1 g_q, g_i>, summed over layers."""
    total: Any = 0.0
    for name in index.layers if names is None else names:
        g, each = (np.asarray(part[name], dtype=np.float64).reshape(len(part[name]), -1) for part in (queries, rows))
        total = total + np.linalg.solve(dense(index.curvature[name], lam[name]), g.T).T @ each.T
    return np.asarray(total)

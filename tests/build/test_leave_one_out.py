"""What a score means: against real leave-one-out refits of l2-regularised multinomial logistic regression.

The objective is (1/n) sum_i loss_i(W) + lambda/2 |W|^2 with lambda = 1/(n C), no intercept; leaving example i out drops
its term and keeps 1/n. Its Hessian is the GGN plus lambda I, so the curvature is fed the GGN's rows and the damping is
lambda. Every refit is run to convergence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lorif_index import AbsoluteDamping, BuildConfig, CurvatureRows, Index

N, QUERIES, REMOVALS, C = 1500, 20, 100, 0.1
LAM = 1 / (N * C)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order] / 16.0), torch.from_numpy(y[order])


def gradient(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the objective with 1/N kept, whatever the number of examples."""
    return (torch.softmax(x @ w.T, 1) - functional.one_hot(y, 10)).T @ x / N + LAM * w


def hessian(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(x @ w.T, 1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(640, 640) / N + LAM * torch.eye(640)


def fit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w = torch.zeros(10, 64, dtype=torch.float64)
    for _ in range(30):
        g = gradient(w, x, y)
        if g.norm() < 1e-13:
            return w
        w = w - torch.linalg.solve(hessian(w, x), g.flatten()).reshape(10, 64)
    raise AssertionError(f"not converged: gradient norm {g.norm()}")


def refit(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """From the full fit, with its Hessian as the preconditioner, until the gradient vanishes."""
    for _ in range(100):
        g = gradient(w, x, y)
        if g.norm() < 1e-12:
            return w
        w = w - torch.cholesky_solve(g.reshape(-1, 1), factor).reshape(10, 64)
    raise AssertionError(f"not converged: gradient norm {g.norm()}")


def test_scores_predict_real_leave_one_out_refits(tmp_path: Path) -> None:
    x, y = digits()
    asked, answers = x[N : N + QUERIES], y[N : N + QUERIES]
    x, y = x[:N], y[:N]
    w = fit(x, y)

    def losses(weights: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(asked @ weights.T, answers, reduction="none")

    factor = torch.linalg.cholesky(hessian(w, x))
    removed = np.random.default_rng(1).choice(N, REMOVALS, replace=False)
    actual = []
    for i in removed.tolist():
        kept = torch.arange(N) != i
        actual.append((losses(refit(w, x[kept], y[kept], factor)) - losses(w)).numpy())
    truth = np.stack(actual, axis=1)

    model = torch.nn.Linear(64, 10, bias=False).double()
    model.weight.data.copy_(w)
    p = torch.softmax(x @ w.T, 1)
    # sqrt(p_c) times the gradient of -log p_c, (64, 10), for every example and class.
    rows = p.sqrt()[:, :, None, None] * x[:, None, :, None] * (p[:, None, None, :] - torch.eye(10)[None, :, None, :])
    ggn = CurvatureRows([{"": part} for part in rows.reshape(-1, 64, 10).split(1000)], rows_per_example=10)
    config = BuildConfig(
        projection_dim=None,
        rank=None,
        curvature_rank=None,
        dtype="float32",
        damping=AbsoluteDamping(LAM),
        store="factors",
        coarse=None,
    )
    # H itself, and the index's scores by it.
    each = (torch.softmax(x @ w.T, 1) - functional.one_hot(y, 10))[:, :, None] * x[:, None, :]
    asks = (torch.softmax(asked @ w.T, 1) - functional.one_hot(answers, 10))[:, :, None] * asked[:, None, :]
    exact = (asks.flatten(1) @ torch.cholesky_solve(each.flatten(1).T, factor)).numpy()
    figures = {}
    for name, curvature in (("ggn", "ggn"), ("ggn, its rows given", ggn), ("empirical second moment", "empirical")):
        index = Index.build(tmp_path / name, model=model, data=(x, y), curvature=curvature, config=config)
        scores = index.scores((asked, answers)).astype(np.float64)
        if name != "empirical second moment":
            assert np.abs(scores - exact).max() <= 5e-4 * np.abs(exact).max()
        predicted = scores[:, removed] / N
        a, b = predicted.ravel(), truth.ravel()
        figures[name] = (np.corrcoef(a, b)[0, 1], (a @ b) / (a @ a))
        print(f"\nleave-one-out, {name}: Pearson {figures[name][0]:.4f}, slope {figures[name][1]:.4f}")
    pearson, slope = figures["ggn"]
    assert pearson >= 0.98 and 0.9 <= slope <= 1.1
    assert figures["ggn, its rows given"] == pytest.approx(figures["ggn"], rel=1e-4)
    # The empirical second moment is another matrix: it ranks well, and its scale is off.
    assert figures["empirical second moment"][0] >= 0.8

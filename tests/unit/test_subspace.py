"""Fits of mapped rows: the map is applied to the directions, and the same is found as of the mapped rows themselves."""

from __future__ import annotations

import pytest
import torch

from lorif_index.linalg.subspace import Eigenpairs, SubspaceFit, fit_in_groups

N, D = 120, 64


class Matrix:
    """A dense M."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.matrix.T.to(rows.dtype)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.matrix.to(rows.dtype)


def found(rows: torch.Tensor, rank: int, lift: Matrix | None, passes: int) -> Eigenpairs:
    def walk(active: dict[str, SubspaceFit]) -> None:
        for part in rows.split(17):
            active["x"].add(part)

    fit = SubspaceFit(("x",), D, rank, N, 0, torch.device("cpu"), lift=lift)
    assert fit.exact == (rank > 5)
    ((_, pairs),) = fit_in_groups({"x": fit}, passes, float(N), walk, lambda _: None)  # type: ignore[arg-type]
    return pairs


@pytest.mark.parametrize("rank", [3, 40])
def test_a_map_of_the_rows(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N, D, generator=generator) * torch.logspace(0, -3, D)
    lift = Matrix(torch.randn(D, D, generator=generator) / D**0.5)
    mapped = lift.forward(rows)
    ours, theirs = found(rows, rank, lift, 3), found(mapped, rank, None, 3)
    values, vectors = torch.linalg.eigh(mapped.double().T @ mapped.double() / N)
    torch.testing.assert_close(ours.values[:rank], values.flip(0)[:rank], rtol=1e-4, atol=1e-6 * float(values[-1]))
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-6 * float(values[-1]))
    torch.testing.assert_close(ours.vectors[:, :3], theirs.vectors[:, :3], rtol=0, atol=1e-4)
    assert float((ours.vectors[:, :3].double().T @ vectors.flip(1)[:, :3]).abs().diagonal().min()) > 0.9999

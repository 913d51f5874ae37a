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


@pytest.mark.parametrize("falls", [0.6, 1.5])
@pytest.mark.parametrize("times", [2, 4])
def test_one_walk_is_enough(falls: float, times: int) -> None:
    """Of slowly and quickly falling spectra, also where there are fewer rows than directions in the block."""
    dim, rank = 400, 20
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    for count in (2000, 50):
        rows = (torch.randn(count, dim, generator=generator) * torch.arange(1, dim + 1.0) ** -falls) @ turn
        fit = SubspaceFit(("x",), dim, rank, count, 0, torch.device("cpu"), times=times)
        assert (fit.exact, fit.block, fit.passes(0)) == (False, times * 30, 1)
        walks = []

        def walk(active: dict[str, SubspaceFit], rows: torch.Tensor = rows, walks: list[int] = walks) -> None:
            walks.append(1)
            for part in rows.split(64):
                active["x"].add(part)

        ((_, pairs),) = fit_in_groups({"x": fit}, 0, 1.0, walk, lambda _: None)  # type: ignore[arg-type]
        whole = rows.double().T @ rows.double()
        values = torch.linalg.eigvalsh(whole).flip(0)
        vectors = pairs.vectors.double()
        kept = float((vectors * (whole @ vectors)).sum())
        most = float(values[: fit.rank].sum())
        left = float(whole.trace()) - most
        # Of what the best leave a few hundredths more are lost.
        assert most - (0.35 if times == 2 else 0.15) * left <= kept <= most * (1 + 1e-6)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(fit.rank, dtype=torch.float64), rtol=0, atol=1e-5)
        assert pairs.trace == pytest.approx(float(whole.trace()), rel=1e-5)
        assert len(walks) == 1 and len(pairs.values) == 30 and float(pairs.values[0]) <= float(values[0]) * 1.001

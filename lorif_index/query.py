"""Query: the Woodbury-preconditioned transform that turns a question into one small matrix per layer.

Q'_l = H_l^-1 vec(G_q), H = V S V^T + lambda I (LoRIF, arXiv:2601.21929, section 3): inside the subspace each direction
is divided by its eigenvalue + lambda, outside by mu, which is lambda ("truncated"), lambda + the mean tail eigenvalue
("tail-corrected"), or what a falling tail divides a gradient by on average ("log-mean"). It is applied to the query,
and to the query only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .curvature import LayerCurvature
from .damping import Damping
from .errors import CurvatureError

# For so few rows, layers of one shape are multiplied together: a row by itself takes three times as long.
_FEW_ROWS = 8
# A tail of less than this share of the trace is rounding, and has no shape.
_NO_TAIL = 1e-5


def products(
    rows: Mapping[str, torch.Tensor], matrices: Mapping[str, torch.Tensor], *, transposed: bool = False
) -> dict[str, torch.Tensor]:
    """Layer -> rows (q, a) @ matrix (a, b), or @ matrix^T of a (b, a); few rows with neighbours in memory at once."""
    out: dict[str, torch.Tensor] = {}
    for names in _neighbours([(name, matrices[name]) for name in rows]):
        if len(names) == 1 or len(rows[names[0]]) > _FEW_ROWS:
            out |= {name: rows[name] @ (matrices[name].T if transposed else matrices[name]) for name in names}
            continue
        first = matrices[names[0]]
        together = first.as_strided((len(names), *first.shape), (first.numel(), *first.stride()))
        stacked = torch.stack([rows[name] for name in names])
        if transposed:
            # The matrices first: they are read in the order in which they lie.
            found = torch.bmm(together, stacked.transpose(1, 2)).transpose(1, 2)
        else:
            found = torch.bmm(stacked, together)
        out |= dict(zip(names, found, strict=True))
    return out


def _neighbours(matrices: list[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Runs of names whose matrices have one shape and lie one behind the other in one storage."""
    runs: list[list[str]] = []
    last: torch.Tensor | None = None
    for name, matrix in matrices:
        follows = (
            last is not None
            and matrix.shape == last.shape
            and matrix.is_contiguous()
            and last.is_contiguous()
            and matrix.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
            and matrix.storage_offset() == last.storage_offset() + last.numel()
        )
        if follows:
            runs[-1].append(name)
        else:
            runs.append([name])
        last = matrix
    return runs


def log_mean(lam: float, largest: float, mean: float) -> float:
    """mu of a tail of eigenvalues that fall exponentially from `largest` and have that mean.

    A gradient's energy lies where the eigenvalues are large, so that 1 / (s + lambda), averaged over the tail with
    weight s, is less than at the mean eigenvalue: 1 / mu = int s / (s + lambda) / int s. For s = largest exp(-a u), u
    from 0 to 1, mu is the logarithmic mean of largest + lambda and largest exp(-a) + lambda.
    """
    if not 0 < mean < largest:
        return lam + max(mean, 0.0)
    # (1 - exp(-a)) / a falls from 1 to 0.
    low, high = 0.0, max(2.0 * largest / mean, 2.0)
    for _ in range(100):
        a = (low + high) / 2
        low, high = (a, high) if -math.expm1(-a) / a > mean / largest else (low, a)
    top, bottom = largest + lam, largest * math.exp(-high) + lam
    # Nearly flat: the logarithm would lose its digits, and the means agree.
    return top if top - bottom < 1e-9 * top else (top - bottom) / math.log(top / bottom)


@dataclass(frozen=True)
class Preconditioner:
    """H^-1 of one layer under one damping.

    Attributes:
        basis: V, (D, r) float32.
        inside: (r,) float32, 1 / (S + lambda).
        outside: 1 / mu; 0 where V is complete.
        lam: lambda.
    """

    basis: torch.Tensor
    inside: torch.Tensor
    outside: float
    lam: float

    @classmethod
    def of(cls, name: str, layer: LayerCurvature, damping: Damping, complement: str) -> Preconditioner:
        """From a fitted layer.

        Raises:
            CurvatureError: the damping gives no lambda above 0, so that H is singular.
        """
        lam = damping.value(layer)
        if not lam > 0 or lam == float("inf"):
            raise CurvatureError(
                f"damping {damping} gives lambda={lam} for layer {name!r} (trace {layer.trace:.3g}), which leaves the "
                "curvature singular: pass AbsoluteDamping(...), or leave the layer out with layers="
            )
        tail = layer.tail_mean
        shaped = complement == "log-mean" and tail * (layer.dim - layer.rank) > _NO_TAIL * layer.trace
        if complement == "truncated":
            mu = lam
        elif shaped:
            mu = log_mean(lam, float(layer.eigenvalues[-1]) if layer.rank else tail, tail)
        else:
            mu = lam + tail
        inside = (1.0 / (layer.eigenvalues.double() + lam)).float()
        return cls(layer.basis, inside, 0.0 if layer.rank == layer.dim else 1.0 / mu, lam)

    def within(self, coordinates: torch.Tensor) -> torch.Tensor:
        """a (q, r) such that H^-1 g = V a + outside g, of rows g whose coordinates V^T g (q, r) are given."""
        return coordinates * (self.inside - self.outside)

    def with_outside(self, inside: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """inside + outside g, (q, D)."""
        return torch.add(inside, g, alpha=self.outside) if self.outside else inside

    def apply(self, g: torch.Tensor) -> torch.Tensor:
        """H^-1 g for rows (q, D) float32."""
        return self.with_outside(self.within(g @ self.basis) @ self.basis.T, g)

    def quadratic(self, g: torch.Tensor) -> torch.Tensor:
        """g^T H^-1 g for rows (n, D) float32, (n,)."""
        squares = (g @ self.basis).square_()
        out = squares @ self.inside
        if self.outside:
            rest = (g.square().sum(dim=1) - squares.sum(dim=1)).clamp_min_(0.0)
            out += rest * self.outside
        return out


def transform(
    gradients: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]
) -> dict[str, torch.Tensor]:
    """The transformed query, layer by layer: (q, d_in, d_out) -> (q, d_in, d_out), float32."""
    flat = {name: g.flatten(1) for name, g in gradients.items()}
    bases = {name: preconditioners[name].basis for name in flat}
    within = {name: preconditioners[name].within(c) for name, c in products(flat, bases).items()}
    inside = products(within, bases, transposed=True)
    return {n: preconditioners[n].with_outside(inside[n], flat[n]).reshape(g.shape) for n, g in gradients.items()}

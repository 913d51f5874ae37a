"""Inverse: the Woodbury-preconditioned transform that turns a question into one small matrix per layer.

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

from ..damping import Damping
from ..errors import CurvatureError
from .fit import LayerCurvature

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


def inside_of(flat: Mapping[str, torch.Tensor], curvature: Mapping[str, LayerCurvature]) -> dict[str, torch.Tensor]:
    """Layer -> V^T vec(G), (q, r) float32, of gradients (q, D)."""
    layers = {name: curvature[name] for name in flat}
    reduced = {n: layers[n].reduced(g) for n, g in flat.items()}
    cores = {n: layer.core for n, layer in layers.items()}
    inside = products({n: part[:, : len(cores[n])] for n, part in reduced.items()}, cores)
    return {
        n: torch.cat([part, reduced[n][:, len(cores[n]) :]], dim=1) if len(layers[n].diagonal) else part
        for n, part in inside.items()
    }


def combined(within: Mapping[str, torch.Tensor], curvature: Mapping[str, LayerCurvature]) -> dict[str, torch.Tensor]:
    """Layer -> V a, (q, D) float32, of coordinates a (q, r)."""
    cores = {name: curvature[name].core for name in within}
    widths = {name: core.shape[1] for name, core in cores.items()}
    reduced = products({name: a[:, : widths[name]] for name, a in within.items()}, cores, transposed=True)
    for name, part in reduced.items():
        if len(curvature[name].diagonal):
            reduced[name] = torch.cat([part, within[name][:, widths[name] :]], dim=1)
    return {name: curvature[name].expanded(part) for name, part in reduced.items()}


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
        layer: the curvature.
        inside: (r,) float32, 1 / (S + lambda), with less damping on the diagonal (see `LayerCurvature.damped`).
        outside: 1 / mu; 0 where V is complete.
        lam: lambda.
    """

    layer: LayerCurvature
    inside: torch.Tensor
    outside: float
    lam: float

    def usable(self, name: str) -> Preconditioner:
        """This one, if float32 can hold it.

        Raises:
            CurvatureError: the gradients of the layer are so small that 1 / lambda is beyond float32's range.
        """
        if 1.0 / self.lam <= torch.finfo(torch.float32).max and bool(torch.isfinite(self.inside).all()):
            return self
        raise CurvatureError(
            f"lambda={self.lam:.3g} of layer {name!r} has an inverse beyond float32's range: its gradients are too "
            "small; scale the loss, pass damping=AbsoluteDamping(...), or leave the layer out with layers="
        )

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
        inside = (1.0 / layer.damped(lam)).float()
        return cls(layer, inside, 0.0 if layer.rank == layer.dim else 1.0 / mu, lam)

    def within(self, coordinates: torch.Tensor) -> torch.Tensor:
        """a (q, r) such that H^-1 g = V a + outside g, of rows g whose coordinates V^T g (q, r) are given."""
        return coordinates * (self.inside - self.outside)

    def with_outside(self, inside: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """inside + outside g, (q, D)."""
        return torch.add(inside, g, alpha=self.outside) if self.outside else inside

    def apply(self, g: torch.Tensor) -> torch.Tensor:
        """H^-1 g for rows (q, D) float32."""
        return self.with_outside(self.layer.combined(self.within(self.layer.coordinates(g))), g)

    def quadratic(self, g: torch.Tensor) -> torch.Tensor:
        """g^T H^-1 g for rows (n, D) float32, (n,)."""
        squares = self.layer.coordinates(g).square_()
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
    curvature = {name: preconditioners[name].layer for name in flat}
    within = {name: preconditioners[name].within(c) for name, c in inside_of(flat, curvature).items()}
    inside = combined(within, curvature)
    return {n: preconditioners[n].with_outside(inside[n], flat[n]).reshape(g.shape) for n, g in gradients.items()}


def multiply(
    vectors: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]
) -> dict[str, torch.Tensor]:
    """H v, layer by layer: (q, d_in, d_out) -> (q, d_in, d_out), float32; the inverse of `transform`."""
    flat = {name: v.flatten(1) for name, v in vectors.items()}
    mu = {n: 1.0 / preconditioners[n].outside if preconditioners[n].outside else 0.0 for n in flat}
    within = inside_of(flat, {name: preconditioners[name].layer for name in flat})
    within = {name: a * (1.0 / preconditioners[name].inside - mu[name]) for name, a in within.items()}
    inside = combined(within, {name: preconditioners[name].layer for name in flat})
    return {n: torch.add(inside[n], flat[n], alpha=mu[n]).reshape(v.shape) for n, v in vectors.items()}


def transform_precisely(
    gradients: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]
) -> dict[str, torch.Tensor]:
    """`transform`, with the products in which large terms cancel in float64.

    What is large in g and small in H^-1 g cancels: in float32, <H^-1 a, b> and <a, H^-1 b> agree to some 1e-4 of the
    largest score only. It cancels among the products that V is made of, so that these are computed in float64, a layer
    at a time. Turning G along a grid's sides before and H^-1 G back after only perturbs what goes in and what comes
    out: float32 is enough.
    """
    # One buffer for all layers: fresh memory of that size costs as much as a product.
    cores = [preconditioners[name].layer.core for name in gradients]
    buffer = torch.empty(max(core.numel() for core in cores), dtype=torch.float64, device=cores[0].device)
    out = {}
    for (name, g), single in zip(gradients.items(), cores, strict=True):
        one = preconditioners[name]
        core, grid = buffer[: single.numel()].view(single.shape).copy_(single), one.layer.grid
        turned = g.flatten(1) if grid is None else grid.turned(g.flatten(1))
        chosen = None if grid is None else grid.chosen[: len(core)]
        part = (turned if chosen is None else turned.index_select(1, chosen)).double()
        inside, alone = one.inside.split([core.shape[1], len(one.layer.diagonal)])
        within = (part @ core) * (inside.double() - one.outside)
        part = (within @ core.T).add_(part, alpha=one.outside).float()
        if grid is None or chosen is None:
            out[name] = part.reshape(g.shape)
            continue
        whole = (turned * one.outside).index_copy_(1, chosen, part)
        if len(alone):
            rest = grid.chosen[len(core) :]
            whole.index_copy_(1, rest, turned.index_select(1, rest) * alone)
        out[name] = grid.turned_back(whole).reshape(g.shape)
    return out


def inverses(curvature: Mapping[str, LayerCurvature], damping: Damping, complement: str) -> dict[str, Preconditioner]:
    """Layer -> H^-1 under a damping policy.

    Raises:
        CurvatureError: a layer's H is singular.
    """
    return {name: Preconditioner.of(name, layer, damping, complement) for name, layer in curvature.items()}


def lambdas(curvature: Mapping[str, LayerCurvature], damping: Damping, complement: str) -> dict[str, float]:
    """Layer -> lambda of a damping policy.

    Raises:
        CurvatureError: a layer's H is singular, or float32 cannot hold its inverse.
    """
    return {name: one.usable(name).lam for name, one in inverses(curvature, damping, complement).items()}

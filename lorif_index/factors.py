"""Factors: each example's gradient in each layer, cut to rank c by batched block power iteration.

G_i ~= U_i V_i^T (LoRIF, arXiv:2601.21929, section 3). Layers of one shape are worked on together, so that the number
of tensor operations does not grow with examples or layers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from .gradients import GradientBlock, LayerGradient, LayerSpec
from .projection import keyed_generator

ITERATIONS_RANK_ONE = 8
ITERATIONS = 16


@dataclass(frozen=True)
class Factors:
    """Rank-c factors of n examples in one layer; the stored gradient is sum_a left[:, a] right[:, a]^T.

    Attributes:
        left: (n, c, d_in) float32, or (n, d_in, d_out) where the full rank is kept (right is None then).
        right: (n, c, d_out) float32, or None.

    Each pair carries half of its singular value on either side (|left_a| = |right_a| = sqrt(sigma_a)), which halves
    the range that a half-precision store must span.
    """

    left: torch.Tensor
    right: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        """(n, d_in, d_out)."""
        if self.right is None:
            return self.left
        return torch.bmm(self.left.transpose(1, 2), self.right)


def factorise(block: GradientBlock, specs: dict[str, LayerSpec]) -> dict[str, Factors]:
    """Factors of every layer of a block of finite gradients.

    Exact, and without iteration, where the gradient comes as a pair of at most c columns (an example with at most c
    positions) or the layer keeps its full rank.
    """
    out: dict[str, Factors] = {}
    together: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for name, spec in specs.items():
        gradient = block.layers[name]
        if spec.dense:
            out[name] = Factors(gradient.dense().float(), None)
        elif gradient.pair is not None and gradient.pair[0].shape[2] <= spec.rank:
            out[name] = _from_pair(gradient, spec.rank)
        else:
            together[spec.d_in, spec.d_out, spec.rank].append(name)
    for (_, _, rank), names in together.items():
        stacked = torch.cat([block.layers[name].dense().float() for name in names])
        left, right = truncate(stacked, rank)
        for i, name in enumerate(names):
            rows = slice(i * block.count, (i + 1) * block.count)
            out[name] = Factors(left[rows], right[rows])
    return out


def _from_pair(gradient: LayerGradient, rank: int) -> Factors:
    left, right = (side.float().transpose(1, 2) for side in gradient.pair)  # type: ignore[union-attr]
    left, right = _balanced(left, right)
    missing = rank - left.shape[1]
    if missing:
        left = torch.nn.functional.pad(left, (0, 0, 0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return Factors(left, right)


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same products, with both sides of each pair of equal norm."""
    # Norms first, product of square roots after: the product of two norms could over- or underflow float32.
    a = torch.linalg.vector_norm(left, dim=2, keepdim=True)
    b = torch.linalg.vector_norm(right, dim=2, keepdim=True)
    alive = (a > 0) & (b > 0)
    scale = torch.where(alive, torch.sqrt(b) / torch.sqrt(a).clamp_min(torch.finfo(a.dtype).tiny), 0.0)
    inverse = torch.where(alive, torch.sqrt(a) / torch.sqrt(b).clamp_min(torch.finfo(b.dtype).tiny), 0.0)
    return left * scale, right * inverse


def truncate(gradients: torch.Tensor, rank: int, iterations: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank-c approximation of many matrices by block power (orthogonal) iteration.

    Args:
        gradients: (m, a, b) float32, finite.
        rank: c < min(a, b).
        iterations: applications of G G^T; default 8 for c = 1 and 16 above (the LoRIF release's counts).

    Returns:
        left (m, c, a) and right (m, c, b) float32, balanced, in falling order of their singular values, whose
        product's error is within a fraction of a per cent of the SVD's.
    """
    m, a, b = gradients.shape
    if a > b:
        right, left = truncate(gradients.transpose(1, 2), rank, iterations)
        return left, right
    steps = iterations if iterations is not None else (ITERATIONS_RANK_ONE if rank == 1 else ITERATIONS)
    # Scaled to unit norm: squares of very small or large gradients would leave float32's range.
    peak = gradients.abs().amax(dim=(1, 2), keepdim=True)
    unit = gradients / torch.where(peak > 0, peak, 1.0)
    gram = torch.bmm(unit, unit.transpose(1, 2))
    gram = gram / gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    # Squaring the Gram matrix once makes every multiplication count twice; its shorter side keeps that cheap.
    squared = torch.bmm(gram, gram)
    basis = _start(a, rank).to(gradients.device).expand(m, a, rank)
    basis = _orthonormal(torch.bmm(gram, basis))
    for _ in range(max(steps // 2, 1)):
        basis = _orthonormal(torch.bmm(squared, basis))
    right = torch.bmm(basis.transpose(1, 2), unit)
    left = basis.transpose(1, 2)
    if rank > 1:
        # Rayleigh-Ritz inside the block: rotates the pairs onto the singular vectors.
        _, rotation = torch.linalg.eigh(torch.bmm(right, right.transpose(1, 2)))
        rotation = rotation.flip(2).transpose(1, 2)
        left, right = torch.bmm(rotation, left), torch.bmm(rotation, right)
    left, right = _balanced(left, right)
    root = torch.sqrt(peak)
    return left * root, right * root


def _orthonormal(block: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of (m, a, c) by Gram-Schmidt, twice; columns that vanish become zero.

    A loop over c columns, not over matrices: batched QR on a CPU calls LAPACK once a matrix.
    """
    columns: list[torch.Tensor] = []
    for j in range(block.shape[2]):
        v = block[:, :, j]
        before = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        if columns:
            done = torch.stack(columns, dim=2)
            for _ in range(2):
                v = v - torch.bmm(done, torch.bmm(done.transpose(1, 2), v.unsqueeze(2))).squeeze(2)
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        keep = norm > before * 1e-6
        columns.append(torch.where(keep, v / norm.clamp_min(torch.finfo(v.dtype).tiny), 0.0))
    return torch.stack(columns, dim=2)


def _start(width: int, rank: int) -> torch.Tensor:
    """The starting block (width, rank) of the iteration: the same Gaussian numbers on every device."""
    generator = np.random.Generator(keyed_generator("power-iteration", width, rank))
    return torch.from_numpy(generator.standard_normal((width, rank), dtype=np.float32))

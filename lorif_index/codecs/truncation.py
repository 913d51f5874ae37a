"""Truncation: each example's gradient in each layer, cut to rank c by batched power iteration.

G_i ~= U_i V_i^T (LoRIF, arXiv:2601.21929, section 3). Layers of one shape are worked on together, so that the number
of tensor operations does not grow with examples or layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerGradient, LayerSpec
from ..linalg.projection import keyed_generator

ITERATIONS = 16
# Above this width the Gram matrix's squaring costs more than the products that it saves.
_SQUARE_UP_TO = 48
# Matrices worked on at once: bounds the temporaries, which should stay in the caches.
_CHUNK = 512


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


def factorise(block: GradientBlock, specs: Mapping[str, LayerSpec]) -> dict[str, Factors]:
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


def truncate(gradients: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank-c approximation of many matrices by power iteration, pair after pair with deflation.

    Args:
        gradients: (m, a, b) float32, finite.
        rank: c < min(a, b).

    Returns:
        left (m, c, a) and right (m, c, b) float32, balanced, in falling order of their singular values, whose
        product's error is within a fraction of a per cent of the SVD's.

    Deflation rather than one block: a block that is multiplied by G G^T loses the pairs whose singular values are
    below sqrt(float32 epsilon) of the first, while what remains after deflation is scaled anew.
    """
    if gradients.shape[1] > gradients.shape[2]:
        right, left = truncate(gradients.transpose(1, 2), rank)
        return left, right
    parts = [_truncate(part, rank) for part in gradients.split(_CHUNK)]
    return torch.cat([left for left, _ in parts]), torch.cat([right for _, right in parts])


def _truncate(gradients: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    unit, peak = _unit_peak(gradients)
    rest = unit
    found: list[torch.Tensor] = []
    for a in range(rank):
        vector = _leading(rest)
        if found:
            # Deflation leaves traces of the earlier vectors at the size of float32's rounding.
            basis = torch.cat(found, dim=2)
            for _ in range(2):
                vector = _normalised(vector - torch.bmm(basis, torch.bmm(basis.transpose(1, 2), vector)), least=1e-3)
        found.append(vector)
        if a < rank - 1:
            rest = torch.baddbmm(rest, vector, torch.bmm(vector.transpose(1, 2), rest), alpha=-1)
    left = torch.cat(found, dim=2).transpose(1, 2)
    right = torch.bmm(left, unit)
    if rank > 1:
        # Rayleigh-Ritz inside the block: rotates the pairs onto the singular vectors.
        _, rotation = torch.linalg.eigh(torch.bmm(right, right.transpose(1, 2)))
        rotation = rotation.flip(2).transpose(1, 2)
        left, right = torch.bmm(rotation, left), torch.bmm(rotation, right)
    left, right = _balanced(left, right)
    root = torch.sqrt(peak)
    return left * root, right * root


def _leading(matrices: torch.Tensor) -> torch.Tensor:
    """(m, a, 1): leading left singular vectors of (m, a, b), a <= b, after 16 applications of G G^T; zero for zero."""
    vector = _start(matrices.shape[1]).to(matrices.device).expand(len(matrices), -1, 1)
    unit, _ = _unit_peak(matrices)
    if matrices.shape[1] > _SQUARE_UP_TO:
        for _ in range(ITERATIONS):
            vector = _normalised(torch.bmm(unit, torch.bmm(unit.transpose(1, 2), vector)))
        return vector
    # (G G^T)^4 by squaring twice: four applications at the price of one.
    gram = torch.bmm(unit, unit.transpose(1, 2))
    for _ in range(2):
        gram = _unit_trace(gram)
        gram = torch.bmm(gram, gram)
    gram = _unit_trace(gram)
    for _ in range(ITERATIONS // 4):
        vector = _normalised(torch.bmm(gram, vector))
    return vector


def _unit_peak(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices scaled to a largest entry of 1, and the scales: squares of small or large ones would leave float32."""
    peak = matrices.abs().amax(dim=(1, 2), keepdim=True)
    return matrices / torch.where(peak > 0, peak, 1.0), peak


def _unit_trace(gram: torch.Tensor) -> torch.Tensor:
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    return gram / trace.clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]


def _normalised(vector: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """(m, a, 1) to unit norm; what is no longer than `least` becomes zero."""
    norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return torch.where(norm > least, vector / norm.clamp_min(torch.finfo(vector.dtype).tiny), 0.0)


def _start(width: int) -> torch.Tensor:
    """The iteration's starting vector (width, 1): the same Gaussian numbers on every device."""
    generator = np.random.Generator(keyed_generator("power-iteration", width))
    return torch.from_numpy(generator.standard_normal((width, 1), dtype=np.float32))

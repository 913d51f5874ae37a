"""Sides: the eigenvectors of a layer's two sides, in whose products its curvature is nearly diagonal.

With A = sum G G^T = U a U^T and B = sum G^T G = W b W^T over gradients G (d_in, d_out), the coordinates of U^T G W are
nearly uncorrelated, and their energies fall steeply (the basis of EK-FAC, George et al., arXiv:1806.03884; of a
higher-order SVD, De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..capture.gradients import GradientBlock, LayerSpec
from ..linalg.subspace import with_fixed_signs
from ..ranks import ALONE, Ranks, shared_out

# The sides are taken of rows of about so many numbers, evenly spread, but of at least so many rows: they need not be
# exact, since what is fitted in them is the second moment of all rows.
_NUMBERS, _ROWS = 1 << 28, 512


# A wider side, such as a head's words, keeps its own basis: its eigenvectors would be a matrix of its width squared,
# and words are nearly uncorrelated as they are.
TURNED_UP_TO = 1024


@dataclass(frozen=True)
class Sides:
    """The eigenvectors of one layer's sides.

    Attributes:
        shape: (d_in, d_out).
        left: U, (d_in, d_in) float32, orthonormal columns; None: the side is as it was.
        right: W, (d_out, d_out) float32, the same.
    """

    shape: tuple[int, int]
    left: torch.Tensor | None
    right: torch.Tensor | None

    @property
    def dim(self) -> int:
        """D."""
        return self.shape[0] * self.shape[1]

    def to(self, device: torch.device) -> Sides:
        left, right = (None if m is None else m.to(device) for m in (self.left, self.right))
        return Sides(self.shape, left, right)

    def turned(self, flat: torch.Tensor) -> torch.Tensor:
        """<G, u_a w_b^T> of all products, (n, D), of gradients (n, D); a row by row, as gradients are."""
        return self._times(flat, None if self.left is None else self.left.T, self.right)

    def turned_back(self, turned: torch.Tensor) -> torch.Tensor:
        """The inverse of `turned`, (n, D) of (n, D)."""
        return self._times(turned, self.left, None if self.right is None else self.right.T)

    def _times(self, flat: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
        found = flat.reshape(-1, *self.shape)
        found = found if left is None else torch.matmul(left.to(flat.dtype), found)
        found = found if right is None else torch.matmul(found, right.to(flat.dtype))
        return found.flatten(1)


def fit_sides(
    rows: Callable[[], Iterable[GradientBlock]],
    count: int,
    specs: Mapping[str, LayerSpec],
    advance: Callable[[int], None],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Sides], int]:
    """The sides of all layers, by one walk over the rows, and how many rows all ranks have; the same on all ranks.

    Args:
        rows: gives this rank's blocks of rows.
        count: number of rows of all ranks.
        specs: the layers.
        advance: told of the rows walked.
        device: where the products are computed.
        ranks: who have the rows.
    """
    step, at = max(count // max(_NUMBERS // sum(spec.dim for spec in specs.values()), _ROWS), 1), 0
    sums = {
        name: [_zeros(width, device) if turns(width) else None for width in (spec.d_in, spec.d_out)]
        for name, spec in specs.items()
    }
    with ranks.jointly():
        for block in rows():
            # Every step-th row of all, whatever the size of the blocks.
            part = slice(-at % step, None, step)
            taken = range(block.count)[part]
            at += block.count
            advance(block.count)
            for name, (a, b) in sums.items() if taken else ():
                dense = block.layers[name].select(part).dense().to(device)
                if a is not None:
                    flat = dense.transpose(0, 1).flatten(1)
                    a += (flat @ flat.T).double()
                if b is not None:
                    flat = dense.flatten(0, 1)
                    b += (flat.T @ flat).double()
    costs = [float(sum(w**3 for w in (spec.d_in, spec.d_out) if turns(w))) for spec in specs.values()]
    owners = dict(zip(specs, shared_out(costs, ranks.size), strict=True))
    summed = {n: [None if c is None else ranks.reduced(c, owners[n]) for c in pair] for n, pair in sums.items()}
    found: dict[str, list[torch.Tensor | None]] = {}
    with ranks.jointly():
        for name, pair in summed.items():
            mine = owners[name] == ranks.rank
            found[name] = [None if c is None else _eigenvectors(c) if mine else c.float() for c in pair]
    out = {}
    for name, spec in specs.items():
        left, right = (None if m is None else ranks.spread(m.contiguous(), owners[name]) for m in found[name])
        out[name] = Sides((spec.d_in, spec.d_out), left, right)
    return out, ranks.count(at)


def turns(width: int) -> bool:
    """Whether a side of that width is turned."""
    return width <= TURNED_UP_TO


def _zeros(width: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(width, width, dtype=torch.float64, device=device)


def _eigenvectors(moment: torch.Tensor) -> torch.Tensor:
    """(d, d) float32, in falling order."""
    if not bool(torch.isfinite(moment).all()):
        # What is fitted in any basis will say which layer overflows.
        return torch.eye(len(moment), device=moment.device)
    return with_fixed_signs(torch.linalg.eigh(moment).eigenvectors.flip(1)).float()

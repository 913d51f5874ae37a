"""Grid: the products of two sides' eigenvectors that hold most of a layer's gradients.

With A = sum G G^T = U a U^T and B = sum G^T G = W b W^T over gradients G (d_in, d_out), the coordinates of U^T G W are
nearly uncorrelated, and their energies fall steeply (the basis of EK-FAC, George et al., arXiv:1806.03884; of a
higher-order SVD, De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000). The eigenpairs of a
wide layer's second moment, D = d_in d_out, are found among the M products u_a w_b^T of most energy: an (M, M) matrix
and one walk in place of blocks of D x r and several, and an (M, r) matrix to keep. Further products are directions by
themselves, with nothing but a mean square each, as all are in EK-FAC: thousands of them cost no matrix at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ..capture.gradients import GradientBlock, LayerSpec
from ..linalg.subspace import with_fixed_signs
from ..ranks import ALONE, Ranks, shared_out

# The sides and the choice of products are taken of about so many rows, evenly spread: they need not be exact, since
# what is found within them is the second moment of all rows.
_ROWS = 2048


@dataclass(frozen=True)
class Grid:
    """The products of one layer.

    Attributes:
        left: U, (d_in, d_in) float32, orthonormal columns.
        right: W, (d_out, d_out) float32, the same.
        chosen: (M + p,) int64: a d_out + b of the products u_a w_b^T; M that a basis is made of, rising, and then p
            that are directions by themselves.
    """

    left: torch.Tensor
    right: torch.Tensor
    chosen: torch.Tensor

    @property
    def dim(self) -> int:
        """D."""
        return len(self.left) * len(self.right)

    @property
    def size(self) -> int:
        """M + p."""
        return len(self.chosen)

    def to(self, device: torch.device) -> Grid:
        return replace(self, left=self.left.to(device), right=self.right.to(device), chosen=self.chosen.to(device))

    def turned(self, flat: torch.Tensor) -> torch.Tensor:
        """<G, u_a w_b^T> of all products, (n, D), of gradients (n, D) float32."""
        gradients = flat.reshape(-1, len(self.left), len(self.right))
        return torch.matmul(torch.matmul(self.left.T, gradients), self.right).flatten(1)

    def coordinates(self, flat: torch.Tensor) -> torch.Tensor:
        """The same of the chosen products, (n, M + p)."""
        return self.turned(flat)[:, self.chosen]

    def gradients(self, coordinates: torch.Tensor) -> torch.Tensor:
        """sum_m c_m u_a w_b^T, (n, D), of coordinates c (n, M + p) float32."""
        whole = coordinates.new_zeros(len(coordinates), self.dim)
        whole[:, self.chosen] = coordinates
        return self.turned_back(whole)

    def turned_back(self, turned: torch.Tensor) -> torch.Tensor:
        """The inverse of `turned`, (n, D) of (n, D)."""
        whole = turned.reshape(-1, len(self.left), len(self.right))
        return torch.matmul(torch.matmul(self.left, whole), self.right.T).flatten(1)


def fit_grids(
    rows: Callable[[], Iterable[GradientBlock]],
    count: int,
    specs: Mapping[str, LayerSpec],
    sizes: Mapping[str, tuple[int, int]],
    advance: Callable[[int], None],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Grid]:
    """The grids of some layers, by two walks over the rows; the same on all ranks.

    Args:
        rows: gives this rank's blocks of rows, the same each time.
        count: number of rows of all ranks.
        specs: all layers.
        sizes: layer -> (M, p), together at most D, of the layers that get a grid.
        advance: told of the rows walked.
        device: where the products are computed.
        ranks: who have the rows.
    """
    if not sizes:
        return {}
    step = max(count // _ROWS, 1)

    def walk(take: Callable[[str, torch.Tensor], None]) -> None:
        at = 0
        with ranks.jointly():
            for block in rows():
                # Every step-th row of all, whatever the size of the blocks.
                part = torch.arange(-at % step, block.count, step)
                at += block.count
                advance(block.count)
                for name in sizes if len(part) else ():
                    gradient = block.layers[name]
                    take(name, gradient.select(part.to(gradient.device)).dense().to(device))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    shapes = {name: (specs[name].d_in, specs[name].d_out) for name in sizes}
    sides = {name: (zeros(a, a), zeros(b, b)) for name, (a, b) in shapes.items()}

    def add(name: str, gradients: torch.Tensor) -> None:
        for total, matrix in zip(sides[name], (gradients.transpose(0, 1), gradients.permute(2, 0, 1)), strict=True):
            flat = matrix.flatten(1)
            total += flat @ flat.T

    walk(add)
    owners = dict(zip(shapes, shared_out([float(a**3 + b**3) for a, b in shapes.values()], ranks.size), strict=True))
    bases = {}
    summed = {name: [ranks.reduced(c, owners[name]) for c in pair] for name, pair in sides.items()}
    with ranks.jointly():
        for name, pair in summed.items():
            mine = owners[name] == ranks.rank
            bases[name] = [with_fixed_signs(torch.linalg.eigh(c).eigenvectors) if mine else c for c in pair]
    grids = {}
    for name, found in bases.items():
        left, right = (ranks.spread(basis.float().contiguous(), owners[name]) for basis in found)
        grids[name] = Grid(left, right, torch.arange(0))
    energy = {name: zeros(a * b) for name, (a, b) in shapes.items()}

    def weigh(name: str, gradients: torch.Tensor) -> None:
        energy[name] += grids[name].turned(gradients.flatten(1)).square().sum(dim=0)

    walk(weigh)
    for name, (size, alone) in sizes.items():
        order = torch.argsort(ranks.sum(energy[name]), descending=True, stable=True)
        chosen = torch.cat([order[:size].sort().values, order[size : size + alone]])
        grids[name] = replace(grids[name], chosen=ranks.spread(chosen, 0))
    return grids

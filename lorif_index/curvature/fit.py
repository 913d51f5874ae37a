"""Curvature: each layer's leading eigenpairs of the second moment of gradients, by streamed randomised SVD.

C = (1/n) sum_i vec(G_i) vec(G_i)^T ~= V S V^T, by subspace iteration with a Rayleigh-Ritz pass at the end (Halko,
Martinsson and Tropp, arXiv:0909.4061; LoRIF, arXiv:2601.21929). Rows are walked, never held: memory is O(D r) a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from ..capture.gradients import GradientBlock, LayerSpec
from ..errors import CurvatureError, NonFiniteError
from ..linalg.subspace import SubspaceFit, fit_in_groups
from ..progress import Stage
from ..ranks import ALONE, Ranks
from .grid import Grid, fit_grids

_BATCH_ROWS = 256
# Share of lambda for directions whose mean squares are all that is known. Of eigenvectors of a full second moment those
# with the least curvature are fitted to the rows' noise, which lambda makes up for; a mean over n rows of one square is
# as good for a small one as for a large (EK-FAC is best with hardly any damping: `bench.lds`).
DIAGONAL_DAMPING = 0.01
CURVATURE_RANK = 512
"""Directions of a layer's curvature, where the config says "auto" and a codec does not ask for more."""


@dataclass(frozen=True)
class CurvatureShape:
    """What is fitted of one layer's curvature.

    Attributes:
        rank: directions that are found, None for all.
        products: of its sides' eigenvectors, that they are found among (see `grid`); 0: among all of D.
        diagonal: further products that are directions by themselves.
    """

    rank: int | None
    products: int = 0
    diagonal: int = 0

    def directions(self, dim: int, rows: int | None = None) -> int:
        """r of a layer of D = dim, of so many rows if they bound it."""
        return self.found(dim, rows) + self.diagonal

    def found(self, dim: int, rows: int | None = None) -> int:
        """The same without the diagonal."""
        whole = min(dim if self.rank is None else self.rank, dim)
        return whole if rows is None else min(whole, rows)

    def height(self, dim: int) -> int:
        """M, rows of the matrix that the directions are."""
        return min(self.products or dim, dim)

    def fit(self, name: str, dim: int, rows: int, seed: int, device: torch.device) -> SubspaceFit:
        """Of one layer, by so many rows."""
        key = ("curvature", name)
        return SubspaceFit(key, self.height(dim), self.rank, rows, seed, device, whole_up_to=self.products)


def fit_bytes(shapes: Mapping[str, CurvatureShape], specs: Mapping[str, LayerSpec], group_bytes: int) -> int:
    """Memory that fitting the curvature takes at once: blocks or dense matrices, in groups of layers."""
    fits = [shape.fit(name, specs[name].dim, specs[name].dim, 0, torch.device("cpu")) for name, shape in shapes.items()]
    return min(sum(fit.held_bytes for fit in fits), group_bytes) + max((fit.nbytes for fit in fits), default=0)


RowPass = Callable[[], Iterable[GradientBlock]]
"""Gives the same rows each time it is called."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer's fitted curvature, in units of squared gradients.

    Attributes:
        core: (M, r - p) float32, orthonormal columns: V itself, M being D, or its coordinates in the grid's first M
            products.
        spectrum: (at least r - p,) float64, falling: the eigenvalues of those directions and up to 10 more.
        trace: of C, exact over the rows.
        rows: how many rows were used.
        examples: n, how many examples those rows stand for.
        grid: the products that the basis is made of, or None.
        diagonal: (p,) float64, falling: mean squares of the grid's other p products, the last directions of V.
    """

    core: torch.Tensor
    spectrum: torch.Tensor
    trace: float
    rows: int
    examples: float
    grid: Grid | None = None
    diagonal: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def basis(self) -> torch.Tensor:
        """V, (D, r) float32, orthonormal columns; gradients are vectorised row by row from (d_in, d_out). Made anew at
        each call where there is a grid."""
        return self.core if self.grid is None else self.combined(torch.eye(self.rank)).T

    def reduced(self, flat: torch.Tensor) -> torch.Tensor:
        """(n, M + p), of which `turned` makes V^T g, of gradients g (n, D) float32."""
        return flat if self.grid is None else self.grid.coordinates(flat)

    def expanded(self, reduced: torch.Tensor) -> torch.Tensor:
        """(n, D) of (n, M + p): the transpose of `reduced`."""
        return reduced if self.grid is None else self.grid.gradients(reduced)

    def coordinates(self, flat: torch.Tensor) -> torch.Tensor:
        """V^T g, (n, r), of gradients g (n, D) float32."""
        reduced = self.reduced(flat)
        if not len(self.diagonal):
            return reduced @ self.core
        size = len(self.core)
        return torch.cat([reduced[:, :size] @ self.core, reduced[:, size:]], dim=1)

    def combined(self, coordinates: torch.Tensor) -> torch.Tensor:
        """V a, (n, D), of coordinates a (n, at most r) float32: those of the first directions."""
        count, whole = coordinates.shape[1], self.core.shape[1]
        reduced = coordinates[:, :whole] @ self.core[:, :count].T
        if len(self.diagonal):
            reduced = torch.cat([reduced, pad(coordinates[:, whole:], (0, self.rank - max(count, whole)))], dim=1)
        return self.expanded(reduced)

    def to(self, device: torch.device) -> LayerCurvature:
        """The same with core and grid on a device."""
        grid = None if self.grid is None else self.grid.to(device)
        return replace(self, core=self.core.to(device), grid=grid)

    def restricted(self, directions: torch.Tensor) -> LayerCurvature:
        """With some directions (m,) int64, rising, of those it has, and nothing else of V."""
        whole = self.core.shape[1]
        within, alone = directions[directions < whole], directions[directions >= whole] - whole
        grid, size = self.grid, len(self.core)
        if grid is not None:
            grid = replace(grid, chosen=torch.cat([grid.chosen[:size], grid.chosen[size:][alone]]))
        core, diagonal = self.core[:, within], self.diagonal[alone]
        return replace(self, core=core, spectrum=self.spectrum[within], grid=grid, diagonal=diagonal)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.core.shape[0]) if self.grid is None else self.grid.dim

    @property
    def rank(self) -> int:
        """r, at most D."""
        return int(self.core.shape[1]) + len(self.diagonal)

    @property
    def eigenvalues(self) -> torch.Tensor:
        """S, (r,) float64, falling among the first r - p and among the last p."""
        return torch.cat([self.spectrum[: self.core.shape[1]], self.diagonal])

    def damped(self, lam: float) -> torch.Tensor:
        """(r,) float64: what H has in each direction: S + lambda, and S + lambda / 100 on the diagonal."""
        out = self.eigenvalues.double()
        whole = self.core.shape[1]
        out[:whole] += lam
        out[whole:] += lam * DIAGONAL_DAMPING
        return out

    @property
    def tail_mean(self) -> float:
        """Mean eigenvalue outside the basis; 0 where the basis is complete."""
        left = self.dim - self.rank
        if left == 0:
            return 0.0
        return max(self.trace - float(self.eigenvalues.sum()), 0.0) / left


@dataclass(frozen=True)
class Part:
    """Rows that are mixed with others.

    Attributes:
        rows: gives this rank's blocks, the same each time.
        count: number of rows of all ranks.
        examples: how many examples they stand for.
        share: of the mixture's trace.
    """

    rows: RowPass
    count: int
    examples: float
    share: float


def mix(parts: list[Part], names: Iterable[str], ranks: Ranks = ALONE) -> Part:
    """Rows whose second moment is, layer by layer, sum_p share_p C_p tr(C_first) / tr(C_p).

    The trace stays that of the first part, unless that is zero. One walk over all rows finds the traces.
    """
    names = list(names)
    first = parts[0]
    traces = []
    for part in parts:
        squares = dict.fromkeys(names, 0.0)
        with ranks.jointly():
            for block in part.rows():
                for name in names:
                    squares[name] += float(block.layers[name].squared_norms().sum())
        summed = _summed(squares, ranks)
        traces.append({name: value / part.examples for name, value in summed.items()})
    factors: list[dict[str, float]] = []
    for part, own in zip(parts, traces, strict=True):
        scale = {}
        for name in names:
            kept = next((trace[name] for trace in traces if trace[name] > 0), 0.0)
            there = sum(p.share for p, trace in zip(parts, traces, strict=True) if trace[name] > 0)
            weight = part.share / there * kept / own[name] if own[name] > 0 else 0.0
            scale[name] = math.sqrt(weight * first.examples / part.examples)
        factors.append(scale)

    def rows() -> Iterator[GradientBlock]:
        for part, scale in zip(parts, factors, strict=True):
            for block in part.rows():
                yield GradientBlock(block.ids, {name: block.layers[name].scaled(scale[name]) for name in names})

    return Part(rows, sum(part.count for part in parts), first.examples, 1.0)


def _summed(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Over all ranks."""
    totals = ranks.sum(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, totals, strict=True))


def fit_curvature(
    rows: RowPass,
    count: int,
    specs: Mapping[str, LayerSpec],
    *,
    shapes: Mapping[str, CurvatureShape],
    power_iterations: int,
    seed: int,
    examples: float,
    stage: Stage,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, LayerCurvature]:
    """Fits every layer; layers are taken together as far as their blocks fit a bounded memory.

    Args:
        rows: gives this rank's blocks of rows, the same each time; called 2 + power_iterations times, once where the
            dense matrices are held (D up to 4 (r + 10)), and twice more where some layers are fitted within a grid.
        count: number of rows of all ranks.
        specs: the layers.
        shapes: layer -> what is fitted: r - p directions, never more than D or rows there are; where it has products,
            among those M of its sides' eigenvectors that hold most of the rows (see `grid`), the next p being
            directions by themselves. The trace is that of all directions in any case.
        power_iterations: subspace iterations between the first sketch and the Rayleigh-Ritz pass.
        seed: of the starting blocks.
        examples: n, how many examples the rows stand for.
        stage: told of the rows walked.
        device: where the products are computed.
        ranks: who have the rows; the result is rank 0's (others' bases may hold anything).

    Raises:
        CurvatureError: no rows, or a layer whose rows are all zero. NonFiniteError: the rows' squares overflow.
    """
    if count == 0:
        raise CurvatureError("there are no rows to fit the curvature from: pass more data, or curvature=")
    sizes = {
        name: (shape.products, min(shape.diagonal, specs[name].dim - shape.products))
        for name, shape in shapes.items()
        if 0 < shape.products < specs[name].dim
    }
    if sizes:
        stage.total = (stage.total or 0) + 2 * count
    grids = fit_grids(rows, count, specs, sizes, stage.advance, device, ranks)
    squares = dict.fromkeys(grids, 0.0)
    diagonals = {name: torch.zeros(sizes[name][1], dtype=torch.float64, device=device) for name in grids}
    fits = {name: shapes[name].fit(name, spec.dim, count, seed, device) for name, spec in specs.items()}

    def planned(passes: int) -> None:
        stage.total = (stage.total or 0) + passes * count

    def walk(active: Mapping[str, SubspaceFit]) -> None:
        seen = 0
        for block in rows():
            for name, fit in active.items():
                gradients = block.layers[name].flat().to(device, torch.float32)
                if name in grids:
                    squares[name] += float(block.layers[name].squared_norms().sum())
                for part in gradients.split(_BATCH_ROWS):
                    if name not in grids:
                        fit.add(part)
                        continue
                    coordinates = grids[name].coordinates(part)
                    fit.add(coordinates[:, : sizes[name][0]])
                    diagonals[name] += coordinates[:, sizes[name][0] :].square().sum(dim=0)
            seen += block.count
            stage.advance(block.count)
        walked.append(seen)

    walked: list[int] = []
    fitted: dict[str, LayerCurvature] = {}
    for name, pairs in fit_in_groups(fits, power_iterations, examples, walk, planned, ranks):
        for seen in ranks.sum(torch.tensor(walked)).tolist() if walked else ():
            if seen != count:
                raise CurvatureError(
                    f"a pass over the curvature rows gave {seen} rows where {count} were counted before"
                )
        walked.clear()
        refuse_overflow(name, torch.tensor(pairs.trace))
        if not pairs.trace > 0:
            raise CurvatureError(
                f"layer {name!r} has zero gradients in all {count} curvature rows, so its curvature is singular: "
                "exclude it with LayerSelection(exclude=[...]), or fit from other rows"
            )
        if name not in grids:
            fitted[name] = LayerCurvature(pairs.vectors, pairs.values, pairs.trace, count, examples)
            continue
        trace = float(ranks.sum(torch.tensor(squares[name], dtype=torch.float64))) / examples
        grid, diagonal = _by_energy(grids[name].to(torch.device("cpu")), ranks.sum(diagonals[name].cpu()) / examples)
        fitted[name] = LayerCurvature(pairs.vectors, pairs.values, trace, count, examples, grid, diagonal)
    return fitted


def refuse_overflow(layer: str, *parts: torch.Tensor) -> None:
    """Each gradient is finite, but products of them need not be.

    Raises:
        NonFiniteError: a part of what was fitted has inf or NaN.
    """
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NonFiniteError(
            f"the curvature of layer {layer!r} has inf or NaN, though the gradients have none: they, or the layer's "
            "inputs, are too large for their squares to be float32 (above 1e19): scale the inputs or the loss down"
        )


def _by_energy(grid: Grid, diagonal: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    """With the products that are directions by themselves in the order of their mean squares, falling."""
    order = torch.argsort(diagonal, descending=True, stable=True)
    size = grid.size - len(diagonal)
    return replace(grid, chosen=torch.cat([grid.chosen[:size], grid.chosen[size:][order]])), diagonal[order]

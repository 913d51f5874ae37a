"""Curvature: of each layer a diagonal and a low-rank part, in the basis of its sides' eigenvectors.

C = (1/n) sum_i vec(G_i) vec(G_i)^T stands behind H, which questions are divided by. In the products of the sides'
eigenvectors (see `sides`) L is the diagonal of C, and

    H = a diag(L) + (1 - a) B B^T + lambda,

where B B^T is what C has in r directions of D^-1/2 C D^-1/2, D = a L + floor: those in which the diagonal is most
wrong. It is the low-rank curvature of LoRIF (arXiv:2601.21929) with EK-FAC's diagonal (George et al., arXiv:1806.03884)
in place of a constant outside of it. The directions are found by streamed randomised SVD (Halko, Martinsson and Tropp,
arXiv:0909.4061). The published curvature is the case a = 0, whose directions are C's leading eigenvectors. Rows are
walked, never held: memory is O(D r) a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerGradient, LayerSpec, layers_named
from ..errors import CurvatureError, NonFiniteError
from ..linalg.subspace import SubspaceFit, fit_in_groups
from ..progress import Stage
from ..ranks import ALONE, Ranks
from .sides import Sides, fit_sides, turns

if TYPE_CHECKING:
    from ..config import BuildConfig

_PIECE_BYTES = 4 << 20
# Rows are thinned to so many numbers, but to no fewer rows: each is read several times. Rows count: on the fine-tuned
# GPT of docs/quality.md 2,048 in place of 4,096 cost .0125 +- .0036 of LDS, 1,024 .025.
_NUMBERS, _LEAST_ROWS = 1 << 30, 2048
# Directions of a layer's low-rank part, where the config says "auto": as many as so many numbers hold in all layers, a
# part for each, and no fewer than so many.
_FACTOR_NUMBERS, _LEAST_RANK = 4_500_000, 8
DIAGONAL_SHARE = 0.3
"""a, of the diagonal. Shares from .1 to .6 are alike."""
# Added to a L before rows are divided by its root, as a multiple of the mean of L.
_FLOOR = 1e-3


@dataclass(frozen=True)
class CurvatureShape:
    """What is fitted of the layers' curvatures.

    Attributes:
        rank: r, directions of each layer's low-rank part; None: all; "auto": see `directions`.
        layers: how many there are.
        share: a, of the diagonal; 0: there is none, and the directions are C's leading eigenvectors.
    """

    rank: int | str | None
    layers: int
    share: float = DIAGONAL_SHARE

    @classmethod
    def of(cls, config: BuildConfig, layers: int) -> CurvatureShape:
        """As a config has it. Where all directions are wanted the diagonal has nothing to add: H is C + lambda."""
        diagonal = config.complement == "diagonal" and config.curvature_rank is not None
        return cls(config.curvature_rank, layers, DIAGONAL_SHARE if diagonal else 0.0)

    def directions(self, dim: int, rows: int | None = None) -> int:
        """r of a layer of D = dim, of so many rows if they bound it. "auto" gives small layers more: with all
        directions of D = 1,024 digits have LDS .698 where 64 have .660 (`bench.lds`)."""
        if self.rank == "auto":
            whole = max(_FACTOR_NUMBERS // (self.layers * dim), _LEAST_RANK)
        else:
            whole = dim if self.rank is None else int(self.rank)
        return min(whole, dim) if rows is None else min(whole, dim, rows)

    def fit(
        self, name: str, dim: int, rows: int, seed: int, device: torch.device, lift: Scaled | None = None
    ) -> SubspaceFit:
        """Of one layer's directions, by so many rows."""
        return SubspaceFit(("curvature", name), dim, self.directions(dim), rows, seed, device, lift=lift)


@dataclass(frozen=True)
class Scaled:
    """The map (see `Lift`) of a layer's gradients to its sides' coordinates, each times a scale.

    Attributes:
        sides: of the layer.
        scale: (D,).
    """

    sides: Sides
    scale: torch.Tensor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.sides.turned(rows) * self.scale.to(rows.dtype)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        return self.sides.turned_back(rows * self.scale.to(rows.dtype))


def fit_bytes(shape: CurvatureShape, specs: Mapping[str, LayerSpec], group_bytes: int) -> int:
    """Memory that fitting the curvature takes at once: blocks or dense matrices, in groups of layers."""
    cpu = torch.device("cpu")
    maps = {name: Scaled(Sides((spec.d_in, spec.d_out), None, None), torch.empty(0)) for name, spec in specs.items()}
    fits = [shape.fit(name, spec.dim, spec.dim, 0, cpu, maps[name]) for name, spec in specs.items()]
    sides = sum(8 * (sum(w**2 for w in (spec.d_in, spec.d_out) if turns(w)) + spec.dim) for spec in specs.values())
    return min(sum(fit.held_bytes for fit in fits), group_bytes) + max((fit.nbytes for fit in fits), default=0) + sides


RowPass = Callable[[], Iterable[GradientBlock]]
"""Gives the same rows each time it is called."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer's fitted curvature, in units of squared gradients.

    Attributes:
        sides: whose products are its D coordinates.
        squares: L, (D,) float32: C's diagonal there.
        factor: B, (D, r) float32: B B^T is the low-rank part of C.
        share: a, the diagonal's share of H; 0: H is the low-rank part alone.
        spectrum: (at least r,) float64, falling: with a = 0 the eigenvalues of C in B's directions, and up to 10 more;
            else the squared norms of B's columns.
        trace: of C, exact over the rows.
        rows: how many rows were used; of very many numbers every second or so is.
        examples: n, how many examples those rows stand for.
    """

    sides: Sides
    squares: torch.Tensor
    factor: torch.Tensor
    share: float
    spectrum: torch.Tensor
    trace: float
    rows: int
    examples: float

    @property
    def dim(self) -> int:
        """D."""
        return self.sides.dim

    @property
    def rank(self) -> int:
        """r, at most D."""
        return int(self.factor.shape[1])

    @property
    def energy(self) -> float:
        """Share of the trace that the low-rank part holds."""
        return min(float(self.factor.double().square().sum()) / self.trace, 1.0)

    def base(self, lam: float) -> torch.Tensor:
        """(D,) float64: a L + lambda, H without its low-rank part."""
        return self.squares.double() * self.share + lam


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
        # Summed where the rows are, so that a GPU is not waited for at each block.
        squares: dict[str, torch.Tensor | float] = dict.fromkeys(names, 0.0)
        with ranks.jointly():
            for block in part.rows():
                for name in names:
                    squares[name] = squares[name] + block.layers[name].squared_norms().sum()
            found = {name: float(total) for name, total in squares.items()}
        summed = _summed(found, ranks)
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
    shape: CurvatureShape,
    power_iterations: int,
    seed: int,
    examples: float,
    stage: Stage,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, LayerCurvature]:
    """Fits every layer; layers are taken together as far as their blocks fit a bounded memory.

    Args:
        rows: gives this rank's blocks of rows, the same each time; called 4 + power_iterations times, three times where
            the dense matrices are held (D up to 4 (r + 10)).
        count: number of rows of all ranks.
        specs: the layers.
        shape: what is fitted.
        power_iterations: subspace iterations, each a walk beside the last.
        seed: of the starting blocks.
        examples: n, how many examples the rows stand for.
        stage: told of the rows walked.
        device: where the products are computed.
        ranks: who have the rows; the result is rank 0's (others' factors may hold anything).

    Raises:
        CurvatureError: no rows, or a layer whose rows are all zero. NonFiniteError: the rows' squares overflow.
    """
    if count == 0:
        raise CurvatureError("there are no rows to fit the curvature from: pass more data, or curvature=")
    step = thinning(count, specs)
    rows = thinned(rows, step) if step > 1 else rows
    stage.total = (stage.total or 0) + 2 * -(-count // step)
    sides, used = fit_sides(rows, -(-count // step), specs, stage.advance, device, ranks)
    if step > 1:
        examples, count = examples * used / count, used
    squares = _squares(rows, count, sides, examples, stage, device, ranks)
    scales = {name: _scale(found, shape.share) for name, found in squares.items()}
    fits = {
        name: shape.fit(name, spec.dim, count, seed, device, Scaled(sides[name], scales[name]))
        for name, spec in specs.items()
    }

    def planned(passes: int) -> None:
        stage.total = (stage.total or 0) + passes * count

    def walk(active: Mapping[str, SubspaceFit]) -> None:
        seen = 0
        for block in rows():
            for name, fit in active.items():
                fit.add(block.layers[name].flat().to(device, torch.float32))
            seen += block.count
            stage.advance(block.count)
        walked.append(seen)

    walked: list[int] = []
    fitted: dict[str, LayerCurvature] = {}
    for name, pairs in fit_in_groups(fits, power_iterations, examples, walk, planned, ranks):
        _check_counts(walked, count, ranks)
        walked.clear()
        trace = float(squares[name].sum())
        values = pairs.values[: pairs.vectors.shape[1]].double()
        factor = pairs.vectors.double() * values.sqrt() / scales[name].cpu().double()[:, None]
        spectrum = pairs.values if shape.share == 0 else factor.square().sum(dim=0).sort(descending=True).values
        fitted[name] = LayerCurvature(
            sides[name].to(torch.device("cpu")),
            squares[name].float().cpu(),
            factor.float(),
            shape.share,
            spectrum,
            trace,
            count,
            examples,
        )
    return fitted


def thinning(count: int, specs: Mapping[str, LayerSpec], each: int = 1) -> int:
    """Every how many one is taken, of so many examples with `each` rows, so that the rows that are left are not thinned
    again."""
    most = max(_NUMBERS // sum(spec.dim for spec in specs.values()), _LEAST_ROWS)
    return 1 if count * each <= most else -(-count * each // (most - each))


def thinned(rows: RowPass, step: int) -> RowPass:
    """Every step-th row of all, whatever the size of the blocks."""

    def walk() -> Iterator[GradientBlock]:
        at = 0
        for block in rows():
            part = np.arange(min(-at % step, block.count), block.count, step)
            at += block.count
            if len(part):
                yield block.select(part)

    return walk


def _squares(
    rows: RowPass,
    count: int,
    sides: Mapping[str, Sides],
    examples: float,
    stage: Stage,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, torch.Tensor]:
    """Layer -> L, (D,) float64, by one walk.

    Raises:
        CurvatureError: a layer whose rows are all zero. NonFiniteError: the rows' squares overflow.
    """
    sums = {name: torch.zeros(pair.dim, dtype=torch.float64, device=device) for name, pair in sides.items()}
    seen = 0
    with ranks.jointly():
        for block in rows():
            for name, pair in sides.items():
                for turned in _turned(block.layers[name], pair, device):
                    sums[name] += turned.square().sum(dim=0)
            seen += block.count
            stage.advance(block.count)
    _check_counts([seen], count, ranks)
    found = {name: ranks.sum(total.cpu()).to(device) / examples for name, total in sums.items()}
    for name, squares in found.items():
        refuse_overflow(name, squares.float())
    idle = tuple(name for name, squares in found.items() if not bool(squares.sum() > 0))
    if idle:
        raise CurvatureError(
            f"{layers_named(idle)} zero gradients in all {count} curvature rows, so that the curvature is singular: "
            "exclude with LayerSelection(exclude=[...]), or fit from other rows",
            idle,
        )
    return found


def _turned(gradient: LayerGradient, sides: Sides, device: torch.device) -> Iterator[torch.Tensor]:
    """Pieces (b, D) float32 of gradients in the sides' coordinates. Large ones would be fresh memory each time, which
    takes longer than the products."""
    step = max(_PIECE_BYTES // (4 * sides.dim), 1)
    for start in range(0, gradient.count, step):
        part = gradient.select(slice(start, start + step)).flat().to(device, torch.float32)
        yield sides.turned(part)


def _scale(squares: torch.Tensor, share: float) -> torch.Tensor:
    """(D,) float32: what rows are multiplied by before their directions are found."""
    if share == 0:
        return torch.ones_like(squares).float()
    return (share * squares + _FLOOR * squares.mean()).rsqrt().float()


def _check_counts(walked: list[int], count: int, ranks: Ranks) -> None:
    """Each walk must give the rows that were counted before."""
    for seen in ranks.sum(torch.tensor(walked)).tolist() if walked else ():
        if seen != count:
            raise CurvatureError(f"a pass over the curvature rows gave {seen} rows where {count} were counted before")


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

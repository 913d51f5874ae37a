"""Eigencodes: an example's gradients in their layers' curvature eigenbases, in few bits.

A layer's curvature is diagonal in its basis V, and so is the score: sum_j (v_j^T g_q) (v_j^T g_i) / (S_j + lambda).
Directions differ in what they add to it, E_j / (S_j + lambda) with E_j = mean_i (v_j^T g_i)^2; the best of all layers
are kept, as many as a row has room for, each as v_j^T g_i / sqrt(E_j) in 1, 2, 4 or 8 bits. More directions of one bit
are better than fewer of several (`bench.frontier`): the error of a rounded coordinate is a share of what it adds, that
of a missing one all of it. In random directions the same bits say much less. Nothing is kept of other directions.
Where very many add about as much, still more of them are better, of which each group keeps its largest coordinate alone
(see `rows.largest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..capture.gradients import LayerGradient
from ..config import BITS
from ..curvature.fit import LayerCurvature, RowPass
from ..curvature.inverse import Preconditioner, inside_of
from ..curvature.sketch import Sketch, Whitened, roots
from ..errors import CurvatureError
from ..progress import Stage
from ..ranks import ALONE, Ranks
from .bits import CodeLayout
from .largest import GROUPS, LargestLayout, code_bits, codes_of_whole_bytes

# Directions that add less than this, of at most 1, add nothing that could be seen.
_LEAST_SHARE = 1e-3
# Of the curvature's directions, so many times those that a row has room for are found: layers share it unequally.
_SPARE = 1.5
# But no more: one or two layers would take minutes, and 20 MB each.
_MOST_DIRECTIONS = 1600
# And of further products, so many times those that a row has room for.
_SPARE_ALONE = 3.0
# They are found among a quarter more products of the sides' eigenvectors, and at least so many (see `grid`).
_PRODUCTS, _LEAST_PRODUCTS = 1.25, 1024


@dataclass(frozen=True)
class LayerCode:
    """The directions of one layer that are kept.

    Attributes:
        directions: (m,) int64, rising: columns of the layer's basis.
        amplitudes: (m,) float32: sqrt(E_j), what a coded coordinate of 1 stands for.
    """

    directions: torch.Tensor
    amplitudes: torch.Tensor


@dataclass(frozen=True)
class EigenCode:
    """What rows of store="eigen" hold.

    Attributes:
        layers: layer -> its directions; every layer of the index, in order.
        bits: of each coordinate, or of each group's largest.
        group: coordinates of a group, of which the largest is kept; 1: all are.
    """

    layers: Mapping[str, LayerCode]
    bits: int
    group: int = 1

    @cached_property
    def layout(self) -> CodeLayout | LargestLayout:
        """A piece for each layer, so that each has its own scale."""
        return eigen_layout(tuple(len(part.directions) for part in self.layers.values()), self.bits, self.group)

    def query(self, inside: Mapping[str, torch.Tensor], preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """(q, dim) float32, whose inner product with a row's coordinates is its score.

        Args:
            inside: layer -> V^T vec(G_q), (q, r) float32; layers that are absent count nothing.
            preconditioners: layer -> H^-1 under the query's damping.
        """
        count = next(iter(inside.values())).shape[0]
        parts = []
        for name, part in self.layers.items():
            if name in inside:
                weights = part.amplitudes * preconditioners[name].inside[part.directions]
                parts.append(inside[name][:, part.directions] * weights)
            else:
                parts.append(torch.zeros(count, len(part.directions)))
        return torch.cat(parts, dim=1)

    def decode(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layer -> what rows (n, row bytes) say of v_j^T vec(G), (n, m) float32, by the layer's directions."""
        found = self.layout.decode(codes).split(self.layout.widths, dim=1)
        return {
            name: coordinates * part.amplitudes
            for (name, part), coordinates in zip(self.layers.items(), found, strict=True)
        }

    def dense(self, codes: torch.Tensor, curvature: Mapping[str, LayerCurvature]) -> dict[str, torch.Tensor]:
        """Layer -> the gradients that rows stand for, (n, D) float32."""
        out = {}
        for name, inside in self.decode(codes).items():
            every = torch.zeros(len(inside), curvature[name].rank)
            every[:, self.layers[name].directions] = inside
            out[name] = curvature[name].combined(every)
        return out

    def quadratic(self, codes: torch.Tensor, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """g^T H^-1 g of rows in some layers, (n,) float32.

        Decoded coordinates are made longer, so that inner products are not shrunk; squares take that back.
        """
        weights = [
            part.amplitudes.square() * preconditioners[name].inside[part.directions]
            if name in preconditioners
            else torch.zeros(len(part.directions))
            for name, part in self.layers.items()
        ]
        out = self.layout.squares(codes, torch.cat(weights))
        return out * self.layout.cosine**2


def eigen_layout(widths: tuple[int, ...], bits: int, group: int) -> CodeLayout | LargestLayout:
    """How rows of eigencodes lie that have so many directions of each layer."""
    return CodeLayout(sum(widths), bits, widths) if group == 1 else LargestLayout(sum(widths), group, widths)


class EigenEncoder:
    """Codes of gradients, with the kept directions' bases and amplitudes folded into one (M, m) matrix a layer, and a
    factor for each product that is a direction by itself."""

    def __init__(self, code: EigenCode, curvature: Mapping[str, LayerCurvature], device: torch.device) -> None:
        self._layout = code.layout
        self._device = device
        self._layers, self._scales = {}, {}
        for name, part in code.layers.items():
            kept = curvature[name].restricted(part.directions)
            within, alone = part.amplitudes.split([kept.core.shape[1], len(kept.diagonal)])
            self._layers[name] = replace(kept, core=kept.core / within).to(device)
            self._scales[name] = 1.0 / alone.to(device)

    def encode(self, layers: Mapping[str, LayerGradient]) -> torch.Tensor:
        """Rows (n, row bytes) uint8, on the CPU."""
        flat = {n: layers[n].flat().to(self._device, torch.float32) for n in self._layers}
        parts = []
        for name, layer in self._layers.items():
            within, alone = layer.coordinates(flat[name]).split([layer.core.shape[1], len(layer.diagonal)], dim=1)
            parts += [within, alone * self._scales[name]]
        return self._layout.encode(torch.cat(parts, dim=1))


class EigenSketcher:
    """Coordinates of a sketch, of rows: with all that is fixed folded into one (dim, k) matrix."""

    def __init__(self, code: EigenCode, sketch: Sketch, curvature: Mapping[str, LayerCurvature]) -> None:
        parts = []
        for name, part in code.layers.items():
            layer = sketch.layers[name]
            every = torch.zeros(curvature[name].rank, sketch.dim)
            every[layer.directions] = layer.weights / layer.whitening(curvature[name])[:, None]
            parts.append(every[part.directions] * part.amplitudes[:, None])
        self._scorer = code.layout.scorer(torch.cat(parts).T)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """z (n, k) float32 of rows (n, row bytes)."""
        return self._scorer.score(rows).T.contiguous()


def half_whitened_rows(
    code: EigenCode,
    rows: Callable[[], Iterable[torch.Tensor]],
    count: int,
    curvature: Mapping[str, LayerCurvature],
    lams: Mapping[str, float],
) -> Whitened:
    """Half-whitened coordinates of blocks of rows (n, row bytes), in the directions that are kept."""
    parts = code.layers.items()
    scale = torch.cat([p.amplitudes / roots(curvature[name], lams[name])[p.directions] for name, p in parts])

    def walk() -> Iterator[torch.Tensor]:
        for block in rows():
            yield code.layout.decode(block) * scale

    return Whitened(walk, count, {name: part.directions for name, part in parts}, lams)


def directions_for(row_bytes: int, layers: int, dim: int) -> int:
    """Eigenvectors of a layer's curvature, of D = dim, that rows of so many bytes can choose from."""
    return min(-(-int(_SPARE * 8 * row_bytes) // layers), _MOST_DIRECTIONS, dim)


def alone_for(row_bytes: int, layers: int, code: str) -> int:
    """Products of the sides' eigenvectors beside them, as directions by themselves."""
    wanted = most_kept(row_bytes, code) if code == "largest" else int(_SPARE_ALONE * most_kept(row_bytes, code))
    return -(-wanted // layers)


def most_kept(row_bytes: int, code: str) -> int:
    """Directions that rows of so many bytes can keep."""
    return 8 * row_bytes * GROUPS[-1] // code_bits(GROUPS[-1]) if code == "largest" else 8 * row_bytes


def products_for(rank: int) -> int:
    """Products of the sides' eigenvectors, among which that many directions of a layer are found."""
    return max(int(_PRODUCTS * rank), _LEAST_PRODUCTS)


def fit_eigencode(
    rows: RowPass,
    count: int,
    curvature: Mapping[str, LayerCurvature],
    lams: Mapping[str, float],
    *,
    row_bytes: int,
    code: str,
    stage: Stage,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> EigenCode:
    """Chooses directions and bits by one walk over a sample.

    Args:
        rows: gives this rank's blocks of the sample's gradients.
        count: number of rows of all ranks.
        curvature: layer -> fitted curvature.
        lams: layer -> lambda.
        row_bytes: room of a row; where all directions fit in more than a bit each, they get 2, 4 or 8.
        code: "levels" of every kept direction, or "largest" of each group of them, where that keeps more of what
            directions add.
        stage: told of the rows walked.
        device: where the products are computed.
        ranks: who have the rows.

    Raises:
        CurvatureError: all gradients of the sample are zero, or not one byte of coordinates fits beside the scales.
    """
    bases = {name: layer.to(device) for name, layer in curvature.items()}
    squares = {name: torch.zeros(layer.rank, dtype=torch.float64) for name, layer in curvature.items()}
    stage.total = (stage.total or 0) + count
    with ranks.jointly():
        for block in rows():
            flat = {name: block.layers[name].flat().to(device, torch.float32) for name in bases}
            for name, inside in inside_of(flat, bases).items():
                squares[name] += inside.square().sum(dim=0).cpu().double()
            stage.advance(block.count)
    energy = {name: ranks.sum(total) / count for name, total in squares.items()}
    shares = {n: energy[n] / layer.damped(lams[n]) for n, layer in curvature.items()}
    every = torch.cat(list(shares.values()))
    if not every.sum() > 0:
        raise CurvatureError("all gradients of the eigencodes' sample are zero: fit from other data")
    scales = CodeLayout(0, 1, (0,) * len(curvature)).row_bytes
    # Codes are padded to pairs of bytes.
    room = (row_bytes - scales) // 2 * 2
    if room < 2:
        raise CurvatureError(
            f"eigen_bytes={row_bytes} leaves no room beside the scales of {len(curvature)} layers: pass at least "
            f"{scales + 2}"
        )
    order = torch.argsort(every, descending=True, stable=True)
    order = order[: int((every > _LEAST_SHARE * every.max().clamp_max(1.0)).sum())]
    bits = max((b for b in BITS if len(order) * b <= 8 * room), default=1)
    ways = [(bits, 1), *((code_bits(group), group) for group in (GROUPS if code == "largest" else ()))]
    best = max((_choice(shares, order, 8 * room, *way) for way in ways), key=lambda choice: choice.kept)
    if not best.kept:
        raise CurvatureError(
            f"eigen_bytes={row_bytes} leaves {room} bytes beside the scales, which are not one whole byte for any of "
            f"{len(curvature)} layers: pass at least {scales + len(curvature) + 1}"
        )
    layers = {name: LayerCode(chosen, energy[name][chosen].sqrt().float()) for name, chosen in best.directions.items()}
    return EigenCode(layers, best.bits, best.group)


@dataclass(frozen=True)
class _Choice:
    """Directions of layers, what their codes keep of scores' variance, and how they are coded (see `EigenCode`)."""

    directions: Mapping[str, torch.Tensor]
    kept: float
    bits: int
    group: int


def _choice(shares: Mapping[str, torch.Tensor], order: torch.Tensor, room: int, bits: int, group: int) -> _Choice:
    """The directions that add most, as many as codes of so many bits for each `group` of them have room for.

    Args:
        shares: layer -> what its directions add, (r,) float64.
        order: of all layers' directions one after the other, those of use, falling.
        room: bits for all of them.
    """
    together = codes_of_whole_bytes(bits)
    count = min(len(order), room // bits // together * together * group)
    # Whole bytes, or whole groups: of what is begun the least directions are left out.
    unit = (1 if count == len(order) else together) if group == 1 else group
    among = torch.zeros(sum(len(share) for share in shares.values()), dtype=torch.bool)
    among[order[:count]] = True
    directions, total = {}, 0.0
    for (name, share), there in zip(shares.items(), among.split([len(s) for s in shares.values()]), strict=True):
        of_layer = there.nonzero().flatten()
        best = torch.argsort(share[of_layer], descending=True, stable=True)[: len(of_layer) // unit * unit]
        directions[name] = of_layer[best.sort().values]
        # Of scores' variance a direction has the square of what it adds to the mean of g^T H^-1 g.
        total += float(share[directions[name]].square().sum())
    # Of a coordinate's square, codes keep their squared cosine.
    return _Choice(directions, total * eigen_layout((), bits, group).cosine ** 2, bits, group)

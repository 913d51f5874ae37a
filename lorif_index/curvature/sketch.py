"""Sketch: an example's gradients in all layers as k coordinates whose inner products approximate influence.

Half-whitened coordinates e = concat_l (L_l + lambda_l)^-1/2 U_l^T G_l W_l (see `sides`), reduced by one PCA of their
uncentred second moment over the data: the best linear sketch for influence (EOGP, Heo, Rosser and Kim, proposition 1),
then rotated at random, so that every coordinate carries alike: z = P^T e.

A query's side takes the whitening back: it is x = P^T diag(L + lambda)^1/2 U^T H^-1 G_q W, whatever H^-1 is asked with,
so that <x, z_i> approximates g_q^T H^-1 g_i. Another damping or fewer layers change only the query's side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from ..capture.gradients import LayerGradient
from ..errors import CurvatureError
from ..linalg.projection import keyed_generator
from ..linalg.subspace import SubspaceFit, fit_in_groups
from ..progress import Stage
from ..ranks import ALONE, Ranks
from .fit import LayerCurvature

# Above so many half-whitened coordinates (at k = 512: W takes 512 MiB, its fit about 5 GiB), each layer's own
# eigenvectors stand for the PCA over all layers, for many times the candidates (docs/choosing.md).
PCA_UP_TO = 262_144
POWER_ITERATIONS = 2
_BATCH_ROWS = 256


MOST_DIRECTIONS = 8_192
"""Coordinates that a sketch of gradients is made of, in all layers: those of the largest mean squares."""
_LEAST_DIRECTIONS = 512


def roots(layer: LayerCurvature, lam: float) -> torch.Tensor:
    """(D,) float32: sqrt(L + lambda)."""
    return torch.sqrt(layer.squares.double() + lam).float()


@dataclass(frozen=True)
class LayerSketch:
    """One layer's part of a sketch.

    Attributes:
        lam: lambda that its coordinates were half-whitened with.
        weights: W_l, (m, k) float32, for m of the layer's coordinates.
        directions: (m,) int64, rising: which; the first where rows hold all of them.
    """

    lam: float
    weights: torch.Tensor
    directions: torch.Tensor
    _root: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    def whitening(self, layer: LayerCurvature) -> torch.Tensor:
        """(m,) float32: sqrt(L + lambda) of the layer that the sketch was made for."""
        if not self._root:
            self._root.append(roots(layer, self.lam)[self.directions])
        return self._root[0]


@dataclass(frozen=True)
class Sketch:
    """A fitted sketch.

    Attributes:
        layers: layer -> its part; together the weights have orthonormal columns.
        dim: k.
        method: "pca" or "per-layer".
        energy: share of the half-whitened gradients' squared norm that the k coordinates keep, on the sample.
    """

    layers: Mapping[str, LayerSketch]
    dim: int
    method: str
    energy: float

    def query(self, turned: Mapping[str, torch.Tensor], curvature: Mapping[str, LayerCurvature]) -> torch.Tensor:
        """x (q, k) float32 of a query, in the layers it has.

        Args:
            turned: layer -> U^T H^-1 G_q W, (q, D) float32.
            curvature: layer -> fitted curvature.
        """
        out = torch.zeros(next(iter(turned.values())).shape[0], self.dim)
        for name, of_query in turned.items():
            part = self.layers[name]
            if len(part.weights):
                out.addmm_(of_query[:, part.directions] * part.whitening(curvature[name]), part.weights)
        return out


@dataclass(frozen=True)
class Named:
    """What stands in a sketch's place where rows name their largest coordinates: the few largest of these, by which
    candidates are proposed (see `codecs.sparse`). A question's coordinates are those that rows can name.

    Attributes:
        dim: coordinates that rows can name.
        entries: how many are kept of a row.
        energy: share of the rows' squared norm that they hold, on a sample.
    """

    dim: int
    entries: int
    energy: float
    method: ClassVar[str] = "named"


class SketchEncoder:
    """Coordinates of gradients, with whitening folded into the weights."""

    def __init__(self, sketch: Sketch, curvature: Mapping[str, LayerCurvature], device: torch.device | None = None):
        self.dim = sketch.dim
        self._layers = {}
        for name, part in sketch.layers.items():
            if len(part.weights):
                weights = part.weights / part.whitening(curvature[name])[:, None]
                sides = curvature[name].sides.to(device or torch.device("cpu"))
                self._layers[name] = sides, part.directions.to(device or "cpu"), weights.to(device or "cpu")

    def encode(self, layers: Mapping[str, LayerGradient]) -> torch.Tensor:
        """z (n, k) float32, on the CPU."""
        total: torch.Tensor | None = None
        for name, (sides, directions, weights) in self._layers.items():
            turned = sides.turned(layers[name].flat().to(weights.device, torch.float32))
            part = turned[:, directions] @ weights
            total = part if total is None else total.add_(part)
        if total is None:
            raise CurvatureError("the sketch has no coordinates in any layer: build the index again")
        return total.cpu()


def sketch_method(asked: str, total: int) -> str:
    """ "pca" or "per-layer": what "auto" stands for, by the number of half-whitened coordinates."""
    if asked != "auto":
        return asked
    return "pca" if total <= PCA_UP_TO else "per-layer"


def kept_dim(dim: int, total: int, rows: int) -> int:
    """k of a sketch of `total` half-whitened coordinates of so many rows: a multiple of 8 where there are that many."""
    kept = min(dim, total, rows)
    return kept // 8 * 8 if kept >= 8 else kept


def sketch_subspace(total: int, kept: int, rows: int, seed: int, device: torch.device) -> SubspaceFit:
    """The PCA over all layers of a sketch."""
    return SubspaceFit(("sketch",), total, kept, rows, seed, device)


@dataclass(frozen=True)
class Whitened:
    """Half-whitened coordinates of a sample, as a sketch is fitted on them.

    Attributes:
        walk: gives this rank's, (b, width) float32 a piece, the same each time.
        count: number of rows of all ranks.
        directions: layer -> (m,) int64, rising: which of its directions they have.
        lams: layer -> lambda.
    """

    walk: Callable[[], Iterator[torch.Tensor]]
    count: int
    directions: Mapping[str, torch.Tensor]
    lams: Mapping[str, float]

    @property
    def width(self) -> int:
        """Of all layers together."""
        return sum(len(directions) for directions in self.directions.values())


def strongest(curvature: Mapping[str, LayerCurvature]) -> dict[str, torch.Tensor]:
    """Layer -> (m,) int64, rising: the coordinates of the largest mean squares, as many as a sketch is made of."""
    most = max(MOST_DIRECTIONS // max(len(curvature), 1), _LEAST_DIRECTIONS)
    return {
        name: torch.topk(layer.squares, min(most, layer.dim)).indices.sort().values for name, layer in curvature.items()
    }


def sketched_directions(dims: Iterable[int]) -> int:
    """How many `strongest` takes of layers of such D."""
    dims = list(dims)
    most = max(MOST_DIRECTIONS // max(len(dims), 1), _LEAST_DIRECTIONS)
    return sum(min(most, dim) for dim in dims)


def half_whitened(
    rows: Callable[[], Iterable[Mapping[str, LayerGradient]]],
    count: int,
    curvature: Mapping[str, LayerCurvature],
    lams: Mapping[str, float],
    device: torch.device,
) -> Whitened:
    """Those of blocks of gradients, in the strongest coordinates."""
    directions = strongest(curvature)
    scales = {n: (1.0 / roots(layer, lams[n])[directions[n]]).to(device) for n, layer in curvature.items()}
    sides = {name: layer.sides.to(device) for name, layer in curvature.items()}
    there = {name: wanted.to(device) for name, wanted in directions.items()}

    def walk() -> Iterator[torch.Tensor]:
        for block in rows():
            flat = {name: block[name].flat() for name in scales}
            for at in range(0, len(next(iter(flat.values()))), _BATCH_ROWS):
                parts = []
                for name, scale in scales.items():
                    turned = sides[name].turned(flat[name][at : at + _BATCH_ROWS].to(device, torch.float32))
                    parts.append(turned[:, there[name]] * scale)
                yield torch.cat(parts, dim=1)

    return Whitened(walk, count, directions, lams)


def fit_sketch(
    whitened: Whitened,
    curvature: Mapping[str, LayerCurvature],
    *,
    dim: int,
    method: str,
    seed: int,
    stage: Stage,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Sketch:
    """Fits a sketch on a sample of the data, walked several times and never held. Over several ranks it is rank 0's.

    Args:
        whitened: half-whitened coordinates of the sample.
        curvature: layer -> fitted curvature.
        dim: the most coordinates to keep; never more than there are half-whitened ones or rows, and a multiple of 8
            where there are that many.
        method: "pca": one PCA over all layers, by subspace iteration; "per-layer": the coordinates with the largest
            L / (L + lambda) of all layers.
        seed: of the starting block and the rotation.
        stage: told of the rows walked.
        device: where the products are computed.
        ranks: who have the sample's rows.
    """
    count, lams, total = whitened.count, whitened.lams, whitened.width
    widths = [len(directions) for directions in whitened.directions.values()]
    kept = kept_dim(dim, total, count)
    generator = np.random.Generator(keyed_generator(seed, "sketch-rotation", kept))
    rotation = torch.linalg.qr(torch.from_numpy(generator.standard_normal((kept, kept)))).Q

    def walk() -> Iterator[torch.Tensor]:
        for part in whitened.walk():
            yield part.to(device)
            stage.advance(len(part))

    if method == "pca":
        fits = {"sketch": sketch_subspace(total, kept, count, seed, device)}

        def planned(passes: int) -> None:
            stage.total = (stage.total or 0) + passes * count

        def add(active: Mapping[str, SubspaceFit]) -> None:
            for part in walk():
                active["sketch"].add(part)

        ((_, pairs),) = fit_in_groups(fits, POWER_ITERATIONS, float(count), add, planned, ranks)
        if not pairs.trace > 0:
            raise CurvatureError("all gradients of the sketch's sample are zero: fit from other data")
        weights = (pairs.vectors.double() @ rotation).float().split(widths)
        layers = {
            name: LayerSketch(lams[name], part.contiguous(), directions)
            for (name, directions), part in zip(whitened.directions.items(), weights, strict=True)
        }
        return Sketch(layers, kept, method, min(float(pairs.values[:kept].sum()) / pairs.trace, 1.0))

    shares = torch.cat(
        [
            (curvature[n].squares.double() / (curvature[n].squares.double() + lams[n]))[directions]
            for n, directions in whitened.directions.items()
        ]
    )
    best = torch.zeros(total, dtype=torch.bool)
    best[torch.argsort(shares, descending=True, stable=True)[:kept]] = True
    stage.total = (stage.total or 0) + count
    squares = torch.zeros(total, dtype=torch.float64)
    with ranks.jointly():
        for part in walk():
            squares += part.double().square().sum(dim=0).cpu()
    squares = ranks.sum(squares)
    layers, at = {}, 0
    for (name, directions), chosen in zip(whitened.directions.items(), best.split(widths), strict=True):
        taken = int(chosen.sum())
        layers[name] = LayerSketch(lams[name], rotation[at : at + taken].float().contiguous(), directions[chosen])
        at += taken
    if not squares.sum() > 0:
        raise CurvatureError("all gradients of the sketch's sample are zero: fit from other data")
    return Sketch(layers, kept, method, float(squares[best].sum() / squares.sum()))

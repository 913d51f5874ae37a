"""Eigencodes: an example's gradients in their layers' curvature eigenbases, in few bits.

A layer's curvature is diagonal in its basis V, and so is the score: sum_j (v_j^T g_q) (v_j^T g_i) / (S_j + lambda).
Directions differ in what they add to it, E_j / (S_j + lambda) with E_j = mean_i (v_j^T g_i)^2; the best of all layers
are kept, as many as a row has room for, each as v_j^T g_i / sqrt(E_j) in 1, 2, 4 or 8 bits. More directions of one bit
are better than fewer of several (`bench.frontier`): the error of a rounded coordinate is a share of what it adds, that
of a missing one all of it. In random directions the same bits say much less. Nothing is kept of other directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerSpec
from ..curvature.fit import CURVATURE_RANK, CurvatureShape, LayerCurvature
from ..curvature.inverse import Preconditioner, inside_of
from ..curvature.sketch import Sketch, Whitened, roots
from ..errors import CorruptionError, CurvatureError
from ..linalg.scratch import CPU
from ..storage.sealed import SealedFile, entry_of, write_sealed
from .base import SKETCHED_ROWS, CodecSizes, Encoder, Fitting, Parts, QueryGradients, RowCodec, Scorer
from .bits import BITS, SCALE_BYTES, CodeLayout

if TYPE_CHECKING:
    from ..config import BuildConfig

# Directions that add less than this, of at most 1, add nothing that could be seen.
_LEAST_SHARE = 1e-3
# Of the curvature's directions, so many times those that a row has room for are found: layers share it unequally.
_SPARE = 1.5
# But no more: one or two layers would take minutes, and 20 MB each.
_MOST_DIRECTIONS = 1600
# And of further products, so many times those that a row has room for.
_SPARE_ALONE = 3.0
# They are found among a quarter more products of the sides' eigenvectors, and at least so many (see `curvature.grid`).
_PRODUCTS, _LEAST_PRODUCTS = 1.25, 1024
# Bytes of the file for a direction: its number and its amplitude.
_DIRECTION_BYTES = 12


@dataclass(frozen=True)
class LayerCode:
    """The directions of one layer that are kept.

    Attributes:
        directions: (m,) int64, rising: columns of the layer's basis.
        amplitudes: (m,) float32: sqrt(E_j), what a coded coordinate of 1 stands for.
    """

    directions: torch.Tensor
    amplitudes: torch.Tensor


class Layout(Protocol):
    """How coordinates lie in a row, a piece with a scale for each layer (see `bits.CodeLayout`)."""

    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def query_bytes(self) -> int: ...
    @property
    def cosine(self) -> float: ...
    def encode(self, z: torch.Tensor) -> torch.Tensor: ...
    def decode(self, codes: torch.Tensor) -> torch.Tensor: ...
    def squares(self, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...
    def scorer(self, queries: torch.Tensor) -> Scorer: ...


@dataclass(frozen=True)
class Way:
    """A way to code coordinates.

    Attributes:
        bits: of each code.
        group: coordinates that share one.
    """

    bits: int
    group: int = 1

    @property
    def unit(self) -> int:
        """Coordinates that are kept or left out together: whole bytes, or whole groups."""
        return self.together if self.group == 1 else self.group

    @property
    def together(self) -> int:
        """Least number of codes that end with a byte."""
        return 8 // math.gcd(self.bits, 8)


class EigenCodec(RowCodec):
    """Rows of coordinates in curvature eigenbases.

    Args:
        specs, curvature: as in `RowCodec`.
        way: how they are coded.
        counts: directions kept of each layer.
        codes: gives layer -> `LayerCode`, when first asked for.
    """

    name: ClassVar[str] = "eigen"
    depends_on: ClassVar[frozenset[str]] = frozenset({"curvature"})
    gains_by_width: ClassVar[bool] = True

    def __init__(
        self,
        specs: Mapping[str, LayerSpec],
        curvature: Mapping[str, LayerCurvature],
        way: Way,
        counts: tuple[int, ...],
        codes: Callable[[], Mapping[str, LayerCode]],
    ) -> None:
        super().__init__(specs, curvature)
        self.way, self.counts, self._codes = way, counts, codes

    @cached_property
    def layers(self) -> Mapping[str, LayerCode]:
        """Layer -> its directions; every layer, in order."""
        return self._codes()

    @cached_property
    def layout(self) -> Layout:
        return self.layout_of(self.way, self.counts)

    # -- what a kind of codes decides ----------------------------------------------------------------------------

    @classmethod
    def layout_of(cls, way: Way, counts: tuple[int, ...]) -> Layout:
        """How rows lie that have so many directions of each layer: a piece for each, so that each has its own scale."""
        return CodeLayout(sum(counts), way.bits, counts)

    @classmethod
    def ways(cls, directions: int, room: int) -> list[Way]:
        """Ways to code so many directions in so many bits: where all fit in more than a bit each, they get 2, 4, 8."""
        return [Way(max((b for b in BITS if directions * b <= room), default=1))]

    @classmethod
    def most_kept(cls, row_bytes: int) -> int:
        """Directions that rows of so many bytes can keep."""
        return 8 * row_bytes

    @classmethod
    def alone(cls, row_bytes: int, layers: int) -> int:
        """Products of the sides' eigenvectors that are directions by themselves, of each layer."""
        return -(-int(_SPARE_ALONE * cls.most_kept(row_bytes)) // layers)

    # -- before anything is fitted -------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec]) -> dict[str, CurvatureShape]:
        """As the config says, or what rows have use for; of layers too wide for that within a grid, and then more
        directions on its diagonal, unless rows have room for all there are anyway."""
        if config.curvature_rank != "auto":
            return super().shapes(config, specs)
        out, chosen = {}, sum(spec.dim for spec in specs.values()) > 8 * config.eigen_bytes
        for name, spec in specs.items():
            rank = max(CURVATURE_RANK, directions_for(config.eigen_bytes, len(specs), spec.dim))
            products = products_for(rank)
            if products < spec.dim:
                alone = cls.alone(config.eigen_bytes, len(specs)) if chosen else 0
                out[name] = CurvatureShape(rank, products, min(alone, spec.dim - products))
            else:
                out[name] = CurvatureShape(rank)
        return out

    @classmethod
    def sizes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec], directions: int) -> CodecSizes:
        # Where all directions fit, they get as many bits as fit, and no more.
        scales = SCALE_BYTES * len(specs)
        bits = max((b for b in BITS if directions * b <= 8 * (config.eigen_bytes - scales)), default=0)
        row = -(-directions * bits // 8) + scales if bits else config.eigen_bytes
        kept = min(directions, cls.most_kept(config.eigen_bytes))
        return CodecSizes(row, _DIRECTION_BYTES * kept, kept, 4 * kept, 8 * directions)

    @classmethod
    def choices(cls) -> list[dict[str, Any]]:
        return [{"eigen_bytes": size} for size in (400, 800, 1600, 3200, 6400)]

    # -- made, kept, read ----------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, fitting: Fitting) -> Self:
        """Chooses directions and bits by one walk over the sample.

        Raises:
            CurvatureError: all gradients of the sample are zero, or not one byte of coordinates fits beside the scales.
        """
        curvature, row_bytes = fitting.curvature, fitting.config.eigen_bytes
        energy = _energies(fitting)
        shares = {n: energy[n] / layer.damped(fitting.lams[n]) for n, layer in curvature.items()}
        every = torch.cat(list(shares.values()))
        if not every.sum() > 0:
            raise CurvatureError("all gradients of the eigencodes' sample are zero: fit from other data")
        scales = SCALE_BYTES * len(curvature)
        # Codes are padded to pairs of bytes.
        room = (row_bytes - scales) // 2 * 2
        if room < 2:
            raise CurvatureError(
                f"eigen_bytes={row_bytes} leaves no room beside the scales of {len(curvature)} layers: pass at least "
                f"{scales + 2}"
            )
        order = torch.argsort(every, descending=True, stable=True)
        order = order[: int((every > _LEAST_SHARE * every.max().clamp_max(1.0)).sum())]
        choices = [
            _choice(shares, order, 8 * room, way, cls.layout_of(way, ()).cosine)
            for way in cls.ways(len(order), 8 * room)
        ]
        best = max(choices, key=lambda choice: choice.kept)
        if not best.kept:
            raise CurvatureError(
                f"eigen_bytes={row_bytes} leaves {room} bytes beside the scales, which are not one whole byte for any "
                f"of {len(curvature)} layers: pass at least {scales + len(curvature) + 1}"
            )
        layers = {name: LayerCode(c, energy[name][c].sqrt().float()) for name, c in best.directions.items()}
        counts = tuple(len(part.directions) for part in layers.values())
        return cls(fitting.specs, curvature, best.way, counts, lambda: layers)

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """Writes `directions_<i>` (m,) int64 and `amplitudes_<i>` (m,) float32 for layer number i."""
        arrays: dict[str, np.ndarray] = {}
        for i, part in enumerate(self.layers.values()):
            arrays[f"directions_{i}"] = part.directions.numpy().astype("<i8")
            arrays[f"amplitudes_{i}"] = part.amplitudes.numpy()
        file = write_sealed(folder, name, arrays).to_json()
        return {"file": file, "bits": self.way.bits, "group": self.way.group, "counts": list(self.counts)}

    @classmethod
    def load(
        cls, folder: Path, entry: Any, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]
    ) -> Self:
        with entry_of("the codec"):
            way, counts = Way(int(entry["bits"]), int(entry["group"])), tuple(int(v) for v in entry["counts"])
            if len(counts) != len(specs) or not cls._knows(way) or min(counts) < 0 or not sum(counts):
                raise ValueError(f"{len(counts)} layers of {way} where the index has {len(specs)}")
            if any(count % way.group for count in counts):
                raise ValueError(f"{counts} directions are not whole groups of {way.group}")
        file = SealedFile.of_entry(folder, entry)
        return cls(specs, curvature, way, counts, lambda: _read_codes(file, curvature, specs, counts))

    @classmethod
    def _knows(cls, way: Way) -> bool:
        """Whether rows may be coded so."""
        return way.bits in BITS and way.group == 1

    # -- rows ----------------------------------------------------------------------------------------------------

    @property
    def row_bytes(self) -> int:
        return self.layout.row_bytes

    @property
    def label(self) -> str:
        return self.layout.label

    @property
    def query_bytes(self) -> int:
        return self.layout.query_bytes

    def encoder(self, device: torch.device) -> Encoder:
        return _EigenEncoder(self, device)

    def question(self, asked: QueryGradients, preconditioners: Mapping[str, Preconditioner]) -> Parts:
        """ "eigen": (q, dim), whose inner product with a row's coordinates is its score."""
        parts = []
        for name, part in self.layers.items():
            if name in asked.gradients:
                weights = part.amplitudes * preconditioners[name].inside[part.directions]
                parts.append(asked.inside[name][:, part.directions] * weights)
            else:
                parts.append(torch.zeros(asked.count, len(part.directions)))
        return {"eigen": torch.cat(parts, dim=1)}

    def scorer(self, parts: Parts, device: torch.device = CPU) -> Scorer:
        return self.layout.scorer(parts["eigen"].to(device))

    def coordinates(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layer -> what rows (n, row bytes) say of v_j^T vec(G), (n, m) float32, by the layer's directions."""
        found = self.layout.decode(rows).split(self.counts, dim=1)
        return {
            name: coordinates * part.amplitudes
            for (name, part), coordinates in zip(self.layers.items(), found, strict=True)
        }

    def decode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        out = {}
        for name, inside in self.coordinates(rows).items():
            every = torch.zeros(len(inside), self.curvature[name].rank)
            every[:, self.layers[name].directions] = inside
            out[name] = self.curvature[name].combined(every)
        return out

    def self_influence(self, rows: torch.Tensor, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """As in `RowCodec`. Decoded coordinates are made longer, so that inner products are not shrunk; squares take
        that back."""
        weights = torch.cat(
            [
                part.amplitudes.square() * preconditioners[name].inside[part.directions]
                if name in preconditioners
                else torch.zeros(len(part.directions))
                for name, part in self.layers.items()
            ]
        )
        out = torch.zeros(len(rows))
        for part, total in self._pieces(rows, out):
            total += self.layout.squares(part, weights) * self.layout.cosine**2
        return out

    # -- the sketch of rows --------------------------------------------------------------------------------------

    def whitened(
        self, rows: Callable[[], Iterable[torch.Tensor]], count: int, lams: Mapping[str, float], device: torch.device
    ) -> Whitened:
        """As in `RowCodec`, in the directions that are kept."""
        layers = self.layers.items()
        scale = torch.cat([p.amplitudes / roots(self.curvature[n], lams[n])[p.directions] for n, p in layers])

        def walk() -> Iterator[torch.Tensor]:
            for block in rows():
                yield self.layout.decode(block) * scale

        return Whitened(walk, count, {name: part.directions for name, part in layers}, lams)

    def sketcher(self, sketch: Sketch) -> Callable[[torch.Tensor], torch.Tensor]:
        """As in `RowCodec`, with all that is fixed folded into one (dim, k) matrix."""
        parts = []
        for name, part in self.layers.items():
            layer, curvature = sketch.layers[name], self.curvature[name]
            every = torch.zeros(curvature.rank, sketch.dim)
            every[layer.directions] = layer.weights / layer.whitening(curvature)[:, None]
            parts.append(every[part.directions] * part.amplitudes[:, None])
        scorer = self.layout.scorer(torch.cat(parts).T)

        def coordinates(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([scorer.score(part).T for part in rows.split(SKETCHED_ROWS)])

        return coordinates


class _EigenEncoder(Encoder):
    """Codes of gradients, with the kept directions' bases and amplitudes folded into one (M, m) matrix a layer, and a
    factor for each product that is a direction by itself."""

    def __init__(self, codec: EigenCodec, device: torch.device) -> None:
        self._layout, self._device = codec.layout, device
        self._layers, self._scales = {}, {}
        for name, part in codec.layers.items():
            kept = codec.curvature[name].restricted(part.directions)
            within, alone = part.amplitudes.split([kept.core.shape[1], len(kept.diagonal)])
            self._layers[name] = replace(kept, core=kept.core / within).to(device)
            self._scales[name] = 1.0 / alone.to(device)

    def encode(self, block: GradientBlock) -> torch.Tensor:
        flat = {n: block.layers[n].flat().to(self._device, torch.float32) for n in self._layers}
        parts = []
        for name, layer in self._layers.items():
            within, alone = layer.coordinates(flat[name]).split([layer.core.shape[1], len(layer.diagonal)], dim=1)
            parts += [within, alone * self._scales[name]]
        return self._layout.encode(torch.cat(parts, dim=1))


def directions_for(row_bytes: int, layers: int, dim: int) -> int:
    """Eigenvectors of a layer's curvature, of D = dim, that rows of so many bytes can choose from."""
    return min(-(-int(_SPARE * 8 * row_bytes) // layers), _MOST_DIRECTIONS, dim)


def products_for(rank: int) -> int:
    """Products of the sides' eigenvectors, among which that many directions of a layer are found."""
    return max(int(_PRODUCTS * rank), _LEAST_PRODUCTS)


def _energies(fitting: Fitting) -> dict[str, torch.Tensor]:
    """Layer -> (r,) float64: E_j of every direction, over all ranks' rows of the sample."""
    (rows, count), device, ranks = fitting.sample(), fitting.device, fitting.ranks
    bases = {name: layer.to(device) for name, layer in fitting.curvature.items()}
    squares = {name: torch.zeros(layer.rank, dtype=torch.float64) for name, layer in fitting.curvature.items()}
    fitting.stage.total = (fitting.stage.total or 0) + count
    with ranks.jointly():
        for block in rows():
            flat = {name: block.layers[name].flat().to(device, torch.float32) for name in bases}
            for name, inside in inside_of(flat, bases).items():
                squares[name] += inside.square().sum(dim=0).cpu().double()
            fitting.stage.advance(block.count)
    return {name: ranks.sum(total) / count for name, total in squares.items()}


@dataclass(frozen=True)
class _Choice:
    """Directions of layers, what their codes keep of scores' variance, and how they are coded."""

    directions: Mapping[str, torch.Tensor]
    kept: float
    way: Way


def _choice(shares: Mapping[str, torch.Tensor], order: torch.Tensor, room: int, way: Way, cosine: float) -> _Choice:
    """The directions that add most, as many as codes have room for.

    Args:
        shares: layer -> what its directions add, (r,) float64.
        order: of all layers' directions one after the other, those of use, falling.
        room: bits for all of them.
        way: how they are coded.
        cosine: of a coordinate's square, codes keep the square of this.
    """
    count = min(len(order), room // way.bits // way.together * way.together * way.group)
    # Whole bytes, or whole groups: of what is begun the least directions are left out.
    unit = 1 if way.group == 1 and count == len(order) else way.unit
    among = torch.zeros(sum(len(share) for share in shares.values()), dtype=torch.bool)
    among[order[:count]] = True
    directions, total = {}, 0.0
    for (name, share), there in zip(shares.items(), among.split([len(s) for s in shares.values()]), strict=True):
        of_layer = there.nonzero().flatten()
        best = torch.argsort(share[of_layer], descending=True, stable=True)[: len(of_layer) // unit * unit]
        directions[name] = of_layer[best.sort().values]
        # Of scores' variance a direction has the square of what it adds to the mean of g^T H^-1 g.
        total += float(share[directions[name]].square().sum())
    return _Choice(directions, total * cosine**2, way)


def _read_codes(
    file: SealedFile, curvature: Mapping[str, LayerCurvature], specs: Mapping[str, LayerSpec], counts: tuple[int, ...]
) -> dict[str, LayerCode]:
    """What `EigenCodec.save` wrote, after checking the file's digest.

    Raises:
        CorruptionError: the file is damaged.
    """
    layers = {}
    with closing(file):
        file.verify()
        for i, (name, count) in enumerate(zip(specs, counts, strict=True)):
            directions, amplitudes = np.empty(0, np.int64), np.empty(0, np.float32)
            if count:
                directions = file.read_array(f"directions_{i}", (count,), "<i8").astype(np.int64)
                amplitudes = file.read_array(f"amplitudes_{i}", (count,), "<f4")
                if not np.isfinite(amplitudes).all():
                    raise CorruptionError(f"{file.path} holds inf or NaN: restore it from a copy")
                if directions.min() < 0 or directions.max() >= curvature[name].rank:
                    raise CorruptionError(
                        f"{file.path} names direction {int(directions.max())} of layer {name!r}, which has "
                        f"{curvature[name].rank}: restore it from a copy"
                    )
            layers[name] = LayerCode(torch.from_numpy(directions), torch.from_numpy(amplitudes))
    return layers

"""Eigencodes: an example's gradients in the basis of their layers' sides, in few bytes.

In the products of the sides' eigenvectors (see `curvature.sides`) a score is a sum over D coordinates, sum_j x_j g_j
with x = H^-1 g_q. Coordinate j adds about rms(x_j) rms(g_j) to it. There are two ways to write a row:

- levels: the coordinates that add most over all examples, each in 1, 2, 4 or 8 bits (see `bits`);
- the largest: of each example its own coordinates of the largest rms(x_j) |g_j|, with their places (see `sparse`).

Which is better depends on the model: levels where examples are alike in what they use, the largest where they are not.
Both are made of the sample, and the one whose scores agree best with those of whole gradients is taken; so is the size
of a row, where that is left open (see `agreement`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerSpec
from ..curvature.fit import LayerCurvature
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import MOST_DIRECTIONS, Named, Sketch, Whitened, roots
from ..errors import CorruptionError, CurvatureError
from ..linalg.scratch import CPU
from ..storage.sealed import SealedFile, as_count, entry_of, write_sealed
from .agreement import SIZES, Written, chosen, sizes_of, some_rows
from .base import SKETCHED_ROWS, CodecSizes, Encoder, Fitting, Parts, RowCodec, Scorer, Transformed
from .bits import BITS, SCALE_BYTES, CodeLayout
from .sparse import ENTRY_BYTES, MOST_PLACES, SparseLayout

if TYPE_CHECKING:
    from ..config import BuildConfig

# Directions that add less than this, of the most that one adds, add nothing that could be seen.
_LEAST_SHARE = 1e-3
# Rows of the sample that tell what directions add.
_WEIGHED_ROWS = 2048
# Rows are made of so many bytes of coordinates at once: larger pieces would be fresh memory each time.
_PIECE_BYTES = 16 << 20
# Self-influence is at least so much of what rows say before rounding is taken off.
_LEAST_OWN = 0.1
# Bytes of the file for a direction: its number and its amplitude.
_DIRECTION_BYTES = 12
# Named coordinates that propose a row, and of how many at least. (100,000 rows of 1,364: 128 have all of the ten best
# among 289 rows, 64 .999 among 1,956, 512 coordinates of a PCA .78 among 25,000.)
_SHORT, _SHORT_FROM = 128, 512


@dataclass(frozen=True)
class LayerCode:
    """The directions of one layer that are kept.

    Attributes:
        directions: (m,) int64, rising: which of the layer's D coordinates.
        amplitudes: (m,) float32: sqrt(E_j), what a coded coordinate of 1 stands for.
    """

    directions: torch.Tensor
    amplitudes: torch.Tensor


class Layout(Protocol):
    """How coordinates lie in a row (see `bits.CodeLayout`, `sparse.SparseLayout`)."""

    @property
    def dim(self) -> int: ...
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
    def scorer(self, queries: torch.Tensor) -> Scorer: ...


@dataclass(frozen=True)
class Way:
    """A way to write rows.

    Attributes:
        bits: of each coordinate; 0: rows name their largest.
        entries: how many they name; 0 with levels.
    """

    bits: int = 0
    entries: int = 0

    def layout(self, counts: tuple[int, ...]) -> Layout:
        """Of so many coordinates of each layer."""
        return CodeLayout(sum(counts), self.bits, counts) if self.bits else SparseLayout(sum(counts), self.entries)


@dataclass(frozen=True)
class Weights:
    """What the sample says of coordinates: layer -> (D,) float64 mean squares.

    Attributes:
        own: of gradients g.
        asked: of x = H^-1 g.
    """

    own: Mapping[str, torch.Tensor]
    asked: Mapping[str, torch.Tensor]

    def shares(self) -> torch.Tensor:
        """What coordinates add to a score, of all layers one after the other: rms(x_j) rms(g_j)."""
        return torch.cat([(self.own[name] * self.asked[name]).sqrt() for name in self.own])


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
        return self.way.layout(self.counts)

    # -- before anything is fitted -------------------------------------------------------------------------------

    @classmethod
    def sizes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec], directions: int) -> CodecSizes:
        dim, most = sum(spec.dim for spec in specs.values()), sizes_of(config)[-1]
        kept = min(dim, MOST_PLACES)
        whole = next((size for bits in (8, 4) if (size := _level_bytes(dim, bits, len(specs))) <= most), most)
        row, short = min(whole, most), 0
        # Where all coordinates have room, they are written as levels.
        if row == most >= SparseLayout(dim, _SHORT_FROM).row_bytes:
            short = SparseLayout(dim, _SHORT).row_bytes
        return CodecSizes(row, _DIRECTION_BYTES * kept, min(kept, MOST_DIRECTIONS), 4 * kept, 16 * dim, short)

    @classmethod
    def choices(cls) -> list[dict[str, Any]]:
        return [{"eigen_bytes": size} for size in SIZES]

    # -- made, kept, read ----------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, fitting: Fitting) -> Self:
        """Chooses the way, the size and the coordinates by walks over the sample.

        Raises:
            CurvatureError: all gradients of the sample are zero.
        """
        weights = _mean_squares(fitting)
        if not weights.shares().sum() > 0:
            raise CurvatureError("all gradients of the eigencodes' sample are zero: fit from other data")
        sizes, largest = sizes_of(fitting.config), _largest(weights, fitting)
        tried = [made for size in sizes for made in cls._ways(fitting, weights, largest, size)]
        return tried[0] if len(tried) == 1 else chosen(tried, fitting, _writer(tried, fitting.device))

    @classmethod
    def _ways(cls, fitting: Fitting, weights: Weights, largest: Mapping[str, LayerCode], size: int) -> list[Self]:
        """Codecs of rows of at most so many bytes, one for each way that has room for something.

        Args:
            fitting: of the index.
            weights: of coordinates.
            largest: the coordinates that rows can name.
            size: bytes.
        """
        shares = weights.shares()
        order = torch.argsort(shares, descending=True, stable=True)
        order = order[: int((shares > _LEAST_SHARE * shares.max()).sum())]
        out = []
        room = 8 * ((size - SCALE_BYTES * len(fitting.specs)) // 2 * 2)
        # A row's scales are at most a tenth of it.
        if 10 * SCALE_BYTES * len(fitting.specs) <= size or len(order) * BITS[-1] <= room:
            bits = max((b for b in BITS if len(order) * b <= room), default=1)
            count = len(order) if len(order) * bits <= room else room // bits // 8 * 8
            counts = torch.zeros(len(shares), dtype=torch.bool)
            counts[order[:count]] = True
            directions = cls._whole_bytes(counts, shares, fitting, bits, exact=count == len(order))
            kept = {name: LayerCode(d, weights.own[name][d].sqrt().float()) for name, d in directions.items()}
            if any(len(d) for d in directions.values()):
                out.append(cls._of(fitting, Way(bits=bits), kept))
        entries = (size - SCALE_BYTES) // ENTRY_BYTES
        if 0 < entries < len(order):
            out.append(cls._of(fitting, Way(entries=entries), largest))
        return out

    @classmethod
    def _of(cls, fitting: Fitting, way: Way, layers: Mapping[str, LayerCode]) -> Self:
        counts = tuple(len(part.directions) for part in layers.values())
        return cls(fitting.specs, fitting.curvature, way, counts, lambda: layers)

    @staticmethod
    def _whole_bytes(
        among: torch.Tensor, shares: torch.Tensor, fitting: Fitting, bits: int, *, exact: bool
    ) -> dict[str, torch.Tensor]:
        """Layer -> its directions, in whole bytes unless all have room: of what is begun the least are left out."""
        unit, out = 1 if exact else 8 // bits, {}
        of_layers = shares.split([spec.dim for spec in fitting.specs.values()])
        for (name, there), share in zip(_split(among, fitting).items(), of_layers, strict=True):
            best = torch.argsort(share[there], descending=True, stable=True)[: len(there) // unit * unit]
            out[name] = there[best.sort().values]
        return out

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """Writes `directions_<i>` (m,) int64 and `amplitudes_<i>` (m,) float32 for layer number i."""
        arrays: dict[str, np.ndarray] = {}
        for i, part in enumerate(self.layers.values()):
            arrays[f"directions_{i}"] = part.directions.numpy().astype("<i8")
            arrays[f"amplitudes_{i}"] = part.amplitudes.numpy()
        file = write_sealed(folder, name, arrays).to_json()
        return {"file": file, "bits": self.way.bits, "entries": self.way.entries, "counts": list(self.counts)}

    @classmethod
    def load(
        cls, folder: Path, entry: Any, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]
    ) -> Self:
        with entry_of("the codec"):
            way, counts = (
                Way(as_count(entry["bits"]), as_count(entry["entries"])),
                tuple(map(as_count, entry["counts"])),
            )
            known = (way.bits in BITS) == (way.entries == 0) and (way.bits == 0) == (way.entries > 0)
            if len(counts) != len(specs) or not known or not 0 < sum(counts) <= sum(s.dim for s in specs.values()):
                raise ValueError(f"{len(counts)} layers of {way} where the index has {len(specs)}")
            if way.entries and sum(counts) > MOST_PLACES:
                raise ValueError(f"{sum(counts)} coordinates, where rows can name {MOST_PLACES}")
        file = SealedFile.of_entry(folder, entry)
        return cls(specs, curvature, way, counts, lambda: _read_codes(file, specs, counts))

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

    def question(self, asked: Transformed) -> Parts:
        """ "eigen": (q, dim), whose inner product with a row's coordinates is its score."""
        parts = []
        for name, part in self.layers.items():
            if name in asked.turned:
                parts.append(asked.turned[name].index_select(1, part.directions).mul_(part.amplitudes))
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
        for name, turned in self._turned(rows):
            out[name] = self.curvature[name].sides.turned_back(turned)
        return out

    def _turned(self, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Layers with what rows stand for in their D coordinates, (n, D)."""
        for name, inside in self.coordinates(rows).items():
            every = torch.zeros(len(inside), self.specs[name].dim)
            every[:, self.layers[name].directions] = inside
            yield name, every

    def self_influence(self, rows: torch.Tensor, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """As in `RowCodec`. Decoded coordinates are made longer, so that inner products are not shrunk; squares take
        that back."""
        lost = 1.0 - self.layout.cosine**2
        readers = {name: _OwnReader(self.layers[name], one, lost) for name, one in preconditioners.items()}
        out = torch.zeros(len(rows))
        for part, total in self._pieces(rows, out):
            for name, inside in self.coordinates(part).items():
                if name in readers:
                    total += readers[name].quadratic(inside)
        return out

    # -- the sketch of rows --------------------------------------------------------------------------------------

    @cached_property
    def _sketched(self) -> dict[str, torch.Tensor]:
        """Layer -> which of its kept directions a sketch is made of: those of the largest amplitudes' share."""
        if sum(self.counts) <= MOST_DIRECTIONS:
            return {name: torch.arange(len(part.directions)) for name, part in self.layers.items()}
        sizes = torch.cat(
            [
                self.curvature[name].squares[part.directions].sqrt() / part.amplitudes
                for name, part in self.layers.items()
            ]
        )
        among = torch.zeros(len(sizes), dtype=torch.bool)
        among[torch.topk(sizes, MOST_DIRECTIONS).indices] = True
        return {n: part.nonzero().flatten() for n, part in zip(self.layers, among.split(self.counts), strict=True)}

    def whitened(
        self, rows: Callable[[], Iterable[torch.Tensor]], count: int, lams: Mapping[str, float], device: torch.device
    ) -> Whitened:
        """As in `RowCodec`, in directions that are kept."""
        layers, first, places, scales = self.layers, 0, [], []
        for name, part in layers.items():
            some = self._sketched[name]
            places.append(some + first)
            scales.append((part.amplitudes / roots(self.curvature[name], lams[name])[part.directions])[some])
            first += len(part.directions)
        at, scale = torch.cat(places), torch.cat(scales)

        def walk() -> Iterator[torch.Tensor]:
            for block in rows():
                yield self.layout.decode(block)[:, at] * scale

        return Whitened(walk, count, {n: part.directions[self._sketched[n]] for n, part in layers.items()}, lams)

    @property
    def short_entries(self) -> int:
        return _SHORT if self.way.entries >= _SHORT_FROM else 0

    def named(self, rows: torch.Tensor) -> Named:
        whole, short = self._sparse(self.short_entries), SparseLayout(self.layout.dim, self.short_entries)
        kept, every = short.energy(whole.shortened(rows, short.entries)), whole.energy(rows)
        return Named(whole.dim, short.entries, kept / every if every > 0 else 1.0)

    def _sparse(self, entries: int) -> SparseLayout:
        """The rows' layout, which names as many coordinates at least."""
        if not isinstance(self.layout, SparseLayout) or entries > self.layout.entries:
            raise CorruptionError(
                f"candidates are proposed by {entries} coordinates that rows name, and rows hold {self.layout.label}: "
                "restore the index from a copy, or rebuild_coarse()"
            )
        return self.layout

    def sketcher(self, sketch: Sketch | Named) -> Callable[[torch.Tensor], torch.Tensor]:
        """As in `RowCodec`, with all that is fixed folded into one (dim, k) matrix."""
        if isinstance(sketch, Named):
            layout, entries = self._sparse(sketch.entries), sketch.entries
            return lambda rows: layout.shortened(rows, entries)
        matrix, first = torch.zeros(self.layout.dim, sketch.dim), 0
        for name, part in self.layers.items():
            layer = sketch.layers[name]
            # Both are rising.
            places = torch.searchsorted(part.directions, layer.directions).clamp_max(max(len(part.directions) - 1, 0))
            if not torch.equal(part.directions[places], layer.directions):
                raise CorruptionError(
                    f"the sketch weighs coordinates of layer {name!r} that rows do not hold: restore the index from a "
                    "copy, or rebuild_coarse()"
                )
            weights = layer.weights / layer.whitening(self.curvature[name])[:, None]
            matrix[places + first] = weights * part.amplitudes[places][:, None]
            first += len(part.directions)
        scorer = self.layout.scorer(matrix.T)

        def coordinates(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([scorer.score(part).T for part in rows.split(SKETCHED_ROWS)])

        return coordinates


class _OwnReader:
    """g^T H^-1 g of one layer, of gradients that are 0 beside the kept directions.

    What is decoded is g and a rounding error, of each coordinate by itself, which adds its squares times the diagonal
    of H^-1.

    Args:
        code: the directions.
        one: H^-1.
        lost: share of what is decoded, squared, that is rounding.
    """

    def __init__(self, code: LayerCode, one: Preconditioner, lost: float) -> None:
        self._root, self._vectors, self._lost = one.root[code.directions], one.vectors[code.directions], lost
        self._weights = (one.strengths / (1.0 + one.strengths)).float()
        self._alone = 1.0 - self._vectors.square() @ self._weights

    def quadratic(self, decoded: torch.Tensor) -> torch.Tensor:
        """(n,) of coordinates (n, m)."""
        scaled = decoded * self._root
        within = (scaled @ self._vectors).square_() @ self._weights
        squares = scaled.square_()
        whole = squares.sum(dim=1).sub_(within)
        # Nothing is all rounding.
        return torch.maximum(whole - self._lost * (squares @ self._alone), _LEAST_OWN * whole)


class _EigenEncoder(Encoder):
    """Codes of gradients, a factor for each kept direction."""

    def __init__(self, codec: EigenCodec, device: torch.device) -> None:
        self._layout, self._device = codec.layout, device
        self._layers = {
            name: (
                codec.curvature[name].sides.to(device),
                part.directions.to(device),
                (1.0 / part.amplitudes).to(device),
            )
            for name, part in codec.layers.items()
            if len(part.directions)
        }

    def encode(self, block: GradientBlock) -> torch.Tensor:
        step = max(_PIECE_BYTES // (4 * self._layout.dim), 1)
        return torch.cat(
            [
                self._encode(block.select(rows))
                for rows in np.split(np.arange(block.count), range(step, block.count, step))
            ]
        )

    def _encode(self, block: GradientBlock) -> torch.Tensor:
        parts = []
        for name, (sides, directions, scales) in self._layers.items():
            turned = sides.turned(block.layers[name].flat().to(self._device, torch.float32))
            parts.append(turned.index_select(1, directions) * scales)
        return self._layout.encode(torch.cat(parts, dim=1))


def _largest(weights: Weights, fitting: Fitting) -> dict[str, LayerCode]:
    """The coordinates that rows can name. Sizes are compared in what they add to a score."""
    shares = weights.shares()
    order = torch.argsort(shares, descending=True, stable=True)[:MOST_PLACES]
    among = torch.zeros(len(shares), dtype=torch.bool)
    among[order] = shares[order] > _LEAST_SHARE * shares.max()
    directions = _split(among, fitting)
    return {name: LayerCode(d, weights.asked[name][d].rsqrt().float()) for name, d in directions.items()}


def _writer(tried: Sequence[EigenCodec], device: torch.device) -> Written:
    """Gives a block's rows by each codec; what they share is computed once."""
    sides = {name: layer.sides.to(device) for name, layer in tried[0].curvature.items()}
    codes = {
        id(codec.layers): {n: (p.directions.to(device), p.amplitudes.to(device)) for n, p in codec.layers.items()}
        for codec in tried
    }

    def written(block: GradientBlock) -> list[torch.Tensor]:
        turned = {n: pair.turned(block.layers[n].flat().to(device, torch.float32)) for n, pair in sides.items()}
        taken = {
            key: torch.cat([turned[n][:, directions] / sizes for n, (directions, sizes) in parts.items()], dim=1)
            for key, parts in codes.items()
        }
        return [codec.layout.encode(taken[id(codec.layers)]) for codec in tried]

    return written


def _split(among: torch.Tensor, fitting: Fitting) -> dict[str, torch.Tensor]:
    """Layer -> (m,) int64, rising: which of its coordinates are among those of all layers."""
    parts = among.split([spec.dim for spec in fitting.specs.values()])
    return {name: part.nonzero().flatten() for name, part in zip(fitting.specs, parts, strict=True)}


def _level_bytes(dim: int, bits: int, layers: int) -> int:
    """Of rows that hold all coordinates in so many bits."""
    packed = -(-dim * bits // 8)
    return packed + packed % 2 + SCALE_BYTES * layers


def _mean_squares(fitting: Fitting) -> Weights:
    """By one walk over some rows of the sample, of all ranks."""
    device, ranks, seen = fitting.device, fitting.ranks, 0
    own, asked = (
        {name: torch.zeros(spec.dim, dtype=torch.float64, device=device) for name, spec in fitting.specs.items()}
        for _ in range(2)
    )
    inverses = {name: (one.layer.sides.to(device), one.to(device)) for name, one in fitting.preconditioners.items()}
    with ranks.jointly():
        for block in some_rows(fitting, _WEIGHED_ROWS):
            seen += block.count
            for name, (sides, one) in inverses.items():
                turned = sides.turned(block.layers[name].flat().to(device, torch.float32))
                own[name] += turned.square().sum(dim=0, dtype=torch.float64)
                asked[name] += one.divided(turned).square_().sum(dim=0, dtype=torch.float64)
    seen = ranks.count(seen)
    return Weights(*({n: ranks.sum(total.cpu()) / seen for n, total in sums.items()} for sums in (own, asked)))


def _read_codes(file: SealedFile, specs: Mapping[str, LayerSpec], counts: tuple[int, ...]) -> dict[str, LayerCode]:
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
                if directions.min() < 0 or directions.max() >= specs[name].dim:
                    raise CorruptionError(
                        f"{file.path} names direction {int(directions.max())} of layer {name!r}, which has "
                        f"{specs[name].dim}: restore it from a copy"
                    )
            layers[name] = LayerCode(torch.from_numpy(directions), torch.from_numpy(amplitudes))
    return layers

"""Fitted projections, curvature, sketch, and calibration queries on disk: written once, loaded when first needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.gradients import SIDES, LayerSpec
from ..curvature.fit import CurvatureShape, LayerCurvature, refuse_overflow
from ..curvature.grid import Grid
from ..curvature.sketch import LayerSketch, Sketch
from ..errors import CorruptionError
from ..linalg.subspace import OVERSAMPLING
from .sealed import SealedFile, as_count, entry_of, write_sealed


def save_projections(
    folder: Path, name: str, learnt: Mapping[tuple[str, str], torch.Tensor], specs: Mapping[str, LayerSpec]
) -> dict[str, Any]:
    """Writes `in_<i>`, `out_<i>` (width, d) float32 of the learnt sides of layer number i; what the manifest keeps."""
    numbers = {layer: i for i, layer in enumerate(specs)}
    arrays = {f"{side}_{numbers[layer]}": matrix.numpy() for (layer, side), matrix in learnt.items()}
    return {"file": write_sealed(folder, name, arrays).to_json()}


def projection_bytes(specs: Mapping[str, LayerSpec]) -> int:
    """Of the file of learnt projections."""
    return sum(4 * math.prod(spec.side(side)) for spec in specs.values() for side in SIDES if spec.projected(side))


class FittedProjections(Mapping[tuple[str, str], torch.Tensor]):
    """The learnt projections of an index, (layer, side) -> (width, d); the digest is checked before the first use.

    Raises:
        CorruptionError: the manifest's entry is damaged.
    """

    def __init__(self, folder: Path, entry: Any, specs: Mapping[str, LayerSpec]) -> None:
        self.file, self._specs = SealedFile.of_entry(folder, entry), specs
        all_sides = {(layer, side): f"{side}_{i}" for i, layer in enumerate(specs) for side in SIDES}
        self._datasets = {key: name for key, name in all_sides.items() if name in self.file.info.offsets}

    def __getitem__(self, key: tuple[str, str]) -> torch.Tensor:
        name, shape = self._datasets[key], self._specs[key[0]].side(key[1])
        self.file.verify_once()
        return torch.from_numpy(self.file.read_array(name, shape, "<f4"))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._datasets)

    def __len__(self) -> int:
        return len(self._datasets)


def save_curvature(folder: Path, name: str, fitted: Mapping[str, LayerCurvature]) -> dict[str, Any]:
    """Writes `basis_<i>` (D, r) float32 and `spectrum_<i>` (m,) float64 for layer number i; where it has a
    grid, (M, r - p), and `left_<i>`, `right_<i>`, `products_<i>` (M + p,) and, if p, `diagonal_<i>` (p,) float64.

    Returns:
        what the manifest keeps: the file, and per layer rank, spectrum length, trace, rows, examples, M + p of a grid
        and p.

    Raises:
        NonFiniteError: a layer's has inf or NaN; nothing is written.
    """
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for i, (key, layer) in enumerate(fitted.items()):
        refuse_overflow(key, layer.core, layer.spectrum, layer.diagonal, torch.tensor(layer.trace))
        arrays[f"basis_{i}"] = layer.core.numpy()
        arrays[f"spectrum_{i}"] = layer.spectrum.double().numpy()
        arrays[f"diagonal_{i}"] = layer.diagonal.numpy()
        products = 0
        if layer.grid is not None:
            products = layer.grid.size
            arrays[f"left_{i}"], arrays[f"right_{i}"] = layer.grid.left.numpy(), layer.grid.right.numpy()
            arrays[f"products_{i}"] = layer.grid.chosen.numpy().astype("<i8")
        rank, length, alone = layer.rank, len(layer.spectrum), len(layer.diagonal)
        told = _CurvatureFacts(rank, length, layer.trace, layer.rows, layer.examples, products, alone)
        facts.append(asdict(told))
    return {"file": write_sealed(folder, name, arrays).to_json(), "layers": facts}


def curvature_bytes(shapes: Mapping[str, CurvatureShape], specs: Mapping[str, LayerSpec], rows: int | None) -> int:
    """Of the file of curvatures of those shapes, of so many rows if they bound them."""
    total = 0
    for name, shape in shapes.items():
        spec = specs[name]
        rank = shape.found(spec.dim, rows)
        total += 4 * shape.height(spec.dim) * rank + 8 * (rank + OVERSAMPLING)
        if shape.products:
            total += 4 * (spec.d_in**2 + spec.d_out**2) + 8 * (shape.products + 2 * shape.diagonal)
    return total


@dataclass(frozen=True)
class _CurvatureFacts:
    """What the manifest says of a layer's curvature."""

    rank: int
    spectrum: int
    trace: float
    rows: int
    examples: float
    products: int
    diagonal: int

    @property
    def found(self) -> int:
        """Columns of the matrix."""
        return self.rank - self.diagonal

    @classmethod
    def of(cls, name: str, entry: Any) -> _CurvatureFacts:
        with entry_of(f"layer {name!r}'s curvature"):
            facts = cls(**entry)
            for value in (facts.rank, facts.spectrum, facts.rows, facts.products, facts.diagonal):
                as_count(value)
            fine = math.isfinite(facts.trace) and math.isfinite(facts.examples)
            if not fine or not 0 <= facts.found <= facts.spectrum or facts.diagonal > facts.products:
                raise ValueError(repr(entry))
        return facts


class FittedCurvature(Mapping[str, LayerCurvature]):
    """The curvature of an index, layer -> `LayerCurvature`; the file's digest is checked before its first use.

    Raises:
        CorruptionError: the manifest's entry is damaged, or says more than the file can hold.
    """

    def __init__(self, folder: Path, entry: Any, specs: Mapping[str, LayerSpec]) -> None:
        self.file, facts = SealedFile.of_entry(folder, entry), entry.get("layers")
        if not isinstance(facts, list) or len(facts) != len(specs):
            raise CorruptionError(f"the manifest does not have {len(specs)} layers' curvature: restore it from a copy")
        self._specs = specs
        self._facts = {name: _CurvatureFacts.of(name, entry) for name, entry in zip(specs, facts, strict=True)}
        # Before memory is taken for what the file cannot hold.
        need = sum(
            4 * self._height(name) * entry.found + 8 * (entry.spectrum + entry.diagonal)
            for name, entry in self._facts.items()
        )
        if need > self.file.info.size:
            raise CorruptionError(
                f"{self.file.path} has {self.file.info.size} bytes, but its layers are said to take {need}: restore it"
            )
        self._numbers = {name: i for i, name in enumerate(specs)}
        self._loaded: dict[str, LayerCurvature] = {}
        self._rooms: dict[tuple[int, int], tuple[list[str], torch.Tensor]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> LayerCurvature:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def rank(self, name: str) -> int:
        """How many directions a layer has, without reading them."""
        return self._facts[name].rank

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _load(self, name: str) -> LayerCurvature:
        facts, number = self._facts[name], self._numbers[name]
        self.file.verify_once()
        core = self._room(name)
        self.file.read_array(f"basis_{number}", tuple(core.shape), "<f4", out=core.numpy())
        spectrum = torch.from_numpy(self.file.read_array(f"spectrum_{number}", (facts.spectrum,), "<f8"))
        diagonal = torch.from_numpy(self.file.read_array(f"diagonal_{number}", (facts.diagonal,), "<f8"))
        _check_finite(self.file, core, spectrum, diagonal)
        grid = self._grid(name) if facts.products else None
        return LayerCurvature(core, spectrum, facts.trace, facts.rows, facts.examples, grid, diagonal)

    def _grid(self, name: str) -> Grid:
        number, spec, count = self._numbers[name], self._specs[name], self._facts[name].products
        left, right = (
            torch.from_numpy(self.file.read_array(f"{side}_{number}", (width, width), "<f4"))
            for side, width in (("left", spec.d_in), ("right", spec.d_out))
        )
        chosen = torch.from_numpy(self.file.read_array(f"products_{number}", (count,), "<i8"))
        if bool((chosen < 0).any()) or bool((chosen >= spec.dim).any()):
            raise CorruptionError(f"the curvature of layer {name!r} is made of products that do not exist: restore it")
        return Grid(left, right, chosen)

    def _height(self, name: str) -> int:
        """Rows of a layer's core."""
        return self._facts[name].products - self._facts[name].diagonal or self._specs[name].dim

    def _room(self, name: str) -> torch.Tensor:
        """Memory for a layer's core: layers of one shape lie one behind the other (see `inverse.products`)."""
        shape = (self._height(name), self._facts[name].found)
        if shape not in self._rooms:
            alike = [n for n in self._specs if (self._height(n), self._facts[n].found) == shape]
            self._rooms[shape] = (alike, torch.empty(len(alike), *shape))
        alike, room = self._rooms[shape]
        return room[alike.index(name)]


def _check_finite(file: SealedFile, *parts: torch.Tensor) -> None:
    """What was fitted has no inf or NaN: a file that has some was not written by a build, whatever its digest says.

    Raises:
        CorruptionError: it has.
    """
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise CorruptionError(f"{file.path} holds inf or NaN: restore it from a copy")


def sketch_bytes(dim: int, directions: int) -> int:
    """Of the file of a sketch of k = dim made of so many directions, whose numbers it names."""
    return (4 * min(dim, max(directions, 1)) + 8) * directions


def save_sketch(folder: Path, name: str, sketch: Sketch) -> dict[str, Any]:
    """Writes `weights_<i>` (m, k) float32 for layer number i, and `directions_<i>` (m,) int64 where they are not the
    layer's first; what the manifest keeps."""
    arrays = {}
    for i, part in enumerate(sketch.layers.values()):
        arrays[f"weights_{i}"] = part.weights.numpy()
        if not torch.equal(part.directions, torch.arange(len(part.directions))):
            arrays[f"directions_{i}"] = part.directions.numpy().astype("<i8")
    return {
        "file": write_sealed(folder, name, arrays).to_json(),
        "dim": sketch.dim,
        "method": sketch.method,
        "energy": sketch.energy,
        "lams": [part.lam for part in sketch.layers.values()],
        "counts": [len(part.weights) for part in sketch.layers.values()],
    }


def load_sketch(folder: Path, facts: Any, names: Iterable[str]) -> Sketch:
    """Reads a sketch after checking its digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    names, file = list(names), SealedFile.of_entry(folder, facts)
    with entry_of("the sketch"):
        dim, method, energy = as_count(facts["dim"]), str(facts["method"]), float(facts["energy"])
        lams, counts = [float(v) for v in facts["lams"]], [as_count(v) for v in facts["counts"]]
        if {len(lams), len(counts)} != {len(names)} or dim < 1:
            raise ValueError(f"{len(lams)} layers where the index has {len(names)}")
        # Before memory is taken for what the file cannot hold.
        if 4 * sum(counts) * dim > file.info.size:
            raise ValueError(f"{sum(counts)} x {dim} weights in {file.info.size} bytes")
    with closing(file):
        file.verify()
        layers, at = {}, 0
        # One matrix of all layers, so that they lie one behind the other (see `inverse.products`).
        room = torch.empty(sum(counts), dim)
        for i, (name, lam, count) in enumerate(zip(names, lams, counts, strict=True)):
            part, directions = room[at : at + count], torch.arange(count)
            file.read_array(f"weights_{i}", (count, dim), "<f4", out=part.numpy())
            if f"directions_{i}" in file.info.offsets:
                directions = torch.from_numpy(file.read_array(f"directions_{i}", (count,), "<i8").astype(np.int64))
            if bool((directions < 0).any()):
                raise CorruptionError(f"{file.path} names direction {int(directions.min())}: restore it from a copy")
            layers[name] = LayerSketch(lam, part, directions)
            at += count
        _check_finite(file, room)
    return Sketch(layers, dim, method, energy)


def save_removed(folder: Path, name: str, ids: np.ndarray) -> dict[str, Any]:
    """Writes the rising ids of removed rows; what the manifest keeps."""
    return {"file": write_sealed(folder, name, {"ids": ids.astype("<i8")}).to_json(), "count": len(ids)}


def load_removed(folder: Path, facts: Any) -> np.ndarray:
    """(m,) int64: what `save_removed` wrote, after checking the file's digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    file = SealedFile.of_entry(folder, facts)
    with entry_of("removed ids"):
        count = as_count(facts["count"])
    with closing(file):
        file.verify()
        return file.read_array("ids", (count,), "<i8").astype(np.int64)


def save_queries(folder: Path, name: str, ids: np.ndarray, gradients: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes what calibration asks: `ids` (m,) int64 and `query_<i>` (m, d_in, d_out) float32 of training examples, in
    the layers' order; what the manifest keeps."""
    arrays: dict[str, np.ndarray] = {"ids": ids.astype("<i8")}
    arrays |= {f"query_{i}": g.float().numpy() for i, g in enumerate(gradients.values())}
    return {"file": write_sealed(folder, name, arrays).to_json(), "count": len(ids)}


def query_bytes(specs: Mapping[str, LayerSpec]) -> int:
    """Of one calibration query on disk and in memory."""
    return 8 + 4 * sum(spec.dim for spec in specs.values())


class CalibrationQueries:
    """What `save_queries` wrote; the digest is checked before the first use.

    Raises:
        CorruptionError: the manifest's entry is damaged.
    """

    def __init__(self, folder: Path, facts: Any, specs: Mapping[str, LayerSpec]) -> None:
        self.file, self._specs = SealedFile.of_entry(folder, facts), specs
        with entry_of("calibration queries"):
            self.count = as_count(facts["count"])

    def ids(self) -> np.ndarray:
        """(count,) int64: the training examples that are the queries."""
        self.file.verify_once()
        return self.file.read_array("ids", (self.count,), "<i8").astype(np.int64)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Layer -> (count, d_in, d_out) float32."""
        self.file.verify_once()
        return {
            spec.name: torch.from_numpy(self.file.read_array(f"query_{i}", (self.count, spec.d_in, spec.d_out), "<f4"))
            for i, spec in enumerate(self._specs.values())
        }

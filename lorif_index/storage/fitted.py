"""Fitted projections, curvature, eigencodes and sketch on disk: written once, loaded when a search first needs them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.gradients import LayerSpec
from ..codecs.bits import CodeLayout
from ..codecs.eigencodes import EigenCode, LayerCode, eigen_layout
from ..codecs.largest import GROUPS, LargestLayout, code_bits
from ..config import BITS
from ..curvature.fit import LayerCurvature, refuse_overflow
from ..curvature.grid import Grid
from ..curvature.sketch import LayerSketch, Sketch
from ..errors import CorruptionError
from .sealed import SealedFile, SealedInfo, write_sealed

FILE = "curvature.h5"
PROJECTIONS_FILE = "projections.h5"
SKETCH_FILE = "sketch.h5"
EIGEN_FILE = "eigencodes.h5"
QUERIES_FILE = "calibration.h5"


def save_projections(
    folder: Path, learnt: Mapping[tuple[str, str], torch.Tensor], specs: Mapping[str, LayerSpec]
) -> dict[str, Any]:
    """Writes `in_<i>`, `out_<i>` (width, d) float32 of the learnt sides of layer number i; what the manifest keeps."""
    arrays: dict[str, np.ndarray] = {}
    sides = []
    for i, name in enumerate(specs):
        for side in ("in", "out"):
            if (name, side) in learnt:
                arrays[f"{side}_{i}"] = learnt[name, side].numpy()
                sides.append([i, side])
    return {"file": write_sealed(folder, PROJECTIONS_FILE, arrays, {}).to_json(), "sides": sides}


class FittedProjections(Mapping[tuple[str, str], torch.Tensor]):
    """The learnt projections of an index, (layer, side) -> (width, d); the digest is checked before the first use.

    Raises:
        CorruptionError: the manifest's entry is damaged.
    """

    def __init__(self, folder: Path, facts: Any, specs: Mapping[str, LayerSpec]) -> None:
        names = list(specs)
        try:
            self.file = SealedFile(folder, SealedInfo.from_json(facts["file"]))
            self._numbers = {(names[int(i)], str(side)): int(i) for i, side in facts["sides"]}
            if any(i < 0 for i in self._numbers.values()) or {s for _, s in self._numbers} - {"in", "out"}:
                raise ValueError(f"sides {facts['sides']!r}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptionError(f"the manifest's entry of the projections is damaged: {error!r}") from None
        self._specs = specs
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[str, str]) -> torch.Tensor:
        number, spec = self._numbers[key], self._specs[key[0]]
        shape = (spec.width_in, spec.d_in) if key[1] == "in" else (spec.width_out, spec.d_out)
        with self._lock:
            self.file.verify_once()
            return torch.from_numpy(self.file.read_array(f"{key[1]}_{number}", shape, "<f4"))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def save_curvature(
    folder: Path, fitted: Mapping[str, LayerCurvature], name: str = FILE
) -> tuple[SealedInfo, list[dict[str, Any]]]:
    """Writes `basis_<i>` (D, r) float32 and `spectrum_<i>` (m,) float64 for layer number i; where it has a
    grid, (M, r - p), and `left_<i>`, `right_<i>`, `products_<i>` (M + p,) and, if p, `diagonal_<i>` (p,) float64.

    Returns:
        the sealed file, and per layer what the manifest keeps: rank, spectrum length, trace, rows, examples, and of a
        grid M + p and p.

    Raises:
        NonFiniteError: a layer's has inf or NaN; nothing is written.
    """
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for i, (key, layer) in enumerate(fitted.items()):
        refuse_overflow(key, layer.core, layer.spectrum, layer.diagonal, torch.tensor(layer.trace))
        arrays[f"basis_{i}"] = layer.core.numpy()
        arrays[f"spectrum_{i}"] = layer.spectrum.double().numpy()
        facts.append(
            {
                "rank": layer.rank,
                "spectrum": len(layer.spectrum),
                "trace": layer.trace,
                "rows": layer.rows,
                "examples": layer.examples,
            }
        )
        if layer.grid is not None:
            arrays[f"left_{i}"], arrays[f"right_{i}"] = layer.grid.left.numpy(), layer.grid.right.numpy()
            arrays[f"products_{i}"] = layer.grid.chosen.numpy().astype("<i8")
            facts[-1]["products"] = layer.grid.size
        if len(layer.diagonal):
            arrays[f"diagonal_{i}"] = layer.diagonal.numpy()
            facts[-1]["diagonal"] = len(layer.diagonal)
    return write_sealed(folder, name, arrays, {}), facts


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
        try:
            rank, length, rows = (int(entry[key]) for key in ("rank", "spectrum", "rows"))
            made_of, alone = int(entry.get("products", 0)), int(entry.get("diagonal", 0))
            facts = cls(rank, length, float(entry["trace"]), rows, float(entry["examples"]), made_of, alone)
            if (
                not 0 <= facts.found <= length
                or rows < 0
                or not 0 <= alone <= made_of
                or not (math.isfinite(facts.trace) and math.isfinite(facts.examples))
            ):
                raise ValueError(f"{rank} directions, {length} eigenvalues, {rows} rows")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptionError(f"the manifest's curvature entry of layer {name!r} is damaged ({error!r})") from None
        return facts


class FittedCurvature(Mapping[str, LayerCurvature]):
    """The curvature of an index, layer -> `LayerCurvature`; the file's digest is checked before its first use."""

    def __init__(
        self, folder: Path, sealed: SealedInfo, specs: dict[str, LayerSpec], facts: list[dict[str, Any]]
    ) -> None:
        if len(facts) != len(specs):
            raise CorruptionError(
                f"the manifest has {len(specs)} layers but {len(facts)} curvature entries: restore it"
            )
        self.file = SealedFile(folder, sealed)
        self._specs = specs
        self._facts = {name: _CurvatureFacts.of(name, entry) for name, entry in zip(specs, facts, strict=True)}
        # Before memory is taken for what the file cannot hold.
        need = sum(
            4 * self._height(name) * entry.found + 8 * (entry.spectrum + entry.diagonal)
            for name, entry in self._facts.items()
        )
        if need > sealed.size:
            raise CorruptionError(
                f"{self.file.path} has {sealed.size} bytes, but its layers are said to take {need}: restore the index"
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
        diagonal = torch.zeros(0, dtype=torch.float64)
        if facts.diagonal:
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
        """Memory for a layer's core: layers of one shape lie one behind the other (see `query.products`)."""
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


def save_sketch(folder: Path, sketch: Sketch, name: str = SKETCH_FILE) -> dict[str, Any]:
    """Writes `weights_<i>` (m, k) float32 for layer number i, and `directions_<i>` (m,) int64 where they are not the
    layer's first; what the manifest keeps."""
    arrays, chosen = {}, []
    for i, part in enumerate(sketch.layers.values()):
        chosen.append(not torch.equal(part.directions, torch.arange(len(part.directions))))
        if len(part.weights):
            arrays[f"weights_{i}"] = part.weights.numpy()
        if chosen[-1]:
            arrays[f"directions_{i}"] = part.directions.numpy().astype("<i8")
    return {
        "file": write_sealed(folder, name, arrays, {}).to_json(),
        "dim": sketch.dim,
        "method": sketch.method,
        "energy": sketch.energy,
        "lams": [part.lam for part in sketch.layers.values()],
        "counts": [len(part.weights) for part in sketch.layers.values()],
        "chosen": chosen,
    }


def load_sketch(folder: Path, facts: Any, names: Iterable[str]) -> Sketch:
    """Reads a sketch after checking its digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    names = list(names)
    try:
        file = SealedFile(folder, SealedInfo.from_json(facts["file"]))
        dim, method, energy = int(facts["dim"]), str(facts["method"]), float(facts["energy"])
        lams, counts = [float(v) for v in facts["lams"]], [int(v) for v in facts["counts"]]
        # Until version 5 directions were always a layer's first.
        chosen = [bool(v) for v in facts.get("chosen", [False] * len(names))]
        if {len(lams), len(counts), len(chosen)} != {len(names)} or dim < 1 or min(counts) < 0:
            raise ValueError(f"{len(lams)} layers where the index has {len(names)}")
        if 4 * sum(counts) * dim > file.info.size:
            raise ValueError(f"{sum(counts)} x {dim} weights in {file.info.size} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"the manifest's sketch entry is damaged ({error!r}): restore it from a copy") from None
    with closing(file):
        file.verify()
        layers, at = {}, 0
        # One matrix of all layers, so that they lie one behind the other (see `query.products`).
        room = torch.empty(sum(counts), dim)
        for i, (name, lam, count) in enumerate(zip(names, lams, counts, strict=True)):
            part, directions = room[at : at + count], torch.arange(count)
            if count:
                file.read_array(f"weights_{i}", (count, dim), "<f4", out=part.numpy())
            if chosen[i]:
                directions = torch.from_numpy(file.read_array(f"directions_{i}", (count,), "<i8").astype(np.int64))
                if count and int(directions.min()) < 0:
                    raise CorruptionError(
                        f"{file.path} names direction {int(directions.min())}: restore it from a copy"
                    )
            layers[name] = LayerSketch(lam, part, directions)
            at += count
        _check_finite(file, room)
    return Sketch(layers, dim, method, energy)


def save_eigencode(folder: Path, code: EigenCode) -> dict[str, Any]:
    """Writes `directions_<i>` (m,) int64 and `amplitudes_<i>` (m,) float32 for layer number i; what the manifest
    keeps."""
    arrays: dict[str, np.ndarray] = {}
    for i, part in enumerate(code.layers.values()):
        if len(part.directions):
            arrays[f"directions_{i}"] = part.directions.numpy().astype("<i8")
            arrays[f"amplitudes_{i}"] = part.amplitudes.numpy()
    return {
        "file": write_sealed(folder, EIGEN_FILE, arrays, {}).to_json(),
        "bits": code.bits,
        "group": code.group,
        "counts": [len(part.directions) for part in code.layers.values()],
    }


def stored_eigen_layout(facts: Any, layers: int) -> CodeLayout | LargestLayout:
    """The layout of eigencodes by the manifest's entry.

    Raises:
        CorruptionError: the entry is damaged.
    """
    try:
        bits, counts = int(facts["bits"]), tuple(int(v) for v in facts["counts"])
        # Until version 6 every direction had bits of its own.
        group = int(facts.get("group", 1))
        known = bits in BITS if group == 1 else group in GROUPS and bits == code_bits(group)
        if len(counts) != layers or not known or min(counts) < 0 or not sum(counts):
            raise ValueError(f"{len(counts)} layers of {bits} bits for {group} where the index has {layers}")
        if any(count % group for count in counts):
            raise ValueError(f"{counts} directions are not whole groups of {group}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptionError(f"the manifest's entry of the eigencodes is damaged ({error!r}): restore it") from None
    return eigen_layout(counts, bits, group)


def load_eigencode(folder: Path, facts: Any, curvature: Mapping[str, LayerCurvature]) -> EigenCode:
    """Reads what eigencodes mean after checking the file's digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    layout = stored_eigen_layout(facts, len(curvature))
    try:
        file = SealedFile(folder, SealedInfo.from_json(facts["file"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"the manifest's entry of the eigencodes is damaged ({error!r}): restore it") from None
    layers = {}
    with closing(file):
        file.verify()
        for i, (name, count) in enumerate(zip(curvature, layout.widths, strict=True)):
            directions, amplitudes = np.empty(0, np.int64), np.empty(0, np.float32)
            if count:
                directions = file.read_array(f"directions_{i}", (count,), "<i8").astype(np.int64)
                amplitudes = file.read_array(f"amplitudes_{i}", (count,), "<f4")
                _check_finite(file, torch.from_numpy(amplitudes))
                if directions.min() < 0 or directions.max() >= curvature[name].rank:
                    raise CorruptionError(
                        f"{file.path} names direction {int(directions.max())} of layer {name!r}, which has "
                        f"{curvature[name].rank}: restore it from a copy"
                    )
            layers[name] = LayerCode(torch.from_numpy(directions), torch.from_numpy(amplitudes))
    return EigenCode(layers, layout.bits, layout.group if isinstance(layout, LargestLayout) else 1)


def save_removed(folder: Path, name: str, ids: np.ndarray) -> dict[str, Any]:
    """Writes the rising ids of removed rows; what the manifest keeps."""
    return {"file": write_sealed(folder, name, {"ids": ids.astype("<i8")}, {}).to_json(), "count": len(ids)}


def load_removed(folder: Path, facts: Any) -> np.ndarray:
    """(m,) int64: what `save_removed` wrote, after checking the file's digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    try:
        file, count = SealedFile(folder, SealedInfo.from_json(facts["file"])), int(facts["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"the manifest's entry of removed ids is damaged ({error!r}): restore it") from None
    with closing(file):
        file.verify()
        return file.read_array("ids", (count,), "<i8").astype(np.int64)


def save_queries(
    folder: Path, ids: np.ndarray, gradients: Mapping[str, torch.Tensor], name: str = QUERIES_FILE
) -> dict[str, Any]:
    """Writes what calibration asks: `ids` (m,) int64 and `query_<i>` (m, d_in, d_out) float32 of training examples, in
    the layers' order; what the manifest keeps."""
    arrays: dict[str, np.ndarray] = {"ids": ids.astype("<i8")}
    arrays |= {f"query_{i}": g.float().numpy() for i, g in enumerate(gradients.values())}
    sealed = write_sealed(folder, name, {k: v for k, v in arrays.items() if v.size}, {})
    return {"file": sealed.to_json(), "count": len(ids)}


class CalibrationQueries:
    """What `save_queries` wrote; the digest is checked before the first use.

    Raises:
        CorruptionError: the manifest's entry is damaged.
    """

    def __init__(self, folder: Path, facts: Any, specs: Mapping[str, LayerSpec]) -> None:
        try:
            self.file = SealedFile(folder, SealedInfo.from_json(facts["file"]))
            self.count = int(facts["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"the manifest's entry of calibration queries is damaged: {error!r}") from None
        self._specs = specs

    def ids(self) -> np.ndarray:
        """(count,) int64: the training examples that are the queries."""
        return self._read("ids", (self.count,), "<i8").astype(np.int64)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Layer -> (count, d_in, d_out) float32."""
        return {
            spec.name: torch.from_numpy(self._read(f"query_{i}", (self.count, spec.d_in, spec.d_out), "<f4"))
            for i, spec in enumerate(self._specs.values())
        }

    def _read(self, dataset: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        self.file.verify_once()
        return self.file.read_array(dataset, shape, dtype) if shape[0] else np.empty(shape, dtype)

"""Fitted projections, curvature, sketch, and calibration queries on disk: written once, loaded when first needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.gradients import SIDES, LayerSpec
from ..curvature.fit import CurvatureShape, LayerCurvature, refuse_overflow
from ..curvature.sides import Sides, turns
from ..curvature.sketch import LayerSketch, Named, Sketch
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
    """Writes for layer number i its sides `left_<i>` (d_in, d_in) and `right_<i>` (d_out, d_out) float32, which
    one that is not turned has not, `squares_<i>`
    (D,) float32, `factor_<i>` (D, r) float16 over `scale_<i>` (r,) float32, and `spectrum_<i>` (m,) float64. A factor
    that is all there is (share 0) is float32, without a scale.

    Returns:
        what the manifest keeps: the file, and per layer rank, spectrum length, share, trace, rows and examples.

    Raises:
        NonFiniteError: a layer's has inf or NaN; nothing is written.
    """
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for i, (key, layer) in enumerate(fitted.items()):
        refuse_overflow(key, layer.squares, layer.factor, layer.spectrum, torch.tensor(layer.trace))
        for side, matrix in (("left", layer.sides.left), ("right", layer.sides.right)):
            if matrix is not None:
                arrays[f"{side}_{i}"] = matrix.numpy()
        arrays[f"squares_{i}"] = layer.squares.numpy()
        if layer.share:
            half, scale = halved(layer.factor)
            arrays[f"factor_{i}"], arrays[f"scale_{i}"] = half.numpy(), scale.numpy()
        else:
            arrays[f"factor_{i}"] = layer.factor.numpy()
        arrays[f"spectrum_{i}"] = layer.spectrum.double().numpy()
        told = _CurvatureFacts(layer.rank, len(layer.spectrum), layer.share, layer.trace, layer.rows, layer.examples)
        facts.append(asdict(told))
    return {"file": write_sealed(folder, name, arrays).to_json(), "layers": facts}


def halved(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor (D, r) in half precision, and what its columns are multiplied by, (r,) float32: their largest entries,
    so that neither the largest nor the usual entry leaves float16. B B^T is then what is stored, to the last bit."""
    scale = factor.abs().amax(dim=0) if len(factor) else factor.new_zeros(factor.shape[1])
    return (factor / torch.where(scale > 0, scale, 1.0)).half(), scale


def curvature_bytes(shape: CurvatureShape, specs: Mapping[str, LayerSpec], rows: int | None) -> int:
    """Of the file of curvatures of that shape, of so many rows if they bound them."""
    total = 0
    for spec in specs.values():
        rank = shape.directions(spec.dim, rows)
        sides = sum(width**2 for width in (spec.d_in, spec.d_out) if turns(width))
        total += 4 * (sides + spec.dim) + (2 * spec.dim * rank + 4 * rank if shape.share else 4 * spec.dim * rank)
        total += 8 * (rank + OVERSAMPLING)
    return total


@dataclass(frozen=True)
class _CurvatureFacts:
    """What the manifest says of a layer's curvature."""

    rank: int
    spectrum: int
    share: float
    trace: float
    rows: int
    examples: float

    @classmethod
    def of(cls, name: str, entry: Any) -> _CurvatureFacts:
        with entry_of(f"layer {name!r}'s curvature"):
            facts = cls(**entry)
            for value in (facts.rank, facts.spectrum, facts.rows):
                as_count(value)
            fine = math.isfinite(facts.trace) and math.isfinite(facts.examples) and 0 <= facts.share < 1
            if not fine or facts.rank > facts.spectrum:
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
        need = sum(2 * specs[name].dim * facts.rank + 8 * facts.spectrum for name, facts in self._facts.items())
        if need > self.file.info.size:
            raise CorruptionError(
                f"{self.file.path} has {self.file.info.size} bytes, but its layers are said to take {need}: restore it"
            )
        self._numbers = {name: i for i, name in enumerate(specs)}
        self._loaded: dict[str, LayerCurvature] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> LayerCurvature:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _load(self, name: str) -> LayerCurvature:
        facts, i, spec = self._facts[name], self._numbers[name], self._specs[name]
        self.file.verify_once()

        def read(what: str, shape: tuple[int, ...], dtype: str = "<f4") -> torch.Tensor:
            return torch.from_numpy(self.file.read_array(f"{what}_{i}", shape, dtype))

        left, right = (
            read(side, (width, width)) if turns(width) else None
            for side, width in (("left", spec.d_in), ("right", spec.d_out))
        )
        sides = Sides((spec.d_in, spec.d_out), left, right)
        squares, spectrum = read("squares", (spec.dim,)), read("spectrum", (facts.spectrum,), "<f8")
        if facts.share:
            factor = read("factor", (spec.dim, facts.rank), "<f2").float() * read("scale", (facts.rank,))
        else:
            factor = read("factor", (spec.dim, facts.rank))
        turned = [matrix for matrix in (left, right) if matrix is not None]
        _check_finite(self.file, *turned, squares, spectrum, factor)
        return LayerCurvature(sides, squares, factor, facts.share, spectrum, facts.trace, facts.rows, facts.examples)


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


def save_sketch(folder: Path, name: str, sketch: Sketch | Named) -> dict[str, Any]:
    """Writes `weights_<i>` (m, k) float32 for layer number i, and `directions_<i>` (m,) int64 where they are not the
    layer's first; what the manifest keeps."""
    if isinstance(sketch, Named):
        # Nothing is learnt.
        return {"method": sketch.method, "lams": []} | asdict(sketch)
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


def load_sketch(folder: Path, facts: Any, specs: Mapping[str, LayerSpec]) -> Sketch | Named:
    """Reads a sketch after checking its digest.

    Raises:
        CorruptionError: the file or the manifest's entry is damaged.
    """
    with entry_of("the sketch"):
        if facts["method"] == Named.method:
            return Named(as_count(facts["dim"]), as_count(facts["entries"]), float(facts["energy"]))
    file = SealedFile.of_entry(folder, facts)
    with entry_of("the sketch"):
        dim, method, energy = as_count(facts["dim"]), str(facts["method"]), float(facts["energy"])
        lams, counts = [float(v) for v in facts["lams"]], [as_count(v) for v in facts["counts"]]
        if {len(lams), len(counts)} != {len(specs)} or dim < 1:
            raise ValueError(f"{len(lams)} layers where the index has {len(specs)}")
        # Before memory is taken for what the file cannot hold.
        if 4 * sum(counts) * dim > file.info.size:
            raise ValueError(f"{sum(counts)} x {dim} weights in {file.info.size} bytes")
    with closing(file):
        file.verify()
        layers, at = {}, 0
        room = torch.empty(sum(counts), dim)
        for i, (name, lam, count) in enumerate(zip(specs, lams, counts, strict=True)):
            part, directions = room[at : at + count], torch.arange(count)
            file.read_array(f"weights_{i}", (count, dim), "<f4", out=part.numpy())
            if f"directions_{i}" in file.info.offsets:
                directions = torch.from_numpy(file.read_array(f"directions_{i}", (count,), "<i8").astype(np.int64))
            if bool((directions < 0).any()):
                raise CorruptionError(f"{file.path} names direction {int(directions.min())}: restore it from a copy")
            most = int(directions.max()) + 1 if count else 0
            if most > specs[name].dim:
                raise CorruptionError(
                    f"the sketch weighs {most} coordinates of layer {name!r}, which has {specs[name].dim}: "
                    "restore the index from a copy"
                )
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
    """Writes what calibration asks: `ids` (m,) int64 and `query_<i>` (m, d_in, d_out) bfloat16, as uint16, of training
    examples, in the layers' order; what the manifest keeps."""
    arrays: dict[str, np.ndarray] = {"ids": ids.astype("<i8")}
    # What is calibrated by them does not hang on their third digit, and they may be the largest file of an index.
    halves = (g.to(torch.bfloat16).contiguous().view(torch.int16).numpy() for g in gradients.values())
    arrays |= {f"query_{i}": half.view("<u2") for i, half in enumerate(halves)}
    return {"file": write_sealed(folder, name, arrays).to_json(), "count": len(ids)}


def query_bytes(specs: Mapping[str, LayerSpec]) -> int:
    """Of one calibration query on disk."""
    return 8 + 2 * sum(spec.dim for spec in specs.values())


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
            spec.name: self._read(f"query_{i}", (self.count, spec.d_in, spec.d_out))
            for i, spec in enumerate(self._specs.values())
        }

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        half = self.file.read_array(name, shape, "<u2")
        return torch.from_numpy(half.view(np.int16)).view(torch.bfloat16).float()

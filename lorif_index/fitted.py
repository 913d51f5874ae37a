"""Fitted curvature on disk: written once, loaded a layer at a time when a search first needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .curvature import LayerCurvature
from .errors import CorruptionError
from .gradients import LayerSpec
from .sealed import SealedFile, SealedInfo, write_sealed

FILE = "curvature.h5"


def save_curvature(folder: Path, fitted: Mapping[str, LayerCurvature]) -> tuple[SealedInfo, list[dict[str, Any]]]:
    """Writes `basis_<i>` (D, r) float32 and `spectrum_<i>` (m,) float64 for layer number i.

    Returns:
        the sealed file, and per layer what the manifest keeps: rank, spectrum length, trace, rows, examples.
    """
    arrays: dict[str, np.ndarray] = {}
    facts = []
    for i, layer in enumerate(fitted.values()):
        arrays[f"basis_{i}"] = layer.basis.numpy()
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
    return write_sealed(folder, FILE, arrays, {}), facts


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
        self._facts = dict(zip(specs, facts, strict=True))
        self._numbers = {name: i for i, name in enumerate(specs)}
        self._loaded: dict[str, LayerCurvature] = {}
        self._checked = False
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
        facts, number = self._facts[name], self._numbers[name]
        if not self._checked:
            self.file.verify()
            self._checked = True
        try:
            rank, length = int(facts["rank"]), int(facts["spectrum"])
            trace, rows, examples = float(facts["trace"]), int(facts["rows"]), float(facts["examples"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"the manifest's curvature entry of layer {name!r} is damaged ({error!r})") from None
        basis = self.file.read_array(f"basis_{number}", (self._specs[name].dim, rank), "<f4")
        spectrum = self.file.read_array(f"spectrum_{number}", (length,), "<f8")
        return LayerCurvature(torch.from_numpy(basis), torch.from_numpy(spectrum), trace, rows, examples)

"""Manifest: the one JSON file that makes a folder an index; it names every other file, and is replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CorruptionError, FingerprintError, FormatVersionError, NotAnIndexError
from .gradients import LayerSpec
from .sealed import SealedInfo, sync_folder
from .shards import ShardInfo

FORMAT = "lorif-index"
FORMAT_VERSION = 4
# Version 1 had factors alone, and no coarse stage; until version 2 projections were random and curvature empirical;
# until version 3 there were no eigencodes.
READABLE = (1, 2, 3, 4)
_BEFORE_3 = {"projection": "random", "curvature": "empirical"}
MANIFEST = "manifest.json"
BUILDING = "building.json"
_LARGEST = 256 << 20


@dataclass
class Manifest:
    """An index, finished or being built.

    Attributes:
        fingerprint: field -> value, of everything a score depends on: format, config, layers, model, loss, data.
        config: the `BuildConfig` as JSON.
        layers: the tracked layers.
        shards: sealed shards, in order of their ids.
        projections: the learnt projections' file and sides (see `fitted.save_projections`), or None.
        curvature: the curvature's file, or None while it is not fitted.
        curvature_layers: per layer, in the layers' order: rank, spectrum length, trace, rows, examples.
        stored: what rows hold: "eigen", "both", "factors", "coordinates" or "coarse"; None while that is not decided.
        eigen: the eigencodes' file and facts (see `fitted.save_eigencode`), or None.
        sketch: the sketch's file and facts (see `fitted.save_sketch`), or None.
        coarse: the coarse index's file, factory and fingerprint, or None.
        queries: the file of calibration queries and sampled coordinates, or None.
        calibration: what was learnt from them (see `calibration.Calibration`), or None.
        skipped: ids of examples left out for inf or NaN.
        report: seconds by stage and other facts of the build.
        metadata: the user's own.
    """

    fingerprint: dict[str, Any]
    config: dict[str, Any]
    layers: list[LayerSpec]
    shards: list[ShardInfo] = field(default_factory=list)
    projections: dict[str, Any] | None = None
    curvature: SealedInfo | None = None
    curvature_layers: list[dict[str, Any]] = field(default_factory=list)
    stored: str | None = None
    eigen: dict[str, Any] | None = None
    sketch: dict[str, Any] | None = None
    coarse: dict[str, Any] | None = None
    queries: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    skipped: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def side_files(self) -> list[dict[str, Any]]:
        """The entries that name a file by `file`: projections, eigencodes, sketch, coarse index, queries."""
        return [e for e in (self.projections, self.eigen, self.sketch, self.coarse, self.queries) if e is not None]

    def digest(self) -> str:
        """SHA-256, in hex, over the fingerprint's fields and the digests of all files: names this exact index."""
        files = [s.sealed.digest for s in self.shards]
        files.append(self.curvature.digest if self.curvature else "")
        if self.projections is not None:
            files.append(self.projections["file"]["digest"])
        if self.eigen is not None:
            files.append(self.eigen["file"]["digest"])
        if self.sketch is not None:
            files.append(self.sketch["file"]["digest"])
        if self.stored == "coarse" and self.coarse is not None:
            files.append(self.coarse["file"]["digest"])
        return hashlib.sha256(_canonical([self.fingerprint, files]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "config": self.config,
            "layers": [spec_to_json(spec) for spec in self.layers],
            "shards": [shard.to_json() for shard in self.shards],
            "projections": self.projections,
            "curvature": self.curvature.to_json() if self.curvature else None,
            "curvature_layers": self.curvature_layers,
            "stored": self.stored,
            "eigen": self.eigen,
            "sketch": self.sketch,
            "coarse": self.coarse,
            "queries": self.queries,
            "calibration": self.calibration,
            "skipped": self.skipped,
            "report": self.report,
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        return cls(
            fingerprint=data["fingerprint"],
            config=data["config"],
            layers=[LayerSpec(**{**spec, "uses": tuple(spec["uses"])}) for spec in data["layers"]],
            shards=[ShardInfo.from_json(shard) for shard in data["shards"]],
            projections=data.get("projections"),
            curvature=SealedInfo.from_json(data["curvature"]) if data["curvature"] is not None else None,
            curvature_layers=data["curvature_layers"],
            stored=data.get("stored", "factors"),
            eigen=data.get("eigen"),
            sketch=data.get("sketch"),
            coarse=data.get("coarse"),
            queries=data.get("queries"),
            calibration=data.get("calibration"),
            skipped=data["skipped"],
            report=data["report"],
            metadata=data["metadata"],
        )

    def write(self, folder: Path, name: str) -> None:
        """Replaces the file of that name, atomically and durably."""
        temporary = folder / f".{name}.part"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, indent=1, sort_keys=True, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
        sync_folder(folder)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        NotAnIndexError: there is none, or it is something else's.
        FormatVersionError: written in a version that is not read here.
        CorruptionError: not JSON, or fields that are missing or of the wrong form.
    """
    path = folder / name
    if not path.is_file():
        unfinished = (folder / BUILDING).is_file()
        remedy = (
            "its build was interrupted: run the same Index.build again" if unfinished else "build one with Index.build"
        )
        raise NotAnIndexError(f"{folder} has no {name}, so it is not an index: {remedy}")
    if path.stat().st_size > _LARGEST:
        raise CorruptionError(f"{path} has {path.stat().st_size} bytes, more than any manifest's {_LARGEST}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path} is not valid JSON ({error}): restore it from a copy") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise NotAnIndexError(f"{path} is not a {FORMAT} manifest: is {folder} the right folder?")
    version = data.get("format_version")
    if version not in READABLE:
        raise FormatVersionError(
            f"{folder} is in format version {version!r}, and this library reads versions {READABLE}: use the "
            "library version that wrote it, or build it again"
        )
    try:
        manifest = Manifest.from_json(data)
        if not all(
            isinstance(v, dict) for v in (manifest.fingerprint, manifest.config, manifest.report, manifest.metadata)
        ):
            raise TypeError("fingerprint, config, report and metadata must be objects")
        if version < 3:
            manifest.config = _BEFORE_3 | manifest.config
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path} lacks a field or has one of the wrong form ({error!r}): restore it") from None


def check_same(stored: dict[str, Any], given: dict[str, Any], what: str, remedy: str) -> None:
    """Compares fingerprints field by field.

    Raises:
        FingerprintError: they differ; the message names the fields with both values.
    """
    stored, given = json.loads(_canonical(stored)), json.loads(_canonical(given))
    different = sorted(k for k in stored.keys() | given.keys() if stored.get(k) != given.get(k))
    if different:
        lines = "; ".join(f"{k}: {_short(stored.get(k))} there, {_short(given.get(k))} here" for k in different)
        raise FingerprintError(f"{what} differs in {', '.join(different)} ({lines}): {remedy}")


def spec_to_json(spec: LayerSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "width_in": spec.width_in,
        "width_out": spec.width_out,
        "d_in": spec.d_in,
        "d_out": spec.d_out,
        "rank": spec.rank,
        "bias": spec.bias,
        "uses": list(spec.uses),
    }


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

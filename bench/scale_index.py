"""The indexes of the scale benchmarks: built once at c = 4 and the full size, smaller ones derived by truncation.

Factors keep their pairs in falling order and windows are shuffled, so that fewer pairs and the first n rows are what a
build of that size with the same fitted curvature and sketch would have stored.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from bench.scale_data import FOLDER, gradients
from lorif_index import BuildConfig, Index
from lorif_index.capture.gradients import LayerSpec
from lorif_index.rows.layout import RowLayout
from lorif_index.storage.manifest import read_manifest, spec_to_json
from lorif_index.storage.store import StoreWriter

FULL_RANK = 4


Settings = dict[str, Any]


def full_index(
    count: int, steps: int, folder: Path = FOLDER, most: int | None = None, settings: Settings | None = None
) -> Index:
    """The c = 4 index of `count` training windows, with coordinates and coarse index."""
    made = {"rank": FULL_RANK, "store": "both"} | (settings or {})
    return _index(f"index-c{FULL_RANK}-n{count}", made, count, steps, folder, most)


def eigen_index(
    count: int, steps: int, folder: Path = FOLDER, most: int | None = None, settings: Settings | None = None
) -> Index:
    """The index of eigencodes of the first `count` training windows, as the default or another code builds it."""
    made = {"store": "eigen"} | (settings or {})
    return _index(f"index-{made.get('eigen_code', 'levels')}-n{count}", made, count, steps, folder, most)


def _index(name: str, settings: Settings, count: int, steps: int, folder: Path, most: int | None) -> Index:
    """An index that is built once, and kept."""
    path = folder / name
    if not (path / "manifest.json").exists():
        data = gradients("train", count, steps, folder, most)
        Index.build(path, gradients=data, config=BuildConfig(**settings), progress=False)
    return Index.open(path)


def commit_cut(whole: Index, path: Path, specs: dict[str, LayerSpec], writer: StoreWriter, **fingerprint: Any) -> None:
    """Makes a folder with a writer's shards and an index's fitted files an index of layers of another rank."""
    layers = [spec_to_json(spec) for spec in specs.values()]
    manifest = read_manifest(whole.path)
    dataclasses.replace(
        manifest,
        shards=writer.sealed,
        coarse=None,
        calibration=None,
        layers=list(specs.values()),
        config=manifest.config | {"rank": next(iter(specs.values())).rank},
        fingerprint=manifest.fingerprint | {"layers": layers} | fingerprint,
    ).commit(path)


def derived(whole: Index, rank: int, count: int) -> Index:
    """The index of the first `count` rows at rank c, with a coarse index and a calibration of its own."""
    if (rank, count) == (FULL_RANK, len(whole)):
        return whole
    path = whole.path.parent / f"index-c{rank}-n{count}"
    if not (path / "manifest.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        specs = {name: dataclasses.replace(spec, rank=rank) for name, spec in whole.specs.items()}
        layout = RowLayout(specs, whole.config.dtype, codes=whole._layout.codes)
        writer = StoreWriter(path, layout, whole.config.shard_bytes, [])
        for start, rows in whole._store.stream():
            rows = rows[: count - start]
            parts = whole._layout.unpack(rows)
            kept = {n: type(p)(p.left[:, :rank], p.right[:, :rank]) for n, p in parts.items() if p.right is not None}
            factors = layout.pack(kept).to(layout.torch_dtype)
            writer.append(layout.rows(factors, rows.codes), whole.ids[start : start + len(rows)])
            if start + len(rows) >= count:
                break
        writer.flush()
        for name in ("curvature.h5", "sketch.h5", "calibration.h5"):
            shutil.copy(whole.path / name, path / name)
        commit_cut(whole, path, specs, writer, examples=count)
        Index.open(path).rebuild_coarse(progress=False)
    return Index.open(path)

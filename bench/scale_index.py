"""The indexes of the scale benchmarks: built once at the full size, smaller ones derived by truncation.

Factors keep their pairs in falling order and windows are shuffled, so that fewer pairs and the first n rows are what a
build of that size with the same fitted curvature and sketch would have stored.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorif_index.codecs.layout import RowLayout, Rows

from bench.scale_data import FOLDER, gradients, trained_model, windows
from lorif_index import BuildConfig, Index
from lorif_index.capture.gradients import LayerSpec
from lorif_index.storage.manifest import read_manifest, spec_to_json
from lorif_index.storage.store import StoreWriter

FULL_RANK = 4


Settings = dict[str, Any]


def full_index(
    count: int, steps: int, folder: Path = FOLDER, most: int | None = None, settings: Settings | None = None
) -> Index:
    """The c = 4 index of `count` training windows, with coordinates and coarse index."""
    path = folder / f"index-c{FULL_RANK}-n{count}"
    if not (path / "manifest.json").exists():
        config = BuildConfig(**({"rank": FULL_RANK, "store": "both"} | (settings or {})))
        Index.build(path, gradients=gradients("train", count, steps, folder, most), config=config, progress=False)
    return Index.open(path)


def eigen_index(
    count: int, steps: int, folder: Path = FOLDER, most: int | None = None, settings: Settings | None = None
) -> Index:
    """The index of eigencodes of the first `count` training windows, as the default or another code builds it of the
    model itself: its projections are wider than those of the kept gradients."""
    made = {"store": "eigen"} | (settings or {})
    path = folder / f"index-{made.get('eigen_code', 'levels')}-n{count}"
    if not (path / "manifest.json").exists():
        data = {"input_ids": torch.from_numpy(windows("train", folder, most)[:count].astype(np.int64))}
        model = trained_model(steps, folder, most)
        Index.build(path, model=model, data=data, config=BuildConfig(**made), progress=False)
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
    specs = {name: dataclasses.replace(spec, rank=rank) for name, spec in whole.specs.items()}
    layout = RowLayout(specs, whole.config.dtype, codes=whole._reader.layout.codes)

    def cut(rows: Rows) -> Rows:
        parts = whole._reader.layout.unpack(rows)
        kept = {n: type(p)(p.left[:, :rank], p.right[:, :rank]) for n, p in parts.items() if p.right is not None}
        return layout.rows(layout.pack(kept).to(layout.torch_dtype), rows.codes)

    return _first(whole, whole.path.parent / f"index-c{rank}-n{count}", specs, layout, count, cut)


def shorter(whole: Index, count: int) -> Index:
    """The index of the first `count` rows as they are, with a coarse index and a calibration of its own."""
    if count == len(whole):
        return whole
    path = whole.path.parent / f"{whole.path.name}-first-{count}"
    return _first(whole, path, whole.specs, whole._reader.layout, count, lambda rows: rows)


def _first(
    whole: Index,
    path: Path,
    specs: dict[str, LayerSpec],
    layout: RowLayout,
    count: int,
    cut: Callable[[Rows], Rows],
) -> Index:
    """An index of what is cut of each of the first `count` rows, that is made once, and kept."""
    if not (path / "manifest.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        writer = StoreWriter(path, layout, whole.config.shard_bytes, [])
        for start, rows in whole._reader.store.stream():
            rows = rows[: count - start]
            writer.append(cut(rows), whole.ids[start : start + len(rows)])
            if start + len(rows) >= count:
                break
        writer.flush()
        for file in whole.path.glob("*.h5"):
            if not file.name.startswith("shard"):
                shutil.copy(file, path / file.name)
        commit_cut(whole, path, specs, writer, examples=count)
        Index.open(path).rebuild_coarse(progress=False)
    return Index.open(path)

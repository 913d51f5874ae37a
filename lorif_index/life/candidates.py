"""Candidates of an index that is changed: codes follow the rows; what is lacking is made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..build.candidates import Making, make_candidates, save_codes, wants_coarse
from ..config import BuildConfig
from ..errors import ConfigError
from ..progress import Reporter
from ..search.coarse import load_faiss
from ..search.reader import Reader, codec_of, config_of, curvature_of
from ..search.rows import IndexRows
from ..storage.fitted import load_removed
from ..storage.manifest import Manifest


def renew_candidates(
    folder: Path, manifest: Manifest, report: Reporter, *, extra: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Makes what is absent of sketch, queries, coarse index and calibration, into a manifest that is not committed.

    Args:
        folder: of the index; the writer's lock is held.
        manifest: of its next version.
        report: is told.
        extra: layer -> gradients of further queries to calibrate with, or None.
    """
    config, curvature = config_of(manifest), curvature_of(folder, manifest)
    rows = rows_of(folder, manifest, config)

    def publish(name: str, save: Any) -> None:
        manifest.fits[name] = save(manifest.new_name(name))

    making = Making(
        folder,
        manifest,
        config,
        curvature,
        rows,
        publish,
        report.stage,
        extra=extra,
        name=lambda: manifest.new_name("coarse"),
    )
    try:
        make_candidates(making)
    finally:
        rows.close()
        curvature.file.close()


def rows_of(folder: Path, manifest: Manifest, config: BuildConfig) -> IndexRows:
    """The rows of a version that is not committed yet."""
    removed = None if manifest.removed is None else load_removed(folder, manifest.removed)
    codec = codec_of(folder, manifest, curvature_of(folder, manifest))
    return IndexRows(folder, manifest, codec, seed=config.seed, removed=removed)


def rebuild_coarse(reader: Reader, kind: str, extra: Mapping[str, torch.Tensor] | None, report: Reporter) -> Manifest:
    """A coarse index made anew, calibrated, and committed.

    Args:
        reader: of the newest version; the writer's lock is held.
        kind: of `CoarseIndex`: "auto", "pq" or "flat".
        extra: layer -> gradients of further queries to calibrate with, or None.
        report: is told.

    Raises:
        ConfigError: no such kind, or faiss is not installed.
    """
    if kind not in ("auto", "pq", "flat"):
        raise ConfigError(f"kind={kind!r} makes no coarse index: pass 'auto', 'pq' or 'flat'")
    load_faiss()
    manifest = reader.manifest.copy()
    manifest.coarse = manifest.calibration = None
    manifest.config = manifest.config | {"coarse": manifest.config["coarse"] | {"kind": kind}}
    renew_candidates(reader.folder, manifest, report, extra=extra)
    manifest.commit(reader.folder)
    return manifest


def make_wanted(folder: Path, manifest: Manifest, report: Reporter) -> None:
    """The first coarse index of a manifest's rows, where these have become so many that its config wants one."""
    removed = 0 if manifest.removed is None else int(manifest.removed["count"])
    living = sum(shard.rows for shard in manifest.shards) - removed
    if manifest.coarse is None and wants_coarse(config_of(manifest), living):
        renew_candidates(folder, manifest, report)


def grow_codes(reader: Reader, manifest: Manifest, report: Reporter) -> None:
    """The codes of an index, with those of the rows that a manifest has beyond the reader's; or its first, where these
    rows make it large enough."""
    codes, sketch = reader.codes(), reader.sketch
    if codes is None or sketch is None:
        make_wanted(reader.folder, manifest, report)
        return
    rows = rows_of(reader.folder, manifest, reader.config)
    parts = [codes.rows]
    try:
        with report.stage("coarse", len(rows.store) - len(reader.store)) as stage:
            for z in rows.coordinates(sketch, len(reader.store)):
                parts.append(codes.encode(z.numpy()))
                stage.advance(len(z))
    finally:
        rows.close()
    keep_codes(reader, manifest, np.concatenate(parts))


def keep_codes(reader: Reader, manifest: Manifest, rows: np.ndarray | None = None) -> None:
    """The reader's codes, or others by its codebooks, as those of a manifest's rows."""
    codes = reader.codes()
    if codes is not None:
        kept = codes if rows is None else codes.with_rows(rows)
        manifest.coarse = save_codes(reader.folder, manifest.new_name("coarse"), manifest, kept)

"""Merging: indexes of one fit become one, without a gradient being computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..build.state import check_free, take_fit
from ..errors import ConfigError
from ..progress import Reporter
from ..storage.fitted import load_removed, save_removed
from ..storage.locks import WriterLock
from ..storage.manifest import BUILDING, Manifest, check_same, collect, open_version
from ..storage.sealed import copy_sealed
from .candidates import make_wanted, renew_candidates


def merge_indexes(path: Path, parts: Sequence[Path], report: Reporter) -> list[int]:
    """Copies the rows of several indexes into a new one.

    Args:
        path: a folder that does not exist or is empty.
        parts: the indexes, in the order in which their rows are to follow each other; all of one fit.
        report: is told.

    Returns:
        for each part what was added to its ids: nothing to those of the folders of one build over several ranks, whose
        ids are in the whole.

    Raises:
        ConfigError: fewer than two parts. FingerprintError: another fit; the
        message names what differs. IndexExistsError: the folder is not free.
    """
    if len(parts) < 2:
        raise ConfigError(f"merge takes at least two indexes, got {len(parts)}")
    check_free(path)
    opened = [open_version(part) for part in parts]
    try:
        manifests = [manifest for manifest, _ in opened]
        first = manifests[0]
        for part, other in zip(parts[1:], manifests[1:], strict=True):
            check_same(
                _fit(first),
                _fit(other),
                f"the fit of {parts[0]} and {part}",
                "merge indexes that were built with the same fit=",
            )
        if any(manifest.part is not None for manifest in manifests):
            _check_parts(parts, manifests)
        with WriterLock(path):
            return _write(path, parts, manifests, report)
    finally:
        for _, lease in opened:
            lease.release()


def _fit(manifest: Manifest) -> dict[str, Any]:
    """What two indexes must have in common for their rows to lie in one."""
    fields = ("model", "members", "loss", "autocast", "projection", "layers")
    fits = {}
    for name in ("projections", "curvature", "codec"):
        entry = manifest.fits.get(name)
        fits[name] = entry | {"file": entry["file"]["digest"]} if entry is not None and "file" in entry else entry
    return {key: manifest.fingerprint.get(key) for key in fields} | fits | {"rows": manifest.codec}


def _check_parts(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Folders of one build: all of them, once.

    Raises:
        ConfigError: some are missing, twice there, or of another build.
    """
    parts = [manifest.part or {} for manifest in manifests]
    numbers, of = sorted(part.get("number", -1) for part in parts), max(part.get("of", 0) for part in parts)
    if len({part.get("build") for part in parts}) > 1 or numbers != list(range(of)):
        raise ConfigError(
            f"among {[str(folder) for folder in folders]} is one of {of} folders of one build, whose ids are in the "
            f"whole: merge all of them and nothing else (given were numbers {numbers})"
        )


def _write(path: Path, parts: Sequence[Path], manifests: Sequence[Manifest], report: Reporter) -> list[int]:
    first = manifests[0]
    merged = Manifest(
        first.fingerprint | {"data": [m.fingerprint.get("data") for m in manifests], "examples": 0},
        first.config,
        first.layers,
        report=first.report,
        metadata=first.metadata,
    )
    whole = first.part is not None
    if whole:
        merged.fingerprint = dict(first.fingerprint)
    # An empty index being built: a merge that is interrupted leaves what the next one clears away.
    Manifest({}, {}, []).write(path, BUILDING)
    collect(path)
    take_fit(parts[0], merged, path)
    shifts, removed = [], []
    with report.stage("merge", sum(shard.rows for m in manifests for shard in m.shards)) as stage:
        for part, manifest in zip(parts, manifests, strict=True):
            shifts.append(0 if whole else merged.next_id)
            for shard in manifest.shards:
                sealed = copy_sealed(part, shard.sealed, path, merged.new_name("shard"))
                merged.shards.append(
                    dataclasses.replace(
                        shard,
                        sealed=sealed,
                        first_id=shard.first_id + shifts[-1],
                        last_id=shard.last_id + shifts[-1],
                        shift=shard.shift + shifts[-1],
                    )
                )
                stage.advance(shard.rows, sealed.size)
            merged.skipped += [i + shifts[-1] for i in manifest.skipped]
            if manifest.removed is not None:
                removed.append(load_removed(part, manifest.removed) + shifts[-1])
            merged.next_id = first.next_id if whole else merged.next_id + manifest.next_id
    merged.shards.sort(key=lambda shard: shard.first_id)
    merged.skipped = sorted(set(merged.skipped))
    # Of the first part alone it is known whether its examples were fitted on.
    merged.fitted_ids = first.fitted_ids
    merged.fingerprint["examples"] = merged.next_id
    if removed:
        merged.removed = save_removed(path, merged.new_name("removed"), np.concatenate(removed))
    if any(manifest.coarse is not None for manifest in manifests):
        renew_candidates(path, merged, report)
    else:
        make_wanted(path, merged, report)
    merged.commit(path)
    (path / BUILDING).unlink(missing_ok=True)
    return shifts

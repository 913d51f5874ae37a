"""Resuming: what an interrupted build, or another index, has already fitted and sealed."""

from __future__ import annotations

from pathlib import Path

from ..config import BuildConfig
from ..errors import CorruptionError
from ..storage.manifest import BUILDING, BUILDING_RANKS, Manifest, check_same, read_manifest
from ..storage.sealed import SealedInfo, copy_sealed

FITTED = ("projections", "curvature", "curvature_layers", "stored", "eigen", "sketch", "queries", "report")
"""A manifest's fields that all rows share, and that are kept when a build goes on."""


def unfinished(folder: Path, fresh: Manifest, *, keep_coarse: bool) -> Manifest | None:
    """The unfinished index in a folder, with what all ranks had sealed there; None where nothing is known of it.

    Args:
        folder: whose writer's lock is held.
        fresh: the manifest of the build that wants to go on.
        keep_coarse: whether a coarse index that is there may stay.

    Raises:
        FingerprintError: it is of something else.
    """
    found = read_manifest(folder, BUILDING)
    if not found.fingerprint:
        return None
    check_same(
        found.fingerprint,
        fresh.fingerprint,
        f"the interrupted build in {folder}",
        "finish it with what it was begun with, or delete the folder to begin anew",
    )
    for path in sorted(folder.glob(BUILDING_RANKS)):
        other = read_manifest(folder, path.name)
        if all(getattr(other, field) == getattr(found, field) for field in FITTED):
            found.shards += [shard for shard in other.shards if shard not in found.shards]
            found.skipped = sorted({*found.skipped, *other.skipped})
        found.next_file = max(found.next_file, other.next_file)
    found.shards.sort(key=lambda shard: shard.first_id)
    if found.config.get("calibration_queries") != fresh.config["calibration_queries"]:
        found.queries = None
    same = found.config.get("coarse") == fresh.config["coarse"] or found.stored == "coarse"
    if found.stored == "coarse" and found.coarse is not None and not keep_coarse:
        # Rows were only in the coarse index that cannot be kept: their examples are encoded anew.
        found.shards, found.skipped = [], []
    if not (keep_coarse and same):
        found.coarse = None
    if found.coarse is None or found.queries is None:
        found.calibration = None
    return found


def take_fit(folder: Path, manifest: Manifest, into: Path) -> None:
    """Copies what another index was fitted with: projections, curvature, eigencodes, and the sketch where rows need it.

    Args:
        folder: the other index.
        manifest: of the index that takes it; its layers, config and model must be the same.
        into: its folder.

    Raises:
        FingerprintError: another model, loss, or config, but for settings that change no stored number.
    """
    other = read_manifest(folder)
    keys = ("model", "members", "loss", "autocast", "projection", "layers", "config")
    mine = {k: manifest.fingerprint[k] for k in keys if k in manifest.fingerprint}
    theirs = {k: other.fingerprint[k] for k in keys if k in other.fingerprint}
    # A setting that came later has its default there, as when that index is opened.
    theirs["config"] = {k: v for k, v in BuildConfig().to_json().items() if k in mine["config"]} | theirs["config"]
    check_same(
        theirs,
        mine,
        f"the index {folder}, whose fit was to be taken,",
        "build with the same model, loss and config (leave config out to take that index's)",
    )
    if other.curvature is None:
        raise CorruptionError(f"{folder} has no curvature in its manifest: restore it from a copy")
    # Names of both indexes are never given again.
    manifest.next_file = max(manifest.next_file, other.next_file)
    manifest.curvature = copy_sealed(folder, other.curvature, into, other.curvature.file)
    manifest.curvature_layers, manifest.stored = other.curvature_layers, other.stored
    for field in ("projections", "eigen", *(("sketch",) if other.stored in ("both", "coordinates", "coarse") else ())):
        entry = getattr(other, field)
        if entry is not None:
            info = SealedInfo.from_json(entry["file"])
            setattr(manifest, field, entry | {"file": copy_sealed(folder, info, into, info.file).to_json()})

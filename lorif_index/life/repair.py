"""Repair: what damage takes away is dropped or made again, and nothing is thrown away.

Damaged shards leave the index, under another name in the same folder; what can be fitted on the rows that are left is
fitted on them. What nothing can be made from is said.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..codecs.registry import codec_class
from ..errors import CorruptionError, StoreError
from ..progress import Reporter
from ..search.coarse import faiss_is_installed
from ..search.reader import config_of
from ..storage.damage import Damage, damage_message, find_damage
from ..storage.locks import WriterLock
from ..storage.manifest import Manifest, collect, read_manifest
from .candidates import renew_candidates, rows_of
from .refit import renew_curvature

_ASIDE = "damaged-"


def repair_index(folder: Path, report: Reporter) -> dict[str, Any]:
    """Mends an index, and commits.

    Returns:
        {"dropped": [{"file", "rows", "first_id", "last_id"}], "rebuilt": names of what was made again}.

    Raises:
        CorruptionError: damage that nothing stored can make good; the index is left as it is. StoreError: a part of an
        index in several folders. NotAnIndexError, LockedError: as everywhere.
    """
    with WriterLock(folder):
        collect(folder)
        manifest = read_manifest(folder)
        found = find_damage(folder, manifest)
        if not found:
            return {"dropped": [], "rebuilt": []}
        if manifest.part is not None:
            raise StoreError(
                f"{folder} is a part of an index in {manifest.part['of']} folders, and is not changed by itself: "
                f"restore {sorted({damage.file for damage in found})} from a copy, or build anew"
            )
        _check_mendable(folder, manifest, found)
        names = {damage.file for damage in found}
        for name in sorted(names):
            # Before the manifest forgets it: what is not named may be cleared away, but not under this name.
            if (folder / name).exists():
                (folder / name).rename(folder / f"{_ASIDE}{name}.kept")
        dropped = [damage for damage in found if damage.rows]
        fresh = manifest.copy()
        fresh.shards = [shard for shard in manifest.shards if shard.sealed.file not in names]
        fresh.report = manifest.report | {
            "repaired": [*manifest.report.get("repaired", []), *(dataclasses.asdict(damage) for damage in dropped)]
        }
        rebuilt = _renew(folder, fresh, names, bool(dropped), report)
        collect(folder)
    keys = ("file", "rows", "first_id", "last_id")
    return {"dropped": [{key: getattr(damage, key) for key in keys} for damage in dropped], "rebuilt": rebuilt}


def _check_mendable(folder: Path, manifest: Manifest, found: list[Damage]) -> None:
    """Whether everything damaged can be dropped or made again.

    Raises:
        CorruptionError: it cannot; the message says what.
    """
    names, hopeless = {damage.file for damage in found}, []
    files, bound = manifest.files(), codec_class(str(manifest.codec)).depends_on
    for name, why in (
        ("projections", "the learnt projections cannot be fitted without the model"),
        ("curvature", "rows are written in the directions of the damaged curvature" if "curvature" in bound else ""),
        ("codec", "what rows mean is not told by them"),
        ("removed", "which examples were removed is not told by anything else"),
    ):
        if why and name in files and files[name].file in names:
            hopeless.append(why)
    if all(shard.sealed.file in names for shard in manifest.shards):
        hopeless.append("no shard is whole")
    if hopeless:
        raise CorruptionError(f"{damage_message(folder, found)}; repair cannot help: {'; '.join(hopeless)}")


def _renew(folder: Path, manifest: Manifest, names: set[str], dropped: bool, report: Reporter) -> list[str]:
    """Makes anew what is damaged, and what was made of rows that are gone; commits."""
    rebuilt, had_coarse = [], manifest.coarse is not None
    for name, info in manifest.files().items():
        if info.file in names:
            rebuilt.append(name)
            if name == "coarse":
                manifest.coarse = None
            elif name != "curvature":
                del manifest.fits[name]
    if "curvature" in rebuilt:
        rows = rows_of(folder, manifest, config_of(manifest))
        renew_curvature(rows, manifest, report)
        rows.close()
        manifest.fits.pop("sketch", None)
    if had_coarse and (dropped or "sketch" not in manifest.fits):
        manifest.coarse = None
        rebuilt += [] if "coarse" in rebuilt or "curvature" in rebuilt else ["coarse"]
    if manifest.coarse is None or "queries" not in manifest.fits:
        manifest.calibration = None
    if had_coarse and manifest.calibration is None and faiss_is_installed():
        renew_candidates(folder, manifest, report)
    manifest.commit(folder)
    return rebuilt

"""Repair: what damage takes away is dropped or made again, and nothing is thrown away.

Damaged shards leave the index, under another name in the same folder; what can be fitted on the rows that are left is
fitted on them. What nothing can be made from is said.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..build.coarse_build import rebuild
from ..errors import CorruptionError, StoreError
from ..progress import Reporter
from ..search.coarse import faiss_is_installed
from ..search.reader import Reader
from ..storage.damage import Damage, damage_message, find_damage
from ..storage.locks import WriterLock
from ..storage.manifest import Manifest, collect, read_manifest
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
        fresh = dataclasses.replace(
            manifest, shards=[shard for shard in manifest.shards if shard.sealed.file not in names]
        )
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
    names = {damage.file for damage in found}
    hopeless = []
    if manifest.stored == "coarse":
        hopeless.append("the coarse code is all that is stored of the rows")
    if manifest.curvature is not None and manifest.curvature.file in names and manifest.stored != "factors":
        hopeless.append("rows are written in the directions of the damaged curvature")
    for entry, why in (
        (manifest.projections, "the learnt projections cannot be fitted without the model"),
        (manifest.eigen, "what eigencodes mean is not told by them"),
        (manifest.sketch if manifest.stored in ("both", "coordinates") else None, "coordinates hang on their sketch"),
        (manifest.removed, "which examples were removed is not told by anything else"),
    ):
        if entry is not None and entry["file"]["file"] in names:
            hopeless.append(why)
    if all(shard.sealed.file in names for shard in manifest.shards):
        hopeless.append("no shard is whole")
    if hopeless:
        raise CorruptionError(f"{damage_message(folder, found)}; repair cannot help: {'; '.join(hopeless)}")


def _renew(folder: Path, manifest: Manifest, names: set[str], dropped: bool, report: Reporter) -> list[str]:
    """Makes anew what is damaged, and what was made of rows that are gone; commits."""
    rebuilt = []
    had_coarse = manifest.coarse is not None
    if manifest.curvature is not None and manifest.curvature.file in names:
        fitted = dataclasses.replace(manifest, coarse=None, sketch=None, calibration=None)
        reader = Reader(folder, fitted)
        renew_curvature(reader, fitted, report)
        reader.close()
        manifest = fitted
        rebuilt.append("curvature")
    for field in ("sketch", "queries", "coarse"):
        entry = getattr(manifest, field)
        if entry is not None and entry["file"]["file"] in names:
            setattr(manifest, field, None)
            rebuilt.append(field)
    if dropped and had_coarse and "coarse" not in rebuilt:
        rebuilt.append("coarse")
    if dropped or set(rebuilt) & {"sketch", "coarse", "curvature"}:
        manifest.coarse = None
    if had_coarse and manifest.coarse is None and faiss_is_installed():
        reader = Reader(folder, manifest)
        rebuild(reader, str(manifest.config.get("coarse") or "auto"), report)
        reader.close()
    else:
        manifest.commit(folder)
    return rebuilt

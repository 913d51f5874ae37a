"""Damage: which files of an index are not as they were sealed, and what of it can be mended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptionError
from .manifest import Manifest
from .sealed import SealedFile, SealedInfo


@dataclass(frozen=True)
class Damage:
    """One file that is not as it was sealed.

    Attributes:
        file: its name.
        reason: what is wrong.
        rows: examples in it; 0 for a file of no examples.
        first_id, last_id: of them; -1 for a file of no examples.
    """

    file: str
    reason: str
    rows: int = 0
    first_id: int = -1
    last_id: int = -1


def find_damage(folder: Path, manifest: Manifest) -> list[Damage]:
    """Compares every file with its digest."""
    infos = manifest.files().values()
    others = [Damage(info.file, reason) for info in infos if (reason := _reason(folder, info)) is not None]
    return damaged_shards(folder, manifest) + others


def damaged_shards(folder: Path, manifest: Manifest) -> list[Damage]:
    """The shards that are not as they were sealed."""
    return [
        Damage(shard.sealed.file, reason, shard.rows, shard.first_id, shard.last_id)
        for shard in manifest.shards
        if (reason := _reason(folder, shard.sealed)) is not None
    ]


def damage_message(folder: Path, found: Sequence[Damage]) -> str:
    """An error's text: every file, its examples, and what to do."""
    parts = []
    for damage in found:
        where = f" (examples {damage.first_id} to {damage.last_id}, {damage.rows} of them)" if damage.rows else ""
        parts.append(f"{damage.reason}{where}")
    return f"{len(found)} files of {folder} are damaged: {'; '.join(parts)}: restore them from a copy, or lorif repair"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(item.stat().st_size for item in os.scandir(folder) if item.is_file(follow_symlinks=False))


def _reason(folder: Path, info: SealedInfo) -> str | None:
    with closing(SealedFile(folder, info)) as file:
        try:
            file.verify()
        except CorruptionError as error:
            # Without what that error advises for one file.
            return str(error).partition(": restore")[0]
    return None

"""Snapshot: one version of an index, opened to be read. It never changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config import BuildConfig
from .errors import ConfigError
from .linalg.projection import Projections
from .linalg.scratch import CPU
from .ranks import ALONE, Ranks
from .search.normalise import RowScales
from .search.reader import Reader
from .storage.damage import damaged_shards
from .storage.locks import Lease
from .storage.manifest import Manifest, open_version
from .storage.store import VERIFY


@dataclass(frozen=True)
class Access:
    """How an index is opened, whichever version of it.

    Attributes:
        device: where rows are scored.
        verify: when a shard that is scanned is compared with its digest (`storage.store.VERIFY`).
        damaged: "refuse", or "skip": shards found damaged at opening are left out.
        ranks: who read it together.

    Raises:
        ConfigError: no such way to verify, or to treat damage.
    """

    device: torch.device = CPU
    verify: str = "first"
    damaged: str = "refuse"
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ConfigError(f"verify must be one of {VERIFY}, got {self.verify!r}")
        if self.damaged not in ("refuse", "skip"):
            raise ConfigError(f"damaged must be 'refuse' or 'skip', got {self.damaged!r}")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One version. Whoever answers takes it once, at the start, and reads nothing else.

    Attributes:
        path: the index's folder.
        access: how it was opened.
        reader: its parts.
        projections: that gradients are taken in: one set for an index's whole life.
        scales: for normalised scores.
    """

    path: Path
    access: Access
    reader: Reader
    projections: Projections
    scales: RowScales

    @classmethod
    def open(cls, path: Path, access: Access) -> Snapshot:
        """The newest version.

        Raises:
            NotAnIndexError, FormatVersionError, CorruptionError: the folder.
        """
        reader = _read(path, access, *open_version(path))
        projections = Projections(reader.specs, reader.config.seed, reader.projections)
        return cls(path, access, reader, projections, RowScales(reader))

    def newest(self) -> Snapshot:
        """The newest version, opened likewise: this one where there is none newer. Several ranks ask at the same time.

        Raises:
            As `open`.
        """
        manifest, lease = open_version(self.path)
        changed = manifest.generation != self.manifest.generation
        if not any(self.reader.ranks.gather_values(changed)):
            lease.release()
            return self
        # Nothing of this version is closed: other threads may be searching it, and it goes when the last has done.
        reader = _read(self.path, self.access, manifest, lease)
        return Snapshot(self.path, self.access, reader, self.projections, RowScales(reader))

    @property
    def manifest(self) -> Manifest:
        """What the folder says that this version is."""
        return self.reader.manifest

    def query_config(self) -> BuildConfig:
        """The build's config, for taking gradients of questions wherever the model is now."""
        config = self.reader.config
        compute = replace(config.compute, device=None)
        return replace(config, compute=compute, projection_floor=self.manifest.floor())


def _read(path: Path, access: Access, manifest: Manifest, lease: Lease) -> Reader:
    """The parts of a version, and hold of its files."""
    damaged = [one.file for one in damaged_shards(path, manifest)] if access.damaged == "skip" else []
    return Reader(
        path,
        manifest,
        device=access.device,
        verify=access.verify,
        damaged=damaged,
        lease=lease,
        ranks=access.ranks,
    )

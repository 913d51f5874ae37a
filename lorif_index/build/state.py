"""State: how far a build is, in its folders. What an interrupted run left is found; what is done is written down.

Over several ranks rank 0 seals what was fitted, and the leader of each folder writes what is found there. An
interrupted build goes on with any number of ranks: what is not sealed is shared anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..capture.sharded import DataRanks
from ..capture.spool import remove_leftovers
from ..errors import IndexExistsError
from ..progress import Reporter, Stage
from ..ranks import Ranks, share
from ..storage.fitted import FittedCurvature
from ..storage.home import ARRIVING, Home
from ..storage.locks import WRITER, WriterLock
from ..storage.manifest import (
    BUILDING,
    BUILDING_RANKS,
    MANIFEST,
    Manifest,
    building_name,
    check_same,
    collect,
    read_manifest,
)
from ..storage.sealed import SealedInfo, copy_sealed, part_name
from ..storage.shards import ShardInfo
from .spans import without_overlaps

T = TypeVar("T")

_COMMON = ("codec", "fits", "layers", "report")
"""A manifest's fields that are the same in all folders, and that are kept when a build goes on."""

Publish = Callable[[str, Callable[[str], dict[str, Any]]], None]
"""publish(name, save): seals what was fitted, by save(file name) -> entry, and names it in the manifest's fits."""


def check_free(path: Path) -> None:
    """The folder may hold an index that is being built, and nothing else.

    Raises:
        IndexExistsError: it does.
    """
    if (path / MANIFEST).exists() and not _partly_committed(path):
        raise IndexExistsError(f"{path} already holds an index: open it with Index.open, or choose another folder")
    if path.exists() and not path.is_dir():
        raise IndexExistsError(f"{path} exists and is not a folder: choose another path")
    # A build that ended before its first file had its name leaves these.
    begun = {WRITER, part_name(BUILDING)}
    others = (item.name for item in path.iterdir() if not item.name.startswith(ARRIVING)) if path.is_dir() else ()
    if not (path / BUILDING).is_file() and any(name not in begun for name in others):
        raise IndexExistsError(f"{path} is not empty and is no unfinished index: choose a new or empty folder")


class BuildState:
    """A build's manifest, and the folders it is written to.

    Args:
        path: of this rank's folder.
        ranks: who build together.
        data: which part of the examples is this rank's, and whether it speaks for the ranks that take the same.
        reporter: is told of stages.
        stack: gives up what is held.

    Attributes:
        manifest: of the build; set by `begin`.
    """

    manifest: Manifest

    def __init__(self, path: Path, ranks: Ranks, data: DataRanks, reporter: Reporter, stack: ExitStack) -> None:
        self.path, self.ranks, self.data, self.reporter, self.stack = path, ranks, data, reporter, stack
        self._home: Home | None = None
        self._lock = WriterLock(path)
        stack.callback(self._lock.release)
        if ranks.count(int((path / BUILDING).is_file())):
            # Another process may be at work in it.
            self.home  # noqa: B018

    @property
    def home(self) -> Home:
        """The folder, made and locked when it is first needed, by all ranks together."""
        if self._home is None:
            home = self._home = Home(self.path, self.ranks)
            with self.ranks.jointly():
                if home.leads:
                    self._lock.acquire()
                    if (self.path / BUILDING).is_file():
                        remove_leftovers(self.path)
        return self._home

    def claim(self) -> Path:
        """Makes the folder an unfinished build's, for a stream that must be kept there before anything is known."""
        if self.home.leads and not (self.path / BUILDING).exists():
            Manifest({}, {}, []).write(self.path, BUILDING)
        self.ranks.wait()
        return self.path

    # -- going on ------------------------------------------------------------------------------------------------

    def begin(self, fresh: Manifest, fit: Path | None) -> None:
        """Sets the manifest to work on: with what is already fitted, and on each folder's leader with what is sealed
        there, where a build of this very index was interrupted.

        Args:
            fresh: of the build, with nothing done.
            fit: an index whose fit is taken, or None.

        Raises:
            FingerprintError: the folder holds an unfinished build of something else.
        """
        home, ranks = self.home, self.ranks
        found: Manifest | None = None
        with ranks.jointly():
            if home.leads and (self.path / BUILDING).is_file():
                found = _unfinished(self.path, fresh, keep_coarse=home.folders == 1)
        steps = ranks.gather_values(-1 if found is None else len(found.fits) + (found.codec is not None))
        if max(steps) >= 0:
            # The folder where most is fitted tells the others, whose rows count if they were made with the same.
            self._adopt(fresh, found, steps.index(max(steps)))
        if found is not None and all(getattr(found, f) == getattr(fresh, f) for f in _COMMON):
            fresh.shards, fresh.skipped = found.shards, found.skipped
            fresh.coarse, fresh.calibration = found.coarse, found.calibration
        # The coarse index is of a folder: its leader's is that of all ranks there.
        fresh.coarse, fresh.calibration = ranks.gather_values([fresh.coarse, fresh.calibration])[home.leader]
        fresh.next_file = max(ranks.gather_values(fresh.next_file if found is None else found.next_file))
        if fit is not None and "curvature" not in fresh.fits:
            with ranks.jointly():
                if ranks.first:
                    take_fit(fit, fresh, self.path)
            self._adopt(fresh, fresh, 0)
        if fit is not None:
            # None of these examples was there when it was fitted.
            fresh.fitted_ids = 0
        fresh.shards = without_overlaps(ranks.gather_values([s.span for s in fresh.shards]), ranks.rank, fresh.shards)
        with ranks.jointly():
            if home.leads:
                # Of a part whose other folders were not committed: its rows and fits stay, what follows is made anew.
                (self.path / MANIFEST).unlink(missing_ok=True)
                fresh.write(self.path, BUILDING)
                for path in self.path.glob(BUILDING_RANKS):
                    path.unlink()
                # What an interrupted run left unsealed.
                collect(self.path)
        self.manifest = fresh

    def _adopt(self, fresh: Manifest, found: Manifest | None, source: int) -> None:
        """All ranks take what rank `source` has fitted, and their folders its files."""
        told = None
        if self.ranks.rank == source and found is not None:
            told = dataclasses.replace(found, shards=[], skipped=[], coarse=None, calibration=None).to_json()
        common = Manifest.from_json(self.ranks.told(told, source))
        there = set() if found is None else {(info.file, info.digest) for info in found.fitted()}
        for field in _COMMON:
            setattr(fresh, field, getattr(common, field))
        lacking = [i.file for i in common.fitted() if (i.file, i.digest) not in there] if self.home.leads else []
        wanted = set().union(*self.ranks.gather_values(lacking))
        self.home.publish([info for info in common.fitted() if info.file in wanted], source)
        fresh.next_file = common.next_file

    # -- what is done --------------------------------------------------------------------------------------------

    def publish(self, name: str, save: Callable[[str], dict[str, Any]]) -> None:
        """Rank 0 seals what was fitted, all folders get it, and the manifest names it."""
        entry: dict[str, Any] | None = None
        with self.ranks.jointly():
            entry = save(f"{name}.h5") if self.ranks.first else None
        entry = self.ranks.told(entry)
        self.home.publish([SealedInfo.from_json(entry["file"])] if "file" in entry else [])
        self.manifest.fits[name] = entry
        self.note()

    def note(self) -> None:
        """Writes down how far the build is."""
        with self.ranks.jointly():
            if self.home.leads:
                self.manifest.write(self.path, BUILDING)

    def note_shards(self) -> None:
        """Writes down what this rank has sealed, by itself."""
        self.manifest.write(self.path, BUILDING if self.home.leads else building_name(self.ranks.rank))

    def bring_together(self, skipped: list[int], base: int) -> None:
        """The ranks' shards become the folders'.

        Args:
            skipped: ids that this rank has left out.
            base: number of the first file that was written.
        """
        manifest, home = self.manifest, self.home
        mine = {
            "shards": [shard.to_json() for shard in manifest.shards],
            "skipped": skipped,
            "next": manifest.next_file,
        }
        found = self.ranks.gather_values(mine)
        here = [said for rank, said in enumerate(found) if home.leaders[rank] == home.leader]
        shards = [ShardInfo.from_json(shard) for said in here for shard in said["shards"]]
        manifest.shards = sorted(shards, key=lambda shard: shard.first_id)
        manifest.skipped = sorted({i for said in found for i in said["skipped"]})
        manifest.next_file = max(base, *(said["next"] for said in found))
        if home.folders > 1:
            digests = sorted(shard["sealed"]["digest"] for said in found for shard in said["shards"])
            facts = json.dumps([manifest.fingerprint, digests], sort_keys=True)
            rows = sum(shard["rows"] for said in found for shard in said["shards"])
            build = hashlib.sha256(facts.encode()).hexdigest()
            manifest.part = {"number": home.number, "of": home.folders, "rows": rows, "build": build}
        self.note()
        with self.ranks.jointly():
            if not home.leads:
                (self.path / building_name(self.ranks.rank)).unlink(missing_ok=True)

    def row_count(self) -> int:
        """Rows of the whole index."""
        part = self.manifest.part
        return sum(shard.rows for shard in self.manifest.shards) if part is None else int(part["rows"])

    def commit(self) -> None:
        """Makes the folders an index, once all ranks have come this far."""
        self.ranks.wait()
        with self.ranks.jointly("finish"):
            if self.home.leads:
                self.manifest.commit(self.path)
        # After all commits: where one fails, every folder is still that of an unfinished build (`_partly_committed`).
        with self.ranks.jointly():
            if self.home.leads:
                (self.path / BUILDING).unlink()

    # -- helping stages ------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage of the work, in reports and in the account of what ranks send each other."""
        self.ranks.stage = name
        with self.reporter.stage(name, total) as stage:
            yield stage

    def own(self, ids: np.ndarray) -> np.ndarray:
        """This rank's part of some ids."""
        return ids[share(len(ids), self.data.index, self.data.count)]

    def spoken_for(self, blocks: Iterable[T]) -> Iterator[T]:
        """Blocks, of one of the ranks that take the same; the others take them, since a pass is one of all."""
        for block in blocks:
            if self.data.first:
                yield block

    def curvature(self) -> FittedCurvature:
        """The fitted curvature."""
        specs = {spec.name: spec for spec in self.manifest.layers}
        fitted = FittedCurvature(self.path, self.manifest.fits.get("curvature"), specs)
        self.stack.callback(fitted.file.close)
        return fitted


def _partly_committed(path: Path) -> bool:
    """Whether the folder's part of an index is committed, and another folder's perhaps not: the same build goes on."""
    return (path / BUILDING).is_file() and read_manifest(path).part is not None


def _unfinished(folder: Path, fresh: Manifest, *, keep_coarse: bool) -> Manifest | None:
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
        if all(getattr(other, field) == getattr(found, field) for field in _COMMON):
            found.shards += [shard for shard in other.shards if shard not in found.shards]
            found.skipped = sorted({*found.skipped, *other.skipped})
        found.next_file = max(found.next_file, other.next_file)
    found.shards.sort(key=lambda shard: shard.first_id)
    old, new = found.config["coarse"], fresh.config["coarse"]
    unwanted = new["kind"] == "none"
    if unwanted or (old["dim"], old["sketch"]) != (new["dim"], new["sketch"]):
        found.fits.pop("sketch", None)
    if unwanted or old["queries"] != new["queries"]:
        found.fits.pop("queries", None)
    if not keep_coarse or old["kind"] != new["kind"] or "sketch" not in found.fits:
        found.coarse = None
    if found.coarse is None or "queries" not in found.fits:
        found.calibration = None
    return found


def take_fit(folder: Path, manifest: Manifest, into: Path) -> None:
    """Copies what another index was fitted with: projections, curvature and codec.

    Args:
        folder: the other index.
        manifest: of the index that takes it; its layers, config and model must be the same.
        into: its folder.

    Raises:
        FingerprintError: another model, loss, or config, but for settings that change no stored number.
    """
    other = read_manifest(folder)
    keys = ("model", "members", "loss", "autocast", "projection", "layers", "config")
    check_same(
        {k: other.fingerprint[k] for k in keys if k in other.fingerprint},
        {k: manifest.fingerprint[k] for k in keys if k in manifest.fingerprint},
        f"the index {folder}, whose fit was to be taken,",
        "build with the same model, loss and config (leave config out to take that index's)",
    )
    # Names of both indexes are never given again.
    manifest.next_file = max(manifest.next_file, other.next_file)
    manifest.codec = other.codec
    for name in ("projections", "curvature", "codec"):
        entry = other.fits.get(name)
        if entry is not None and "file" in entry:
            info = SealedInfo.from_json(entry["file"])
            entry = entry | {"file": copy_sealed(folder, info, into, info.file).to_json()}
        if entry is not None:
            manifest.fits[name] = entry

"""Manifest: the one JSON file that makes a folder an index; it names every other file, and is replaced atomically.

Each replacement is a version of the index. What an older one names stays on disk as long as somebody reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xxhash

from ..capture.gradients import LayerSpec
from ..config import LayerSelection
from ..errors import CorruptionError, FingerprintError, FormatVersionError, NotAnIndexError, StoreError, shown
from .locks import Lease, is_read
from .sealed import SealedInfo, as_count, replace_durably
from .shards import ShardInfo

FORMAT = "lorif-index"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BUILDING = "building.json"
# Of ranks that build together and do not lead: what each has sealed.
BUILDING_RANKS = "building-*.json"
ADDING = "adding.json"
FITS = ("projections", "curvature", "codec", "sketch", "queries")
"""What all rows share, in the order in which it is fitted: names of stages, of entries and of files."""
LARGEST = 256 << 20
_RETIRED = "retired-"
# Names that builds and changes give: nothing else in the folder is ever removed.
_OURS = ".h5"
_ZEROS = "0" * 32
# Of a layer: beyond any model's, and small enough that sizes made from it cannot overflow.
_WIDEST = 1 << 31


@dataclass
class Manifest:
    """An index, finished or being built.

    Attributes:
        fingerprint: field -> value, of everything a score depends on: format, config, layers, model, loss, data.
        config: the `BuildConfig` as JSON.
        layers: the tracked layers.
        shards: sealed shards, in order of their ids.
        codec: name of the codec that rows are written by; None while that is not decided.
        fits: what all rows share, under the names of `FITS`: an entry each, with the `file` it is sealed in if it has
            one, and what else is known of it.
        coarse: the coarse codes' file, form and fingerprint, or None.
        calibration: what was learnt of it (see `calibration.Calibration`), or None.
        skipped: ids of examples left out for inf or NaN.
        report: seconds by stage and other facts of the build.
        metadata: the user's own.
        generation: rises with every change.
        next_id: of the next example that is added; ids are never given twice.
        next_file: number of the next shard or list of removed ids; names are never given twice.
        removed: the file of removed ids and their count, or None.
        fitted_ids: ids below this were there when the curvature was fitted.
        pending: what an unfinished `add` was given, in its own file only.
        part: of an index that lies in several folders: the number of this one, how many there are, the rows of all,
            and what tells the build from others; None where this folder has everything.
    """

    fingerprint: dict[str, Any]
    config: dict[str, Any]
    layers: list[LayerSpec]
    shards: list[ShardInfo] = field(default_factory=list)
    codec: str | None = None
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    coarse: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    skipped: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    next_id: int = 0
    next_file: int = 0
    removed: dict[str, Any] | None = None
    fitted_ids: int = 0
    pending: dict[str, Any] | None = None
    part: dict[str, Any] | None = None

    def copy(self) -> Manifest:
        """One whose lists and fits can be changed without changing this one's."""
        return replace(self, shards=list(self.shards), fits=dict(self.fits), skipped=list(self.skipped))

    def files(self) -> dict[str, SealedInfo]:
        """What it is -> its file, of all but the shards: fits, coarse index, removed ids."""
        entries = self.fits | {"coarse": self.coarse or {}, "removed": self.removed or {}}
        return {name: SealedInfo.from_json(entry["file"]) for name, entry in entries.items() if "file" in entry}

    @property
    def members(self) -> int:
        """Models of the ensemble that the index was built from: scores are means over them, and a row is shared out."""
        return int(self.fingerprint.get("members") or 1)

    def floor(self) -> Any:
        """The least width that projections have: a number where the config says "auto"."""
        return self.fingerprint.get("config", {}).get("projection_floor", self.config.get("projection_floor"))

    def names(self) -> set[str]:
        """Names of all files that belong to it."""
        return {shard.sealed.file for shard in self.shards} | {info.file for info in self.files().values()}

    def new_name(self, kind: str) -> str:
        """A name for the next shard, or other numbered file, that no file of this index ever had."""
        self.next_file += 1
        return f"{kind}-{self.next_file - 1:06d}.h5"

    def naming(self, kind: str, rank: int = 0, size: int = 1) -> Callable[[], str]:
        """Gives such names, one after the other. Of `size` ranks that write side by side each takes its own numbers;
        nothing else may be named meanwhile."""
        if size == 1:
            return lambda: self.new_name(kind)
        numbers = itertools.count(self.next_file + rank, size)

        def name() -> str:
            self.next_file = next(numbers)
            return self.new_name(kind)

        return name

    def fitted(self) -> list[SealedInfo]:
        """The files of what all rows share."""
        return [SealedInfo.from_json(entry["file"]) for entry in self.fits.values() if "file" in entry]

    def digest(self) -> str:
        """SHA-256, in hex, over the fingerprint's fields, the codec and the digests of all files that a score depends
        on: names this exact index."""
        fits = {
            name: entry | {"file": entry["file"]["digest"]} if "file" in entry else entry
            for name, entry in self.fits.items()
            if name != "queries"
        }
        removed = None if self.removed is None else self.removed["file"]["digest"]
        facts = [self.fingerprint, self.codec, fits, [s.sealed.digest for s in self.shards], removed]
        return hashlib.sha256(_canonical(facts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{part.name: getattr(self, part.name) for part in fields(self)},
            "layers": [asdict(spec) | {"uses": list(spec.uses)} for spec in self.layers],
            "shards": [shard.to_json() for shard in self.shards],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """From a manifest's fields.

        Raises:
            KeyError, TypeError, ValueError, CorruptionError: fields that are missing or of the wrong form.
        """
        shards = [ShardInfo.from_json(shard) for shard in _typed(data["shards"], list)]
        fits = _typed(data["fits"], dict)
        if set(fits) - set(FITS):
            raise ValueError(f"fits {sorted(fits)}")
        known: dict[str, Any] = {
            "layers": [_spec_from_json(spec) for spec in _typed(data["layers"], list)],
            "shards": shards,
            "codec": _typed(data["codec"], str, none=True),
            "fits": {n: _entry(entry, needs_file=n not in ("codec", "sketch")) or {} for n, entry in fits.items()},
            "skipped": [as_count(i) for i in _typed(data["skipped"], list)],
            "part": _part(data["part"]),
        }
        known |= {name: _typed(data[name], dict) for name in ("fingerprint", "config", "report", "metadata")}
        known |= {name: _typed(data[name], dict, none=True) for name in ("calibration", "pending")}
        known |= {name: as_count(data[name]) for name in ("generation", "next_id", "next_file", "fitted_ids")}
        known |= {name: _entry(data[name]) for name in ("coarse", "removed")}
        manifest = cls(**known)
        layers = manifest.fingerprint.get("config", {}).get("layers")
        if isinstance(layers, dict):
            # What an index says of its layers may be older than a setting that is as it was without it.
            layers |= LayerSelection().to_json() | layers
        after = max((shard.last_id + 1 for shard in shards), default=0)
        if len({spec.name for spec in manifest.layers}) < len(manifest.layers):
            raise ValueError("two layers of one name")
        if any(a.last_id >= b.first_id for a, b in itertools.pairwise(shards)) or after > manifest.next_id:
            raise ValueError("ids that do not rise from shard to shard")
        names = [shard.sealed.file for shard in shards] + [info.file for info in manifest.files().values()]
        if len(set(names)) < len(names) or set(names) & {MANIFEST, BUILDING, ADDING}:
            raise ValueError("one file named twice")
        return manifest

    def write(self, folder: Path, name: str) -> None:
        """Replaces the file of that name, atomically and durably."""
        replace_durably(folder, name, _with_checksum(self.to_json()))

    def commit(self, folder: Path) -> None:
        """Makes this the index's next version: from now on readers open it. Those that have opened the last one keep
        it, under another name, until they close it.

        Only whoever holds the writer's lock may call this.
        """
        self.generation += 1
        retired = folder / f"{_RETIRED}{self.generation - 1:06d}.json"
        # Where it fails there is no manifest yet; or a commit was interrupted right here, and it is the same file, or
        # an older one of the same number, which no reader could have opened; or the file system has no links, and
        # readers of the last version are told if files vanish.
        with suppress(OSError):
            os.link(folder / MANIFEST, retired, follow_symlinks=False)
        self.write(folder, MANIFEST)


def building_name(rank: int) -> str:
    """Where a rank that does not lead notes what it has sealed."""
    return BUILDING_RANKS.replace("*", f"{rank:04d}")


def collect(folder: Path) -> list[str]:
    """Removes what no version needs: leftovers of interrupted writers, and files of old versions that nobody reads.

    Only whoever holds the writer's lock may call this.

    Returns:
        names of files that an old version's reader still holds.
    """
    if (folder / MANIFEST).is_file():
        # A build or an addition that was killed right after its commit.
        for path in (folder / BUILDING, *folder.glob(BUILDING_RANKS)):
            path.unlink(missing_ok=True)
        if (folder / ADDING).is_file() and not _still_adding(folder):
            (folder / ADDING).unlink()
    needed: set[str] = set()
    for name in (MANIFEST, BUILDING, ADDING, *(path.name for path in folder.glob(BUILDING_RANKS))):
        if (folder / name).is_file():
            needed |= read_manifest(folder, name).names()
    held: set[str] = set()
    now = folder / MANIFEST
    for path in sorted(folder.glob(f"{_RETIRED}*.json")):
        if (now.exists() and path.samefile(now)) or not is_read(path):
            path.unlink()
            continue
        held |= {path.name} | (read_manifest(folder, path.name).names() - needed)
    for item in folder.iterdir():
        if item.name in needed | held or not item.name.endswith((".part", _OURS)):
            continue
        if item.is_file() or item.is_symlink():
            item.unlink()
    return sorted(held)


def _still_adding(folder: Path) -> bool:
    """Whether the interrupted addition is to the index as it is now: it cannot go on on any other."""
    try:
        pending = read_manifest(folder, ADDING).pending or {}
    except StoreError:
        return False
    return pending.get("generation") == read_manifest(folder).generation


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Reads and checks a manifest, without keeping hold of its version (see `open_version`).

    Raises:
        NotAnIndexError: there is none, or it is something else's.
        FormatVersionError: written in a version that is not read here.
        CorruptionError: not JSON, not as it was written, or fields that are missing or of the wrong form.
    """
    manifest, lease = open_version(folder, name)
    lease.release()
    return manifest


def open_version(folder: Path, name: str = MANIFEST) -> tuple[Manifest, Lease]:
    """Reads and checks a manifest, and keeps its files from being removed until the lease is released; raises as
    `read_manifest`."""
    path = folder / name
    if not path.is_file():
        unfinished = (folder / BUILDING).is_file()
        remedy = (
            "its build was interrupted: run the same Index.build again" if unfinished else "build one with Index.build"
        )
        raise NotAnIndexError(f"{folder} has no {name}, so it is not an index: {remedy}")
    lease = Lease(folder, name, LARGEST)
    try:
        return _parse(lease.data, folder, path), lease
    except BaseException:
        lease.release()
        raise


def _parse(raw: bytes, folder: Path, path: Path) -> Manifest:
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path} is not valid JSON ({error}): restore it from a copy") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise NotAnIndexError(f"{path} is not a {FORMAT} manifest: is {folder} the right folder?")
    version = data.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{folder} is in format version {version!r}, and this library reads version {FORMAT_VERSION}: use the "
            "library version that wrote it, or build it again"
        )
    _check_checksum(text, data, path)
    try:
        return Manifest.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CorruptionError(f"{path} lacks a field or has one of the wrong form ({error!r}): restore it") from None


def _with_checksum(data: dict[str, Any]) -> bytes:
    """A manifest's bytes: JSON whose first field, `checksum`, is the XXH3-128 of them all with zeros in its place."""
    body = json.dumps({"checksum": _ZEROS} | data, indent=1, allow_nan=False).encode()
    return body.replace(_ZEROS.encode(), xxhash.xxh3_128_hexdigest(body).encode(), 1)


def _check_checksum(text: str, data: dict[str, Any], path: Path) -> None:
    stored = data.get("checksum")
    if not isinstance(stored, str) or len(stored) != len(_ZEROS):
        raise CorruptionError(f"{path} has no checksum: restore it from a copy")
    found = xxhash.xxh3_128_hexdigest(text.replace(stored, _ZEROS, 1).encode())
    if found != stored:
        raise CorruptionError(f"{path} has checksum {found}, where {stored} was written: restore it from a copy")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object with one key twice")
    return found


def _typed(value: Any, kind: type, *, none: bool = False) -> Any:
    if not isinstance(value, kind) and not (none and value is None):
        raise TypeError(f"{str(value)[:80]!r} where a {kind.__name__} was expected")
    return value


def _part(value: Any) -> dict[str, Any] | None:
    """{"number", "of", "rows", "build"} of an index that lies in several folders, or None."""
    if value is None:
        return None
    part = {name: as_count(_typed(value, dict)[name]) for name in ("number", "of", "rows")}
    if not part["number"] < part["of"]:
        raise ValueError(f"part {part['number']} of {part['of']}")
    return part | {"build": _typed(value["build"], str)}


def _entry(value: Any, *, needs_file: bool = True) -> dict[str, Any] | None:
    """An entry that names a file by `file`, unless it needs none, or None."""
    if value is not None and (needs_file or "file" in _typed(value, dict)):
        SealedInfo.from_json(_typed(value, dict)["file"])
    return value


def _spec_from_json(spec: Any) -> LayerSpec:
    names = [_typed(name, str) for name in _typed(spec["uses"], list)]
    made = LayerSpec(**{**_typed(spec, dict), "uses": tuple(names)})
    _typed(made.name, str), _typed(made.bias, bool)
    sizes = (made.width_in, made.width_out, made.d_in, made.d_out, made.rank)
    if not all(0 < as_count(size) <= _WIDEST for size in sizes) or made.d_in * made.d_out > _WIDEST:
        raise ValueError(f"layer {made.name!r} of sizes {sizes}")
    return made


def check_same(stored: dict[str, Any], given: dict[str, Any], what: str, remedy: str) -> None:
    """Compares fingerprints field by field.

    Raises:
        FingerprintError: they differ; the message names the fields with both values.
    """
    stored, given = json.loads(_canonical(stored)), json.loads(_canonical(given))
    different = sorted(k for k in stored.keys() | given.keys() if stored.get(k) != given.get(k))
    if different:
        lines = "; ".join(_said(k, stored.get(k), given.get(k)) for k in different)
        raise FingerprintError(f"{what} differs in {', '.join(different)} ({lines}): {remedy}")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _said(name: str, stored: Any, given: Any) -> str:
    """What two values of a field are; of those made of parts, the parts that differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = [k for k in sorted(stored.keys() | given.keys()) if stored.get(k) != given.get(k)]
        return "; ".join(_said(f"{name}.{k}", stored.get(k), given.get(k)) for k in keys)
    if isinstance(stored, list) and isinstance(given, list):
        if len(stored) != len(given):
            return f"{name}: {len(stored)} there, {len(given)} here"
        first = next(i for i, (a, b) in enumerate(zip(stored, given, strict=True)) if a != b)
        return _said(f"{name}[{first}]", stored[first], given[first])
    return f"{name}: {shown(stored)} there, {shown(given)} here"

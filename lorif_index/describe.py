"""Describe: what an index is: its figures as properties, and itself in text and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .capture.gradients import LayerSpec
from .config import BuildConfig
from .curvature.fit import LayerCurvature
from .damping import Damping
from .errors import CorruptionError
from .markup import table
from .search.reader import Reader
from .search.whole import in_order
from .snapshot import Snapshot


class Described:
    """The figures of an index, each of the version that it is of when asked."""

    _now: Snapshot

    @property
    def _reader(self) -> Reader:
        """The parts of that version."""
        return self._now.reader

    def __len__(self) -> int:
        """n, the number of rows, of all ranks; removed ones do not count."""
        return self._reader.live_count

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._now.path

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64: row ids, positions in the training data; they label the columns of `scores`.

        Of an index that several ranks have opened together, all of them ask for it at the same time.
        """
        reader = self._reader
        return in_order(reader, reader.store.live_ids)

    @property
    def held_ids(self) -> np.ndarray:
        """(m,) int64: ids of the rows that this rank holds; all, where it has opened the index alone."""
        return self._reader.store.live_ids

    @property
    def curvature_age(self) -> dict[str, Any]:
        """What happened since the curvature was fitted.

        Returns:
            {"new_rows": rows that were added since, "rows": all, "new_trace": the share of all rows' squared gradient
            norm that is new ones', "removed": rows that were removed and are not yet compacted}.
        """
        return _curvature_age(self._reader)

    @property
    def generation(self) -> int:
        """Rises with every change of the index."""
        return self._now.manifest.generation

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the tracked layers."""
        return tuple(self._reader.specs)

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """Layer -> `LayerSpec`: widths, projected widths, rank, modules."""
        return dict(self._reader.specs)

    @property
    def curvature(self) -> Mapping[str, LayerCurvature]:
        """Layer -> `LayerCurvature`: its sides, its diagonal L and its low-rank part B."""
        return self._reader.curvature

    @property
    def config(self) -> BuildConfig:
        """The choices that it was built with."""
        return self._reader.config

    @property
    def damping(self) -> Damping:
        """That of searches which name none: the config's, where that is "auto" settled by the size of rows."""
        return self._reader.policy()

    @property
    def metadata(self) -> dict[str, Any]:
        """What was passed to `build` as metadata."""
        return dict(self._now.manifest.metadata)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Ids left out for inf or NaN."""
        return tuple(self._now.manifest.skipped)

    @property
    def build_report(self) -> dict[str, Any]:
        """Seconds by stage, rows, bytes of a row, peak memory."""
        return dict(self._now.manifest.report)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over all that a score depends on, and over the digests of all files."""
        return self._now.manifest.digest()

    @property
    def nbytes(self) -> int:
        """Bytes on disk: rows, curvature, sketch and coarse index."""
        return _disk_bytes(self._reader)

    @property
    def bytes_per_example(self) -> int:
        """Bytes of one example's row, without its id and checksum."""
        return self._reader.codec.row_bytes

    @property
    def codec(self) -> str:
        """Name of the codec that rows are written by (see `BuildConfig.store`)."""
        return self._reader.codec.name

    @property
    def coarse(self) -> dict[str, Any] | None:
        """The coarse index: kind, bytes per example, dim, method and energy of the sketch; None without one."""
        return _coarse_facts(self._reader)

    def __repr__(self) -> str:
        return _as_text(self._reader)

    def _repr_html_(self) -> str:
        return _as_html(self._reader)


def _curvature_age(reader: Reader) -> dict[str, Any]:
    store = reader.store
    ids, live = store.ids, store.live
    new = ids[live] >= reader.manifest.fitted_ids
    energies = store.energies_at(live)
    total = float(energies.sum(dtype=np.float64))
    share = float(energies[new].sum(dtype=np.float64)) / total if total else 0.0
    return {"new_rows": int(new.sum()), "rows": len(new), "new_trace": share, "removed": len(ids) - len(live)}


def _disk_bytes(reader: Reader) -> int:
    return sum(file.info.size for file in reader.files())


def _coarse_facts(reader: Reader) -> dict[str, Any] | None:
    entry, sketch = reader.manifest.coarse, reader.manifest.fits.get("sketch")
    if entry is None or sketch is None:
        return None
    try:
        facts = {key: sketch[key] for key in ("dim", "method", "energy")}
        kind = f"{entry['pieces']} pieces of 4 bits" if entry["pieces"] else "flat"
        kind = f"the {entry['entries']} largest that rows name" if "entries" in entry else kind
        return facts | {"kind": kind, "bytes_per_example": entry["file"]["size"] / reader.live_count}
    except KeyError as error:
        raise CorruptionError(f"the manifest's sketch or coarse index lacks {error}: restore it") from None


def _as_text(reader: Reader) -> str:
    """A few lines for a terminal."""
    config, coarse, skipped = reader.config, _coarse_facts(reader), reader.manifest.skipped
    lines = [
        f"Index({str(reader.folder)!r}): {reader.live_count:,} examples, {len(reader.specs)} layers, "
        f"{reader.codec.row_bytes:,} bytes per example, {_disk_bytes(reader) / 1e6:,.1f} MB",
        f"  codec={reader.codec.name} dtype={reader.codec.label} rank={config.rank} "
        f"curvature_rank={config.curvature_rank} damping={reader.policy()} {config.complement}",
    ]
    if coarse is not None:
        each = f"{coarse['bytes_per_example']:.0f} bytes each"
        lines.append(f"  coarse={coarse['kind']} on {coarse['dim']} coordinates, {each}")
    lines += [
        f"  {spec.name}: one weight used by {', '.join(spec.uses)}, counted once"
        for spec in reader.specs.values()
        if len(spec.uses) > 1
    ]
    copies = (reader.manifest.report.get("duplicates") or {}).get("examples")
    if copies:
        lines.append(f"  {copies:,} examples were copies of others when it was built: index.duplicates()")
    if skipped:
        lines.append(f"  {len(skipped)} examples skipped for inf or NaN: index.skipped")
    return "\n".join(lines)


def _as_html(reader: Reader) -> str:
    """Two tables, of the index and of its layers, for a notebook."""
    coarse, config, skipped = _coarse_facts(reader), reader.config, reader.manifest.skipped
    size = f"{reader.codec.row_bytes:,} bytes an example, {_disk_bytes(reader) / 1e6:,.1f} MB in all"
    rows = [
        ("examples", f"{reader.live_count:,}" + (f", {len(skipped)} skipped" if skipped else "")),
        ("size", size),
        ("stored", f"{reader.codec.name} ({reader.codec.label})"),
        ("coarse", "none" if coarse is None else f"{coarse['kind']} on {coarse['dim']} coordinates"),
        ("damping", f"{reader.policy()}, {config.complement}"),
        ("fingerprint", reader.manifest.digest()),
    ]
    layers = [
        (spec.name, f"{spec.width_in} x {spec.width_out}", f"{spec.d_in} x {spec.d_out}", ", ".join(spec.uses))
        for spec in reader.specs.values()
    ]
    return table(("index", str(reader.folder)), rows) + table(("layer", "in x out", "projected", "modules"), layers)

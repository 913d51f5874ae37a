"""Removal: rows that are never answered with again, at once; and compaction, which takes them off the disk.

Fast-scan indexes cannot lose a row, and shards are never changed: removed ids are a list beside them, until `compact`
writes what is left into new files.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..errors import QueryError
from ..progress import Reporter, Stage
from ..search.named import as_ids
from ..search.reader import Reader
from ..storage.fitted import load_removed, save_queries, save_removed
from ..storage.manifest import Manifest
from ..storage.shards import Entries, ShardInfo
from ..storage.store import Store, StoreWriter
from .candidates import keep_codes

# Neighbouring shards below this share of `shard_bytes` are written as one.
_SMALL = 0.5


def remove_examples(reader: Reader, ids: Iterable[int]) -> int:
    """Marks rows as removed, and commits; the writer's lock is held.

    Returns:
        how many.

    Raises:
        QueryError: an id that the index does not hold, or no longer; or no row would be left.
    """
    wanted = np.unique(as_ids(ids))
    if not len(wanted):
        return 0
    positions = reader.store.positions_of(wanted)
    if positions.min() < 0:
        raise QueryError(
            f"the index has no row with id {int(wanted[positions < 0][0])} to remove: ids are in index.ids"
        )
    if len(wanted) == reader.store.live_count:
        raise QueryError(f"removing all {len(wanted)} rows would leave an index of nothing: delete its folder instead")
    manifest = reader.manifest.copy()
    old = np.empty(0, np.int64) if manifest.removed is None else load_removed(reader.folder, manifest.removed)
    manifest.removed = save_removed(reader.folder, manifest.new_name("removed"), np.union1d(old, wanted))
    manifest.commit(reader.folder)
    return len(wanted)


def compact_rows(reader: Reader, report: Reporter) -> Manifest | None:
    """Writes shards without removed rows, small ones together, the coarse index and the calibration queries without
    them, and commits; the writer's lock is held.

    Returns:
        the next version, or None where there is nothing to do.
    """
    store = reader.store
    runs = _runs(store, reader.config.compute.shard_bytes)
    if all(len(run) == 1 and not dirty for run, dirty in runs) and reader.manifest.removed is None:
        return None
    manifest = reader.manifest.copy()
    manifest.shards, manifest.removed = [], None
    with report.stage("compact", store.live_count) as stage:
        for run, dirty in runs:
            if len(run) == 1 and not dirty:
                manifest.shards.append(store.shards[run[0]].info)
                stage.advance(store.shards[run[0]].count)
            else:
                _rewrite(reader, run, manifest, stage)
    if store.dead is not None:
        _compact_queries(reader, manifest)
    codes = reader.codes()
    if codes is not None:
        # Under a name of its own, that goes with the new shards.
        keep_codes(reader, manifest, codes.rows[store.live])
    manifest.commit(reader.folder)
    return manifest


def _runs(store: Store, shard_bytes: int) -> list[tuple[list[int], bool]]:
    """Which shards become one, in order; and whether one of them has removed rows."""
    runs: list[tuple[list[int], bool]] = []
    dead, small_before = store.dead, False
    for number, shard in enumerate(store.shards):
        first = int(store.starts[number])
        dirty = dead is not None and bool(dead[first : first + shard.count].any())
        left = shard.count if dead is None else int((~dead[first : first + shard.count]).sum())
        small = left * store.row_bytes < _SMALL * shard_bytes
        alike = bool(runs) and _kind(store.shards[runs[-1][0][-1]].info) == _kind(shard.info)
        if small and small_before and alike:
            runs[-1] = ([*runs[-1][0], number], runs[-1][1] or dirty)
        else:
            runs.append(([number], dirty))
        small_before = small
    return runs


def _kind(info: ShardInfo) -> tuple[bool, bool]:
    """Whether there are payloads and contents: shards that are alike can be written as one."""
    return "payloads" in info.sealed.offsets, bool(info.contents_digest)


def _rewrite(reader: Reader, run: list[int], manifest: Manifest, stage: Stage) -> None:
    """Writes the living rows of some shards into new ones."""
    store = reader.store
    size, name = reader.config.compute.shard_bytes, manifest.naming("shard")
    writer = StoreWriter(reader.folder, store.row_bytes, size, manifest.shards, name)
    for number in run:
        shard, first = store.shards[number], int(store.starts[number])
        alive = (
            np.arange(shard.count) if store.dead is None else np.flatnonzero(~store.dead[first : first + shard.count])
        )
        ids, energies, contents = shard.ids(), shard.energies(), shard.contents()
        for part in np.array_split(alive, max(-(-len(alive) // _rows_at_once(store)), 1)):
            if not len(part):
                continue
            payloads = shard.payloads(part) if shard.has_payloads else None
            hashes = None if contents is None else contents[part]
            writer.append(Entries(store.gather(part + first), ids[part], energies[part], hashes, payloads))
            stage.advance(len(part), len(part) * store.row_bytes)
    writer.flush()


def _rows_at_once(store: Store) -> int:
    return max((8 << 20) // max(store.row_bytes, 64), 1)


def _compact_queries(reader: Reader, manifest: Manifest) -> None:
    """Calibration queries are gradients of training examples: those of removed ones go, too."""
    if reader.queries is None:
        return
    ids = reader.queries.ids()
    kept = reader.store.positions_of(ids) >= 0
    if kept.all():
        return
    which = torch.from_numpy(np.flatnonzero(kept))
    gradients = {name: g[which] for name, g in reader.queries.gradients().items()}
    manifest.fits["queries"] = save_queries(reader.folder, manifest.new_name("queries"), ids[kept], gradients)

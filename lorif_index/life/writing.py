"""Writing: one writer at a time makes the next version of an index, and its handle moves on to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..capture.spool import remove_leftovers
from ..errors import StoreError
from ..progress import ProgressCallback, Reporter, reporter
from ..snapshot import Snapshot
from ..storage.locks import WriterLock
from ..storage.manifest import collect


@dataclass
class Change:
    """A version being made.

    Attributes:
        now: the newest version: while it is changed the one before, afterwards the one that was made.
        report: is told.
        held: afterwards: names of files that readers of older versions still hold.
    """

    now: Snapshot
    report: Reporter
    held: list[str] = field(default_factory=list)


@contextmanager
def writing(
    now: Snapshot, newest: Callable[[], Snapshot], progress: bool | ProgressCallback | None
) -> Iterator[Change]:
    """The only writer, on the newest version, until the block ends.

    Args:
        now: the version that the handle is of.
        newest: moves the handle on, and says which version it is of then.
        progress: as in `Index.build`.

    Raises:
        LockedError: another writer is at work. StoreError: not all of the index is here, or damaged shards are being
        skipped.
    """
    path, part = now.path, now.manifest.part
    if now.access.ranks.size > 1 or part is not None:
        what = "open on several ranks" if part is None else "a part of an index in several folders"
        raise StoreError(
            f"{path} is {what}, and is only changed by one process that has all of it: open it alone, or merge the "
            "parts first (Index.merge)"
        )
    with WriterLock(path):
        remove_leftovers(path)
        collect(path)
        now = newest()
        damaged = now.reader.store.damaged
        if damaged:
            # A change must not take for removed what is only unreadable.
            raise StoreError(
                f"{path} has damaged shards {sorted(damaged)}, which this index skips: restore them from a copy, or "
                "Index.repair(path), before it is changed"
            )
        with reporter(progress) as report:
            change = Change(now, report)
            # Files of an old version can go when nobody holds it any more: neither does this block.
            del now
            try:
                yield change
            finally:
                change.now = newest()
                change.held = collect(path)

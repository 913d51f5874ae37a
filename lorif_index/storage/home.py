"""Home: an index's folder as several ranks see it, one that all share or one of each machine's own.

Of the ranks that see one folder the first leads: it holds the writer's lock, writes the manifest, and gets the files
that rank 0 makes where it does not see rank 0's folder.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from ..ranks import Ranks
from .sealed import Arrival, SealedFile, SealedInfo

ARRIVING = ".rank-"
"""What files begin with that ranks lay down to find out who shares a folder."""
_CHUNK = 16 << 20


class Home:
    """One rank's view of the folders of an index; all ranks make theirs at the same time.

    Attributes:
        leaders: for each rank the first of those that share its folder.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks
        self.leaders = [0]
        if ranks.size > 1:
            with ranks.jointly():
                path.mkdir(parents=True, exist_ok=True)
            self.leaders = self._look(ranks.told(uuid.uuid4().hex))

    def _look(self, nonce: str) -> list[int]:
        """Each rank lays down a file, and sees whose others are there; asked for by name, so that no cached listing of
        a network's folder is believed."""
        names = [f"{ARRIVING}{nonce}-{rank}.part" for rank in range(self.ranks.size)]
        own = self.path / names[self.ranks.rank]
        with self.ranks.jointly():
            fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fsync(fd)
            os.close(fd)
        try:
            first = next(rank for rank, name in enumerate(names) if (self.path / name).exists())
            return [int(rank) for rank in self.ranks.gather_values(first)]
        finally:
            # After the gather, all have looked.
            own.unlink(missing_ok=True)

    @property
    def leader(self) -> int:
        """Of this rank's folder."""
        return self.leaders[self.ranks.rank]

    @property
    def leads(self) -> bool:
        return self.leader == self.ranks.rank

    @property
    def number(self) -> int:
        """Of this rank's folder, by its leader, from 0."""
        return sorted(set(self.leaders)).index(self.leader)

    @property
    def folders(self) -> int:
        """How many there are; 1 where all ranks share one."""
        return len(set(self.leaders))

    def publish(self, files: Iterable[SealedInfo], source: int = 0) -> None:
        """Gives files of the folder of rank `source`, a leader, to all others, and waits until they are there.

        Raises:
            CorruptionError: a file is not as it was sealed. OSError: a disk is full or refuses.
        """
        if self.folders > 1:
            for info in files:
                self._send(info, source)
        self.ranks.wait()

    def _send(self, info: SealedInfo, source: int) -> None:
        with ExitStack() as stack:
            file = copy = None
            with self.ranks.jointly():
                if self.ranks.rank == source:
                    file = stack.enter_context(closing(SealedFile(self.path, info)))
                    file.verify()
                elif self.leads:
                    copy = stack.enter_context(closing(Arrival(self.path, info, info.file)))
            for at in range(0, info.size, _CHUNK):
                piece = torch.empty(min(_CHUNK, info.size - at), dtype=torch.uint8)
                with self.ranks.jointly():
                    if file is not None:
                        file.read(at, piece.numpy().data)
                piece = self.ranks.spread(piece, source)
                with self.ranks.jointly():
                    if copy is not None:
                        copy.write(at, piece.numpy().data)
            with self.ranks.jointly():
                if copy is not None:
                    copy.seal()

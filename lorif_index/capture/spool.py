"""Spool: gradients kept on disk for a while, so that several passes need not compute them again.

A row is all layers' parts, one after the other, so that any rows are a view of the file, mapped: to walk them copies
nothing, and what several small batches wrote is read as large ones.
"""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import StoreError
from .gradients import GradientBlock, LayerGradient

PREFIX = ".spool-"
# Of the rows that a walk gives at a time: products with fewer take several times as long. What is made of larger ones
# would be fresh memory each time, which takes longer than the products.
_READ_BYTES = 16 << 20


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder; only whoever holds the writer's lock there may call this."""
    for leftover in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


Widths = dict[str, list[tuple[int, ...]]]
"""Layer -> the shapes of one row's parts, in order."""


@dataclass
class _Run:
    """Rows of one kind that follow each other on disk."""

    offset: int
    widths: Widths
    blocks: list[np.ndarray] = field(default_factory=list)
    contents: list[np.ndarray] = field(default_factory=list)

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate(self.blocks)

    @property
    def numbers(self) -> int:
        """Of a row."""
        return sum(math.prod(shape) for shapes in self.widths.values() for shape in shapes)


class Spool:
    """A temporary file of float32 gradient blocks, of examples in any order; a `GradientSource` that removes its file
    when closed."""

    window = 1024

    def __init__(self, folder: Path, blocks: Iterable[GradientBlock] = ()) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        self._path = self._folder / "rows.raw"
        self._runs: list[_Run] = []
        with self.writing() as write:
            for block in blocks:
                write(block)

    @contextmanager
    def writing(self) -> Iterator[Callable[[GradientBlock], None]]:
        """What adds a block, to a spool that is not read yet; after an error the file is gone."""
        room = np.empty(0, dtype=np.float32)

        def write(block: GradientBlock) -> None:
            nonlocal room
            room = self._write(file, block, room)

        try:
            with self._path.open("ab", buffering=0) as file:
                yield write
        except BaseException:
            self.close()
            raise
        self._ids = [run.ids for run in self._runs]
        self._contents = [np.concatenate(run.contents) if run.contents else None for run in self._runs]
        self.count = sum(len(ids) for ids in self._ids)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def ids(self) -> np.ndarray:
        """(count,) int64."""
        return np.concatenate(self._ids) if self._ids else np.empty(0, np.int64)

    def __iter__(self) -> Iterator[dict[str, LayerGradient]]:
        """Blocks as a user hands them over."""
        return (dict(block.layers) for block in self.walk())

    def walk(self) -> Iterator[GradientBlock]:
        """All, in the order of the file."""
        return self._read(lambda ids: np.arange(len(ids)))

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        every = self.ids
        last = int(every.max()) + 1 if len(every) else 0
        for first in range(start - start % self.window, last if stop is None else min(stop, last), self.window):
            low, high = max(first, start), first + self.window if stop is None else min(first + self.window, stop)
            yield from self._read(lambda ids: np.flatnonzero((ids >= low) & (ids < high)))  # noqa: B023

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        return self._read(lambda there: np.flatnonzero(np.isin(there, ids)))

    def _write(self, file: BinaryIO, block: GradientBlock, room: np.ndarray) -> np.ndarray:
        """Adds a block, by way of some memory that is used again."""
        widths = {name: [tuple(part.shape[1:]) for part in g.parts] for name, g in block.layers.items()}
        bare = block.contents is None
        if not self._runs or self._runs[-1].widths != widths or bare == bool(self._runs[-1].contents):
            self._runs.append(_Run(file.tell(), widths))
        run = self._runs[-1]
        need = block.count * run.numbers
        room = room if len(room) >= need else np.empty(need, dtype=np.float32)
        rows, at = torch.from_numpy(room[:need].reshape(block.count, -1)), 0
        parts = [part.detach().flatten(1) for gradient in block.layers.values() for part in gradient.parts]
        device = parts[0].device
        if device.type != "cpu":
            # Put together where they are, so that a GPU is waited for once, and not for each layer.
            parts = [torch.cat([part.to(device, torch.float32) for part in parts], dim=1)]
        for flat in parts:
            rows[:, at : at + flat.shape[1]] = flat
            at += flat.shape[1]
        left = room[:need].data.cast("B")
        while len(left):
            # A raw file may take a part of what it is given.
            left = left[file.write(left) :]
        run.blocks.append(block.ids)
        run.contents += [] if block.contents is None else [block.contents]
        return room

    def _read(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[GradientBlock]:
        """Of each run the rows, rising, that are wanted of its ids."""
        for run, ids, contents in zip(self._runs, self._ids, self._contents, strict=True):
            rows = wanted(ids)
            if len(rows):
                yield from self._views(run, ids, contents, rows)

    def _views(
        self, run: _Run, ids: np.ndarray, contents: np.ndarray | None, rows: np.ndarray
    ) -> Iterator[GradientBlock]:
        size, each = self._path.stat().st_size, 4 * run.numbers
        if size < run.offset + len(ids) * each:
            raise StoreError("temporary rows ended early: did something remove or change the build's folder?")
        # Private: whoever writes into a block changes nothing on disk.
        mapped = np.memmap(self._path, np.float32, "c", run.offset, (len(ids), run.numbers))
        every = torch.from_numpy(mapped)
        at_once = max(_READ_BYTES // each, 1)
        for part in np.split(rows, range(at_once, len(rows), at_once)):
            step = int(part[1] - part[0]) if len(part) > 1 else 1
            even = bool((np.diff(part) == step).all())
            taken = every[part[0] : part[-1] + 1 : step] if even else every[torch.from_numpy(part)]
            there = None if contents is None else contents[part]
            yield GradientBlock(ids[part], _layers(taken, run.widths), there)
            _forget(mapped)


def _layers(rows: torch.Tensor, widths: Widths) -> dict[str, LayerGradient]:
    """Views of rows (n, numbers)."""
    out, at = {}, 0
    for name, shapes in widths.items():
        parts = []
        for shape in shapes:
            wide = math.prod(shape)
            parts.append(rows[:, at : at + wide].unflatten(1, shape))
            at += wide
        out[name] = LayerGradient(parts)
    return out


def _forget(mapped: np.memmap) -> None:
    """Pages that were read need not stay in this process's memory; they would come back from the file."""
    pages = mapped._mmap  # type: ignore[attr-defined]
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)

"""Spool: gradients kept on disk for a while, so that several passes need not compute them again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import StoreError
from .gradients import GradientBlock, LayerGradient

PREFIX = ".spool-"

_Shapes = dict[str, tuple[tuple[int, ...], ...]]


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder; only whoever holds the writer's lock there may call this."""
    for leftover in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    """One block on disk: where it begins, its ids, and the shapes of each layer's one or two arrays, in order."""

    offset: int
    ids: np.ndarray
    shapes: _Shapes


class Spool:
    """A temporary file of float32 gradient blocks; a `GradientSource` that removes its file when closed.

    Args:
        folder: an existing folder on the disk that is to hold it.
        blocks: written once, in order.
    """

    def __init__(self, folder: Path, blocks: Iterable[GradientBlock]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        self._path = self._folder / "rows.raw"
        self._entries: list[_Entry] = []
        try:
            with self._path.open("wb") as file:
                for block in blocks:
                    self._entries.append(_write(file, block))
        except BaseException:
            self.close()
            raise
        self.count = sum(len(entry.ids) for entry in self._entries)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def ids(self) -> np.ndarray:
        """(count,) int64."""
        return np.concatenate([e.ids for e in self._entries]) if self._entries else np.empty(0, np.int64)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        with self._path.open("rb", buffering=0) as file:
            for entry in self._entries:
                wanted = np.flatnonzero((entry.ids >= start) & (stop is None or entry.ids < stop))
                if len(wanted):
                    yield _read(file, entry).select(wanted)

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        with self._path.open("rb", buffering=0) as file:
            for entry in self._entries:
                rows = np.flatnonzero(np.isin(entry.ids, ids))
                if len(rows):
                    yield _read(file, entry).select(rows)


def _write(file: BinaryIO, block: GradientBlock) -> _Entry:
    offset = file.tell()
    shapes: _Shapes = {}
    for name, gradient in block.layers.items():
        arrays = gradient.pair if gradient.pair is not None else (gradient.dense(),)
        shapes[name] = tuple(tuple(a.shape) for a in arrays)
        for array in arrays:
            data = array.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
            file.write(data.data.cast("B"))
    return _Entry(offset, block.ids, shapes)


def _read(file: RawIOBase, entry: _Entry) -> GradientBlock:
    file.seek(entry.offset)
    layers = {}
    for name, shapes in entry.shapes.items():
        arrays = []
        for shape in shapes:
            array = torch.empty(shape, dtype=torch.float32)
            view = array.numpy().data.cast("B")
            while view:
                got = file.readinto(view)
                if not got:
                    raise StoreError("temporary rows ended early: did something remove or change the build's folder?")
                view = view[got:]
            arrays.append(array)
        layers[name] = (
            LayerGradient(arrays[0], None) if len(arrays) == 1 else LayerGradient(None, (arrays[0], arrays[1]))
        )
    return GradientBlock(entry.ids, layers)

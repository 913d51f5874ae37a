"""Spool: gradients kept on disk for a while, so that several passes need not compute them again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import StoreError
from .gradients import GradientBlock, LayerGradient

PREFIX = ".spool-"


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in a folder; only whoever holds the writer's lock there may call this."""
    for leftover in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class _Entry:
    """One block on disk: where it begins, its ids, and the shapes of each layer's parts, in order."""

    offset: int
    ids: np.ndarray
    shapes: dict[str, list[tuple[int, ...]]]


class Spool:
    """A temporary file of float32 gradient blocks; a `GradientSource` that removes its file when closed."""

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

    def __iter__(self) -> Iterator[dict[str, LayerGradient]]:
        """Blocks as a user hands them over."""
        return (dict(block.layers) for block in self.blocks())

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        return self._read(lambda ids: (ids >= start) & (stop is None or ids < stop))

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        return self._read(lambda there: np.isin(there, ids))

    def _read(self, wanted: Callable[[np.ndarray], np.ndarray]) -> Iterator[GradientBlock]:
        with self._path.open("rb") as file:
            for entry in self._entries:
                rows = np.flatnonzero(wanted(entry.ids))
                if len(rows):
                    yield _read(file, entry).select(rows)


def _write(file: BinaryIO, block: GradientBlock) -> _Entry:
    offset = file.tell()
    for gradient in block.layers.values():
        for part in gradient.parts:
            file.write(part.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B"))
    shapes = {name: [tuple(part.shape) for part in gradient.parts] for name, gradient in block.layers.items()}
    return _Entry(offset, block.ids, shapes)


def _read(file: BufferedReader, entry: _Entry) -> GradientBlock:
    file.seek(entry.offset)
    layers = {}
    for name, shapes in entry.shapes.items():
        parts = [torch.empty(shape, dtype=torch.float32) for shape in shapes]
        for part in parts:
            if file.readinto(part.numpy().data.cast("B")) < 4 * part.numel():
                raise StoreError("temporary rows ended early: did something remove or change the build's folder?")
        layers[name] = LayerGradient(parts)
    return GradientBlock(entry.ids, layers)

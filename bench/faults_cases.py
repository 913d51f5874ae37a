"""Small indexes to be harmed, the operations that change them, calls that fail, and what must hold after any of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import xxhash

from lorif_index import BuildConfig, CoarseIndex, Compute, Index

N, MORE = 220, 40
CLOSE = 2e-5
"""How far scores may differ that were added up in another order, of the largest."""
STORES: dict[str, dict[str, Any]] = {
    "factors": {"store": "factors", "rank": 2},
    "eigen": {"store": "eigen", "eigen_bytes": 64},
    "sparse": {"store": "eigen", "eigen_bytes": 17},
}
# Names that an index's folder may have beside the files that its manifest names.
OWN_NAMES = {"manifest.json", "writer.lock"}


# -- indexes -------------------------------------------------------------------------------------------------------


def rows() -> torch.Tensor:
    """Gradients of two small layers, beside each other."""
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(9, 46, generator=generator) * torch.linspace(2, 0.2, 9)[:, None]
    return torch.randn(N + MORE, 9, generator=generator) @ low + 0.1 * torch.randn(N + MORE, 46, generator=generator)


ROWS = rows()
GONE = np.arange(0, N, 9)


def blocks(part: torch.Tensor, size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Rows as blocks of gradients, 6 x 5 and 4 x 4."""
    return [{"a": p[:, :30].reshape(-1, 6, 5), "b": p[:, 30:].reshape(-1, 4, 4)} for p in part.split(size)]


def query() -> dict[str, torch.Tensor]:
    """Three questions near some of the rows."""
    generator = torch.Generator().manual_seed(6)
    return blocks(ROWS[:3] + 0.2 * torch.randn(3, 46, generator=generator))[0]


@dataclass(frozen=True)
class Case:
    """A kind of index.

    Attributes:
        store: what its rows hold, of `STORES`.
        coarse: its coarse index, or None.
        payloads: whether rows have payloads.
        shard_bytes: of its shards: small, so that there are several.
    """

    store: str
    coarse: str | None = "flat"
    payloads: bool = True
    shard_bytes: int = 3000

    @property
    def name(self) -> str:
        return f"{self.store}{'' if self.coarse else ' without coarse index'}"

    @property
    def config(self) -> BuildConfig:
        return BuildConfig(
            **STORES[self.store],
            curvature_rank=10,
            coarse=CoarseIndex(kind=self.coarse or "none", dim=16, queries=4),
            compute=Compute(shard_bytes=self.shard_bytes),
            projection="random",
            projection_dim=None,
        )

    def given(self, first: int, last: int) -> dict[str, Any]:
        """Arguments that give some rows, with their payloads."""
        kept = [{"number": i} for i in range(first, last)] if self.payloads else None
        return {"gradients": blocks(ROWS[first:last]), "payloads": kept}


def cases(shard_bytes: int = 3000) -> list[Case]:
    """One of each store, and one without a coarse index."""
    made = [Case(store, shard_bytes=shard_bytes) for store in STORES]
    return [*made, Case("factors", coarse=None, payloads=False, shard_bytes=shard_bytes)]


# -- files ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_manifest(path: Path, data: dict[str, Any]) -> None:
    """A manifest with the checksum that the format asks for."""
    zeros = "0" * 32
    body = json.dumps({"checksum": zeros} | {k: v for k, v in data.items() if k != "checksum"}).encode()
    path.write_bytes(body.replace(zeros.encode(), xxhash.xxh3_128_hexdigest(body).encode(), 1))


def sealed(value: Any) -> list[dict[str, Any]]:
    """Every entry of a manifest that seals a file."""
    if isinstance(value, dict):
        own = [value] if {"file", "size", "digest", "offsets"} <= set(value) else []
        return own + [entry for inner in value.values() for entry in sealed(inner)]
    return [entry for inner in value for entry in sealed(inner)] if isinstance(value, list) else []


def named_files(folder: Path) -> set[str]:
    """Names of the files that make up an index, but for its manifest."""
    return {entry["file"] for entry in sealed(read_json(folder / "manifest.json"))}


# -- operations, and what an index answers -------------------------------------------------------------------------


def run(case: Case, operation: str, folder: Path) -> None:
    """One operation on an index; the same again goes on where it was cut off."""
    if operation == "build":
        Index.build(folder, config=case.config, progress=False, **case.given(0, N)).close()
        return
    with Index.open(folder) as index:
        if operation == "add":
            index.add(progress=False, **case.given(N, N + MORE))
        elif operation == "remove":
            index.remove(GONE)
        else:
            {"compact": index.compact, "refit": index.refit}[operation](progress=False)


@dataclass(frozen=True)
class Answer:
    """What one version of an index answers.

    Attributes:
        ids, scores, payloads: of all rows.
        near: ids that a candidate search gives, or None.
    """

    ids: np.ndarray
    scores: np.ndarray
    payloads: list[Any]
    near: np.ndarray | None

    def same(self, other: Answer, *, exactly: bool = False) -> bool:
        if not (np.array_equal(self.ids, other.ids) and self.payloads == other.payloads):
            return False
        if exactly:
            near = self.near is None or np.array_equal(self.near, other.near)
            return near and np.array_equal(self.scores, other.scores)
        return bool(np.abs(self.scores - other.scores).max() <= CLOSE * np.abs(other.scores).max())


def ask(index: Index) -> Answer:
    """All that an index can be asked, which must agree with itself."""
    scores, near = index.scores(query()), None
    if index.coarse is not None:
        hits = index.search(query(), k=5, exact=False)
        columns, near = np.searchsorted(index.ids, hits.ids), hits.ids
        if not np.abs(hits.scores - np.take_along_axis(scores, columns, 1)).max() <= CLOSE * np.abs(scores).max():
            raise RuntimeError("a candidate's score is not the scan's")
    return Answer(index.ids, scores, index.payloads(), near)


def answer(folder: Path) -> Answer:
    """Of the version that is there now, which must be whole."""
    with Index.open(folder) as index:
        index.verify()
        return ask(index)


def generation_of(folder: Path) -> int:
    """Of the version that is there now; -1 where there is none."""
    return int(read_json(folder / "manifest.json")["generation"]) if (folder / "manifest.json").exists() else -1


@dataclass(frozen=True)
class Template:
    """An operation's undisturbed course.

    Attributes:
        case, operation: what is done.
        start: a folder as it is before; None where there is none.
        before: what it answers then, or None.
        after: what it answers afterwards.
        generation: of the version before, or -1.
        changes: whether a version was committed.
        seconds: that it took.
    """

    case: Case
    operation: str
    start: Path | None
    before: Answer | None
    after: Answer
    generation: int
    changes: bool
    seconds: float

    def __str__(self) -> str:
        return f"{self.case.name}, {self.operation}"

    def begin(self, folder: Path) -> None:
        """Makes a folder as it is before the operation."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, folder)

    def run(self, folder: Path) -> None:
        run(self.case, self.operation, folder)

    def committed(self, folder: Path) -> bool:
        return generation_of(folder) != self.generation


def templates(case: Case, root: Path) -> list[Template]:
    """Every operation's undisturbed course: build; then add and remove; compact and refit of what these two left."""
    root.mkdir(parents=True, exist_ok=True)
    made: list[Template] = []

    def course(operation: str, start: Path | None) -> Path:
        folder = root / f"after-{operation}"
        if start is not None:
            shutil.copytree(start, folder)
        before, generation = None if start is None else answer(start), generation_of(folder)
        began = time.perf_counter()
        run(case, operation, folder)
        seconds, changes = time.perf_counter() - began, generation_of(folder) != generation
        made.append(Template(case, operation, start, before, answer(folder), generation, changes, seconds))
        return folder

    removed = course("remove", course("add", course("build", None)))
    course("compact", removed)
    course("refit", removed)
    return made


def settle(template: Template, folder: Path) -> list[str]:
    """What is wrong with an index whose change was cut off, before and after that is made again; [] if nothing."""
    try:
        return _settle(template, folder)
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:300]}"]


def _settle(template: Template, folder: Path) -> list[str]:
    wrong: list[str] = []
    committed = template.committed(folder)
    expected = template.after if committed else template.before
    if expected is not None and not answer(folder).same(expected, exactly=not committed):
        wrong.append(f"the version {'after' if committed else 'before'} it answers otherwise than it did")
    if not committed:
        template.run(folder)
        if template.changes and not template.committed(folder):
            wrong.append("made again, it changed nothing")
    if not answer(folder).same(template.after, exactly=template.operation == "build"):
        wrong.append("made again, it answers otherwise than an undisturbed one")
    extra = sorted({item.name for item in folder.iterdir()} - named_files(folder) - OWN_NAMES)
    if not committed and extra:
        wrong.append(f"left behind: {extra}")
    return wrong


# -- calls that fail -----------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Stands for the process's end where it may not end: nothing is written after it."""


class Calls:
    """Counts the calls that change the file system, and lets one of them fail.

    Args:
        at: the number of that call; -1: none.
        mode: "ENOSPC" or "EIO", the error that is raised; "short", a write of half of it; "short always", every write;
            "cut", `PowerCut` from then on; "exit before" or "exit after", the process's end.

    Attributes:
        made: names of the calls so far.
    """

    NAMES = ("fsync", "pwrite", "posix_fallocate", "rename", "link", "unlink", "open", "ftruncate")

    def __init__(self, at: int = -1, mode: str = "") -> None:
        self._at, self._mode = at, mode
        self.made: list[str] = []
        self._dead = False

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and not (len(args) > 1 and args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            if reads or (name == "File" and (args[1:2] or (kwargs.get("mode"),))[0] != "w"):
                return real(*args, **kwargs)
            return self._called(name, real, args, kwargs)

        return call

    def _called(self, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._dead:
            raise PowerCut
        self.made.append(name)
        hit = len(self.made) - 1 == self._at
        if name == "pwrite" and (self._mode == "short always" or (hit and self._mode == "short")):
            data = memoryview(args[1])
            return real(args[0], data[: max(len(data) // 2, 1)], *args[2:])
        if not hit:
            return real(*args, **kwargs)
        if self._mode in ("ENOSPC", "EIO"):
            number = getattr(errno, self._mode)
            raise OSError(number, os.strerror(number))
        if self._mode == "cut":
            self._dead = True
            raise PowerCut
        if self._mode == "exit after":
            real(*args, **kwargs)
        os._exit(9)

    @contextmanager
    def installed(self) -> Iterator[Calls]:
        owners: list[tuple[Any, str]] = [*((os, name) for name in self.NAMES), (h5py, "File")]
        kept = [(owner, name, getattr(owner, name)) for owner, name in owners]
        try:
            for owner, name, real in kept:
                # h5py's own "File" is a class, that others only call here.
                setattr(owner, name, self._wrap(name, real))
            yield self
        finally:
            for owner, name, real in kept:
                setattr(owner, name, real)

"""Small indexes to be harmed, the operations that change them, and what must hold of an index after any of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from lorif_index import BuildConfig, Index

N, MORE = 220, 40
STORES = ("factors", "both", "coordinates", "eigen", "coarse")
OPERATIONS = ("build", "add", "remove", "compact", "refit")
# Names that an index's folder may have beside the files that its manifest names.
OWN_NAMES = {"manifest.json", "writer.lock"}


def rows() -> torch.Tensor:
    """Gradients of two small layers, beside each other."""
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(9, 46, generator=generator) * torch.linspace(2, 0.2, 9)[:, None]
    return torch.randn(N + MORE, 9, generator=generator) @ low + 0.1 * torch.randn(N + MORE, 46, generator=generator)


ROWS = rows()


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
        store: what its rows hold.
        coarse: a faiss factory string, or None.
        payloads: whether rows have payloads.
        shard_bytes: of its shards: small, so that there are several.
    """

    store: str
    coarse: str | None = "PQ8x4fs"
    payloads: bool = True
    shard_bytes: int = 3000

    @property
    def name(self) -> str:
        return f"{self.store}{'' if self.coarse else ' without coarse index'}"

    @property
    def config(self) -> BuildConfig:
        return BuildConfig(
            store=self.store,
            rank=2,
            curvature_rank=10,
            sketch_dim=16,
            eigen_bytes=24,
            coarse=self.coarse,
            shard_bytes=self.shard_bytes,
            calibration_queries=4,
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


GONE = np.arange(0, N, 9)


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
        elif operation == "compact":
            index.compact(progress=False)
        else:
            index.refit(progress=False)


@dataclass(frozen=True)
class Answer:
    """What one version of an index answers.

    Attributes:
        ids: of its rows, or of hits where it has none to score.
        scores: of all rows, or of hits.
        payloads: of its rows.
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
            return np.array_equal(self.scores, other.scores) and (
                self.near is None or np.array_equal(self.near, other.near)
            )
        return bool(np.abs(self.scores - other.scores).max() <= 2e-5 * np.abs(other.scores).max())


def ask(index: Index) -> Answer:
    """All that an index can be asked, which must agree with itself."""
    if index.codec == "coarse":
        hits = index.search(query(), k=10)
        return Answer(hits.ids, hits.scores, [index.ids.tolist(), index.payloads()], None)
    scores = index.scores(query())
    near = None
    if index.coarse is not None:
        hits = index.search(query(), k=5, exact=False)
        columns = np.searchsorted(index.ids, hits.ids)
        if not np.abs(hits.scores - np.take_along_axis(scores, columns, 1)).max() <= 2e-5 * np.abs(scores).max():
            raise RuntimeError("a candidate's score is not the scan's")
        near = hits.ids
    return Answer(index.ids, scores, index.payloads(), near)


def answer(folder: Path) -> Answer:
    """Of the version that is there now, which must be whole."""
    with Index.open(folder) as index:
        index.verify()
        return ask(index)


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
    """

    case: Case
    operation: str
    start: Path | None
    before: Answer | None
    after: Answer
    generation: int
    changes: bool

    def begin(self, folder: Path) -> None:
        """Makes a folder as it is before the operation."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, folder)


def templates(case: Case, root: Path) -> list[Template]:
    """Every operation's undisturbed course: build; then add and remove; compact and refit of what these two left."""
    root.mkdir(parents=True, exist_ok=True)
    made: list[Template] = []

    def course(operation: str, start: Path | None) -> Path:
        folder = root / f"after-{operation}"
        if start is not None:
            shutil.copytree(start, folder)
        before, generation = (None, -1) if start is None else (answer(start), generation_of(start))
        run(case, operation, folder)
        changes = generation_of(folder) != generation
        made.append(Template(case, operation, start, before, answer(folder), generation, changes))
        return folder

    built = course("build", None)
    added = course("add", built)
    removed = course("remove", added)
    course("compact", removed)
    course("refit", removed)
    return made


def generation_of(folder: Path) -> int:
    with Index.open(folder) as index:
        return index.generation


def settle(template: Template, folder: Path) -> list[str]:
    """What is wrong with an index whose change was cut off, before and after that is made again; [] if nothing."""
    wrong: list[str] = []
    committed = (folder / "manifest.json").exists() if template.before is None else False
    if template.before is not None:
        committed = generation_of(folder) != template.generation
    found = answer(folder) if template.before is not None or committed else None
    if found is not None:
        expected = template.after if committed else template.before
        if expected is None or not found.same(expected, exactly=not committed):
            wrong.append(f"the version {'after' if committed else 'before'} it answers otherwise than it did")
    if not committed:
        run(template.case, template.operation, folder)
    begun = template.changes and not committed and template.before is not None
    if begun and generation_of(folder) == template.generation:
        wrong.append("made again, it changed nothing")
    again = answer(folder)
    if not again.same(template.after, exactly=template.operation == "build"):
        wrong.append("made again, it answers otherwise than an undisturbed one")
    extra = leftovers(folder)
    if not committed and extra:
        wrong.append(f"left behind: {extra}")
    return wrong


def leftovers(folder: Path) -> list[str]:
    """Files that no version needs."""
    with Index.open(folder) as index:
        named = {file.info.file for file in index._reader.files()}
    return sorted(item.name for item in folder.iterdir() if item.name not in named | OWN_NAMES)


def attempt(check: Callable[[], list[str]]) -> list[str]:
    """What a check finds, or what it raises."""
    try:
        return check()
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:300]}"]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_manifest(path: Path, data: dict[str, Any]) -> None:
    """A manifest with the checksum that the format asks for."""
    zeros = "0" * 32
    body = json.dumps({"checksum": zeros} | {k: v for k, v in data.items() if k != "checksum"}).encode()
    path.write_bytes(body.replace(zeros.encode(), xxhash.xxh3_128_hexdigest(body).encode(), 1))

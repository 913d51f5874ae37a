"""Readers while a writer changes everything: each answer must be one version's."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.faults_cases import MORE, ROWS, Case, N, blocks, query
from lorif_index import Index

READERS = 4


def answered(index: Index) -> str:
    """What an index answers, in short; its candidate search must agree with its scan."""
    scores, ids = index.scores(query()), index.ids
    exact, near = (index.search(query(), k=5, exact=way) for way in (True, False))
    for hits in (exact, near):
        columns = np.searchsorted(ids, hits.ids)
        if not np.array_equal(ids[columns], hits.ids):
            raise RuntimeError("a search and a scan of two versions")
        if np.abs(hits.scores - np.take_along_axis(scores, columns, 1)).max() > 2e-5 * np.abs(scores).max():
            raise RuntimeError("scores of two versions")
    parts = [scores.tobytes(), ids.tobytes(), json.dumps(exact.payloads).encode(), near.ids.tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read(folder: Path, until: float, number: int, out: Path) -> None:
    seen: list[tuple[int, str]] = []
    errors: list[str] = []
    held = Index.open(folder)
    while time.monotonic() < until:
        try:
            if number % 2:
                held.close()
                held = Index.open(folder)
            else:
                held.refresh()
            for _ in range(2):
                # Twice: the version may have been replaced in between, and still is whole.
                seen.append((held.generation, answered(held)))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            held = Index.open(folder)
    out.write_text(json.dumps({"seen": seen, "errors": errors}))


def reader_trials(case: Case, root: Path, seconds: float) -> dict[str, Any]:
    """Four readers and one writer for some time."""
    folder = root / "live"
    index = Index.build(folder, config=case.config, progress=False, **case.given(0, N))
    truth = {index.generation: answered(index)}
    until = time.monotonic() + seconds
    children = []
    for number in range(READERS):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                _read(folder, until, number, root / f"reader-{number}.json")
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    made: Counter[str] = Counter()
    while time.monotonic() < until:
        for name in ("add", "remove", "compact", "refit", "rebuild_coarse"):
            if name == "add":
                kept = [{"number": i} for i in range(MORE)]
                index.add(gradients=blocks(ROWS[N:]), payloads=kept, progress=False)
            elif name == "remove":
                index.remove(index.ids[-MORE:])
            else:
                getattr(index, name)(progress=False)
            made[name] += 1
            truth[index.generation] = answered(index)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    wrong = [f"a reader ended with {status}" for status in statuses if status]
    answers, versions = 0, set()
    for number in range(READERS):
        path = root / f"reader-{number}.json"
        if not path.exists():
            continue
        told = json.loads(path.read_text())
        wrong += told["errors"]
        for generation, what in told["seen"]:
            answers += 1
            versions.add(generation)
            if truth.get(generation) != what:
                wrong.append(f"an answer that version {generation} does not give")
    index.verify()
    return {
        "readers": READERS,
        "answers": answers,
        "versions_written": len(truth),
        "versions_read": len(versions),
        "changes": dict(made),
        "wrong": wrong,
    }

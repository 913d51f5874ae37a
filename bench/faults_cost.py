"""What the checks cost: digests and synced renames while building, comparisons while searching."""

from __future__ import annotations

import os
import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.environment import timed
from lorif_index import BuildConfig, Index
from lorif_index.storage.sealed import SealedFile
from lorif_index.storage.shards import Part
from lorif_index.storage.store import VERIFY


def _given(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    low = torch.randn(64, 2048, generator=generator)
    blocks = []
    for _ in range(-(-count // 500)):
        part = torch.randn(500, 64, generator=generator) @ low + torch.randn(500, 2048, generator=generator)
        blocks.append({"a": part[:, :1024].reshape(-1, 32, 32), "b": part[:, 1024:].reshape(-1, 32, 32)})
    return blocks


def _nothing_checked() -> Any:
    """Without digests, checksums and syncs: what a build would do if it trusted the disk."""
    stack = mock.patch.multiple(
        "lorif_index.storage.sealed", file_digest=lambda path: "0" * 32, sync_folder=lambda folder: None
    )
    sums = mock.patch("lorif_index.storage.shards._checksums", lambda raw: np.zeros(len(raw), dtype="<u8"))
    sync = mock.patch.object(os, "fsync", lambda fd: None)
    # A build looks at some of its rows at the end, and finds no digests there.
    read = mock.patch.object(SealedFile, "verify", lambda self: None)
    rows = mock.patch.object(Part, "check", lambda self, positions, rows, places: None)
    return stack, sums, sync, read, rows


def costs(root: Path, count: int, repeats: int) -> dict[str, Any]:
    """Medians of builds, scans and candidate searches with and without the checks, in turn."""
    given = _given(count)
    config = BuildConfig(store="factors", rank=4, curvature_rank=64, sketch_dim=64, coarse="PQ32x4fs")
    folder = root / "cost"

    def build(coarse: str | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        chosen = BuildConfig(**{**_fields(config), "coarse": coarse})
        Index.build(folder, gradients=given, config=chosen, progress=False).close()

    build(None)
    times: dict[str, list[float]] = {"build": [], "build, nothing checked": []}
    for _ in range(max(repeats // 3, 1)):
        times["build"].append(timed(lambda: build(None)))
        with ExitStack() as stack:
            for part in _nothing_checked():
                stack.enter_context(part)
            times["build, nothing checked"].append(timed(lambda: build(None)))
    build(config.coarse)
    asked = {name: part[:4] for name, part in given[0].items()}
    opened = {verify: Index.open(folder, verify=verify) for verify in VERIFY}
    for verify, index in opened.items():
        index.scores(asked)
        index.search(asked, k=10, exact=False)
        times[f"first scan of a new handle, verify={verify}"] = []
        times[f"further scan, verify={verify}"] = []
        times[f"candidate search, verify={verify}"] = []
    for _ in range(repeats):
        for verify, index in opened.items():
            fresh = Index.open(folder, verify=verify)
            # The curvature is loaded and inverted once for either: here only the scan is compared.
            fresh.curvature["a"], fresh.curvature["b"]
            times[f"first scan of a new handle, verify={verify}"].append(timed(lambda f=fresh: f.scores(asked)))  # type: ignore[misc]
            times[f"further scan, verify={verify}"].append(timed(lambda i=index: i.scores(asked)))  # type: ignore[misc]
            times[f"candidate search, verify={verify}"].append(
                timed(lambda i=index: i.search(asked, k=10, exact=False))  # type: ignore[misc]
            )
            fresh.close()
    bare = statistics.median(_candidate_times(opened["never"], asked, repeats))
    milliseconds = {name: round(1e3 * statistics.median(taken), 3) for name, taken in times.items()}
    milliseconds["candidate search, rows not compared"] = round(1e3 * bare, 3)
    ratios = {
        "build": _ratio(milliseconds, "build", "build, nothing checked"),
        "candidate search": _ratio(
            milliseconds, "candidate search, verify=first", "candidate search, rows not compared"
        ),
    }
    for kind in ("first scan of a new handle", "further scan"):
        for verify in ("first", "always"):
            ratios[f"{kind}, verify={verify}"] = _ratio(
                milliseconds, f"{kind}, verify={verify}", f"{kind}, verify=never"
            )
    size = sum(path.stat().st_size for path in folder.iterdir())
    for index in opened.values():
        index.close()
    return {"rows": count, "bytes": size, "repeats": repeats, "milliseconds": milliseconds, "ratios": ratios}


def _candidate_times(index: Index, asked: Any, repeats: int) -> list[float]:
    with mock.patch("lorif_index.storage.shards.Part.check", lambda *_: None):
        return [timed(lambda: index.search(asked, k=10, exact=False)) for _ in range(max(repeats, 3))]


def _ratio(times: dict[str, float], above: str, below: str) -> float:
    return round(times[above] / times[below], 3)


def _fields(config: BuildConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("store", "rank", "curvature_rank", "sketch_dim", "coarse")}

"""Growth: further examples become further shards, encoded as the build encoded its own; the curvature stays.

An interrupted addition leaves its shards and `adding.json` behind, and goes on from there when the same is added again.
Until the manifest is replaced, no reader sees any of it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..build.encode import encode_blocks
from ..capture.gradients import GradientSource, finite_blocks
from ..errors import DataError, StoreError
from ..progress import Reporter
from ..search.coarse import load_faiss
from ..search.reader import Reader
from ..storage.manifest import ADDING, Manifest, read_manifest
from ..storage.payloads import Payloads
from ..storage.store import StoreWriter
from .candidates import grow_codes


def check_addition(data: Any, gradients: Any, model: Any, from_model: bool) -> None:
    """Either data, for an index that has its model, or gradients, for one that was built from some.

    Raises:
        DataError: anything else.
    """
    if (data is None) == (gradients is None):
        given = "both" if data is not None else "neither"
        raise DataError(f"pass either data or gradients=; {given} of them was given")
    if data is not None and not from_model:
        raise DataError("the index was built from gradients: pass gradients= to add, too")
    if data is not None and model is None:
        raise DataError("data needs the index's model to take gradients of: Index.open(path, model=..., loss=...)")


def add_examples(
    reader: Reader,
    source: GradientSource,
    digest: str,
    payloads: Payloads | None,
    report: Reporter,
    device: torch.device,
) -> Manifest:
    """Appends examples to an index, and commits its next version.

    Args:
        reader: of the newest version; the writer's lock is held.
        source: gradients of the examples, projected as the index's.
        digest: tells these examples from others.
        payloads: of the examples, or None.
        report: is told.
        device: where gradients are encoded.

    Raises:
        DataError: no example is left. NonFiniteError: inf or NaN, where the config says "error". ConfigError: the index
        has a coarse stage and faiss is not installed.
    """
    if reader.manifest.coarse is not None:
        load_faiss()
    pending = {
        "data": digest,
        "examples": source.count,
        "generation": reader.manifest.generation,
        "payloads": None if payloads is None else payloads.digest,
    }
    manifest = _unfinished(reader, pending)
    _append_rows(reader, manifest, source, payloads, report, device)
    grow_codes(reader, manifest, report)
    if len(manifest.shards) == len(reader.manifest.shards):
        raise DataError(f"no example is left to add: all {source.count} were skipped for inf or NaN")
    manifest.pending = None
    manifest.commit(reader.folder)
    (reader.folder / ADDING).unlink(missing_ok=True)
    return manifest


def _unfinished(reader: Reader, pending: dict[str, Any]) -> Manifest:
    """The manifest of an interrupted addition of the same examples, or of a new one."""
    if (reader.folder / ADDING).is_file():
        try:
            found = read_manifest(reader.folder, ADDING)
        except StoreError:
            # It was never part of the index.
            found = None
        if found is not None and found.pending == pending:
            return found
    fresh = reader.manifest.copy()
    fresh.next_id += pending["examples"]
    fresh.pending = pending
    return fresh


def _append_rows(
    reader: Reader,
    manifest: Manifest,
    source: GradientSource,
    payloads: Payloads | None,
    report: Reporter,
    device: torch.device,
) -> None:
    folder, shift = reader.folder, reader.manifest.next_id
    begun = len(manifest.shards) > len(reader.manifest.shards)
    start = manifest.shards[-1].last_id + 1 - shift if begun else 0
    skipped = [i - shift for i in manifest.skipped if shift <= i < shift + start]
    before = [i for i in manifest.skipped if i < shift]

    def note() -> None:
        manifest.skipped = before + [shift + i for i in sorted(skipped)]

    def on_sealed() -> None:
        note()
        manifest.write(folder, ADDING)

    encoder, size = reader.codec.encoder(device), reader.config.compute.shard_bytes
    writer = StoreWriter(folder, reader.codec.row_bytes, size, manifest.shards, manifest.naming("shard"))
    with report.stage("encode", source.count - start) as stage:
        blocks = finite_blocks(source.blocks(start), reader.config.on_nonfinite, skipped)
        encode_blocks(blocks, encoder, writer, stage, on_sealed, window=source.window, payloads=payloads, shift=shift)
    note()
    # Whatever comes after this is done again quickly.
    manifest.write(folder, ADDING)

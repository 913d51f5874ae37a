"""Keeping: `lorif add`, `remove`, `refit`, `compact`, `merge`, `verify`, `repair`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CorruptionError, QueryError
from ..index import Index
from ..storage.damage import damage_message, find_damage
from ..storage.manifest import read_manifest
from ..text.documents import read_documents
from ..text.textindex import open_text_index, text_facts
from .app import app, reported_errors
from .options import Device, IndexFolder, Json, MovedModel, SourceField, TextField
from .show import write, write_index


@app.command()
def add(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` made.")],
    data: Annotated[Path, typer.Option(help="Further texts, in any form that `lorif build` takes.")],
    text_field: TextField = "text",
    source_field: SourceField = None,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Index further texts; they can be found at once, and the curvature stays as it is."""
    with reported_errors():
        documents = read_documents(data, text_field=text_field, source_field=source_field)
        opened, text_model = open_text_index(index, model=model, device=device)
        with opened:
            facts = text_facts(opened)
            if "max_length" not in facts:
                raise QueryError(
                    f"{index} was not made by `lorif build`, so it does not say how texts are cut: use Index.add"
                )
            passages = text_model.passages(documents, max_length=facts["max_length"], folder=index.parent)
            ids = opened.add(passages, payloads=passages).tolist()
            write({"ids": ids, "examples": len(opened), "curvature_age": opened.curvature_age}, json)


@app.command()
def remove(
    index: IndexFolder,
    ids: Annotated[list[int], typer.Argument(help="Ids of the examples, as search shows them.")],
    json: Json = False,
) -> None:
    """Remove examples: no later answer has them. `compact` takes them off the disk."""
    with reported_errors(), Index.open(index) as opened:
        removed = opened.remove(ids)
        write({"removed": removed, "examples": len(opened)}, json)


@app.command()
def refit(index: IndexFolder, json: Json = False) -> None:
    """Renew curvature, sketch and coarse index from what is stored, without the model."""
    with reported_errors(), Index.open(index) as opened:
        write(opened.refit(), json)


@app.command()
def compact(index: IndexFolder, json: Json = False) -> None:
    """Take removed examples off the disk, and join small shards. Files that are being read ("held") go later."""
    with reported_errors(), Index.open(index) as opened:
        write(opened.compact(), json)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The merged index: a new folder.")],
    indexes: Annotated[list[Path], typer.Argument(help="Indexes of one fit, in the order of their examples.")],
    json: Json = False,
) -> None:
    """Make one index of several that were built with the same fit."""
    with reported_errors(), Index.merge(out, indexes) as merged:
        write_index(merged, json)


@app.command()
def verify(index: IndexFolder, json: Json = False) -> None:
    """Compare every byte of an index with its checksums. Exit code 1 where something differs."""
    with reported_errors():
        found = find_damage(index, read_manifest(index))
        if json or not found:
            write({"whole": not found, "damaged": [asdict(damage) for damage in found]}, json)
        if found:
            raise CorruptionError(damage_message(index, found))


@app.command()
def repair(index: IndexFolder, json: Json = False) -> None:
    """Drop what is damaged, and make again what can be made from the rest. Nothing is deleted."""
    with reported_errors():
        write(Index.repair(index), json)

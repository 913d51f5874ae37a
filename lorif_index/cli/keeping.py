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
from .show import console, in_units, index_json, write_json


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
            passages = text_model.passages(
                documents, max_length=facts["max_length"], stride=facts["stride"], folder=index.parent
            )
            ids = opened.add(passages, payloads=passages).tolist()
            age = opened.curvature_age
            if json:
                write_json({"ids": ids, "examples": len(opened), "curvature_age": age})
                return
            share = "an unknown share" if age["new_trace"] is None else f"{age['new_trace']:.1%}"
            console().print(
                f"{len(ids):,} passages added, {len(opened):,} in all; {share} of the squared gradient norm is of "
                "passages that the curvature has not seen."
            )


@app.command()
def remove(
    index: IndexFolder,
    ids: Annotated[list[int], typer.Argument(help="Ids of the examples, as search shows them.")],
    json: Json = False,
) -> None:
    """Remove examples: no later answer has them. `compact` takes them off the disk."""
    with reported_errors(), Index.open(index) as opened:
        removed = opened.remove(ids)
        if json:
            write_json({"removed": removed, "examples": len(opened)})
            return
        console().print(f"{removed:,} removed, {len(opened):,} left. Next: lorif compact {index}")


@app.command()
def refit(index: IndexFolder, json: Json = False) -> None:
    """Renew curvature, sketch and coarse index from what is stored, without the model."""
    with reported_errors(), Index.open(index) as opened:
        done = opened.refit()
        if json:
            write_json(done)
            return
        console().print(f"renewed: {', '.join(done['renewed']) or 'nothing'}")
        for name, why in done["kept"].items():
            console().print(f"kept: {name} ({why})")


@app.command()
def compact(index: IndexFolder, json: Json = False) -> None:
    """Take removed examples off the disk, and join small shards."""
    with reported_errors(), Index.open(index) as opened:
        done = opened.compact()
        if json:
            write_json(done)
            return
        console().print(f"{in_units(max(done['bytes'], 0))} freed.")
        if done["held"]:
            console().print(f"{len(done['held'])} files are still being read, and go with the next change after that.")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The merged index: a new folder.")],
    indexes: Annotated[list[Path], typer.Argument(help="Indexes of one fit, in the order of their examples.")],
    json: Json = False,
) -> None:
    """Make one index of several that were built with the same fit."""
    with reported_errors(), Index.merge(out, indexes) as merged:
        if json:
            write_json(index_json(merged))
        else:
            console().print(f"{len(merged):,} examples in {out}.")


@app.command()
def verify(index: IndexFolder, json: Json = False) -> None:
    """Compare every byte of an index with its checksums. Exit code 1 where something differs."""
    with reported_errors():
        found = find_damage(index, read_manifest(index))
        if json:
            write_json({"whole": not found, "damaged": [asdict(damage) for damage in found]})
        if found:
            raise CorruptionError(damage_message(index, found))
        if not json:
            console().print(f"{index}: every file is as it was sealed.")


@app.command()
def repair(index: IndexFolder, json: Json = False) -> None:
    """Drop what is damaged, and make again what can be made from the rest. Nothing is deleted."""
    with reported_errors():
        done = Index.repair(index)
        if json:
            write_json(done)
            return
        screen = console()
        if not done["dropped"] and not done["rebuilt"]:
            screen.print(f"{index}: nothing is damaged.")
        for part in done["dropped"]:
            screen.print(
                f"dropped: {part['file']}, {part['rows']:,} examples with ids {part['first_id']} to {part['last_id']}"
            )
        if done["rebuilt"]:
            screen.print(f"made again: {', '.join(done['rebuilt'])}")

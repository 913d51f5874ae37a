"""Keeping: `lorif add`, `find`, `remove`, `refit`, `compact`, `merge`, `verify`, `repair`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CorruptionError, QueryError
from ..index import Index
from ..storage.damage import damage_message, find_damage
from ..storage.manifest import read_manifest
from ..text.documents import read_documents
from ..text.passages import Passages, described
from ..text.textindex import open_text_index, text_facts
from ..web.charts import family
from .app import app, reported_errors
from .options import Device, IndexFolder, Json, MovedModel, SourceField, TextField
from .show import write, write_index

_AT_ONCE = 10_000


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
    """Index further texts of the training; they can be found at once, and the curvature stays as it is."""
    with reported_errors(), _opened_with(index, data, text_field, source_field, model, device) as (opened, passages):
        ids = opened.add(passages, payloads=passages).tolist()
        write({"ids": ids, "examples": len(opened), "curvature_age": opened.curvature_age}, json)


@app.command()
def find(
    index: Annotated[Path, typer.Argument(help="An index that `lorif build` made.")],
    data: Annotated[Path, typer.Option(help="Texts to look for, in any form that `lorif build` takes.")],
    text_field: TextField = "text",
    source_field: SourceField = None,
    model: MovedModel = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find which of some texts are in an index, token for token, cut into passages as there."""
    with reported_errors(), _opened_with(index, data, text_field, source_field, model, device) as (opened, passages):
        there = [
            {"passage": number, "source": passages[number]["source"], "ids": ids.tolist()}
            for number, ids in enumerate(opened.find(passages))
            if len(ids)
        ]
        write({"passages": len(passages), "found": len(there), "there": there}, json)


@contextmanager
def _opened_with(
    index: Path, data: Path, text_field: str, source_field: str | None, model: Path | None, device: str
) -> Iterator[tuple[Index, Passages]]:
    """An index, and texts cut as its own were, with sources from the same field where none is named."""
    opened, text_model = open_text_index(index, model=model, device=device)
    with opened:
        facts = text_facts(opened)
        if "max_length" not in facts:
            raise QueryError(
                f"{index} was not made by `lorif build`, so it does not say how texts are cut: use Index.add and "
                "Index.find"
            )
        usual = (facts.get("origin") or {}).get("source_field") or "source"
        documents = read_documents(data, text_field=text_field, source_field=source_field, usual_source=usual)
        yield opened, text_model.passages(documents, max_length=facts["max_length"], folder=index.parent)


@app.command()
def remove(
    index: IndexFolder,
    ids: Annotated[list[int] | None, typer.Argument(help="Ids of the examples, as search shows them.")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="All examples of a source, by its name or a glob pattern; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Remove examples: no later answer has them. `compact` takes them off the disk."""
    if not ids and not source:
        raise typer.BadParameter("nothing to remove: name ids, or a --source")
    with reported_errors(), Index.open(index) as opened:
        removed = opened.remove([*(ids or []), *_of_sources(opened, source or [])])
        write({"removed": removed, "examples": len(opened)}, json)


def _of_sources(opened: Index, patterns: list[str]) -> list[int]:
    """Ids of the examples with a source that has one of the names, with or without its part or line."""
    found: dict[str, list[int]] = {pattern: [] for pattern in patterns}
    for start in range(0, len(opened) if patterns else 0, _AT_ONCE):
        some = opened.ids[start : start + _AT_ONCE]
        for i, payload in zip(some.tolist(), opened.payloads(some), strict=True):
            name = described(payload)[1]
            if name is not None:
                for pattern, mine in found.items():
                    if fnmatchcase(name, pattern) or fnmatchcase(family(name), pattern):
                        mine.append(i)
    for pattern, mine in found.items():
        if not mine:
            raise QueryError(f"{opened.path} has no example with a source {pattern!r}: `lorif search` shows sources")
    return [i for mine in found.values() for i in mine]


@app.command()
def refit(index: IndexFolder, json: Json = False) -> None:
    """Renew what can be made of stored rows, without the model: the coarse index, and of factors the curvature."""
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

"""Documents: the texts in a file, a folder of files or a saved data set, each with where it is from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

_ENDINGS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text as it was found.

    Attributes:
        text: all of it.
        source: where it is from: a file, a line of a file, or what the source field says.
    """

    text: str
    source: str


def read_documents(
    path: str | os.PathLike[str],
    *,
    text_field: str = "text",
    source_field: str | None = None,
    usual_source: str = "source",
) -> Iterator[Document]:
    """Documents of a .txt file (one), a .jsonl file (one a line), a folder of such files, or a saved `datasets` folder.

    Args:
        path: the file or folder; files in a folder, and in folders in it, are taken in the order of their names.
        text_field: the field or column that holds the text, in .jsonl and datasets.
        source_field: the field or column that says where it is from; default: `usual_source`, in rows that have it,
            else file and line, or the row's number.
        usual_source: see there.

    Raises:
        DataError: nothing there, of another kind, not UTF-8, not JSON, or without the field; the message names the
            file and line.
    """
    for place, found in read_rows(path):
        if isinstance(found, Document):
            yield found
            continue
        text = _field(found, text_field, place)
        if not isinstance(text, str):
            raise DataError(f"{place}: field {text_field!r} holds {type(text).__name__}, not text")
        named = found.get(usual_source) if source_field is None else _field(found, source_field, place)
        yield Document(text, place if named is None else str(named))


def _field(row: Any, field: str, place: str) -> Any:
    if not isinstance(row, dict):
        raise DataError(f"{place} is no JSON object, but of type {type(row).__name__}")
    if field not in row:
        raise DataError(f"{place} has no field {field!r}, only {sorted(map(str, row))}: name the right one")
    return row[field]


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """(place, document or row) of all that is at a path; raises as `read_documents`."""
    path = Path(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        raise DataError(f"{path} holds several datasets, {splits}: pass the folder of one of them")
    if (path / "state.json").is_file():
        yield from _saved_dataset(path)
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .txt or .jsonl file in it, and is no saved dataset")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if not file.exists():
            raise DataError(f"{path} does not exist: pass a .txt or .jsonl file, a folder of them, or a saved dataset")
        if file.suffix == ".jsonl":
            yield from _lines(file, name)
        elif file.suffix == ".txt":
            try:
                yield name, Document(file.read_text(encoding="utf-8-sig"), name)
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is not UTF-8 ({error}): convert it") from None
        else:
            raise DataError(f"{path} ends neither in .txt nor in .jsonl: rename it, or convert it")


def _lines(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    # In bytes: a record ends at a newline, not at the other marks that Python counts as ends of lines.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON ({error})") from None
            yield place, row


def _saved_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes the package raise
        raise DataError(f"{path} cannot be read as a saved dataset: {error}") from error
    for number, row in enumerate(dataset):
        yield f"row {number}", row

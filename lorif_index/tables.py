"""Tables: results as data sets of Hugging Face and as Parquet files, with what is known of each example beside it."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .capture.data import as_tensors
from .errors import ConfigError, DataError


def picked_from(pieces: Sequence[tuple[int, Any]], ids: np.ndarray) -> Iterator[Any]:
    """The examples with some ids, in their order.

    Args:
        pieces: (id of the first example, data) that were given: datasets, or tensors in a tuple or dict.
        ids: (n,).

    Raises:
        DataError: data that can only be walked, or that do not have an example.
    """
    firsts = [first for first, _ in pieces]
    for i in ids.tolist():
        place = bisect_right(firsts, i) - 1
        first, data = pieces[place] if place >= 0 else (0, ())
        yield _example(data, i - first, i)


def _example(data: Any, at: int, number: int) -> Any:
    data = as_tensors(tuple(data) if _is_list_of_tensors(data) else data)
    try:
        if isinstance(data, torch.Tensor):
            return {"x": data[at].tolist()}
        if isinstance(data, Mapping) and all(isinstance(part, torch.Tensor) for part in data.values()):
            return {key: part[at].tolist() for key, part in data.items()}
        if isinstance(data, tuple) and data and all(isinstance(part, torch.Tensor) for part in data):
            return {name: part[at].tolist() for name, part in zip(("x", "y", "z"), data, strict=False)}
        return data[at]
    except (IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"the data ({type(data).__name__}) do not give example {number} ({type(error).__name__}): pass data=, the "
            "dataset that the index was built from"
        ) from None


def _is_list_of_tensors(data: Any) -> bool:
    return isinstance(data, list) and bool(data) and all(isinstance(part, torch.Tensor) for part in data)


def can_be_picked(data: Any) -> bool:
    """Whether examples are had by their numbers, and not by walking alone."""
    return hasattr(data, "__getitem__")


def merged(columns: Mapping[str, Sequence[Any]], examples: Sequence[Any] | None) -> dict[str, list[Any]]:
    """Columns, and those of what is known of each row: fields of dicts, "text" of strings, "example" of anything else.
    A field with the name of a column gets "data." before it; one that an example lacks is None there."""
    out = {name: list(values) for name, values in columns.items()}
    rows = [_fields(example) for example in examples or ()]
    for key in dict.fromkeys(key for row in rows for key in row):
        out[f"data.{key}" if key in columns else key] = [row.get(key) for row in rows]
    return out


def _fields(example: Any) -> dict[str, Any]:
    if example is None:
        return {}
    if isinstance(example, Mapping):
        return {str(key): _plain(value) for key, value in example.items()}
    return {"text": example} if isinstance(example, str) else {"example": _plain(example)}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def to_dataset(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A Hugging Face `Dataset` of columns.

    Raises:
        ConfigError: datasets is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("to_dataset needs datasets, which is not installed: pip install datasets") from None
    return datasets.Dataset.from_dict(dict(columns))


def to_parquet(columns: Mapping[str, Sequence[Any]], path: str | os.PathLike[str]) -> None:
    """Writes columns to a Parquet file.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("to_parquet needs pyarrow, which is not installed: pip install pyarrow") from None
    parquet.write_table(pyarrow.table(dict(columns)), os.fspath(path))

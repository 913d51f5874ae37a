"""Manifests as somebody else might have written them: changed, with a checksum that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **fields: Any) -> None:
    """Changes fields of a folder's manifest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    if change is not None:
        change(data)
    write(path, data | fields)


def write(path: Path, data: dict[str, Any]) -> None:
    """A manifest with the checksum that the format asks for (docs/format.md)."""
    zeros = "0" * 32
    data = {"checksum": zeros} | {k: v for k, v in data.items() if k != "checksum"}
    body = json.dumps(data).encode()
    path.write_bytes(body.replace(zeros.encode(), xxhash.xxh3_128_hexdigest(body).encode(), 1))

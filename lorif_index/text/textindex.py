"""Text index: an `Index` of passages, whose payloads are the passages and whose metadata names the model's folder.

What `lorif build` makes and `lorif search` asks. All else is the index's own: `index.search("What the model said.")`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..build.state import check_free
from ..config import BuildConfig
from ..errors import DataError, QueryError
from ..index import Index
from ..progress import ProgressCallback
from .documents import Document
from .model import TextModel, load_text_model

METADATA = "text"
"""The key under which an index's metadata hold the model's folder, and how texts were cut."""


def build_text_index(
    out: str | os.PathLike[str],
    text_model: TextModel,
    documents: Iterable[Document],
    *,
    max_length: int | None = None,
    config: BuildConfig | None = None,
    origin: dict[str, Any] | None = None,
    progress: bool | ProgressCallback | None = None,
) -> Index:
    """Cuts documents into passages and builds their index, which keeps the passages and the model's folder.

    Args:
        out: a folder, as for `Index.build`.
        text_model: the trained model.
        documents: walked once.
        max_length: in tokens, as for `TextModel.passages`.
        config: as for `Index.build`.
        origin: plain JSON values remembered with the index: where the documents are from.
        progress: as for `Index.build`.

    Raises:
        ConfigError: max_length beyond the model's context. DataError: no passage, or as the documents raise.
            Else as `Index.build`.
    """
    out = Path(out)
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    passages = text_model.passages(documents, max_length=max_length, folder=out.parent, progress=progress)
    facts = {
        "model": str(text_model.folder.resolve()),
        "max_length": passages.max_length,
        "tokens": passages.tokens,
        "documents": passages.documents,
        "origin": origin or {},
    }
    return Index.build(
        out,
        model=text_model.model,
        data=passages,
        tokenizer=text_model.tokenizer,
        config=config,
        metadata={METADATA: facts},
        payloads=passages,
        progress=progress,
    )


def open_text_index(
    path: str | os.PathLike[str], *, model: str | os.PathLike[str] | None = None, device: str = "auto"
) -> tuple[Index, TextModel]:
    """Opens an index to be asked in words, and the model that it remembers.

    Args:
        path: the index.
        model: the model's folder, if it is no longer where it was at the build, or the index remembers none.
        device: as for `load_text_model`.

    Raises:
        QueryError: the index remembers no model and none is given. Else as `Index.open` and `load_text_model`.
    """
    folder = remembered_model(path) if model is None else Path(model)
    if folder is None:
        raise QueryError(f"{path} was not made by `lorif build`, so it knows no model: pass --model FOLDER")
    if model is None and not folder.is_dir():
        raise DataError(f"the model that {path} was built from is no longer at {folder}: pass --model FOLDER")
    text_model = load_text_model(folder, device)
    return Index.open(path, model=text_model.model, tokenizer=text_model.tokenizer), text_model


def remembered_model(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the model that an index was built from, wherever that is now; None where the index names none."""
    with Index.open(path) as bare:
        named = text_facts(bare).get("model")
    return Path(named) if isinstance(named, str) else None


def text_facts(index: Index) -> dict[str, Any]:
    """What `build_text_index` remembered; empty for other indexes."""
    facts = index.metadata.get(METADATA)
    return facts if isinstance(facts, dict) else {}

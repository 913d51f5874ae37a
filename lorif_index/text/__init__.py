"""Text: how words become examples of an index, and questions to it.

`Index.build(model=..., data=..., tokenizer=...)` and `index.search("...")` use it by themselves; what is here is for
more say, for files of text (`lorif build`), and for a trainer of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .documents import Document, read_documents
from .model import TextModel, load_text_model
from .packed import UnpackedDocuments
from .preferences import DPOLoss, PreferencePairs
from .textquestions import TextQuestion, read_questions
from .tokenised import TokenisedData

if TYPE_CHECKING:
    from .callback import IndexCallback
    from .textindex import build_text_index, open_text_index

__all__ = [
    "DPOLoss",
    "Document",
    "IndexCallback",
    "PreferencePairs",
    "TextModel",
    "TextQuestion",
    "TokenisedData",
    "UnpackedDocuments",
    "build_text_index",
    "load_text_model",
    "open_text_index",
    "read_documents",
    "read_questions",
]


def __getattr__(name: str) -> Any:
    # These stand on `Index`, which stands on the others.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(".callback" if name == "IndexCallback" else ".textindex", __name__), name)

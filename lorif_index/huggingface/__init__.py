"""For users of transformers, datasets and peft: texts, chats and packed rows as examples; a trainer's callback.

`Index.build(model=..., data=..., tokenizer=...)` uses the first two by itself; the names here are for more say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import IndexCallback
    from .documents import UnpackedDocuments
    from .tokenised import TokenisedData

__all__ = ["IndexCallback", "TokenisedData", "UnpackedDocuments"]

_PLACES = {"IndexCallback": "callback", "TokenisedData": "tokenised", "UnpackedDocuments": "documents"}


def __getattr__(name: str) -> Any:
    # Late: the callback stands on `Index`, which stands on the others.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)

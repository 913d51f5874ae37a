"""Bergson: gradients that Bergson (EleutherAI) has stored, as an index's. Bergson itself is not needed to read them."""

from .store import BergsonStore

__all__ = ["BergsonStore"]

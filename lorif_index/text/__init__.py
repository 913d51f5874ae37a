"""Text: language models and passages on top of the engine, and the demo."""

from .textindex import TextIndex, build_text_index, load_text_model
from .texts import Document, read_documents

__all__ = ["Document", "TextIndex", "build_text_index", "load_text_model", "read_documents"]

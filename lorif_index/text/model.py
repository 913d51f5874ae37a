"""Model: a causal language model with its tokenizer, from a local folder; what it makes of texts.

Nothing is downloaded, and only safetensors weights are read.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..capture.data import to_device
from ..capture.losses import IGNORE, default_loss
from ..errors import ConfigError, DataError
from ..progress import ProgressCallback
from .documents import Document
from .encoding import Needs
from .passages import Passages
from .tokenised import prepared_query

LONGEST_DEFAULT = 1024
"""Tokens in a passage where neither the user nor the model's context asks for fewer."""

# Tokens that are decoded with the next one, so that it looks as it does among others.
_BEFORE = 4


@dataclass(frozen=True)
class TextModel:
    """A causal language model with its tokenizer.

    Attributes:
        folder: where both are.
        model: in float32, whatever its file's dtype: gradients in half precision lose too much.
        tokenizer: of transformers.
    """

    folder: Path
    model: Any
    tokenizer: Any

    def passages(
        self,
        documents: Iterable[Document],
        *,
        max_length: int | None = None,
        folder: Path | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> Passages:
        """Documents cut into passages that the model can read.

        Args:
            max_length: in tokens; by default the model's context, at most 1024.
            documents, folder, progress: as for `Passages`.

        Raises:
            ConfigError: max_length beyond the model's context. Else as `Passages`.
        """
        longest = Needs.of(self.model, self.tokenizer).context
        if max_length is None:
            max_length = min(longest or LONGEST_DEFAULT, LONGEST_DEFAULT)
        elif longest is not None and max_length > longest:
            raise ConfigError(
                f"max_length={max_length} is above the model's context of {longest} tokens: pass at most that"
            )
        return Passages(documents, self.tokenizer, max_length=max_length, folder=folder, progress=progress)

    def losses(self, query: Any) -> list[tuple[int, float]]:
        """(tokens that have a loss, the model's loss on them in nats, summed) of each question.

        Args:
            query: in words, as for `Index.search`.

        Raises:
            QueryError: a question with no token that has a loss, or beyond the model's context.
        """
        data, out = prepared_query(query, self.model, self.tokenizer), []
        for i in range(len(data)):
            item = data[i]
            with torch.no_grad():
                loss = float(default_loss(self.model, to_device(data.collate_examples([item]), self.model.device)))
            out.append((sum(label != IGNORE for label in item.get("labels", item["input_ids"])[1:]), loss))
        return out

    def token_texts(self, query: Any) -> list[list[str]]:
        """What each token of each question adds to its text, beside `Explanation.query_tokens`; errors as `losses`.

        Payloads of an index of passages are such questions: their tokens are those of `Explanation.tokens`.
        """
        data = prepared_query(query, self.model, self.tokenizer)
        return [token_strings(data[i]["input_ids"], self.tokenizer) for i in range(len(data))]


def token_strings(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text, so that they join to it; a token that ends within a character adds nothing, and
    the one that completes it all of it.

    Args:
        ids: of the tokens.
        tokenizer: of transformers.
    """
    strings, begun = [], 0
    for end in range(1, len(ids) + 1):
        # A few tokens before, for tokenizers whose spaces depend on what precedes.
        start = max(begun - _BEFORE, 0)
        before, whole = (tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False) for stop in (begun, end))
        if whole.endswith("\ufffd") and end < len(ids):
            strings.append("")
            continue
        strings.append(whole[len(before) :])
        begun = end
    return strings


def load_text_model(folder: str | os.PathLike[str], device: str = "auto") -> TextModel:
    """Loads a folder written by `save_pretrained`, with its tokenizer.

    Args:
        folder: local; nothing is downloaded and no code in it is run.
        device: a torch device, or "auto": the first GPU if there is one, else the CPU.

    Raises:
        DataError: no such folder, or nothing in it that transformers can load. ConfigError: an unknown device.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder} {what}: pass a model folder as save_pretrained writes it, tokenizer included")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _nothing_collected():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    str(folder), local_files_only=True, use_safetensors=True
                )
        except Exception as error:  # whatever a folder of the wrong kind makes the package raise
            raise DataError(
                f"{folder} cannot be loaded as a causal language model with its tokenizer: {error}"
            ) from error
    try:
        model = model.float().to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the model cannot be moved to device {device!r}: {error}") from None
    return TextModel(folder, model.eval(), tokenizer)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No garbage collection inside: importing transformers makes a million objects that stay, and looking through them
    again and again takes a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside; as they were afterwards."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

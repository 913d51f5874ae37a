"""Text index: an index of passages under a causal language model, which remembers the model and the passages.

What `lorif build` makes and `lorif search --text` asks. Models come from local folders of transformers; nothing is
downloaded, and only safetensors weights are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..build.estimate import Estimate
from ..capture.losses import IGNORE, default_loss
from ..config import BuildConfig
from ..damping import Damping
from ..errors import ConfigError, DataError, IndexExistsError, QueryError
from ..index import Index
from ..progress import ProgressCallback, reporter
from ..results import Hits, SearchStats
from ..search.explain import Explanation
from ..storage.manifest import MANIFEST
from .texts import (
    LEAST_TOKENS,
    Document,
    Passage,
    PassageSpool,
    TokenWindows,
    cut,
    read_passages,
    token_strings,
    unlike,
)

METADATA = "text"
"""The key under which an index's metadata holds what is remembered here."""

LONGEST_DEFAULT = 1024
"""Tokens in a window where neither the user nor the model's context asks for fewer."""


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

    @property
    def context(self) -> int | None:
        """The longest input, in tokens, if the model says."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None


@dataclass(frozen=True)
class Cutting:
    """How documents were cut into passages.

    Attributes:
        documents, empty: how many there were, and how many of them have no passage.
        running, running_passages: how many of them are files of running text (.txt), and the passages of those.
        passages, tokens: in all.
        max_length, stride: in tokens: the longest passage, and from one passage of a document to the next.
    """

    documents: int
    empty: int
    running: int
    running_passages: int
    passages: int
    tokens: int
    max_length: int
    stride: int


@dataclass(frozen=True)
class Hit:
    """One found training passage.

    Attributes:
        id: the index's row id.
        score: influence on the question; score / N estimates, in nats, by how much the question's loss would rise
            without the passage.
        passage: its text and source; None where the index does not keep them.
    """

    id: int
    score: float
    passage: Passage | None


@dataclass(frozen=True)
class Answer:
    """What was found for one question.

    Attributes:
        text: the question.
        tokens: how many of its tokens have a loss.
        loss: the model's on the question, in nats, summed over those tokens.
        hits: best first.
        stats: of the search, which all questions asked together share.
    """

    text: str
    tokens: int
    loss: float
    hits: list[Hit]
    stats: SearchStats

    @property
    def loss_per_token(self) -> float:
        """The loss's mean over the tokens."""
        return self.loss / max(self.tokens, 1)


@dataclass(frozen=True)
class TextExplanation:
    """The score of a passage taken apart, with the texts of the tokens that the shares are of.

    Attributes:
        explanation: the shares.
        passage: None where the index does not keep them.
        tokens: (T,), the text that each token of the passage adds, beside `explanation.tokens`.
        query_tokens: (Tq,), the same of the question with its prompt, beside `explanation.query_tokens`.
    """

    explanation: Explanation
    passage: Passage | None
    tokens: list[str]
    query_tokens: list[str]

    def to_json(self) -> dict[str, Any]:
        """The explanation's values, with "texts" and "query_texts" of the tokens, and the passage's source and text."""
        passage = self.passage
        return self.explanation.to_json() | {
            "source": None if passage is None else passage.source,
            "text": None if passage is None else passage.text,
            "texts": list(self.tokens),
            "query_texts": list(self.query_tokens),
        }


def _passage(payload: Any) -> Passage | None:
    if not isinstance(payload, dict) or not {"text", "source"} <= set(payload):
        return None
    return Passage(str(payload["text"]), str(payload["source"]))


class _StoredPassages:
    """The passages of an index as its examples, by their ids: {"input_ids", "attention_mask"}, as at the build."""

    ready = True

    def __init__(self, index: Index, payloads: dict[int, Any], tokenizer: Any) -> None:
        self.payloads, self._tokenizer = payloads, tokenizer
        self._count = int(index.ids[-1]) + 1

    def __len__(self) -> int:
        return self._count

    def tokens(self, i: int) -> list[int]:
        """Of one passage.

        Raises:
            DataError: the index does not keep its text.
        """
        payload = self.payloads.get(i)
        if not isinstance(payload, dict) or not isinstance(payload.get("text"), str):
            raise DataError(f"the index keeps no text of example {i}: pass data=, what it was built from")
        kept = payload.get("tokens")
        return list(self._tokenizer(payload["text"], verbose=False)["input_ids"] if kept is None else kept)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.tokens(i), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load_text_model(folder: Path, device: str = "auto") -> TextModel:
    """Loads a folder written by `save_pretrained`, with its tokenizer.

    Args:
        folder: local; nothing is downloaded and no code in it is run.
        device: a torch device, or "auto": the first GPU if there is one, else the CPU.

    Raises:
        DataError: no such folder, or nothing in it that transformers can load. ConfigError: an unknown device.
    """
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder} {what}: pass a model folder as save_pretrained writes it, tokenizer included")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown to torch: {error}") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever a folder of the wrong kind makes the package raise
        raise DataError(f"{folder} cannot be loaded as a causal language model with its tokenizer: {error}") from error
    try:
        model = model.float().to(place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the model cannot be moved to device {device!r}: {error}") from None
    return TextModel(folder, model.eval(), tokenizer)


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


# -- building ----------------------------------------------------------------------------------------------------


def build_text_index(
    out: Path,
    text_model: TextModel,
    documents: Iterable[Document],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    config: BuildConfig | None = None,
    origin: dict[str, Any] | None = None,
    told: Callable[[Cutting], None] | None = None,
    progress: bool | ProgressCallback | None = None,
) -> Index:
    """Cuts documents into passages and builds their index, which keeps the passages and the model's folder.

    Args:
        out: a folder, as for `Index.build`.
        text_model: the trained model.
        documents: walked once.
        max_length, stride: in tokens, see `cut`; max_length is by default the model's context, at most 1024.
        config: as for `Index.build`.
        origin: plain JSON values remembered with the index: where the documents are from.
        told: is called with how they were cut, before gradients are taken.
        progress: as for `Index.build`.

    Raises:
        ConfigError: max_length beyond the model's context. DataError: no passage, or as the documents raise.
            Else as `Index.build`.
    """
    if (out / MANIFEST).exists():
        raise IndexExistsError(f"{out} already holds an index: ask it with `lorif search`, or choose another folder")
    max_length = _window_length(text_model, max_length)
    out.parent.mkdir(parents=True, exist_ok=True)
    with PassageSpool(out.parent) as passages:
        windows, cutting = _tokenise(documents, text_model, max_length, stride, passages, progress)
        if told is not None:
            told(cutting)
        facts = {
            "model": str(text_model.folder.resolve()),
            "max_length": max_length,
            "stride": cutting.stride,
            "documents": cutting.documents,
            "empty_documents": cutting.empty,
            "tokens": cutting.tokens,
            "passages": {"count": cutting.passages},
            "origin": origin or {},
        }
        return Index.build(
            out,
            model=text_model.model,
            data=windows,
            config=config,
            metadata={METADATA: facts},
            payloads=passages,
            progress=progress,
        )


def estimate_text_index(
    text_model: TextModel,
    documents: Iterable[Document],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    config: BuildConfig | None = None,
    examples: int | None = None,
    batches: int = 4,
    disk: int | None = None,
    world_size: int = 1,
    progress: bool | ProgressCallback | None = None,
) -> Estimate:
    """What `build_text_index` would take; arguments as there and for `Index.estimate`."""
    max_length = _window_length(text_model, max_length)
    with tempfile.TemporaryDirectory() as place, PassageSpool(Path(place)) as passages:
        windows, _ = _tokenise(documents, text_model, max_length, stride, passages, progress)
        return Index.estimate(
            model=text_model.model,
            data=windows,
            config=config,
            examples=examples,
            batches=batches,
            disk=disk,
            world_size=world_size,
            payload_bytes=passages.nbytes / len(passages),
            progress=progress,
        )


def _tokenise(
    documents: Iterable[Document],
    text_model: TextModel,
    max_length: int,
    stride: int | None,
    passages: PassageSpool,
    progress: bool | ProgressCallback | None,
) -> tuple[TokenWindows, Cutting]:
    """Passages into the spool, and their tokens.

    Raises:
        DataError: no passage.
    """
    windows, count, empty, running, of_running = TokenWindows(), 0, 0, 0, 0
    documents, seen = tee(documents)
    with reporter(progress) as report, report.stage("tokenise") as stage:
        pieces_of = cut(documents, text_model.tokenizer, max_length=max_length, stride=stride)
        for pieces, document in zip(pieces_of, seen, strict=True):
            count += 1
            empty += not pieces
            running += document.lined
            of_running += len(pieces) if document.lined else 0
            for (passage, ids), other in zip(pieces, unlike(pieces, text_model.tokenizer), strict=True):
                passages.append(passage, ids if other else None)
                windows.append(ids)
            stage.advance(len(pieces))
    if not len(windows):
        raise DataError(f"none of the {count} documents has a passage of at least {LEAST_TOKENS} tokens")
    stride = max_length if stride is None else stride
    return windows, Cutting(count, empty, running, of_running, len(windows), windows.tokens, max_length, stride)


def _window_length(text_model: TextModel, wanted: int | None) -> int:
    context = text_model.context
    if wanted is None:
        return min(context or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if context is not None and wanted > context:
        raise ConfigError(f"max_length={wanted} is above the model's context of {context} tokens: pass at most that")
    return wanted


# -- asking ------------------------------------------------------------------------------------------------------


def encode_question(
    text: str, tokenizer: Any, context: int | None, *, prompt: str | None = None
) -> dict[str, torch.Tensor]:
    """A text as an example whose loss is that of its own tokens: input_ids, attention_mask, labels, (length,) int64.

    Args:
        text: the question.
        tokenizer: of transformers.
        context: the longest input, in tokens; None: any.
        prompt: comes before the text, with labels of -100.

    Raises:
        QueryError: no token has a loss, or more tokens than the context.
    """
    before = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    # Special tokens belong at the beginning only.
    own = tokenizer(text, add_special_tokens=not before, verbose=False)["input_ids"]
    length = len(before) + len(own)
    if not own or length < LEAST_TOKENS:
        raise QueryError(f"the text {text!r} has no token that follows another, so there is no loss on it: write more")
    if context is not None and length > context:
        raise QueryError(f"the text has {length} tokens with its prompt, and the model takes {context}: shorten it")
    ids = torch.tensor([*before, *own], dtype=torch.long)
    labels = ids.clone()
    labels[: len(before)] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class TextIndex:
    """An index of texts with the model that it was built from, ready to be asked in words."""

    def __init__(self, index: Index, text_model: TextModel) -> None:
        self.index = index
        self.text_model = text_model
        self._facts: dict[str, Any] = index.metadata.get(METADATA) or {}

    @classmethod
    def open(cls, path: Path, *, model: Path | None = None, device: str = "auto") -> TextIndex:
        """Opens an index, and the model that it remembers.

        Args:
            path: the index.
            model: the model's folder, if it is no longer where it was at the build.
            device: as for `load_text_model`.

        Raises:
            QueryError: the index remembers no model and none is given. Else as `Index.open` and `load_text_model`.
        """
        with Index.open(path) as bare:
            remembered = (bare.metadata.get(METADATA) or {}).get("model")
        if model is None:
            if remembered is None:
                raise QueryError(f"{path} was not made by `lorif build`, so it knows no model: pass --model FOLDER")
            model = Path(remembered)
            if not model.is_dir():
                raise DataError(f"the model that {path} was built from is no longer at {model}: pass --model FOLDER")
        text_model = load_text_model(model, device)
        return cls(Index.open(path, model=text_model.model), text_model)

    def ask(
        self,
        texts: list[str],
        k: int = 10,
        *,
        prompt: str | None = None,
        opponents: bool = False,
        recall: float = 0.99,
        exact: bool | None = None,
        damping: Damping | float | None = None,
        layers: list[str] | None = None,
        normalize: str | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> list[Answer]:
        """The training passages that did most to make the model expect each text.

        Args:
            texts: the questions.
            k: hits each.
            prompt: comes before each text and is not itself asked about: only the text's tokens have a loss.
            opponents, recall, exact, damping, layers, normalize, progress: as for `Index.search`.

        Raises:
            QueryError: a text with no token that has a loss, or beyond the model's context. Else as `Index.search`.
        """
        tokenizer, context = self.text_model.tokenizer, self.text_model.context
        items = [encode_question(text, tokenizer, context, prompt=prompt) for text in texts]
        found = self.index.search(
            items,
            k,
            opponents=opponents,
            recall=recall,
            exact=exact,
            damping=damping,
            layers=layers,
            normalize=normalize,
            progress=progress,
        )
        passages = self._passages(found)
        answers = []
        for text, item, ids, scores in zip(texts, items, found.ids.tolist(), found.scores.tolist(), strict=True):
            hits = [Hit(i, score, passages.get(i)) for i, score in zip(ids, scores, strict=True)]
            tokens = int((item["labels"][1:] != IGNORE).sum())
            answers.append(Answer(text, tokens, self._loss(item), hits, found.stats))
        return answers

    def loss(self, text: str, *, prompt: str | None = None) -> tuple[int, float]:
        """(tokens of a text that have a loss, the model's loss on them in nats, summed).

        Raises:
            QueryError: as `encode_question`.
        """
        item = encode_question(text, self.text_model.tokenizer, self.text_model.context, prompt=prompt)
        return int((item["labels"][1:] != IGNORE).sum()), self._loss(item)

    def explain(
        self,
        texts: list[str],
        ids: Hits | list[Answer] | np.ndarray | Sequence[int] | Sequence[Sequence[int]],
        *,
        prompt: str | None = None,
        damping: Damping | float | None = None,
        layers: list[str] | None = None,
        query_tokens: bool = True,
        progress: bool | ProgressCallback | None = False,
    ) -> list[list[TextExplanation]]:
        """Takes the scores of passages apart by layer and by token (see `Index.explain`), from the stored texts.

        Args:
            texts: the questions.
            ids: what `ask` answered them with, or row ids as for `Index.explain`.
            prompt: as it was for `ask`.
            damping, layers, query_tokens, progress: as for `Index.explain`.

        Raises:
            DataError: the index does not keep the texts, or they are tokenised otherwise than at the build. Else as
            `ask` and `Index.explain`.
        """
        tokenizer, context = self.text_model.tokenizer, self.text_model.context
        items = [encode_question(text, tokenizer, context, prompt=prompt) for text in texts]
        if isinstance(ids, Hits):
            ids = ids.ids
        elif isinstance(ids, list) and ids and all(isinstance(answer, Answer) for answer in ids):
            ids = np.array([[hit.id for hit in answer.hits] for answer in ids])
        wanted = sorted({int(i) for i in np.asarray(ids).ravel()})
        data = _StoredPassages(self.index, self._payloads(wanted), tokenizer)
        found = self.index.explain(
            items,
            ids,  # type: ignore[arg-type]
            data=data,
            damping=damping,
            layers=layers,
            query_tokens=query_tokens,
            progress=progress,
        )
        strings = {i: token_strings(data.tokens(i), tokenizer) for i in wanted}
        asked = [token_strings(item["input_ids"].tolist(), tokenizer) for item in items]
        passages = {i: _passage(data.payloads[i]) for i in wanted}
        return [
            [TextExplanation(one, passages[one.id], strings[one.id], asked[q]) for one in row]
            for q, row in enumerate(found)
        ]

    def _payloads(self, ids: list[int]) -> dict[int, Any]:
        """The payloads of rows; of an index of format version 4 or older, from the file beside it."""
        payloads = dict(zip(ids, self.index.payloads(ids), strict=True))
        known = self._facts.get("passages")
        if isinstance(known, dict) and "digest" in known and all(p is None for p in payloads.values()):
            found = read_passages(self.index.path, known, ids)
            payloads |= {i: {"source": p.source, "text": p.text} for i, p in found.items()}
        return payloads

    def add(self, documents: Iterable[Document], *, progress: bool | ProgressCallback | None = None) -> np.ndarray:
        """Indexes further documents, cut as those of the build were.

        Args:
            documents: walked once.
            progress: as for `Index.build`.

        Returns:
            (m,) int64: ids of the new passages.

        Raises:
            DataError: no passage. QueryError: the index was not made by `build_text_index`. Else as `Index.add`.
        """
        try:
            max_length, stride = int(self._facts["max_length"]), int(self._facts["stride"])
        except (KeyError, TypeError, ValueError):
            raise QueryError(
                f"{self.index.path} was not made by `lorif build`, so it does not say how texts are cut: use Index.add"
            ) from None
        with PassageSpool(self.index.path.parent) as passages:
            windows, _ = _tokenise(documents, self.text_model, max_length, stride, passages, progress)
            return self.index.add(windows, payloads=passages, progress=progress)

    def _passages(self, found: Hits) -> dict[int, Passage]:
        """The passages of hits, by id."""
        known = self._facts.get("passages")
        if found.payloads is None:
            # Until format version 4 they were in a file of their own.
            if not isinstance(known, dict) or "digest" not in known:
                return {}
            return read_passages(self.index.path, known, found.ids.ravel().tolist())
        pairs = zip(found.ids.ravel().tolist(), (p for row in found.payloads for p in row), strict=True)
        passages = {i: _passage(payload) for i, payload in pairs}
        return {i: passage for i, passage in passages.items() if passage is not None}

    def _loss(self, item: dict[str, torch.Tensor]) -> float:
        model = self.text_model.model
        batch = {key: value.unsqueeze(0).to(model.device) for key, value in item.items()}
        with torch.no_grad():
            return float(default_loss(model, batch))

"""Demo: a small language model trained on Python's own documentation, indexed, and asked what taught it a sentence.

Some passages are held out of training and of the index: asked with each of them, how often is the best hit of the same
topic?
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import BuildConfig
from ..errors import IndexExistsError
from ..index import Index
from ..progress import ProgressCallback
from ..results import Hits
from .demo_model import DemoSettings, Training, documentation, new_model, split, train, train_tokenizer
from .documents import Document
from .model import TextModel, quiet_transformers
from .passages import cut
from .textindex import build_text_index

ORIGIN = {"data": "pydoc_data.topics"}
"""What the demo's index says of where its texts are from."""

QUESTION = (
    'The context manager\'s "__exit__()" method is called when the "with" block is left, even if an exception was '
    "raised."
)
"""The demo's own question: in the words of the documentation, but not a sentence of it."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo did and found.

    Attributes:
        folder: what it was given.
        topics, passages, tokens: of the text.
        training: how the model was trained.
        index_seconds: that the build took.
        bytes_per_example, nbytes: of the index.
        check: of the passages held out, how many were "asked", for how many the "best" hit was of their own topic, and
            for how many it would be by chance, "expected", were it any passage.
        questions: that were asked.
        losses: of each, (tokens, nats).
        hits: what was found.
        seconds: in all.
    """

    folder: Path
    topics: int
    passages: int
    tokens: int
    training: Training
    index_seconds: float
    bytes_per_example: int
    nbytes: int
    check: dict[str, float]
    questions: list[str]
    losses: list[tuple[int, float]]
    hits: Hits
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the questions and what was found for them are left out."""
        facts = {name: value for name, value in vars(self).items() if name not in ("questions", "losses", "hits")}
        return facts | {"folder": str(self.folder), "training": asdict(self.training), "stats": asdict(self.hits.stats)}


def run_demo(
    out: Path,
    questions: list[str],
    settings: DemoSettings | None = None,
    progress: bool | ProgressCallback | None = None,
) -> DemoResult:
    """Trains, saves, indexes, asks and checks.

    Args:
        out: a folder that does not exist or is empty; it gets `model`, with its tokenizer, and `index`.
        questions: texts to ask about.
        settings: `DemoSettings()` by default.
        progress: as for `Index.build`.

    Raises:
        IndexExistsError: `out` is not free. QueryError: a question that is too short, or too long for the model.
    """
    settings = settings or DemoSettings()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise IndexExistsError(f"{out} exists and is not empty: pass another folder with --out, or delete it")
    began, folder = time.perf_counter(), out / "model"
    documents, held = split(documentation(settings.characters), settings.held_out, settings.seed)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        text_model = TextModel(folder, new_model(settings, len(tokenizer)), tokenizer)
        # A question that cannot be asked is found now rather than after the training.
        text_model.losses(questions)
        passages = text_model.passages(documents, progress=False)
        others = text_model.passages(held, progress=False)
        with _one_thread():
            training = train(text_model, passages, others, settings, progress)
    with quiet_transformers():
        text_model.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    mid = time.perf_counter()
    index = build_text_index(
        out / "index",
        text_model,
        documents,
        max_length=settings.context,
        config=BuildConfig(projection_dim=settings.projection_dim, seed=settings.seed, batch_size=settings.batch_size),
        origin=ORIGIN,
        progress=progress,
    )
    index_seconds = time.perf_counter() - mid
    with index:
        return DemoResult(
            folder=out,
            topics=len({document.source for document in documents}),
            passages=len(index),
            tokens=passages.tokens,
            training=training,
            index_seconds=index_seconds,
            bytes_per_example=index.bytes_per_example,
            nbytes=index.nbytes,
            questions=questions,
            losses=text_model.losses(questions),
            hits=index.search(questions, settings.k),
            check=_check(index, tokenizer, documents, held, settings.context),
            seconds=time.perf_counter() - began,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model gains little from more threads, is the same whatever the number of cores, and does not wait for
    cores that others keep busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(
    index: Index, tokenizer: Any, documents: list[Document], held: list[Document], context: int
) -> dict[str, float]:
    """Asks with every held-out passage; only the first window of a long one."""
    pieces = [(rows[0], document.source) for document, rows, _ in cut(held, tokenizer, max_length=context) if rows]
    if not pieces:
        return {"asked": 0, "best": 0, "expected": 0.0}
    found = index.search([row for row, _ in pieces], 1).payloads or []
    best = sum(first["source"].split(",")[0] == topic for (first,), (_, topic) in zip(found, pieces, strict=True))
    share = Counter(document.source for document in documents)
    expected = sum(share[topic] for _, topic in pieces) / len(documents)
    return {"asked": len(pieces), "best": best, "expected": expected}

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
from rich.console import Console
from rich.table import Table

from ..config import BuildConfig
from ..errors import IndexExistsError
from ..progress import ProgressCallback
from .demo_model import DemoSettings, Training, all_windows, documentation, new_model, split, train, train_tokenizer
from .show import answer_json, excerpt, in_units, show_answer, unit_of_scores
from .textindex import Answer, TextIndex, TextModel, build_text_index, encode_question, quiet_transformers
from .texts import Document, cut

QUESTION = (
    'The context manager\'s "__exit__()" method is called when the "with" block is left, even if an exception was '
    "raised."
)
"""The demo's own question: in the words of the documentation, but not a sentence of it."""


@dataclass(frozen=True)
class Check:
    """Whether held-out passages find their own topic.

    Attributes:
        asked: how many were asked.
        best: how many had a passage of their own topic as best hit.
        expected: how many would by chance, the best hit being any passage.
    """

    asked: int
    best: int
    expected: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo did and found."""

    settings: DemoSettings
    folder: Path
    topics: int
    passages: int
    tokens: int
    training: Training
    index_seconds: float
    bytes_per_example: int
    nbytes: int
    answers: list[Answer]
    check: Check
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "folder": str(self.folder),
            "settings": asdict(self.settings),
            "topics": self.topics,
            "passages": self.passages,
            "tokens": self.tokens,
            "training": asdict(self.training),
            "index": {
                "path": str(self.folder / "index"),
                "seconds": self.index_seconds,
                "bytes_per_example": self.bytes_per_example,
                "nbytes": self.nbytes,
            },
            "answers": [answer_json(answer) for answer in self.answers],
            "stats": asdict(self.answers[0].stats) if self.answers else None,
            "check": asdict(self.check),
            "seconds": self.seconds,
        }


# -- the whole ---------------------------------------------------------------------------------------------------


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
    with _one_thread():
        return _run(out, questions, settings, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: so small a model gains little from more, is the same whatever the number of cores, and does
    not wait for cores that others keep busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(
    out: Path, questions: list[str], settings: DemoSettings, progress: bool | ProgressCallback | None
) -> DemoResult:
    began = time.perf_counter()
    documents, held = split(documentation(settings.characters), settings.held_out, settings.seed)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    for question in questions:
        # Found out now rather than after the training.
        encode_question(question, tokenizer, settings.context)
    windows, held_windows = (all_windows(part, tokenizer, settings.context) for part in (documents, held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = new_model(settings, len(tokenizer))
        training = train(model, windows, held_windows, settings, progress)
    folder = out / "model"
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    text_model = TextModel(folder, model, tokenizer)

    mid = time.perf_counter()
    config = BuildConfig(
        projection_dim=settings.projection_dim,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    origin = {"data": "pydoc_data.topics"}
    index = build_text_index(
        out / "index",
        text_model,
        documents,
        max_length=settings.context,
        config=config,
        origin=origin,
        progress=progress,
    )
    index_seconds = time.perf_counter() - mid
    with index:
        asked = TextIndex(index, text_model)
        answers = asked.ask(questions, settings.k)
        return DemoResult(
            settings=settings,
            folder=out,
            topics=len({document.source for document in documents}),
            passages=len(index),
            tokens=windows.tokens,
            training=training,
            index_seconds=index_seconds,
            bytes_per_example=index.bytes_per_example,
            nbytes=index.nbytes,
            answers=answers,
            check=_check(asked, documents, held, settings.context),
            seconds=time.perf_counter() - began,
        )


def _check(asked: TextIndex, documents: list[Document], held: list[Document], context: int) -> Check:
    """Asks with every held-out passage; only the first window of a long one."""
    texts, topics = [], []
    for document, pieces in zip(held, cut(held, asked.text_model.tokenizer, max_length=context), strict=True):
        if pieces:
            texts.append(pieces[0][0].text)
            topics.append(document.source)
    if not texts:
        return Check(asked=0, best=0, expected=0.0)
    answers = asked.ask(texts, k=1)
    found = [answer.hits[0].passage for answer in answers]
    best = sum(p is not None and p.source.split(",")[0] == topic for p, topic in zip(found, topics, strict=True))
    share = Counter(document.source for document in documents)
    return Check(asked=len(texts), best=best, expected=sum(share[topic] for topic in topics) / len(documents))


def show_demo(out: Console, result: DemoResult) -> None:
    """What was done and found, for people."""
    training, check, settings = result.training, result.check, result.settings
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "text",
        f"{result.passages:,} passages, {result.tokens:,} tokens, on {result.topics} topics of Python's documentation",
    )
    stopped = "" if training.steps == training.planned else f" of {training.planned:,}, stopped by its time limit,"
    facts.add_row(
        "model",
        f"GPT-2 architecture, {settings.depth} layers of width {settings.width}, {training.parameters / 1e6:.1f} M "
        f"parameters, {training.steps:,} steps{stopped} in {training.seconds:.0f} s; "
        f"{training.loss:.2f} nats per token, {training.loss_held_out:.2f} on held-out passages",
    )
    facts.add_row(
        "index",
        f"built in {result.index_seconds:.0f} s, {result.bytes_per_example:,} bytes per passage, "
        f"{in_units(result.nbytes)} with curvature",
    )
    out.print(facts)
    for answer in result.answers:
        out.print("\nWhich training passages made the model know this?", style="bold")
        out.print(excerpt(f"“{answer.text}”", 1000))
        seconds = answer.stats.seconds
        out.print(
            f"{answer.loss_per_token:.2f} nats per token; its gradient took "
            f"{1000 * seconds['gradients']:.0f} ms, the transform {1000 * seconds['transform']:.0f} ms, the exact scan "
            f"{1000 * seconds['scan']:.0f} ms",
            style="dim",
        )
        show_answer(out, answer)
    out.print()
    out.print(unit_of_scores(result.passages, "the sentence's loss"))
    out.print(
        f"Check: of {check.asked} passages held out of the training, {check.best} have a passage of their own topic as "
        f"best hit; by chance it would be {check.expected:.0f}."
    )
    out.print(f"All in {result.seconds:.0f} s. Ask on:")
    out.print(excerpt(f'lorif search {result.folder / "index"} --text "A lambda expression makes a function."', 1000))

"""Demo: a small language model trained on Python's own documentation, indexed, and asked what taught it a sentence.

Everything is made on the spot from the standard library's `pydoc_data.topics`; nothing is downloaded. Some passages are
held out of training and of the index: asked with each of them, how often is the best hit of the same topic?
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from .config import BuildConfig
from .data import collate
from .errors import IndexExistsError
from .progress import ProgressCallback, reporter
from .show import answer_json, excerpt, in_units, show_answer
from .textindex import Answer, TextIndex, TextModel, build_text_index, encode_question, quiet_transformers
from .texts import Document, TokenWindows, cut

QUESTION = (
    'The "with" statement calls the "__enter__()" method of the context manager before the block and its "__exit__()" '
    "method after it."
)
"""The demo's own question: in the words of the documentation, but not a sentence of it."""

_STEPS_PER_SECOND = 16.0
"""What two CPU cores manage, so that the number of steps, and the model, does not depend on the machine's mood."""

_BEGINNING = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The demo's choices; the defaults were chosen by how often held-out passages found their topic.

    Attributes:
        seconds: of training, on two CPU cores; it stops at 1.5 times that, wherever it is.
        seed: of the split, the model and the order of training.
        k: passages shown.
        held_out: passages kept out of training and index.
        characters: passages are whole paragraphs of about so many characters together.
        vocabulary: tokens, of a byte-level BPE.
        context: tokens.
        width, depth, heads: of the model.
        batch_size, learning_rate, weight_decay: of AdamW.
        projection_dim, rank, curvature_rank: of the index.
    """

    seconds: float = 60.0
    seed: int = 0
    k: int = 8
    held_out: int = 100
    characters: int = 300
    vocabulary: int = 2048
    context: int = 192
    width: int = 192
    depth: int = 2
    heads: int = 4
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    projection_dim: int = 48
    rank: int = 8
    curvature_rank: int = 512

    @property
    def steps(self) -> int:
        return max(1, round(self.seconds * _STEPS_PER_SECOND))


@dataclass(frozen=True)
class Training:
    """How the model was trained.

    Attributes:
        parameters: of the model.
        steps, planned: done, and meant to be done.
        epochs: how often each passage was seen.
        seconds: wall clock.
        loss, loss_held_out: in nats per token, after training, on the passages and on those held out.
    """

    parameters: int
    steps: int
    planned: int
    epochs: float
    seconds: float
    loss: float
    loss_held_out: float


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


# -- the text ----------------------------------------------------------------------------------------------------


def documentation(characters: int) -> list[Document]:
    """Passages of `pydoc_data.topics`: paragraphs in a row of one topic, about so many characters, source = the topic.

    The topics repeat each other; a paragraph is kept once, in the shortest topic that has it.
    """
    from pydoc_data.topics import topics

    paragraphs = {topic: [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()] for topic, text in topics.items()}
    seen: set[str] = set()
    documents = []
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        gathered = ""
        for paragraph in paragraphs[topic]:
            plain = " ".join(paragraph.split())
            if plain in seen:
                continue
            seen.add(plain)
            if gathered and len(gathered) + len(paragraph) > characters:
                documents.append(Document(gathered, topic))
                gathered = ""
            gathered = f"{gathered}\n\n{paragraph}" if gathered else paragraph
        if gathered:
            documents.append(Document(gathered, topic))
    return documents


def split(documents: list[Document], held_out: int, seed: int) -> tuple[list[Document], list[Document]]:
    """Training passages, by length so that batches need little padding, and held-out ones.

    Held out are only passages of some length, of topics that keep enough others to be found.
    """
    per_topic = Counter(document.source for document in documents)
    order = np.random.default_rng(seed).permutation(len(documents))
    fit = [i for i in order if per_topic[documents[i].source] >= 6 and len(documents[i].text) >= 150]
    held = set(fit[:held_out])
    training = sorted((d for i, d in enumerate(documents) if i not in held), key=lambda d: len(d.text))
    return training, [documents[i] for i in sorted(held)]


# -- the model ---------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BEGINNING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BEGINNING, eos_token=_BEGINNING)


def new_model(settings: DemoSettings, vocabulary: int) -> Any:
    """A GPT-2-architecture model with random weights, from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with quiet_transformers():
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=settings.context,
                n_embd=settings.width,
                n_layer=settings.depth,
                n_head=settings.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


def train(
    model: Any,
    windows: TokenWindows,
    held_out: TokenWindows,
    settings: DemoSettings,
    progress: bool | ProgressCallback | None,
) -> Training:
    """Trains in place, for a fixed number of steps unless they take too long."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    steps, done, examples, began = settings.steps, 0, 0, time.perf_counter()
    batches = _batches(windows, settings)
    model.train()
    with reporter(progress) as report, report.stage("train", steps) as stage:
        while done < steps and time.perf_counter() - began < 1.5 * settings.seconds:
            batch = collate([windows[i] for i in next(batches)])
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done, steps)
            total, tokens = _loss(model, batch)
            optimizer.zero_grad()
            (total / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            examples += len(batch["input_ids"])
            stage.advance(1)
    seconds = time.perf_counter() - began
    model.eval()
    return Training(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=done,
        planned=steps,
        epochs=examples / len(windows),
        seconds=seconds,
        loss=_mean_loss(model, windows, settings.batch_size),
        loss_held_out=_mean_loss(model, held_out, settings.batch_size),
    )


def _batches(windows: TokenWindows, settings: DemoSettings) -> Iterator[list[int]]:
    """Shuffled batches of passages of about the same length, for ever."""
    generator = np.random.default_rng(settings.seed)
    size = settings.batch_size
    while True:
        order = generator.permutation(len(windows))
        batches = []
        for start in range(0, len(order), 16 * size):
            near = sorted(order[start : start + 16 * size].tolist(), key=windows.length)
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        for i in generator.permutation(len(batches)):
            yield batches[i]


def _schedule(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Next-token cross-entropy summed over a batch, and how many tokens those are."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    total = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    return total, int((labels != -100).sum())


def _mean_loss(model: Any, windows: TokenWindows, batch_size: int) -> float:
    order = sorted(range(len(windows)), key=windows.length)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(order), batch_size):
            loss, count = _loss(model, collate([windows[j] for j in order[i : i + batch_size]]))
            total, tokens = total + float(loss), tokens + count
    return total / max(tokens, 1)


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
    began = time.perf_counter()
    documents, held = split(documentation(settings.characters), settings.held_out, settings.seed)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    for question in questions:
        # Found out now rather than after the training.
        encode_question(question, tokenizer, settings.context)
    windows, held_windows = (_all_windows(part, tokenizer, settings.context) for part in (documents, held))
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
        rank=settings.rank,
        curvature_rank=settings.curvature_rank,
        seed=settings.seed,
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


def _all_windows(documents: list[Document], tokenizer: Any, context: int) -> TokenWindows:
    windows = TokenWindows()
    for pieces in cut(documents, tokenizer, max_length=context):
        for _, ids in pieces:
            windows.append(ids)
    return windows


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
        "text", f"{result.passages:,} passages ({result.tokens:,} tokens) on {result.topics} topics of Python's documentation"
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
            f"{answer.loss / max(answer.tokens, 1):.2f} nats per token; gradient {1000 * seconds['gradients']:.0f} ms, "
            f"transform {1000 * seconds['transform']:.0f} ms, exact scan of all passages {1000 * seconds['scan']:.0f} ms",
            style="dim",
        )
        show_answer(out, answer)
    out.print(
        f"\nscore / {result.passages:,} estimates, in nats, by how much the sentence's loss would rise without the passage."
    )
    out.print(
        f"Check: of {check.asked} passages held out of the training, {check.best} have a passage of their own topic as "
        f"best hit; by chance it would be {check.expected:.0f}."
    )
    out.print(f"All in {result.seconds:.0f} s. Ask on:")
    out.print(excerpt(f'lorif search {result.folder / "index"} --text "A lambda expression makes an anonymous function."'))

"""Demo's model: passages of Python's own documentation, and a small language model trained on them in a minute.

Everything is made on the spot from the standard library's `pydoc_data.topics`; nothing is downloaded.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..capture.data import as_source
from ..capture.losses import default_loss
from ..progress import ProgressCallback, reporter
from .documents import Document
from .model import TextModel, quiet_transformers
from .passages import Passages
from .tokenised import TokenisedData

_STEPS_PER_SECOND = 11.0
"""What one CPU core manages: the number of steps, and so the model, does not depend on how busy the machine is."""

_BEGINNING = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The demo's choices; the defaults were chosen by how often held-out passages found their topic.

    Attributes:
        seconds: of training, on one CPU core; it stops at 1.5 times that, wherever it is.
        seed: of the split, the model and the order of training.
        k: passages shown.
        held_out: passages kept out of training and index.
        characters: passages are whole paragraphs of about so many characters together.
        vocabulary: tokens, of a byte-level BPE.
        context: tokens.
        width, depth, heads: of the model.
        batch_size, learning_rate, weight_decay: of AdamW.
        projection_dim: of the index, which has the library's defaults else.
    """

    seconds: float = 60.0
    seed: int = 0
    k: int = 8
    held_out: int = 100
    characters: int = 200
    vocabulary: int = 2048
    context: int = 192
    width: int = 192
    depth: int = 2
    heads: int = 4
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    projection_dim: int | str = "auto"

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


# -- the text ----------------------------------------------------------------------------------------------------


def documentation(characters: int) -> list[Document]:
    """Passages of `pydoc_data.topics`: paragraphs in a row of one topic, about so many characters, source = the topic.

    The topics repeat each other; a paragraph is kept once, in the shortest topic that has it.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        gathered = ""
        for paragraph in (p.strip("\n") for p in re.split(r"\n\s*\n", topics[topic])):
            plain = " ".join(paragraph.split())
            if not plain or plain in seen:
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

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BEGINNING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token=_BEGINNING, eos_token=_BEGINNING)


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
    text_model: TextModel,
    passages: Passages,
    held_out: Passages,
    settings: DemoSettings,
    progress: bool | ProgressCallback | None,
) -> Training:
    """Trains in place, for a fixed number of steps unless they take too long."""
    model = text_model.model
    examples, others = (
        TokenisedData(part, text_model.tokenizer, model=model, check=False) for part in (passages, held_out)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
    )
    half = _multiplies_bfloat16()
    steps, done, seen, began = settings.steps, 0, 0, time.perf_counter()
    batches = _batches(examples, settings)
    model.train()
    with reporter(progress) as report, report.stage("train", steps) as stage:
        while done < steps and time.perf_counter() - began < 1.5 * settings.seconds:
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done, steps)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = default_loss(model, batch).sum() / _predicted(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            seen += len(batch["input_ids"])
            stage.advance(1)
    seconds = time.perf_counter() - began
    model.eval()
    return Training(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=done,
        planned=steps,
        epochs=seen / len(passages),
        seconds=seconds,
        loss=_mean_loss(model, examples, settings.batch_size),
        loss_held_out=_mean_loss(model, others, settings.batch_size),
    )


def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 at least twice as fast as float32, as those with instructions for it do:
    then the training takes two thirds of the time."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        clock = []
        for _ in range(6):
            began = time.perf_counter()
            left @ right
            clock.append(time.perf_counter() - began)
        seconds.append(min(clock[1:]))
    return seconds[0] > 2 * seconds[1]


def _batches(examples: TokenisedData, settings: DemoSettings) -> Iterator[dict[str, torch.Tensor]]:
    """Shuffled batches of passages of about the same length, for ever."""
    items = examples.__getitems__(range(len(examples)))
    generator, size = np.random.default_rng(settings.seed), settings.batch_size
    while True:
        order = generator.permutation(len(items))
        batches = []
        for start in range(0, len(order), 16 * size):
            near = sorted(order[start : start + 16 * size].tolist(), key=lambda i: len(items[i]["input_ids"]))
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        for i in generator.permutation(len(batches)):
            yield examples.collate_examples([items[j] for j in batches[i]])


def _schedule(step: int, steps: int) -> float:
    """Of the learning rate: a short rise, then a cosine down to a tenth."""
    return min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _predicted(batch: dict[str, torch.Tensor]) -> int:
    """How many tokens of a batch have a loss."""
    return int(batch["attention_mask"][:, 1:].sum())


def _mean_loss(model: Any, examples: TokenisedData, batch_size: int) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for _, batch in as_source(examples, batch_size).batches():
            total, tokens = total + float(default_loss(model, batch).sum()), tokens + _predicted(batch)
    return total / max(tokens, 1)

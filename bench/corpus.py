"""Real text and small real models without a download: the standard library's sources, and the King James Bible."""

from __future__ import annotations

import collections
import math
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.environment import CACHE
from lorif_index import default_loss

LENGTH, VOCABULARY = 64, 4000


def tokens(text: str) -> list[str]:
    """Words, and marks one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


def numbers(words: Iterable[str], vocabulary: int) -> dict[str, int]:
    """Of the most common words their numbers from 1, falling; 0 is left to all others."""
    common = collections.Counter(words).most_common(vocabulary - 1)
    return {word: i + 1 for i, (word, _) in enumerate(common)}


# -- the standard library ------------------------------------------------------------------------------------------


def sources() -> list[list[str]]:
    """Tokens of each source file, in the order of their names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return [tokens(p.read_text(encoding="utf-8", errors="ignore")) for p in paths if "site-packages" not in p.parts]


def sequences(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 64) int64 word ids, in windows that do not overlap, shuffled over files by the seed.

    Raises:
        ValueError: there is not so much text here.
    """
    path = CACHE / "stdlib-words.npy"
    if not path.exists():
        words = [word for file in sources() for word in file]
        number = numbers(words, VOCABULARY)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.array([number.get(word, 0) for word in words], dtype=np.int16), allow_pickle=False)
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if len(windows) < count:
        raise ValueError(f"the standard library here has {len(windows)} windows of text, {count} were asked for")
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return torch.from_numpy(windows[chosen].astype(np.int64))


# -- the King James Bible, of Debian's package bible-kjv -----------------------------------------------------------

BOOKS = tuple("Ge Exo Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Psa Isa Jer Mic".split())
"""The books that tell the same stories, or sing the same psalms."""


def verses() -> dict[str, str]:
    """Reference, such as 1Chr10:1, to text, in the order of the books.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if shutil.which("bible") is None:
        raise FileNotFoundError("no text: apt-get install bible-kjv")
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    split = (line.partition(" ") for line in printed.splitlines())
    return {ref: text for ref, _, text in split}


def book(ref: str) -> str:
    return re.sub(r"\d+:\d+$", "", ref)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


# -- models --------------------------------------------------------------------------------------------------------


def gpt(
    layers: int = 4,
    width: int = 64,
    *,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
    seed: int = 0,
    dropout: bool = True,
) -> Any:
    """A GPT-2-architecture model with fresh weights; without dropout it has a GELU that is quicker on a CPU, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    plain = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4,
        vocab_size=vocabulary,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        **({} if dropout else plain | {"activation_function": "gelu_pytorch_tanh"}),
    )
    return GPT2LMHeadModel(config)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Callable[[Any], torch.Tensor],
    schedule: Any = None,
) -> None:
    """Trains: one step for each batch, down the gradient of loss(batch). Leaves the model in eval mode."""
    model.train()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()


def train(model: Any, ids: torch.Tensor, steps: int) -> None:
    """A short training on random batches of sequences."""
    generator = torch.Generator().manual_seed(0)
    batches = (ids[torch.randint(len(ids), (32,), generator=generator)] for _ in range(steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    descend(model, optimizer, batches, lambda part: default_loss(model, {"input_ids": part}).mean() / (LENGTH - 1))


def once_trained(path: Path | None, model: Any, training: Callable[[Any], object]) -> tuple[Any, float]:
    """The model after its training, in eval mode, and the seconds that this took.

    Args:
        path: where the weights are kept, and taken from where they are; None: they are not kept.
        model: with the weights that it begins with.
        training: training(model) trains it.

    Returns:
        the model; seconds, NaN where weights were kept without.
    """
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as file:
            weights = {key: torch.from_numpy(file[key]) for key in file.files if not key.startswith("fact ")}
            seconds = float(file["fact seconds"]) if "fact seconds" in file.files else math.nan
        model.load_state_dict(weights)
        return model.eval(), seconds
    began = time.perf_counter()
    training(model)
    seconds = time.perf_counter() - began
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights_of = {key: value.numpy() for key, value in model.state_dict().items()}
        np.savez(path, **{"fact seconds": np.float64(seconds)}, **weights_of)
    return model.eval(), seconds

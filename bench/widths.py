"""Claim: the default builds and searches models of real widths in bounded memory, in few passes over the model.

Models of real shapes with random weights, random tokens, the default config; each case in a process of its own:

    gpt2        GPT-2 small: 12 blocks, 768 wide, 50,257 words, sequences of 128
    llama       two blocks of Llama 2 7B: 4,096 x 11,008, bfloat16, sequences of 128
    lora        80 blocks, 64 wide, LoRA on every map: 1,120 layers
    vocabulary  two blocks, 256 wide, 128,000 words
    experts     4 blocks of Mixtral, 256 wide, 8 experts: 85 layers

Reported are seconds over one plain pass of all N examples (forward and backward, weights' gradients included), peak
memory over that of the process once it has made a plain pass, bytes on disk, and what `Index.estimate` said of these
before. A pass is of all examples; `--examples` takes fewer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bench.environment import arguments, in_child, keep, peak_rss, table
from lorif_index import Index, default_loss


@dataclass(frozen=True)
class Case:
    """A shape.

    Attributes:
        make: the model; of smoke size if told.
        words: of its vocabulary.
        examples, length: N, and tokens of each.
    """

    make: Callable[[bool], nn.Module]
    words: int
    examples: int
    length: int


def gpt2(smoke: bool) -> nn.Module:
    width, blocks, heads = (32, 2, 2) if smoke else (768, 12, 12)
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, vocab_size=500 if smoke else 50_257))


def llama(smoke: bool) -> nn.Module:
    width, inner, heads, words = (32, 64, 2, 500) if smoke else (4096, 11_008, 32, 32_000)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=2,
        vocab_size=words,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def lora(smoke: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=32 if smoke else 64,
        intermediate_size=64 if smoke else 172,
        num_attention_heads=4,
        num_hidden_layers=2 if smoke else 80,
        vocab_size=500,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules="all-linear", r=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            # They begin at zero, where gradients of the other half are zero, too.
            nn.init.normal_(parameter, std=0.02)
    return model


def vocabulary(smoke: bool) -> nn.Module:
    width, words = (32, 2000) if smoke else (256, 128_000)
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=4, vocab_size=words))


def experts(smoke: bool) -> nn.Module:
    width, blocks = (32, 2) if smoke else (256, 4)
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=blocks,
        num_local_experts=8,
        vocab_size=500,
    )
    return MixtralForCausalLM(config)


CASES = {
    "gpt2": Case(gpt2, 50_257, 512, 128),
    "llama": Case(llama, 32_000, 64, 128),
    "lora": Case(lora, 500, 512, 64),
    "vocabulary": Case(vocabulary, 128_000, 512, 64),
    "experts": Case(experts, 500, 512, 128),
}
BATCH = 8
"""Sequences of a plain pass at a time."""


def run(name: str, smoke: bool, examples: int | None, estimate: bool) -> dict[str, Any]:
    """One case's figures."""
    case = CASES[name]
    torch.manual_seed(0)
    count, length = (24, 16) if smoke else (examples or case.examples, case.length)
    model = case.make(smoke).eval()
    words = 500 if smoke else case.words
    data = {"input_ids": torch.randint(0, words, (count, length))}
    asked = {"input_ids": torch.randint(0, words, (2, length))}

    def plain_pass(some: int) -> float:
        began = time.perf_counter()
        for start in range(0, some, BATCH):
            default_loss(model, {"input_ids": data["input_ids"][start : start + BATCH]}).sum().backward()
            model.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    few = min(count, 4 * BATCH)
    plain_pass(BATCH)
    pass_seconds = plain_pass(few) * count / few
    before = peak_rss()
    out: dict[str, Any] = {"examples": count, "tokens": length, "plain_pass_seconds": pass_seconds}
    with tempfile.TemporaryDirectory() as folder:
        if estimate:
            began = time.perf_counter()
            said = Index.estimate(model=model, data=data, progress=False)
            out["estimate"] = {
                "seconds": time.perf_counter() - began,
                "build_seconds": said.seconds_total,
                "disk": said.disk_total,
                "memory": said.memory,
                "temporary": said.temporary,
            }
        began = time.perf_counter()
        index = Index.build(Path(folder) / "i", model=model, data=data, progress=False)
        out["build_seconds"] = time.perf_counter() - began
        out["passes"] = out["build_seconds"] / pass_seconds
        out["seconds"] = index.build_report["seconds"]
        out["peak_above"] = peak_rss() - before
        out["peak"] = peak_rss()
        began = time.perf_counter()
        hits = index.search(asked, k=5)
        out["search_seconds"] = time.perf_counter() - began
        if hits.ids.shape != (2, 5) or not bool((hits.scores[:, :-1] >= hits.scores[:, 1:]).all()):
            raise RuntimeError(f"{name}: wrong hits {hits.ids}")
        out |= {"disk": index.nbytes, "row": index.bytes_per_example, "layers": len(index.layers)}
    return out


def main() -> None:
    parsed = arguments(
        __doc__,
        only={"nargs": "*", "default": list(CASES), "choices": list(CASES)},
        examples={"type": int, "default": None},
        estimate={"action": "store_true", "help": "ask Index.estimate first"},
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in parsed.only:
            try:
                found[name] = in_child(
                    lambda name=name: run(name, parsed.smoke, parsed.examples, parsed.estimate),
                    Path(folder) / f"{name}.json",
                )
            except RuntimeError as error:
                found[name] = {"error": str(error)}
    head = ["case", "layers", "N", "plain pass s", "build s", "passes", "peak above GB", "disk MB", "row B", "search s"]
    lines = [head]
    for name, one in found.items():
        if "error" in one:
            lines.append([name, one["error"], *[""] * (len(head) - 2)])
            continue
        lines.append(
            [name, f"{one['layers']}", f"{one['examples']}", f"{one['plain_pass_seconds']:.1f}"]
            + [f"{one['build_seconds']:.1f}", f"{one['passes']:.2f}", f"{one['peak_above'] / 1e9:.2f}"]
            + [f"{one['disk'] / 1e6:.1f}", f"{one['row']}", f"{one['search_seconds']:.1f}"]
        )
        print(name, {stage: round(s, 1) for stage, s in one["seconds"].items()}, one.get("estimate", ""))
    table(lines)
    for name, one in found.items():
        if "error" not in one:
            keep("widths", one, parsed, name)
    if any("error" in one for one in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""A tiny language model on disk, and texts for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from lorif_index.text import Document
from lorif_index.text.demo_model import DemoSettings, new_model, train_tokenizer

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


def tiny_tokenizer():
    return train_tokenizer([Document(s, "") for s in SENTENCES], TINY.vocabulary)


def tiny_model_folder(folder: Path, seed: int = 0, context: int = TINY.context) -> Path:
    """A GPT-2-architecture model with random weights, and its tokenizer, as save_pretrained writes them."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    new_model(replace(TINY, context=context), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

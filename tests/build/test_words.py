"""Words: BM25 ranks of hits are those of an oracle that counts words itself, and of the command line, too."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_tokenizer

from lorif_index import Index
from lorif_index.errors import ConfigError, QueryError

PLACES = ["harbour", "forest", "market", "river", "castle", "desert"]
TEXTS = [
    f"{a} road to the {b}, {'and ' * (i % 4)}{a} again"
    for i, (a, b) in enumerate((a, b) for a in PLACES for b in PLACES)
]


def cut(text: str) -> list[str]:
    return re.findall(r"\b\w+\b", text.lower())


def bm25(texts: list[str], question: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's form; idf = log(1 + (n - df + .5) / (df + .5)), and no factor k1 + 1."""
    documents = [cut(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    out = np.zeros(len(texts))
    for word in cut(question):
        having = sum(word in document for document in documents)
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for i, document in enumerate(documents):
            times = document.count(word)
            out[i] += rarity * times / (times + k1 * (1 - b + b * len(document) / mean))
    return out


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("words") / "i"
    payloads: list[Any] = [{"text": text} if i % 2 else text for i, text in enumerate(TEXTS)]
    return Index.build(
        path, model=make_model("gpt2"), data=TEXTS, tokenizer=tiny_tokenizer(), payloads=payloads, progress=False
    )


def expected(question: str, ids: np.ndarray) -> list[int]:
    scores = bm25(TEXTS, question).astype(np.float32)
    return [int((scores > scores[i] * (1 + 1e-5)).sum()) + 1 if scores[i] > 0 else 0 for i in ids]


def test_ranks_are_those_of_bm25(index: Index) -> None:
    questions = ["a Harbour by the river", "castle", "nothing of this is there"]
    hits = index.search(questions, 12, lexical=True)
    assert hits.lexical is not None and hits.lexical.shape == (3, 12)
    for question, ids, found in zip(questions, hits.ids, hits.lexical, strict=True):
        assert found.tolist() == expected(question, ids)
    assert (hits.lexical[2] == 0).all() and hits.lexical[0].max() > 1
    # All else is as without.
    plain = index.search(questions, 12)
    assert plain.lexical is None and np.array_equal(plain.ids, hits.ids) and np.array_equal(plain.scores, hits.scores)
    assert hits.columns()["lexical"] == hits.lexical.ravel().tolist() and "lexical" not in plain.columns()
    assert "lexical" in hits._repr_html_() and list(hits.to_pandas().columns)[4:] == ["lexical", "payload"]


def test_questions_of_every_kind(index: Index) -> None:
    row = {"prompt": "the castle", "completion": " by the river"}
    for question, words in (
        (row, "the castle by the river"),
        ([row], "the castle by the river"),
        ({"text": "forest"}, "forest"),
    ):
        hits = index.search(question, 5, lexical=True)
        assert hits.lexical is not None and hits.lexical[0].tolist() == expected(words, hits.ids[0])


def test_what_has_no_words_is_refused(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QueryError, match="the question is no text"):
        index.search({"input_ids": torch.tensor([[1, 2, 3]])}, 3, lexical=True)
    bare = Index.build(tmp_path / "i", model=make_model("gpt2"), data=TEXTS, tokenizer=tiny_tokenizer(), progress=False)
    with pytest.raises(QueryError, match="keeps no texts"):
        bare.search("castle", 3, lexical=True)
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match="pip install bm25s"):
        bare.search("castle", 3, lexical=True)


def test_words_follow_the_index(index: Index, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), make_model("gpt2")
    own = Index.build(tmp_path / "i", model=model, data=TEXTS, tokenizer=tokenizer, payloads=TEXTS, progress=False)
    own.search("castle", 3, lexical=True)
    own.add(["castle castle castle"], payloads=["castle castle castle"], progress=False)
    own.remove([0])
    hits = own.search("castle", len(own), lexical=True)
    assert hits.lexical is not None
    there = dict(zip(hits.ids[0].tolist(), hits.lexical[0].tolist(), strict=True))
    assert there[len(TEXTS)] == 1 and 0 not in there

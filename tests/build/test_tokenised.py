"""Texts, chats, prompts, tokens and packed rows as data and as questions: what has a loss, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT, MARKED, SENTENCES, WHOLE, captured, close, decoder_tokenizer, encoder_tokenizer, make_model
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lorif_index import BuildConfig, Index, default_loss
from lorif_index.capture.data import as_source
from lorif_index.errors import ConfigError, DataError, FingerprintError, IndexExistsError, QueryError
from lorif_index.text import TokenisedData, UnpackedDocuments
from lorif_index.text.tokenised import prepared

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

TALK = [
    {"role": "user", "content": "The cat sat on the mat."},
    {"role": "assistant", "content": "A dog ran."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Rain fell."},
]


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return make_model("gpt2")


@pytest.fixture(scope="module")
def bpe() -> Any:
    tokenizer = decoder_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def index(gpt2: Any, bpe: Any, tmp_path_factory: Any) -> Index:
    place = tmp_path_factory.mktemp("texts") / "idx"
    # Batches of four: what a text's batch is must not matter.
    config = BuildConfig(batch_size=4, coarse=None)
    data = datasets.Dataset.from_dict({"text": SENTENCES, "source": [str(i) for i in range(10)]})
    return Index.build(place, model=gpt2, data=data, config=config, tokenizer=bpe, payloads=SENTENCES)


def learnt(item: dict[str, Any], tokenizer: Any) -> str:
    """The text of the tokens that have a loss."""
    return tokenizer.decode([token for token in item["labels"] if token != -100])


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_only_the_assistant_has_a_loss(template: str, bpe: Any) -> None:
    tokenizer = decoder_tokenizer()
    tokenizer.chat_template = template
    tokenizer.model_max_length = 200
    (item,) = TokenisedData([{"messages": TALK, "text": "no"}], tokenizer)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(item["input_ids"]) == whole
    assert learnt(item, tokenizer) == "A dog ran.</>Rain fell.</>"


def test_only_the_completion_has_a_loss(bpe: Any) -> None:
    rows = [{"prompt": SENTENCES[0], "completion": " A dog."}, {"prompt": "", "completion": "The sun came."}]
    first, second = TokenisedData(rows, bpe)
    assert learnt(first, bpe) == " A dog." and bpe.decode(first["input_ids"]) == SENTENCES[0] + " A dog."
    assert learnt(second, bpe) == "The sun came."
    (talk,) = TokenisedData([{"prompt": TALK[:1], "completion": TALK[1:2]}], bpe)
    assert learnt(talk, bpe) == "A dog ran.</>"


def test_tokens_need_no_tokenizer_and_masks_of_trainers_count(gpt2: Any) -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8, 9]], "completion_mask": [[0, 0, 1], [0, 1]], "text": ["a", "b"], "n": [["x"], []]}
    )
    data = prepared(rows, gpt2, None)
    _, batch = next(iter(as_source(data, 2).batches()))
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, -100, 7], [-100, 9, -100]],
    }


def test_rows_do_not_depend_on_padding_or_order(gpt2: Any, bpe: Any) -> None:
    data = TokenisedData(SENTENCES, bpe, model=gpt2)
    found = captured(gpt2, data)
    alone = captured(gpt2, data, BuildConfig(projection_dim=None, rank=None, batch_size=1))
    assert all(close(found[name], alone[name], 1e-4) for name in found)


def test_a_text_hides_the_same_words_whenever_it_comes() -> None:
    model, tokenizer = make_model("bert"), encoder_tokenizer()
    a = TokenisedData(SENTENCES, tokenizer, model=model)
    b = TokenisedData(SENTENCES[::-1], tokenizer, model=model)
    for i, item in enumerate(a):
        assert item == b[9 - i]
        hidden = [t for t, label in enumerate(item["labels"]) if label != -100]
        words = len(item["input_ids"]) - 2
        assert len(hidden) == -(-words * 15 // 100)
        assert all(item["input_ids"][t] == tokenizer.mask_token_id for t in hidden)
        restored = [
            label if label != -100 else token for token, label in zip(item["input_ids"], item["labels"], strict=True)
        ]
        assert restored == tokenizer(SENTENCES[i])["input_ids"]


def test_classifiers_are_padded_with_their_own_token() -> None:
    model = make_model("llama-classifier")
    rows = [{"input_ids": [4, 5, 6, 9], "label": 2}, {"input_ids": [4, 9], "label": 0}]
    data = prepared(rows, model, None)
    _, batch = next(iter(as_source(data, 2).batches()))
    assert batch["input_ids"][1].tolist() == [4, 9, 7, 7] and batch["labels"].tolist() == [2, 0]
    alone = torch.cat([default_loss(model, data.collate_examples([item])) for item in data])
    assert torch.allclose(default_loss(model, batch), alone, atol=1e-5)


def test_questions_in_words(index: Index, gpt2: Any, bpe: Any) -> None:
    ids = {s: torch.tensor([bpe(s)["input_ids"]]) for s in SENTENCES}
    by_hand = index.scores({"input_ids": ids[SENTENCES[4]]})
    for asked in (SENTENCES[4], [SENTENCES[4]], {"text": SENTENCES[4]}):
        assert close(index.scores(asked), by_hand, 1e-5)
    hits = index.search(SENTENCES[4:6], k=1, normalize="cosine")
    assert hits.ids[:, 0].tolist() == [4, 5] and hits.payloads[0][0] == SENTENCES[4]
    talk = TALK[:2]
    data = TokenisedData([{"messages": talk}], bpe, model=gpt2)
    expected = index.scores(data.collate_examples([data[0]]))
    assert close(index.scores(talk), expected, 1e-5) and close(index.scores([talk, talk])[1], expected[0], 1e-5)
    prompts = [{"prompt": "The", "completion": " cat sat"}, {"prompt": "A", "completion": " dog"}]
    assert close(index.scores(prompts)[0], index.scores(prompts[0])[0], 1e-5)
    tokens = index.scores({"input_ids": ids[SENTENCES[4]][0].tolist()})
    assert close(tokens, by_hand, 1e-5)


def test_a_question_that_cannot_be_asked(index: Index, gpt2: Any, bpe: Any) -> None:
    with pytest.raises(QueryError, match="more than 60 tokens"):
        index.search("and " * 100)
    with pytest.raises(QueryError, match="no token that has a loss"):
        index.search("a")
    # Another measure may do without.
    assert index.search("a", k=1, measure=lambda m, b: m(**b).logits.float().flatten(1).sum(dim=1)).ids.shape == (1, 1)
    bare = Index.open(index.path, model=gpt2)
    for query in ("A text.", ["A text."], TALK, {"prompt": "a", "completion": "b"}):
        with pytest.raises(QueryError, match="knows no tokenizer"):
            bare.search(query)
    other = decoder_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(FingerprintError, match="vocabulary or chat template"):
        Index.open(index.path, model=gpt2, tokenizer=other)


def test_an_index_is_estimated_and_grows_in_words(gpt2: Any, bpe: Any, tmp_path: Path) -> None:
    config = BuildConfig(batch_size=4, coarse=None)
    assert (
        Index.estimate(model=gpt2, data=SENTENCES, tokenizer=bpe, config=BuildConfig(batch_size=64), batches=1).examples
        == 10
    )
    stream = datasets.Dataset.from_dict({"text": SENTENCES}).to_iterable_dataset()
    index = Index.build(tmp_path / "a", model=gpt2, data=stream, tokenizer=bpe, config=config)
    whole = Index.build(
        tmp_path / "b", model=gpt2, data=SENTENCES, tokenizer=bpe, config=config, curvature=SENTENCES[:8]
    )
    assert len(index) == len(whole) == 10
    bare = Index.open(tmp_path / "a", model=gpt2)
    assert bare.add(SENTENCES[:2], tokenizer=bpe).tolist() == [10, 11]
    bare = Index.open(tmp_path / "a", model=gpt2, tokenizer=bpe)
    assert set(bare.search(SENTENCES[1], k=2, normalize="cosine").ids[0].tolist()) == {1, 11}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            ["fine and good", "and " * 90, "and " * 80],
            DataError,
            r"2 of 3 examples have more than 60 tokens.*example 1",
        ),
        (
            ["fine and good", "", "a"],
            DataError,
            r"2 of 3 examples have no token that has a loss \(the first is example 1\)",
        ),
        ([{"messages": TALK[:1]}], DataError, "no token that has a loss"),
        ([{"messages": "hello"}], DataError, "example 0: a conversation must be a list"),
        ([{"text": None}], DataError, "text must be a string"),
        ([{"body": "a text"}], DataError, "rename one"),
        ([{"prompt": "a", "completion": TALK}], DataError, "both be texts"),
        ([{"input_ids": [1, 2], "labels": [1]}], DataError, "labels has 1 values where input_ids has 2"),
        ("one string", DataError, "list of strings"),
    ],
)
def test_data_that_cannot_be_used_is_refused_first(
    data: Any, error: type, message: str, gpt2: Any, bpe: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Index.build(tmp_path / "idx", model=gpt2, data=data, tokenizer=bpe)
    assert not (tmp_path / "idx").exists()


def test_rows_of_several_kinds(gpt2: Any, bpe: Any) -> None:
    rows = [{"text": SENTENCES[0]}, {"input_ids": [5, 6, 7], "text": "not this"}, {"messages": TALK[:2]}, SENTENCES[1]]
    data = TokenisedData(rows, bpe, model=gpt2)
    assert data[0] == TokenisedData(SENTENCES, bpe, model=gpt2)[0] and data[1]["input_ids"] == [5, 6, 7]
    assert learnt(data[2], bpe).startswith("A dog ran.") and bpe.decode(data[3]["input_ids"]) == SENTENCES[1]
    # A chat's prompt has no loss in a batch with a text, of which all has.
    batch = data.collate_examples([data[0], data[2]])
    assert batch["labels"][0, : len(data[0]["input_ids"])].tolist() == data[0]["input_ids"]
    assert learnt({"labels": batch["labels"][1].tolist()}, bpe) == learnt(data[2], bpe)
    with pytest.raises(DataError, match="rename one"):
        TokenisedData([*rows, {"body": "a"}], bpe, model=gpt2)


def test_what_else_is_refused(gpt2: Any, bpe: Any, index: Index) -> None:
    with pytest.raises(DataError, match="pass tokenizer="):
        prepared(SENTENCES, gpt2, None)
    with pytest.raises(IndexExistsError):
        Index.build(index.path, model=gpt2, data=SENTENCES, tokenizer=bpe)
    with pytest.raises(ConfigError, match="above the model's context of 60"):
        TokenisedData(SENTENCES, bpe, model=gpt2, max_length=62)
    with pytest.raises(DataError, match="a classifier of tokens"):
        TokenisedData(SENTENCES, encoder_tokenizer(), model=make_model("bert-tags"))
    bare = decoder_tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        TokenisedData([{"messages": TALK}], bare)
    bare.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '' }}{% endfor %}"
    with pytest.raises(DataError, match="message 1 .'assistant'. as a continuation"):
        TokenisedData([{"messages": TALK}], bare)
    for label, message in ((0.5, "no integer"), ("odd", "no integer"), (None, "no label")):
        with pytest.raises(DataError, match=message):
            TokenisedData(
                [{"text": "The cat", "label": label}], encoder_tokenizer(), model=make_model("bert-classifier")
            )


def test_examples_are_cut_where_that_is_asked_for(gpt2: Any, bpe: Any) -> None:
    rows = ["The cat", SENTENCES[0], {"input_ids": list(range(1, 20)), "labels": [-100, *range(2, 20)]}]
    data = TokenisedData(rows, bpe, model=gpt2, max_length=8)
    assert data[0]["input_ids"] == bpe("The cat")["input_ids"] and data[1]["input_ids"] == bpe(rows[1])["input_ids"][:8]
    assert data[2]["input_ids"] == list(range(1, 9)) and data[2]["labels"] == [-100, *range(2, 9)]
    tokenizer = encoder_tokenizer()
    data = TokenisedData(SENTENCES[:1], tokenizer, model=make_model("bert"), max_length=6)
    assert len(data[0]["input_ids"]) == 6 and data[0]["input_ids"][-1] == tokenizer.sep_token_id


class Counted(Dataset):
    """Counts how many of its rows are out at a time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> dict[str, str]:
        self.asked.append(i)
        return {"text": f"The cat sat {i % 7} times"}


def test_text_is_read_as_it_is_needed(gpt2: Any, bpe: Any) -> None:
    rows = Counted()
    data = TokenisedData(rows, bpe, model=gpt2)
    assert rows.asked == list(range(600))
    rows.asked.clear()
    batches = as_source(data, 4).batches()
    next(batches), next(batches)
    assert rows.asked == list(range(8))
    assert not any(len(value) > 20 for value in vars(data).values() if isinstance(value, (list, tuple, dict)))


def test_rows_of_sequences_of_many_lengths_are_in_order(gpt2: Any, bpe: Any, tmp_path: Path) -> None:
    """Batches are of like lengths, and rows those of batches in order; so after an interruption and in an addition."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(["cat", "sat", "dog", "rain"], n)) for n in generator.integers(2, 20, 150)]
    data = TokenisedData(texts, bpe, model=gpt2)
    config = BuildConfig(
        batch_size=2, coarse=None, eigen_bytes=400, compute={"shard_bytes": 400 * 37}, sample={"size": 100}
    )
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate_examples)
    plain = Index.build(tmp_path / "plain", model=gpt2, data=loader, config=config, progress=False)

    def stop(event: Any) -> None:
        if event.stage == "encode" and event.done > 80:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "i", model=gpt2, data=data, config=config, payloads=texts, progress=stop)
    index = Index.build(tmp_path / "i", model=gpt2, data=data, config=config, payloads=texts, progress=False)
    assert index.ids.tolist() == list(range(150)) and index.payloads(index.ids) == texts
    # Fitted on batches that were padded otherwise: the same but for rounding, and a coordinate at a threshold.
    asked = data.collate_examples([data[i] for i in range(8)])
    a, b = index.scores(asked), plain.scores(asked)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
    own = [np.flatnonzero([text == texts[i] for text in texts]) for i in range(8)]
    assert all(int(a[i].argmax()) in own[i] for i in range(8))
    new = index.add(TokenisedData(texts[:70], bpe, model=gpt2), payloads=texts[:70], progress=False)
    again = index.scores(asked)
    assert close(again[:, new], again[:, :70], 1e-3) and index.payloads(new) == texts[:70]


# -- packed rows -------------------------------------------------------------------------------------------------


def packed_rows(length: int = 24) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Documents, and two rows that hold them, padded."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 120, (n,), generator=generator).tolist() for n in (7, 5, 9, 11, 6)]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "document_ids": [], "position_ids": [], "attention_mask": []}
    for part in (documents[:3], documents[3:]):
        tokens = [t for d in part for t in d]
        rest = length - len(tokens)
        rows["input_ids"].append(tokens + [0] * rest)
        rows["document_ids"].append([n for n, d in enumerate(part) for _ in d] + [-1] * rest)
        rows["position_ids"].append([t for d in part for t in range(len(d))] + [0] * rest)
        rows["attention_mask"].append([1] * len(tokens) + [0] * rest)
    return documents, {name: torch.tensor(value) for name, value in rows.items()}


def packed_gradient(model: Any, rows: dict[str, torch.Tensor], r: int, layer: str) -> np.ndarray:
    """The gradient of a whole packed row, with block-diagonal attention, of a linear map without bias."""
    names = rows["document_ids"][r]
    allowed = (names[:, None] == names[None]) & torch.ones(len(names), len(names)).tril().bool()
    mask = torch.zeros(1, 1, len(names), len(names)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = model(
        input_ids=rows["input_ids"][r][None], position_ids=rows["position_ids"][r][None], attention_mask=mask
    ).logits[0]
    inside = (names[1:] == names[:-1]) & (names[1:] >= 0)
    loss = functional.cross_entropy(logits[:-1], rows["input_ids"][r][1:], reduction="none")[inside].sum()
    (found,) = torch.autograd.grad(loss, [model.get_submodule(layer).weight])
    return found.T.numpy()


@pytest.mark.parametrize("by", ["document_ids", "position_ids"])
def test_documents_of_packed_rows_have_their_own_gradients(by: str, tmp_path: Path) -> None:
    model = make_model("llama")
    documents, rows = packed_rows()
    given = datasets.Dataset.from_dict(
        {k: v.tolist() for k, v in rows.items() if k in ("input_ids", "attention_mask", by)}
    )
    data = prepared(given, model, None)
    assert [item["input_ids"] for item in data] == documents
    found = captured(model, data)
    alone = captured(model, [{"input_ids": d} for d in documents])
    assert all(close(found[name], alone[name], 1e-4) for name in found)
    for layer in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        for r, part in enumerate((slice(0, 3), slice(3, 5))):
            assert close(found[layer][part].sum(axis=0), packed_gradient(model, rows, r, layer)), (layer, r)
    index = Index.build(tmp_path / "idx", model=model, data=given, config=BuildConfig(batch_size=4))
    assert len(index) == 5
    assert index.search([given[1]], k=1, normalize="cosine").ids[:, 0].tolist() == [3, 4]


def test_positions_of_packed_rows_are_kept(gpt2: Any) -> None:
    _, rows = packed_rows()
    # A model whose positions run on through the row.
    rows["position_ids"] = torch.arange(24).expand(2, 24)
    given = datasets.Dataset.from_dict({k: v.tolist() for k, v in rows.items()})
    data = prepared(given, gpt2, None)
    assert data[1]["position_ids"] == list(range(7, 12))
    assert UnpackedDocuments(given).origins.tolist() == [[0, 0, 7], [0, 7, 12], [0, 12, 21], [1, 0, 11], [1, 11, 17]]


def test_packed_rows_that_are_no_documents(gpt2: Any) -> None:
    _, rows = packed_rows()
    with pytest.raises(DataError, match=r"packed \(document_ids\)"):
        Index.build("never", model=gpt2, data=DataLoader([{k: v[0] for k, v in rows.items()}]))
    with pytest.raises(DataError, match="restart at 0"):
        default_loss(gpt2, {k: v for k, v in rows.items() if k != "document_ids"})
    with pytest.raises(DataError, match="document 4 in several pieces"):
        UnpackedDocuments([{"input_ids": [1, 2, 3], "document_ids": [4, 5, 4]}])
    with pytest.raises(DataError, match=r"labels has shape \(2,\) where input_ids has \(3,\)"):
        UnpackedDocuments([{"input_ids": [1, 2, 3], "document_ids": [4, 4, 4], "labels": [1, 2]}])
    assert WHOLE.rank is None and json.dumps(rows["document_ids"][0].tolist())

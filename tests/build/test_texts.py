from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
import xxhash
from conftest import SENTENCES, tiny_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from lorif_index.capture.data import as_source
from lorif_index.errors import ConfigError, CorruptionError, DataError, StoreError
from lorif_index.text.texts import Document, Passage, PassageSpool, TokenWindows, cut, read_documents, read_passages


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Letters:
    """One token per character; "slow": it has no offsets."""

    is_fast = False

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids))


# -- reading


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgrün\r\nund blau\n".encode())
    assert list(read_documents(path)) == [Document("grün\nund blau\n", "a.txt", lined=True)]


def test_a_folder_is_walked_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("three")
    (tmp_path / "c.txt").write_text("four")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "ignored.csv").write_text("no")
    found = [(d.text, d.source) for d in read_documents(tmp_path)]
    assert found == [("one", "a.jsonl:1"), ("two", "a.jsonl:2"), ("three", "b/z.txt"), ("four", "c.txt")]


def test_jsonl_fields_and_blank_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "one\\u2028line", "url": "u1"}\n\n  \n{"body": "two", "url": 7}\n')
    assert list(read_documents(path, text_field="body", source_field="url")) == [
        Document("one\u2028line", "u1"),
        Document("two", "7"),
    ]
    assert [d.source for d in read_documents(path, text_field="body")] == ["d.jsonl:1", "d.jsonl:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', r"d.jsonl:2 has no field 'text', only \['body'\]"),
        (b'{"text": "x"', "d.jsonl:2 is not JSON"),
        (b"[1]", "d.jsonl:2 is no JSON object, but of type list"),
        (b'{"text": null}', "d.jsonl:2: field 'text' holds NoneType, not text"),
        (b'{"text": "\xff"}', "d.jsonl:2 is not JSON"),
        (b"[" * 100_000, "d.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(read_documents(path))


def test_a_missing_source_field_is_named(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="d.jsonl:1 has no field 'url'"):
        list(read_documents(path, source_field="url"))


def test_paths_that_hold_no_texts(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    for name, message in [
        ("nothing", "does not exist"),
        ("empty", "no .txt or .jsonl file"),
        ("x.csv", "neither in .txt nor in .jsonl"),
        ("latin.txt", "not UTF-8"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_documents(tmp_path / name))


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a b", "c"], "url": ["u1", "u2"]})
    one.save_to_disk(str(tmp_path / "one"))
    assert list(read_documents(tmp_path / "one")) == [Document("a b", "row 0"), Document("c", "row 1")]
    assert [d.source for d in read_documents(tmp_path / "one", source_field="url")] == ["u1", "u2"]
    with pytest.raises(DataError, match="row 0 has no field 'body'"):
        list(read_documents(tmp_path / "one", text_field="body"))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(DataError, match=r"several datasets, \['test', 'train'\]"):
        list(read_documents(tmp_path / "several"))
    assert len(list(read_documents(tmp_path / "several" / "train"))) == 2
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read as a saved dataset"):
        list(read_documents(tmp_path / "one"))


# -- cutting


@given(length=st.integers(0, 40), max_length=st.integers(2, 12), data=st.data())
def test_windows_cover_every_token_in_order(length, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    text = "".join(chr(97 + i % 26) for i in range(length))
    (pieces,) = cut([Document(text, "s")], Letters(), max_length=max_length, stride=stride)
    assert all(2 <= len(ids) <= max_length for _, ids in pieces)
    assert all(passage.text == "".join(map(chr, ids)) for passage, ids in pieces)
    covered = set()
    for number, (passage, ids) in enumerate(pieces):
        assert passage.text == text[number * stride : number * stride + max_length]
        # A window that holds nothing new is not made.
        here = set(range(number * stride, number * stride + len(ids)))
        assert here - covered
        covered |= here
    # Only a last window of a single token may be missing.
    assert len(covered) >= length - 1


def test_passages_are_the_very_text_of_their_tokens(tokenizer):
    text = "\n".join(SENTENCES) + "\nübrigens 🙂 fertig\n"
    (pieces,) = cut([Document(text, "s.txt", lined=True)], tokenizer, max_length=16)
    assert sum(len(ids) for _, ids in pieces) == len(tokenizer(text)["input_ids"])
    assert "".join(passage.text for passage, _ in pieces) == text
    assert all(tokenizer.decode(ids) == passage.text for passage, ids in pieces if "🙂" not in passage.text)


def test_passages_of_a_text_file_are_named_by_their_lines(tokenizer):
    text = "one two\nthree four\nfive six\n"
    (pieces,) = cut([Document(text, "s.txt", lined=True)], tokenizer, max_length=1000)
    assert [p.source for p, _ in pieces] == ["s.txt:1-3"]
    (pieces,) = cut([Document(text, "s.txt", lined=True)], Letters(), max_length=9)
    assert [p.source for p, _ in pieces][:2] == ["s.txt, part 1 of 3", "s.txt, part 2 of 3"]
    (pieces,) = cut([Document(text, "s.txt", lined=True)], tokenizer, max_length=2)
    at = 0
    for passage, _ in pieces:
        # A newline belongs to the line that it ends.
        first, last = (text[:i].count("\n") + 1 for i in (at, at + len(passage.text) - 1))
        assert passage.source == f"s.txt:{first}-{last}"
        at += len(passage.text)


def test_other_passages_are_numbered_where_there_are_several(tokenizer):
    short, long = Document("one two", "a"), Document(" ".join(SENTENCES), "b")
    first, second = cut([short, long], tokenizer, max_length=24)
    assert [p.source for p, _ in first] == ["a"]
    assert next(p.source for p, _ in second) == f"b, part 1 of {len(second)}"


def test_empty_documents_keep_their_place(tokenizer):
    pieces = list(cut([Document("", "a"), Document("one two", "b"), Document("\n", "c")], tokenizer, max_length=8))
    assert [len(p) for p in pieces] == [0, 1, 0]


def test_special_tokens_stand_for_no_text():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tiny_tokenizer().backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    (pieces,) = cut([Document("one two", "a")], PreTrainedTokenizerFast(tokenizer_object=inner), max_length=20)
    ((passage, ids),) = pieces
    assert ids[0] == 0 and passage.text == "one two"


@pytest.mark.parametrize(("max_length", "stride"), [(1, None), (8, 0), (8, 9)])
def test_lengths_out_of_range(tokenizer, max_length, stride):
    with pytest.raises(ConfigError, match="must be"):
        list(cut([Document("x", "s")], tokenizer, max_length=max_length, stride=stride))


def test_windows_are_a_dataset_that_is_padded_in_batches():
    windows = TokenWindows()
    windows.append([5, 6, 7])
    windows.append([8, 9])
    assert len(windows) == 2 and windows.tokens == 5 and windows.length(0) == 3
    assert windows[1]["input_ids"].dtype == torch.int64
    ((ids, batch),) = as_source(windows, 4).batches()
    np.testing.assert_array_equal(ids, [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(IndexError, match="2 of 2"):
        windows[2]


# -- keeping


def test_passages_come_back(tmp_path):
    passages = [Passage("one\ntwo\u2028\x85three", "a"), Passage("", "ü"), Passage("🙂", "c:1")]
    with PassageSpool(tmp_path) as spool:
        for passage in passages:
            spool.append(passage)
            assert spool[len(spool) - 1] == {"text": passage.text, "source": passage.source}
        assert [Passage(**spool[i]) for i in (2, 0, 2)] == [passages[2], passages[0], passages[2]]
        with pytest.raises(IndexError):
            spool[3]
    assert list(tmp_path.iterdir()) == []


def keep(tmp_path, passages):
    """As version 4 wrote them."""
    lines = [json.dumps({"source": p.source, "text": p.text}, ensure_ascii=False) + "\n" for p in passages]
    data = "".join(lines).encode()
    (tmp_path / "passages.jsonl").write_bytes(data)
    return {"file": "passages.jsonl", "count": len(passages), "digest": xxhash.xxh3_128_hexdigest(data)}


def test_passages_of_older_indexes_are_read(tmp_path):
    passages = [Passage("one\ntwo", "a"), Passage("", "ü")]
    assert read_passages(tmp_path, keep(tmp_path, passages), [1, 0]) == {0: passages[0], 1: passages[1]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b"two", b"owt"),
        lambda data: data[:-5],
        lambda data: data + data,
        lambda data: b"",
    ],
)
def test_changed_passages_are_refused(tmp_path, damage):
    known = keep(tmp_path, [Passage("one", "a"), Passage("two", "b")])
    path = tmp_path / "passages.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptionError, match=r"passages.jsonl has \d passages"):
        read_passages(tmp_path, known, [0])


def test_missing_passages_are_named(tmp_path):
    with pytest.raises(StoreError, match="passages.jsonl is missing"):
        read_passages(tmp_path, {"count": 1, "digest": ""}, [0])


def test_modules_are_imported_lazily():
    import lorif_index.cli
    import lorif_index.text.texts

    for module in (lorif_index.text.texts, lorif_index.cli):
        names = {v.__name__.split(".")[0] for v in vars(module).values() if isinstance(v, types.ModuleType)}
        assert not names & {"transformers", "datasets", "tokenizers"}

from __future__ import annotations

import types

import pytest
from conftest import SENTENCES, tiny_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from lorif_index.errors import ConfigError, DataError
from lorif_index.text import Document, TokenisedData, read_documents
from lorif_index.text.passages import Passages, cut, described


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Letters:
    """One token per character."""

    is_fast = True

    def __call__(self, texts, **kwargs):
        return {
            "input_ids": [[ord(c) for c in text] for text in texts],
            "offset_mapping": [[(i, i + 1) for i in range(len(text))] for text in texts],
        }


# -- reading


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgrün\r\nund blau\n".encode())
    assert list(read_documents(path)) == [Document("grün\nund blau\n", "a.txt")]


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


def test_a_field_called_source_is_taken_unasked(tmp_path):
    rows = [
        {"text": "one", "source": "here"},
        {"text": "two"},
        {"text": "3", "source": None},
        {"text": "4", "source": 4},
    ]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    assert [d.source for d in read_documents(path)] == ["here", "t.jsonl:2", "t.jsonl:3", "4"]


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


def pieces_of(document, tokenizer, **lengths):
    """(source, text, tokens) of each passage."""
    ((found, rows, tokens),) = cut([document], tokenizer, **lengths)
    assert found == document
    out = [(r["source"], r["text"], r.get("input_ids") or tokenizer([r["text"]])["input_ids"][0]) for r in rows]
    assert tokens == sum(len(ids) for *_, ids in out)
    return out


@given(length=st.integers(0, 40), max_length=st.integers(2, 12))
def test_windows_cover_every_token_in_order(length, max_length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    covered = set()
    for number, (_, words, ids) in enumerate(pieces_of(Document(text, "s"), Letters(), max_length=max_length)):
        assert 2 <= len(ids) <= max_length and words == "".join(map(chr, ids))
        assert words == text[number * max_length : (number + 1) * max_length]
        # A window that holds nothing new is not made.
        here = set(range(number * max_length, number * max_length + len(ids)))
        assert here - covered
        covered |= here
    # Only a last window of a single token may be missing.
    assert len(covered) >= length - 1


def test_passages_are_the_very_text_of_their_tokens(tokenizer):
    text = "\n".join(SENTENCES) + "\nübrigens 🙂 fertig\n"
    pieces = pieces_of(Document(text, "s.txt"), tokenizer, max_length=16)
    assert [token for *_, ids in pieces for token in ids] == tokenizer(text)["input_ids"]
    assert "".join(words for _, words, _ in pieces) == text
    assert all(tokenizer.decode(ids) == words for _, words, ids in pieces if "🙂" not in words)


def test_passages_are_numbered_where_there_are_several(tokenizer):
    assert [source for source, *_ in pieces_of(Document("one two", "a"), tokenizer, max_length=24)] == ["a"]
    long = pieces_of(Document(" ".join(SENTENCES), "b"), tokenizer, max_length=24)
    assert long[0][0] == f"b, part 1 of {len(long)}"


def test_empty_documents_keep_their_place(tokenizer):
    documents = [Document("", "a"), Document("one two", "b"), Document("\n", "c")]
    found = [(document.source, len(rows)) for document, rows, _ in cut(documents, tokenizer, max_length=8)]
    assert found == [("a", 0), ("b", 1), ("c", 0)]


def test_special_tokens_stand_for_no_text():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tiny_tokenizer().backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ((_, words, ids),) = pieces_of(Document("one two", "a"), tokenizer, max_length=20)
    assert ids[0] == 0 and words == "one two"
    # Windows in the middle lack it, and keep their tokens for that.
    ((_, (first, *others), _),) = cut([Document(" ".join(SENTENCES), "a")], tokenizer, max_length=20)
    assert "input_ids" not in first and others and all(0 not in row["input_ids"] for row in others)


def test_lengths_out_of_range(tokenizer):
    with pytest.raises(ConfigError, match="must be"):
        list(cut([Document("x", "s")], tokenizer, max_length=1))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match="SimpleNamespace tells no places"):
        list(cut([Document("x", "s")], types.SimpleNamespace(is_fast=False), max_length=8))


# -- keeping


def test_passages_are_examples_and_payloads(tmp_path, tokenizer):
    pieces = [Document(text, f"d{n}") for n, text in enumerate(["one\ntwo\u2028\x85three", "", "a 🙂 " * 9])]
    passages = Passages(pieces, tokenizer, max_length=8, folder=tmp_path, progress=False)
    assert passages.max_length == 8
    rows = [passages[i] for i in range(len(passages))]
    assert [passages[i] for i in (2, 0, 2)] == [rows[2], rows[0], rows[2]]
    assert any("input_ids" in row for row in rows) and not all("input_ids" in row for row in rows)
    whole = [tokenizer(document.text)["input_ids"] for document in pieces]
    examples = TokenisedData(passages, tokenizer)
    assert [token for item in examples.__getitems__(range(len(rows))) for token in item["input_ids"]] == [
        token for ids in whole for token in ids
    ]
    assert passages.tokens == sum(map(len, whole))
    assert described(rows[0]) == (rows[0]["text"], "d0, part 1 of 2")
    with pytest.raises(IndexError):
        passages[len(rows)]
    assert list(tmp_path.iterdir()) == []


def test_payloads_of_all_kinds_are_described():
    assert described(None) == (None, None) and described("a") == ("a", None)
    assert described({"source": 3, "label": 1}) == ('{\n "source": 3,\n "label": 1\n}', "3")


def test_nothing_to_index_is_said(tokenizer):
    with pytest.raises(DataError, match="none of the 2 documents has a passage"):
        Passages([Document("", "a"), Document("", "b")], tokenizer, max_length=8, progress=False)


def test_modules_are_imported_lazily():
    import lorif_index.cli
    import lorif_index.text.model

    for module in (lorif_index.text.model, lorif_index.cli):
        names = {v.__name__.split(".")[0] for v in vars(module).values() if isinstance(v, types.ModuleType)}
        assert not names & {"transformers", "datasets", "tokenizers"}

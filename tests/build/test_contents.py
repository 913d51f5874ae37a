"""Contents: an example is found again wherever it comes from, copies are said, and neither is lost by what changes an
index."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, small_data, small_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from lorif_index import BuildConfig, Index
from lorif_index.capture.contents import contents_of
from lorif_index.capture.data import collate
from lorif_index.config import Compute, Sample
from lorif_index.errors import QueryError
from lorif_index.search import contents as module

COPIES = {17: 3, 60: 3, 41: 40}


def repeated_data() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = small_data()
    for copy, first in COPIES.items():
        x[copy], y[copy] = x[first], y[first]
    return x, y


def build(path: Path, data: Any, **settings: Any) -> Index:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Index.build(path, model=small_model(), data=data, progress=False, **settings)


def lists(groups: list[np.ndarray]) -> list[list[int]]:
    return [group.tolist() for group in groups]


def test_copies_are_said_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"3 of 90 examples are copies of others \(such as \[3, 17, 60\]\)"):
        index = Index.build(tmp_path / "i", model=small_model(), data=repeated_data(), progress=False)
    assert lists(index.duplicates()) == [[3, 17, 60], [40, 41]]
    assert index.build_report["duplicates"] == {"examples": 3, "looked_at": 1.0, "first": [[3, 17, 60], [40, 41]]}
    assert "3 examples were copies" in repr(index)
    # That is what it means: the same score for every question.
    scores = index.scores(small_data(5, seed=9))
    assert np.array_equal(scores[:, 3], scores[:, 17]) and np.array_equal(scores[:, 40], scores[:, 41])


def test_nothing_is_said_where_there_are_no_copies(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*copies.*")
        index = Index.build(tmp_path / "i", model=small_model(), data=small_data(), progress=False)
    assert index.duplicates() == [] and "copies" not in repr(index)


@pytest.mark.parametrize("kept", [True, False], ids=["rows kept meanwhile", "taken again"])
def test_examples_are_found_again(kept: bool, tmp_path: Path) -> None:
    x, y = repeated_data()
    settings = Compute() if kept else Compute(spool_bytes=0)
    index = build(tmp_path / "i", (x, y), config=BuildConfig(compute=settings, sample=Sample(size=60)))
    other, labels = small_data(4, seed=7)
    asked = (torch.cat([other[:1], x[[17, 5]], other[1:]]), torch.cat([labels[:1], y[[17, 5]], labels[1:]]))
    assert lists(index.find(asked)) == [[], [3, 17, 60], [5], [], [], []]
    assert lists(index.find((asked[0].double(), asked[1].to(torch.int32)))) == lists(index.find(asked))
    assert lists(index.find((x[:2], (y[:2] + 1) % 3))) == [[], []], "another label is another example"
    one, two, three = index.contents([17, 3, 5])
    assert one == two != three and len(one) == 32 and int(one, 16)


def test_hashes_go_where_rows_go(tmp_path: Path) -> None:
    x, y = repeated_data()
    index = build(tmp_path / "i", (x, y))
    before = index.contents([3, 5, 60])
    added, labels = small_data(6, seed=3)
    added[2], labels[2] = x[5], y[5]
    added[4], labels[4] = added[3], labels[3]
    with pytest.warns(UserWarning, match=r"2 of the added examples are copies of others \(such as \[5, 92\]\)"):
        index.add((added, labels), progress=False)
    assert lists(index.find((x[[5]], y[[5]]))) == [[5, 92]]
    index.remove([3, 40])
    assert lists(index.duplicates()) == [[5, 92], [17, 60], [93, 94]]
    index.compact(progress=False)
    assert lists(index.duplicates()) == [[5, 92], [17, 60], [93, 94]]
    assert index.contents([5, 60]).tolist() == before[1:].tolist()
    again = build(tmp_path / "again", (added, labels), fit=index)
    merged = Index.merge(tmp_path / "merged", [index, again], progress=False)
    assert lists(merged.find((x[[5]], y[[5]]))) == [[5, 92, 96 + 2]]
    merged.verify()


def test_an_index_of_gradients_says_that_it_has_none(tmp_path: Path) -> None:
    g = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0))
    index = Index.build(tmp_path / "i", gradients=[{"a": g}], progress=False)
    assert index.build_report["duplicates"] is None
    for ask in (lambda: index.duplicates(), lambda: index.contents([1]), lambda: index.find(torch.zeros(2, 3))):
        with pytest.raises(QueryError, match="no hashes"):
            ask()
    with pytest.raises(QueryError, match="no row with id 99"):
        index.contents([99])


def test_damaged_hashes_are_found(tmp_path: Path) -> None:
    index = build(tmp_path / "i", repeated_data())
    shard = next((tmp_path / "i").glob("shard*"))
    raw, wanted = bytearray(shard.read_bytes()), bytes.fromhex(str(index.contents([4])[0]))
    index.close()
    raw[raw.index(wanted)] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(Exception, match="contents in .* do not match"):
        Index.open(tmp_path / "i").contents([4])


def test_of_many_rows_a_part_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies of an example lie in one part, so that the estimate is right on average, and the list complete."""
    x, y = small_data(600)
    for i in range(100):
        x[500 + i], y[500 + i] = x[i], y[i]
    monkeypatch.setattr(module, "AT_ONCE", 200)
    index = build(tmp_path / "i", (x, y))
    report = index.build_report["duplicates"]
    assert report["looked_at"] == round(1 / 3, 6) and 60 <= report["examples"] <= 140
    assert lists(index.duplicates()) == [[i, 500 + i] for i in range(100)]


# -- what a hash is of ------------------------------------------------------------------------------------------------

ITEMS = [[5, 6, 7], [5, 6, 7, 0, 0], [5], [5, 6, 7, 0], [5, 6, 7]]


def hashes(batch: Any) -> list[bytes]:
    return [one.tobytes() for one in contents_of(batch)]


def test_padding_of_the_batch_does_not_count() -> None:
    alone = [hashes(collate([{"input_ids": item}]))[0] for item in ITEMS]
    assert hashes(collate([{"input_ids": item} for item in ITEMS])) == alone
    assert alone[0] == alone[4] and len(set(alone)) == 4, "a token 0 at the end is a token"


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(0, 4),
    st.sampled_from([0, 3, -1]),
)
def test_two_hashes_agree_where_two_examples_do(items: list[list[int]], more: int, pad: int) -> None:
    longest = max(map(len, items)) + more
    ids, mask = torch.full((len(items), longest), pad), torch.zeros(len(items), longest, dtype=torch.int64)
    labels, weights = torch.full((len(items), longest), -100), torch.zeros(len(items), longest)
    for i, item in enumerate(items):
        ids[i, : len(item)], mask[i, : len(item)] = torch.tensor(item), 1
        labels[i, 1 : len(item)] = torch.tensor(item)[1:]
        weights[i, : len(item)] = torch.tensor(item) / 2
    found = hashes({"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights})
    for i, one in enumerate(items):
        for j, other in enumerate(items):
            assert (found[i] == found[j]) == (one == other)


def test_what_the_loss_sees_counts() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    whole = torch.ones(2, 3, dtype=torch.int64)
    plain = hashes({"input_ids": tokens})[0]
    # Labels that are the tokens, or a mask of ones, say nothing.
    assert hashes({"input_ids": tokens, "labels": tokens.clone(), "attention_mask": whole})[0] == plain
    some = torch.tensor([[-100, 2, 3], [-100, 2, -100]])
    hidden = torch.tensor([[0, 1, 1], [1, 0, 1]])
    one = hashes({"input_ids": tokens, "labels": some}) + hashes({"input_ids": tokens, "attention_mask": hidden})
    assert len({plain, *one}) == 5
    # A hidden token with a loss of its own is not cut off.
    last = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[1, 2, 9]])}
    assert len({hashes({"input_ids": torch.tensor([[1, 2, t]]), **last})[0] for t in (3, 4)}) == 2
    # However they are stored.
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert hashes((dense.to_sparse(), torch.ones(2))) == hashes((dense.double(), torch.ones(2).bfloat16()))
    # Not text beside the numbers, nor the order of columns.
    named = hashes({"url": ["a", "b"], "y": torch.tensor([1, 2]), "x": torch.ones(2, 3)})
    assert named == hashes({"x": torch.ones(2, 3), "y": torch.tensor([1, 2])})


def test_texts_are_found_again_by_their_tokens(tmp_path: Path) -> None:
    texts = [f"the {word} fox jumps over the dog number {i}" for i, word in enumerate(["quick", "lazy", "old"] * 14)]
    texts[30] = texts[2]
    tokenizer, model = tiny_tokenizer(), make_model("gpt2")
    with pytest.warns(UserWarning, match="1 of 42 examples are copies"):
        index = Index.build(tmp_path / "i", model=model, data=texts, tokenizer=tokenizer, progress=False)
    rows = [{"text": texts[2], "source": "elsewhere"}, {"text": "a fox that was not there"}]
    assert lists(index.find(rows)) == [[2, 30], []]
    assert lists(index.find([texts[5], "short"])) == [[5], []]

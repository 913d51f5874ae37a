"""Every form of data is the same source: same ids, same batches, again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lorif_index import BuildConfig, Index
from lorif_index.capture.data import ExampleSource, as_source, batch_count, collate
from lorif_index.errors import DataError

N, BATCH = 23, 5
X, Y = torch.randn(N, 3), torch.arange(N)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((X[i], Y[i]) for i in range(N))


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


class Shuffled(Stream):
    def __iter__(self) -> Iterator[Any]:
        return ((X[i], Y[i]) for i in torch.randperm(N).tolist())


def forms() -> dict[str, Any]:
    return {
        "tensors": (X, Y),
        "arrays": (X.numpy(), Y.numpy()),
        "array and tensor": (read_only(X.numpy()), Y),
        "dataset": Pairs(),
        "tensor dataset": TensorDataset(X, Y),
        "loader": DataLoader(Pairs(), batch_size=BATCH),
        "loader with workers": DataLoader(Pairs(), batch_size=BATCH, num_workers=1),
        "loader of stream": DataLoader(Stream(), batch_size=BATCH),
        "stream": Stream(),
        "own sampler": DataLoader(
            Pairs(), batch_sampler=[list(range(i, min(i + BATCH, N))) for i in range(0, N, BATCH)]
        ),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_all_forms_are_one_contract(form: str) -> None:
    source = as_source(forms()[form], BATCH)
    assert source.count == N
    for _ in range(2):
        batches = list(source.batches())
        assert np.array_equal(np.concatenate([ids for ids, _ in batches]), np.arange(N))
        assert torch.equal(torch.cat([batch[0] for _, batch in batches]), X)
        assert all(torch.equal(batch[1], torch.from_numpy(ids)) for ids, batch in batches)
    # From an example on: whole batches, cut as ever, beginning with the one that holds it.
    assert [ids.tolist() for ids, _ in source.batches(12)] == [ids.tolist() for ids, _ in batches[2:]]
    wanted = np.array([0, 4, 5, 11, 22])
    chosen = list(source.select(wanted))
    assert np.array_equal(np.concatenate([ids for ids, _ in chosen]), wanted)
    assert torch.equal(torch.cat([batch[1] for _, batch in chosen]), torch.from_numpy(wanted))


def sentences(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Token sequences of very different lengths."""
    lengths = np.random.default_rng(seed).lognormal(2, 1, count).astype(int).clip(1, 100)
    return [{"input_ids": [i, *range(n - 1)]} for i, n in enumerate(lengths.tolist())]


def test_walks_bring_sequences_of_like_length_together() -> None:
    """All windows are cut as ever, wherever a walk begins, and little is padded."""
    items = sentences(333)
    source = as_source(items, 4)
    assert source.window == 128
    whole = {tuple(ids.tolist()): batch for ids, batch in source.walk(0, 333)}
    assert sorted(i for ids in whole for i in ids) == list(range(333))
    tokens = sum(len(item["input_ids"]) for item in items)
    sizes = [
        sum(b["input_ids"].numel() for b in batches) for batches in (whole.values(), (b for _, b in source.batches()))
    ]
    assert sizes[0] < 1.25 * tokens < 1.8 * tokens < sizes[1]
    for start, stop in ((0, 1), (5, 140), (127, 129), (300, 333), (7, 7)):
        part = {tuple(ids.tolist()): batch for ids, batch in source.walk(start, stop)}
        assert all(torch.equal(whole[ids]["input_ids"], batch["input_ids"]) for ids, batch in part.items())
        assert set(range(start, stop)) <= {i for ids in part for i in ids}
        assert all(any(start <= i < stop for i in ids) for ids in part)
    for ids, batch in whole.items():
        assert list(ids) == sorted(ids) == batch["input_ids"][:, 0].tolist() and len({i // 128 for i in ids}) == 1
    some = np.arange(0, 333, 3)
    drawn = list(source.draw(some))
    assert sorted(i for ids, _ in drawn for i in ids) == some.tolist()
    assert all(ids.tolist() == batch["input_ids"][:, 0].tolist() for ids, batch in drawn)
    # Sequences of no or one token do not make a batch.
    short = as_source([item if i % 3 else {"input_ids": [i][: i % 2]} for i, item in enumerate(items)], 4)
    for ids, batch in short.walk(0, 333):
        assert batch["input_ids"].shape[1] > 1, ids
    # The first few batches of a window are of all lengths.
    first = [batch["input_ids"].shape[1] for batch in list(whole.values())[:4]]
    assert min(first) < np.median([len(item["input_ids"]) for item in items]) < max(first)


def sizes(source: ExampleSource) -> list[int]:
    return [len(ids) for ids, _ in source.batches()]


def test_a_batch_of_sequences_has_so_many_tokens_by_default() -> None:
    ids = torch.randint(0, 9, (70, 128))
    assert sizes(as_source({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "auto")) == [16] * 4 + [6]
    assert sizes(as_source((ids, torch.zeros(70, dtype=torch.long)), "auto")) == [16] * 4 + [6]
    assert sizes(as_source(ids[:, :8], "auto")) == [32, 32, 6]
    # Two at least: else nobody sees whether examples depend on each other.
    assert sizes(as_source(torch.randint(0, 9, (5, 5000)), "auto")) == [2, 2, 1]
    assert sizes(as_source((torch.randn(40, 3, 64, 64), torch.zeros(40, dtype=torch.long)), "auto")) == [32, 8]
    assert sizes(as_source({"input_ids": ids}, 5)) == [5] * 14
    # Pixels and flags are no tokens.
    assert sizes(as_source((torch.zeros(40, 1000, dtype=torch.uint8), torch.zeros(40)), "auto")) == [32, 8]
    # Rows of tokens by their lengths, in a list and in a stream, wherever a walk begins; also as pairs.
    pairs = TensorDataset(ids, torch.zeros(70, dtype=torch.long))
    assert sizes(as_source(pairs, "auto")) == [16, 16, 16, 16, 6]
    rows = [{"input_ids": list(range(length))} for length in [2000, 3000, *[500] * 9, *[10] * 40]]

    class Rows(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(rows)

    for data in (rows, Rows()):
        source = as_source(data, "auto")
        assert sizes(source) == [2, 4, 4, 4, 18, 19]
        found = {int(ids[0]): ids.tolist() for ids, _ in source.batches()}
        assert all(ids.tolist() == found[int(ids[0])] for ids, _ in source.batches(40))
        assert [len(ids) for ids, _ in source.select(np.array([0, 1, 2, 20]))] == [2, 2]
        assert sorted(i for ids, _ in source.draw(np.arange(51)) for i in ids.tolist()) == list(range(51))
    parts = [batch["input_ids"].shape for _, batch in as_source(rows, "auto").walk(0, 51)]
    assert all(rows * tokens <= 2048 or rows <= 2 for rows, tokens in parts) and len(parts) <= 7
    assert max(rows for rows, _ in parts) == 32


def test_what_has_no_lengths_is_walked_in_order() -> None:
    like = [{"input_ids": [i, 1, 2]} for i in range(20)]
    for data in (Pairs(), (X, Y), DataLoader(sentences(20), batch_size=4, collate_fn=collate), Stream(), like):  # type: ignore[arg-type]
        source = as_source(data, 4)
        assert source.window is None or data is like
        ids = [ids.tolist() for ids, _ in source.walk(0, source.count)]
        assert ids == [ids.tolist() for ids, _ in source.batches()]
        assert [ids.tolist() for ids, _ in source.draw(np.arange(3, 9))] == [[3, 4, 5, 6], [7, 8]]


def test_dict_of_tensors_and_single_tensor() -> None:
    source = as_source({"x": X, "y": Y}, BATCH)
    assert [sorted(b) for _, b in source.batches()] == [["x", "y"]] * 5
    assert as_source(X, 4).count == as_source(X.numpy()[::-1], 4).count == N


def test_hugging_face_datasets(tmp_path: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"input_ids": [[1, 2, 3], [4], [5, 6]], "labels": [[1, 2, 3], [4], [-100, 6]], "text": ["a", "b", "c"]}
    saved = datasets.Dataset.from_dict(rows)
    saved.save_to_disk(str(tmp_path / "ds"))
    for data in (saved, datasets.load_from_disk(str(tmp_path / "ds")), saved.with_format("torch")):
        _, batch = next(iter(as_source(data, 3).batches()))
        assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
        assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100], [-100, 6, -100]]
        assert "text" not in batch


def test_slices_of_hugging_face_datasets_as_queries(tmp_path: Any) -> None:
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = {"input_ids": [[1, 2, 3, 4], [4, 5], [5, 6, 7], [3, 2, 1, 9]], "text": ["a", "b", "c", "d"]}
    data = datasets.Dataset.from_dict(rows)
    index = Index.build(tmp_path / "i", model=model, data=data, config=BuildConfig(batch_size=3))
    assert len(index) == 4 and len(index.layers) == 5
    whole = index.scores(data)
    assert np.allclose(index.scores(data[1:3]), whole[1:3], rtol=1e-4, atol=1e-4 * np.abs(whole).max())
    assert np.allclose(index.scores({"input_ids": rows["input_ids"][0]}), whole[:1], atol=1e-4 * np.abs(whole).max())


def test_collate_refuses_what_it_cannot_stack() -> None:
    with pytest.raises(DataError, match="collate_fn"):
        collate([(torch.zeros(3), 0), (torch.zeros(4), 0)])
    with pytest.raises(DataError, match="tokenise"):
        collate([{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match="different shapes"):
        collate([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Pairs(), batch_size=2, shuffle=True), "shuffle=False"),
        (DataLoader(Pairs(), batch_size=2, sampler=SubsetRandomSampler(range(N))), "SubsetRandomSampler .* each walk"),
        (DataLoader(Pairs(), sampler=WeightedRandomSampler([1.0] * N, N)), "WeightedRandomSampler .* each walk"),
        (DataLoader(Pairs(), batch_sampler=BatchSampler(RandomSampler(Y), 4, False)), "RandomSampler .* each walk"),
        (DataLoader(Shuffled(), batch_size=4), "begins with other data in each walk"),
        (Shuffled(), "begins with other data in each walk"),
        (((X, Y) for _ in range(2)), "cannot be walked twice"),
        ((X[:0], Y[:0]), "no examples"),
        ((X, Y[:4]), "agree on the number of examples"),
        ("a path", "data must be"),
        (None, "data must be"),
    ],
)
def test_bad_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_source(data, BATCH)


def test_a_stream_that_changes_is_found_out() -> None:
    class Shrinking(IterableDataset[Any]):
        left = 5

        def __iter__(self) -> Iterator[Any]:
            self.left -= 1
            return iter([(X[i], Y[i]) for i in range(self.left)])

    source = as_source(Shrinking(), 2)
    with pytest.raises(DataError, match="gave 2 examples where it gave 4"):
        list(source.batches())


def test_looking_at_a_loader_leaves_the_random_state(seed: int = 3) -> None:
    torch.manual_seed(seed)
    before = torch.random.get_rng_state()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    source = as_source(DataLoader(Pairs(), batch_size=4, sampler=order, generator=torch.Generator()), 2)
    assert torch.equal(torch.cat([batch[1] for _, batch in source.batches()]), torch.tensor(order))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batch_count_sees_nested_batches() -> None:
    assert batch_count({"a": X, "more": [Y, (X,)], "name": "text"}) == N
    with pytest.raises(DataError, match=r"\[4, 23\]"):
        batch_count((X, Y[:4]))

"""Select and contrast: against scores and dense products; tables of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close, small_data, small_model
from torch.utils.data import DataLoader, TensorDataset

from lorif_index import BuildConfig, Index, Selection
from lorif_index.errors import DataError, QueryError

N = 90
PAYLOADS = [{"source": "ab"[i % 2], "kind": i % 3, "id": f"x{i}"} for i in range(N)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    config = BuildConfig(
        store="factors", dtype="float32", rank=None, batch_size=8, coarse=None, compute={"shard_bytes": 6000}
    )
    index = Index.build(
        tmp_path_factory.mktemp("select") / "i",
        model=small_model(),
        data=small_data(N),
        payloads=PAYLOADS,
        config=config,
        progress=False,
    )
    index.remove([3, 40])
    return index


@pytest.fixture(scope="module")
def asked() -> Any:
    return small_data(4, seed=2)


def test_questions_take_turns(index: Index, asked: Any) -> None:
    scores = index.scores(asked)
    found = index.select(asked, 10)
    taken: list[int] = []
    for place in range(10):
        q = place % 4
        best = next(i for i in np.argsort(-scores[q], kind="stable").tolist() if i not in taken)
        taken.append(best)
        assert found.ids[place] == index.ids[best] and found.question_of[place] == q
        assert found.scores[place] == pytest.approx(scores[q, best], rel=1e-4)
    assert isinstance(found, Selection) and len(found) == 10 and found.method == "round-robin"
    assert found.payloads == [PAYLOADS[i] for i in found.ids] and (found.exhausted, found.ties) == ([], 0)
    # All of them: each once, and questions run out of what helps them.
    every = index.select(asked, N - 2)
    assert sorted(every.ids) == index.ids.tolist() and every.exhausted
    assert every.exhausted == sorted(set(every.question_of[every.scores <= 0].tolist()))


def test_the_largest_sums(index: Index, asked: Any) -> None:
    sums = index.scores(asked).astype(np.float64).sum(axis=0)
    found = index.select(asked, 12, method="sum")
    order = np.argsort(-sums, kind="stable")[:12]
    assert found.ids.tolist() == index.ids[order].tolist()
    assert close(found.scores, sums[order], 1e-4)
    assert found.question_of.tolist() == index.scores(asked)[:, order].argmax(axis=0).tolist()


def test_greedy_takes_no_two_of_a_kind(index: Index, asked: Any) -> None:
    """Each step is the best of the pool by the dense formula; among copies one stands for all."""
    n = 8
    scores = index.scores(asked).astype(np.float64)
    pool = np.argsort(-scores.sum(axis=0), kind="stable")[: 4 * n]
    products = index.scores(index.gradients(index.ids)).astype(np.float64)[np.ix_(pool, pool)]
    sums, chosen = scores.sum(axis=0)[pool], list[int]()
    for _ in range(n):
        values = [
            -np.inf
            if i in chosen
            else sums[[*chosen, i]].sum() / np.sqrt(products[np.ix_([*chosen, i], [*chosen, i])].sum())
            for i in range(len(pool))
        ]
        chosen.append(int(np.argmax(values)))
    found = index.select(asked, n, method="greedy")
    assert found.ids.tolist() == index.ids[pool[chosen]].tolist() and close(found.scores, sums[chosen], 1e-4)

    def cosine(ids: np.ndarray) -> float:
        at = np.searchsorted(index.ids, ids)
        whole = index.scores(index.gradients(index.ids)).astype(np.float64)
        return float(scores.sum(axis=0)[at].sum() / np.sqrt(whole[np.ix_(at, at)].sum()))

    assert cosine(found.ids) > cosine(index.select(asked, n, method="sum").ids)


def test_ties_are_told(tmp_path: Path) -> None:
    x, y = small_data(20)
    twice = (torch.cat([x, x]), torch.cat([y, y]))
    index = Index.build(tmp_path / "i", model=small_model(), data=twice, progress=False)
    found = index.select(small_data(1, seed=3), 4)
    assert found.ties >= 2 and found.ids[0] + 20 == found.ids[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer from 1 to the index's 88 examples, got 0"),
        ({"n": 89}, "got 89"),
        ({"n": True}, "got True"),
        ({"n": 3, "method": "best"}, r"method must be one of \('round-robin', 'sum', 'greedy'\), got 'best'"),
        ({"n": 3, "contrast": small_data(3)}, "contrast holds 3 examples and the query 4"),
    ],
)
def test_what_cannot_be_chosen(index: Index, asked: Any, arguments: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.select(asked, **arguments)


def test_a_contrast_is_taken_off(index: Index, asked: Any) -> None:
    other = small_data(4, seed=7)
    wanted = index.scores(asked) - index.scores(other)
    found = index.scores(asked, contrast=other)
    assert close(found, wanted, 1e-4)
    hits = index.search(asked, 5, contrast=other)
    assert close(hits.scores, -np.sort(-wanted, axis=1)[:, :5], 1e-4)
    one = (other[0][:1], other[1][:1])
    assert close(index.scores(asked, contrast=one), index.scores(asked) - index.scores(one), 1e-4)
    groups = index.groups(asked, "source", contrast=other)
    plain, off = (index.groups(q, "source") for q in (asked, other))
    sums = [{g.value: g.sum for g in row} for row in (groups[0], plain[0], off[0])]
    near = 1e-4 * np.abs(wanted).sum()
    assert all(abs(sums[0][v] - (sums[1][v] - sums[2][v])) <= near for v in "ab")
    both = index.search(asked, 3, contrast=other, rerank=88)
    assert both.stats.reranked is not None and close(both.scores, -np.sort(-wanted, axis=1)[:, :3], 1e-2)
    with pytest.raises(QueryError, match="example 0 of the query has the gradient that its contrast has"):
        index.search(asked, contrast=asked)


def test_groups_of_several_fields(index: Index, asked: Any, tmp_path: Path) -> None:
    def even(payload: Any) -> bool:
        return int(payload["id"][1:]) % 2 == 0

    scores, stored = index.scores(asked), index.payloads()
    found = index.groups(asked, ["source", "kind", even])
    assert found.by == ["source", "kind", "even"] and found.found == 6 and found.to_json()["by"] == found.by
    for q, row in enumerate(found):
        for group in row:
            mine = [(p["source"], p["kind"], even(p)) == group.value for p in stored]
            assert group.count == sum(mine) and abs(group.sum - scores[q][mine].sum()) <= 1e-4 * np.abs(scores[q]).sum()
    values, matrix = found.matrix()
    assert matrix.shape == (6, 4) and set(values) == {g.value for g in found[0]}
    assert (np.diff(matrix.sum(axis=1)) <= 0).all()
    assert all(matrix[values.index(g.value), q] == g.sum for q, row in enumerate(found) for g in row)
    frame = found.to_pandas()
    assert list(frame.columns) == ["query", "source", "kind", "even", "sum", "count", "mean", "positive", "negative"]
    assert len(frame) == 24
    same = index.groups(asked, ["source", even, even]).columns()
    assert list(same)[:4] == ["query", "source", "even", "even.3"]
    with pytest.raises(QueryError, match=r"no payload has a field 'nothing', but \['id', 'kind', 'source'\]"):
        index.groups(asked, ["source", "nothing"])
    for by in ([], ["source", 3], {}):
        with pytest.raises(QueryError, match="or by a list of these"):
            index.groups(asked, by)  # type: ignore[arg-type]


def test_tables_of_what_was_found(index: Index, asked: Any, tmp_path: Path) -> None:
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    hits, groups, chosen = index.search(asked, 3), index.groups(asked, "source"), index.select(asked, 6)
    for found in (hits, groups):
        table = found.to_dataset()
        assert isinstance(table, datasets.Dataset) and table.to_dict() == found.columns()
        found.to_parquet(tmp_path / "t.parquet")
        assert parquet.read_table(tmp_path / "t.parquet").to_pydict() == found.columns()
    assert hits.columns()["payload.id"] == [p["id"] for row in hits.payloads or [] for p in row]
    # What was chosen, as it was given to the build: here tensors.
    table = chosen.to_dataset()
    x, y = small_data(N)
    assert table.column_names == ["id", "score", "question", "x", "y"] and table["id"][:] == chosen.ids.tolist()
    assert np.allclose(np.array(table["x"][:]), x[chosen.ids].numpy()) and table["y"][:] == y[chosen.ids].tolist()
    # Opened without data: the payloads; or data that are given.
    bare = Index.open(index.path, model=small_model()).select(asked, 6)
    assert bare.columns()["data.id"] == [PAYLOADS[i]["id"] for i in bare.ids]
    rows = [{"text": f"text {i}", "score": i} for i in range(N)]
    assert bare.to_dataset(rows)["text"][:] == [f"text {i}" for i in bare.ids]
    assert bare.columns(rows)["data.score"] == bare.ids.tolist()
    bare.to_parquet(tmp_path / "s.parquet", [f"text {i}" for i in range(N)])
    assert parquet.read_table(tmp_path / "s.parquet").column("text").to_pylist() == [f"text {i}" for i in bare.ids]
    with pytest.raises(DataError, match="do not give example"):
        bare.to_dataset(rows[:3])


def test_added_examples_are_found_in_their_own_data(asked: Any, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(30), progress=False)
    new = index.add(asked, progress=False)
    chosen = index.select(asked, 4)
    assert set(chosen.ids) & set(new)
    (x, _), columns = small_data(30), chosen.columns()
    every = torch.cat([x, asked[0]])
    assert np.allclose(np.array(columns["x"]), every[chosen.ids].numpy())


def test_data_of_other_forms(asked: Any, tmp_path: Path) -> None:
    """Arrays and lists of tensors are as tensors; a loader can only be walked, so that payloads are taken."""
    x, y = small_data(30)
    for name, data in (("arrays", (x.numpy(), y.numpy())), ("list", [x, y])):
        index = Index.build(tmp_path / name, model=small_model(), data=data, progress=False)
        columns = (chosen := index.select(asked, 5)).columns()
        assert np.allclose(np.array(columns["x"]), x[chosen.ids].numpy())
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    index = Index.build(
        tmp_path / "l", model=small_model(), data=loader, payloads=[str(i) for i in range(30)], progress=False
    )
    chosen = index.select(asked, 5)
    assert chosen.columns()["text"] == [str(i) for i in chosen.ids]

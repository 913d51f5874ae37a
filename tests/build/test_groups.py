"""Group sums against scores; hits and groups as notebooks and data frames show them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_hits, small_data, small_model

from lorif_index import BuildConfig, Groups, Index
from lorif_index.errors import ConfigError, QueryError

NASTY = "<script>alert('x')</script>\x1b\ud800"
PAYLOADS: list[Any] = [
    None if i % 7 == 0 else {"source": ("a", NASTY, "c")[i % 3], "n": i % 2 == 1, "score": i, "text": "x" * 10 * i}
    for i in range(90)
]  # fmt: skip
CONFIG = BuildConfig(dtype="float32", batch_size=8, compute={"shard_bytes": 6000})


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    index = Index.build(
        tmp_path_factory.mktemp("groups") / "i",
        model=small_model(),
        data=small_data(),
        payloads=PAYLOADS,
        config=CONFIG,
        progress=False,
    )
    index.remove([1, 2, 50, 51])
    return index


def check(groups: Groups, scores: np.ndarray, labels: list[Any]) -> None:
    for q, row in enumerate(groups):
        assert [g.sum for g in row] == sorted((g.sum for g in row), reverse=True)
        assert {(type(g.value), g.value) for g in row} == {(type(v), v) for v in labels}
        for g in row:
            mine = scores[q][[type(v) is type(g.value) and v == g.value for v in labels]].astype(np.float64)
            assert g.count == len(mine) and g.mean == g.sum / g.count
            near = 1e-5 * np.abs(scores[q]).sum()
            assert abs(g.sum - mine.sum()) <= near and abs(g.positive - mine[mine > 0].sum()) <= near
            assert abs(g.negative - mine[mine < 0].sum()) <= near


def test_sums_of_all_live_rows(index: Index) -> None:
    query = small_data(3, seed=2)
    stored = index.payloads()
    assert stored[0] is None and stored[1]["source"] == "a" and len(stored) == 86
    for by in ("source", "n"):
        labels = [None if p is None else p[by] for p in stored]
        found = index.groups(query, by)
        assert (len(found), found.by, found.examples, found.found) == (3, by, 86, 4 if by == "source" else 3)
        check(found, index.scores(query), labels)
    settings: dict[str, Any] = dict(damping=2.0, layers="0")

    def length(payload: Any) -> Any:
        """1, 1.0 and True are three."""
        return [1, 1.0, True, "1"][payload["score"] % 4] if payload else None

    found = index.groups(query, length, **settings)
    check(found, index.scores(query, **settings), [length(p) for p in stored])
    assert found.by == "length"
    few = index.groups(query, "source", k=2)
    assert [row[:2] for row in index.groups(query, "source")] == few.queries and few.found == 4
    assert json.loads(json.dumps(few.to_json()))["queries"][0][0]["count"] == few[0][0].count


def test_a_search_may_bring_groups_along(index: Index) -> None:
    query = small_data(2, seed=3)
    hits = index.search(query, k=5, group_by="source")
    plain = index.search(query, k=5)
    assert_same_hits(hits, plain)
    assert plain.groups is None
    assert hits.groups is not None and hits.groups.queries == index.groups(query, by="source").queries
    relatif = index.search(query, k=5, group_by="source", normalize="relatif")
    labels = [None if p is None else p["source"] for p in index.payloads()]
    assert relatif.groups is not None
    check(relatif.groups, index.scores(query, normalize="relatif"), labels)


def test_what_makes_no_groups_is_refused(index: Index, tmp_path: Path) -> None:
    query = small_data(1)
    with pytest.raises(QueryError, match=r"no payload has a field 'sorce', but \['n', 'score', 'source', 'text'\]"):
        index.groups(query, "sorce")
    with pytest.raises(QueryError, match="example 3 has the group .* of type dict"):
        index.groups(query, lambda payload: payload)
    for by, k, message in ((3, None, "got 3"), ("source", 0, "k must be"), ("source", True, "k must be")):
        with pytest.raises(QueryError, match=message):
            index.groups(query, by, k=k)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="got 3"):
        index.search(query, group_by=3)  # type: ignore[arg-type]
    bare = Index.build(tmp_path / "i", model=small_model(), data=small_data(), config=CONFIG, progress=False)
    with pytest.raises(QueryError, match="this index has none: build it with payloads="):
        bare.groups(query, "source")


def test_payloads_in_any_order(index: Index) -> None:
    """Neighbours are read together, and come back singly."""
    wanted = [89, 3, 4, 5, 6, 60, 61, 61, 0, 88]
    expected = json.loads(json.dumps([PAYLOADS[i] for i in wanted]).replace("\\ud800", "?"))
    assert index.payloads(wanted) == expected


def test_notebooks_show_text_and_run_none_of_it(index: Index) -> None:
    hits = index.search(small_data(2, seed=4), k=30, group_by="source")
    shown = [thing._repr_html_() for thing in (hits, hits.groups, index)]  # type: ignore[union-attr]
    for html in shown:
        assert html.startswith("<table>") and "<script" not in html and "\x1b" not in html
        assert html.count("<table>") == html.count("</table>")
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in shown[0]
    assert max(map(len, re.split("<td|</td>", shown[0]))) < 700, "texts are cut"
    assert str(index.path) in shown[2] and "source" in shown[0]
    plain = index.search({n: torch.ones(1, s.d_in, s.d_out) for n, s in index.specs.items()}, k=2)
    assert plain._repr_html_().count("<tr>") == 3


def test_data_frames(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    hits = index.search(small_data(2, seed=4), k=3, group_by="source")
    frame = hits.to_pandas()
    assert list(frame.columns) == ["query", "rank", "id", "score", "source", "n", "payload.score", "text"]
    assert frame["id"].tolist() == hits.ids.ravel().tolist() and frame["rank"].tolist() == [1, 2, 3] * 2
    assert frame["score"].tolist() == hits.scores.ravel().tolist()
    first = index.payloads([hits.ids[0, 0]])[0]
    assert first is None or frame["text"][0] == first["text"]
    groups = hits.groups.to_pandas()  # type: ignore[union-attr]
    assert len(groups) == 8 and groups["count"].sum() == 2 * 86
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        hits.to_pandas()

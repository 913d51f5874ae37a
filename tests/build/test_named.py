"""Candidates by the largest coordinates that rows name: no sketch is learnt, and what proposes a row is a short one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reader_of, share_of_best

from lorif_index import BuildConfig, CoarseIndex, Index
from lorif_index.build.sizes import Shapes
from lorif_index.codecs import eigencodes
from lorif_index.codecs.sparse import SparseLayout
from lorif_index.curvature.sketch import Named
from lorif_index.errors import CorruptionError

N, SHORT = 1600, 12
SHAPES = {"a": (24, 20), "b": (30, 16)}


def gradients(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A few large entries in places of each example's own, as of rare words, in a little noise."""
    generator = np.random.default_rng(seed)
    out = {}
    for name, (rows, columns) in SHAPES.items():
        g = 0.05 * generator.standard_normal((n, rows, columns))
        places = generator.integers(0, rows * columns, (n, 6)) % generator.integers(1, rows * columns, (n, 1))
        g.reshape(n, -1)[np.arange(n)[:, None], places] += generator.standard_normal((n, 6)) * 3
        out[name] = torch.from_numpy(g).float()
    return out


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigencodes, "_SHORT", SHORT)
    monkeypatch.setattr(eigencodes, "_SHORT_FROM", 2 * SHORT)


def config(**changes: Any) -> BuildConfig:
    fixed: dict[str, Any] = dict(curvature="empirical", curvature_rank=8, store="eigen", eigen_bytes=150)
    return BuildConfig(**(fixed | changes))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    every = gradients(N)
    parts = [{name: g[i : i + 400] for name, g in every.items()} for i in range(0, N, 400)]
    return Index.build(tmp_path / "i", gradients=parts, config=config(), progress=False)


def test_the_disk_that_is_foretold_has_room_for_shortened_rows(index: Index) -> None:
    reader = reader_of(index)
    by_name, by_sketch = (
        Shapes(config(coarse=CoarseIndex(kind=kind, dim=16)), reader.specs, "eigen").disk(N).code
        for kind in ("auto", "pq")
    )
    assert by_name == SparseLayout(0, SHORT).row_bytes == reader.codes().rows.shape[1] and by_sketch == 4


def check_candidates(index: Index, least: float = 0.9) -> None:
    """They are scored as a scan scores, most of the best are among them, and estimates know how many."""
    query = gradients(40, seed=9)
    scores = index.scores(query)
    for opponents in (False, True):
        hits = index.search(query, 10, exact=False, recall=0.95, opponents=opponents)
        wanted = np.take_along_axis(scores, np.searchsorted(index.ids, hits.ids), axis=1)
        assert np.abs(hits.scores - wanted).max() <= 1e-4 * np.abs(scores).max()
        order = np.argsort(scores if opponents else -scores, axis=1)[:, :10]
        got = np.mean([np.isin(a, index.ids[b]).mean() for a, b in zip(hits.ids, order, strict=True)])
        assert got >= least and abs(hits.stats.estimated_recall - got) < 0.08
    assert np.mean(hits.stats.candidates_by_query) < len(index) / 2


def test_a_short_row_is_the_largest_of_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim, entries, kept in ((90, 40, 9), (30, 40, 35), (500, 20, 20)):
        layout, short = SparseLayout(dim, entries), SparseLayout(dim, kept)
        codes = layout.encode(torch.randn(25, dim, generator=generator) ** 3)
        codes[3] = layout.encode(torch.zeros(1, dim))[0]
        whole, found = layout.decode(codes), short.decode(layout.shortened(codes, kept))
        there = found != 0
        assert torch.equal(found[there], whole[there])
        assert (there.sum(dim=1) == (whole != 0).sum(dim=1).clamp_max(kept)).all()
        least = torch.where(there, whole.abs(), torch.inf).amin(dim=1)
        assert (torch.where(there, 0.0, whole.abs()).amax(dim=1) <= least + 1e-6).all()
        squares = float(whole.double().square().sum())
        assert layout.energy(codes) == pytest.approx(squares, rel=1e-5)


def test_candidates_are_found_without_a_sketch(index: Index) -> None:
    facts = index.coarse
    assert facts is not None and (facts["method"], facts["kind"]) == ("named", f"the {SHORT} largest that rows name")
    assert 0.3 < facts["energy"] <= 1 and reader_of(index).codec.label.endswith("largest")
    assert not (index.path / "sketch.h5").exists()
    check_candidates(index)
    planned = index.search(gradients(3, seed=4), 5, recall=0.9, exact=False)
    assert planned.stats.plan.startswith("candidates")
    # A scan's answer, from the codes alone where that is asked for.
    alone = index.search(gradients(30, seed=9), 10, rescore=False)
    assert share_of_best(alone, index.scores(gradients(30, seed=9))) > 0.3
    again = Index.open(index.path)
    assert np.array_equal(again.search(gradients(3, seed=4), 5, recall=0.9, exact=False).ids, planned.ids)


def test_they_follow_the_rows(index: Index, tmp_path: Path) -> None:
    more = gradients(50, seed=3)
    ids = index.add(gradients=[more])
    found = index.search({name: g[:5] for name, g in more.items()}, 3, exact=False)
    assert (found.ids[:, 0] == ids[:5]).all()
    index.remove(index.ids[::3])
    check_candidates(index)
    index.compact(progress=False)
    index.verify()
    check_candidates(index)
    other = Index.build(tmp_path / "o", gradients=[gradients(400, seed=7)], fit=index, progress=False)
    together = Index.merge(tmp_path / "m", [index.path, other.path], progress=False)
    assert together.coarse is not None and together.coarse["method"] == "named"
    check_candidates(together)


def test_another_kind_may_be_asked_for(index: Index) -> None:
    index.rebuild_coarse("flat", progress=False)
    assert index.coarse is not None and index.coarse["method"] == "pca"
    index.rebuild_coarse("auto", progress=False)
    assert index.coarse["method"] == "named"
    check_candidates(index)


def test_few_names_have_a_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigencodes, "_SHORT_FROM", 1000)
    index = Index.build(tmp_path / "i", gradients=[gradients(N)], config=config(), progress=False)
    assert index.coarse is not None and index.coarse["method"] == "pca"
    asked = CoarseIndex(kind="pq", dim=64)
    monkeypatch.setattr(eigencodes, "_SHORT_FROM", 2 * SHORT)
    index = Index.build(tmp_path / "pq", gradients=[gradients(N)], config=config(coarse=asked), progress=False)
    assert index.coarse is not None and index.coarse["method"] == "pca"


def test_what_rows_do_not_name_is_refused(index: Index) -> None:
    with pytest.raises(CorruptionError, match="proposed by 1000 coordinates"):
        reader_of(index).codec.sketcher(Named(960, 1000, 1.0))

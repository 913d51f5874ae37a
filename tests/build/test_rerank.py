"""The best by rows computed again: scores against autograd; order, layers, normalised scores, ensembles; estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    Case,
    gpt2,
    lambdas,
    mlp,
    projected,
    reader_of,
    small_data,
    small_model,
    tiny_model_folder,
    train,
    with_gradients,
)
from dense_curvature import scores as dense_scores

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.curvature.inverse import transform_precisely
from lorif_index.errors import DataError, QueryError
from lorif_index.identity import Identity
from lorif_index.questions import Questions
from lorif_index.search.rerank import missed_by_rows
from lorif_index.snapshot import Access, Snapshot
from lorif_index.text import Document, build_text_index, load_text_model, open_text_index

# Rows that say little: what whole gradients say differs.
ROUGH: dict[str, Any] = dict(store="eigen", eigen_bytes=24, projection_dim=5, batch_size=16)


def whole_scores(index: Index, model: Any, query: Any, data: Any, layers: Any = None, **settings: Any) -> np.ndarray:
    """(q, n): <H^-1 g_q, g_i> of gradients that were taken whole."""
    questions = Questions(Snapshot.open(index.path, Access()), Identity(model))
    names = questions.chosen(layers)
    asked, rows = questions.gradients(query, None, names), questions.gradients(data, None, names)
    made = reader_of(index).preconditioners(names, questions.policy(settings.get("damping")))
    x = transform_precisely(asked, made)
    return np.asarray(sum((x[n].flatten(1).double() @ rows[n].flatten(1).double().T).numpy() for n in names))


def check_hits(hits: Any, scores: np.ndarray, candidates: np.ndarray, k: int, towards: float = 1.0) -> None:
    """The k best of the candidates, by these scores."""
    none = 1e-4 * np.abs(scores).max()
    for q, row in enumerate(hits.ids):
        best = -np.sort(-towards * scores[q, candidates[q]])[:k]
        assert np.abs(towards * scores[q, row] - best).max() <= none
        assert np.abs(hits.scores[q] - scores[q, row]).max() <= none
        assert set(row.tolist()) <= set(candidates[q].tolist())


def test_scores_are_autograds(tmp_path: Path) -> None:
    """Where curvature and projections are known in float64, so are the scores, whatever the rows are."""
    case, rows, queries = with_gradients("gpt2")
    config = BuildConfig(
        projection="random",
        projection_dim=5,
        rank=1,
        store="factors",
        curvature="empirical",
        curvature_rank=None,
        layers=case.selection or LayerSelection(),
    )
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    hits = index.search(case.query, 8, rerank=len(index), damping=0.3)
    g, asked = projected(index, rows), projected(index, queries)
    expected = dense_scores(index, asked, g, lambdas(index, g, 0.3))
    check_hits(hits, expected, np.tile(np.arange(len(index)), (len(expected), 1)), 8)
    assert hits.stats.estimated_recall == 1.0 and hits.stats.reranked.rows_recall == 1.0
    assert np.abs(hits.scores - index.search(case.query, 8, damping=0.3).scores).max() > 0.01 * np.abs(expected).max()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Index]:
    case = gpt2()
    path = tmp_path_factory.mktemp("rerank") / "i"
    return case, Index.build(path, model=case.model, data=case.data, config=BuildConfig(**ROUGH), progress=False)


@pytest.mark.parametrize("settings", [{}, {"opponents": True}, {"layers": "*mlp*", "damping": 0.7}], ids=str)
def test_the_best_are_put_in_order_by_whole_gradients(settings: Any, built: tuple[Case, Index]) -> None:
    case, index = built
    by_rows = index.search(case.query, 12, **settings)
    hits = index.search(case.query, 5, rerank=12, **settings)
    names = {key: value for key, value in settings.items() if key != "opponents"}
    scores = whole_scores(index, case.model, case.query, case.data, **names)
    check_hits(hits, scores, by_rows.ids, 5, -1.0 if "opponents" in settings else 1.0)
    told = hits.stats.reranked
    new = [len(set(a) - set(b)) for a, b in zip(hits.ids.tolist(), by_rows.ids[:, :5].tolist(), strict=True)]
    assert (told.candidates, told.computed, told.changed) == (12, len(np.unique(by_rows.ids)), new)
    assert sum(new) > 0, "rows of 24 bytes say it all"
    assert hits.stats.seconds["rerank"] == told.seconds > 0 and "computed again" in hits.stats.plan
    assert 0 < hits.stats.estimated_recall < 1 and by_rows.stats.reranked is None
    again = index.explain(case.query, hits, query_tokens=False, **names)
    assert np.allclose([[e.score for e in row] for row in again], hits.scores, rtol=1e-3)


@pytest.mark.parametrize("normalize", ["relatif", "cosine"])
def test_normalised_scores_are_divided_likewise(normalize: str, built: tuple[Case, Index]) -> None:
    case, index = built
    hits = index.search(case.query, 5, rerank=12, normalize=normalize)
    scores = whole_scores(index, case.model, case.query, case.data)
    scores = scores / np.sqrt(index.self_influence())
    if normalize == "cosine":
        questions = Questions(Snapshot.open(index.path, Access()), Identity(case.model))
        asked = questions.gradients(case.query, None, index.layers)
        made = reader_of(index).preconditioners(index.layers, questions.policy(None))
        own = sum(made[name].quadratic(g.flatten(1)) for name, g in asked.items())
        scores = scores / np.sqrt(np.asarray(own))[:, None]
    check_hits(hits, scores, index.search(case.query, 12, normalize=normalize).ids, 5)


def test_removed_rows_groups_measures_and_additions(built: tuple[Case, Index], tmp_path: Path) -> None:
    case, _ = built
    notes = [{"half": i % 2} for i in range(40)]
    path, config = tmp_path / "i", BuildConfig(**ROUGH)
    index = Index.build(path, model=case.model, data=case.data, config=config, payloads=notes, progress=False)
    first = index.search(case.query, 3, rerank=40)
    index.remove(first.ids[:, 0])
    hits = index.search(case.query, 3, rerank=20, group_by="half", normalize="relatif")
    assert not set(hits.ids.ravel().tolist()) & set(first.ids[:, 0].tolist())
    assert hits.groups.examples == len(index) and hits.payloads[0][0] == {"half": int(hits.ids[0, 0]) % 2}
    scores = whole_scores(index, case.model, case.query, case.data)
    scores[:, index.ids] /= np.sqrt(index.self_influence())
    check_hits(hits, scores, index.search(case.query, 20, normalize="relatif").ids, 3)

    def less(model: Any, batch: Any) -> torch.Tensor:
        return -2 * default_loss(model, batch)

    measured, plain = (index.search(case.query, 3, rerank=20, measure=m) for m in (less, None))
    assert np.allclose(measured.scores, 2 * plain.scores, rtol=1e-3)
    added = index.add(case.query, payloads=[{"half": 2}] * 4, progress=False)
    found = index.search(case.query, 1, rerank=len(index))
    assert set(found.ids[:, 0].tolist()) <= set(added.tolist()) | set(range(40))
    assert found.stats.reranked.computed == len(index)


def test_of_an_ensemble_scores_are_means(tmp_path: Path) -> None:
    models, data, query = [small_model(0), small_model(1)], small_data(60), small_data(3, seed=2)
    config = BuildConfig(**ROUGH)
    index = Index.build(tmp_path / "i", model=models, data=data, config=config, progress=False)
    hits = index.search(query, 4, rerank=10)
    e = index.explain(query, hits, query_tokens=False)
    assert np.allclose([[one.score for one in row] for row in e], hits.scores, rtol=1e-3)


def test_candidates_and_codes_alone(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    case, config = mlp(), BuildConfig(**ROUGH, coarse={"dim": 16, "queries": 8})
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    index.rebuild_coarse(progress=False)
    scores = whole_scores(index, case.model, case.query, case.data)
    for way in (dict(exact=False), dict(rescore=False)):
        hits = index.search(case.query, 3, rerank=30, **way)
        assert not hits.stats.approximate and not hits.stats.exact
        check_hits(hits, scores, index.search(case.query, 30, **way).ids, 3)


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize(("row_bytes", "above"), [(24, 0.07), (60, 0.04)])
def test_the_estimated_recall_is_honest(row_bytes: int, above: float, opponents: bool, tmp_path: Path) -> None:
    """Over many queries, the mean estimate is near the share of the k best by whole gradients that were found; of few
    candidates it is too low, and of many not much too high, though these rows name 7 or 19 coordinates of 293."""
    model, data, query = small_model(), small_data(600), small_data(60, seed=5)
    train(model, data, 100)
    config = BuildConfig(**ROUGH | {"projection_dim": None, "coarse": None, "eigen_bytes": row_bytes})
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    towards, found = -1 if opponents else 1, []
    scores = towards * whole_scores(index, model, query, data)
    for many in (25, 50, 100, 200):
        hits = index.search(query, 10, rerank=many, opponents=opponents)
        best = np.argsort(-scores, axis=1)[:, :10]
        true = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(hits.ids.tolist(), best.tolist(), strict=True)])
        found.append((many, float(true), hits.stats.estimated_recall))
    assert all(true - 0.35 < said < true + above for _, true, said in found), found
    assert all(true - 0.15 < said for many, true, said in found if many >= 100), found
    assert found[0][1] < 0.9 < found[-1][1] + 0.05 and found[0][2] < found[1][2] < found[2][2] < found[3][2], found


def test_what_rows_miss_is_counted() -> None:
    """Of scores with exponential tails and normal errors the estimate is what is missed, or some more; of exact rows
    nothing."""
    rng, total, k, wide = np.random.default_rng(0), 4000, 10, 80
    said, true = [], []
    for _ in range(60):
        rows = np.sort(rng.exponential(1.0, total))[::-1]
        whole = 0.7 * rows + 1.2 * rng.standard_normal(total)
        kth = np.sort(whole[:wide])[-k]
        true.append(float((whole[wide:] >= kth).sum()))
        said.append(missed_by_rows(rows[:wide], whole[:wide], k, total))
        assert missed_by_rows(rows[:wide], 2 * rows[:wide], k, total) < 1e-6
    assert np.mean(true) > 2 and 0.8 < np.mean(said) / np.mean(true) < 2, (said, true)
    assert 0.7 < np.median(said) / np.mean(true) < 1.3, (said, true)
    assert np.isnan(missed_by_rows(rows[:2], whole[:2], 1, total))
    nothing = np.zeros(20)
    assert missed_by_rows(nothing, nothing, 5, 40) == pytest.approx(10, rel=0.1)


def test_what_is_refused(built: tuple[Case, Index], tmp_path: Path) -> None:
    case, index = built
    for wrong in (0, -1, True, 2.5, "all"):
        with pytest.raises(QueryError, match=r"rerank says how many .*pass rerank=200"):
            index.search(case.query, 5, rerank=wrong)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match=r"rerank=4 computes fewer .* k=5 .* rerank=5"):
        index.search(case.query, 5, rerank=4)
    assert index.search(case.query, 5, rerank=False).stats.reranked is None
    assert index.search(case.query, 5, rerank=1000).stats.reranked.candidates == len(index)
    with Index.open(index.path) as bare, pytest.raises(QueryError, match="opened without its model"):
        bare.search(index.gradients([0]), 5, rerank=10)
    none = r"rerank=10 computes training examples again.*pass data="
    with Index.open(index.path, model=case.model) as bare, pytest.raises(DataError, match=none):
        bare.search(case.query, 5, rerank=10)
    moved = {key: part.roll(1, 0) for key, part in case.data.items()}
    other = Index.open(index.path, model=case.model, data=moved)
    with other, pytest.raises(DataError, match="squared gradient norm"):
        other.search(case.query, 5, rerank=10)


def test_texts_are_taken_from_payloads(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text_model = load_text_model(tiny_model_folder(tmp_path / "m"))
    texts = [Document(f"The cat number {i} sat on the {'mat' if i % 3 else 'hill'}.", "") for i in range(30)]
    build_text_index(tmp_path / "i", text_model, texts, progress=False).close()
    index, _ = open_text_index(tmp_path / "i")
    hits = index.search("The cat sat.", 3, rerank=10)
    e = index.explain("The cat sat.", hits, query_tokens=False)
    assert np.allclose([[one.score for one in row] for row in e], hits.scores, rtol=1e-3)

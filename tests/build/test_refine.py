"""A refined question against dense solves in float64; its scores; the solver by itself; what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import (
    CASES,
    Case,
    gpt2,
    projected,
    query_gradients,
    reader_of,
    small_data,
    small_model,
    tiny_model_folder,
)
from dense_curvature import dense, relative
from test_products import dense_ggn, flat
from torch import nn
from torch.nn import functional

from lorif_index import BuildConfig, Index, LayerSelection, ProgressEvent, Refine
from lorif_index.codecs.sparse import SparseLayout
from lorif_index.curvature.inverse import multiply, transform
from lorif_index.curvature.refine import solve
from lorif_index.errors import ConfigError, DataError, QueryError
from lorif_index.text import Document, build_text_index, load_text_model, open_text_index

EXACT = Refine(iterations=100, examples=10_000, share=0.3, weight=1.0)
SETTINGS: dict[str, Any] = dict(projection="random", batch_size=16)


def dense_stored(index: Index, multiple: float | None = None) -> np.ndarray:
    """H of all layers, by blocks, float64."""
    lam = relative(index, multiple)
    blocks = [dense(index.curvature[name], lam[name]) for name in index.layers]
    return np.asarray(torch.block_diag(*map(torch.from_numpy, blocks)))


def dense_solved(index: Index, exact: np.ndarray, share: float, multiple: float | None = None) -> np.ndarray:
    """H' = (1 - share) (GGN + lambda) + share H, of all layers together."""
    lam = relative(index, multiple)
    beside = np.concatenate([np.full(index.specs[name].dim, lam[name]) for name in index.layers])
    return (1 - share) * (exact + np.diag(beside)) + share * dense_stored(index, multiple)


def stored_rows(index: Index) -> np.ndarray:
    return flat(index.gradients(index.ids))


def check_refined(case: Case, index: Index, share: float = EXACT.share) -> np.ndarray:
    """(q, D): x, which solves with the exact matrix; scores are its products with what rows stand for."""
    count = len(index)
    exact = dense_ggn(case, index.specs, case.data, count) / count
    whole = dense_solved(index, exact, share)
    queries = len(next(iter(case.query.values())) if isinstance(case.query, dict) else case.query[0])
    asked = query_gradients(index, case.model, case.query, queries)
    x = np.linalg.solve(whole, flat(asked).T).T
    expected = x @ stored_rows(index).T
    found = index.scores(case.query, refine=EXACT)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    # It is another question.
    assert np.abs(index.scores(case.query) - expected).max() >= 0.05 * np.abs(expected).max()
    return x


@pytest.mark.parametrize(("name", "dim"), [("mlp", 5), ("cnn", 3), ("gpt2", 3)])
def test_the_question_is_solved_with_the_exact_matrix(name: str, dim: int, tmp_path: Path) -> None:
    case = CASES[name]()
    config = BuildConfig(**SETTINGS, projection_dim=dim, layers=case.selection or LayerSelection())
    if name != "mlp":
        # The oracle differentiates every logit by itself.
        case.data = {k: v[:16] for k, v in case.data.items()} if name == "gpt2" else tuple(t[:16] for t in case.data)
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    check_refined(case, index)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Index, np.ndarray]:
    case = CASES["mlp"]()
    config = BuildConfig(**SETTINGS, projection_dim=5, coarse=None, eigen_bytes=24)
    path = tmp_path_factory.mktemp("refine") / "i"
    index = Index.build(path, model=case.model, data=case.data, config=config, progress=False)
    return case, index, check_refined(case, index)


def test_hits_say_how_far_it_came(built: tuple[Case, Index, np.ndarray]) -> None:
    case, index, _ = built
    events: list[ProgressEvent] = []
    hits = index.search(case.query, 6, refine=EXACT, progress=events.append)
    scores = index.scores(case.query, refine=EXACT)
    assert np.allclose(np.take_along_axis(scores, hits.ids, axis=1), hits.scores, rtol=1e-3, atol=1e-3)
    told = hits.stats.refined
    assert told is not None and (told.examples, told.share, told.way) == (len(index), 0.3, "forward")
    assert len(told.residuals) == len(case.query[0])
    for row in told.residuals:
        assert row[0] > 0.01 and row[-1] <= 1e-4 and len(row) <= 101
    assert {e.stage for e in events} >= {"refine", "scan"} and hits.stats.seconds["transform"] >= told.seconds
    assert index.search(case.query, 6).stats.refined is None
    assert index.search(case.query, 6, refine=False).stats.refined is None
    # A few steps come most of the way.
    few = index.search(case.query, 6, refine=Refine(iterations=4, share=0.5)).stats.refined
    assert few is not None and (few.iterations, few.examples, few.share) == (4, len(index), 0.5)
    assert all(len(row) == 5 and row[-1] < 0.2 * row[0] for row in few.residuals), few.residuals
    # Of single predictions the stored inverse stays, and that is said.
    stays = index.search(case.query, 6, refine=True)
    assert stays.stats.refined is not None and (stays.stats.refined.iterations, stays.stats.refined.way) == (
        0,
        "stored",
    )
    assert np.array_equal(stays.scores, index.search(case.query, 6).scores)


def test_computed_again_as_refined(built: tuple[Case, Index, np.ndarray]) -> None:
    case, index, x = built
    rows = flat(query_gradients(index, case.model, case.data, len(index)))
    expected = x @ rows.T
    hits = index.search(case.query, 4, refine=EXACT, rerank=len(index))
    best = -np.sort(-expected, axis=1)[:, :4]
    assert np.abs(hits.scores - best).max() <= 2e-3 * np.abs(expected).max()
    assert np.abs(np.take_along_axis(expected, hits.ids, 1) - best).max() <= 2e-3 * np.abs(expected).max()


def smoothed(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of classes that weigh unequally; what it is of the outputs is only seen."""
    weight = torch.linspace(0.5, 2.0, 10).to(batch[0].dtype)
    return 3 * functional.cross_entropy(model(batch[0]), batch[1], weight=weight, label_smoothing=0.2, reduction="none")


def smoothed_curvature(outputs: np.ndarray, label: int) -> np.ndarray:
    """-sum_c a_c q_c log p_c, three times."""
    p = np.exp(outputs - outputs.max())
    p /= p.sum()
    a, q = np.linspace(0.5, 2.0, 10), np.full(10, 0.02)
    q[label] += 0.8
    return np.asarray(3 * (a @ q) * (np.diag(p) - np.outer(p, p)))


def squared(model: nn.Module, batch: Any) -> torch.Tensor:
    wanted = functional.one_hot(batch[1], 10).to(batch[0].dtype)
    return 0.5 * functional.mse_loss(model(batch[0]), wanted, reduction="none").mean(dim=1)


def squared_curvature(outputs: np.ndarray, label: int) -> np.ndarray:
    return np.eye(10) / 10


def ggn_of(case: Case, index: Index, curvature: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """mean_i J_i^T M_i J_i over the data, all layers together, with M by hand."""
    model, total = case.model, 0.0
    for i in range(len(index)):
        batch = case.one(case.data, i)
        found = oracle.example_gradients(
            model, lambda at, batch=batch: (batch, at), 10, lambda m, given: m(given[0][0])[0, given[1]], case.weights
        )
        j = np.concatenate([part.reshape(10, -1) for part in projected(index, found).values()], axis=1)
        outputs = copy.deepcopy(model).double()(batch[0])[0].detach().numpy()
        total = total + j.T @ curvature(outputs, int(batch[1])) @ j
    return np.asarray(total) / len(index)


@pytest.mark.parametrize(("loss", "curvature"), [(smoothed, smoothed_curvature), (squared, squared_curvature)])
def test_a_loss_of_ones_own_is_seen(loss: Any, curvature: Any, tmp_path: Path) -> None:
    """The matrix is that of explicit Jacobians and of a Hessian by hand; the inverse and scores follow."""
    case = CASES["mlp"]()
    config = BuildConfig(**SETTINGS, projection_dim=4, store="factors", rank=None, coarse=None)
    path = tmp_path / "i"
    index = Index.build(path, model=case.model, data=case.data, loss=loss, config=config, progress=False)
    gradients = oracle.example_gradients(
        case.model, lambda i: case.one(case.query, i), len(case.query[0]), loss, case.weights
    )
    asked = np.concatenate([g.reshape(len(g), -1) for g in projected(index, gradients).values()], axis=1)
    whole = dense_solved(index, ggn_of(case, index, curvature), EXACT.share)
    expected = np.linalg.solve(whole, asked.T).T @ stored_rows(index).T
    found = index.scores(case.query, refine=EXACT)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    assert np.abs(index.scores(case.query) - expected).max() >= 0.02 * np.abs(expected).max()
    told = index.search(case.query, 3, refine=EXACT).stats.refined
    assert told is not None and max(row[-1] for row in told.residuals) <= 1e-4


def test_an_index_of_rows_that_name_their_largest(tmp_path: Path) -> None:
    """The refined question meets them in its coordinates; the best of them are put in order by whole gradients."""
    case = CASES["mlp"]()
    config = BuildConfig(**SETTINGS, projection_dim=8, coarse=None, store="eigen", eigen_bytes=32)
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    assert isinstance(reader_of(index).codec.layout, SparseLayout)  # type: ignore[attr-defined]
    x = check_refined(case, index)
    # One row by itself is the row among all, though it lies at an odd address.
    rows = stored_rows(index)
    for i in (0, 7, 119):
        assert np.array_equal(flat(index.gradients([i]))[0], rows[i])
    assert ((rows != 0).sum(axis=1) > 10).all()
    scores = x @ flat(query_gradients(index, case.model, case.data, len(index))).T
    by_rows = index.search(case.query, 20, refine=EXACT)
    hits = index.search(case.query, 5, refine=EXACT, rerank=20)
    none = 2e-3 * np.abs(scores).max()
    for q, row in enumerate(hits.ids):
        best = -np.sort(-scores[q, by_rows.ids[q]])[:5]
        assert np.abs(scores[q, row] - best).max() <= none and np.abs(hits.scores[q] - best).max() <= none
    assert np.abs(hits.scores - by_rows.scores[:, :5]).max() > none, "these rows say it all"
    assert hits.stats.reranked is not None and hits.stats.reranked.rows_recall == 1.0


def test_groups_layers_damping_and_normalised_scores(built: tuple[Case, Index, np.ndarray], tmp_path: Path) -> None:
    case, index, x = built
    notes = [{"half": i % 2} for i in range(len(index))]
    path = tmp_path / "i"
    other = Index.build(
        path, model=case.model, data=case.data, config=index.config, payloads=notes, fit=index, progress=False
    )
    scores = other.scores(case.query, refine=EXACT)
    assert np.allclose(scores, index.scores(case.query, refine=EXACT), rtol=1e-3, atol=1e-3)
    groups = other.groups(case.query, "half", refine=EXACT)
    for q, row in enumerate(groups):
        assert {g.value: g.sum for g in row} == pytest.approx(
            {i: float(scores[q, i::2].sum()) for i in (0, 1)}, rel=1e-2
        )
    # Of one layer, and under another damping, the matrix is of that layer and damping.
    first = index.layers[0]
    size = index.specs[first].dim
    exact = dense_ggn(case, index.specs, case.data, len(index)) / len(index)
    whole = dense_solved(index, exact, EXACT.share, 0.7)[:size, :size]
    asked = flat(query_gradients(index, case.model, case.query, len(case.query[0])))[:, :size]
    expected = np.linalg.solve(whole, asked.T).T @ stored_rows(index)[:, :size].T
    found = index.scores(case.query, refine=EXACT, layers=first, damping=0.7)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    cosine = index.scores(case.query, refine=EXACT, normalize="cosine")
    whole_asked = flat(query_gradients(index, case.model, case.query, len(case.query[0])))
    own = np.sqrt((whole_asked * x).sum(axis=1))[:, None] * np.sqrt(index.self_influence())
    plain = index.scores(case.query, refine=EXACT)
    assert np.allclose(cosine, plain / own, rtol=1e-2, atol=1e-3 * np.abs(cosine).max())


def test_examples_are_random_live_ones_and_queries_do_not_matter_to_each_other(
    built: tuple[Case, Index, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, index, _ = built
    some = Refine(iterations=3, examples=20, share=0.5)
    whole = index.scores(case.query, refine=some)
    assert np.abs(index.scores(case.query, refine=some) - whole).max() == 0
    one = index.scores(tuple(t[3:4] for t in case.query), refine=some)
    assert np.allclose(one[0], whole[3], rtol=1e-3, atol=1e-3 * np.abs(whole).max())
    # Where the vectors of all queries are too many, some at a time.
    each = 4 * 12 * sum(spec.dim for spec in index.specs.values())
    monkeypatch.setattr("lorif_index.search.refining._VECTORS_BYTES", 3 * each)
    assert np.allclose(index.scores(case.query, refine=some), whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())
    monkeypatch.setattr("lorif_index.search.refining._VECTORS_BYTES", each - 1)
    with pytest.raises(QueryError, match=rf"{each:,} bytes for these layers, and has {each - 1:,}: .*layers="):
        index.scores(case.query, refine=some)


def test_of_an_ensemble_scores_are_means(tmp_path: Path) -> None:
    models, data, query = [small_model(0), small_model(1)], small_data(60), small_data(3, seed=2)
    config = BuildConfig(**SETTINGS, projection_dim=4)
    index = Index.build(tmp_path / "i", model=models, data=data, config=config, progress=False)
    both = index.scores(query, refine=EXACT)
    # Members have nothing in common: each is refined by itself.
    parts = [index.scores(query, refine=EXACT, layers=f"{number}.*") for number in (0, 1)]
    assert np.allclose(both, sum(parts), rtol=1e-2, atol=2e-3 * np.abs(both).max())


def test_a_product_with_the_stored_curvature_undoes_its_inverse(tmp_path: Path) -> None:
    case = gpt2()
    for number, settings in enumerate((dict(projection_dim=5), dict(projection_dim=5, curvature_rank=7))):
        config = BuildConfig(**SETTINGS, **settings, store="factors")
        index = Index.build(tmp_path / str(number), model=case.model, data=case.data, config=config, progress=False)
        made = reader_of(index).preconditioners(index.layers, index.damping)
        g = query_gradients(index, case.model, case.query, 4)
        assert np.abs(flat(multiply(transform(g, made), made)) - flat(g)).max() <= 1e-3 * np.abs(flat(g)).max()
        expected = flat(g) @ dense_stored(index)
        assert np.abs(flat(multiply(g, made)) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_solver_solves() -> None:
    """Against a dense solve, of systems that need different numbers of steps; one is nothing."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (2, 5)}
    dim = sum(r * c for r, c in shapes.values())
    root = rng.standard_normal((dim, dim))
    matrix = root @ root.T / dim + 0.1 * np.eye(dim)
    diagonal = np.diag(matrix).copy()
    sizes = [r * c for r, c in shapes.values()]

    def apart(rows: np.ndarray) -> dict[str, torch.Tensor]:
        parts = torch.from_numpy(rows).float().split(sizes, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    b = rng.standard_normal((4, dim)) * np.array([[1.0], [1e-4], [0.0], [1e3]])
    b[3] = 1e3 * matrix @ np.eye(dim)[0]
    applied = []

    def apply(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        applied.append(len(v["a"]))
        return apart(flat(v) @ matrix)

    solved = solve(apply, lambda v: apart(flat(v) / diagonal), apart(b), 100)
    expected = np.linalg.solve(matrix, b.T).T
    got = flat(solved.x)
    for q in range(4):
        assert np.abs(got[q] - expected[q]).max() <= 1e-4 * max(np.abs(expected[q]).max(), 1e-30), q
    assert solved.residuals[2] == [0.0] and applied[0] == 4 and applied[1] == 3 and applied[-1] < 3
    assert all(row[-1] <= 1e-6 for row in solved.residuals)
    none = solve(apply, lambda v: apart(flat(v) / diagonal), apart(b), 1)
    assert [len(row) for row in none.residuals] == [2, 2, 1, 2]
    # The norm of the residuals is M^-1's.
    rest = b - flat(none.x) @ matrix
    norms = np.sqrt((rest**2 / diagonal).sum(1) / np.maximum((b**2 / diagonal).sum(1), 1e-300))
    assert np.allclose([row[-1] for row in none.residuals], norms, rtol=1e-3)


def test_the_solution_is_mixed_with_the_stored_inverses(built: tuple[Case, Index, np.ndarray]) -> None:
    """Both as long by H, so that neither drowns the other."""
    case, index, x = built
    h = dense_stored(index)
    asked = flat(query_gradients(index, case.model, case.query, len(x)))
    y = np.linalg.solve(h, asked.T).T
    ratio = np.sqrt(np.einsum("qi,ij,qj->q", x, h, x) / np.einsum("qi,ij,qj->q", y, h, y))[:, None]
    for weight in (0.25, 0.8):
        expected = (weight * x + (1 - weight) * ratio * y) @ stored_rows(index).T
        found = index.scores(case.query, refine=replace(EXACT, weight=weight))
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_what_is_refused(built: tuple[Case, Index, np.ndarray], tmp_path: Path) -> None:
    case, index, _ = built
    for wrong in (
        dict(iterations=0),
        dict(examples=2.5),
        dict(share=0),
        dict(share=1.1),
        dict(weight=0),
        dict(iterations=True),
    ):
        with pytest.raises(ConfigError, match=rf"Refine\({next(iter(wrong))}=...\) must be"):
            Refine(**wrong)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="refine takes True, a Refine or None, got 3: pass refine=True"):
        index.search(case.query, 3, refine=3)  # type: ignore[arg-type]
    with Index.open(index.path) as bare, pytest.raises(QueryError, match="opened without its model"):
        bare.scores(index.gradients([0]), refine=True)
    with Index.open(index.path, model=case.model) as bare, pytest.raises(DataError, match=r"refine= computes training"):
        bare.scores(case.query, refine=True)
    moved = tuple(part.roll(1, 0) for part in case.data)
    other = Index.open(index.path, model=case.model, data=moved)
    with other, pytest.raises(DataError, match="squared gradient norm"):
        other.groups(case.query, "x", refine=Refine(share=0.5))
    config = BuildConfig(**SETTINGS, curvature="empirical", projection_dim=5)

    def rooted(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none").sqrt()

    own = Index.build(tmp_path / "own", model=case.model, data=case.data, loss=rooted, config=config, progress=False)
    with pytest.raises(QueryError, match=r"loss '.*rooted' is not known"):
        own.search(case.query, 3, refine=True)


def test_texts_on_a_model_with_fused_attention(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text_model = load_text_model(tiny_model_folder(tmp_path / "m"))
    texts = [Document(f"The cat number {i} sat on the {'mat' if i % 3 else 'hill'}.", "") for i in range(30)]
    build_text_index(tmp_path / "i", text_model, texts, progress=False).close()
    index, _ = open_text_index(tmp_path / "i")
    hits = index.search(["The cat sat.", "On the hill."], 3, refine=True, rerank=10)
    told = hits.stats.refined
    assert told is not None and told.way.startswith("forward") and told.examples == 30
    # By the random signs of the probes, and by the damping, from .17 to .28 of what it was.
    assert all(row[-1] < 0.35 * row[0] for row in told.residuals), told.residuals

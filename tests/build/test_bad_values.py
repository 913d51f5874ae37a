"""Gradients, queries and paths as they should not be, and processes that share an index."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENCE, assert_same_hits, small_data, small_model
from torch import nn

from lorif_index import BuildConfig, CoarseIndex, Compute, Index
from lorif_index.capture.sources import model_digest
from lorif_index.errors import (
    ConfigError,
    CurvatureError,
    DataError,
    FingerprintError,
    NonFiniteError,
    QueryError,
    message_of,
)

N = 80
# The last is of rows that name their largest coordinates.
STORES = ["factors", "eigen", "sparse"]


def blocks(rows: torch.Tensor, size: int = 32) -> list[dict[str, torch.Tensor]]:
    return [{"a": part[:, :30].reshape(-1, 6, 5), "b": part[:, 30:].reshape(-1, 4, 4)} for part in rows.split(size)]


def config(store: str = "factors", **changes: Any) -> BuildConfig:
    settings: dict[str, Any] = {"store": store, "rank": 1, "curvature_rank": 8, "coarse": None}
    if store == "sparse":
        # Too few for the scales of levels.
        settings |= {"store": "eigen", "eigen_bytes": 17}
    return BuildConfig(**(settings | changes))


@pytest.fixture
def rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(N, 46)


@pytest.mark.parametrize("store", STORES)
def test_examples_without_a_gradient_score_nothing(rows: torch.Tensor, tmp_path: Path, store: str) -> None:
    rows[[3, 40]] = 0.0
    index = Index.build(tmp_path / "i", gradients=blocks(rows), config=config(store))
    scores, own = index.scores(blocks(rows[:9], 9)[0]), index.self_influence()
    assert np.isfinite(scores).all() and np.abs(scores[:, [3, 40]]).max() < 1e-5 * np.abs(scores).max()
    assert np.abs(scores[3]).max() < 1e-5 * np.abs(scores).max(), "nor does a question without one"
    assert (np.abs(own[[3, 40]]) < 1e-5 * own.max()).all()
    assert np.isfinite(index.search(blocks(rows[4:9], 9)[0], k=N, normalize="cosine").scores).all()
    with pytest.raises(QueryError, match="example 3 of the query has no gradient"):
        index.search(blocks(rows[:9], 9)[0], k=5)
    with pytest.raises(QueryError, match="example 0 of the query has no gradient"):
        index.scores(blocks(rows[3:4], 1)[0])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_very_small_and_large_gradients_rank_alike(
    rows: torch.Tensor, tmp_path: Path, store: str, scale: float
) -> None:
    choices = config(store, dtype="float32")
    plain = Index.build(tmp_path / "plain", gradients=blocks(rows), config=choices)
    scaled = Index.build(tmp_path / "scaled", gradients=blocks(rows * scale), config=choices)
    query = blocks(rows[:5], 5)[0]
    expected, found = plain.scores(query), scaled.scores({name: g * scale for name, g in query.items()})
    # H^-1 takes both scales away.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("store", STORES)
def test_denormal_gradients_are_an_error_or_finite(rows: torch.Tensor, tmp_path: Path, store: str) -> None:
    try:
        index = Index.build(tmp_path / "i", gradients=blocks(rows * 1e-40), config=config(store, dtype="float32"))
        assert np.isfinite(index.scores(blocks(rows[:5] * 1e-40, 5)[0])).all()
    except (CurvatureError, NonFiniteError):
        pass


def test_other_data_do_not_finish_an_interrupted_build(rows: torch.Tensor, tmp_path: Path) -> None:
    """Also where the first block is the same."""

    def stop(event: Any) -> None:
        if event.stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "i", gradients=blocks(rows), config=config(), progress=stop)
    other = rows.clone()
    other[-1, 0] += 1
    swapped = torch.cat([rows[:32], rows[64:], rows[32:64]])
    for wrong in (other, swapped):
        with pytest.raises(FingerprintError, match="data"):
            Index.build(tmp_path / "i", gradients=blocks(wrong), config=config())
    x, y, model = torch.randn(200, 6), torch.randint(0, 3, (200,)), nn.Linear(6, 3)
    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "m", model=model, data=(x, y), progress=stop)
    moved = x.clone()
    moved[-1] += 1
    with pytest.raises(FingerprintError, match="data"):
        Index.build(tmp_path / "m", model=model, data=(moved, y))
    assert len(Index.build(tmp_path / "m", model=model, data=(x, y))) == 200


# -- processes -------------------------------------------------------------------------------------------------------


def answer(index: Index | str, query: dict[str, np.ndarray], out: Any) -> None:
    """What a worker does, with an index that it was handed or opens."""
    torch.set_num_threads(1)
    opened = Index.open(index) if isinstance(index, str) else index
    hits = opened.search({n: torch.from_numpy(g) for n, g in query.items()}, k=5)
    out.put((hits.ids, hits.scores))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_an_index(rows: torch.Tensor, tmp_path: Path, method: str) -> None:
    """Forked workers use the very object, spawned ones open the folder; the parent's is as it was, and leases end."""
    index = Index.build(tmp_path / "i", gradients=blocks(rows), config=config())
    query = blocks(rows[:3], 3)[0]
    expected = index.search(query, k=5)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    given = index if method == "fork" else str(index.path)
    plain = {name: g.numpy() for name, g in query.items()}
    # A forked child must not start torch's threads again while the parent holds them: one thread each.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = [context.Process(target=answer, args=(given, plain, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=PATIENCE) for _ in workers]
    for worker in workers:
        worker.join()
    torch.set_num_threads(threads)
    for ids, scores in found:
        assert_same_hits(SimpleNamespace(ids=ids, scores=scores), expected)
    assert_same_hits(index.search(query, k=5), expected)
    index.remove([0])
    index.compact()
    assert not list(index.path.glob("retired-*"))


def classes() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (torch.randn(N, 5), torch.randint(0, 3, (N,)))


def test_questions_that_no_layer_answers(tmp_path: Path) -> None:
    model, (x, y) = classes()
    other = classes()[0]
    index = Index.build(tmp_path / "i", model=model, data=(x, y))
    for measure in (lambda m, b: m(b[0])[:, 0].detach(), lambda m, b: other(b[0])[:, 0]):
        with pytest.raises(QueryError, match="example 0 of the query has no gradient"):
            index.search((x[:4], y[:4]), k=3, measure=measure)
    ignored = torch.tensor([0, -100, 1])
    assert np.abs(index.scores((x[:3], ignored))).max(axis=1).tolist()[1] == 0
    with pytest.raises(QueryError, match="example 1 of the query has no gradient"):
        index.search((x[:3], ignored), k=3)
    assert len(index.search((x[:3], ignored), k=3, measure=lambda m, b: m(b[0])[:, 0])) == 3


def test_a_model_that_has_changed_asks_nothing(tmp_path: Path) -> None:
    model, (x, y) = classes()
    index = Index.build(tmp_path / "i", model=model, data=(x, y))
    expected = index.scores((x[:4], y[:4]))
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    other = classes()[0]
    reopened = Index.open(tmp_path / "i", model=other)
    other.load_state_dict(model.state_dict())
    for opened in (index, reopened):
        for ask in (opened.search, opened.scores):
            with pytest.raises(FingerprintError, match="weights have changed since, differs in model"):
                ask((x[:4], y[:4]))
    model.load_state_dict(kept)
    np.testing.assert_array_equal(index.scores((x[:4], y[:4])), expected)


def test_weights_are_compared_once_for_each_time_they_were_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = classes()
    index = Index.build(tmp_path / "i", model=model, data=(x, y), payloads=list(range(N)))
    taken = []

    def counted(asked: nn.Module) -> str:
        taken.append(asked)
        return model_digest(asked)

    monkeypatch.setattr("lorif_index.identity.model_digest", counted)
    asks = (
        lambda: index.search((x[:4], y[:4]), k=3),
        lambda: index.scores((x[:4], y[:4])),
        lambda: index.groups((x[:4], y[:4]), lambda payload: None),
        lambda: index.explain((x[:4], y[:4]), [1, 2], data=(x, y)),
    )
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for ask in asks:
        ask()
    assert not taken
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for times in (1, 2):
        with pytest.raises(FingerprintError, match="weights have changed since"):
            asks[0]()
        assert len(taken) == times
    with torch.no_grad():
        model[0].weight.copy_(kept["0.weight"])
    for _ in range(3):
        for ask in asks:
            ask()
    assert len(taken) == 3
    # The newer version of an index is of the same model.
    index.remove([7])
    asks[0]()
    assert len(taken) == 3


def test_what_differs_is_named(tmp_path: Path) -> None:
    model, (x, y) = classes()
    x[3] = torch.nan
    with pytest.raises(NonFiniteError, match="on_nonfinite='skip'"):
        Index.build(tmp_path / "i", model=model, data=(x, y))
    with pytest.raises(FingerprintError, match=r'config.on_nonfinite: "error" there, "skip" here\)'):
        Index.build(tmp_path / "i", model=model, data=(x, y), config=BuildConfig(on_nonfinite="skip"))
    x[3] = 0.0
    index = Index.build(tmp_path / "j", model=model, data=(x, y))
    index.close()
    wider = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    with pytest.raises(FingerprintError, match=r"layers\[0\].*width_out: 7 there, 9 here"):
        Index.open(tmp_path / "j", model=wider)


@pytest.mark.parametrize("curvature", ["auto", "empirical"])
def test_nothing_but_damaged_examples(tmp_path: Path, curvature: str) -> None:
    model, (x, y) = classes()
    chosen = BuildConfig(on_nonfinite="skip", curvature=curvature)
    with pytest.raises(NonFiniteError, match="every example of the sample"):
        Index.build(tmp_path / "i", model=model, data=(x * torch.nan, y), config=chosen)


@pytest.mark.parametrize("store", STORES)
def test_what_is_left_of_many_rows_can_be_refitted(tmp_path: Path, store: str) -> None:
    many = torch.randn(1100, 46)
    index = Index.build(tmp_path / "i", gradients=blocks(many, 256), config=config(store, coarse=CoarseIndex(dim=8)))
    assert index.coarse is not None
    index.remove(index.ids[:-10])
    query = blocks(many[:3], 3)[0]
    for change in (index.rebuild_coarse, index.refit, lambda: index.compact(), index.refit):
        change()
        assert sorted(index.search(query, k=10, exact=False).ids[0]) == list(range(1090, 1100))


def test_labels_and_tokens_out_of_range(tmp_path: Path) -> None:
    model, (x, y) = classes()
    index = Index.build(tmp_path / "i", model=model, data=(x, y))
    with pytest.raises(DataError, match="label 7 of example 1 .* 3 classes .* 0 to 2"):
        index.search((x[:2], torch.tensor([1, 7])))
    y[40] = -1
    with pytest.raises(DataError, match="label -1 of example 8 ") as found:
        Index.build(tmp_path / "labels", model=model, data=(x, y))
    assert "examples 32 to 63, counted from 0" in message_of(found.value)
    embedded = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(32, 4)).eval()
    with pytest.raises(IndexError) as raised:
        Index.build(tmp_path / "tokens", model=embedded, data=(torch.full((N, 4), 12), y.clamp_min(0)))
    assert "examples 0, 11, 22," in message_of(raised.value)


def test_errors_of_scattered_examples_name_them(tmp_path: Path) -> None:
    model, (x, y) = classes()
    Index.build(tmp_path / "i", model=model, data=(x, y.clone()))
    y[60] = 5
    reopened = Index.open(tmp_path / "i", model=model, data=(x, y))
    with pytest.raises(DataError, match="label 5 of example 2 of the batch") as found:
        reopened.explain((x[:1], y[:1]), [3, 5, 60, 79])
    assert "a batch of examples 3, 5, 60, 79, counted from 0" in message_of(found.value)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if not len(batch[0]):
            raise ValueError("empty!")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    index = Index.build(tmp_path / "j", model=model, data=(x, y.clamp_max(2)), loss=loss)
    with pytest.raises((ValueError, QueryError), match="empty|no examples"):
        index.search((x[:0], y[:0]))


def test_labels_left_out_are_no_labels_out_of_range(tmp_path: Path) -> None:
    model, (x, y) = classes()
    y[:3] = -100
    index = Index.build(tmp_path / "i", model=model, data=(x, y), config=BuildConfig(store="factors", dtype="float32"))
    scores = index.scores((x[5:7], y[5:7]))
    assert not scores[:, :3].any() and (scores[:, 3:] != 0).mean() > 0.9


@pytest.mark.parametrize("unit", [1e20, 1e36])
def test_gradients_whose_squares_overflow(rows: torch.Tensor, tmp_path: Path, unit: float) -> None:
    with pytest.raises(NonFiniteError, match="layer 'a' has inf or NaN, though the gradients have none.*scale the inp"):
        Index.build(tmp_path / "i", gradients=blocks(rows * unit), config=config(dtype="float32"))


def test_arguments_of_another_type(tmp_path: Path) -> None:
    model, (x, y) = classes()
    index, query = Index.build(tmp_path / "i", model=model, data=(x, y)), (x[:2], y[:2])
    wrong: dict[str, Any] = {
        "ids must be several integers, got 3": lambda: index.remove(3),  # type: ignore[arg-type]
        "ids must be integers, got an array of <U1": lambda: index.remove("3"),  # type: ignore[arg-type]
        r"layers takes .* got \[0\]": lambda: index.search(query, layers=[0]),  # type: ignore[list-item]
        "layers takes .* got 0": lambda: index.search(query, layers=0),  # type: ignore[arg-type]
        "out must be .2, 80. float32, got list": lambda: index.scores(query, out=[1]),  # type: ignore[arg-type]
        "measure must be callable, .* got 'logit'": lambda: index.search(query, measure="logit"),  # type: ignore[arg-type]
        "example 1 in layer '0' has inf or NaN: look at that example, or compute in a wider dtype$": lambda: (
            index.search((torch.stack([x[0], x[1] * torch.nan]), y[:2]))
        ),
    }
    for message, call in wrong.items():
        with pytest.raises((QueryError, NonFiniteError), match=message):
            call()
    for given in ({"model": model, "data": (x, y)}, {"gradients": blocks(torch.randn(N, 46))}):
        with pytest.raises(ConfigError, match="device='gpu0' is no device .*'cuda'"):
            Index.build(tmp_path / "j", config=BuildConfig(compute="gpu0"), **given)
        assert not (tmp_path / "j").exists() or not any((tmp_path / "j").iterdir())
    assert Compute(device=torch.device("cpu")).device == "cpu"  # type: ignore[arg-type]


def test_scores_fill_whatever_has_a_shape(tmp_path: Path) -> None:
    import h5py

    model, (x, y) = classes()
    index = Index.build(tmp_path / "i", model=model, data=(x, y))
    with h5py.File(tmp_path / "scores.h5", "w") as file:
        out = file.create_dataset("scores", (2, N), "f4")
        index.scores((x[:2], y[:2]), out=out)
        assert np.array_equal(out[:], index.scores((x[:2], y[:2])))


def test_questions_in_numpy_and_of_one_example(tmp_path: Path) -> None:
    x, y = small_data()
    model = small_model()
    index = Index.build(tmp_path / "i", model=model, data=(x.numpy(), y.numpy()), progress=False)
    wanted = index.scores((x[:2], y[:2]))
    for asked in ((x[:2].numpy(), y[:2].numpy()), [x[:2], y[:2]]):
        assert np.array_equal(index.scores(asked), wanted)
    for one in ((x[7], y[7]), (x.numpy()[7], y.numpy()[7])):
        with pytest.raises(DataError, match=r"of one example i pass x\[i : i \+ 1\]"):
            index.search(one, 3)
    for wide in (x.double(), x.double().numpy()):
        with pytest.raises(DataError, match=r"numbers of torch.float64, and the model torch.float32: pass x.float\(\)"):
            index.search((wide, y), 3)
        with pytest.raises(DataError, match="float64"):
            Index.build(tmp_path / "wide", model=model, data=(wide, y.numpy()), progress=False)

"""What coverage says is kept, against plain autograd and against what rows score."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import cnn, gpt2, projected, reader_of
from torch import nn

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.build import coverage
from lorif_index.capture.data import as_source
from lorif_index.capture.sources import ModelCapture
from lorif_index.snapshot import Access, Snapshot


def measured(index: Index, model: nn.Module, data: Any, count: int, monkeypatch: Any) -> dict[str, Any]:
    """Coverage over the first so many examples, all of them with parameters."""
    monkeypatch.setattr(coverage, "_ONE_OF", {coverage._WITH_PARAMETERS: 1, coverage._WITH_ROWS: 1})
    now = Snapshot.open(index.path, Access())
    taken = ModelCapture(model, now.query_config(), now.projections)
    made = now.reader.preconditioners(index.layers, index.damping)
    found = coverage.measure_coverage(now.reader.rows, made, taken, None, as_source(data, 3), np.arange(count))
    assert found is not None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


@pytest.mark.parametrize("make", [cnn, gpt2], ids=["cnn", "gpt2"])
def test_shares_are_autograds(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, count = make(), 6
    layers = LayerSelection(include=["0", "2", "5"]) if make is cnn else case.selection
    config = BuildConfig(
        projection="random", projection_dim=5, rank=1, store="factors", dtype="float32", curvature_rank=None,
        curvature="empirical", layers=layers,
    )  # fmt: skip
    # A frozen parameter that is not tracked is no part of what is trained; gradients that are there stay there.
    frozen = case.model[7].bias if make is cnn else case.model.transformer.ln_f.bias
    frozen.requires_grad_(False)
    mark = torch.full_like(frozen, 7.0)
    frozen.grad = mark
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    found = measured(index, case.model, case.data, count, monkeypatch)
    assert frozen.grad is mark and not frozen.requires_grad
    assert all(p.requires_grad for p in case.model.parameters() if p is not frozen)

    total = 0.0
    case.model.eval()
    for i in range(count):
        case.model.zero_grad(set_to_none=True)
        one = case.one(case.data, i)
        one = one if isinstance(one, dict) else (one[0].float(), one[1])
        default_loss(case.model, one).sum().backward()
        grads = [p.grad for p in case.model.parameters() if p.grad is not None]
        total += sum(float(g.double().square().sum()) for g in grads)
    wanted = {n: w for n, w in case.weights.items() if n in index.specs}
    g = oracle.example_gradients(case.model, lambda i: case.one(case.data, i), count, default_loss, wanted)
    whole = {name: float(np.square(part).sum()) for name, part in g.items()}
    tracked = sum(whole.values())
    assert found["tracked"] == pytest.approx(tracked / total, abs=1e-4)
    assert 1 - found["tracked"] - 0.1 < sum(found["untracked"].values()) <= 1 - found["tracked"] + 1e-5
    assert all(share >= 0.05 for share in found["untracked"].values())
    assert found["tracked"] < 0.999 and (found["parameter_examples"], found["row_examples"]) == (count, count)
    spans, projections = 0.0, Snapshot.open(index.path, Access()).projections
    for name, spec in index.specs.items():
        sides = []
        for side, width in (("in", spec.width_in), ("out", spec.width_out)):
            p = projections.side(name, side, torch.device("cpu"), torch.float64)
            if p is None:
                sides.append(np.eye(width))
            else:
                left = np.linalg.svd(p.numpy(), full_matrices=False)[0]
                sides.append(left[:, : np.linalg.matrix_rank(p.numpy())])
        span = float(np.square(oracle.project(g[name], *sides)).sum())
        spans += span
        assert found["layers"][name]["projection"] == pytest.approx(span / whole[name], abs=1e-4)
        assert found["layers"][name]["share"] == pytest.approx(whole[name] / total, abs=1e-4)
    assert found["projection"] == pytest.approx(spans / tracked, abs=1e-4) and 0.05 < found["projection"] < 0.999

    # Rows of rank one: the squared cosine is the first singular value's share.
    small = projected(index, g)
    kept = {name: oracle.truncate(part, 1) for name, part in small.items()}
    up, down = (sum(np.square(p).sum(axis=(1, 2)) for p in parts.values()) for parts in (kept, small))
    assert found["rows"] == pytest.approx(float(up.sum() / down.sum()), abs=1e-3)
    products = np.zeros((3, count))
    every = oracle.example_gradients(case.model, lambda i: case.one(case.data, i), len(index), default_loss, wanted)
    every = projected(index, every)
    for name in index.specs:
        c = oracle.second_moment(every[name])
        h = np.linalg.inv(c + oracle.damping("auto", c, row_bytes=index.bytes_per_example) * np.eye(len(c)))
        pairs = ((small, small), (kept, kept), (small, kept))
        products += np.stack([np.diag(oracle.scores(a[name], b[name], h)) for a, b in pairs])
    expected = float((np.square(products[2]) / products[1]).sum() / products[0].sum())
    assert found["scores"] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("store", "row_bytes"), [("eigen", 48), ("eigen", 200), ("factors", 48)])
def test_rows_are_taken_for_what_they_score(
    store: str, row_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient that a row stands for has the row's score with any query."""
    case = gpt2()
    config = BuildConfig(store=store, projection_dim=5, eigen_bytes=row_bytes, coarse=None)
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    rows = {name: g.flatten(1) for name, g in index.gradients(index.ids).items()}
    query = {n: torch.randn(3, s.d_in, s.d_out, generator=torch.manual_seed(1)) for n, s in index.specs.items()}
    preconditioners = reader_of(index).preconditioners(index.layers, index.damping)
    total = sum(preconditioners[n].apply(g.flatten(1)) @ rows[n].T for n, g in query.items())
    scores = index.scores(query)
    assert np.abs(total.numpy() - scores).max() <= 1e-3 * np.abs(scores).max()
    found = measured(index, case.model, case.data, 10, monkeypatch)
    assert 0.2 < found["rows"] < 1 and 0.2 < found["scores"] < 1
    assert set(found["layers"]) == set(index.layers)
    kept = index.build_report["coverage"]
    assert 0 < kept["rows"] <= 1 and kept["row_examples"] == 2 and kept["seconds"] > 0


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, without a module; and one layer as it should be."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.first, self.enc, self.dec = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6, bias=False)
        self.functional = functional

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.enc(torch.tanh(self.first(x))))
        return nn.functional.linear(hidden, self.enc.weight.T) if self.functional else self.dec(hidden)


@pytest.mark.parametrize("projection_dim", [None, 3])
@pytest.mark.parametrize("functional", [False, True])
def test_weights_used_without_their_module_are_told_of(
    functional: bool, projection_dim: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Tied(functional), torch.randn(60, 6)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[0]).square().sum(dim=1)

    layers = ["first", "enc"] + ([] if functional else ["dec"])
    config = BuildConfig(projection_dim=projection_dim, curvature="empirical", layers=layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = Index.build(tmp_path / "i", model=model, data=(x, x), loss=loss, config=config, progress=False)
    told = [str(w.message) for w in caught if "not autograd's" in str(w.message)]
    assert index.build_report["coverage"]["differing"] == (["enc"] if functional else [])
    assert len(told) == int(functional) and all("['enc']" in text for text in told)


# The tied head is not tracked with them, by choice.
EMBEDDINGS = LayerSelection(embeddings=True)


@pytest.mark.parametrize("make", [cnn, gpt2], ids=["cnn", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"projection": "random", "projection_dim": 5}, {"compute": {"autocast": "bfloat16"}}, {"layers": EMBEDDINGS}],
)
def test_no_difference_where_there_is_none(make: Any, settings: Any, tmp_path: Path) -> None:
    case = make()
    config = BuildConfig(**({"layers": case.selection} | settings))
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config, progress=False)
    assert index.build_report["coverage"]["differing"] == []


@pytest.mark.parametrize("seed", range(6))
def test_what_a_projection_leaves_of_two_classes_is_rounding(seed: int, tmp_path: Path) -> None:
    """Output gradients are (a, -a), of which a projection to one number, with equal signs, leaves rounding alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    data = torch.randn(60, 8), torch.randint(0, 2, (60,))
    config = BuildConfig(projection="random", projection_dim=1, curvature="empirical", seed=seed)
    index = Index.build(tmp_path / "i", model=model, data=data, config=config, progress=False)
    assert index.build_report["coverage"]["differing"] == []


def test_where_nothing_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [{"a": np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)}]
    assert Index.build(tmp_path / "g", gradients=blocks, progress=False).build_report["coverage"] is None
    case = gpt2()
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, progress=False)

    class Refusing(torch.autograd.Function):
        """As quantised weights do."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no gradient of this weight")

    norm = case.model.transformer.ln_f
    forward = norm.forward
    norm.forward = lambda x: forward(x) + 0 * Refusing.apply(norm.weight)
    found = measured(index, case.model, case.data, 4, monkeypatch)
    assert found["tracked"] is None and found["projection"] is None and found["parameter_examples"] == 0
    assert 0 < found["rows"] <= 1


def test_examples_are_few_and_skipped_ones_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(700, 6), torch.randint(0, 3, (700,))
    x[::2] = torch.nan
    config = BuildConfig(on_nonfinite="skip", coarse=None, curvature="empirical")
    index = Index.build(tmp_path / "i", model=nn.Linear(6, 3), data=(x, y), config=config, progress=False)
    found = index.build_report["coverage"]
    assert (found["parameter_examples"], found["row_examples"], found["tracked"]) == (2, 8, 1.0)
    assert found["untracked"] == {}


def test_modules_that_are_no_linear_maps_are_named(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(5 * self.cells(x)[0][:, -1])

    torch.manual_seed(0)
    data = (torch.randn(40, 7, 6), torch.randint(0, 3, (40,)))
    with pytest.warns(UserWarning, match=r"\{'LSTM': 0\.\d+\} of the squared norm .* are not tracked"):
        index = Index.build(tmp_path / "i", model=Recurrent(), data=data, progress=False)
    assert index.build_report["coverage"]["unknown"] == ["LSTM"] and list(index.layers) == ["head"]


def test_a_build_that_sees_little_says_what_it_does_not_see(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 3))
    with torch.no_grad():
        # Small inputs, large weights: what the embedding would learn is most of the gradient.
        model[0].weight.mul_(0.01)
        model[2].weight.mul_(10.0)
    data = torch.randint(0, 20, (40, 4)), torch.randint(0, 3, (40,))
    with pytest.warns(UserWarning, match=r"the tracked layers hold 0\.\d+ of .*\{'Embedding': 0\.\d+\}"):
        index = Index.build(tmp_path / "i", model=model, data=data, progress=False)
    assert index.build_report["coverage"]["tracked"] < 0.5

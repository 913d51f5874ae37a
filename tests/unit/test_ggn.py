"""The GGN curvature, against the dense float64 Gauss-Newton matrix from Jacobians of the parameters themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import cnn, ggn, gpt2, low_rank_part, mlp, reader_of
from torch import nn
from torch.nn import functional

from lorif_index import BuildConfig, CrossEntropy, CurvatureRows, Index, Sample, default_loss
from lorif_index.capture.heads import Declared
from lorif_index.capture.probes import Probes
from lorif_index.errors import ConfigError, DataError

DENSE: dict[str, Any] = dict(
    projection_dim=None, rank=None, curvature_rank=None, curvature="ggn", dtype="float32", store="factors"
)


def matrix(index: Index, layer: str) -> np.ndarray:
    """C: where all directions are asked for there is no diagonal."""
    assert index.curvature[layer].share == 0
    return low_rank_part(index.curvature[layer])


def gap(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("make", [mlp, cnn])
def test_rows_of_few_classes_add_up_to_the_ggn_exactly(make: Any, tmp_path: Path) -> None:
    case = make()
    weights = dict(list(case.weights.items())[-2:])
    expected = ggn(case, weights)
    index = Index.build(
        tmp_path / "i", model=case.model, data=case.data, config=BuildConfig(**DENSE, layers=list(weights))
    )
    for layer, c in expected.items():
        assert gap(matrix(index, layer), c) < 1e-4
        assert index.curvature[layer].trace == pytest.approx(np.trace(c), rel=1e-4)
        assert index.curvature[layer].examples == len(case.data[0])


def test_the_mixture_is_three_quarters_ggn_of_the_ggns_trace(tmp_path: Path) -> None:
    case = mlp()
    expected, gradients = ggn(case, case.weights), case.gradients(case.data)
    config = BuildConfig(**DENSE | {"curvature": "auto"})
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    for layer, c in expected.items():
        empirical = oracle.second_moment(gradients[layer])
        mixed = 0.75 * c + 0.25 * empirical * np.trace(c) / np.trace(empirical)
        assert gap(matrix(index, layer), mixed) < 1e-4
        assert index.curvature[layer].trace == pytest.approx(np.trace(c), rel=1e-4)


def test_random_probes_of_sequences_estimate_the_ggn(tmp_path: Path) -> None:
    case = gpt2()
    weights = {k: v for k, v in case.weights.items() if k == "transformer.h.1.mlp.c_proj"}
    # Each class at each position is a Jacobian of the oracle's: the shortest sequences.
    shortest = case.data["attention_mask"].sum(dim=1).argsort()[:6]
    few = {k: v[shortest, :5] for k, v in case.data.items()}
    case.data = few
    (layer, expected), *_ = ggn(case, weights).items()
    gaps = []
    for probes in (4, 256):
        config = BuildConfig(**DENSE, layers=[layer], sample=Sample(probes=probes), batch_size=6)
        index = Index.build(tmp_path / str(probes), model=case.model, data=few, config=config)
        gaps.append(gap(matrix(index, layer), expected))
    # Errors fall with the root of the number of probes.
    assert gaps[1] < 0.16 and 4 < gaps[0] / gaps[1] < 16
    assert index.curvature[layer].trace == pytest.approx(np.trace(expected), rel=0.05)


def test_probes_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    case = gpt2()
    traces = []
    for size in (3, 40):
        config = BuildConfig(projection_dim=None, batch_size=size, curvature_rank=None, curvature="ggn")
        index = Index.build(tmp_path / str(size), model=case.model, data=case.data, config=config)
        traces.append([index.curvature[layer].trace for layer in index.layers])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_probes_have_the_covariance_of_the_softmax() -> None:
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).double()
    leaf = logits.repeat(4000, 1).requires_grad_()
    labels = torch.zeros(4000, dtype=torch.int64)
    head = Declared(lambda model, batch: (leaf, labels))
    (row,) = Probes(head, 1, 3, 4000)(nn.Identity(), None, np.arange(4000))
    (v,) = torch.autograd.grad(row.sum(), leaf)
    p = logits.softmax(1)[0]
    expected = torch.diag(p) - torch.outer(p, p)
    assert float((v.T @ v / len(v) - expected).abs().max()) < 0.02
    hidden = Probes(Declared(lambda model, batch: (leaf[:1], torch.tensor([-100]))), 3, 3, 4000)
    rows = hidden(nn.Identity(), None, np.array([7]))
    assert len(rows) == 3 and not any(row.detach().any() for row in rows)


def test_a_loss_that_says_where_its_logits_are(tmp_path: Path) -> None:
    case = mlp()

    def logits(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch[0]), batch[1]

    config = BuildConfig(**DENSE | {"curvature": "auto"})
    given = Index.build(
        tmp_path / "given",
        model=case.model,
        data=case.data,
        loss=CrossEntropy(logits),
        curvature="mixed",
        config=config,
    )
    default = Index.build(tmp_path / "default", model=case.model, data=case.data, config=config)
    assert np.allclose(given.scores(case.query), default.scores(case.query), rtol=1e-4, atol=1e-4)
    assert given.config.curvature == "mixed" and default.config.curvature == "auto"


def absolute(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - functional.one_hot(batch[1], 10)).abs().sum(1)


def test_a_loss_that_is_not_understood_gets_the_empirical_curvature_and_is_told(tmp_path: Path) -> None:
    case = mlp()
    with pytest.warns(UserWarning, match="absolute.*calls none of.*The curvature is the empirical one"):
        told = Index.build(tmp_path / "told", model=case.model, data=case.data, loss=absolute)
    meant = Index.build(tmp_path / "meant", model=case.model, data=case.data, loss=absolute, curvature="empirical")
    assert np.array_equal(told.scores(case.query), meant.scores(case.query))
    assert reader_of(told).manifest.fingerprint["curvature"] == "sample"
    with pytest.raises(ConfigError, match="absolute.*CrossEntropy.*empirical"):
        Index.build(tmp_path / "no", model=case.model, data=case.data, loss=absolute, curvature="ggn")
    assert not (tmp_path / "no").exists()
    blocks = [{"w": torch.randn(20, 4, 4)}]
    with pytest.raises(ConfigError, match="built from gradients.*CurvatureRows"):
        Index.build(tmp_path / "no", gradients=blocks, curvature="mixed")
    with pytest.raises(ConfigError, match="curvature must be one of"):
        Index.build(tmp_path / "no", gradients=blocks, curvature="fisher")
    with pytest.raises(ConfigError, match="rows of its own"):
        BuildConfig.paper(curvature="ggn")


def test_logits_of_the_wrong_form(tmp_path: Path) -> None:
    case = mlp()
    loss = CrossEntropy(lambda model, batch: (model(batch[0]), batch[1].float()))
    with pytest.raises(DataError, match="integer labels"):
        Index.build(tmp_path / "no", model=case.model, data=case.data, loss=loss)


def test_rows_given_win_over_the_config(tmp_path: Path) -> None:
    case = mlp()
    rows = CurvatureRows(case.data)
    given = Index.build(tmp_path / "given", model=case.model, data=case.data, curvature=rows)
    empirical = Index.build(tmp_path / "empirical", model=case.model, data=case.data, curvature="empirical")
    assert np.allclose(given.scores(case.query), empirical.scores(case.query), rtol=1e-3, atol=1e-3)


def test_default_loss_is_of_its_logits() -> None:
    case = gpt2()
    case.model.eval()
    logits, labels = default_loss.logits(case.model, case.data)
    terms = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    assert torch.equal(terms, default_loss(case.model, case.data))

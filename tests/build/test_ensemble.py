"""Ensembles: one index over several checkpoints scores as the mean of an index each, and as the dense oracle says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import Case, assert_best, digits, ggn, gpt2, mlp, own_loss, reader_of, split, train
from torch import nn

from lorif_index import BuildConfig, CrossEntropy, Index, LayerSelection, default_loss
from lorif_index.capture.ensemble import Ensemble, as_model
from lorif_index.capture.heads import Declared
from lorif_index.capture.probes import Probes
from lorif_index.errors import ConfigError, DataError, FingerprintError
from lorif_index.progress import ProgressEvent

# Nothing is rounded or cut off: what an ensemble loses, it would lose by itself.
WHOLE: dict[str, Any] = dict(rank=None, curvature_rank=None, dtype="float32", store="factors")


def checkpoints(count: int, make: Any = mlp) -> tuple[list[nn.Module], Case]:
    """Models of one form with weights of their own, and the case whose data they are asked about."""
    case = make()
    models = []
    for seed in range(count):
        torch.manual_seed(10 + seed)
        model = copy.deepcopy(case.model)
        for p in model.parameters():
            p.data += 0.3 * p.data.std().nan_to_num(0.1) * torch.randn_like(p)
        train(model, case.data, 5)
        models.append(model)
    return models, case


def build(path: Path, models: Any, data: Any, **settings: Any) -> Index:
    return Index.build(path, model=models, data=data, config=BuildConfig(**settings), progress=False)


def close(got: np.ndarray, expected: np.ndarray, within: float = 1e-4) -> bool:
    return bool(np.abs(got - expected).max() <= within * np.abs(expected).max())


@pytest.mark.parametrize("projection", [{"projection_dim": None}, {"projection_dim": 5}])
def test_scores_are_the_mean_of_an_index_each(projection: dict[str, Any], tmp_path: Path) -> None:
    """Learnt projections and exact GGN rows included: a member's layers see that member alone."""
    models, case = checkpoints(3)
    together = build(tmp_path / "all", models, case.data, **WHOLE, **projection)
    apart = [build(tmp_path / str(i), model, case.data, **WHOLE, **projection) for i, model in enumerate(models)]
    assert together.layers == tuple(f"{i}.{layer}" for i in range(3) for layer in ("0", "2"))
    assert together.bytes_per_example == 3 * apart[0].bytes_per_example
    assert close(together.scores(case.query), np.mean([index.scores(case.query) for index in apart], axis=0))
    own = np.mean([index.self_influence() for index in apart], axis=0)
    assert close(together.self_influence(), own)
    assert close(
        together.scores(case.query, damping=0.5, layers="1.*"), apart[1].scores(case.query, damping=0.5) / len(models)
    )
    relatif = together.scores(case.query, normalize="relatif")
    assert close(relatif, together.scores(case.query) / np.sqrt(own))
    cosine = together.scores(case.query, normalize="cosine")
    assert np.abs(cosine).max() <= 1 + 1e-4
    assert np.abs(together.scores(case.data, normalize="cosine").diagonal() - 1).max() < 1e-4


def test_scores_are_the_dense_oracles(tmp_path: Path) -> None:
    models, case = checkpoints(2)
    index = build(tmp_path / "i", models, case.data, **WHOLE, projection_dim=None)
    expected, expected_own = 0.0, 0.0
    for model in models:
        of_member = Case(model, case.data, case.query, case.weights)
        rows, queries = of_member.gradients(case.data), of_member.gradients(case.query)
        for layer, c in ggn(of_member, case.weights).items():
            empirical = oracle.second_moment(rows[layer])
            c = 0.75 * c + 0.25 * empirical * np.trace(c) / np.trace(empirical)
            h = np.linalg.inv(c + oracle.damping("auto", c, row_bytes=index.bytes_per_example // 2) * np.eye(len(c)))
            expected = expected + oracle.scores(queries[layer], rows[layer], h) / len(models)
            expected_own = expected_own + np.diag(oracle.scores(rows[layer], rows[layer], h)) / len(models)
    assert close(index.scores(case.query), np.asarray(expected), 1e-3)
    assert close(index.self_influence(), np.asarray(expected_own), 1e-3)


SIZES = [("eigen", 4000, 0.95), ("eigen", 302, 0.8), ("factors", 4000, 0.95)]


@pytest.mark.parametrize(("store", "row_bytes", "alike"), SIZES)
def test_every_store(store: str, row_bytes: int, alike: float, tmp_path: Path) -> None:
    """Probes of sequences and all kinds of rows: what is stored answers as the unrounded ensemble does."""
    models, case = checkpoints(2, gpt2)
    data = {k: v.repeat(3, 1) for k, v in case.data.items()}
    whole = build(tmp_path / "whole", models, data, **WHOLE, projection_dim=6, curvature="empirical", damping=0.03)
    index = build(
        tmp_path / "i",
        models,
        data,
        projection_dim=6,
        store=store,
        rank=6,
        eigen_bytes=row_bytes,
        coarse=None,
        curvature="empirical",
        damping=0.03,
    )
    got, expected = index.scores(case.query), whole.scores(case.query)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > alike
    assert 0.6 < np.abs(got).mean() / np.abs(expected).mean() < 1.5
    reopened = Index.open(tmp_path / "i", model=tuple(models))
    assert np.array_equal(reopened.scores(case.query), got)
    assert_best(reopened.search(case.query, 4), got)


def test_a_coarse_index_finds_what_a_scan_does(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    models, case = checkpoints(2)
    data = tuple(t.repeat(10, *[1] * (t.ndim - 1)) for t in case.data)
    data = (data[0] + 0.05 * torch.randn(data[0].shape, generator=torch.Generator().manual_seed(0)), data[1])
    index = build(tmp_path / "i", models, data, coarse={"kind": "flat", "dim": 64}, projection_dim=8)
    found, scanned = index.search(case.query, 10, exact=False), index.search(case.query, 10, exact=True)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(found.ids, scanned.ids, strict=True)]) > 0.95
    same = found.ids == scanned.ids
    assert np.allclose(found.scores[same], scanned.scores[same], rtol=1e-4)


def test_members_have_probes_of_their_own(tmp_path: Path) -> None:
    models, case = checkpoints(2, gpt2)
    for settings in ({"curvature": "ggn"}, {}):
        # A head's words would be projected at random, by its layer's name.
        settings |= {"layers": LayerSelection(head=False)}
        together = build(
            tmp_path / f"all{len(settings)}", models, case.data, projection_dim=6, sample={"probes": 2}, **settings
        )
        first = build(
            tmp_path / f"0{len(settings)}", models[0], case.data, projection_dim=6, sample={"probes": 2}, **settings
        )
        for layer in first.layers:
            assert together.curvature[f"0.{layer}"].trace == pytest.approx(first.curvature[layer].trace, rel=1e-4)
    pair = nn.ModuleList([nn.Identity(), nn.Identity()])
    x, y = torch.randn(2, 3, 4).requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)
    probes = Probes(Declared(default_loss.logits), 2, 0, 9)
    same = [probes._rows(member, (x, y), np.arange(2), number, False) for number, member in enumerate(pair)]
    assert len(same[0]) == 2 and not torch.equal(same[0][0], same[1][0])


def test_a_loss_and_a_measure_of_ones_own(tmp_path: Path) -> None:
    models, case = checkpoints(2)
    config = BuildConfig(**WHOLE, curvature="empirical")
    index = Index.build(tmp_path / "i", model=models, data=case.data, loss=own_loss, config=config)
    apart = [
        Index.build(tmp_path / str(i), model=m, data=case.data, loss=own_loss, config=config)
        for i, m in enumerate(models)
    ]
    assert reader_of(index).manifest.fingerprint["loss"] == "own_loss"

    def measure(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0])[:, 3]

    expected = np.mean([i.scores(case.query, measure=measure) for i in apart], axis=0)
    assert close(index.scores(case.query, measure=measure), expected)
    # Of linear maps alone, in whole widths: gradients of the data are those of the rows.
    ids = np.arange(10)
    gradients = {f"{i}.{name}": g for i, of in enumerate(apart) for name, g in of.gradients(ids).items()}
    asked = tuple(part[:10] for part in case.data)
    assert close(index.scores(gradients), index.scores(asked))
    logits = CrossEntropy(lambda model, batch: (model(batch[0]), batch[1]))
    Index.build(tmp_path / "ce", model=models, data=case.data, loss=logits, curvature="ggn")


def test_models_are_left_as_they_were(tmp_path: Path) -> None:
    models, case = checkpoints(2)
    models[0].train()
    models[1][0].weight.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in models]
    build(tmp_path / "i", models, case.data)
    assert models[0].training and models[1].training == case.model.training
    assert not models[1][0].weight.requires_grad and models[0][0].weight.requires_grad
    for model, state in zip(models, before, strict=True):
        assert list(dict(model.named_modules())) == ["", "0", "1", "2"]
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_an_interrupted_build_goes_on_with_the_same_members_only(tmp_path: Path) -> None:
    models, case = checkpoints(2)

    def stop(event: ProgressEvent) -> None:
        if event.stage == "encode" and event.done:
            raise KeyboardInterrupt

    settings: dict[str, Any] = dict(WHOLE, compute={"shard_bytes": 4096})
    with pytest.raises(KeyboardInterrupt):
        Index.build(tmp_path / "i", model=models, data=case.data, config=BuildConfig(**settings), progress=stop)
    for others in (models[::-1], models[:1], models[0]):
        with pytest.raises(FingerprintError, match="interrupted build"):
            build(tmp_path / "i", others, case.data, **settings)
    index = build(tmp_path / "i", models, case.data, **settings)
    assert close(index.scores(case.query), build(tmp_path / "whole", models, case.data, **settings).scores(case.query))


def test_what_is_no_ensemble_is_refused(tmp_path: Path) -> None:
    models, case = checkpoints(2)
    for wrong, message in (
        ([], "empty list"),
        ([models[0], "checkpoint.pt"], r"model\[1\] must be a torch.nn.Module, got str"),
        ([models[0], models[0]], r"model\[0\] and model\[1\] share the module '0'.*deepcopy"),
        ([models[0], copy.deepcopy(models[1]).to("meta")], r"model\[0\] is on \['cpu'\] and model\[1\] on \['meta'\]"),
    ):
        with pytest.raises(DataError, match=message):
            build(tmp_path / "no", wrong, case.data)
    with pytest.raises(ConfigError, match=r"model\[0\]: layer pattern 'head' matches none"):
        build(tmp_path / "no", models, case.data, layers="head")
    assert not (tmp_path / "no").exists()
    index = build(tmp_path / "i", models, case.data)
    assert reader_of(index).manifest.fingerprint["members"] == 2
    for others in (models[0], models[:1], models[::-1]):
        with pytest.raises(FingerprintError):
            Index.open(tmp_path / "i", model=others)
    build(tmp_path / "single", models[0], case.data)
    with pytest.raises(FingerprintError, match="members: null there, 2 here"):
        Index.open(tmp_path / "single", model=models)


def test_members_may_have_layers_of_their_own(tmp_path: Path) -> None:
    """The same selection is made of each member; other names and widths are fine. The damping is given: rows of other
    lengths have another."""
    torch.manual_seed(0)
    data, query = split(digits(130, image=False), 120)
    wide = nn.Sequential(nn.Linear(22, 30), nn.ReLU(), nn.Linear(30, 10))
    deep = nn.Sequential(nn.Linear(22, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 10))
    for model in (wide, deep):
        train(model, data)
    index = build(tmp_path / "i", [wide, deep], data, **WHOLE, damping=0.03, layers=LayerSelection(exclude=("0",)))
    assert index.layers == ("0.2", "1.2", "1.4")
    apart = [
        build(tmp_path / str(i), m, data, **WHOLE, damping=0.03, layers=LayerSelection(exclude=("0",)))
        for i, m in enumerate((wide, deep))
    ]
    assert close(index.scores(query), np.mean([i.scores(query) for i in apart], axis=0))


def test_one_member_is_an_ensemble_of_one(tmp_path: Path) -> None:
    (model,), case = checkpoints(1)
    index = build(tmp_path / "i", [model], case.data, **WHOLE)
    assert index.layers == ("0.0", "0.2")
    assert close(index.scores(case.query), build(tmp_path / "s", model, case.data, **WHOLE).scores(case.query))
    assert isinstance(as_model((model,)), Ensemble) and as_model(model) is model


def test_an_ensemble_lives_as_other_indexes_do(tmp_path: Path) -> None:
    """Examples are added to all members' layers, and the estimate takes a list of models, too."""
    models, case = checkpoints(2)
    first, more = split(case.data, 80)
    index = build(tmp_path / "i", models, first, **WHOLE)
    index.add(more)
    whole = Index.build(tmp_path / "whole", model=models, data=case.data, fit=index, progress=False)
    assert close(index.scores(case.query), whole.scores(case.query))
    index.remove([3, 7])
    assert close(index.scores(case.query), np.delete(whole.scores(case.query), [3, 7], axis=1))
    estimate = Index.estimate(model=models, data=case.data, config=BuildConfig(**WHOLE), progress=False)
    assert estimate.bytes_per_example == whole.bytes_per_example

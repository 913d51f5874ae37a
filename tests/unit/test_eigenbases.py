"""Learnt projections: against eigenvectors of float64 second moments taken with plain hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import PATIENCE, cnn, gpt2, mlp, reader_of
from torch import nn

from lorif_index import BuildConfig, Index, LayerSelection, default_loss
from lorif_index.build.choice import widest
from lorif_index.capture import eigenbases
from lorif_index.capture.data import as_source
from lorif_index.capture.layers import layer_specs
from lorif_index.capture.sources import ModelCapture
from lorif_index.errors import CurvatureError, FingerprintError
from lorif_index.linalg.projection import Projections, projection_matrix
from lorif_index.storage.manifest import read_manifest


def second_moments(model: nn.Module, name: str, data: Any, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """sum x x^T, a one appended for the bias, and sum dy dy^T, over positions with a gradient."""
    model = model.double().eval()
    kept: dict[str, torch.Tensor] = {}

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        kept["x"] = args[0].detach()
        output.retain_grad()
        kept["y"] = output

    handle = dict(model.named_modules())[name].register_forward_hook(hook)
    batch = data if isinstance(data, dict) else (data[0].double(), data[1])
    default_loss(model, batch).sum().backward()
    handle.remove()
    model.float()
    x, dy = kept["x"].flatten(0, -2), kept["y"].grad.flatten(0, -2)
    counts = dy.abs().amax(1) > 0
    x, dy = x[counts], dy[counts]
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
    return (x.T @ x).numpy(), (dy.T @ dy).numpy()


def leading(c: np.ndarray, d: int) -> np.ndarray:
    return np.linalg.eigh(c)[1][:, ::-1][:, :d]


def same_space(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a @ a.T - b @ b.T, 2))


@pytest.mark.parametrize("whole_up_to", [1024, 0])
@pytest.mark.parametrize(("make", "layer"), [(mlp, "0"), (gpt2, "transformer.h.0.mlp.c_fc")])
def test_projections_are_the_leading_eigenvectors(
    make: Any, layer: str, whole_up_to: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenbases, "_WHOLE_UP_TO", whole_up_to)
    monkeypatch.setattr(eigenbases, "_TIMES", (2,))
    monkeypatch.setattr("lorif_index.linalg.subspace.OVERSAMPLING", 2)
    case = make()
    config = BuildConfig(projection_dim=4, layers=[layer], batch_size=7)
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    learnt = reader_of(index).projections
    assert learnt is not None and set(learnt) == {(layer, "in"), (layer, "out")}
    for side, c in zip(("in", "out"), second_moments(case.model, layer, case.data, bias=True), strict=True):
        p = learnt[layer, side].double().numpy()
        assert np.abs(p.T @ p - np.eye(4)).max() < 1e-5
        best = leading(c, 4)
        assert np.trace(p.T @ c @ p) > (1 - 1e-6 if whole_up_to else 0.97) * np.trace(best.T @ c @ best)
        if whole_up_to:
            assert same_space(p, best) < 1e-3


def test_scores_use_them_on_both_sides(tmp_path: Path) -> None:
    case = mlp()
    config = BuildConfig(
        projection_dim=5, curvature="empirical", rank=None, curvature_rank=None, dtype="float32", store="factors"
    )
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    rows, queries = case.gradients(case.data), case.gradients(case.query)
    expected = np.zeros((10, 120))
    for layer in index.layers:
        p_in, p_out = (leading(c, 5) for c in second_moments(case.model, layer, case.data, bias=True))
        g, q = (np.einsum("ia,nij,jb->nab", p_in, v[layer], p_out).reshape(len(v[layer]), -1) for v in (rows, queries))
        c = g.T @ g / len(g)
        expected += q @ np.linalg.solve(
            c + oracle.damping("auto", c, row_bytes=index.bytes_per_example) * np.eye(len(c)), g.T
        )
    scores = index.scores(case.query)
    assert np.abs(scores - expected).max() < 2e-3 * np.abs(expected).max()
    # From disk, in another process's place.
    again = Index.open(tmp_path / "i", model=case.model)
    assert np.array_equal(again.scores(case.query), scores)
    raw = {layer: torch.from_numpy(q).float() for layer, q in queries.items()}
    assert np.allclose(Index.open(tmp_path / "i").scores(raw), scores, rtol=1e-3, atol=1e-3 * np.abs(scores).max())


def test_the_same_files_each_time(tmp_path: Path) -> None:
    case = cnn()
    digests = []
    for name in "ab":
        index = Index.build(tmp_path / name, model=case.model, data=case.data, config=BuildConfig(projection_dim=3))
        digests.append(index.fingerprint)
    assert digests[0] == digests[1]
    random = Index.build(
        tmp_path / "c", model=case.model, data=case.data, config=BuildConfig(projection_dim=3, projection="random")
    )
    assert random.fingerprint != digests[0] and not (tmp_path / "c" / "projections.h5").exists()


class Attending(nn.Module):
    """Causal attention. The query of a first token has a softmax over one key: its gradient is zero up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(2, (3, 8)).transpose(1, 2) for m in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(attended.transpose(1, 2).flatten(2).tanh().sum(dim=1))


def side_moments(model: nn.Module, data: Any, count: int, **config: Any) -> dict[str, np.ndarray]:
    """sum x x^T and sum dy dy^T of all sides, over what a build hands to its fit."""
    moments: dict[str, Any] = {}

    def take(side: tuple[str, str], rows: torch.Tensor) -> None:
        moments["/".join(side)] = moments.get("/".join(side), 0) + (rows.T @ rows).numpy()

    whole = ModelCapture(model, BuildConfig(projection_dim=3, projection_floor=1, **config))
    whole.sides(None, as_source(data, 5), np.arange(count))(take)
    return moments


def attended() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(12, 20, 24, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def attended_moments() -> dict[str, np.ndarray]:
    return side_moments(Attending(), attended(), 12)


def test_inputs_whose_gradient_is_rounding_do_not_count(tmp_path: Path) -> None:
    """On this machine, and on those that compute with other instructions."""
    data = attended_moments()
    x = torch.cat([attended()[0], torch.ones(12, 20, 1)], dim=2)
    for name, first in (("query", 1), ("key", 0), ("value", 0)):
        rows = x[:, first:].flatten(0, 1)
        np.testing.assert_allclose(data[f"{name}/in"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    script = "import sys, numpy, test_eigenbases as t; numpy.savez(sys.argv[1], **t.attended_moments())"
    paths = [sys.path[0], str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    started = {
        capability: subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / f"{capability}.npz")],
            env=environment | {"ATEN_CPU_CAPABILITY": capability},
        )
        for capability in ("default", "avx2")
    }
    for capability, process in started.items():
        assert process.wait(timeout=PATIENCE) == 0
        found = np.load(tmp_path / f"{capability}.npz")
        assert set(found) == set(data)
        for name, moment in data.items():
            assert np.abs(found[name] - moment).max() <= 1e-5 * np.abs(moment).max(), (capability, name)


def test_what_counts_depends_on_the_example_alone() -> None:
    sizes = torch.tensor([[1.0, 1e-3, 2e-7, 0.0], [1e-6, 1e-9, 3e-13, 0.0], [0.0, 0.0, 0.0, 0.0]])
    gradients = sizes[:, :, None] * torch.tensor([0.3, -1.0])
    wanted = torch.tensor([[True, True, False, False]] * 2 + [[False] * 4])
    for scale in (1.0, 2.0**10):
        assert torch.equal(eigenbases.counted(gradients * scale), wanted)
    for i in range(3):
        padded = torch.cat([gradients[i : i + 1], torch.zeros(1, 2, 2)], dim=1)
        assert torch.equal(eigenbases.counted(padded)[:, :4], wanted[i : i + 1])
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(eigenbases.counted(gradients.to(dtype)), wanted)


def test_padding_does_not_count() -> None:
    """Neither where the head is tied to the embedding: its inputs are the weight's outputs."""
    case = gpt2()
    width = case.data["input_ids"].shape[1]
    longer = {name: nn.functional.pad(t, (0, 12 - width)) for name, t in case.data.items()}
    everything = LayerSelection(embeddings=True, head=True)
    found, wanted = (side_moments(case.model, data, 40, layers=everything) for data in (longer, case.data))
    assert "transformer.wte/out" in found and set(found) == set(wanted)
    for name, moment in wanted.items():
        assert np.abs(found[name] - moment).max() <= 1e-5 * np.abs(moment).max(), name


def test_one_hot_sides_stay_random(tmp_path: Path) -> None:
    case = gpt2()
    config = BuildConfig(projection_dim=4, layers=LayerSelection(embeddings=True, head=True))
    index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    learnt = reader_of(index).projections
    assert learnt is not None
    # The head is tied to the token embedding: its other side is learnt.
    assert ("transformer.wte", "in") not in learnt and ("transformer.wte", "out") in learnt
    spec = index.specs["transformer.wte"]
    side = Projections(index.specs, 0, learnt).side("transformer.wte", "in", torch.device("cpu"), torch.float32)
    assert side is not None and torch.equal(side, projection_matrix(0, "transformer.wte", "in", spec.width_in, 4))


def test_of_gradients_that_were_handed_over(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(60, 9, 7, generator=generator) * torch.linspace(1, 3, 9)[:, None]
    config = BuildConfig(projection_dim=4, dtype="float32", rank=None, store="factors")
    index = Index.build(tmp_path / "i", gradients=[{"w": g[:25]}, {"w": g[25:]}], config=config)
    learnt = reader_of(index).projections
    assert learnt is not None
    whole = g.double().numpy()
    assert same_space(learnt["w", "in"].double().numpy(), leading(np.einsum("nij,nkj->ik", whole, whole), 4)) < 1e-4
    p_in, p_out = learnt["w", "in"].double().numpy(), learnt["w", "out"].double().numpy()
    stored = index.gradients(index.ids)["w"]
    assert np.allclose(stored.numpy(), np.einsum("ia,nij,jb->nab", p_in, whole, p_out), atol=1e-4)


def test_interrupted_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    config = BuildConfig(projection_dim=4)
    whole = Index.build(tmp_path / "whole", model=case.model, data=case.data, config=config)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lorif_index.build.pipeline.fit_curvature_before", stop)
        with pytest.raises(KeyboardInterrupt):
            Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    assert (tmp_path / "i" / "projections.h5").exists()
    with monkeypatch.context() as patch:
        patch.setattr("lorif_index.build.stages.eigenbases.fit_eigenbases", stop)
        index = Index.build(tmp_path / "i", model=case.model, data=case.data, config=config)
    assert np.array_equal(index.scores(case.query), whole.scores(case.query))
    with pytest.raises(FingerprintError):
        other = mlp()
        with torch.no_grad():
            other.model[0].weight.add_(1e-3)
        Index.open(tmp_path / "i", model=other.model)


def test_zero_gradients_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    data = (torch.rand(20, 6), torch.randint(0, 3, (20,)))
    with pytest.raises(CurvatureError, match=r"'0'.*exclude"):
        Index.build(tmp_path / "i", model=model, data=data, config=BuildConfig(projection_dim=2, layers=["0", "2"]))
    with pytest.warns(UserWarning, match=r"left out: layer '0' has zero gradients"):
        index = Index.build(tmp_path / "j", model=model, data=data, config=BuildConfig(projection_dim=2))
    assert list(index.layers) == ["2"]


def test_a_curvature_that_cannot_be_fitted_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise CurvatureError("not of layers that are idle")

    monkeypatch.setattr("lorif_index.build.pipeline.fit_curvature_before", refuse)
    data = (torch.rand(20, 6), torch.randint(0, 3, (20,)))
    with pytest.raises(CurvatureError, match="not of layers"):
        Index.build(tmp_path / "i", model=nn.Linear(6, 3), data=data)


def test_the_floor_is_wider_where_eigencodes_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = gpt2(), mlp()
    monkeypatch.setattr("lorif_index.config.LEAST_FLOOR", 6)
    monkeypatch.setattr("lorif_index.build.choice.LEAST_FLOOR", 6)
    choice = "lorif_index.build.choice."
    monkeypatch.setattr(choice + "_FLOORS", (7, 10))

    def floor(name: str, case: Any = made, **settings: Any) -> Any:
        index = Index.build(tmp_path / name, model=case.model, data=case.data, config=BuildConfig(**settings))
        assert index.config == BuildConfig(**settings), "what was asked for is remembered as it was"
        again = Index.open(tmp_path / name, model=case.model)
        assert again.scores(case.query).shape[1] == len(index)
        return read_manifest(index.path).floor()

    # A usual row has room for all directions: the model stays narrow, for smaller rows, too.
    assert floor("fits") == 6 and floor("small rows", eigen_bytes=32) == 6
    monkeypatch.setattr(choice + "_SMALL", 32)
    assert floor("chooses", eigen_bytes=32) == 10
    # Another width is asked for; other rows; directions of one's own number; random projections.
    assert floor("asked", eigen_bytes=32, projection_floor=5) == 5
    assert floor("factors", eigen_bytes=32, store="factors") == 6
    # Factors without being asked for: whole gradients.
    assert floor("whole", eigen_bytes=32, rank=None) == 6
    assert floor("ranks", eigen_bytes=32, curvature_rank=8) == 6
    assert floor("random", eigen_bytes=32, projection="random") == 6
    # One position an example: factors lose nothing.
    assert floor("positions", case=plain, eigen_bytes=5) == 6
    # The widest with which a gradient has no more than so many numbers, and the least there is.
    with monkeypatch.context() as patch:
        patch.setattr(choice + "_NUMBERS", 1)
        assert floor("numbers", eigen_bytes=32) == 7
    # Of a model that is not small, rows that could hold all directions of the least width gain by others.
    assert floor("large rows", eigen_bytes=4000) == 10


def test_a_sample_that_disk_would_not_hold_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorif_index.build.choice._LEAST_SAMPLE", 50)
    layers = ModelCapture(mlp().model, BuildConfig()).layers
    one = sum(spec.dim for spec in layer_specs(layers, BuildConfig(projection_floor=64)).values())
    for room, size in ((8 * one * 300, 300), (8 * one * 10, 50), (8 * one * 2000, 1000)):
        config = BuildConfig(sample=1000, compute={"spool_bytes": room})
        found = widest(config, layers)
        assert (found.sample.size, found.projection_floor) == (size, 64)

"""Agreement: rank correlations with whole gradients' scores, against SciPy's, and which codec they choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_inverse

from lorif_index import BuildConfig
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs import agreement
from lorif_index.codecs.agreement import SIZES, agreements, chosen, sizes_of, some_rows
from lorif_index.codecs.base import Fitting
from lorif_index.codecs.eigencodes import EigenCodec
from lorif_index.codecs.factors import FactorCodec
from lorif_index.curvature.fit import CurvatureShape, LayerCurvature, fit_curvature
from lorif_index.curvature.inverse import Preconditioner
from lorif_index.damping import RelativeDamping
from lorif_index.progress import Stage

SPECS = {"a": LayerSpec("a", 7, 6, 7, 6, 1), "b": LayerSpec("b", 5, 8, 5, 8, 1)}
N = 400


def gradients(falling: bool = True) -> dict[str, torch.Tensor]:
    generator, out = torch.Generator().manual_seed(0), {}
    for name, spec in SPECS.items():
        sizes = torch.logspace(0, -1.5, spec.dim) if falling else torch.ones(spec.dim)
        out[name] = torch.randn(N, spec.dim, generator=generator) * sizes
    return out


def fitting_of(
    g: dict[str, torch.Tensor], step: int = 37, **config: Any
) -> tuple[Fitting, dict[str, LayerCurvature], Stage]:
    stage, device = Stage(None, "x", None), torch.device("cpu")
    shapes = {name: (-1, spec.d_in, spec.d_out) for name, spec in SPECS.items()}

    def walk() -> Iterator[GradientBlock]:
        for i in range(0, N, step):
            layers = {n: LayerGradient.from_dense(part[i : i + step].reshape(shapes[n])) for n, part in g.items()}
            yield GradientBlock(np.arange(i, min(i + step, N)), layers)

    curvature = fit_curvature(
        walk,
        N,
        SPECS,
        shape=CurvatureShape(6, 2),
        power_iterations=2,
        seed=0,
        examples=N,
        stage=Stage(None, "x", None),
        device=device,
    )
    made = {n: Preconditioner.of(n, layer, RelativeDamping(0.1)) for n, layer in curvature.items()}
    return Fitting(SPECS, BuildConfig(**config), curvature, made, lambda: (walk, N), stage), curvature, stage


def written(tried: Sequence[Any]) -> Any:
    return lambda block: [codec.encoder(torch.device("cpu")).encode(block) for codec in tried]


@pytest.mark.parametrize("step", [37, 5, N])
def test_agreements_are_mean_rank_correlations(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.setattr(agreement, "_QUESTIONS", 40)
    monkeypatch.setattr(agreement, "_ROWS", 160)
    g = gradients()
    fitting, curvature, stage = fitting_of(g, step)
    codes = [EigenCodec.fit(fitting_of(g, eigen_bytes=size)[0]) for size in (12, 40)]
    tried = [FactorCodec(SPECS, curvature, "float16"), *codes]
    found = agreements(tried, fitting, written(tried))
    # Every other of 400 rows; the first 40 of them ask the others.
    asking, answering = np.arange(0, 80, 2), np.arange(80, N, 2)
    whole, of_rows = 0.0, [0.0] * 3
    decoded = [codec.decode(written([codec])(whole_block(g))[0]) for codec in tried]
    for name, layer in curvature.items():
        x = g[name][asking].double().numpy() @ dense_inverse(layer, 0.1 * layer.trace / layer.dim)
        whole = whole + x @ g[name][answering].double().numpy().T
        of_rows = [total + x @ d[name][answering].double().numpy().T for total, d in zip(of_rows, decoded, strict=True)]
    for got, scores in zip(found, of_rows, strict=True):
        expected = np.mean([stats.spearmanr(a, b).statistic for a, b in zip(whole, np.asarray(scores), strict=True)])
        assert got == pytest.approx(expected, abs=2e-3)
    assert found[1] < found[2] and stage.total == N // 2


def whole_block(g: dict[str, torch.Tensor]) -> GradientBlock:
    parts = {n: part.reshape(-1, SPECS[n].d_in, SPECS[n].d_out) for n, part in g.items()}
    return GradientBlock(np.arange(N), {n: LayerGradient.from_dense(part) for n, part in parts.items()})


class Sized:
    """No codec: what a choice looks at."""

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes


@pytest.mark.parametrize(
    ("found", "best"),
    [
        # The least with enough of it; of one size the better, if it is clearly so.
        ([0.95, 0.99, 0.97], 0),
        ([0.91, 0.915, 0.95], 0),
        ([0.80, 0.92, 0.99], 1),
        ([0.70, 0.80, 0.89], 2),
        ([0.70, 0.80, 0.803], 1),
        ([0.80, 0.70, 0.60], 0),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_the_smallest_with_enough_is_chosen(found: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "agreements", lambda tried, fitting, written: found)
    tried: list[Any] = [Sized(512), Sized(1024), Sized(2048)]
    assert chosen(tried, None, None) is tried[best]  # type: ignore[arg-type]


@pytest.mark.parametrize(("found", "best"), [([0.91, 0.95], 1), ([0.91, 0.912], 0), ([0.95, 0.91], 0)])
def test_of_one_size_the_better_is_chosen(found: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "agreements", lambda tried, fitting, written: found)
    tried: list[Any] = [Sized(512), Sized(510)]
    assert chosen(tried, None, None) is tried[best]  # type: ignore[arg-type]


def test_sizes() -> None:
    assert sizes_of(BuildConfig()) == SIZES == (512, 1024, 2048, 4096)
    assert sizes_of(BuildConfig(eigen_bytes=77)) == (77,)


@pytest.mark.parametrize("step", [1, 37, N])
def test_some_rows_are_evenly_spread_whatever_the_blocks(step: int) -> None:
    fitting, _, stage = fitting_of(gradients(), step)
    ids = np.concatenate([block.ids for block in some_rows(fitting, 130)])
    assert ids.tolist() == list(range(0, N, 3)) and stage.total == len(ids)
    assert len(np.concatenate([block.ids for block in some_rows(fitting, 10 * N)])) == N


def test_too_few_rows_to_ask_choose_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_QUESTIONS", N - 1)
    g = gradients()
    fitting, curvature, _ = fitting_of(g)
    tried = [FactorCodec(SPECS, curvature, "float16"), FactorCodec(SPECS, curvature, "float32")]
    assert agreements(tried, fitting, written(tried)) == [0.0, 0.0]
    assert chosen(tried, fitting, written(tried)) is tried[0]

"""Nothing takes the CPU for the device of its tensors: all that runs on a GPU runs here on a device that is none.

On that device (see `elsewhere`) an operation refuses the CPU's tensors, as on a GPU, and what is read back is counted.
Tensors of that kind have no tangents: forward-mode differentiation is run on torch's fake tensors, without numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, cnn, gpt2, mlp, reader_of, small_data, small_model
from elsewhere import DEVICE, Device, Elsewhere, here, moved, no_autocast
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from lorif_index import BuildConfig, Index, LayerSelection, Refine, default_loss
from lorif_index.capture import losses, products
from lorif_index.capture.data import as_source
from lorif_index.capture.eigenbases import fit_eigenbases, fitted_sides
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec, energies, keep_finite
from lorif_index.capture.heads import Declared
from lorif_index.capture.probes import Probes
from lorif_index.capture.sources import ModelCapture
from lorif_index.capture.spool import Spool
from lorif_index.codecs.base import Fitting, RowCodec, Transformed
from lorif_index.codecs.bits import CodeLayout
from lorif_index.codecs.registry import codec_class
from lorif_index.codecs.sparse import SparseLayout
from lorif_index.curvature.fit import CurvatureShape, LayerCurvature, Part, fit_curvature, mix
from lorif_index.curvature.inverse import inverses, transform
from lorif_index.curvature.sketch import SketchEncoder, fit_sketch, half_whitened
from lorif_index.damping import RelativeDamping
from lorif_index.linalg.signs import hashed_signs
from lorif_index.progress import Stage
from lorif_index.search.proposers import FlatSketch
from lorif_index.search.rerank import whole_scores
from lorif_index.search.scoring import TopK, stream_scores
from lorif_index.storage.resident import Resident

CPU = torch.device("cpu")
SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "full": LayerSpec("full", 4, 5, 4, 5, 4),
    "c": LayerSpec("c", 24, 20, 24, 20, 2),
}
N = 200


@pytest.fixture
def device() -> Iterator[Device]:
    with Device() as inside:
        yield inside


def close(got: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, within: float = 1e-4) -> bool:
    got, expected = (torch.as_tensor(part).double() for part in (got, expected))
    return bool((got - expected).norm() <= within * expected.norm())


def block_on(device: torch.device, n: int = N, seed: int = 0) -> GradientBlock:
    """Gradients with directions of their own, whose sizes fall off."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name, spec in SPECS.items():
        left, right = (torch.randn(n, 5, d, generator=generator) for d in (spec.d_in, spec.d_out))
        dense = (left * 0.5 ** torch.arange(5)[:, None]).mT @ right
        layers[name] = LayerGradient.from_dense(dense.to(device))
    return GradientBlock(np.arange(n), layers)


def curvature_on(device: torch.device, rows: torch.device, rank: int | None = 7) -> dict[str, LayerCurvature]:
    block = block_on(rows)

    def walk() -> Iterator[GradientBlock]:
        for part in np.split(np.arange(N), 4):
            yield block.select(part)

    shape = CurvatureShape(rank, len(SPECS), 0.3 if rank else 0.0)
    both = mix([Part(walk, N, N, 0.75), Part(walk, N, N, 0.25)], SPECS)
    stage = Stage(None, "x", None)
    return fit_curvature(
        both.rows,
        both.count,
        SPECS,
        shape=shape,
        power_iterations=2,
        seed=0,
        examples=both.examples,
        stage=stage,
        device=device,
    )


# -- the device itself -------------------------------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_does(device: Device) -> None:
    there, cpu = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    assert isinstance(there, Elsewhere) and there.device == DEVICE and (there + 1).device == DEVICE
    refused: list[Callable[[], Any]] = [
        lambda: there + cpu,
        lambda: cpu @ there,
        lambda: torch.cat([there, cpu]),
        lambda: torch.where(there > 0, there, cpu),
        lambda: torch.mm(there, there, out=cpu),
        lambda: torch.zeros(()).add_(there.sum()),
        lambda: there.gather(1, torch.zeros(3, 1, dtype=torch.int64)),
        lambda: cpu[torch.zeros(2, dtype=torch.int64, device=DEVICE)],
        lambda: functional.linear(cpu, there),
        lambda: there.numpy(),
    ]
    for call in refused:
        with pytest.raises((RuntimeError, TypeError)):
            call()
    # Numbers without dimensions go along; copies go between devices.
    assert (there * torch.tensor(2.0)).device == DEVICE
    cpu[:2] = there[:2]
    there[:, 0] = cpu[:, 0]
    assert device.reads == {"to the CPU": 1}
    assert bool(there.sum() > 0) and len(there[there > 0]) == len(there.nonzero()) == 9
    assert device.reads == {"to the CPU": 1, "item": 1, "mask": 1, "nonzero": 1}


# -- everything, from the model to the hits ----------------------------------------------------------------------------

BUILDS: dict[str, tuple[Callable[[], Case], dict[str, Any]]] = {
    "language model": (gpt2, {}),
    "language model, projected": (gpt2, {"projection_dim": 6, "coarse": {"kind": "flat", "dim": 64}}),
    "language model, kept on no disk": (gpt2, {"compute": {"spool_bytes": 0}}),
    "digits, exact rows": (mlp, {"curvature": "ggn"}),
    "digits, factors": (mlp, {"store": "factors", "rank": 2, "projection": "random", "projection_dim": 8}),
    "convolutions": (cnn, {"projection_dim": 6}),
    "convolutions, as published": (cnn, {"store": "factors", "complement": "truncated", "curvature_rank": 8}),
}


def answers(case: Case, path: Path, settings: dict[str, Any]) -> list[np.ndarray]:
    config = BuildConfig(batch_size=16, **settings)
    index = Index.build(path, model=case.model, data=case.data, config=config)
    hits = index.search(case.query, 4, rerank=12)
    refined = index.search(case.query, 4, refine=Refine(iterations=1, examples=16, share=0.5), exact=True)
    index.add(case.query)
    apart = index.explain(case.query, hits)[0][0]
    return [
        index.scores(case.query),
        index.self_influence(),
        hits.scores,
        refined.scores,
        np.array(list(apart.layers.values())),
    ]


@pytest.mark.parametrize("name", BUILDS)
def test_an_index_is_built_and_asked_with_a_model_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, settings = BUILDS[name]
    case = make()
    case.data = {k: v[:40] for k, v in case.data.items()} if isinstance(case.data, dict) else case.data
    monkeypatch.setattr(products, "WAYS", [way for way in products.WAYS if way.startswith("twice")])
    expected = answers(case, tmp_path / "here", settings)
    with Device():
        case.model = moved(copy.deepcopy(case.model))
        got = answers(case, tmp_path / "there", settings)
    # A coordinate between two levels is rounded either way.
    for one, other in zip(got, expected, strict=True):
        assert close(one, other, 2e-2)


LOSSES: dict[str, Callable[[nn.Module, Any], torch.Tensor]] = {
    "weighted": lambda model, batch: functional.cross_entropy(
        model(batch[0]), batch[1], torch.arange(1.0, 6.0, device=batch[1].device), reduction="none", label_smoothing=0.1
    ),
    "of probabilities": lambda model, batch: functional.nll_loss(
        model(batch[0]).log_softmax(1), batch[1], reduction="none"
    ),
    "bernoulli": lambda model, batch: functional.binary_cross_entropy_with_logits(
        model(batch[0]), functional.one_hot(batch[1], 5).float(), reduction="none"
    ).sum(1),
    "squared": lambda model, batch: functional.mse_loss(
        model(batch[0]), functional.one_hot(batch[1], 5).float(), reduction="none"
    ).mean(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_head_of_ones_own_loss_is_found_elsewhere(name: str, tmp_path: Path) -> None:
    model, data = small_model(), small_data(40)
    config = BuildConfig(store="factors", batch_size=16)
    query = tuple(part[:3] for part in data)
    with Device():
        found = []
        for each in (model, moved(copy.deepcopy(model))):
            path = tmp_path / str(len(found))
            index = Index.build(path, model=each, data=data, loss=LOSSES[name], curvature="ggn", config=config)
            found.append(index.scores(query))
    assert close(found[1], found[0])


# -- capture -----------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """A little language model of plain modules, whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.mix, self.norm = nn.Embedding(30, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.up, self.down, self.lm_head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 30, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.wte(x)
        shown = torch.ones(x.shape[1], x.shape[1], device=x.device).tril()
        scores = (self.mix(h) @ h.mT).masked_fill(shown == 0, -torch.inf)
        h = self.norm(h + scores.softmax(dim=2) @ h)
        return self.lm_head(h + self.down(functional.gelu(self.up(h))))


def sentences(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 30, (n, 12), generator=torch.Generator().manual_seed(1))
    return x[:, :-1], x[:, 1:]


def test_a_batch_is_captured_and_encoded_with_few_reads(device: Device, tmp_path: Path) -> None:
    model, batch, ids = Words(), sentences(), np.arange(8)
    config = BuildConfig(projection_dim=6, projection="random")
    expected = ModelCapture(model, config).capture(None).gradients(ids, batch)
    taken = ModelCapture(moved(model), config)
    capture = taken.capture(None).trust()
    block = capture.gradients(ids, batch)
    for name, gradient in block.layers.items():
        assert gradient.device == DEVICE and close(here(gradient.dense()), expected.layers[name].dense())
    device.reads.clear()
    block = capture.gradients(ids, batch)
    # Whether a label is out of range, which would end the process.
    assert device.reads == {"item": 1}
    probes = Probes(Declared(default_loss.logits), 2, 0, 8)
    device.reads.clear()
    rows = capture.several(ids, batch, lambda model, given: probes(model, given, ids))
    assert len(rows) == 2 and device.reads.total() == 0
    keep_finite(block, "error", [])
    assert device.reads == {"item": 1}
    device.reads.clear()
    assert close(energies(block), energies(expected)) and device.reads == {"to the CPU": 1}
    device.reads.clear()
    Spool(tmp_path, [block]).close()
    assert device.reads == {"to the CPU": 1}
    device.reads.clear()
    block.select(np.array([1, 5]))
    assert device.reads.total() <= len(block.layers)


def test_probes_have_the_same_signs_everywhere(device: Device) -> None:
    ids = np.array([3, 2**40])
    there = hashed_signs((0, "ggn", 0), ids, 1, 5, 70, torch.empty(0, device=DEVICE))
    assert there.device == DEVICE and device.reads.total() == 0
    assert torch.equal(here(there), hashed_signs((0, "ggn", 0), ids, 1, 5, 70, torch.empty(0)))


def test_projections_are_learnt_with_one_read_a_layer_and_batch(device: Device) -> None:
    config = BuildConfig(projection_dim=6, layers=LayerSelection(include=("mix", "up", "down")))
    found = []
    for model in (Words(), moved(Words())):
        taken = ModelCapture(model, config)
        walk = taken.sides(None, as_source(sentences(), 8), np.arange(8))
        sides = fitted_sides(taken.specs, taken.layers)
        device.reads.clear()
        walk(lambda side, rows: None)
        reads = dict(device.reads)
        where = next(model.parameters()).device
        found.append(fit_eigenbases(walk, taken.specs, sides, 0, where, Stage(None, "x", None)))
    # Labels are checked.
    assert reads.pop("item") == 1
    assert reads == {"nonzero": len(taken.layers)}
    for side, matrix in found[0].items():
        assert close(found[1][side], matrix, 1e-2)


@pytest.mark.parametrize("way", products.WAYS)
def test_products_are_made_elsewhere(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fake tensors: none can be read, and labels are not. The formula of layer_norm's tangent takes real ones."""
    model, batch = Words(), sentences()
    model.norm = nn.Identity()
    monkeypatch.setattr(torch, "autocast", no_autocast(torch.autocast))
    monkeypatch.setattr(losses, "_check_labels", lambda labels, classes: None)
    with FakeTensorMode():
        batch = tuple(torch.zeros(part.shape, dtype=part.dtype) for part in batch)
        moved(model, lambda t: torch.empty(t.shape, dtype=t.dtype, device=DEVICE))
        taken = ModelCapture(model, BuildConfig(projection_dim=6, projection="random"))
        made = products.Products(taken.capture(None).trust(), Declared(default_loss.logits))
        made.way = way
        for where in (CPU, DEVICE):
            vectors = {n: torch.zeros(2, spec.d_in, spec.d_out, device=where) for n, spec in taken.specs.items()}
            found = made.summed(vectors, batch)
            assert {n: (v.device, v.shape) for n, v in found.items()} == {
                n: (v.device, v.shape) for n, v in vectors.items()
            }


# -- what is fitted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [7, 2, None])
@pytest.mark.parametrize("rows", [CPU, DEVICE], ids=["rows here", "rows there"])
def test_curvature_is_fitted_elsewhere(rank: int | None, rows: torch.device, device: Device) -> None:
    expected, got = curvature_on(CPU, CPU, rank), curvature_on(DEVICE, rows, rank)
    # Of each layer, and none of them at each block of rows: eight blocks are walked up to six times.
    assert device.reads.total() <= 16 * len(SPECS)
    for name, layer in got.items():
        assert layer.factor.device == layer.squares.device == layer.spectrum.device == CPU
        assert close(layer.squares, expected[name].squares)
        assert close(layer.factor @ layer.factor.T, expected[name].factor @ expected[name].factor.T, 1e-2)
        assert layer.trace == pytest.approx(expected[name].trace, rel=1e-4)


@pytest.mark.parametrize("method", ["pca", "per-layer"])
def test_a_sketch_is_fitted_and_gives_coordinates_elsewhere(method: str, device: Device) -> None:
    curvature = curvature_on(CPU, CPU)
    lams = {name: one.lam for name, one in inverses(curvature, RelativeDamping(0.1)).items()}
    found = []
    for where in (CPU, DEVICE):
        block = block_on(where)
        whitened = half_whitened(lambda block=block: [block.layers], N, curvature, lams, where)  # type: ignore[misc]
        sketch = fit_sketch(
            whitened, curvature, dim=16, method=method, seed=0, stage=Stage(None, "x", None), device=where
        )
        device.reads.clear()
        found.append(SketchEncoder(sketch, curvature, where).encode(block.layers))
        assert found[-1].device == CPU and device.reads.total() <= 1
    assert close(found[1] @ found[1].T, found[0] @ found[0].T, 1e-2)


# -- rows --------------------------------------------------------------------------------------------------------------


def codec_on(device: torch.device, store: str, size: int | str = "auto") -> RowCodec:
    config = BuildConfig(store=store, eigen_bytes=size)
    curvature = curvature_on(CPU, CPU)
    walk = [block_on(device)]
    preconditioners = inverses(curvature, config.policy)
    kind = codec_class(store)
    fitting = Fitting(
        SPECS, config, curvature, preconditioners, lambda: (lambda: walk, N), Stage(None, "x", None), device
    )
    return kind.fit(fitting)


@pytest.mark.parametrize(("store", "size"), [("eigen", "auto"), ("eigen", 80), ("factors", "auto")])
def test_rows_are_made_elsewhere_and_brought_back_at_once(store: str, size: int | str, device: Device) -> None:
    expected, codec = codec_on(CPU, store, size), codec_on(DEVICE, store, size)
    assert codec.label == expected.label and codec.row_bytes == expected.row_bytes
    rows = codec.encoder(CPU).encode(block_on(CPU))
    for where in (CPU, DEVICE):
        encoder, block = codec.encoder(DEVICE), block_on(where)
        device.reads.clear()
        made = encoder.encode(block)
        assert made.device == CPU and device.reads.total() == (store == "eigen" or where == DEVICE)
        for name, gradient in codec.decode(made).items():
            assert close(gradient, codec.decode(rows)[name], 1e-2)


@pytest.mark.parametrize("queries", [1, 3, 60])
@pytest.mark.parametrize("store", ["eigen", "factors"])
def test_rows_are_scored_elsewhere(store: str, queries: int, device: Device) -> None:
    codec = codec_on(CPU, store)
    rows = codec.encoder(CPU).encode(block_on(CPU))
    asked = {name: g.dense() for name, g in block_on(CPU, queries, 1).layers.items()}
    question = codec.question(
        Transformed(transform(asked, inverses(codec.curvature, RelativeDamping(0.1))), codec.curvature)
    )
    expected = codec.scorer(question).score(rows)
    sent = rows.to(DEVICE)
    for scorer in (codec.scorer(question, DEVICE), RowCodec.scorer(codec, dict(asked), DEVICE)):
        device.reads.clear()
        got = scorer.score(sent)
        assert got.device == DEVICE and device.reads.total() == (scorer.__class__.__name__ == "_DecodingScorer")
        if scorer.__class__.__name__ != "_DecodingScorer":
            assert close(here(got), expected)


@pytest.mark.parametrize("layout", [CodeLayout(50, bits, (20, 0, 30)) for bits in (1, 2, 4, 8)] + [SparseLayout(50, 7)])
def test_codes_are_made_and_scored_elsewhere(layout: Any, device: Device) -> None:
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(40, 50, generator=generator), torch.randn(9, 50, generator=generator)
    z[3] = 0.0
    codes = layout.encode(z)
    made = layout.encode(z.to(DEVICE))
    assert made.device == CPU and device.reads == {"to the CPU": 1} and torch.equal(made, codes)
    sent = codes.to(DEVICE)
    assert close(here(layout.decode(sent)), layout.decode(codes))
    for queries in (x, x[:1]):
        assert close(here(layout.scorer(queries.to(DEVICE)).score(sent)), layout.scorer(queries).score(codes))
    assert device.reads == {"to the CPU": 1}


def test_launches_do_not_grow_with_layers(device: Device) -> None:
    counted = []
    for layers in (3, 200):
        layout = CodeLayout(16 * layers, 1, (16,) * layers)
        codes = layout.encode(torch.randn(40, layout.dim)).to(DEVICE)
        scorer = layout.scorer(torch.randn(2, layout.dim).to(DEVICE))
        scorer.score(codes)
        # Memory is there now.
        device.launches = 0
        scorer.score(codes)
        counted.append(device.launches)
    assert counted[0] == counted[1] <= 16


def test_the_best_of_a_scan_stay_elsewhere_until_the_end(device: Device, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(60))
    index.remove(index.ids[5:9])
    reader, k = reader_of(Index.open(tmp_path / "i")), 7
    x = {name: torch.randn(3, spec.d_in, spec.d_out) for name, spec in reader.specs.items()}
    question = reader.ask(Transformed(x, reader.curvature))
    found = []
    for where in (CPU, DEVICE):
        top, resident = TopK(3, k), Resident(reader.store, where, 30 * reader.store.row_bytes)
        device.reads.clear()
        blocks = 0
        for positions, scores, _ in stream_scores(resident, reader.codec.scorer(question.parts, where), question):
            assert scores.device == where
            top.update(positions, scores)
            blocks += 1
        # How many are kept of a block is read, and nothing else.
        assert where == CPU or device.reads.total() <= blocks
        found.append(top.result())
    assert torch.equal(found[0][0], found[1][0]) and close(found[1][1], found[0][1])


def test_whole_gradients_are_scored_elsewhere_with_one_read(device: Device) -> None:
    inverse = {name: g.flat() for name, g in block_on(CPU, 4, 1).layers.items()}
    expected = whole_scores(inverse, block_on(CPU))
    there = {name: x.to(DEVICE) for name, x in inverse.items()}
    block = block_on(DEVICE)
    assert close(whole_scores(there, block), expected) and device.reads == {"to the CPU": 1}


def test_coordinates_are_searched_elsewhere(device: Device) -> None:
    generator = np.random.default_rng(0)
    z, x = (torch.from_numpy(generator.standard_normal((n, 16), dtype=np.float32)) for n in (90, 3))
    found = [FlatSketch(z.split(40), 90, 16, where).search(x.numpy(), 7, 0.1) for where in (CPU, DEVICE)]
    assert np.array_equal(found[0][0], found[1][0]) and close(found[1][1], found[0][1])


def test_rows_stay_elsewhere_as_far_as_they_fit(tmp_path: Path, device: Device) -> None:
    index = Index.build(tmp_path / "i", model=small_model(), data=small_data(60))
    store = reader_of(index).store
    whole = torch.cat([rows.clone() for _, rows in store.stream()])
    for kept in (0, 25, 60):
        resident = Resident(store, DEVICE, kept * store.row_bytes)
        blocks = [here(rows).clone() for _, rows, _ in resident.stream() if rows.device == DEVICE]
        assert torch.equal(torch.cat(blocks), whole)
        positions = np.array([0, 24, 25, 59])
        assert torch.equal(here(resident.gather(positions)[0]), whole[positions])

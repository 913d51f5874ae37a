"""One contract for every row codec: rows come back as they were written, and are scored as what they stand for.

What a row stands for is a gradient. Scores, self-influence and sketch are compared with float64 oracles of that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import toy_codec
from conftest import dense_inverse, products_of, within

from lorif_index import BuildConfig
from lorif_index.capture.gradients import GradientBlock, LayerGradient, LayerSpec
from lorif_index.codecs import eigencodes, registry
from lorif_index.codecs.base import Fitting, RowCodec, Transformed
from lorif_index.codecs.eigencodes import EigenCodec
from lorif_index.codecs.registry import CODECS, codec_class
from lorif_index.curvature.fit import CurvatureShape, LayerCurvature, fit_curvature
from lorif_index.curvature.inverse import Preconditioner, inverses, transform
from lorif_index.curvature.sketch import SketchEncoder, fit_sketch
from lorif_index.damping import RelativeDamping
from lorif_index.errors import ConfigError, CorruptionError
from lorif_index.progress import Stage

CPU = torch.device("cpu")
SPECS = {
    "a": LayerSpec("a", 8, 6, 8, 6, 2),
    "full": LayerSpec("full", 4, 5, 4, 5, 4),
    "c": LayerSpec("c", 24, 20, 24, 20, 2),
}
N, DIM = 300, sum(spec.dim for spec in SPECS.values())


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The toy codec says no more than one must: all else is what the base does."""
    toy_codec.register()
    yield
    del CODECS["dense"]


def gradients(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Sums of outer products whose sizes fall off, as gradients over a sequence are."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.exp(-torch.arange(6.0))
    out = {}
    for name, spec in SPECS.items():
        left, right = (torch.randn(n, 6, d, generator=generator) for d in (spec.d_in, spec.d_out))
        out[name] = (left * sizes[:, None]).transpose(1, 2) @ right
    return out


def block_of(g: dict[str, torch.Tensor]) -> GradientBlock:
    return GradientBlock(np.arange(len(g["a"])), {name: LayerGradient.from_dense(part) for name, part in g.items()})


def walk(block: GradientBlock, step: int = 70) -> Iterator[GradientBlock]:
    for i in range(0, block.count, step):
        yield block.select(np.arange(i, min(i + step, block.count)))


@dataclass(eq=False)
class Made:
    """A fitted codec, what it was fitted on, and rows of that."""

    codec: RowCodec
    config: BuildConfig
    block: GradientBlock
    rows: torch.Tensor
    curvature: dict[str, LayerCurvature]

    @property
    def cosine(self) -> float:
        """By which what is decoded is longer than what was encoded."""
        return self.codec.layout.cosine if isinstance(self.codec, EigenCodec) else 1.0

    def preconditioners(self, names: tuple[str, ...], multiple: float = 0.3) -> dict[str, Preconditioner]:
        policy = RelativeDamping(multiple)
        return {n: Preconditioner.of(n, self.curvature[n], policy) for n in names}

    @functools.cache  # noqa: B019
    def inverse(self, name: str, multiple: float = 0.3) -> np.ndarray:
        layer = self.curvature[name]
        return dense_inverse(layer, multiple * layer.trace / layer.dim)


WAYS: dict[str, dict[str, Any]] = {
    "dense": dict(store="dense"),
    "factors of float16": dict(store="factors"),
    "factors of bfloat16": dict(store="factors", dtype="bfloat16"),
    "factors of float32": dict(store="factors", dtype="float32", curvature_rank=12),
    "eigen in 1 bits": dict(store="eigen", eigen_bytes=60),
    "eigen in 2 bits": dict(store="eigen", eigen_bytes=150),
    "eigen in 4 bits": dict(store="eigen", eigen_bytes=300, curvature_rank=40),
    "eigen in 8 bits": dict(store="eigen", eigen_bytes=1600, complement="truncated", curvature_rank=40),
    "eigen of the 9 largest": dict(store="eigen", eigen_bytes=30, curvature_rank=10),
    "eigen of the 70 largest": dict(store="eigen", eigen_bytes=212),
}


@pytest.fixture(scope="module", params=WAYS)
def made(request: pytest.FixtureRequest) -> Made:
    config = BuildConfig(**({"curvature_rank": None} | WAYS[request.param]))
    block = block_of(gradients(N, 0))
    kind, stage = codec_class(config.store), Stage(None, "x", None)
    shape = CurvatureShape.of(config, len(SPECS))
    curvature = fit_curvature(
        lambda: walk(block), N, SPECS, shape=shape, power_iterations=2, seed=0, examples=N, stage=stage, device=CPU
    )
    inverse = inverses(curvature, RelativeDamping(0.1))
    with pytest.MonkeyPatch.context() as patch:
        # Which way is better is not asked here.
        way = -1 if "largest" in request.param else 0
        patch.setattr(eigencodes, "chosen", lambda tried, fitting, written: tried[way])
        codec = kind.fit(Fitting(SPECS, config, curvature, inverse, lambda: (lambda: walk(block), N), stage))
    assert not isinstance(codec, EigenCodec) or codec.label in request.param
    encoder = codec.encoder(CPU)
    rows = torch.cat([encoder.encode(part) for part in walk(block)])
    return Made(codec, config, block, rows, curvature)


def test_rows_are_no_longer_than_was_said_before(made: Made) -> None:
    assert made.rows.shape == (N, made.codec.row_bytes) and made.rows.dtype == torch.uint8
    sizes = type(made.codec).sizes(made.config, SPECS, DIM)
    # Up to the bits that fill a layer's last byte, and all layers' last pair of bytes.
    filled = len(SPECS) + 1 if isinstance(made.codec, EigenCodec) else 0
    assert sizes.row <= made.codec.row_bytes <= sizes.row + filled or sizes.row == made.config.eigen_bytes
    assert not isinstance(made.codec, EigenCodec) or made.codec.row_bytes <= int(made.config.eigen_bytes)
    # Rows do not depend on their neighbours.
    alone = made.codec.encoder(CPU).encode(made.block.select(np.array([7])))
    there, here = made.codec.decode(made.rows[7:8]), made.codec.decode(alone)
    assert all(within(here[name].numpy(), part.numpy(), 2e-2) for name, part in there.items())


def test_rows_stand_for_about_what_was_written(made: Made) -> None:
    decoded = made.codec.decode(made.rows)
    assert list(decoded) == list(SPECS)
    for name, part in decoded.items():
        assert part.shape == (N, SPECS[name].dim) and part.dtype == torch.float32
    true = torch.cat([part.flat() for part in made.block.layers.values()], dim=1)
    cosine = float(torch.nn.functional.cosine_similarity(torch.cat(list(decoded.values()), dim=1), true).mean())
    least = {"1 bits": 0.6, "2 bits": 0.88, "4 bits": 0.97, "8 bits": 0.99, "9 largest": 0.45, "70 largest": 0.8}
    assert cosine > least.get(made.codec.label, 0.99)
    again = made.codec.gradients(made.rows)
    for name, part in again.items():
        assert part.shape == (SPECS[name].d_in, SPECS[name].d_out)
        assert torch.equal(part.flat(), decoded[name])


def test_it_comes_back_from_its_file(made: Made, tmp_path: Path) -> None:
    entry = json.loads(json.dumps(made.codec.save(tmp_path, "codec.h5")))
    assert {p.name for p in tmp_path.iterdir()} == ({entry["file"]["file"]} if "file" in entry else set())
    again = type(made.codec).load(tmp_path, entry, SPECS, made.curvature)
    assert again.row_bytes == made.codec.row_bytes and again.label == made.codec.label
    assert torch.equal(again.encoder(CPU).encode(made.block), made.codec.encoder(CPU).encode(made.block))
    for name, part in again.decode(made.rows).items():
        assert torch.equal(part, made.codec.decode(made.rows)[name])


def test_entries_that_cannot_be_are_refused(made: Made, tmp_path: Path) -> None:
    entry = made.codec.save(tmp_path, "codec.h5")
    kind = type(made.codec)
    for damaged in [None, 3, "x", []] if entry else []:
        with pytest.raises(CorruptionError):
            kind.load(tmp_path, damaged, SPECS, made.curvature)
    for field in entry:
        for wrong in (None, "x", -1, 1e308, [], {}, [0, 0, 0], [-1, 1, 1], [1, 1]):
            with pytest.raises(CorruptionError):
                kind.load(tmp_path, entry | {field: wrong}, SPECS, made.curvature)
        with pytest.raises(CorruptionError):
            kind.load(tmp_path, {k: v for k, v in entry.items() if k != field}, SPECS, made.curvature)


def test_a_damaged_file_is_found_when_it_is_read(made: Made, tmp_path: Path) -> None:
    entry = made.codec.save(tmp_path, "codec.h5")
    if "file" not in entry:
        assert not list(tmp_path.iterdir())
        return
    path, kind = tmp_path / "codec.h5", type(made.codec)
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(CorruptionError, match="digest"):
        kind.load(tmp_path, entry, SPECS, made.curvature).decode(made.rows)
    path.unlink()
    with pytest.raises(CorruptionError, match="cannot be opened"):
        kind.load(tmp_path, entry, SPECS, made.curvature).decode(made.rows)


@pytest.mark.parametrize("names", [tuple(SPECS), ("c",), ("full", "a")])
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_scores_are_those_of_what_rows_stand_for(made: Made, queries: int, names: tuple[str, ...]) -> None:
    query = {name: g for name, g in gradients(queries, 5).items() if name in names}
    decoded = {name: part.double().numpy() for name, part in made.codec.decode(made.rows).items()}
    asked = Transformed(transform(query, made.preconditioners(names)), made.curvature)
    assert asked.count == queries
    # Turned first and brought back is the same.
    of = Transformed.of(query, made.preconditioners(names), made.curvature)
    for name, x in asked.x.items():
        for got, expected in ((of.x[name], x), (of.turned[name], asked.turned[name])):
            assert got.shape == expected.shape and (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert of.count == queries
    parts = made.codec.question(asked)
    assert all(len(part) == queries and part.dtype == torch.float32 for part in parts.values())
    scorer = made.codec.scorer(parts)
    got = scorer.score(made.rows)
    expected = sum(oracle.scores(query[n].double().numpy(), decoded[n], made.inverse(n)) for n in names)
    assert got.shape == (queries, N) and got.dtype == torch.float32
    assert within(got.numpy(), np.asarray(expected), 1e-4)
    assert scorer.score(made.rows[:0]).shape == (queries, 0)
    # Parts are linear in the question.
    double = made.codec.scorer({name: 2.0 * part[:1] for name, part in parts.items()}).score(made.rows)
    assert within(double.numpy(), 2 * np.asarray(expected)[:1], 1e-4)


@pytest.mark.parametrize("names", [tuple(SPECS), ("full",)])
def test_self_influence_is_that_of_what_rows_stand_for(made: Made, names: tuple[str, ...]) -> None:
    """Less what rounding adds: of each coordinate by itself, so that the diagonal of H^-1 says how much."""
    own = made.codec.self_influence(made.rows, made.preconditioners(names))
    decoded = {name: part.double().numpy() for name, part in made.codec.decode(made.rows).items()}
    expected = np.zeros(N)
    for n in names:
        turn = products_of(made.curvature[n])
        inside, h = decoded[n] @ turn, turn.T @ made.inverse(n) @ turn
        whole, alone = ((inside @ h) * inside).sum(axis=1), inside**2 @ np.diag(h)
        expected += np.maximum(whole - (1 - made.cosine**2) * alone, 0.1 * whole)
    assert own.shape == (N,) and within(own.numpy(), expected, 1e-4)


def test_the_sketch_of_rows_is_that_of_what_they_stand_for(made: Made) -> None:
    lams = {name: 0.1 * layer.trace / layer.dim for name, layer in made.curvature.items()}
    whitened = made.codec.whitened(lambda: made.rows.split(90), N, lams, CPU)
    e = torch.cat(list(whitened.walk())).double().numpy()
    expected = []
    for name, part in made.codec.decode(made.rows).items():
        layer, among = made.curvature[name], whitened.directions[name]
        whitening = np.sqrt(layer.squares.double().numpy() + lams[name])
        expected.append((part.double().numpy() @ products_of(layer) / whitening)[:, among])
    assert whitened.count == N and e.shape == (N, whitened.width) and within(e, np.concatenate(expected, axis=1), 1e-4)
    stage = Stage(None, "sketch", None)
    sketch = fit_sketch(whitened, made.curvature, dim=16, method="pca", seed=0, stage=stage, device=CPU)
    z = made.codec.sketcher(sketch)(made.rows)
    assert z.shape == (N, 16)
    assert within(
        z.numpy(), SketchEncoder(sketch, made.curvature).encode(made.codec.gradients(made.rows)).numpy(), 1e-4
    )
    weights = torch.cat([part.weights for part in sketch.layers.values()]).double().numpy()
    assert within(z.numpy(), e @ weights, 1e-4)
    assert made.codec.sketcher(sketch)(made.rows[:0]).shape == (0, 16)


# -- the registry ------------------------------------------------------------------------------------------------------


def test_codecs_are_found_by_their_names() -> None:
    assert set(CODECS) == {"eigen", "factors", "dense"}
    for name in CODECS:
        assert codec_class(name).name == name and issubclass(codec_class(name), RowCodec)
    assert {registry.PREFERRED, registry.LOSSLESS} <= set(CODECS)
    with pytest.raises(ConfigError, match=r"store='both' is no row codec: known are \['dense', 'eigen', 'factors'\]"):
        codec_class("both")
    with pytest.raises(ConfigError, match="store must be one of"):
        BuildConfig(store="both")


def test_what_codecs_say_of_themselves() -> None:
    assert codec_class("eigen").depends_on == {"curvature"}
    assert codec_class("factors").depends_on == codec_class("dense").depends_on == frozenset()
    assert codec_class("eigen").gains_by_width and not codec_class("factors").gains_by_width
    for name in CODECS:
        for choice in codec_class(name).choices():
            BuildConfig(store=name, **choice)

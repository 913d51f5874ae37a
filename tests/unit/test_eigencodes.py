"""Eigencodes against dense float64 oracles: which directions are kept, what rows stand for, and what is refused.

A row stands for the gradient G~ = sum_j u_j v_j over the kept directions: its inner products with H^-1 g are the
scores, for any damping and any layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Case, damped, forge, inside_scores, lambdas, projected, reader_of, with_gradients, within

from lorif_index import BuildConfig, CoarseIndex, Index, Sample
from lorif_index.codecs import eigencodes
from lorif_index.codecs.eigencodes import EigenCodec, Way, directions_for
from lorif_index.errors import ConfigError, CorruptionError, CurvatureError

# Bytes of a row -> bits: 1 for some directions, 1 for all, 2, 4 and 8 for all. There are 10 layers of at most 36.
SOME, ALL = 40, 65
BYTES = {SOME: 1, ALL: 1, 120: 2, 220: 4, 1600: 8}


@pytest.fixture(scope="module")
def case() -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    return with_gradients("gpt2")


def build(made: Case, folder: Path, **settings: Any) -> Index:
    fixed: dict[str, Any] = dict(projection_dim=6, projection="random", curvature="empirical", store="eigen")
    config = BuildConfig(layers=made.selection, batch_size=16, **(fixed | settings))
    return Index.build(folder / "i", model=made.model, data=made.data, config=config)


def codec_of(index: Index) -> EigenCodec:
    codec = reader_of(index).codec
    assert isinstance(codec, EigenCodec)
    return codec


def kept(index: Index) -> dict[str, np.ndarray]:
    """Layer -> numbers of its directions that rows keep."""
    return {name: part.directions.numpy() for name, part in codec_of(index).layers.items()}


def stands_for(index: Index) -> dict[str, np.ndarray]:
    """G~ of every row, (n, d_in, d_out) a layer, in float64, by the rows' coordinates."""
    reader, out = reader_of(index), {}
    for name, coordinates in codec_of(index).coordinates(reader.store.gather(np.arange(len(index)))).items():
        basis = index.curvature[name].basis.double().numpy()[:, kept(index)[name]]
        spec = index.specs[name]
        out[name] = (coordinates.double().numpy() @ basis.T).reshape(-1, spec.d_in, spec.d_out)
    return out


@pytest.mark.parametrize("size", BYTES)
def test_scores_are_exact_for_what_is_stored(case: Any, tmp_path: Path, size: int) -> None:
    made, train_gradients, query_gradients = case
    index = build(made, tmp_path, eigen_bytes=size)
    assert index.codec == "eigen" and codec_of(index).way == Way(BYTES[size])
    assert index.bytes_per_example <= size
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    means, given = stands_for(index), index.gradients(index.ids)
    assert all(within(given[name].double().numpy(), g, 1e-4) for name, g in means.items())
    for names in (index.layers, index.layers[1:2]):
        for multiple in (0.1, 0.7):
            lam = lambdas(index, rows, multiple)
            got = index.scores(made.query, damping=multiple, layers=names)
            assert within(got, inside_scores(index, queries, means, lam, names), 1e-4)
    scores = index.scores(made.query)
    hits = index.search(made.query, k=7)
    assert within(hits.scores, -np.sort(-scores, axis=1)[:, :7], 1e-5)
    assert hits.stats.exact and hits.stats.codec == "eigen" and hits.stats.dtype == f"{BYTES[size]} bits"
    # Many queries are scored by products, few by tables.
    for i in range(len(scores)):
        one = {k: v[i : i + 1] for k, v in made.query.items()}
        assert within(index.scores(one)[0], scores[i], 1e-4)


def test_the_directions_are_those_that_add_most(case: Any, tmp_path: Path) -> None:
    made, train_gradients, _ = case
    index = build(made, tmp_path, eigen_bytes=SOME, curvature_rank=None)
    rows = projected(index, train_gradients)
    lam = lambdas(index, rows, 0.1)
    shares: dict[str, np.ndarray] = {}
    for name in index.layers:
        layer = index.curvature[name]
        flat = rows[name].reshape(len(index), -1) @ layer.basis.double().numpy()
        shares[name] = (flat**2).mean(axis=0) / (layer.eigenvalues.numpy() + lam[name])
    inside = np.concatenate([shares[name][kept(index)[name]] for name in index.layers])
    outside = np.concatenate([np.delete(shares[name], kept(index)[name]) for name in index.layers])
    # All but the bytes that were not begun: at most 7 directions a layer less than there is room for.
    room = 8 * (SOME - 2 * len(index.layers))
    assert room - 7 * len(index.layers) <= len(inside) <= room
    better = (outside[:, None] > inside[None]).any(axis=1).sum()
    assert better <= room - len(inside)


def test_coded_coordinates_are_those_of_the_unfactored_gradient(case: Any, tmp_path: Path) -> None:
    made, train_gradients, query_gradients = case
    index = build(made, tmp_path)
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    means = stands_for(index)
    for name, g in rows.items():
        assert ((g - means[name]) ** 2).sum() < 2e-3 * (g**2).sum()
    whole = inside_scores(index, queries, rows, lambdas(index, rows, 0.1), index.layers)
    assert np.corrcoef(index.scores(made.query).ravel(), whole.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("size", [ALL, 1600])
def test_self_influence_is_not_made_longer_by_rounding(case: Any, tmp_path: Path, size: int) -> None:
    made, train_gradients, _ = case
    index = build(made, tmp_path, eigen_bytes=size)
    rows, means = projected(index, train_gradients), stands_for(index)
    cosine = codec_of(index).layout.cosine
    for names in (index.layers, index.layers[:1]):
        lam = lambdas(index, rows, 0.3)
        stored, true = np.zeros(len(index)), np.zeros(len(index))
        for name in names:
            layer = index.curvature[name]
            v, s = layer.basis.double().numpy(), layer.eigenvalues.numpy()
            h = oracle.inverse(v, s, layer.trace, lam[name], "truncated")
            for total, of in ((stored, means[name]), (true, rows[name])):
                flat = of.reshape(len(index), -1)
                total += ((flat @ h) * flat).sum(axis=1)
        own = index.self_influence(damping=0.3, layers=names)
        assert within(own, cosine**2 * stored)
        assert 0.85 < own.mean() / true.mean() < 1.15
        # Signs and a length for each layer tell all layers together apart better than examples in one.
        assert np.corrcoef(own, true)[0, 1] > (0.999 if size != ALL else 0.8 if names == index.layers else 0.3)
    assert np.isfinite(index.scores(made.query, normalize="relatif")).all()


def test_more_bytes_are_nearer_to_the_whole_score(case: Any, tmp_path: Path) -> None:
    made, train_gradients, query_gradients = case
    found = []
    for size in BYTES:
        index = build(made, tmp_path / str(size), eigen_bytes=size)
        rows, queries = projected(index, train_gradients), projected(index, query_gradients)
        whole = inside_scores(index, queries, rows, lambdas(index, rows, 0.1), index.layers)
        found.append(np.corrcoef(index.scores(made.query).ravel(), whole.ravel())[0, 1])
    assert found == sorted(found) and found[0] > 0.6


def test_it_is_the_default_for_sequences(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    index = build(made, tmp_path, store="auto")
    assert index.codec == "eigen" and index.bytes_per_example < 1600


def test_few_layers_have_more_directions() -> None:
    # 16 layers share 12,800 bits, and choose from half as many again; 48 layers have enough with the least.
    assert directions_for(1600, 16, 4096) == 1200 and directions_for(1600, 48, 4096) == 400
    # One or two layers are bounded.
    assert directions_for(1600, 2, 4096) == 1600 and directions_for(1600, 2, 1024) == 1024


@pytest.mark.parametrize("alone", [False, True])
def test_directions_of_a_grid_are_stored_by_its_products(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    made, train_gradients, query_gradients = case
    monkeypatch.setattr(eigencodes, "products_for", lambda rank: 20)
    monkeypatch.setattr(EigenCodec, "alone", classmethod(lambda cls, row_bytes, layers: 9 if alone else 0))
    if alone:
        monkeypatch.setattr(eigencodes, "directions_for", lambda row_bytes, layers, dim: 15)
        monkeypatch.setattr(eigencodes, "CURVATURE_RANK", 15)
    index = build(made, tmp_path, eigen_bytes=SOME, coarse=CoarseIndex(kind="flat", dim=16))
    wide = [name for name, spec in index.specs.items() if spec.dim > 20]
    assert wide and all((index.curvature[name].grid is not None) == (name in wide) for name in index.specs)
    by_themselves = {name: int((kept(index)[name] >= 15).sum()) for name in wide}
    assert bool(alone) == any(len(index.curvature[name].diagonal) for name in wide)
    assert not alone or max(by_themselves.values()) > 0
    rows, queries, means = projected(index, train_gradients), projected(index, query_gradients), stands_for(index)
    lam = lambdas(index, rows, 0.3)
    expected = inside_scores(index, queries, means, lam, index.layers)
    assert within(index.scores(made.query, damping=0.3), expected, 1e-4)
    reader, own, z = reader_of(index), 0.0, 0.0
    assert reader.sketch is not None
    for name, dense in index.gradients(index.ids).items():
        flat, layer = means[name].reshape(len(index), -1), index.curvature[name]
        assert within(dense.double().flatten(1).numpy(), flat, 1e-4)
        inside = flat @ layer.basis.double().numpy()
        own = own + (inside**2 / damped(layer, lam[name])).sum(axis=1)
        # The sketch is of the kept directions, half-whitened with the build's damping.
        part = reader.sketch.layers[name]
        assert np.array_equal(part.directions.numpy(), kept(index)[name])
        half = inside / np.sqrt(damped(layer, part.lam))
        z = z + half[:, part.directions.numpy()] @ part.weights.double().numpy()
    assert within(index.self_influence(damping=0.3), own * codec_of(index).layout.cosine ** 2, 1e-4)
    found = np.concatenate([block.numpy() for block in reader.rows.coordinates(reader.sketch)])
    assert within(found, np.asarray(z), 1e-4)
    index.close()
    again = Index.open(tmp_path / "i", model=made.model)
    assert within(again.scores(made.query, damping=0.3), expected, 1e-4)
    path = tmp_path / "i" / "manifest.json"
    path.write_text(re.sub(r'"products": \d+', '"products": -1', path.read_text()))
    forge(tmp_path / "i")
    with pytest.raises(CorruptionError, match="entry of layer .* curvature is damaged"):
        Index.open(tmp_path / "i")


def test_no_room_is_told(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    with pytest.raises(CurvatureError, match=r"eigen_bytes=4 leaves no room .* at least 22"):
        build(made, tmp_path, eigen_bytes=4)
    with pytest.raises(CurvatureError, match=r"eigen_bytes=26 leaves 6 bytes .* pass at least 31"):
        build(made, tmp_path / "more", eigen_bytes=26)
    with pytest.raises(ConfigError, match="eigen_bytes must be an integer of at least 1, got 0"):
        BuildConfig(eigen_bytes=0)
    with pytest.raises(ConfigError, match="store='eigen'"):
        BuildConfig(store="eigen", sample=Sample(rows="stored"))


def test_damage_is_found(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    index = build(made, tmp_path, eigen_bytes=SOME)
    path = tmp_path / "i" / "codec.h5"
    manifest = tmp_path / "i" / "manifest.json"
    raw, text = path.read_bytes(), manifest.read_text()
    index.close()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(CorruptionError, match="codec.h5"):
        Index.open(tmp_path / "i").verify()
    with pytest.raises(CorruptionError, match="codec.h5"):
        Index.open(tmp_path / "i", model=made.model).scores(made.query)
    path.write_bytes(raw)
    manifest.write_text(text.replace('"bits": 1', '"bits": 3'))
    with pytest.raises(CorruptionError, match="checksum"):
        Index.open(tmp_path / "i")
    forge(tmp_path / "i")
    with pytest.raises(CorruptionError, match="entry of the codec is damaged"):
        Index.open(tmp_path / "i")
    manifest.write_text(text)
    Index.open(tmp_path / "i").verify()

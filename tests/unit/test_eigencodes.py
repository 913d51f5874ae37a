"""Eigencodes against dense float64 oracles: which directions are kept, what rows stand for, and what is refused.

A row stands for the gradient G~ = sum_j u_j v_j over the kept directions: its inner products with H^-1 g are the
scores, for any damping and any layers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import Case, damped, forge, inside_scores, lambdas, projected, reader_of, with_gradients, within

from lorif_index import BuildConfig, Index
from lorif_index.codecs.eigencodes import directions_for
from lorif_index.errors import ConfigError, CorruptionError, CurvatureError, FingerprintError, QueryError

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


def kept(index: Index) -> dict[str, np.ndarray]:
    code = reader_of(index).eigen
    assert code is not None
    return {name: part.directions.numpy() for name, part in code.layers.items()}


def stands_for(index: Index) -> dict[str, np.ndarray]:
    """G~ of every row, (n, d_in, d_out) a layer, in float64."""
    reader = reader_of(index)
    code, rows = reader.eigen, reader.store.gather(np.arange(len(index)))
    assert code is not None
    out = {}
    for name, coordinates in code.decode(rows.factors).items():
        basis = index.curvature[name].basis.double().numpy()[:, kept(index)[name]]
        spec = index.specs[name]
        out[name] = (coordinates.double().numpy() @ basis.T).reshape(-1, spec.d_in, spec.d_out)
    return out


@pytest.mark.parametrize("size", BYTES)
def test_scores_are_exact_for_what_is_stored(case: Any, tmp_path: Path, size: int) -> None:
    made, train_gradients, query_gradients = case
    index = build(made, tmp_path, eigen_bytes=size)
    assert index.representation == "eigen" and reader_of(index).layout.eigen.bits == BYTES[size]
    assert index.bytes_per_example <= size
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    means = stands_for(index)
    for names in (index.layers, index.layers[1:2]):
        for multiple in (0.1, 0.7):
            lam = lambdas(index, rows, multiple)
            got = index.scores(made.query, damping=multiple, layers=names)
            assert within(got, inside_scores(index, queries, means, lam, names), 1e-4)
    scores = index.scores(made.query)
    hits = index.search(made.query, k=7)
    assert within(hits.scores, -np.sort(-scores, axis=1)[:, :7], 1e-5)
    assert hits.stats.exact and hits.stats.store == "eigen" and hits.stats.dtype == f"{BYTES[size]} bits"
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
    cosine = reader_of(index).layout.eigen.cosine
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
    assert index.representation == "eigen" and index.bytes_per_example < 1600
    with pytest.raises(QueryError, match=r"keeps no factors \(store='eigen'\)"):
        index.factors()


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
    monkeypatch.setattr("lorif_index.build.sizes.products_for", lambda rank: 20)
    monkeypatch.setattr("lorif_index.build.sizes.alone_for", lambda row_bytes, layers, code: 9 if alone else 0)
    if alone:
        monkeypatch.setattr("lorif_index.build.sizes.directions_for", lambda row_bytes, layers, dim: 15)
        monkeypatch.setattr("lorif_index.build.sizes.CURVATURE_RANK", 15)
    index = build(made, tmp_path, eigen_bytes=SOME)
    wide = [name for name, spec in index.specs.items() if spec.dim > 20]
    assert wide and all((index.curvature[name].grid is not None) == (name in wide) for name in index.specs)
    kept = reader_of(index).eigen
    assert kept is not None
    by_themselves = {name: int((kept.layers[name].directions >= 15).sum()) for name in wide}
    assert bool(alone) == any(len(index.curvature[name].diagonal) for name in wide)
    assert not alone or max(by_themselves.values()) > 0
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    expected = inside_scores(index, queries, stands_for(index), lambdas(index, rows, 0.3), index.layers)
    assert within(index.scores(made.query, damping=0.3), expected, 1e-4)
    gathered = reader_of(index).store.gather(np.arange(len(index))).factors
    sketch = reader_of(index).sketch
    own, lam, z = 0.0, lambdas(index, rows, 0.3), 0.0
    for name, dense in kept.dense(gathered, index.curvature).items():
        flat, layer = stands_for(index)[name].reshape(len(index), -1), index.curvature[name]
        assert within(dense.double().numpy(), flat, 1e-4)
        inside = flat @ layer.basis.double().numpy()
        own = own + (inside**2 / damped(layer, lam[name])).sum(axis=1)
        # The sketch is of the kept directions, half-whitened with the build's damping.
        if sketch is not None:
            part = sketch.layers[name]
            assert torch.equal(part.directions, kept.layers[name].directions)
            half = inside / np.sqrt(damped(layer, part.lam))
            z = z + half[:, part.directions.numpy()] @ part.weights.double().numpy()
    assert within(index.self_influence(damping=0.3), own * kept.layout.cosine**2, 1e-4)
    if sketch is not None:
        assert within(index.coordinates(), np.asarray(z), 1e-4)
    index.close()
    again = Index.open(tmp_path / "i", model=made.model)
    assert within(again.scores(made.query, damping=0.3), expected, 1e-4)
    path = tmp_path / "i" / "manifest.json"
    path.write_text(re.sub(r'"products": \d+', '"products": -1', path.read_text()))
    forge(tmp_path / "i")
    with pytest.raises(CorruptionError, match="curvature entry of layer"):
        Index.open(tmp_path / "i")


WHITE = {"first": (20, 16), "second": (12, 12)}


def white(folder: Path, code: str, size: int, **settings: Any) -> tuple[Index, dict[str, np.ndarray]]:
    """An index of gradients whose directions all add as much, and these gradients in float64."""
    generator = np.random.default_rng(5)
    g = {name: generator.normal(size=(300, *shape)).astype(np.float32) for name, shape in WHITE.items()}
    fixed: dict[str, Any] = dict(curvature_rank=None, store="eigen", curvature="empirical", coarse=None)
    config = BuildConfig(**(fixed | settings), eigen_bytes=size, eigen_code=code)
    index = Index.build(folder / code, gradients=[g], config=config, progress=False)
    return index, {name: part.astype(np.float64) for name, part in g.items()}


def test_the_largest_of_groups_say_more_of_many_directions(tmp_path: Path) -> None:
    query = {name: np.random.default_rng(6).normal(size=(12, *shape)) for name, shape in WHITE.items()}
    asked = {name: torch.from_numpy(q).float() for name, q in query.items()}
    near, size = {}, 20
    room = 8 * (size - 4)
    for code in ("levels", "largest"):
        index, rows = white(tmp_path, code, size)
        label, count = reader_of(index).layout.eigen.label, sum(len(directions) for directions in kept(index).values())
        assert index.bytes_per_example <= size
        assert (label == "1 bits" and count <= room) if code == "levels" else (label == "largest of 8" and count > room)
        lam, means = lambdas(index, rows, 0.3), stands_for(index)
        scores = index.scores(asked, damping=0.3)
        assert within(scores, inside_scores(index, query, means, lam, index.layers), 1e-4)
        assert within(index.scores({n: q[:1] for n, q in asked.items()}, damping=0.3)[0], scores[0], 1e-4)
        hits = index.search(asked, k=7, damping=0.3)
        assert within(hits.scores, -np.sort(-scores, axis=1)[:, :7], 1e-5) and hits.stats.dtype == label
        whole = inside_scores(index, query, rows, lam, index.layers)
        near[code] = np.corrcoef(scores.ravel(), whole.ravel())[0, 1]
        # Self-influence is that within the kept directions, made neither longer nor shorter.
        true, stored = np.zeros(len(index)), np.zeros(len(index))
        for name, directions in kept(index).items():
            layer = index.curvature[name]
            for total, of in ((true, rows[name]), (stored, means[name])):
                inside = of.reshape(len(index), -1) @ layer.basis.double().numpy()
                total += (inside**2 / damped(layer, lam[name]))[:, directions].sum(axis=1)
        own = index.self_influence(damping=0.3)
        assert within(own, reader_of(index).layout.eigen.cosine ** 2 * stored, 1e-4)
        assert 0.85 < own.mean() / true.mean() < 1.15
        index.verify()
        again = Index.open(tmp_path / code)
        assert np.array_equal(again.scores(asked, damping=0.3), scores)
    assert near["largest"] > near["levels"] + 0.05 > 0.3


def test_rows_of_other_codes_are_not_merged(tmp_path: Path) -> None:
    first, _ = white(tmp_path, "largest", 20)
    second, _ = white(tmp_path / "second", "largest", 20)
    path = second.path / "manifest.json"
    facts = json.loads(path.read_text())
    # The same directions in more room, as another code would take them.
    facts["eigen"] |= {"bits": 8, "group": 1}
    path.write_text(json.dumps(facts))
    forge(second.path)
    with pytest.raises(FingerprintError, match="eigencodes' bits and group"):
        Index.merge(tmp_path / "merged", [first.path, second.path], progress=False)


@pytest.mark.parametrize(
    "wrong", [{"group": 0}, {"group": 12}, {"group": -8}, {"group": 1e308}, {"bits": 5}, {"counts": [121, 128]}]
)
def test_groups_that_cannot_be_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    index, _ = white(tmp_path, "largest", 20)
    path = index.path / "manifest.json"
    index.close()
    facts = json.loads(path.read_text())
    assert facts["eigen"]["group"] == 8 and facts["eigen"]["bits"] == 4
    facts["eigen"] |= wrong
    path.write_text(json.dumps(facts))
    forge(index.path)
    with pytest.raises(CorruptionError, match="eigencodes is damaged"):
        Index.open(index.path)


@pytest.mark.parametrize("size", [19, 20, 21, 23, 25, 38])
@pytest.mark.parametrize("code", ["levels", "largest"])
def test_rows_are_never_longer_than_said(size: int, code: str, tmp_path: Path) -> None:
    assert white(tmp_path, code, size)[0].bytes_per_example <= size


def test_every_direction_has_its_bit_where_there_is_room(tmp_path: Path) -> None:
    index, _ = white(tmp_path, "largest", 400)
    assert reader_of(index).layout.eigen.label == "4 bits"


def test_the_largest_of_groups_are_proposed_by_a_sketch(tmp_path: Path) -> None:
    index, _ = white(tmp_path, "largest", 20, coarse="PQ16x4fs", sketch_dim=64)
    asked = {name: part[:5] for name, part in index.gradients(index.ids[:5]).items()}
    hits = index.search(asked, k=1, exact=False)
    assert hits.ids[:, 0].tolist() == [0, 1, 2, 3, 4] and hits.stats.plan != "scan"
    added = index.add(gradients=[asked])
    assert (index.search(asked, k=2, exact=True).scores[:, 1] > 0).all() and len(added) == 5


def test_no_room_is_told(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    with pytest.raises(CurvatureError, match=r"eigen_bytes=4 leaves no room .* at least 22"):
        build(made, tmp_path, eigen_bytes=4)
    with pytest.raises(CurvatureError, match=r"eigen_bytes=26 leaves 6 bytes .* pass at least 31"):
        build(made, tmp_path / "more", eigen_bytes=26)
    with pytest.raises(ConfigError, match="eigen_bytes must be an integer of at least 1, got 0"):
        BuildConfig(eigen_bytes=0)
    with pytest.raises(ConfigError, match="eigen_code must be one of"):
        BuildConfig(eigen_code="signs")
    with pytest.raises(ConfigError, match="store='eigen'"):
        BuildConfig(store="eigen", curvature_rows="factors")


def test_damage_is_found(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    index = build(made, tmp_path, eigen_bytes=SOME)
    path = tmp_path / "i" / "eigencodes.h5"
    manifest = tmp_path / "i" / "manifest.json"
    raw, text = path.read_bytes(), manifest.read_text()
    index.close()
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(CorruptionError, match="eigencodes"):
        Index.open(tmp_path / "i").verify()
    with pytest.raises(CorruptionError, match="eigencodes"):
        Index.open(tmp_path / "i", model=made.model).scores(made.query)
    path.write_bytes(raw)
    manifest.write_text(text.replace('"bits": 1', '"bits": 3'))
    with pytest.raises(CorruptionError, match="checksum"):
        Index.open(tmp_path / "i")
    forge(tmp_path / "i")
    with pytest.raises(CorruptionError, match="eigencodes is damaged"):
        Index.open(tmp_path / "i")
    manifest.write_text(text)
    Index.open(tmp_path / "i").verify()

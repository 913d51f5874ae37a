"""Eigencodes against dense float64 oracles: which coordinates are kept and how, what rows stand for, what is refused.

A row stands for the gradient G~ that has its coordinates in the products of the sides' eigenvectors, and 0 elsewhere:
its inner products with H^-1 g are the scores, for any damping and any layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    Case,
    dense_inverse,
    expected_scores,
    forge,
    lambdas,
    products_of,
    projected,
    reader_of,
    with_gradients,
    within,
)

from lorif_index import BuildConfig, CoarseIndex, Index, LayerSelection, Sample
from lorif_index.codecs import eigencodes
from lorif_index.codecs.eigencodes import EigenCodec
from lorif_index.curvature import sides
from lorif_index.errors import ConfigError, CorruptionError, FingerprintError

# Bytes of a row -> how coordinates are coded. The layers have 1,296, and scales take at most a tenth of a row.
LAYERS = LayerSelection(include=("*.mlp.*", "*.wte"))
LARGEST, SOME, ALL = 62, 100, 170
BYTES = {LARGEST: "20 largest", SOME: "1 bits", ALL: "1 bits", 280: "2 bits", 500: "4 bits", 1400: "8 bits"}


@pytest.fixture(scope="module")
def case() -> tuple[Case, dict[str, np.ndarray], dict[str, np.ndarray]]:
    return with_gradients("gpt2")


def build(made: Case, folder: Path, **settings: Any) -> Index:
    fixed: dict[str, Any] = dict(projection_dim=None, curvature="empirical", store="eigen", curvature_rank=12)
    config = BuildConfig(layers=LAYERS, batch_size=16, **(fixed | settings))
    return Index.build(folder / "i", model=made.model, data=made.data, config=config)


def codec_of(index: Index) -> EigenCodec:
    codec = reader_of(index).codec
    assert isinstance(codec, EigenCodec)
    return codec


def kept(index: Index) -> dict[str, np.ndarray]:
    """Layer -> numbers of its coordinates that rows keep."""
    return {name: part.directions.numpy() for name, part in codec_of(index).layers.items()}


def stands_for(index: Index) -> dict[str, np.ndarray]:
    """G~ of every row, (n, d_in, d_out) a layer, in float64, by the rows' coordinates."""
    reader, out = reader_of(index), {}
    for name, coordinates in codec_of(index).coordinates(reader.store.gather(np.arange(len(index)))).items():
        basis = products_of(index.curvature[name])[:, kept(index)[name]]
        spec = index.specs[name]
        out[name] = (coordinates.double().numpy() @ basis.T).reshape(-1, spec.d_in, spec.d_out)
    return out


@pytest.mark.parametrize("size", BYTES)
def test_scores_are_exact_for_what_is_stored(case: Any, tmp_path: Path, size: int) -> None:
    made, train_gradients, query_gradients = case
    index = build(made, tmp_path, eigen_bytes=size)
    assert index.codec == "eigen" and codec_of(index).label == BYTES[size]
    assert index.bytes_per_example <= size
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    means, given = stands_for(index), index.gradients(index.ids)
    assert all(within(given[name].double().numpy(), g, 1e-4) for name, g in means.items())
    for names in (index.layers, index.layers[1:2]):
        for multiple in (0.1, 0.7):
            lam = lambdas(index, rows, multiple)
            got = index.scores(made.query, damping=multiple, layers=names)
            assert within(got, expected_scores(index, queries, means, lam, names), 1e-3)
    scores = index.scores(made.query)
    hits = index.search(made.query, k=7)
    assert within(hits.scores, -np.sort(-scores, axis=1)[:, :7], 1e-5)
    assert hits.stats.exact and hits.stats.codec == "eigen" and hits.stats.dtype == BYTES[size]
    # Many queries are scored by products, few by tables.
    for i in range(len(scores)):
        one = {k: v[i : i + 1] for k, v in made.query.items()}
        assert within(index.scores(one)[0], scores[i], 1e-4)


def shares_of(index: Index, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layer -> (D,): rms(x_j) rms(g_j) of coordinates, under the damping that rows are fitted with."""
    lam, out = lambdas(index, rows, 0.03), {}
    for name in index.layers:
        layer, flat = index.curvature[name], rows[name].reshape(len(index), -1)
        basis = products_of(layer)
        own, asked = flat @ basis, flat @ dense_inverse(layer, lam[name]) @ basis
        out[name] = np.sqrt((own**2).mean(axis=0) * (asked**2).mean(axis=0))
    return out


@pytest.mark.parametrize("rank", [12, None])
def test_the_coordinates_are_those_that_add_most(case: Any, tmp_path: Path, rank: int | None) -> None:
    made, train_gradients, _ = case
    index = build(made, tmp_path, eigen_bytes=SOME, curvature_rank=rank)
    shares = shares_of(index, projected(index, train_gradients))
    inside = np.concatenate([shares[name][kept(index)[name]] for name in index.layers])
    outside = np.concatenate([np.delete(shares[name], kept(index)[name]) for name in index.layers])
    # All but the bytes that were not begun: at most 7 of a layer less than there is room for.
    room = 8 * (SOME - 2 * len(index.layers))
    assert room - 7 * len(index.layers) <= len(inside) <= room
    better = (outside[:, None] > 1.001 * inside[None]).any(axis=1).sum()
    assert better <= room - len(inside)


def test_rows_name_what_adds_most_of_each_example(case: Any, tmp_path: Path) -> None:
    made, train_gradients, _ = case
    index = build(made, tmp_path, eigen_bytes=LARGEST)
    rows = projected(index, train_gradients)
    lam, added = lambdas(index, rows, 0.03), []
    for name in index.layers:
        layer, flat = index.curvature[name], rows[name].reshape(len(index), -1)
        asked = flat @ dense_inverse(layer, lam[name]) @ products_of(layer)
        added.append(np.abs(flat @ products_of(layer)) * np.sqrt((asked**2).mean(axis=0)))
    of_all, named = np.concatenate(added, axis=1), []
    for name, inside in codec_of(index).coordinates(reader_of(index).store.gather(np.arange(len(index)))).items():
        every = np.zeros((len(index), index.specs[name].dim), dtype=bool)
        every[:, kept(index)[name]] = inside.numpy() != 0
        named.append(every)
    named = np.concatenate(named, axis=1)
    assert (named.sum(axis=1) <= 20).all() and named.sum() > 19 * len(index)
    least = np.where(named, of_all, np.inf).min(axis=1)
    assert (np.where(named, 0, of_all).max(axis=1) <= 1.01 * least).all()


def test_coded_coordinates_are_those_of_the_unfactored_gradient(case: Any, tmp_path: Path) -> None:
    made, train_gradients, query_gradients = case
    index = build(made, tmp_path, eigen_bytes=1400)
    rows, queries = projected(index, train_gradients), projected(index, query_gradients)
    means = stands_for(index)
    for name, g in rows.items():
        assert ((g - means[name]) ** 2).sum() < 2e-3 * (g**2).sum()
    whole = expected_scores(index, queries, rows, lambdas(index, rows))
    assert np.corrcoef(index.scores(made.query).ravel(), whole.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("size", [ALL, 1400])
def test_self_influence_is_not_made_longer_by_rounding(case: Any, tmp_path: Path, size: int) -> None:
    made, train_gradients, _ = case
    index = build(made, tmp_path, eigen_bytes=size)
    rows, means = projected(index, train_gradients), stands_for(index)
    cosine = codec_of(index).layout.cosine
    for names in (index.layers, index.layers[:1]):
        lam = lambdas(index, rows, 0.3)
        stored, true = np.zeros(len(index)), np.zeros(len(index))
        for name in names:
            turn = products_of(index.curvature[name])
            h = turn.T @ dense_inverse(index.curvature[name], lam[name]) @ turn
            for total, of in ((stored, means[name]), (true, rows[name])):
                flat = of.reshape(len(index), -1) @ turn
                total += ((flat @ h) * flat).sum(axis=1)
            # Rounding errors of coordinates are unrelated.
            stored -= (1 - cosine**2) * (means[name].reshape(len(index), -1) @ turn) ** 2 @ np.diag(h)
        own = index.self_influence(damping=0.3, layers=names)
        assert within(own, stored)
        # In one layer of a bit each, what rounding is added to is not all unrelated.
        assert 0.85 < own.mean() / true.mean() < (1.3 if size == ALL and len(names) == 1 else 1.15)
        assert np.corrcoef(own, true)[0, 1] > (0.999 if size != ALL else 0.3)
    assert np.isfinite(index.scores(made.query, normalize="relatif")).all()


def test_more_bytes_are_nearer_to_the_whole_score(case: Any, tmp_path: Path) -> None:
    made, train_gradients, query_gradients = case
    found = []
    for size in BYTES:
        index = build(made, tmp_path / str(size), eigen_bytes=size)
        rows, queries = projected(index, train_gradients), projected(index, query_gradients)
        whole = expected_scores(index, queries, rows, lambdas(index, rows))
        found.append(np.corrcoef(index.scores(made.query).ravel(), whole.ravel())[0, 1])
    assert found == sorted(found) and found[0] > 0.5


def test_it_is_the_default_for_sequences(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    index = build(made, tmp_path, store="auto")
    assert index.codec == "eigen" and index.bytes_per_example <= 512


@pytest.mark.parametrize("size", [LARGEST, SOME])
def test_sides_that_are_not_turned_and_a_sketch_of_some_coordinates(
    case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """As of a model with a head: scores, self-influence and the sketch are those of what rows stand for."""
    made, train_gradients, query_gradients = case
    monkeypatch.setattr(sides, "TURNED_UP_TO", 10)
    monkeypatch.setattr(eigencodes, "MOST_DIRECTIONS", 100)
    index = build(made, tmp_path, eigen_bytes=size, coarse=CoarseIndex(kind="flat", dim=16))
    assert all(layer.sides.right is None or layer.sides.shape[1] <= 10 for layer in index.curvature.values())
    assert any(layer.sides.left is None for layer in index.curvature.values())
    rows, queries, means = projected(index, train_gradients), projected(index, query_gradients), stands_for(index)
    lam = lambdas(index, rows, 0.3)
    expected = expected_scores(index, queries, means, lam)
    assert within(index.scores(made.query, damping=0.3), expected, 1e-3)
    reader, own, z, lost = reader_of(index), 0.0, 0.0, 1 - codec_of(index).layout.cosine ** 2
    assert reader.sketch is not None and sum(len(p.directions) for p in reader.sketch.layers.values()) == 100
    for name, dense in index.gradients(index.ids).items():
        flat, layer = means[name].reshape(len(index), -1), index.curvature[name]
        assert within(dense.double().flatten(1).numpy(), flat, 1e-4)
        inside, h = flat @ products_of(layer), dense_inverse(layer, lam[name])
        alone = inside**2 @ np.diag(products_of(layer).T @ h @ products_of(layer))
        whole = ((flat @ h) * flat).sum(axis=1)
        own = own + np.maximum(whole - lost * alone, 0.1 * whole)
        # The sketch is of kept coordinates, half-whitened with the build's damping.
        part = reader.sketch.layers[name]
        assert set(part.directions.tolist()) <= set(kept(index)[name].tolist())
        half = inside / np.sqrt(layer.squares.double().numpy() + part.lam)
        z = z + half[:, part.directions.numpy()] @ part.weights.double().numpy()
    assert within(index.self_influence(damping=0.3), own, 1e-3)
    found = np.concatenate([block.numpy() for block in reader.rows.coordinates(reader.sketch)])
    assert within(found, np.asarray(z), 1e-4)
    index.close()
    again = Index.open(tmp_path / "i", model=made.model)
    assert within(again.scores(made.query, damping=0.3), expected, 1e-3)


def test_no_room_is_told(case: Any, tmp_path: Path) -> None:
    made, _, _ = case
    assert codec_of(build(made, tmp_path / "least", eigen_bytes=5)).label == "1 largest"
    # Before anything is fitted: a place, a size and a scale.
    with pytest.raises(ConfigError, match="eigen_bytes must be an integer of at least 5, got 4"):
        BuildConfig(eigen_bytes=4)
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


# -- of gradients that are handed over: which way, how large -----------------------------------------------------------

SHAPES = {"first": (20, 16), "second": (12, 12)}
N = 500


def dense_gradients() -> dict[str, np.ndarray]:
    """Few coordinates matter, the same in all examples."""
    generator = np.random.default_rng(5)
    out = {}
    for name, (a, b) in SHAPES.items():
        sizes = np.geomspace(3.0, 0.01, a * b)
        out[name] = (generator.standard_normal((N, a * b)) * sizes).reshape(N, a, b).astype(np.float32)
    return out


def sparse_gradients() -> dict[str, np.ndarray]:
    """Each example has a few coordinates of its own."""
    generator = np.random.default_rng(5)
    out = {name: 1e-3 * generator.standard_normal((N, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    for g in out.values():
        for one in g:
            one[generator.integers(len(one), size=2), generator.integers(len(one[0]), size=2)] += 3.0
    return out


def index_of(folder: Path, gradients: dict[str, np.ndarray], size: int | str, **changes: Any) -> Index:
    fixed: dict[str, Any] = dict(curvature="empirical", curvature_rank=8, coarse=None, store="eigen")
    config = BuildConfig(**(fixed | changes), eigen_bytes=size)
    return Index.build(folder / "i", gradients=[gradients], config=config, progress=False)


def asked_of(gradients: dict[str, np.ndarray], count: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(g[:count]) for name, g in gradients.items()}


@pytest.mark.parametrize("gradients", [dense_gradients, sparse_gradients])
def test_the_way_is_the_one_that_agrees_better(gradients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = gradients()
    size = 40
    index = index_of(tmp_path, g, size)
    assert codec_of(index).label == ("1 bits" if gradients is dense_gradients else "12 largest")
    asked = asked_of(g, 20)
    rows = {name: part.astype(np.float64) for name, part in g.items()}
    near = {}
    for number in (0, 1):
        monkeypatch.setattr(eigencodes, "chosen", lambda tried, fitting, written, at=number: tried[at])
        other = index_of(tmp_path / str(number), g, size)
        queries = {name: part.double().numpy() for name, part in asked.items()}
        whole = expected_scores(other, queries, rows, lambdas(other, rows))
        near[codec_of(other).label] = np.corrcoef(other.scores(asked)[:, 20:].ravel(), whole[:, 20:].ravel())[0, 1]
    assert near[codec_of(index).label] == max(near.values()) > min(near.values()) + 0.02


def test_the_size_is_the_smallest_that_agrees(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    flat = {"x": generator.standard_normal((N, 160, 160)).astype(np.float32)}
    few = {"x": np.zeros((N, 160, 160), np.float32)}
    few["x"][:, :20, :20] = flat["x"][:, :20, :20]
    # All that there is has room in 512 bytes; 25,600 alike have it nowhere, for 1 bit is too little.
    assert index_of(tmp_path / "few", few, "auto").bytes_per_example <= 512
    most = index_of(tmp_path / "many", flat, "auto")
    assert 3000 < most.bytes_per_example <= 4096


@pytest.mark.parametrize("size", [5, 19, 20, 21, 23, 25, 38, 39, 40, 41, 512, 4000])
def test_rows_are_never_longer_than_said(size: int, tmp_path: Path) -> None:
    assert index_of(tmp_path, dense_gradients(), size).bytes_per_example <= size


@pytest.mark.parametrize("field", ["bits", "entries", "counts"])
def test_rows_of_other_codes_are_not_merged(field: str, tmp_path: Path) -> None:
    first = index_of(tmp_path, sparse_gradients(), 40)
    second = index_of(tmp_path / "second", sparse_gradients(), 40)

    def change(facts: dict[str, Any]) -> None:
        entry = facts["fits"]["codec"]
        assert entry["bits"] == 0 and entry["entries"] == 12
        counts = list(entry["counts"])
        changes: dict[str, Any] = {
            "bits": {"bits": 1, "entries": 0},
            "entries": {"entries": 11},
            "counts": {"counts": [counts[0] - 1, counts[1]]},
        }
        entry |= changes[field]

    forge(second.path, change)
    with pytest.raises((FingerprintError, CorruptionError), match="codec|bytes"):
        Index.merge(tmp_path / "merged", [first.path, second.path], progress=False)


@pytest.mark.parametrize(
    "wrong", [{"entries": 0}, {"entries": -12}, {"entries": 1e308}, {"bits": 1}, {"bits": 3}, {"counts": [321, 144]}]
)
def test_entries_that_cannot_be_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    index = index_of(tmp_path, sparse_gradients(), 40)
    index.close()
    forge(index.path, lambda facts: facts["fits"]["codec"].update(wrong))
    with pytest.raises(CorruptionError, match="entry of the codec is damaged"):
        Index.open(index.path)


def test_rows_of_the_largest_are_proposed_by_a_sketch(tmp_path: Path) -> None:
    index = index_of(tmp_path, sparse_gradients(), 40, coarse=CoarseIndex(kind="flat", dim=64))
    asked = {name: part[:5] for name, part in index.gradients(index.ids[:5]).items()}
    hits = index.search(asked, k=1, exact=False)
    assert hits.ids[:, 0].tolist() == [0, 1, 2, 3, 4] and not hits.stats.exact and hits.stats.candidates > 0
    added = index.add(gradients=[asked], progress=False)
    assert (index.search(asked, k=2, exact=True).scores[:, 1] > 0).all() and len(added) == 5

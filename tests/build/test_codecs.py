"""The contract of row codecs: whatever rows are, all that an index does works with them. A toy codec, which no file of
the package names, keeps it like the real ones.

What rows stand for is `index.gradients(ids)`; scores are compared with its dense float64 products with H^-1.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import toy_codec
from conftest import assert_best, assert_same_hits, dense_inverse, products_of, reader_of, within

from lorif_index import BuildConfig, Compute, Index, ProgressEvent
from lorif_index.codecs.eigencodes import EigenCodec
from lorif_index.codecs.registry import CODECS, codec_class
from lorif_index.errors import ConfigError, CorruptionError, NonFiniteError

# What rows may be: coordinates in levels, each row's largest, factors, and the toy's.
WAYS: dict[str, dict[str, Any]] = {
    "levels": {"store": "eigen", "eigen_bytes": 40},
    "largest": {"store": "eigen", "eigen_bytes": 26},
    "factors": {"store": "factors"},
    "dense": {"store": "dense"},
}
N, QUERIES = 320, 4
SHAPES = {"a": (7, 6), "b": (6, 8)}


def gradients(count: int, seed: int) -> dict[str, torch.Tensor]:
    """(count, d_in, d_out) a layer: of falling energies, as real ones have."""
    generator = np.random.default_rng(seed)
    out = {}
    for number, (name, (a, b)) in enumerate(SHAPES.items()):
        turn = np.linalg.qr(np.random.default_rng(number).standard_normal((a * b, a * b)))[0]
        flat = generator.standard_normal((count, a * b)) * np.geomspace(3.0, 0.1, a * b) @ turn
        out[name] = torch.from_numpy(flat.reshape(count, a, b).astype(np.float32))
    return out


DATA, MORE, QUERY = gradients(N, 1), gradients(40, 2), gradients(QUERIES, 3)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    toy_codec.register()
    yield
    del CODECS["dense"]


def config(way: str, **changes: Any) -> BuildConfig:
    compute = Compute(shard_bytes=2048)
    fixed: dict[str, Any] = {"rank": 2, "curvature_rank": 20, "compute": compute}
    fixed["coarse"] = {"kind": "flat", "queries": 16}
    return BuildConfig(**(fixed | WAYS[way] | changes))


def build(folder: Path, way: str, data: dict[str, torch.Tensor] = DATA, **changes: Any) -> Index:
    fit = changes.pop("fit", None)
    return Index.build(folder, gradients=[data], config=config(way, **changes), fit=fit, progress=False)


@pytest.fixture(scope="module", params=WAYS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    toy_codec.register()
    index = build(tmp_path_factory.mktemp("codec") / request.param, request.param)
    if index.codec == "eigen":
        assert reader_of(index).codec.label == {"levels": "2 bits", "largest": "8 largest"}[request.param]
    return index


def way_of(index: Index) -> str:
    return index.path.name


@pytest.fixture
def copy(whole: Index, tmp_path: Path) -> Index:
    """One that can be changed."""
    shutil.copytree(whole.path, tmp_path / "copy")
    return Index.open(tmp_path / "copy")


def inverses(index: Index, multiple: float) -> dict[str, np.ndarray]:
    """Layer -> H^-1 (D, D) float64, by what the index's curvature says."""
    return {n: dense_inverse(layer, multiple * layer.trace / layer.dim) for n, layer in index.curvature.items()}


def expected(index: Index, multiple: float | None = None, layers: tuple[str, ...] = ("a", "b")) -> np.ndarray:
    """(q, n) float64: what rows stand for, under H^-1."""
    multiple = 0.03 * (4096 / index.bytes_per_example) ** 0.5 if multiple is None else multiple
    rows, inverse = index.gradients(index.ids), inverses(index, multiple)
    return sum(
        oracle.scores(QUERY[name].double().numpy(), rows[name].double().numpy(), inverse[name]) for name in layers
    )  # type: ignore[return-value]


def check_search(index: Index) -> None:
    """Scan and candidates find the best of all scores, and the scores are those of what rows stand for."""
    scores = index.scores(QUERY)
    assert within(scores, expected(index))
    for opponents in (False, True):
        for exact in (True, False):
            hits = index.search(QUERY, k=7, exact=exact, opponents=opponents)
            assert_best(hits, scores, index.ids, opponents=opponents)
            assert hits.stats.exact is exact and hits.stats.codec == index.codec


def test_no_file_of_the_package_names_the_toy_codec() -> None:
    package = Path(str(codec_class.__code__.co_filename)).parents[1]
    assert not [
        path for path in package.rglob("*.py") if "dense_codec" in path.read_text() or '"dense"' in path.read_text()
    ]


def test_scores_are_those_of_what_rows_stand_for(whole: Index) -> None:
    assert whole.codec in CODECS and len(whole) == N
    check_search(whole)
    for multiple in (0.02, 0.7):
        assert within(whole.scores(QUERY, damping=multiple), expected(whole, multiple))
    assert within(whole.scores(QUERY, layers="b"), expected(whole, layers=("b",)))


def test_self_influence_is_that_of_what_rows_stand_for(whole: Index) -> None:
    rows, inverse = whole.gradients(whole.ids), inverses(whole, 0.3)
    codec, wanted = reader_of(whole).codec, np.zeros(N)
    # Codes in few bits are made longer, so that inner products are not shrunk; self-influence takes rounding off again.
    lost = 1 - codec.layout.cosine**2 if isinstance(codec, EigenCodec) else 0.0
    for name, g in rows.items():
        turn = products_of(whole.curvature[name])
        inside, h = g.flatten(1).double().numpy() @ turn, turn.T @ inverse[name] @ turn
        own = ((inside @ h) * inside).sum(axis=1)
        wanted += np.maximum(own - lost * (inside**2 @ np.diag(h)), 0.1 * own)
    assert within(whole.self_influence(damping=0.3), wanted)
    relatif = whole.scores(QUERY, damping=0.3, normalize="relatif")
    assert within(relatif, whole.scores(QUERY, damping=0.3) / np.sqrt(whole.self_influence(damping=0.3)), 1e-4)


def test_an_interrupted_build_goes_on(whole: Index, tmp_path: Path) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.stage == "encode" and event.done > 3 * N // 4:
            raise KeyboardInterrupt

    blocks = [{name: g[i : i + 16] for name, g in DATA.items()} for i in range(0, N, 16)]
    folder, choices = tmp_path / "i", config(way_of(whole))
    with pytest.raises(KeyboardInterrupt):
        Index.build(folder, gradients=blocks, config=choices, progress=stop)
    sealed = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.h5")}
    assert sealed
    index = Index.build(folder, gradients=blocks, config=choices, progress=False)
    assert {name: (folder / name).stat().st_mtime_ns for name in sealed} == sealed
    alone = Index.build(tmp_path / "alone", gradients=blocks, config=choices, progress=False)
    assert within(index.scores(QUERY), alone.scores(QUERY), 1e-6)
    index.verify()


def test_an_index_lives(copy: Index, whole: Index) -> None:
    before = copy.scores(QUERY)
    new = copy.add(gradients=[MORE])
    assert new.tolist() == list(range(N, N + 40))
    assert within(copy.scores(QUERY)[:, :N], before, 1e-6)
    check_search(copy)
    gone = [0, 5, 17, N + 3]
    assert copy.remove(gone) == 4
    kept = np.setdiff1d(np.arange(N + 40), gone)
    assert copy.ids.tolist() == kept.tolist()
    check_search(copy)
    scores = copy.scores(QUERY)
    copy.compact()
    assert within(copy.scores(QUERY), scores, 1e-6)
    check_search(copy)
    copy.verify()
    said = copy.refit()
    bound = "curvature" in codec_class(copy.codec).depends_on
    assert set(said["kept"]) == ({"curvature"} if bound else set()) and {"sketch", "coarse"} <= set(said["renewed"])
    assert within(copy.scores(QUERY), scores, 1e-6) is bound
    check_search(copy)
    copy.rebuild_coarse("auto")
    check_search(copy)
    assert Index.open(whole.path).scores(QUERY).shape == (QUERIES, N)


def test_indexes_of_one_fit_are_merged(whole: Index, tmp_path: Path) -> None:
    other = build(tmp_path / "other", way_of(whole), MORE, fit=whole.path)
    merged = Index.merge(tmp_path / "merged", [whole, other], progress=False)
    assert len(merged) == N + 40
    assert within(merged.scores(QUERY), np.concatenate([whole.scores(QUERY), other.scores(QUERY)], axis=1), 1e-6)
    check_search(merged)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


def damaged_file(index: Index, name: str) -> Path:
    manifest = json.loads((index.path / "manifest.json").read_text())
    entry = manifest["shards"][1]["sealed"] if name == "shard" else (manifest["fits"] | manifest)[name]["file"]
    path = index.path / entry["file"]
    flip(path, min(entry["offsets"].values()) + 3)
    return path


def test_a_damaged_shard_is_found_and_leaves(copy: Index) -> None:
    damaged_file(copy, "shard")
    with pytest.raises(CorruptionError, match="1 files"):
        Index.open(copy.path).verify()
    said = Index.repair(copy.path, progress=False)
    assert len(said["dropped"]) == 1 and "coarse" in said["rebuilt"]
    mended = Index.open(copy.path)
    assert len(mended) == N - said["dropped"][0]["rows"]
    check_search(mended)


@pytest.mark.parametrize("name", ["curvature", "sketch", "queries", "coarse"])
def test_what_was_fitted_is_mended_where_rows_outlive_it(copy: Index, name: str) -> None:
    damaged_file(copy, name)
    if name in codec_class(copy.codec).depends_on:
        with pytest.raises(CorruptionError, match="repair cannot help"):
            Index.repair(copy.path, progress=False)
        return
    assert name in Index.repair(copy.path, progress=False)["rebuilt"]
    mended = Index.open(copy.path)
    mended.verify()
    check_search(mended)


def test_what_a_build_takes_is_said_before(whole: Index) -> None:
    said = Index.estimate(gradients=[DATA], config=config(way_of(whole)), progress=False)
    assert said.codec == whole.codec
    # Rows that hold all coordinates in few bits are smaller than they may be, but which way is taken shows later.
    most = whole.config.eigen_bytes if way_of(whole) == "levels" else whole.bytes_per_example
    assert said.bytes_per_example == most >= whole.bytes_per_example
    assert abs(said.disk_total / whole.nbytes - 1) < 0.5
    assert any(choice.settings["store"] == whole.codec for choice in said.choices)


def test_two_ranks_build_and_answer_what_one_does(whole: Index, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, choices = tmp_path / "answer.npz", config(way_of(whole)).to_json()
    arguments = (port, str(tmp_path / "ranks"), choices, DATA, str(out))
    torch.multiprocessing.spawn(toy_codec.rank, arguments, nprocs=2)
    found = np.load(out)
    alone = Index.open(tmp_path / "ranks")
    query = {name: g[:3] for name, g in DATA.items()}
    assert within(found["scores"], alone.scores(query), 1e-5)
    # Fits of different numbers of ranks differ by rounding, which few bits may show.
    assert within(found["scores"], whole.scores(query), 0.2 if whole.codec == "eigen" else 1e-2)
    hits = alone.search(query, k=5)

    class Found:
        ids, scores = found["ids"], found["hits"]

    assert_same_hits(Found, hits)
    check_search(alone)


# -- what concerns one codec -------------------------------------------------------------------------------------------


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="store must be one of"):
        BuildConfig(store="both")


def test_rows_in_a_curvature_need_it_before() -> None:
    with pytest.raises(ConfigError, match="store='factors'"):
        BuildConfig(store="eigen", sample={"rows": "stored"})
    assert BuildConfig.paper().store == "factors" and BuildConfig(sample={"rows": "stored"}).store == "auto"


def test_the_published_order_fits_the_curvature_on_stored_rows(tmp_path: Path) -> None:
    index = build(tmp_path / "i", "factors", sample={"rows": "stored"}, dtype="float32")
    rows = index.gradients(index.ids)
    for name, layer in index.curvature.items():
        trace = rows[name].double().square().sum() / N
        assert layer.rows == N and abs(layer.trace / float(trace) - 1) < 1e-5
    check_search(index)


def test_one_position_an_example_is_kept_as_factors(tmp_path: Path) -> None:
    left, right = torch.randn(60, 7, 1), torch.randn(60, 6, 1)
    index = Index.build(tmp_path / "i", gradients=[{"a": (left, right)}], config=BuildConfig(rank=1), progress=False)
    assert (index.codec, index.config.store) == ("factors", "auto")
    got = index.gradients([3, 1])["a"]
    assert torch.allclose(got, (left @ right.mT)[[3, 1]], atol=2e-2)


def scaled_examples(scale: float, *which: int) -> dict[str, torch.Tensor]:
    out = {name: g.clone() for name, g in DATA.items()}
    for g in out.values():
        g[list(which)] *= scale
    return out


def test_factors_beyond_their_dtype_are_refused(tmp_path: Path) -> None:
    extreme = scaled_examples(1e10, 7)
    with pytest.raises(NonFiniteError, match=r"example 7 overflow float16: build with BuildConfig\(dtype='bfloat16'"):
        build(tmp_path / "i", "factors", extreme)
    assert len(build(tmp_path / "wide", "factors", extreme, dtype="float32")) == N


def test_factors_of_nearly_nothing_are_zeros_and_said(tmp_path: Path) -> None:
    """As of a classifier's confident predictions: they do not stop a build."""
    tiny = scaled_examples(1e-20, 30, 7)
    with pytest.warns(UserWarning, match=r"of 2 examples \(the first: 7\) are below what float16 holds"):
        index = build(tmp_path / "i", "factors", tiny)
    query = {name: g[:3] for name, g in DATA.items()}
    scores = index.scores(query)
    assert not scores[:, [7, 30]].any() and scores[:, 8].all()
    for normalize in ("relatif", "cosine"):
        hits = index.search(query, N, normalize=normalize)
        assert np.isfinite(hits.scores).all() and not hits.scores[np.isin(hits.ids, [7, 30])].any()
    with pytest.raises(NonFiniteError, match="of all 2 examples underflow"):
        index.add(gradients=[{name: g[[7, 30]] for name, g in tiny.items()}], progress=False)
    assert len(index) == N
    wide = build(tmp_path / "wide", "factors", tiny, dtype="float32")
    assert wide.scores(query)[:, [7, 30]].any()

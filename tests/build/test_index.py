"""The index as its users meet it: build, open, search, refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import assert_best, reader_of, small_data, small_model, write_manifest
from torch import nn

from lorif_index import (
    AbsoluteDamping,
    BuildConfig,
    Compute,
    Index,
    LayerSelection,
    ProgressEvent,
    Sample,
    default_loss,
)
from lorif_index.errors import (
    CaptureError,
    ConfigError,
    CorruptionError,
    DataError,
    FingerprintError,
    FormatVersionError,
    IndexExistsError,
    NonFiniteError,
    NotAnIndexError,
    QueryError,
    StoreError,
)

N = 90


CONFIG = BuildConfig(dtype="float32", batch_size=8, compute=Compute(shard_bytes=6000))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(
        tmp_path_factory.mktemp("idx") / "idx",
        model=small_model(),
        data=small_data(),
        config=CONFIG,
        metadata={"name": "test"},
        progress=False,
    )


def close(a: np.ndarray, b: np.ndarray, within: float = 1e-4) -> bool:
    """Equal to a fraction of the largest value."""
    return bool(np.abs(a - b).max() <= within * np.abs(b).max())


# -- answers ---------------------------------------------------------------------------------------------------------


def test_search_is_the_sorted_scores(index: Index) -> None:
    query = small_data(4, seed=2)
    scores = index.scores(query)
    assert scores.shape == (4, N) and scores.dtype == np.float32
    for opponents in (False, True):
        hits = index.search(query, k=7, opponents=opponents)
        assert_best(hits, scores, opponents=opponents)
        assert hits.ids.dtype == np.int64
    assert hits.stats.exact and hits.stats.examined == hits.stats.total == N and len(hits) == 4
    assert hits.stats.bytes_read == N * index.bytes_per_example
    assert set(hits.stats.seconds) == {"gradients", "transform", "scan"}
    assert "4 queries x 7" in repr(hits)
    assert index.search(query, k=1000).ids.shape == (4, N)


def test_an_example_of_the_training_set_finds_itself(index: Index) -> None:
    x, y = small_data()
    hits = index.search((x[:20], y[:20]), k=1)
    own = index.self_influence()[:20]
    assert np.allclose(np.diag(index.scores((x[:20], y[:20]))[:, :20]), own, rtol=1e-4)
    assert (hits.scores[:, 0] >= own * (1 - 1e-4)).all() and (hits.ids[:, 0] == np.arange(20)).mean() > 0.8


def test_raw_queries_gradients_and_pairs_are_one_question(index: Index) -> None:
    x, y = small_data()
    dense = {name: g.numpy() for name, g in index.gradients(range(3)).items()}
    pairs = {name: (g, np.tile(np.eye(g.shape[2], dtype="f4"), (3, 1, 1))) for name, g in dense.items()}
    raw = index.scores((x[:3], y[:3]))
    # One position an example: rank one is exact, so stored factors are the gradient itself.
    assert close(index.scores(pairs), raw) and close(index.scores(dense), raw)
    one_layer = {index.layers[0]: dense[index.layers[0]]}
    assert close(index.scores(one_layer, layers="0"), index.scores((x[:3], y[:3]), layers="0"))


def test_a_measure_is_raised_where_a_loss_is_lowered(index: Index) -> None:
    x, y = small_data(3, seed=5)

    def log_probability(model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.log_softmax(model(batch[0]), dim=1).gather(1, batch[1][:, None])[:, 0]

    assert close(index.scores((x, y), measure=log_probability), index.scores((x, y)))


def test_queries_do_not_depend_on_their_company(index: Index) -> None:
    x, y = small_data(40, seed=6)
    together = index.scores((x, y))
    alone = np.concatenate([index.scores((x[i : i + 1], y[i : i + 1])) for i in range(40)])
    assert close(alone, together, 1e-5)


def test_layers_add_up_and_damping_is_a_property_of_the_search(index: Index) -> None:
    query = small_data(2, seed=7)
    parts = sum(index.scores(query, layers=name) for name in index.layers)
    assert close(parts, index.scores(query))
    heavy = index.scores(query, damping=AbsoluteDamping(1e6))
    gradients = index.scores(query, damping=AbsoluteDamping(2e6))
    assert close(heavy, 2 * gradients)
    assert not np.allclose(index.scores(query, damping=0.5), index.scores(query), rtol=1e-2)
    assert np.array_equal(index.scores(query, damping=index.damping), index.scores(query))


def test_a_search_leaves_the_index_as_it_was(index: Index) -> None:
    """A query must not feed back into the curvature (design, section 4)."""
    before = {p.name: p.read_bytes() for p in index.path.iterdir()}
    query = small_data(4, seed=8)
    first = index.scores(query)
    for _ in range(3):
        index.search(query, k=3, damping=0.7)
    assert np.array_equal(index.scores(query), first)
    assert {p.name: p.read_bytes() for p in index.path.iterdir()} == before


def test_scores_into_a_memory_map(index: Index, tmp_path: Path) -> None:
    """Or whatever else has a shape."""
    query = small_data(2, seed=9)
    with h5py.File(tmp_path / "scores.h5", "w") as file:
        dataset = file.create_dataset("scores", (2, N), "f4")
        index.scores(query, out=dataset)
        assert np.array_equal(dataset[:], index.scores(query))
    out = np.lib.format.open_memmap(tmp_path / "s.npy", mode="w+", dtype=np.float32, shape=(2, N))
    assert index.scores(query, out=out) is out
    assert np.array_equal(np.asarray(out), index.scores(query))
    with pytest.raises(QueryError, match=r"\(2, 90\) float32"):
        index.scores(query, out=np.empty((2, N)))


def test_looking_at_it(index: Index) -> None:
    assert len(index) == N and index.layers == ("0", "3") and index.metadata == {"name": "test"}
    assert index.nbytes == sum(p.stat().st_size for p in index.path.glob("*.h5"))
    text = repr(index)
    assert "90 examples" in text and "2 layers" in text and "bytes per example" in text
    spec = index.specs["0"]
    assert (spec.width_in, spec.width_out, spec.bias) == (13, 16, True)
    assert index.build_report["rows"] == N and index.build_report["seconds"]["encode"] > 0
    assert index.config == CONFIG
    index.verify()


def test_open_again(index: Index) -> None:
    query = small_data(3, seed=3)
    again = Index.open(index.path, model=small_model())
    assert np.array_equal(again.scores(query), index.scores(query))
    assert again.fingerprint == index.fingerprint
    gradients = index.gradients([4])
    with Index.open(index.path) as alone:
        assert close(alone.scores(gradients), index.scores(gradients), 1e-5)
        with pytest.raises(QueryError, match="opened without its model"):
            alone.search(query)


def test_tied_weights_are_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    index = Index.build(tmp_path / "i", model=model, data=small_data(), config=CONFIG)
    assert index.layers == ("0",) and "used by 0, 2, counted once" in repr(index)


def test_ids_of_gradients(index: Index) -> None:
    whole, some = index.gradients(index.ids), index.gradients([5, 3, 5])
    for name in index.layers:
        assert torch.equal(some[name], whole[name][[5, 3, 5]])
    with pytest.raises(QueryError, match="no row with id 90"):
        index.gradients([1, 90])


# -- bad questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 2.5}, "k must be"),
        ({"exact": False}, "no coarse stage"),
        ({"layers": "nope"}, "'nope' matches none"),
        ({"layers": []}, "layers is empty"),
    ],
)
def test_bad_arguments(index: Index, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        index.search(small_data(1), **arguments)


def test_bad_queries(index: Index) -> None:
    x, y = small_data(2)
    good = {name: np.zeros((1, s.d_in, s.d_out), dtype=np.float32) for name, s in index.specs.items()}
    with pytest.raises(DataError, match=r"missing \['3'\]"):
        index.scores({"0": good["0"]})
    with pytest.raises(DataError, match=r"\(4, 4\) in layer '0'.*\(13, 16\)"):
        index.scores(good | {"0": np.zeros((1, 4, 4), dtype=np.float32)})
    with pytest.raises(NonFiniteError, match="query.*example 0.*layer '0'"):
        index.scores(good | {"0": good["0"] * np.nan})
    with pytest.raises(NonFiniteError, match="query.*example 1"):
        index.scores((torch.stack([x[0], x[1] * torch.nan]), y))
    with pytest.raises(DataError, match="no examples"):
        index.scores((x[:0], y[:0]))
    with pytest.raises(QueryError, match="negate"):
        index.scores(good, measure=lambda m, b: m(b))
    with pytest.raises(ConfigError):
        index.scores((x, y), damping=-1.0)


# -- bad builds: refused before anything is written ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, DataError, "neither"),
        ({"data": small_data(), "gradients": []}, DataError, "both"),
        ({"data": small_data()}, DataError, "needs a model"),
        ({"model": small_model(), "data": (torch.zeros(0, 12), torch.zeros(0).long())}, DataError, "no examples"),
        ({"model": small_model(), "data": small_data(), "loss": 3}, ConfigError, "callable"),
        (
            {"model": small_model(), "data": small_data(), "loss": lambda m, b: m(b[0]).sum()},
            CaptureError,
            "one value per",
        ),
        (
            {"model": small_model(), "data": small_data(), "config": BuildConfig(layers="x*")},
            ConfigError,
            "matches none",
        ),
        ({"model": small_model(), "data": small_data(), "metadata": {"a": object()}}, ConfigError, "plain JSON"),
        ({"gradients": []}, DataError, "empty"),
        ({"gradients": [{"a": np.zeros((2, 3), np.float32)}]}, DataError, r"\(2, 3\)"),
        ({"gradients": [{"a": np.zeros((2, 3, 3), int)}]}, DataError, "floating point"),
        (
            {"gradients": [{"a": np.ones((2, 3, 3), np.float32)}, {"b": np.ones((2, 3, 3), np.float32)}]},
            DataError,
            r"missing \['a'\], unknown \['b'\]",
        ),
        (
            {"gradients": [{"a": np.ones((2, 3, 3), np.float32), "b": np.ones((3, 3, 3), np.float32)}]},
            DataError,
            "'b' has 3 examples but layer 'a' has 2",
        ),
        ({"model": small_model(), "data": small_data(), "config": BuildConfig(compute="cuda")}, ConfigError, "cuda"),
    ],
)
def test_bad_builds_write_nothing(tmp_path: Path, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Index.build(tmp_path / "idx", **arguments)
    assert not (tmp_path / "idx").exists()


def test_folders_that_are_not_free(index: Index, tmp_path: Path) -> None:
    arguments = {"model": small_model(), "data": small_data(), "config": CONFIG}
    with pytest.raises(IndexExistsError, match="already holds an index"):
        Index.build(index.path, **arguments)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(IndexExistsError, match="not empty"):
        Index.build(tmp_path, **arguments)
    with pytest.raises(IndexExistsError, match="not a folder"):
        Index.build(tmp_path / "notes.txt", **arguments)
    with pytest.raises((OSError, StoreError)):
        Index.build(tmp_path / "notes.txt" / "below", **arguments)
    for path in (tmp_path / "nothing", tmp_path / "notes.txt"):
        with pytest.raises((OSError, StoreError)):
            Index.open(path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": 0}, {"rank": 1.5}, {"projection_dim": 0}, {"projection_dim": 1.5}, {"projection_dim": True},
        {"curvature_rank": -1}, {"dtype": "int8"}, {"store": "dense"}, {"complement": "none"}, {"seed": -1},
        {"batch_size": 0}, {"on_nonfinite": "ignore"}, {"layers": []}, {"layers": 3},
    ],
)  # fmt: skip
def test_bad_settings(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys)).replace("_", ".")):
        BuildConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sample": 0}, "size must be"), ({"sample": {"rows": "all"}}, "rows must be"),
        ({"sample": {"probes": 0}}, "probes must be"),
        ({"sample": {"sizes": 3}}, r"unknown keys \['sizes'\] of sample"),
        ({"coarse": "PQ8x4fs"}, "kind must be"), ({"coarse": {"dim": 0}}, "dim must be"),
        ({"coarse": {"queries": -1}}, "queries must be"), ({"coarse": {"sketch": "none"}}, "sketch must be"),
        ({"compute": {"autocast": "int8"}}, "autocast must be"),
        ({"compute": {"shard_bytes": 0}}, "shard_bytes must be"),
        ({"sample": {"rows": "stored"}, "curvature": "ggn"}, "needs rows of its own"),
        ({"sample": {"rows": "stored"}, "store": "eigen"}, "needs it before"),
    ],
)  # fmt: skip
def test_bad_parts(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**keys)


def test_parts_in_short() -> None:
    config = BuildConfig(sample=2000, coarse=None, compute={"shard_bytes": 9})
    assert config.sample == Sample(size=2000) and config.coarse.kind == "none"
    assert config.compute == Compute(shard_bytes=9) and BuildConfig(compute=torch.device("cpu")).compute.device == "cpu"


def test_unknown_settings_fail() -> None:
    with pytest.raises(TypeError, match="projection_dims"):
        BuildConfig(projection_dims=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="projection_dims"):
        BuildConfig.from_json({"projection_dims": 3})


@pytest.mark.parametrize(
    "config",
    [
        BuildConfig(),
        BuildConfig.paper(),
        CONFIG,
        BuildConfig(layers=LayerSelection(include=("a*",), bias=False), damping=2.0),
    ],
)
def test_config_survives_json(config: BuildConfig) -> None:
    assert BuildConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# -- non-finite examples ---------------------------------------------------------------------------------------------


def poisoned() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = small_data()
    x[17], x[60, 3] = torch.nan, torch.inf
    return x, y


@pytest.mark.parametrize("sample", [20, 10_000])
def test_non_finite_examples_by_policy(tmp_path: Path, sample: int) -> None:
    with pytest.raises(NonFiniteError, match=r"example (17|60) in layer '0'"):
        Index.build(tmp_path / "a", model=small_model(), data=poisoned(), config=CONFIG)
    config = BuildConfig(dtype="float32", on_nonfinite="skip", sample=sample, batch_size=8)
    index = Index.build(tmp_path / "b", model=small_model(), data=poisoned(), config=config)
    assert index.skipped == (17, 60) and len(index) == N - 2 and "2 examples skipped" in repr(index)
    kept = np.setdiff1d(np.arange(N), [17, 60])
    assert np.array_equal(index.ids, kept)
    whole = Index.build(tmp_path / "c", model=small_model(), data=small_data(), config=CONFIG)
    mine, other = index.gradients(kept), whole.gradients(kept)
    assert all(torch.allclose(mine[n], other[n], atol=1e-6) for n in index.layers)


def test_overflow_and_underflow_of_the_store_are_found(tmp_path: Path) -> None:
    huge = [{"a": np.full((3, 4, 4), 3e10, np.float32)}]
    with pytest.raises(NonFiniteError, match="overflow float16.*bfloat16"):
        Index.build(tmp_path / "a", gradients=huge)
    tiny = [{"a": np.full((3, 4, 4), 1e-20, np.float32)}]
    with pytest.raises(NonFiniteError, match="underflow to zero in float16"):
        Index.build(tmp_path / "b", gradients=tiny)
    mixed = [{"a": tiny[0]["a"], "b": np.ones((3, 2, 2), np.float32)}]
    assert (
        Index.build(
            tmp_path / "mixed", gradients=mixed, curvature=[{k: v + 1 for k, v in mixed[0].items()}]
        ).build_report["vanished"]
        == 3
    )
    for i, blocks in enumerate((huge, tiny)):
        index = Index.build(tmp_path / f"ok{i}", gradients=blocks, config=BuildConfig(dtype="bfloat16"))
        assert torch.allclose(index.gradients(index.ids)["a"], torch.from_numpy(blocks[0]["a"]), rtol=0.02)


# -- gradients from anywhere -----------------------------------------------------------------------------------------


def given_blocks(n: int = 60) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(0).standard_normal
    return [
        {"w": draw((m, 10, 7)).astype("f4"), "v": draw((m, 3, 9)).astype("f4")}
        for m in (n // 2, 0, n // 3, n // 6)
    ]  # fmt: skip


@pytest.mark.parametrize("projection", ["auto", 4])
def test_lists_and_one_shot_streams_and_pairs_give_the_same_index(tmp_path: Path, projection: Any) -> None:
    config = BuildConfig(projection_dim=projection, rank=None, dtype="float32")
    listed = Index.build(tmp_path / "a", gradients=given_blocks(), config=config)
    streamed = Index.build(tmp_path / "b", gradients=iter(given_blocks()), config=config)
    paired = Index.build(
        tmp_path / "c",
        gradients=[
            {k: (v, np.tile(np.eye(v.shape[2], dtype="f4"), (len(v), 1, 1))) for k, v in b.items()}
            for b in given_blocks()
        ],
        config=config,
    )
    query = given_blocks()[3]
    assert len(listed) == 60 and np.array_equal(listed.ids, np.arange(60))
    expected = listed.scores(query)
    assert close(streamed.scores(query), expected)
    assert close(paired.scores(query), expected)
    assert not list((tmp_path / "b").glob(".*"))
    if projection == 4:
        assert listed.specs["w"].d_in == 4 and listed.specs["v"].d_in == 3
    with pytest.raises(QueryError, match="built from gradients"):
        listed.search(small_data(1))
    with pytest.raises(FingerprintError, match="built from gradients"):
        Index.open(tmp_path / "a", model=small_model())


# -- what an index is built from is checked --------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


own_loss.logits = default_loss.logits  # type: ignore[attr-defined]


def test_another_model_or_loss_is_refused(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match=r"differs in model \(model: "):
        Index.open(index.path, model=small_model(seed=5))
    with pytest.raises(FingerprintError, match='loss: "default" there, "own_loss" here'):
        Index.open(index.path, model=small_model(), loss=own_loss)
    with pytest.raises(FingerprintError, match="layers"):
        Index.open(index.path, model=nn.Sequential(nn.Linear(12, 5)))
    built = Index.build(tmp_path / "i", model=small_model(), data=small_data(), loss=own_loss, config=CONFIG)
    assert close(built.scores(small_data(2)), index.scores(small_data(2)))
    with pytest.raises(QueryError, match="loss=own_loss"):
        Index.open(tmp_path / "i", model=small_model()).scores(small_data(2))


def test_damaged_and_foreign_folders(index: Index, tmp_path: Path) -> None:
    with pytest.raises(NotAnIndexError, match=r"no manifest\.json"):
        Index.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(index.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())

    def rewritten(**changes: Any) -> Path:
        write_manifest(copy / "manifest.json", manifest | changes)
        return copy

    with pytest.raises(FormatVersionError, match="version 99, and this library reads version 1"):
        Index.open(rewritten(format_version=99))
    with pytest.raises(NotAnIndexError, match="not a lorif-index manifest"):
        Index.open(rewritten(format="other"))
    for key in ("layers", "shards", "fits", "config"):
        with pytest.raises((CorruptionError, ConfigError)):
            Index.open(rewritten(**{key: [{}]}))
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CorruptionError, match="not valid JSON"):
        Index.open(copy)
    rewritten()
    curvature = bytearray((copy / "curvature.h5").read_bytes())
    curvature[-5] ^= 1
    (copy / "curvature.h5").write_bytes(curvature)
    with pytest.raises(CorruptionError, match=r"curvature\.h5 has digest"):
        Index.open(copy, model=small_model()).scores(small_data(1))


# -- interruption ----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "at"), [("sample", 3), ("curvature", 2), ("encode", 40), ("encode", 89)])
@pytest.mark.parametrize("sample", [30, 10_000])
def test_an_interrupted_build_goes_on_and_gives_the_same_index(
    tmp_path: Path, stage: str, at: int, sample: int
) -> None:
    config = BuildConfig(dtype="float16", batch_size=8, sample=sample, compute=Compute(shard_bytes=3000))
    arguments: dict[str, Any] = {"model": small_model(), "data": small_data(), "config": config}

    def interrupt(event: ProgressEvent) -> None:
        if event.stage == stage and event.done >= at:
            raise Interrupted

    with pytest.raises(Interrupted):
        Index.build(tmp_path / "a", **arguments, progress=interrupt)
    with pytest.raises(NotAnIndexError, match="run the same Index.build again"):
        Index.open(tmp_path / "a")
    with pytest.raises(FingerprintError, match="config"):
        Index.build(tmp_path / "a", **(arguments | {"config": BuildConfig(rank=2)}))
    with pytest.raises(FingerprintError, match="differs in model"):
        Index.build(tmp_path / "a", **(arguments | {"model": small_model(3)}))
    resumed = Index.build(tmp_path / "a", **arguments)
    straight = Index.build(tmp_path / "b", **arguments)
    assert resumed.fingerprint == straight.fingerprint
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        if name.endswith(".h5"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_progress_tells_rate_and_bytes(tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    Index.build(tmp_path / "a", model=small_model(), data=small_data(), config=CONFIG, progress=events.append)
    assert {e.stage for e in events} == {"sample", "curvature", "codec", "encode"}
    last = [e for e in events if e.stage == "encode"][-1]
    assert last.finished and last.done == last.total == N and last.bytes > 0
    assert last.rate > 0 and last.seconds_left == 0


def test_memory_of_a_search_does_not_grow_with_the_index(index: Index) -> None:
    """Blocks are bounded, and of the scores only k a query are kept."""
    blocks = [len(rows) for _, rows in reader_of(index).store.stream(block_bytes=10 * index.bytes_per_example)]
    assert max(blocks) <= 10 and sum(blocks) == N


def test_a_build_that_ended_before_its_first_file_had_its_name_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": torch.randn(20, 4, 3)}]

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            Index.build(tmp_path / "i", gradients=rows)
    assert len(Index.build(tmp_path / "i", gradients=rows)) == 20

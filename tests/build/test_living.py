"""An index that lives: examples are added and removed, shards compacted, fits renewed, indexes merged; readers stay
with what they opened, and there is one writer."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_hits, reader_of, share_of_best
from torch import nn

from lorif_index import BuildConfig, Index
from lorif_index.errors import (
    ConfigError,
    CorruptionError,
    DataError,
    FingerprintError,
    IndexExistsError,
    LockedError,
    NonFiniteError,
    QueryError,
    StoreError,
)
from lorif_index.search.coarse import faiss_is_installed
from lorif_index.storage.locks import WriterLock

STORES = ["factors", "eigen"]
# What does not hang on the kind of rows.
ONE = pytest.mark.parametrize("made", ["eigen"], indirect=True)
N, MORE = 1300, 200


def blocks(rows: torch.Tensor, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Gradients of two layers, 12 x 10 and 8 x 8, cut from rows of 184."""
    return [{"a": part[:, :120].reshape(-1, 12, 10), "b": part[:, 120:].reshape(-1, 8, 8)} for part in rows.split(size)]


def query_of(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return blocks(rows, len(rows))[0]


def config(store: str, **changes: Any) -> BuildConfig:
    settings: dict[str, Any] = {
        "store": store, "rank": 2, "curvature_rank": 20, "eigen_bytes": 40, "coarse": {"dim": 32, "queries": 8},
        "compute": {"shard_bytes": 8_000},
    }  # fmt: skip
    return BuildConfig(**(settings | changes))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    torch.manual_seed(0)
    low = torch.randn(24, 184) * torch.linspace(2, 0.1, 24)[:, None]
    return torch.randn(N + MORE, 24) @ low + 0.1 * torch.randn(N + MORE, 184)


@pytest.fixture(scope="module")
def query(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return query_of(rows[:5] + 0.3 * torch.randn(5, 184))


@pytest.fixture(scope="module", params=STORES)
def made(request: pytest.FixtureRequest, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "i"
    payloads = [{"number": i} for i in range(N)]
    Index.build(folder, gradients=blocks(rows[:N]), config=config(request.param), payloads=payloads).close()
    return folder


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Index:
    shutil.copytree(made, tmp_path / "i")
    return Index.open(tmp_path / "i")


def alike(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for the rounding of float32 sums, which are grouped as files and batches are cut."""
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def assert_found(index: Index, whole: Index, rows: torch.Tensor, exact: bool) -> None:
    """Rows that were added are found, also through the coarse index, with their payloads."""
    asked = query_of(rows[N : N + 20])
    hits, scores = index.search(asked, k=5, exact=exact, recall=0.999), whole.scores(asked)
    assert share_of_best(hits, scores, within=2e-5) > 0.97 and (hits.ids >= N).sum() >= 20
    if hits.payloads is not None:
        assert [[p["number"] for p in row] for row in hits.payloads] == hits.ids.tolist()


@pytest.fixture(scope="module")
def whole(made: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Built at once of all rows, with the same fit."""
    return Index.build(tmp_path_factory.mktemp("whole") / "i", gradients=blocks(rows), fit=made)


# -- adding ----------------------------------------------------------------------------------------------------------


def test_add_then_search_is_build_at_once(index: Index, whole: Index, rows: torch.Tensor, query: Any) -> None:
    before = index.generation
    ids = index.add(gradients=blocks(rows[N:]), payloads=[{"number": N + i} for i in range(MORE)])
    assert ids.tolist() == list(range(N, N + MORE)) and index.generation > before
    assert len(index) == N + MORE and index.ids.tolist() == list(range(N + MORE))
    alike(index.scores(query), whole.scores(query))
    alike(index.self_influence(), whole.self_influence())
    for exact in (True, False):
        assert_found(index, whole, rows, exact)
    again = Index.open(index.path)
    alike(again.scores(query), whole.scores(query))
    again.verify()


@ONE
def test_the_curvatures_age_is_told(index: Index, rows: torch.Tensor) -> None:
    assert index.curvature_age == {"new_rows": 0, "rows": N, "new_trace": 0.0, "removed": 0}
    index.add(gradients=blocks(rows[N:]))
    age = index.curvature_age
    share = float(rows[N:].double().square().sum() / rows.double().square().sum())
    assert age["new_rows"] == MORE and age["new_trace"] == pytest.approx(share, rel=1e-5)


def test_an_interrupted_addition_goes_on(index: Index, whole: Index, rows: torch.Tensor, query: Any) -> None:
    seen = 0

    def stop(event: Any) -> None:
        nonlocal seen
        seen = max(seen, event.done)
        if event.stage == "encode" and event.done >= 128:
            raise KeyboardInterrupt

    generation = index.generation
    small = {"compute": {"shard_bytes": 2_000}}
    shutil.rmtree(index.path)
    made = Index.build(index.path, gradients=blocks(rows[:N]), config=config(whole.config.store, **small))
    generation = made.generation
    with pytest.raises(KeyboardInterrupt):
        made.add(gradients=blocks(rows[N:]), progress=stop)
    assert made.generation == generation and len(made) == N == len(Index.open(index.path))
    assert (index.path / "adding.json").exists()
    begun: list[int] = []
    made.add(gradients=blocks(rows[N:]), progress=lambda e: begun.append(e.total or 0) if e.stage == "encode" else None)
    assert min(begun) < MORE, "sealed shards were not encoded again"
    assert not (index.path / "adding.json").exists()
    alike(made.scores(query), whole.scores(query))
    made.verify()


def test_another_addition_drops_what_was_interrupted(index: Index, rows: torch.Tensor) -> None:
    def stop(event: Any) -> None:
        if event.stage == "encode" and event.done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add(gradients=blocks(rows[N:]), progress=stop)
    assert index.add(gradients=blocks(rows[N : N + 10])).tolist() == list(range(N, N + 10))
    assert len(index) == N + 10
    index.verify()


@ONE
def test_what_a_kill_right_after_a_commit_leaves_is_cleared_away(index: Index, rows: torch.Tensor) -> None:
    """Unfinished manifests name files, which must not outlive the rows that are removed from the index."""
    shutil.copy(index.path / "manifest.json", index.path / "building.json")

    def stop(event: Any) -> None:
        if event.stage == "encode" and event.done >= 128:
            raise KeyboardInterrupt

    def named() -> set[str]:
        return {shard.info.sealed.file for shard in reader_of(index).store.shards}

    with pytest.raises(KeyboardInterrupt):
        index.add(gradients=blocks(rows[N:]), progress=stop)
    old = named()
    index.remove(range(0, N, 2))
    index.compact()
    left = {path.name for path in index.path.iterdir()}
    assert not left & {"building.json", "adding.json"}
    assert {name for name in left if name.startswith("shard-")} == named() and not named() & old
    # Small shards are joined.
    for start in range(N, N + 40, 10):
        index.add(gradients=blocks(rows[start : start + 10]))
    scores, several = index.scores(query_of(rows[:3])), len(named())
    index.compact()
    assert len(named()) < several
    alike(index.scores(query_of(rows[:3])), scores)
    generation = index.generation
    index.compact()
    assert index.generation == generation, "nothing to do"
    assert len(index) == N // 2 + 40
    index.verify()


@ONE
def test_memory_does_not_grow(index: Index, query: Any) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cycle(times: int) -> None:
        for _ in range(times):
            with Index.open(index.path) as opened:
                opened.search(query, exact=False)
                opened.scores(query)
                opened.refresh()

    cycle(10)
    before = resident()
    cycle(40)
    assert resident() - before < 24 << 20


@ONE
def test_bad_additions_leave_the_index_as_it_was(index: Index, rows: torch.Tensor) -> None:
    digest, files = index.fingerprint, sorted(p.name for p in index.path.iterdir())
    bad = rows[N:].clone()
    bad[3, 7] = float("nan")
    for arguments, error in (
        ({}, DataError),
        ({"data": torch.zeros(3, 2)}, DataError),
        ({"gradients": []}, DataError),
        ({"gradients": [{"a": torch.zeros(2, 12, 10)}]}, DataError),
        ({"gradients": [{"a": torch.zeros(2, 3, 10), "b": torch.zeros(2, 8, 8)}]}, DataError),
        ({"gradients": blocks(bad)}, NonFiniteError),
        ({"gradients": blocks(rows[N:]), "payloads": [1]}, DataError),
        ({"gradients": blocks(rows[N:]), "payloads": [object()] * MORE}, DataError),
    ):
        with pytest.raises(error):
            index.add(**arguments)
    assert len(Index.open(index.path)) == N and index.fingerprint == digest
    index.remove([0])
    assert {p.name for p in index.path.iterdir()} - {"writer.lock"} <= {*files, "removed-000000.h5"} | {
        p.name for p in index.path.glob("removed-*")
    }


def test_an_addition_from_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(90, 6), torch.randint(0, 3, (90,))
    first = Index.build(tmp_path / "i", model=model, data=(x[:60], y[:60]))
    first.add((x[60:], y[60:]))
    whole = Index.build(tmp_path / "whole", model=model, data=(x, y), fit=first)
    alike(first.scores((x[:4], y[:4])), whole.scores((x[:4], y[:4])))
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(FingerprintError, match="model"):
        first.add((x, y))
    with pytest.raises(DataError, match="needs the index's model"):
        Index.open(tmp_path / "i").add((x, y))


# -- removing --------------------------------------------------------------------------------------------------------


def test_removed_examples_are_never_answered_with(index: Index, rows: torch.Tensor, query: Any) -> None:
    before = index.scores(query)
    own = index.self_influence()
    best = index.search(query, k=30, exact=True).ids
    gone = np.unique(best[:, :10])
    assert index.remove(gone) == len(gone) and len(index) == N - len(gone)
    kept = np.setdiff1d(np.arange(N), gone)
    assert np.array_equal(index.ids, kept)
    alike(index.scores(query), before[:, kept])
    alike(index.self_influence(), own[kept])
    for k in (1, 20, N):
        for exact in (True, False):
            hits = index.search(query, k=k, exact=exact, recall=0.999)
            assert not np.isin(hits.ids, gone).any() and hits.ids.shape == (5, min(k, len(kept)))
            assert share_of_best(hits, before[:, kept], kept, within=2e-5) > (0.999 if exact else 0.9)
    assert not np.isin(index.search(query, k=20, opponents=True).ids, gone).any()
    assert not np.isin(index.search(query, k=20, normalize="relatif").ids, gone).any()
    assert not np.isin(index.search(query, k=20, rescore=False).ids, gone).any()
    with pytest.raises(QueryError, match=f"no row with id {gone[0]}"):
        index.remove([gone[0]])
    with pytest.raises(QueryError):
        index.payloads([int(gone[0])])


@ONE
@pytest.mark.parametrize(
    "ids", [[5, 5, 7], np.array([5, 7], dtype=np.int32), range(5, 8, 2), lambda: (i for i in (7, 5))]
)
def test_ids_to_remove_in_any_form(index: Index, ids: Any) -> None:
    assert index.remove(ids() if callable(ids) else ids) == 2
    assert index.remove([]) == 0


@ONE
@pytest.mark.parametrize("ids", [[-1], [N], [0.5], ["0"], [[1, 2]], range(N)])
def test_ids_that_cannot_be_removed(index: Index, ids: Any) -> None:
    with pytest.raises(QueryError):
        index.remove(ids)
    assert len(Index.open(index.path)) == N


def folder_holds(folder: Path, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in folder.iterdir() if path.is_file())


def test_compaction_takes_the_bytes_away(index: Index, rows: torch.Tensor, query: Any) -> None:
    reader = reader_of(index)
    calibration = reader.queries
    assert calibration is not None
    victim = int(calibration.ids()[0])
    asked = next(iter(calibration.gradients().values()))[0]
    # As they are kept.
    needles = [asked.bfloat16().view(torch.int16).numpy().tobytes()]
    needles.append(reader.store.gather(np.array([victim])).numpy().tobytes())
    needles.append(b'{"number":%d}' % victim)
    assert all(folder_holds(index.path, needle) for needle in needles)
    index.remove([victim, *range(0, N, 3)] if victim % 3 else range(0, N, 3))
    scores, ids = index.scores(query), index.ids
    freed = index.compact()
    assert freed["bytes"] > 0 and freed["held"] == []
    assert not any(folder_holds(index.path, needle) for needle in needles)
    assert np.array_equal(index.ids, ids) and index.curvature_age["removed"] == 0
    alike(index.scores(query), scores)
    again = index.search(query, k=7, exact=False)
    assert share_of_best(again, scores, ids, within=2e-5) > 0.9
    assert not list(index.path.glob("removed-*")) and not list(index.path.glob("retired-*"))
    index.verify()
    new = index.add(gradients=blocks(rows[N : N + 2]))
    assert new.tolist() == [N, N + 1], "ids are never given twice"
    assert index.payloads([1, N]) == [{"number": 1}, None]


# -- renewing --------------------------------------------------------------------------------------------------------


def test_refit_of_factors_is_a_build_with_their_curvature(rows: torch.Tensor, query: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sample": {"rows": "stored"}, "store": "factors", "rank": None, "dtype": "float32"}
    settings |= {"coarse": None}
    index = Index.build(tmp_path / "i", gradients=blocks(rows[:600]), config=config(**settings))
    index.add(gradients=blocks(rows[600:N]))
    gone = np.arange(0, N, 7)
    index.remove(gone)
    report = index.refit()
    assert report == {"renewed": ["curvature"], "kept": {}}
    assert index.curvature_age["new_rows"] == 0
    kept = np.setdiff1d(np.arange(N), gone)
    anew = Index.build(tmp_path / "anew", gradients=blocks(rows[:N][torch.from_numpy(kept)]), config=config(**settings))
    expected = anew.scores(query)
    np.testing.assert_allclose(index.scores(query), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_refit_renews_what_it_can_and_says_what_not(index: Index, rows: torch.Tensor, query: Any) -> None:
    before = index.scores(query)
    index.add(gradients=blocks(rows[N:]))
    index.remove(range(100))
    report = index.refit()
    store = index.codec
    assert ("curvature" in report["renewed"]) == (store == "factors")
    assert ("curvature" in report["kept"]) == (store != "factors")
    assert "coarse" in report["renewed"]
    assert index.curvature_age["new_rows"] == (0 if store == "factors" else MORE)
    if store != "factors":
        alike(index.scores(query)[:, : N - 100], before[:, 100:])
    asked = query_of(rows[N : N + 20])
    assert share_of_best(index.search(asked, k=5, exact=False, recall=0.999), index.scores(asked), index.ids) > 0.95
    assert not np.isin(np.arange(100), reader_of(index).queries.ids()).any()  # type: ignore[union-attr]
    index.verify()
    assert not list(index.path.glob("retired-*"))


# -- merging ---------------------------------------------------------------------------------------------------------


def test_merged_indexes_of_one_fit_are_a_build_at_once(
    index: Index, whole: Index, rows: torch.Tensor, query: Any, tmp_path: Path
) -> None:
    other = Index.build(tmp_path / "other", gradients=blocks(rows[N:]), fit=index.path, payloads=["x"] * MORE)
    other.remove([1])
    merged = Index.merge(tmp_path / "merged", [index, other.path])
    keep = np.setdiff1d(np.arange(N + MORE), [N + 1])
    assert np.array_equal(merged.ids, keep)
    alike(merged.scores(query), whole.scores(query)[:, keep])
    assert merged.payloads([3, N + 2]) == [{"number": 3}, "x"]
    asked = query_of(rows[N : N + 20])
    assert share_of_best(merged.search(asked, k=5, exact=False, recall=0.999), merged.scores(asked), merged.ids) > 0.95
    merged.compact()
    alike(merged.scores(query), whole.scores(query)[:, keep])
    assert merged.add(gradients=blocks(rows[:1])).tolist() == [N + MORE]
    Index.open(merged.path).verify()


@ONE
def test_what_cannot_be_merged(index: Index, rows: torch.Tensor, tmp_path: Path) -> None:
    other = Index.build(tmp_path / "other", gradients=blocks(rows[N:]), config=index.config)
    with pytest.raises(FingerprintError, match="curvature"):
        Index.merge(tmp_path / "merged", [index, other])
    with pytest.raises(ConfigError, match="at least two"):
        Index.merge(tmp_path / "merged", [index])
    with pytest.raises(IndexExistsError):
        Index.merge(other.path, [index, index])
    assert not (tmp_path / "merged").exists()
    with pytest.raises(FingerprintError, match="config"):
        Index.build(tmp_path / "third", gradients=blocks(rows[:9]), fit=index, config=config("factors", rank=1, seed=3))


# -- one writer, many readers ----------------------------------------------------------------------------------------


def test_readers_keep_what_they_opened(index: Index, rows: torch.Tensor, query: Any) -> None:
    reader = Index.open(index.path)
    before = reader.scores(query)
    late = Index.open(index.path)
    index.remove(range(0, N, 2))
    index.add(gradients=blocks(rows[N:]))
    held = index.compact()["held"]
    assert held, "files of the version that is being read stay"
    np.testing.assert_array_equal(reader.scores(query), before)
    np.testing.assert_array_equal(late.scores(query), before)
    assert late.search(query, k=9, exact=False).ids.max() < N
    assert reader.refresh() and not reader.refresh()
    alike(reader.scores(query), index.scores(query))
    late.close()
    reader.close()
    index.remove([1])
    assert not list(index.path.glob("retired-*"))


@ONE
def test_there_is_one_writer(index: Index, rows: torch.Tensor) -> None:
    with WriterLock(index.path), pytest.raises(LockedError, match=f'"pid": {os.getpid()}'):
        index.remove([1])
    index.remove([1])


@ONE
def test_a_lock_dies_with_its_process(index: Index) -> None:
    pid = os.fork()
    if not pid:
        WriterLock(index.path).acquire()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert index.remove([1]) == 1


@ONE
def test_searches_go_on_while_the_index_is_changed(index: Index, rows: torch.Tensor, query: Any) -> None:
    """One Index object, searched by threads while another thread changes it: every answer is of one version."""
    truth = {index.generation: index.search(query, k=10).ids}
    errors: list[BaseException] = []
    answers: list[np.ndarray] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(index.search(query, k=10).ids)
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        index.remove(index.search(query, k=2).ids.ravel())
        truth[index.generation] = index.search(query, k=10).ids
        index.add(gradients=blocks(rows[:20]))
        truth[index.generation] = index.search(query, k=10).ids
        index.compact()
        truth[index.generation] = index.search(query, k=10).ids
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and answers
    known = {ids.tobytes() for ids in truth.values()}
    assert all(answer.tobytes() in known for answer in answers)


@ONE
def test_file_handles_do_not_leak(index: Index, rows: torch.Tensor, query: Any) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    index.search(query, exact=False)
    before = handles()
    for i in range(5):
        other = Index.open(index.path)
        other.search(query, exact=False)
        other.close()
        index.add(gradients=blocks(rows[i : i + 2]))
        index.remove([N + 2 * i])
        index.search(query, exact=False)
    index.compact()
    index.search(query, exact=False)
    assert handles() <= before + 12  # the added shards' own, at most


def test_skipping_damaged_shards(index: Index, query: Any) -> None:
    before = index.scores(query)
    shard = reader_of(index).store.shards[1].info
    path = index.path / shard.sealed.file
    raw = bytearray(path.read_bytes())
    raw[shard.sealed.offsets["ids"]] ^= 1
    index.close()
    path.write_bytes(raw)
    with pytest.raises(CorruptionError, match=f"examples {shard.first_id} to {shard.last_id}, {shard.rows} of them"):
        Index.open(index.path).verify()
    with pytest.raises(CorruptionError):
        Index.open(index.path).scores(query)
    with Index.open(index.path, damaged="skip") as lame:
        gone = np.arange(shard.first_id, shard.last_id + 1)
        assert len(lame) == N - shard.rows and not np.isin(gone, lame.ids).any()
        kept = np.setdiff1d(np.arange(N), gone)
        alike(lame.scores(query), before[:, kept])
        hits = lame.search(query, k=10, exact=False)
        assert hits.stats.skipped == shard.rows and not np.isin(hits.ids, gone).any()
        with pytest.raises(StoreError, match="repair"):
            lame.compact()


def test_repair_drops_what_is_damaged_and_keeps_it_aside(index: Index, rows: torch.Tensor, query: Any) -> None:
    before = index.scores(query)
    reader = reader_of(index)
    shard, coarse = reader.store.shards[1].info, reader.manifest.coarse
    assert coarse is not None
    index.close()
    for name in (shard.sealed.file, coarse["file"]["file"]):
        path = index.path / name
        path.write_bytes(path.read_bytes()[:-1])
    done = Index.repair(index.path)
    assert done["dropped"] == [
        {"file": shard.sealed.file, "rows": shard.rows, "first_id": shard.first_id, "last_id": shard.last_id}
    ]
    assert "coarse" in done["rebuilt"] and (index.path / f"damaged-{shard.sealed.file}.kept").exists()
    mended = Index.open(index.path)
    mended.verify()
    kept = np.setdiff1d(np.arange(N), np.arange(shard.first_id, shard.last_id + 1))
    alike(mended.scores(query), before[:, kept])
    assert mended.search(query, k=5, exact=False).ids.shape == (5, 5)
    assert mended.add(gradients=blocks(rows[N:])).tolist() == list(range(N, N + MORE))
    assert Index.repair(index.path) == {"dropped": [], "rebuilt": []}
    assert (index.path / f"damaged-{shard.sealed.file}.kept").exists(), "nothing that was set aside is cleared away"


@pytest.fixture(scope="module", params=["factors", "eigen", "sparse"])
def projected_in(request: pytest.FixtureRequest, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of every kind of file: its projections were learnt, and rows were removed."""
    folder = tmp_path_factory.mktemp(f"projected-{request.param}") / "i"
    kind = {"store": "eigen", "eigen_bytes": 17} if request.param == "sparse" else {"store": request.param}
    chosen = config(**kind, projection_dim=7, curvature_rank=24)
    with Index.build(folder, gradients=blocks(rows[:N]), config=chosen) as index:
        index.remove([5])
    return folder


HOPELESS = {
    "projections": "cannot be fitted without the model",
    "curvature": "rows are written in the directions",
    "codec": "what rows mean",
    "removed": "which examples were removed",
}


@pytest.mark.parametrize("what", ["projections", "curvature", "codec", "removed", "sketch", "queries", "coarse"])
def test_repair_of_every_kind_of_file(projected_in: Path, tmp_path: Path, query: Any, what: str) -> None:
    """What can be fitted on the rows is fitted anew; of what cannot, the index is left as it was."""
    folder = tmp_path / "i"
    shutil.copytree(projected_in, folder)
    with Index.open(folder) as index:
        scores, codec, files = index.scores(query), index.codec, reader_of(index).manifest.files()
    if what not in files:
        assert (codec, what) == ("factors", "codec")
        return
    path = folder / files[what].file
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    if what in HOPELESS and (codec, what) != ("factors", "curvature"):
        with pytest.raises(CorruptionError, match=f"repair cannot help: .*{HOPELESS[what]}"):
            Index.repair(folder)
        path.write_bytes(raw)
        Index.open(folder).verify()
        return
    done = Index.repair(folder)
    assert done["dropped"] == [] and what in done["rebuilt"]
    assert ("coarse" in done["rebuilt"]) == (what in ("sketch", "coarse"))
    assert (folder / f"damaged-{path.name}.kept").read_bytes() != raw
    with Index.open(folder) as mended:
        mended.verify()
        if what != "curvature":
            np.testing.assert_array_equal(mended.scores(query), scores)
        hits = mended.search(query, k=5, exact=False, recall=0.999)
        assert "never calibrated" not in hits.stats.plan
        assert share_of_best(hits, mended.scores(query), mended.ids, within=2e-5) > 0.9
    assert Index.repair(folder) == {"dropped": [], "rebuilt": []}


def test_repair_of_all_that_can_be_made_anew(projected_in: Path, tmp_path: Path, query: Any) -> None:
    folder = tmp_path / "i"
    shutil.copytree(projected_in, folder)
    with Index.open(folder) as index:
        files, shards = reader_of(index).manifest.files(), reader_of(index).manifest.shards
    for name in (*(files[what].file for what in ("sketch", "queries", "coarse")), shards[2].sealed.file):
        (folder / name).unlink()
    done = Index.repair(folder)
    assert {"sketch", "queries", "coarse"} == set(done["rebuilt"]) and done["dropped"][0]["rows"] == shards[2].rows
    with Index.open(folder) as mended:
        mended.verify()
        assert len(mended) == N - 1 - shards[2].rows
        hits = mended.search(query, k=5, exact=False, recall=0.999)
        assert share_of_best(hits, mended.scores(query), mended.ids, within=2e-5) > 0.9


@pytest.mark.skipif(not faiss_is_installed(), reason="needs faiss")
@pytest.mark.parametrize("change", [lambda index: index.refit(), lambda index: index.rebuild_coarse()])
def test_a_coarse_index_trained_again_leaves_the_old_one_whole(
    index: Index, rows: torch.Tensor, query: Any, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    """It is of the same rows, and would have the same name; until it is committed the old version needs its own."""
    index.add(gradients=blocks(rows[N:]))
    with Index.open(index.path) as reader:
        before = index.search(query, k=9, exact=False)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("lorif_index.build.candidates._calibrate", stop)
            with pytest.raises(KeyboardInterrupt):
                change(index)
        with Index.open(index.path) as again:
            again.verify()
            assert_same_hits(again.search(query, k=9, exact=False), before)
        change(index)
        index.verify()
        # Readers keep what they opened.
        assert_same_hits(reader.search(query, k=9, exact=False), before)

"""The coarse stage: candidates scored as by a scan, recall as asked and as estimated, files that cannot be stale."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_hits, forge, reader_of, share_of_best

pytest.importorskip("faiss")

from lorif_index import BuildConfig, CoarseIndex, Hits, Index
from lorif_index.build import candidates
from lorif_index.build.candidates import COARSE_FROM, TILTS
from lorif_index.codecs.base import Transformed
from lorif_index.errors import ConfigError, CorruptionError, FingerprintError, LorifError, QueryError
from lorif_index.search.planner import SCAN_UP_TO
from lorif_index.search.proposers import FlatSketch
from lorif_index.search.reader import Reader
from lorif_index.search.scoring import Question

SHAPES = {"a": (12, 10), "b": (10, 10), "c": (9, 14)}
N = 2000
COARSE = CoarseIndex(dim=64, queries=48)


def gradients(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Sums of a few position products with a falling spectrum, like those of a sequence; layers share their causes."""
    rng = np.random.default_rng(seed)
    mixes = np.random.default_rng(1)
    causes = rng.standard_normal((n, 40)) * 0.93 ** np.arange(40)
    out = {}
    for name, (a, b) in SHAPES.items():
        left, right = mixes.standard_normal((3, 40, a)), mixes.standard_normal((3, 40, b))
        g = sum(
            np.einsum("ni,nj->nij", causes @ left[m], (causes + 0.3 * rng.standard_normal((n, 40))) @ right[m])
            for m in range(3)
        )
        out[name] = torch.from_numpy(g + 0.5 * rng.standard_normal((n, a, b))).float()
    return out


def blocks(g: dict[str, torch.Tensor], size: int = 500) -> list[dict[str, torch.Tensor]]:
    count = len(next(iter(g.values())))
    return [{k: v[i : i + size] for k, v in g.items()} for i in range(0, count, size)]


def config(**changes: Any) -> BuildConfig:
    small = {"curvature_rank": 60, "compute": {"shard_bytes": 1 << 18}, "coarse": COARSE}
    return BuildConfig(**(small | changes))


@pytest.fixture(scope="module")
def train() -> dict[str, torch.Tensor]:
    return gradients(N)


@pytest.fixture(scope="module")
def query() -> dict[str, torch.Tensor]:
    return gradients(60, seed=5)


@pytest.fixture(scope="module", params=["factors", "eigen"])
def index(request: pytest.FixtureRequest, train: Any, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.build(
        tmp_path_factory.mktemp(request.param) / "i", gradients=blocks(train), config=config(store=request.param)
    )


def assert_scored(hits: Hits, scores: np.ndarray) -> None:
    """Rescored hits have the scan's scores."""
    wanted = np.take_along_axis(scores, hits.ids, axis=1)
    np.testing.assert_allclose(hits.scores, wanted, rtol=0, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_candidates_score_as_a_scan_and_reach_the_recall(index: Index, query: Any, k: int, opponents: bool) -> None:
    scores = index.scores(query)
    for wanted in (0.9, 0.99):
        hits = index.search(query, k=k, recall=wanted, exact=False, opponents=opponents)
        assert not hits.stats.exact and hits.stats.recall == wanted
        assert_scored(hits, scores)
        assert (np.diff(hits.scores, axis=1) * (-1 if opponents else 1) <= 0).all()
        assert all(len(set(row)) == k for row in hits.ids.tolist())
        # 60 queries: one miss of a single answer is .017, three standard errors of ten answers are .05.
        got = share_of_best(hits, scores, opponents=opponents)
        assert got >= wanted - 0.06 or hits.stats.estimated_recall <= got + 0.03
        stats = hits.stats
        assert 0 < stats.candidates <= N and len(stats.recall_by_query) == 60
        assert set(stats.seconds) >= {"gradients", "transform", "coarse", "gather", "rescore", "check"}


def test_one_by_one_is_the_same_as_together(index: Index, query: Any) -> None:
    together = index.search(query, k=8, exact=False)
    for i in (0, 7, 33):
        alone = index.search({name: g[i : i + 1] for name, g in query.items()}, k=8, exact=False)
        assert_same_hits(alone, SimpleNamespace(ids=together.ids[i : i + 1], scores=together.scores[i : i + 1]))


def test_large_batches_are_answered_in_parts(index: Index) -> None:
    many = gradients(300, seed=11)
    hits = index.search(many, k=3, exact=False)
    assert hits.ids.shape == (300, 3) and share_of_best(hits, index.scores(many)) > 0.97


def asked_of(reader: Reader, query: dict[str, torch.Tensor]) -> Question:
    made = reader.preconditioners(reader.specs, reader.policy())
    return reader.ask(Transformed.of(query, made, reader.curvature))


def coordinates_of(index: Index) -> np.ndarray:
    """z (n, k) of all rows."""
    reader = reader_of(index)
    assert reader.sketch is not None
    return torch.cat(list(reader.rows.coordinates(reader.sketch))).numpy()


def test_a_target_that_is_not_reached_is_gone_on_for(index: Index, query: Any) -> None:
    """An index that believes it needs few candidates finds out, and takes more."""
    reader = reader_of(index)
    search = reader.candidates
    assert search is not None and search.calibration is not None
    question = asked_of(reader, query)
    few = search.run(question, 10, 0.0, largest=True, wide=20)
    more = search.run(question, 10, 0.99, largest=True, wide=20)
    scores = index.scores(query)
    assert more.candidates.mean() > few.candidates.mean()
    found = [share_of_best(SimpleNamespace(ids=part.positions), scores) for part in (few, more)]
    assert found[1] > found[0] and few.recall.mean() < 0.99 and found[0] < 0.99


def test_another_damping_still_works_and_the_estimate_knows(index: Index, query: Any) -> None:
    assert "calibrated under" not in index.search(query, k=10, exact=False, damping=index.damping).stats.plan
    for damping in (0.01, 3.0):
        scores = index.scores(query, damping=damping)
        hits = index.search(query, k=10, exact=False, damping=damping)
        assert_scored(hits, scores)
        got = share_of_best(hits, scores)
        assert got >= 0.95 or hits.stats.estimated_recall < got + 0.05
        assert "calibrated under" in hits.stats.plan


def test_searches_in_several_threads_do_not_mix(index: Index, query: Any) -> None:
    """Dampings, signs and ways, all at once in one opened index: each answer is the one it would be alone."""
    asks = [
        {"damping": damping, "opponents": opponents, "exact": exact}
        for damping in (0.01, 0.1, 1.0)
        for opponents in (False, True)
        for exact in (False, True)
    ]
    parts = [{name: g[i : i + 3] for name, g in query.items()} for i in range(0, 12, 3)]
    jobs = [(part, ask) for ask in asks for part in parts]
    alone = [index.search(part, k=5, **ask) for part, ask in jobs]
    opened = Index.open(index.path)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: opened.search(job[0], k=5, **job[1]), jobs))
    for one, other in zip(alone, together, strict=True):
        assert_same_hits(other, one)


def test_layer_subsets_scan_and_say_so(index: Index, query: Any) -> None:
    hits = index.search(query, k=5, layers="a", exact=False)
    scores = index.scores(query, layers="a")
    assert_scored(hits, scores)
    planned = index.search(query, k=5, layers="a")
    assert planned.stats.exact and share_of_best(planned, scores) == 1.0


def test_coarse_scores_alone_are_marked(index: Index, query: Any) -> None:
    hits = index.search(query, k=10, rescore=False)
    assert hits.stats.approximate and hits.stats.candidates == 0 and hits.stats.bytes_read == 0
    got = share_of_best(hits, index.scores(query))
    assert 0.1 < got < 1 and abs(hits.stats.estimated_recall - got) < 0.15
    x = asked_of(reader_of(index), query).x
    assert x is not None
    near = np.take_along_axis(x.numpy() @ coordinates_of(index).T, hits.ids, axis=1)
    assert np.corrcoef(near.ravel(), hits.scores.ravel())[0, 1] > 0.9


def test_large_rows_are_given_the_benefit_of_the_doubt(index: Index, query: Any) -> None:
    """A tilted order is <x, z> + tilt |x| |z|, in the coarse index as on a device."""
    z, reader = coordinates_of(index), reader_of(index)
    x, coarse = asked_of(reader, query).x, reader.coarse
    assert x is not None and coarse is not None and coarse.tilts
    asked, norms = x.numpy(), np.linalg.norm(z, axis=1)
    for tilt in (0.0, 0.05, 0.5):
        expected = asked @ z.T + tilt * np.linalg.norm(asked, axis=1)[:, None] * norms
        largest, best = np.abs(expected).max(), np.sort(expected, axis=1)[:, ::-1][:, :50]
        # Also scales beyond those of half precision.
        for scale in (1.0, 1e-7, 1e7):
            flat = FlatSketch([torch.from_numpy(scale * z)], N, z.shape[1], torch.device("cpu"))
            positions, scores = flat.search(asked, 50, tilt)
            assert np.abs(scores / scale - np.take_along_axis(expected, positions, 1)).max() < 2e-3 * largest
            assert np.abs(scores / scale - best).max() < 2e-3 * largest
        positions, scores = coarse.search(asked, N, tilt)
        assert np.corrcoef(scores.ravel(), np.take_along_axis(expected, positions, 1).ravel())[0, 1] > 0.9
    tilts = [reader.candidates.calibration.orders[s].tilt for s in ("proponents", "opponents")]  # type: ignore[union-attr]
    assert all(t in TILTS for t in tilts)


def test_a_tilt_that_helps_is_found(tmp_path: Path) -> None:
    """Rows of very different sizes, whose codes leave much out: opponents are found sooner with a tilt."""
    train, query = gradients(3000, seed=2), gradients(60, seed=6)
    sizes = torch.from_numpy(np.exp(0.6 * np.random.default_rng(3).standard_normal(3000))).float()
    train = {name: g * sizes[:, None, None] for name, g in train.items()}
    index = Index.build(
        tmp_path / "i", gradients=blocks(train), config=config(coarse={"dim": 32, "queries": 48}, sample=1500)
    )
    search = reader_of(index).candidates
    assert search is not None and search.calibration is not None
    assert search.calibration.orders["opponents"].tilt > 0
    hits = index.search(query, k=10, recall=0.95, exact=False, opponents=True)
    assert share_of_best(hits, index.scores(query), opponents=True) >= 0.93


def test_plans_say_why(index: Index, query: Any) -> None:
    assert N <= SCAN_UP_TO and "quick enough" in index.search(query).stats.plan
    assert index.search(query).stats.exact and index.search(query).stats.estimated_recall == 1.0
    assert "exact=True" in index.search(query, exact=True).stats.plan
    assert "exact=False" in index.search(query, exact=False).stats.plan
    assert "recall=1" in index.search(query, recall=1.0).stats.plan
    for bad in (0, -0.1, 1.5, True, "0.9"):
        with pytest.raises(QueryError, match="recall"):
            index.search(query, recall=bad)  # type: ignore[arg-type]
    with pytest.raises(QueryError, match="exact=True"):
        index.search(query, exact=True, rescore=False)


def test_beyond_the_size_of_a_quick_scan_candidates_are_chosen(
    index: Index, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorif_index.search.planner.SCAN_UP_TO", 0)
    costly = index.search(query, k=1, recall=0.8)
    assert costly.stats.exact and "cost as much" in costly.stats.plan
    monkeypatch.setattr("lorif_index.search.planner._GATHER_BYTES", 0)
    hits = index.search(query, k=1, recall=0.8)
    assert not hits.stats.exact and "candidates" in hits.stats.plan
    layers = index.search(query, layers="a")
    assert layers.stats.exact and "all layers" in layers.stats.plan
    everything = index.search(query, k=N)
    assert everything.stats.exact and "no number of candidates" in everything.stats.plan


def test_what_was_never_calibrated_is_a_guess_that_says_so(train: Any, query: Any, tmp_path: Path) -> None:
    index = Index.build(tmp_path / "i", gradients=blocks(train), config=config(coarse={"dim": 64, "queries": 0}))
    hits = index.search(query, k=10, exact=False)
    assert "never calibrated" in hits.stats.plan and share_of_best(hits, index.scores(query)) > 0.95
    alone = index.search(query, k=10, rescore=False)
    assert np.isnan(alone.stats.estimated_recall)
    index.rebuild_coarse(query=query)
    assert "never calibrated" not in Index.open(tmp_path / "i").search(query, k=10, exact=False).stats.plan


def test_what_it_is_is_told(index: Index) -> None:
    assert index.coarse is not None and index.coarse["dim"] == 64
    assert f"{index.coarse['kind']} on 64 coordinates" in repr(index)
    assert f"{index.coarse['kind']} on 64 coordinates" in index._repr_html_()


def test_small_and_unwanted_indexes_have_none(train: Any, query: Any, tmp_path: Path) -> None:
    few = {name: g[: COARSE_FROM - 1] for name, g in train.items()}
    small = Index.build(tmp_path / "small", gradients=blocks(few), config=config())
    assert small.coarse is None and small.search(query).stats.exact
    assert "no coarse stage" in small.search(query).stats.plan
    with pytest.raises(QueryError, match="rebuild_coarse"):
        small.search(query, exact=False)
    with pytest.raises(QueryError, match="rebuild_coarse"):
        small.search(query, rescore=False)
    small.rebuild_coarse()
    assert not small.search(query, exact=False).stats.exact
    none = Index.build(tmp_path / "none", gradients=blocks(train), config=config(coarse=None, store="factors"))
    assert none.coarse is None and not list((tmp_path / "none").glob("sketch*"))
    none.rebuild_coarse()
    hits = none.search(query, k=10, exact=False)
    assert share_of_best(hits, none.scores(query)) > 0.95


def test_rebuilt_without_the_model(index: Index, query: Any, tmp_path: Path) -> None:
    shutil.copytree(index.path, tmp_path / "copy")
    copy = Index.open(tmp_path / "copy")
    before, scores = copy.search(query, k=5, exact=False), copy.scores(query)
    copy.rebuild_coarse()
    assert len(list((tmp_path / "copy").glob("coarse*"))) == 1
    assert np.array_equal(copy.scores(query), scores) and copy.fingerprint == index.fingerprint
    again = Index.open(tmp_path / "copy").search(query, k=5, exact=False)
    assert_same_hits(again, before)


def test_a_stale_coarse_index_is_never_used(index: Index, query: Any, tmp_path: Path) -> None:
    shutil.copytree(index.path, tmp_path / "copy")

    def change(data: Any) -> None:
        # Another damping of the sketch than the coarse index was made with.
        data["fits"]["sketch"]["lams"][0] *= 2

    forge(tmp_path / "copy", change)
    stale = Index.open(tmp_path / "copy")
    with pytest.raises(FingerprintError, match="rebuild_coarse"):
        stale.search(query, exact=False)
    assert stale.search(query, exact=True).stats.exact
    stale.rebuild_coarse()
    assert not stale.search(query, exact=False).stats.exact


@pytest.mark.parametrize("axis", [[1.0], [1.0, 0.0], ["a", 1.0], [float("inf"), 1.0], 3])
def test_a_damaged_axis_is_refused(index: Index, query: Any, tmp_path: Path, axis: Any) -> None:
    shutil.copytree(index.path, tmp_path / "copy")
    forge(tmp_path / "copy", lambda data: data["coarse"].update(axis=axis))
    with pytest.raises(LorifError):
        Index.open(tmp_path / "copy").search(query, exact=False)


def test_a_damaged_file_is_found_before_it_is_used(index: Index, query: Any, tmp_path: Path) -> None:
    for name, use in (
        ("coarse.h5", lambda found: found.search(query, exact=False)),
        ("sketch.h5", lambda found: found.search(query, exact=False)),
        ("queries.h5", lambda found: found.rebuild_coarse()),
    ):
        folder = tmp_path / name
        shutil.copytree(index.path, folder)
        path = folder / name
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=path.name):
            use(Index.open(folder))
        with pytest.raises(CorruptionError, match=path.name):
            Index.open(folder).verify()


def test_nothing_random_is_left_to_chance(index: Index, train: Any, query: Any, tmp_path: Path) -> None:
    again = Index.build(tmp_path / "i", gradients=blocks(train, 500), config=index.config)
    assert_same_hits(again.search(query, exact=False), index.search(query, exact=False))
    if index.codec == "factors":
        # Sums in blocks of another size differ in the last digit, which may move a coded coordinate to the next level,
        # and what is kept of the curvature to the next number of half precision.
        other = Index.build(tmp_path / "other", gradients=blocks(train, 333), config=index.config)
        assert_same_hits(other.search(query, exact=False), index.search(query, exact=False), within=1e-3)


class Stop(Exception):
    """What stops a build on its way."""


def stop_in(stage: str) -> Any:
    def stop(event: Any) -> None:
        if event.stage == stage and event.done:
            raise Stop

    return stop


@pytest.mark.parametrize("stage", ["sketch", "encode", "coarse", "calibration"])
def test_an_interrupted_build_goes_on(index: Index, train: Any, query: Any, tmp_path: Path, stage: str) -> None:
    """Stopped in any stage, the finished index answers as one built at once."""
    with pytest.raises(Stop):
        Index.build(tmp_path / "i", gradients=blocks(train), config=index.config, progress=stop_in(stage))
    with pytest.raises(LorifError, match="interrupted"):
        Index.open(tmp_path / "i")
    again = Index.build(tmp_path / "i", gradients=blocks(train), config=index.config)
    assert_same_hits(again.search(query, exact=False), index.search(query, exact=False))
    assert again.fingerprint == index.fingerprint
    # The lock is of whoever has changed an index.
    names = [{path.name for path in folder.iterdir()} for folder in (again.path, index.path)]
    assert names[0] == names[1]


@pytest.mark.parametrize("stage", ["encode", "coarse", "calibration"])
@pytest.mark.parametrize(
    "other",
    [{"kind": "flat"}, {"kind": "none"}, {"dim": 32}, {"queries": 20}, {"queries": 0}, {"sketch": "per-layer"}],
    ids=str,
)
def test_an_interrupted_build_goes_on_with_another_coarse_index(
    train: Any, query: Any, tmp_path: Path, stage: str, other: dict[str, Any]
) -> None:
    few = {name: g[:COARSE_FROM] for name, g in train.items()}
    with pytest.raises(Stop):
        Index.build(tmp_path / "i", gradients=blocks(few), config=config(), progress=stop_in(stage))
    changed = config(coarse=replace(COARSE, **other))
    resumed = Index.build(tmp_path / "i", gradients=blocks(few), config=changed)
    straight = Index.build(tmp_path / "straight", gradients=blocks(few), config=changed)
    assert resumed.config == changed and resumed.coarse == straight.coarse
    assert {path.name for path in resumed.path.iterdir()} == {path.name for path in straight.path.iterdir()}
    assert resumed.fingerprint == straight.fingerprint
    hits, wanted = (of.search(query, k=5, exact=None if "kind" in other else False) for of in (resumed, straight))
    assert_same_hits(hits, wanted)
    assert hits.stats.plan == wanted.stats.plan
    resumed.verify()


def test_without_faiss_everything_is_scanned(
    train: Any, query: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorif_index.build.candidates.faiss_is_installed", lambda: False)
    index = Index.build(tmp_path / "i", gradients=blocks(train), config=config())
    assert index.coarse is None and index.search(query).stats.exact
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"lorif-index\[cpu\]"):
        index.rebuild_coarse()


def test_flat_coordinates_propose_as_well(index: Index, query: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would hold, here on the CPU: the same rescored results, the exact order of coordinates."""
    monkeypatch.setattr("lorif_index.search.proposers._PAIRS", 60 * 700)  # several pieces
    # Room for the sketch, and for some or all of the rows beside it.
    monkeypatch.setattr("lorif_index.search.reader.room_on", lambda device: 2 * 64 * N)
    monkeypatch.setattr("lorif_index.search.rows.room_on", lambda device: 2 * 64 * N)
    held = Index.open(index.path, device="cpu")
    scores = index.scores(query)
    hits = held.search(query, k=10, exact=False)
    assert 0 < reader_of(index, torch.device("cpu")).rows.resident.kept <= N
    assert_scored(hits, scores)
    assert share_of_best(hits, scores) > 0.97
    x = asked_of(reader_of(index), query).x
    assert x is not None
    exact = np.sort(x.numpy() @ coordinates_of(index).T, axis=1)[:, ::-1][:, :10]
    near = held.search(query, k=10, rescore=False).scores
    assert np.abs(near - exact).max() < 2e-3 * np.abs(exact).max()


def test_a_gpu_gives_the_same_rescored_results(index: Index, query: Any) -> None:
    import faiss

    if not torch.cuda.is_available() or getattr(faiss, "get_num_gpus", lambda: 0)() < 1:
        pytest.skip("no GPU that faiss and torch both see")
    scores = Index.open(index.path, device="cpu").scores(query)
    for share in (1.0, 0.4):
        # All that fits, or room for a part of the rows.
        with pytest.MonkeyPatch.context() as patch:
            if share < 1:
                room = int(0.4 * N * index.bytes_per_example)
                patch.setattr("lorif_index.search.rows.room_on", lambda device: room)  # noqa: B023
            kept = reader_of(index, torch.device("cuda")).rows.resident.kept
            assert kept == N if share == 1 else 0 < kept < N
            held = Index.open(index.path, device="cuda")
            hits = held.search(query, k=10, exact=False)
            assert_scored(hits, scores)
            assert share_of_best(hits, scores) > 0.97
            np.testing.assert_allclose(held.scores(query), scores, rtol=0, atol=1e-5 * np.abs(scores).max())


def test_a_device_that_is_not_there_is_refused(index: Index) -> None:
    from lorif_index.search.devices import room_on, search_device

    assert search_device("cpu") == torch.device("cpu") and room_on(torch.device("cpu")) == 0
    for bad in ("cuda:99", "nonsense"):
        with pytest.raises(ConfigError, match="pass 'cpu'"):
            Index.open(index.path, device=bad)


def test_an_index_that_grows_gets_its_first_coarse_stage(
    train: Any, query: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the size on from which a build makes one; a merge, too."""
    count = len(next(iter(train.values())))
    first, rest = ({name: g[part] for name, g in train.items()} for part in (slice(0, 800), slice(800, None)))
    monkeypatch.setattr(candidates, "COARSE_FROM", count)
    small = Index.build(tmp_path / "small", gradients=blocks(first), config=config())
    assert small.coarse is None
    small.add(gradients=blocks({name: g[:10] for name, g in rest.items()}))
    assert small.coarse is None and small.search(query).stats.exact
    small.add(gradients=blocks({name: g[10:] for name, g in rest.items()}))
    assert small.coarse is not None and len(small) == count
    hits = small.search(query, k=10, exact=False)
    assert share_of_best(hits, small.scores(query)) > 0.9
    small.verify()
    for number, part in enumerate((first, rest)):
        Index.build(
            tmp_path / f"part-{number}", gradients=blocks(part), config=config(), fit=tmp_path / "small"
        ).close()
    merged = Index.merge(tmp_path / "merged", [tmp_path / "part-0", tmp_path / "part-1"])
    assert merged.coarse is not None and not merged.search(query, k=10, exact=False).stats.exact

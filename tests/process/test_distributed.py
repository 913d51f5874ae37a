"""Several ranks build and answer together what one process builds and answers; kills, hangs, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import assert_same_hits, reader_of
from distributed_job import (
    BACKENDS,
    COUNT,
    PATIENCE,
    answers,
    finish,
    loss,
    make_model,
    sequences,
    settings,
    start,
    together,
)

from lorif_index import Index
from lorif_index.build.spans import some_of, unsealed, without_overlaps
from lorif_index.errors import ConfigError, NotAnIndexError, StoreError
from lorif_index.linalg.sampling import drawn
from lorif_index.ranks import ALONE, Ranks
from lorif_index.storage.sealed import SealedInfo
from lorif_index.storage.shards import ShardInfo

KINDS = ["eigen", "factors"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    """Kind -> an index that one process has built, and what it answers."""
    found = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("alone") / kind
        model = make_model()
        config = settings(store=kind)
        with Index.build(path, model=model, data=sequences(), loss=loss, config=config, distributed=False) as index:
            found[kind] = path, answers(index, sequences()[:4])
    return found


def shards_in(folder: Path) -> list[Path]:
    """The sealed shards below a folder. Ranks that are at work remove temporary folders, which rglob stumbles over."""
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names if fnmatch(name, "shard-*.h5")]


def assert_same(found: Any, expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        if name.endswith(" ids"):
            scores = name.replace("ids", "scores")
            ours, theirs = (SimpleNamespace(ids=of[name], scores=of[scores]) for of in (found, expected))
            assert_same_hits(ours, theirs, tolerance)
        elif name == "ids":
            np.testing.assert_array_equal(found[name], wanted)
        elif name != "candidates":
            np.testing.assert_allclose(found[name], wanted, atol=tolerance * np.abs(wanted).max(), err_msg=name)


def shared(found: Any, wanted: np.ndarray) -> float:
    """The share of ids that are the same in each row."""
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(found, wanted, strict=True)]))


def exact(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what hangs on a coarse index, whose codebooks each build trains."""
    return {name: value for name, value in found.items() if "candidate" not in name}


@pytest.mark.parametrize(("size", "backend"), [(1, "cpu:gloo"), (2, "gloo"), (2, "cpu:gloo"), (4, "cpu:gloo")])
def test_with_one_fit_ranks_build_and_answer_the_same(size: int, backend: str, alone: Any, tmp_path: Path) -> None:
    fits = {kind: str(path) for kind, (path, _) in alone.items()}
    given = {"folder": str(tmp_path), "kinds": KINDS, "fits": fits}
    said = together(size, "build_and_ask", tmp_path / "said", backend, **given)
    for kind, (path, expected) in alone.items():
        found = dict(np.load(tmp_path / f"{kind}.npz"))
        sums = [expected["scores"][:, part::3].sum(axis=1, dtype=np.float64) for part in range(3)]
        np.testing.assert_allclose(found.pop("group sums"), np.transpose(sums), rtol=1e-4, atol=1e-2)
        assert_same(exact(found), exact(expected), 1e-5)
        assert sum(one[kind]["held"] for one in said) == COUNT
        assert {one[kind]["rows"] for one in said} == {COUNT}
        # A process that opens it alone has all of it, with the same codebooks.
        with Index.open(tmp_path / kind, model=make_model(), loss=loss) as whole:
            assert_same(found, answers(whole, sequences()[:4]), 1e-5)
            whole.verify()
            assert len(reader_of(whole).manifest.shards) >= size
            # All ranks' rows were looked at, not one's.
            with Index.open(path) as reference:
                told, looked_at = whole.build_report["outliers"], reference.build_report["outliers"]
            assert told == pytest.approx(looked_at, rel=1e-4)


def test_fits_of_several_ranks_agree(alone: Any, tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "kinds": ["factors", "eigen"], "fits": {}, "coarse": None}
    said = together(3, "build_and_ask", tmp_path / "said", "cpu:gloo", **given)
    for kind in ("factors", "eigen"):
        path, expected = alone[kind]
        with Index.open(tmp_path / kind) as built, Index.open(path) as reference:
            for name in reference.layers:
                ours, theirs = built.curvature[name], reference.curvature[name]
                top = float(theirs.spectrum[0])
                np.testing.assert_allclose(ours.spectrum, theirs.spectrum, atol=3e-3 * top)
                np.testing.assert_allclose(ours.squares, theirs.squares, atol=1e-5 * float(theirs.squares.max()))
                assert ours.trace == pytest.approx(theirs.trace, rel=1e-6)
        found = np.load(tmp_path / f"{kind}.npz")
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-3 * np.abs(expected["scores"]).max())
    report = said[0]["factors"]["report"]["ranks"]
    assert report["size"] == 3 and len(report["sent_bytes"]) == 3
    assert all(sent["curvature"] > 0 for sent in report["sent_bytes"])


@pytest.mark.parametrize(("size", "backend"), [(2, "gloo"), (3, "cpu:gloo")])
def test_the_best_are_computed_again_by_all_ranks(size: int, backend: str, alone: Any, tmp_path: Path) -> None:
    path, _ = alone["eigen"]
    said = together(size, "rerank", tmp_path / "said", backend, folder=str(path))
    assert all(one[:3] == said[0][:3] for one in said)
    with Index.open(path, model=make_model(), loss=loss, data=sequences()) as index:
        for found, given in zip(
            said[0], ({}, {"opponents": True, "normalize": "cosine"}, {"exact": False}), strict=False
        ):
            hits = index.search(sequences()[:4], k=5, rerank=30, **given)
            ours = SimpleNamespace(ids=np.array(found[0]), scores=np.array(found[1], dtype=np.float32))
            assert_same_hits(ours, hits, 1e-5)
            assert found[2] == hits.stats.reranked.computed
            # Estimated of float32 scores, which other blocks of rows round otherwise.
            assert found[3] == pytest.approx(hits.stats.estimated_recall, rel=1e-5)
    for one in said:
        assert "opened without them: pass data=" in one[3] and "Index.open(path), without distributed=" in one[4]


@pytest.mark.parametrize(("size", "kind"), [(2, "flat"), (4, "auto")])
def test_fewer_shards_than_ranks(size: int, kind: str, alone: Any, tmp_path: Path) -> None:
    """A rank without rows proposes nothing, and no row is proposed twice."""
    with Index.open(alone["eigen"][0]) as index:
        half = (COUNT // 2 + 1) * index.bytes_per_example
    config = settings(store="eigen", coarse=kind, compute={"shard_bytes": 1 << 26 if size == 2 else half})
    with Index.build(
        tmp_path / "index", model=make_model(), data=sequences(), loss=loss, config=config, distributed=False
    ) as index:
        assert len(reader_of(index).manifest.shards) == size // 2
        expected = [index.search(sequences()[:4], k=10, exact=False, rescore=rescore) for rescore in (True, False)]
    said = together(size, "propose", tmp_path / "said", folder=str(tmp_path))
    for found, wanted in zip(said[0], expected, strict=True):
        assert all(len(set(row)) == len(row) for row in found), found
        assert shared(found, wanted.ids) >= 0.95
    assert said[0] == said[-1]


def test_folders_of_their_own(alone: Any, tmp_path: Path) -> None:
    """Ranks that do not share a folder: a part in each, searched together, and merged into one."""
    fits = {kind: str(alone[kind][0]) for kind in KINDS}
    together(2, "build_and_ask", tmp_path / "said", folder=str(tmp_path), kinds=KINDS, fits=fits, apart=True)
    for kind in KINDS:
        found = dict(np.load(tmp_path / f"{kind}.npz"))
        found.pop("group sums")
        assert_same(exact(found), exact(alone[kind][1]), 1e-5)
        assert (found["candidate ids"][:, 0] == found["scan ids"][:, 0]).all()
    first, second = tmp_path / "eigen-0", tmp_path / "eigen-1"
    with Index.open(first, model=make_model(), loss=loss) as part, Index.open(second) as other:
        # Each is an index of its own, with ids in the whole.
        assert len(part) + len(other) == COUNT and not set(part.ids) & set(other.ids)
        inside = answers(part, sequences()[:4])
        wanted = alone["eigen"][1]["scores"]
        np.testing.assert_allclose(inside["scores"], wanted[:, part.ids], rtol=0, atol=1e-5 * np.abs(wanted).max())
        with pytest.raises(StoreError, match="merge the parts first"):
            part.remove([int(part.ids[0])])
    with pytest.raises(ConfigError, match="one of 2 folders"):
        Index.merge(tmp_path / "half", [first, first])
    with Index.merge(tmp_path / "whole", [second, first]) as merged:
        np.testing.assert_array_equal(merged.ids, np.arange(COUNT))
        assert merged.payloads([3, COUNT - 1]) == [{"place": 3}, {"place": COUNT - 1}]
    with Index.open(tmp_path / "whole", model=make_model(), loss=loss) as merged:
        assert_same(exact(answers(merged, sequences()[:4])), exact(alone["eigen"][1]), 1e-5)
    given = {"folder": str(tmp_path), "parts": ["eigen-0", "eigen-0"]}
    said = finish(start(2, "open_part", tmp_path / "missing", given=given), tmp_path / "missing")
    assert all(one["error"][0] == "DistributedError" and "number 1" in one["error"][1] for one in said), said


@pytest.mark.parametrize("apart", [False, True])
def test_killed_ranks_and_another_number_of_them(apart: bool, alone: Any, tmp_path: Path) -> None:
    """Whenever a rank is killed, the others end with an error, and the build goes on with fewer or more of them, also
    under another backend."""
    dice = random.Random(7 + apart)
    sealed: list[int] = []
    for number, size in enumerate([3, 3] if apart else [3, 2]):
        out = tmp_path / f"said-{number}"
        given = {"folder": str(tmp_path), "seconds": 0.05, "apart": apart}
        processes = start(size, "slow_build", out, backend=BACKENDS[number], given=given)
        limit, enough = time.monotonic() + PATIENCE, len(sealed) + dice.randrange(1, 4)
        while time.monotonic() < limit and len(shards_in(tmp_path)) < enough:
            time.sleep(0.01)
        os.kill(processes[dice.randrange(size)].pid, signal.SIGKILL)
        said = finish(processes, out)
        errors = [one["error"] for one in said if "error" in one]
        assert len(errors) == size - 1 and all(kind == "DistributedError" for kind, _ in errors), said
        with pytest.raises(NotAnIndexError):
            Index.open(tmp_path / ("part-0" if apart else "index"))
        sealed = [path.stat().st_ino for path in shards_in(tmp_path)]
        assert len(sealed) >= 2
    size = 3 if apart else 4
    counts = together(size, "slow_build", tmp_path / "last", folder=str(tmp_path), seconds=0.0, apart=apart)
    assert counts == [COUNT] * size
    # What was sealed was not made again.
    kept = {path.stat().st_ino for path in shards_in(tmp_path)}
    assert len(kept & set(sealed)) >= len(sealed) - size
    places = [tmp_path / f"part-{rank}" for rank in range(3)] if apart else [tmp_path / "index"]
    wanted, ids = alone["eigen"][1]["scores"], []
    for place in places:
        with Index.open(place, model=make_model(), loss=loss) as part:
            part.verify()
            ids.append(part.ids)
            found = part.scores(sequences()[:4])
            np.testing.assert_allclose(found, wanted[:, part.ids], atol=1e-3 * np.abs(wanted).max())
    np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(COUNT))


@pytest.mark.parametrize(("kind", "where"), [("eigen", "calibration"), ("eigen", "coarse"), ("factors", "finish")])
def test_a_build_goes_on_from_its_last_stages(kind: str, where: str, alone: Any, tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "kind": kind}
    said = finish(start(2, "leave_at", tmp_path / "left", given=given | {"where": where}), tmp_path / "left")
    assert said[0]["error"][0] == "DistributedError" and not said[1], said
    before = {path.name: path.stat().st_ino for path in (tmp_path / "index").iterdir() if path.suffix == ".h5"}
    assert together(3, "leave_at", tmp_path / "last", where="", **given) == [COUNT] * 3
    after = {path.name: path.stat().st_ino for path in (tmp_path / "index").iterdir() if path.suffix == ".h5"}
    assert before.items() <= after.items()
    with Index.open(tmp_path / "index", model=make_model(), loss=loss) as index:
        found = answers(index, sequences()[:4])
        index.verify()
    best, wanted = found["candidate ids"][:, 0], alone[kind][1]["candidate ids"][:, 0]
    np.testing.assert_array_equal(best, wanted)


@pytest.mark.parametrize(
    ("where", "coarse"), [("coarse", {}), ("calibration", {"kind": "flat"}), ("calibration", {"dim": 32})]
)
def test_builds_in_two_folders_go_on_with_another_coarse_index(
    where: str, coarse: dict[str, Any], alone: Any, tmp_path: Path
) -> None:
    given = {"folder": str(tmp_path), "kind": "eigen", "apart": True}
    finish(start(2, "leave_at", tmp_path / "left", given=given | {"where": where}), tmp_path / "left")
    rows = set(shards_in(tmp_path))
    assert rows and not list(tmp_path.rglob("manifest.json"))
    assert together(2, "leave_at", tmp_path / "last", where="", coarse=coarse, **given) == [COUNT] * 2
    assert rows == set(shards_in(tmp_path))
    for rank in range(2):
        with Index.open(tmp_path / f"part-{rank}", model=make_model(), loss=loss) as part:
            part.verify()
            assert part.config.coarse == settings(coarse={"queries": 8} | coarse).coarse
            found = answers(part, sequences()[:4])
            assert_same_hits(
                SimpleNamespace(ids=found["candidate ids"], scores=found["candidate scores"]),
                SimpleNamespace(ids=found["scan ids"], scores=found["scan scores"]),
            )
    with Index.merge(tmp_path / "whole", [tmp_path / "part-0", tmp_path / "part-1"]) as whole:
        hits = whole.search(whole.gradients(np.arange(4)), k=5, exact=False)
        np.testing.assert_array_equal(hits.ids[:, 0], np.arange(4))


def test_a_build_killed_between_the_commits_of_its_folders_goes_on(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "kind": "eigen", "apart": True}
    parts = [tmp_path / f"part-{rank}" for rank in range(2)]
    said = finish(start(2, "leave_at", tmp_path / "left", given=given | {"where": "commit"}), tmp_path / "left")
    assert said[0]["error"][0] == "DistributedError" and not said[1], said
    assert [(part / "manifest.json").exists() for part in parts] == [True, False]
    rows = {path: path.stat().st_ino for path in shards_in(tmp_path)}
    # Of something else, it leaves what is there.
    given["where"] = ""
    said = finish(start(2, "leave_at", tmp_path / "other", given=given | {"kind": "factors"}), tmp_path / "other")
    assert {one["error"][0] for one in said} == {"FingerprintError"}, said
    assert (parts[0] / "manifest.json").exists()
    assert together(2, "leave_at", tmp_path / "last", **given) == [COUNT] * 2
    assert rows == {path: path.stat().st_ino for path in shards_in(tmp_path)}
    opened = {"folder": str(tmp_path), "parts": [part.name for part in parts]}
    assert together(2, "open_part", tmp_path / "opened", **opened) == [COUNT] * 2
    for part in parts:
        assert not (part / "building.json").exists()
        with Index.open(part) as index:
            index.verify()
    said = finish(start(2, "leave_at", tmp_path / "again", given=given), tmp_path / "again")
    assert {one["error"][0] for one in said} == {"IndexExistsError"}, said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hung_rank_is_named_and_leaves_no_index(backend: str, tmp_path: Path) -> None:
    out = tmp_path / "said"
    processes = start(2, "hang", out, backend=backend, given={"folder": str(tmp_path)})
    processes[0].join(PATIENCE)
    processes[1].kill()
    said = json.loads(Path(f"{out}-0.json").read_text())
    assert said["error"][0] == "DistributedError" and "Ranks 1" in said["error"][1], said
    with pytest.raises(NotAnIndexError, match="interrupted"):
        Index.open(tmp_path / "index")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_example_is_named_on_all_ranks(backend: str, tmp_path: Path) -> None:
    out = tmp_path / "said"
    said = finish(start(3, "bad_example", out, backend=backend, given={"folder": str(tmp_path)}), out)
    assert all(one["error"][0] == "NonFiniteError" and "1111" in one["error"][1] for one in said), said
    assert "rank 2" in said[0]["error"][1]


def test_ranks_that_were_given_something_else(tmp_path: Path) -> None:
    out = tmp_path / "said"
    said = finish(start(2, "disagree", out, given={"folder": str(tmp_path)}), out)
    assert all(one["error"][0] == "DistributedError" and "config" in one["error"][1] for one in said), said
    assert not (tmp_path / "index").exists()


def test_what_cannot_be_asked_is_said_on_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "index"
    config = settings(coarse=None)
    with Index.build(path, model=make_model(), data=sequences(), loss=loss, config=config, distributed=False) as index:
        expected = index.search(sequences()[:2], k=5).ids.tolist()
    first, second = together(2, "ask_wrongly", tmp_path / "said", folder=str(path))
    kinds = ["DataError", "DataError", "QueryError", "DistributedError"]
    for said in (first, second):
        assert [one[0] for one in said[:4]] == kinds and said[6] == expected, said
        assert "k is" in said[3][1]
    assert "no examples" in first[0][1] and second[0][1] == "rank 0: " + first[0][1]
    assert second[1][1] == "rank 0: " + first[1][1] and first[4][0] == second[4][0]
    assert first[5] == ["QueryError", "y" * 4000] and second[5] == ["QueryError", "rank 0: " + "y" * 4000]
    assert "coarse" in second[2][1] and first[2][1] == "rank 1: " + second[2][1]


def test_an_error_of_its_own_says_more_than_that_others_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with Index.build(path, model=make_model(), data=sequences(), loss=loss, config=settings(), distributed=False):
        pass
    out = tmp_path / "said"
    given = {"folder": str(path)}
    said = finish(start(2, "ask_alone", out, timeout=5, given=given), out)
    assert said[0]["result"] == ["QueryError", "DistributedError"] and said[1]["result"] == []


def children(parent: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(place.name))
    return sorted(found)


def test_torchrun_builds_on_the_command_line(tmp_path: Path) -> None:
    """`torchrun -m lorif_index build`, a rank of it killed: the elastic agent starts all anew, and they go on."""
    from conftest import tiny_model_folder

    model, texts, place = tiny_model_folder(tmp_path / "model"), tmp_path / "texts.jsonl", tmp_path / "index"
    words = "the quick brown fox jumps over a lazy dog and runs home again".split()
    dice = random.Random(0)
    texts.write_text("\n".join(json.dumps({"text": " ".join(dice.choices(words, k=30))}) for _ in range(300)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"),
        *("--monitor-interval=0.2", "-m", "lorif_index", "build", str(place)),
        *("--model", str(model), "--data", str(texts), "--batch-size", "4", "--timeout", "600", "--json"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and agent.poll() is None and not (place / "projections.h5").exists():
        time.sleep(0.01)
    killed = children(agent.pid)[1]
    os.kill(killed, signal.SIGKILL)
    out, errors = agent.communicate(timeout=PATIENCE)
    assert agent.returncode == 0, out + errors
    # Which of the two it names first, the killed one or the one that lost touch with it, hangs on who ends first.
    assert "failed (exitcode" in errors, "the agent says nothing of the killed rank"
    facts = json.loads(out[out.index("{") :])
    with Index.open(place) as index:
        assert index.build_report["ranks"]["size"] == 2 and len(index) == facts["examples"] > 100


@pytest.mark.slow
def test_killed_at_any_moment(alone: Any, tmp_path: Path) -> None:
    """Builds by one to four ranks, one of which is killed at a random moment, until one comes through."""
    dice, kills = random.Random(11), 0
    wanted = alone["eigen"][1]["scores"]
    for number in range(6):
        folder, done = tmp_path / str(number), False
        for attempt in range(8):
            size, out = dice.randrange(2, 5), folder / f"said-{attempt}"
            folder.mkdir(exist_ok=True)
            given = {"folder": str(folder), "seconds": 0.05}
            processes = start(size, "slow_build", out, backend=BACKENDS[number % 2], given=given)
            if attempt < 7:
                # Whoever is killed before all have joined keeps the others in torch's own connecting.
                limit = time.monotonic() + PATIENCE
                while len(list(folder.glob(f"{out.name}-*.joined"))) < size and time.monotonic() < limit:
                    time.sleep(0.01)
                time.sleep(dice.uniform(0.0, 3.0))
                victim = processes[dice.randrange(size)]
                if victim.is_alive():
                    victim.kill()
                    kills += 1
            said = finish(processes, out)
            done = all("result" in one for one in said)
            if done or (folder / "index" / "manifest.json").exists():
                break
            assert all(one.get("error", ["DistributedError"])[0] == "DistributedError" for one in said), said
        with Index.open(folder / "index", model=make_model(), loss=loss) as index:
            index.verify()
            np.testing.assert_array_equal(index.ids, np.arange(COUNT))
            np.testing.assert_allclose(index.scores(sequences()[:4]), wanted, atol=1e-3 * np.abs(wanted).max())
    assert kills >= 10, kills


@pytest.fixture
def two_hosts() -> Iterator[tuple[list[str], str, str]]:
    """Two network namespaces joined by a cable: names, the cable's ends but for the number, the first one's address."""
    names, cable = [f"lorif-{os.getpid()}-{i}" for i in range(2)], f"lo{os.getpid() % 100000}v"
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {cable}0 netns {names[0]} type veth peer name {cable}1 netns {names[1]}")
    for i, name in enumerate(names):
        commands += [f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev {cable}{i}", f"ip -n {name} link set lo up"]
        commands.append(f"ip -n {name} link set {cable}{i} up")
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces cannot be made here: {error} {getattr(error, 'stderr', '')}")
        yield names, cable, "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_build_are_killed_resume_and_search(two_hosts: Any, alone: Any, tmp_path: Path) -> None:
    names, cable, address = two_hosts

    def on_hosts(out: Path, seconds: float) -> list[subprocess.Popen[bytes]]:
        given = {"folder": str(tmp_path), "seconds": seconds, "interface": cable}
        options = json.dumps({"host": address, "given": given})
        script = str(Path(__file__).parents[1] / "distributed_job.py")
        return [
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    name,
                    sys.executable,
                    script,
                    str(rank),
                    "2",
                    "29500",
                    "hosts",
                    options,
                    str(out),
                ],
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"{cable}{rank}", "OMP_NUM_THREADS": "1"},
            )
            for rank, name in enumerate(names)
        ]

    first = on_hosts(tmp_path / "first", 0.05)
    limit = time.monotonic() + PATIENCE
    # The newest shard may be there and not yet be noted.
    while time.monotonic() < limit and len(list((tmp_path / "host-1").glob("shard-*.h5"))) < 3:
        time.sleep(0.01)
    # `ip netns exec` becomes the program that it starts.
    first[1].send_signal(signal.SIGKILL)
    assert [process.wait(PATIENCE) for process in first] == [0, -signal.SIGKILL]
    said = json.loads((tmp_path / "first-0.json").read_text())
    assert said["error"][0] == "DistributedError", said
    before = {path.stat().st_ino for path in (tmp_path / "host-1").glob("shard-*.h5")}
    assert before
    assert [process.wait(PATIENCE) for process in on_hosts(tmp_path / "second", 0.0)] == [0, 0]
    ours, theirs = (json.loads((tmp_path / f"second-{rank}.json").read_text())["result"] for rank in range(2))
    assert before & {path.stat().st_ino for path in (tmp_path / "host-1").glob("shard-*.h5")}
    assert ours["rows"] == theirs["rows"] == ours["held"] + theirs["held"] == COUNT
    expected = alone["eigen"][1]["scan ids"]
    assert ours["ids"] == theirs["ids"] and shared(ours["ids"], expected) > 0.9
    assert np.mean(np.array(ours["near"])[:, 0] == expected[:, 0]) == 1.0
    # The account of what was sent is what went over the cable, but for headers and barriers.
    for said in (ours, theirs):
        assert 0.9 * said["account"] < said["moved"] < 1.3 * said["account"] + 500_000, said


def test_memory_of_a_rank_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = {}
    for count in (4000, 16000):
        given = {"folder": str(tmp_path), "count": count}
        peaks[count] = max(together(2, "memory", tmp_path / f"said-{count}", **given))
    assert peaks[16000] < 1.1 * peaks[4000] + (16 << 20), peaks


def test_one_process_is_a_group_of_one() -> None:
    assert Ranks.of(None).size == Ranks.of(False).size == ALONE.size == 1
    with pytest.raises(ConfigError, match="torchrun"):
        Ranks.of(True)
    with pytest.raises(ConfigError, match="torchrun"):
        Ranks.of("all")


def test_spans() -> None:
    assert unsealed([(5, 9), (0, 3)], 12) == [(3, 5), (9, 12)]
    assert unsealed([], 4) == [(0, 4)] and unsealed([(0, 4)], 4) == []
    left = [(3, 5), (9, 12)]
    assert [some_of(left, slice(a, b)) for a, b in ((0, 2), (2, 5), (1, 3))] == [
        [(3, 5)],
        [(9, 12)],
        [(4, 5), (9, 10)],
    ]
    shards = [ShardInfo(SealedInfo(f"{i}", 1, "", {}), 3, 3 * i, 3 * i + 2, 0, "") for i in range(2)]
    everyone = [[[0, 3], [3, 6]], [[2, 5]]]
    assert without_overlaps(everyone, 0, shards) == shards
    assert without_overlaps([[], [[0, 3], [3, 6]], [[0, 4]]], 1, shards) == shards


def test_drawn_examples_begin_with_the_same() -> None:
    for total in (1000, 1 << 23):
        few, more = drawn(total, 100, 3, "key"), drawn(total, 900, 3, "key")
        np.testing.assert_array_equal(few, more[:100])
        assert len(np.unique(more)) == 900 and more.max() < total
    many = drawn(1 << 23, 200_000, 3, "key")
    assert len(np.unique(many)) == 200_000
    # Uniform: each quarter has its share.
    counts = np.bincount(many >> 21, minlength=4)
    assert np.abs(counts - 50_000).max() < 1000

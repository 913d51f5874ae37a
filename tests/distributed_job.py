"""What each rank does in the tests of several ranks, and the model and data that they have in common."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked import CONTEXT
from torch import nn
from torch.utils.data import Dataset

from lorif_index import BuildConfig, Index
from lorif_index.build import candidates
from lorif_index.errors import DataError, QueryError, message_of
from lorif_index.identity import Identity
from lorif_index.ranks import Ranks
from lorif_index.snapshot import Access, Snapshot

# Small indexes of the tests have a coarse stage, too.
candidates.COARSE_FROM = 1024

# What torch calls the same CPU backend where no other is asked for, and where each device has its own.
BACKENDS = ["gloo", "cpu:gloo"]
# Seconds that is waited for processes that work, on a machine ten times slower.
PATIENCE = 1200
COUNT, WORDS, LENGTH = 1400, 40, 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(WORDS, 24), nn.Linear(24, 32)
        self.down, self.head = nn.Linear(32, 24), nn.Linear(24, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.relu(self.up(self.embed(words))))))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits, wanted = model(batch[:, :-1]), batch[:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return losses.view(len(batch), -1).sum(1)


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def sequences(count: int = COUNT) -> torch.Tensor:
    return torch.randint(0, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def settings(**changes: Any) -> BuildConfig:
    usual = {
        "curvature": "empirical",
        "sample": 400,
        "projection_dim": 12,
        "batch_size": 32,
        "coarse": {"queries": 8},
        "compute": {"shard_bytes": 40_000},
    }
    return BuildConfig(**usual | changes)


class Slow(Dataset):
    """The sequences, each batch of which takes a while; from one place on, it fails or waits for ever."""

    def __init__(self, seconds: float = 0.0, hangs_at: int | None = None, bad: int | None = None) -> None:
        self.data, self.seconds, self.hangs_at, self.bad = sequences(), seconds, hangs_at, bad
        self.armed = False

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.data[place]

    def __getitems__(self, places: list[int]) -> list[torch.Tensor]:
        time.sleep(self.seconds)
        if self.armed and self.hangs_at in places:
            time.sleep(6000)
        return [self.data[place] for place in places]


def start(size: int, what: str, out: Path, **options: Any) -> list[Any]:
    """Processes that do `what` together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    made = [
        CONTEXT.Process(target=run, args=(rank, size, port, what, options, str(out)), daemon=True)
        for rank in range(size)
    ]
    for process in made:
        process.start()
    return made


def finish(processes: list[Any], out: Path, seconds: float = PATIENCE) -> list[dict[str, Any]]:
    """What each rank says in the end: {} of one that was killed."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(limit - time.monotonic(), 0.1))
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} ranks had not ended after {seconds} seconds"
    files = [Path(f"{out}-{rank}.json") for rank in range(len(processes))]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def together(size: int, what: str, out: Path, backend: str = BACKENDS[0], **given: Any) -> list[Any]:
    """What each of some ranks finds."""
    said = finish(start(size, what, out, backend=backend, given=given), out)
    assert all("result" in one for one in said), said
    return [one["result"] for one in said]


def run(rank: int, size: int, port: int, what: str, options: dict[str, Any], out: str) -> None:
    """A rank's life: joins the others, does `what`, and writes what came of it."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": options.get("host", "127.0.0.1"), "MASTER_PORT": str(port)}
    wait = timedelta(seconds=options.get("timeout", 600))
    dist.init_process_group(options.get("backend", BACKENDS[0]), rank=rank, world_size=size, timeout=wait)
    Path(f"{out}-{rank}.joined").touch()
    said: dict[str, Any] = {}
    try:
        said["result"] = JOBS[what](rank, size, **options.get("given", {}))
    except Exception as error:
        said["error"] = [type(error).__name__, message_of(error)]
    Path(f"{out}-{rank}.json").write_text(json.dumps(said))
    if "error" not in said:
        dist.destroy_process_group()
    # Without waiting for threads of a group whose other ranks are gone.
    sys.stdout.flush()
    os._exit(0)


def answers(index: Index, query: Any) -> dict[str, np.ndarray]:
    """All that is asked of an index, as arrays."""
    hits = index.search(query, k=12, exact=True)
    found = {"scan ids": hits.ids, "scan scores": hits.scores, "scores": index.scores(query)}
    found |= {"self": index.self_influence(), "ids": index.ids, "shrunk": index.scores(query, shrink=True)}
    worst = index.search(query, k=12, opponents=True, normalize="relatif")
    found |= {"opponent ids": worst.ids, "opponent scores": worst.scores}
    if index.coarse is not None:
        hits = index.search(query, k=12, exact=False)
        found |= {"candidate ids": hits.ids, "candidate scores": hits.scores}
        found["candidates"] = np.array(hits.stats.candidates_by_query)
    return found


def build_and_ask(
    rank: int, size: int, folder: str, kinds: list[str], fits: dict[str, str], apart: bool = False, **config: Any
) -> dict[str, Any]:
    """Builds an index of each kind, alone or with a fit; asks it; keeps the answers of rank 0."""
    told: dict[str, Any] = {}
    for kind in kinds:
        model, place = make_model(), Path(folder) / (f"{kind}-{rank}" if apart else kind)
        index = Index.build(
            place,
            model=model,
            data=sequences(),
            loss=loss,
            config=settings(store=kind, **config),
            payloads=[{"place": i} for i in range(COUNT)],
            fit=fits.get(kind),
        )
        index.close()
        query = sequences()[:4] if rank == 0 else None
        with Index.open(place, model=model, loss=loss, distributed=True) as together:
            found = answers(together, query)
            hits = together.search(query, k=3)
            whole = together.groups(query, by=lambda payload: payload["place"] % 3)
            if rank == 0:
                found["group sums"] = np.array(
                    [[g.sum for g in sorted(q, key=lambda g: g.value)] for q in whole.queries]
                )
            if hits.payloads != [[{"place": int(i)} for i in row] for row in hits.ids]:
                raise RuntimeError(f"payloads {hits.payloads} of {hits.ids}")
            mine = together.scores(query, gather=False)
            held = np.isin(found["ids"], together.held_ids)
            np.testing.assert_array_equal(mine, found["scores"][:, held])
            shrunk = together.scores(query, gather=False, shrink=True)
            np.testing.assert_array_equal(shrunk, found["shrunk"][:, held])
            told[kind] = {"held": len(together.held_ids), "rows": len(together)}
            if rank == 0:
                np.savez(Path(folder) / f"{kind}.npz", **found)
                told[kind]["report"] = index.build_report
    return told


def slow_build(rank: int, size: int, folder: str, seconds: float, kind: str = "eigen", apart: bool = False) -> int:
    place = Path(folder) / (f"part-{rank}" if apart else "index")
    data = Slow(seconds)
    config = settings(store=kind, batch_size=16, coarse=None, compute={"shard_bytes": 8000})
    index = Index.build(place, model=make_model(), data=data, loss=loss, config=config)
    return len(index)


def estimate(rank: int, size: int, kind: str) -> dict[str, Any]:
    """What is said of a build by two ranks, in a process whose memory nothing else has taken."""
    given: dict[str, Any] = {"model": make_model(), "data": sequences(), "loss": loss}
    return Index.estimate(**given, config=settings(store=kind), world_size=2, progress=False).to_json()


def account(rank: int, size: int, folder: str, kind: str) -> dict[str, Any]:
    """What a build, and then a search of each way, have sent and taken."""
    model, place = make_model(), Path(folder) / "index"
    index = Index.build(place, model=model, data=sequences(), loss=loss, config=settings(store=kind))
    report = index.build_report
    ranks = Ranks.of(None)
    index = Index(Snapshot.open(place, Access(ranks=ranks)), Identity(model, loss))
    searches = {}
    for way, exact in (("scan", True), ("candidates", False)):
        before = ranks.sent["search"]
        index.search(sequences()[:1] if rank == 0 else None, k=10, exact=exact, recall=0.5)
        searches[way] = ranks.sent["search"] - before
    sent = report["ranks"]["sent_bytes"][rank] | searches
    return {"sent": sent, "disk": index.nbytes, "memory": report["ranks"]["peak_rss_bytes"][rank]}


def propose(rank: int, size: int, folder: str) -> list[Any]:
    with Index.open(Path(folder) / "index", model=make_model(), loss=loss, distributed=True) as index:
        return [index.search(sequences()[:4], k=10, exact=False, rescore=r).ids.tolist() for r in (True, False)]


def rerank(rank: int, size: int, folder: str) -> list[Any]:
    """The best, computed again by all ranks: ids, scores, what was computed, of several searches; and an error."""
    place, query, found = Path(folder), sequences()[:4] if rank == 0 else None, []
    with Index.open(place, model=make_model(), loss=loss, data=sequences(), distributed=True) as index:
        for given in ({}, {"opponents": True, "normalize": "cosine"}, {"exact": False}):
            hits = index.search(query, k=5, rerank=30, **given)
            told = hits.stats.reranked
            if told is None:
                raise RuntimeError("nothing was computed again")
            found.append([hits.ids.tolist(), hits.scores.tolist(), told.computed, hits.stats.estimated_recall])
    bare = sequences() if rank == 0 else None
    with Index.open(place, model=make_model(), loss=loss, data=bare, distributed=True) as index:
        try:
            index.search(query, k=5, rerank=30)
        except DataError as error:
            found.append(str(error))
        try:
            index.scores(query, refine=True)
        except QueryError as error:
            found.append(str(error))
    return found


def ask_wrongly(rank: int, size: int, folder: str) -> list[Any]:
    """What is raised where one rank asks what cannot be; and an answer after it."""
    found: list[Any] = []
    with Index.open(Path(folder), model=make_model(), loss=loss, distributed=True) as index:
        for query, given in (
            (torch.zeros(0, sequences().shape[1], dtype=torch.int64), {}),
            ({name: torch.zeros(1, 2, 3) for name in index.specs}, {}),
            (sequences()[:2], {"exact": False} if rank == 1 else {}),
            (sequences()[:2], {"k": 3 + rank}),
            (sequences()[:2], {"contrast": "no batch" if rank == 0 else None}),
        ):
            try:
                index.search(query if rank == 0 else None, **({"k": 5} | given))
                found.append(None)
            except Exception as error:
                found.append([type(error).__name__, message_of(error)])
        try:
            Ranks.of(True).told(QueryError("y" * 4000) if rank == 0 else None)
        except QueryError as error:
            found.append([type(error).__name__, message_of(error)])
        hits = index.search(sequences()[:2] if rank == 0 else None, k=5)
    return [*found, hits.ids.tolist()]


def ask_alone(rank: int, size: int, folder: str) -> list[str]:
    """What rank 0 raises where the others do not ask: of a question that cannot be, and of one that can."""
    found = []
    with Index.open(Path(folder), model=make_model(), loss=loss, distributed=True) as index:
        if rank:
            time.sleep(20)
            return []
        for given in ({"exact": False, "normalize": "cosine"}, {}):
            try:
                index.search(sequences()[:1], k=3, **given)
            except Exception as error:
                found.append(type(error).__name__)
    return found


def leave_at(
    rank: int, size: int, folder: str, kind: str, where: str, apart: bool = False, coarse: dict[str, Any] | None = None
) -> int:
    """A build, which rank 1 leaves without a word at a stage, before it is finished, or in place of its own commit."""

    def told(event: Any) -> None:
        if rank == 1 and event.stage == where:
            os._exit(3)

    if rank == 1 and where == "finish":
        from lorif_index.build.state import BuildState

        BuildState.commit = lambda self: os._exit(3)  # type: ignore[method-assign]
    if rank == 1 and where == "commit":
        from lorif_index.storage.manifest import Manifest

        Manifest.commit = lambda self, folder: os._exit(3)  # type: ignore[method-assign]
    place = Path(folder) / (f"part-{rank}" if apart else "index")
    config = settings(store=kind, coarse={"queries": 8} | (coarse or {}))
    index = Index.build(place, model=make_model(), data=sequences(), loss=loss, config=config, progress=told)
    return len(index)


def hang(rank: int, size: int, folder: str) -> None:
    data = Slow(hangs_at=1300)

    def arm(event: Any) -> None:
        if event.stage == "encode" and not data.armed:
            # What comes before is waited for as long as it takes.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
            data.armed = True

    Index.build(Path(folder) / "index", model=make_model(), data=data, loss=loss, config=settings(), progress=arm)


def bad_example(rank: int, size: int, folder: str) -> None:
    model, bad = make_model(), sequences()[1111]

    def poisoned(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return loss(model, batch) * torch.where((batch == bad).all(dim=1), float("nan"), 1.0)

    Index.build(
        Path(folder) / "index", model=model, data=sequences(), loss=poisoned, config=settings(projection="random")
    )


def fails_in_a_pass(rank: int, size: int, folder: str, at: int, how: str, seconds: float) -> None:
    """A build with a sharded model, whose loss fails for one example while it is encoded."""
    from torch.distributed.fsdp import fully_shard

    model, bad, armed = make_model(), sequences()[at], []
    fully_shard(model.up)
    fully_shard(model)

    def own(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        here = (batch == bad).all(dim=1)
        if armed and how == "raises" and here.any():
            raise ZeroDivisionError("no loss")
        return loss(model, batch) * torch.where(here, float("nan") if armed else 1.0, 1.0)

    def arm(event: Any) -> None:
        if event.stage == "encode" and not armed:
            # What comes before is waited for as long as it takes.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)
            armed.append(True)

    config = settings(projection="random")
    Index.build(Path(folder) / "index", model=model, data=sequences(), loss=own, config=config, progress=arm)


def disagree(rank: int, size: int, folder: str) -> None:
    Index.build(
        Path(folder) / "index",
        model=make_model(),
        data=sequences(),
        loss=loss,
        config=settings(seed=rank // (size - 1)),
    )


def open_part(rank: int, size: int, folder: str, parts: list[str]) -> int:
    with Index.open(Path(folder) / parts[rank], distributed=True) as index:
        return len(index)


def memory(rank: int, size: int, folder: str, count: int) -> int:
    """Peak resident memory of a build from gradients made on the spot, in bytes above what it began with."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Index.build(
        Path(folder) / f"index-{count}",
        model=make_model(),
        data=sequences(count),
        loss=loss,
        config=settings(coarse=None, sample=200, compute={"shard_bytes": 40_000, "spool_bytes": 1 << 20}),
    )
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def hosts(rank: int, size: int, folder: str, seconds: float, interface: str) -> dict[str, Any]:
    """A build on two machines with a folder each, and a search by both: the best ids, and what went over the wire."""

    def sent() -> int:
        return int(Path(f"/sys/class/net/{interface}{rank}/statistics/tx_bytes").read_text())

    model, place, before = make_model(), Path(folder) / f"host-{rank}", sent()
    config = settings(store="eigen", batch_size=16, compute={"shard_bytes": 8000})
    built = Index.build(place, model=model, data=Slow(seconds), loss=loss, config=config)
    moved = sent() - before
    hits = built.search(sequences()[:4] if rank == 0 else None, k=12, exact=True)
    near = built.search(sequences()[:4] if rank == 0 else None, k=12, exact=False)
    account = sum(built.build_report["ranks"]["sent_bytes"][rank].values())
    return {
        "rows": len(built),
        "held": len(built.held_ids),
        "ids": hits.ids.tolist(),
        "near": near.ids.tolist(),
        "account": account,
        "moved": moved,
    }


JOBS: dict[str, Callable[..., Any]] = {
    "build_and_ask": build_and_ask,
    "slow_build": slow_build,
    "leave_at": leave_at,
    "propose": propose,
    "rerank": rerank,
    "ask_wrongly": ask_wrongly,
    "ask_alone": ask_alone,
    "estimate": estimate,
    "account": account,
    "hang": hang,
    "bad_example": bad_example,
    "fails_in_a_pass": fails_in_a_pass,
    "disagree": disagree,
    "open_part": open_part,
    "memory": memory,
    "hosts": hosts,
}

if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]), sys.argv[6])

"""Question: what do two processes gain over one, with one thread each and the same work, and what do they send?

Each round runs one process and then two, so that both meet the same machine: capture (the encode stage of a build whose
fit is taken from another index) and an exact scan of many rows for 1 and for 32 questions. Beside it how peak memory
grows with the data, and what each rank sends the other in a whole build, by stage, as `Index.estimate(world_size=2)`
says it and as it was sent.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.corpus import gpt, sequences
from bench.environment import ROOT, arguments, keep, median_seconds, medians, peak_rss, ratios, table
from lorif_index import BuildConfig, CoarseIndex, Compute, Index

LAYERS, DIM = 8, 32
# What ranks tell each other in words is no part of an estimate: stages that send less than this are not compared.
LEAST_SENT = 64 << 10


class Given:
    """Random gradients, or factor pairs of rank one, the same at each walk."""

    def __init__(self, count: int, pairs: bool) -> None:
        self.count, self.pairs = count, pairs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.count, 128):
            size, dice = min(128, self.count - start), torch.Generator().manual_seed(start)
            yield {f"layer {i}": self._layer(size, dice) for i in range(LAYERS)}

    def _layer(self, size: int, dice: torch.Generator) -> Any:
        if self.pairs:
            return tuple(torch.randn(size, DIM, 1, generator=dice) for _ in "io")
        return torch.randn(size, DIM, DIM, generator=dice)


def asked(queries: int) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(1)
    return {f"layer {i}": torch.randn(queries, DIM, DIM, generator=dice) for i in range(LAYERS)}


def given_build(count: int, smoke: bool) -> dict[str, Any]:
    """Arguments of a build whose messages are compared with their estimate."""
    small: dict[str, Any] = {"sample": 600, "coarse": CoarseIndex(kind="pq", queries=16)} if smoke else {}
    config = BuildConfig(store="factors", rank=2, curvature_rank=64, **small)
    return {"gradients": Given(count, pairs=False), "config": config}


# -- one rank ------------------------------------------------------------------------------------------------------


def encode(folder: Path, place: str, size: int, smoke: bool) -> dict[str, Any]:
    model, data = gpt(*shape(smoke)), {"input_ids": sequences(size)}
    index = Index.build(folder / place, model=model, data=data, fit=folder / "fit")
    return {"seconds": index.build_report["seconds"]["encode"]}


def scan(folder: Path, place: str, size: int, smoke: bool) -> dict[str, Any]:
    with Index.open(folder / "rows", distributed=None) as index:
        times = {q: median_seconds(lambda q=q: index.search(asked(q), k=10, exact=True), 5) for q in (1, 32)}
    return {f"{queries} questions": seconds for queries, seconds in times.items()}


def whole(folder: Path, place: str, size: int, smoke: bool) -> dict[str, Any]:
    """Peak memory of a build of the model."""
    model, data = gpt(*shape(smoke)), {"input_ids": sequences(size)}
    config = BuildConfig(sample=512, batch_size=16, compute=Compute(spool_bytes=1 << 20))
    Index.build(folder / place, model=model, data=data, config=config)
    return {"peak_rss": peak_rss()}


def sent(folder: Path, place: str, size: int, smoke: bool) -> dict[str, Any]:
    """Bytes that each rank sends, by stage, and what the index takes."""
    index = Index.build(folder / place, **given_build(size, smoke))
    ranks = index.build_report["ranks"]
    return {"sent": ranks["sent_bytes"], "disk": index.nbytes, "memory": max(ranks["peak_rss_bytes"])}


WORK = {"encode": encode, "scan": scan, "whole": whole, "sent": sent}


def shape(smoke: bool) -> tuple[int, int]:
    """Blocks and width of the model."""
    return (1, 32) if smoke else (4, 128)


def as_rank(options: str) -> None:
    """Does one rank's part, and prints what it found."""
    folder, what, place, size, smoke = json.loads(options)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    result = WORK[what](Path(folder), place, size, smoke)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(result))


# -- the command ---------------------------------------------------------------------------------------------------


def run(folder: Path, what: str, place: str, size: int, ranks: int, smoke: bool) -> dict[str, Any]:
    """What rank 0 finds, of `ranks` processes of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "bench.scaling", "--rank", json.dumps([str(folder), what, place, size, smoke])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a rank of {what!r} failed: {[process.returncode for process in started]}")
    return dict(json.loads(said[0].splitlines()[-1]))


def messages(folder: Path, count: int, smoke: bool) -> dict[str, Any]:
    """What an estimate says of two ranks, and what they took: each the rank that sends, or takes, most."""
    found = Index.estimate(**given_build(count, smoke), world_size=2, progress=False)
    taken = run(folder, "sent", "sent", count, 2, smoke)
    if found.ranks is None:
        raise RuntimeError("an estimate of several ranks says nothing of them")
    stages = {stage: max(part.get(stage, 0) for part in taken["sent"]) for stage in set().union(*taken["sent"])}
    return {
        "sent": {
            stage: {"said": found.ranks.sent.get(stage, 0), "taken": size, "compared": size >= LEAST_SENT}
            for stage, size in sorted(stages.items())
        },
        "disk": {"said": found.disk_total, "taken": taken["disk"]},
        "memory": {"said": found.ranks.memory, "taken": taken["memory"]},
    }


def main() -> None:
    if "--rank" in sys.argv:
        as_rank(sys.argv[-1])
        return
    parsed = arguments(
        __doc__, repeats={"type": int, "default": 5}, rows={"type": int, "default": 60_000, "help": "that are scanned"}
    )
    torch.set_num_threads(1)
    smoke = parsed.smoke
    count, rows, repeats, given = (48, 1000, 1, 1152) if smoke else (1500, parsed.rows, parsed.repeats, 8192)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = BuildConfig(curvature="empirical", sample=512, coarse=None, batch_size=16)
        fit = {"input_ids": sequences(64)}
        Index.build(folder / "fit", model=gpt(*shape(smoke)), data=fit, config=config).close()
        config = BuildConfig(
            store="factors", coarse=None, sample=1000, curvature_rank=64, compute=Compute(shard_bytes=4 << 20)
        )
        Index.build(folder / "rows", gradients=Given(rows, pairs=True), config=config).close()
        taken: dict[str, dict[str, list[float]]] = {}
        for number in range(repeats):
            for ranks, name in ((1, "one process"), (2, "two processes")):
                captured = run(folder, "encode", f"encode-{ranks}-{number}", count, ranks, smoke)
                scanned = run(folder, "scan", "", rows, ranks, smoke)
                found = {"capture": captured["seconds"]} | {f"scan, {what}": s for what, s in scanned.items()}
                for what, seconds in found.items():
                    taken.setdefault(what, {}).setdefault(name, []).append(seconds)
        peaks = {
            str(size): run(folder, "whole", f"whole-{size}", size, 2, smoke)["peak_rss"]
            for size in ((count,) if smoke else (count, 4 * count))
        }
        result: dict[str, Any] = {"examples": count, "rows": rows, "efficiency": {}, "peak memory": peaks}
        result["messages"] = messages(folder, given, smoke)
    for name, times in taken.items():
        efficiency = ratios(times, "two processes")["one process"] / 2
        result["efficiency"][name] = medians(times) | {"efficiency": efficiency, "each round": times}
    lines = [["work", "1 process", "2 processes", "efficiency"]]
    for name, r in result["efficiency"].items():
        lines.append([name, f"{r['one process']:.3f} s", f"{r['two processes']:.3f} s", f"{r['efficiency']:.2f}"])
    table(lines)
    lines = [["two ranks", "said", "taken", "ratio"]]
    parts = {f"sent, {stage}": part for stage, part in result["messages"]["sent"].items() if part["compared"]}
    for name, part in (parts | {k: result["messages"][k] for k in ("disk", "memory")}).items():
        lines.append([name, f"{part['said']:,}", f"{part['taken']:,}", f"{part['said'] / part['taken']:.2f}"])
    table(lines)
    print("peak memory of rank 0 by examples:", peaks)
    keep("scaling", result, parsed)


if __name__ == "__main__":
    main()

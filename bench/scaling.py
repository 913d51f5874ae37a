"""Question: what do two processes gain over one, with one thread each and the same work?

Each round runs one process and then two, so that both meet the same machine: capture (the encode stage of a build whose
fit is taken from another index) and an exact scan of many rows for 1 and for 32 questions. Beside it, what each rank
sends the other in a whole build, by stage, and how peak memory grows with the data.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.corpus import gpt, sequences
from bench.environment import arguments, keep, peak_rss, table
from lorif_index import BuildConfig, Index

LAYERS, DIM = 8, 32


def settings() -> BuildConfig:
    return BuildConfig(curvature="empirical", curvature_sample=512, coarse=None, batch_size=16)


class Pairs:
    """Random factor pairs, the same at each walk."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self.count, 1000):
            dice = torch.Generator().manual_seed(start)
            yield {f"layer {i}": tuple(torch.randn(1000, DIM, 1, generator=dice) for _ in "io") for i in range(LAYERS)}


def worker(folder: Path, what: str, size: int, shape: tuple[int, int]) -> dict[str, Any]:
    """One rank's part of a run; what rank 0 has measured."""
    torch.set_num_threads(1)
    if what == "encode":
        model, data = gpt(*shape), {"input_ids": sequences(size)}
        place = folder / f"encode-{dist.get_world_size() if dist.is_initialized() else 1}-{time.time_ns() // 10**10}"
        index = Index.build(place, model=model, data=data, fit=folder / "fit")
        return {"seconds": index.build_report["seconds"]["encode"], "examples": size}
    if what == "scan":
        with Index.open(folder / "rows", distributed=None) as index:
            found: dict[str, Any] = {}
            for queries in (1, 32):
                dice = torch.Generator().manual_seed(1)
                asked = {f"layer {i}": torch.randn(queries, DIM, DIM, generator=dice) for i in range(LAYERS)}
                index.search(asked, k=10, exact=True)
                times = []
                for _ in range(5):
                    began = time.perf_counter()
                    index.search(asked, k=10, exact=True)
                    times.append(time.perf_counter() - began)
                found[f"{queries} questions"] = statistics.median(times)
            return found
    model, data = gpt(*shape), {"input_ids": sequences(size)}
    config = BuildConfig(curvature_sample=512, batch_size=16, spool_bytes=1 << 20)
    index = Index.build(folder / f"whole-{what}-{size}", model=model, data=data, config=config)
    report = index.build_report
    return {"sent": report.get("ranks", {}).get("sent_bytes"), "peak_rss": peak_rss(), "seconds": report["seconds"]}


def run(folder: Path, what: str, size: int, ranks: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Runs `ranks` processes of one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "bench.scaling", "--worker", json.dumps([str(folder), what, size, shape])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a rank of {what!r} failed: {[process.returncode for process in started]}")
    return json.loads(said[0].splitlines()[-1])


def as_worker(options: str) -> None:
    folder, what, size, shape = json.loads(options)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    result = worker(Path(folder), what, size, shape)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(result))


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        worker={"default": None},
        repeats={"type": int, "default": 5},
        rows={"type": int, "default": 60_000},
    )
    if parsed.worker is not None:
        as_worker(parsed.worker)
        return
    torch.set_num_threads(1)
    count, rows, repeats = (48, 1000, 1) if parsed.smoke else (1500, parsed.rows, parsed.repeats)
    shape = (1, 32) if parsed.smoke else (4, 128)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Index.build(folder / "fit", model=gpt(*shape), data={"input_ids": sequences(64)}, config=settings()).close()
        config = BuildConfig(
            store="factors", coarse=None, curvature_sample=1000, curvature_rank=64, shard_bytes=4 << 20
        )
        Index.build(folder / "rows", gradients=Pairs(rows), config=config).close()
        taken: dict[str, dict[int, list[float]]] = {}
        for _ in range(repeats):
            for ranks in (1, 2):
                taken.setdefault("capture", {}).setdefault(ranks, []).append(
                    run(folder, "encode", count, ranks, shape)["seconds"]
                )
                for name, seconds in run(folder, "scan", rows, ranks, shape).items():
                    taken.setdefault(f"scan, {name}", {}).setdefault(ranks, []).append(seconds)
        result: dict[str, Any] = {"examples": count, "rows": rows, "efficiency": {}}
        for name, times in taken.items():
            ratios = [one / (2 * two) for one, two in zip(times[1], times[2], strict=True)]
            result["efficiency"][name] = {
                "one process": statistics.median(times[1]),
                "two processes": statistics.median(times[2]),
                "efficiency": statistics.median(ratios),
                "each round": ratios,
            }
        whole = [run(folder, f"memory-{i}", count * 4**i, 2, shape) for i in range(1 if parsed.smoke else 2)]
        result["sent bytes of each rank"] = whole[0]["sent"]
        result["peak memory"] = {str(count * 4**i): one["peak_rss"] for i, one in enumerate(whole)}
    rows_out = [
        [name, f"{r['one process']:.3f} s", f"{r['two processes']:.3f} s", f"{r['efficiency']:.2f}"]
        for name, r in result["efficiency"].items()
    ]
    table([["work", "1 process", "2 processes", "efficiency"], *rows_out])
    print("sent by each rank:", json.dumps(result["sent bytes of each rank"]))
    print("peak memory of rank 0 by examples:", result["peak memory"])
    keep("scaling", result, parsed)


if __name__ == "__main__":
    main()

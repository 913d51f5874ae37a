"""Claim: what `Index.estimate(world_size=K)` says each of K ranks takes and sends is what a build over K ranks takes.

Builds over gloo ranks of this machine, in one folder that they share, of a small language model (eigencodes) and of
gradients handed over (coordinates beside factors): bytes sent by stage, bytes on disk, memory, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.corpus import gpt, sequences
from bench.environment import ROOT, arguments, keep, peak_rss, table
from lorif_index import BuildConfig, Index

# What ranks tell each other in words is no part of an estimate: stages that send less than this are not compared.
_LEAST_SENT = 64 << 10


def case(name: str, smoke: bool) -> dict[str, Any]:
    """What is built: arguments of `Index.build`."""
    small: dict[str, Any] = {"curvature_sample": 600, "calibration_queries": 16} if smoke else {}
    if name == "text":
        count = 1100 if smoke else 8192
        config = BuildConfig(**small, eigen_bytes=200 if smoke else 800, batch_size=64, curvature="empirical")
        model = gpt(1, 32, dropout=False) if smoke else gpt(4, 64, dropout=False)
        return {"model": model.eval(), "data": {"input_ids": sequences(count)}, "config": config}
    generator = torch.Generator().manual_seed(0)
    widths = {"a": (24, 16), "b": (20, 12)} if smoke else {f"l{i}": (64, 48) for i in range(8)}
    blocks = [
        {n: torch.randn(128, *shape, generator=generator) for n, shape in widths.items()}
        for _ in range(9 if smoke else 64)
    ]
    return {"gradients": blocks, "config": BuildConfig(**small, store="both", rank=2, curvature_rank=64)}


def child(rank: int, size: int, place: str, name: str, smoke: bool) -> None:
    """One rank's build, and a search of each kind; rank 0 leaves what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given, folder = case(name, smoke), Path(place)
    begin = peak_rss()
    dist.init_process_group("gloo", init_method=f"file://{folder / f'meet-{size}'}", rank=rank, world_size=size)
    path = folder / f"i-{size}"
    with Index.build(path, **given, distributed=True, progress=False) as index:
        facts = {"report": index.build_report, "nbytes": index.nbytes, "rows": len(index), "begin": begin}
    searches = {}
    with Index.open(path, distributed=True) as index:
        query = {n: torch.randn(1, s.d_in, s.d_out) for n, s in index.specs.items()}
        for way, exact in (("scan", True), ("candidates", False)):
            before = index._reader.ranks.sent["search"]
            index.search(query, k=10, exact=exact, recall=0.5)
            searches[way] = index._reader.ranks.gather_values(index._reader.ranks.sent["search"] - before)
    if rank == 0:
        (folder / f"facts-{size}.json").write_text(json.dumps(facts | {"searches": searches}))
    dist.destroy_process_group()


def built(size: int, place: Path, name: str, smoke: bool) -> dict[str, Any]:
    """What a build over so many ranks took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.rank_accuracy"]
    running = [
        subprocess.Popen([*command, "--child", json.dumps([rank, size, str(place), name, smoke])], env=environment)
        for rank in range(size)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError("a rank failed: see above")
    return dict(json.loads((place / f"facts-{size}.json").read_text()))


def measure(name: str, size: int, smoke: bool) -> dict[str, Any]:
    """An estimate, and what came of it."""
    given = case(name, smoke)
    found = Index.estimate(**given, world_size=size, progress=False)
    place = Path(tempfile.mkdtemp())
    try:
        real = built(size, place, name, smoke)
    finally:
        shutil.rmtree(place)
    ranks, report = found.ranks, real["report"]
    if ranks is None:
        raise RuntimeError("an estimate of several ranks says nothing of them")
    sent = report["ranks"]["sent_bytes"]
    measured = {stage: max(part.get(stage, 0) for part in sent) for stage in sorted(set().union(*sent))}
    measured |= {way: max(values) for way, values in real["searches"].items()}
    return {
        "case": name,
        "ranks": size,
        "examples": real["rows"],
        "sent": {
            stage: {"said": ranks.sent.get(stage, 0), "taken": taken, "compared": taken >= _LEAST_SENT}
            for stage, taken in measured.items()
        },
        "disk": {"said": found.disk_total, "taken": real["nbytes"]},
        "memory": {"said": ranks.memory, "taken": max(report["ranks"]["peak_rss_bytes"])},
        "seconds": {"said": ranks.seconds, "taken": report["seconds"]},
    }


def main() -> None:
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child", type=json.loads)
        child(*parser.parse_args().child)
        return
    parsed = arguments(__doc__ or "", sizes={"type": int, "nargs": "*", "default": [2, 4]})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, cases = ([2], ["given"]) if parsed.smoke else (parsed.sizes, ["text", "given"])
    results = [measure(name, size, parsed.smoke) for name in cases for size in sizes]
    rows = [["case", "ranks", "figure", "said", "taken", "ratio"]]
    for result in results:
        figures = {f"sent, {stage}": part for stage, part in result["sent"].items() if part["compared"]}
        figures |= {"bytes on disk": result["disk"], "memory of a rank": result["memory"]}
        for figure, part in figures.items():
            ratio = f"{part['said'] / part['taken']:.2f}"
            rows.append(
                [result["case"], str(result["ranks"]), figure, f"{part['said']:,}", f"{part['taken']:,}", ratio]
            )
        said, taken = (sum(part.values()) for part in result["seconds"].values())
        rows.append(
            [result["case"], str(result["ranks"]), "seconds", f"{said:.1f}", f"{taken:.1f}", f"{said / taken:.2f}"]
        )
    table(rows)
    keep("rank_accuracy", {"results": results}, parsed)


if __name__ == "__main__":
    main()

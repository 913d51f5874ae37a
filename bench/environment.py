"""Results as JSON, with what is needed to read them: commit, machine, versions, command."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"


def arguments(description: str, **extra: Any) -> argparse.Namespace:
    """--smoke, --json, --threads, and what the benchmark adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows that it works")
    parser.add_argument("--json", type=Path, default=None, help="where to keep the result")
    parser.add_argument("--threads", type=int, default=2)
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    parsed = parser.parse_args()
    torch.set_num_threads(1 if parsed.smoke else parsed.threads)
    return parsed


def keep(name: str, result: dict[str, Any], parsed: argparse.Namespace, part: str = "") -> None:
    """Writes the result, of a part of the benchmark if named; a smoke run leaves the kept results alone."""
    path = parsed.json or (None if parsed.smoke else RESULTS / f"{name}{part and '_'}{part}.json")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": name, "environment": environment(), **result}, indent=1) + "\n")
    print(f"kept in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def environment() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    module = f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", "lorif_index", "bench/*.py")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def median_seconds(function: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    for _ in range(warm):
        function()
    return statistics.median(timed(function) for _ in range(repeats))


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_rss() -> int:
    """Bytes, of this process so far. (getrusage would begin with the parent's, across an exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

"""What all benchmarks share: their options, the clock, the page cache, results as JSON with commit and machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"


def arguments(description: str | None, **extra: Any) -> argparse.Namespace:
    """--smoke, --json, --threads, and what the benchmark adds: option -> arguments of `add_argument`.

    A smoke run has one thread.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows that it works")
    parser.add_argument("--json", type=Path, default=None, help="where to keep the result")
    parser.add_argument("--threads", type=int, default=2)
    for name, options in extra.items():
        flag = name if options.pop("positional", False) else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, **options)
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


def kept(name: str) -> dict[str, Any] | None:
    """A result of `bench/results/`; None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def environment() -> dict[str, Any]:
    """Commit, date, command, machine and versions."""

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


# -- the clock -----------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median of some calls, after one that warms up."""
    function()
    return statistics.median(timed(function) for _ in range(repeats))


def in_turn(routes: dict[str, Callable[[], Any]], repeats: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each route, `repeats` times, one after the other, so that all meet the same machine."""
    for function in routes.values() if warm else ():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(repeats):
        for name, function in routes.items():
            seconds[name].append(timed(function))
    return seconds


def medians(seconds: dict[str, list[float]], scale: float = 1.0) -> dict[str, float]:
    return {name: scale * statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, float]:
    """Of each route the median of its rounds' ratios to another route."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[to], strict=True))
        for name, values in seconds.items()
    }


# -- memory and the page cache -------------------------------------------------------------------------------------


def peak_rss() -> int:
    """Bytes, of this process so far. (getrusage would begin with the parent's, across an exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def shards(folder: Path) -> list[Path]:
    """The files of an index that hold its rows."""
    return sorted(folder.glob("shard-*"))


def read_files(paths: list[Path]) -> None:
    """Reads them whole, into one buffer that is used again."""
    buffer = memoryview(bytearray(8 << 20))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(paths: list[Path]) -> None:
    """Asks the kernel to drop them from its page cache (they were synced when sealed)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_fraction(paths: list[Path]) -> float | None:
    """Which part of them is in the page cache, by util-linux's fincore; None where there is none."""
    program = shutil.which("fincore")
    if program is None:
        return None
    command = [program, "-b", "-n", "-o", "RES", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, done.stdout.split())) / sum(path.stat().st_size for path in paths)


# -- children -----------------------------------------------------------------------------------------------------

RAISED, WRONG = 3, 4
"""Exit codes of a child that ended with an OSError, and with any other exception."""


def forked(work: Callable[[], Any], out: Path | None = None, *, seconds: int = 0, quiet: bool = False) -> int:
    """Starts a child that does some work, ends with 0, `RAISED` or `WRONG`, and runs nothing else of the parent's.

    Args:
        work: what it does.
        out: where it writes what this returns, as JSON.
        seconds: after which it is killed; 0: never.
        quiet: without its stderr.

    Returns:
        its process id.
    """
    child = os.fork()
    if child:
        return child
    code = WRONG
    try:
        signal.alarm(seconds)
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        found = work()
        if out is not None:
            out.write_text(json.dumps(found))
        code = 0
    except OSError:
        code = RAISED
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(work: Callable[[], Any], out: Path) -> Any:
    """What some work finds in a process of its own, whose peak memory is not the parent's.

    Raises:
        RuntimeError: the child failed.
    """
    if os.waitpid(forked(work, out), 0)[1]:
        raise RuntimeError("a child failed: see above")
    return json.loads(out.read_text())


# -- tables --------------------------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> None:
    """Prints columns, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plus_minus(figure: list[float], form: str = ".3f") -> str:
    """A mean and its standard error."""
    return f"{figure[0]:{form}} ± {figure[1]:.3f}"

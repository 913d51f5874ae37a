"""Progress: how far long work is, at what rate, how long it will take, and what memory it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProgressEvent:
    """One report.

    Attributes:
        stage: "sample", "curvature", "encode", "scan", ...
        done, total: in examples (total None where unknown).
        seconds: since the stage began.
        bytes: read or written by the stage so far.
        finished: the stage's last report.
    """

    stage: str
    done: int
    total: int | None
    seconds: float
    bytes: int = 0
    finished: bool = False

    @property
    def rate(self) -> float:
        """Examples per second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        if self.total is None or self.rate <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate


ProgressCallback = Callable[[ProgressEvent], None]


def peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    try:
        # What getrusage says begins with what the parent had, also across an exec.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stage:
    """One stage of reported work; `advance` is called as examples are done."""

    def __init__(self, callback: ProgressCallback | None, name: str, total: int | None) -> None:
        self.name, self.total = name, total
        self.done, self.bytes = 0, 0
        self._callback = callback
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def advance(self, examples: int, bytes: int = 0) -> None:
        self.done += examples
        self.bytes += bytes
        self._report(finished=False)

    def finish(self) -> None:
        self._report(finished=True)

    def _report(self, *, finished: bool) -> None:
        if self._callback is not None:
            self._callback(ProgressEvent(self.name, self.done, self.total, self.seconds, self.bytes, finished))


class Reporter:
    """Hands out stages and remembers how long each took."""

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        stage = Stage(self._callback, name, total)
        try:
            yield stage
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + stage.seconds
            stage.finish()


@contextmanager
def reporter(progress: bool | ProgressCallback | None) -> Iterator[Reporter]:
    """A reporter for what a caller passed as `progress=`.

    Args:
        progress: a callable gets every `ProgressEvent`; True shows bars on stderr; None does so when stderr is a
            terminal; False shows nothing.
    """
    if callable(progress):
        yield Reporter(progress)
    elif progress or (progress is None and sys.stderr.isatty()):
        with _bars() as callback:
            yield Reporter(callback)
    else:
        yield Reporter()


@contextmanager
def _bars() -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(event: ProgressEvent) -> None:
            rate = f"{event.rate:,.0f}/s" + (f"  {decimal(event.bytes)}" if event.bytes else "")
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, rate=rate)
            bars.update(tasks[event.stage], completed=event.done, rate=rate)
            if event.finished:
                del tasks[event.stage]

        yield report

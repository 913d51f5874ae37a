"""Writers that die: killed at any moment, or at each of the calls by which they change the file system, which may also
fail or write less than they were given."""

from __future__ import annotations

import errno
import importlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from bench.faults_cases import Template, attempt, run, settle

_RAISED, _WRONG = 3, 4
# Of an operation's time, measured once with cold caches, in which it is killed.
_SHARE = 0.8
MODES = ("ENOSPC", "EIO", "exit before", "exit after")
_WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR


class PowerCut(BaseException):
    """Stands for the process's end where it may not end: nothing is written after it."""


class Calls:
    """Counts the calls that change the file system, and lets one of them fail.

    Attributes:
        made: names of the calls so far.
    """

    NAMES = ("fsync", "pwrite", "posix_fallocate", "rename", "link", "unlink", "open", "ftruncate")

    def __init__(self, at: int = -1, mode: str = "") -> None:
        self._at, self._mode = at, mode
        self.made: list[str] = []
        self._dead = False

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & _WRITES):
                return real(*args, **kwargs)
            if name == "File" and (args[1:2] or (kwargs.get("mode"),))[0] != "w":
                return real(*args, **kwargs)
            if name == "write_index" and not isinstance(args[1], str):
                # Into memory.
                return real(*args, **kwargs)
            return self._called(name, real, args, kwargs)

        return call

    def _called(self, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._dead:
            raise PowerCut
        self.made.append(name)
        hit = len(self.made) - 1 == self._at
        if name == "pwrite" and (self._mode == "short always" or (hit and self._mode == "short")):
            data = memoryview(args[1])
            return real(args[0], data[: max(len(data) // 2, 1)], *args[2:])
        if not hit:
            return real(*args, **kwargs)
        if self._mode in ("ENOSPC", "EIO"):
            if name == "write_index":
                # faiss's own error, as after a short fwrite.
                raise RuntimeError("Error in write_index: Error: 'ret == (size)' failed: write error")
            number = getattr(errno, self._mode)
            raise OSError(number, os.strerror(number))
        if self._mode == "cut":
            self._dead = True
            raise PowerCut
        if self._mode == "exit after":
            real(*args, **kwargs)
        os._exit(9)

    @contextmanager
    def installed(self) -> Iterator[Calls]:
        owners: list[tuple[Any, str]] = [(os, name) for name in self.NAMES] + [(h5py, "File")]
        owners.append((importlib.import_module("faiss"), "write_index"))
        kept = [(owner, name, getattr(owner, name)) for owner, name in owners]
        try:
            for owner, name, real in kept:
                # h5py's own "File" is a class, that others only call here.
                setattr(owner, name, self._wrap(name, real))
            yield self
        finally:
            for owner, name, real in kept:
                setattr(owner, name, real)


def forked(work: Callable[[], int]) -> int:
    """Starts a child that does some work and ends with what it returns; the child's id."""
    pid = os.fork()
    if pid:
        return pid
    code = _WRONG
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        code = work()
    except OSError:
        code = _RAISED
    finally:
        os._exit(code)


def kill_trials(templates: list[Template], folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kills so many writers at random moments of every operation in turn; those that had finished are checked, too."""
    chance, wrong = random.Random(seed), []
    seconds: dict[int, float] = {}
    outcomes: Counter[str] = Counter()
    by_operation: Counter[str] = Counter()
    trial = 0
    while outcomes["killed"] < count:
        template = templates[trial % len(templates)]
        if trial < len(templates):
            template.begin(folder)
            began = time.perf_counter()
            os.waitpid(forked(lambda t=template: run(t.case, t.operation, folder) or 0), 0)  # type: ignore[misc]
            seconds[trial] = time.perf_counter() - began
        template.begin(folder)
        pid = forked(lambda t=template: run(t.case, t.operation, folder) or 0)  # type: ignore[misc]
        time.sleep(chance.uniform(0, _SHARE * seconds[trial % len(templates)]))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        outcomes["killed" if os.WIFSIGNALED(status) else "had finished"] += 1
        outcomes["committed" if _committed(template, folder) else "not committed"] += 1
        by_operation[template.operation] += 1
        found = attempt(lambda t=template: settle(t, folder))  # type: ignore[misc]
        wrong += [f"trial {trial}, {template.case.name}, {template.operation}: {what}" for what in found]
        trial += 1
    return {"trials": trial, "by_operation": dict(by_operation), "outcomes": dict(outcomes), "wrong": wrong}


def _committed(template: Template, folder: Path) -> bool:
    manifest = folder / "manifest.json"
    if template.start is None or not manifest.exists():
        return manifest.exists()
    return manifest.read_bytes() != (template.start / "manifest.json").read_bytes()


def calls_of(template: Template, folder: Path) -> list[str]:
    """The calls that an operation makes, in order."""
    template.begin(folder)
    with Calls().installed() as calls:
        run(template.case, template.operation, folder)
    return calls.made


def injection_trials(
    templates: list[Template], folder: Path, *, every_mode: bool, step: int = 1, offset: int = 0
) -> dict[str, Any]:
    """Lets every call of every operation fail once: in every way, or in one after the other."""
    wrong: list[str] = []
    sites: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    modes_done: Counter[str] = Counter()
    for template in templates:
        made = calls_of(template, folder)
        for at in range(offset, len(made), step):
            sites[made[at]] += 1
            modes = MODES if every_mode else (MODES[at % len(MODES)],)
            if made[at] == "pwrite":
                modes += ("short",)
            for mode in modes:
                found = attempt(lambda t=template, a=at, m=mode: _inject(t, folder, a, m, outcomes))  # type: ignore[misc]
                modes_done[mode] += 1
                where = f"{template.case.name}, {template.operation}, call {at} ({made[at]}), {mode}"
                wrong += [f"{where}: {what}" for what in found]
        found = attempt(lambda t=template: _inject(t, folder, -1, "short always", outcomes))  # type: ignore[misc]
        modes_done["short always"] += 1
        wrong += [f"{template.case.name}, {template.operation}, every write short: {what}" for what in found]
    return {
        "sites": sum(sites.values()),
        "trials": sum(modes_done.values()),
        "by_call": dict(sites),
        "by_mode": dict(modes_done),
        "outcomes": dict(outcomes),
        "wrong": wrong,
    }


def _inject(template: Template, folder: Path, at: int, mode: str, outcomes: Counter[str]) -> list[str]:
    template.begin(folder)

    def work() -> int:
        with Calls(at, mode).installed():
            run(template.case, template.operation, folder)
        return 0

    _, status = os.waitpid(forked(work), 0)
    if os.WIFSIGNALED(status):
        return [f"the process died of signal {os.WTERMSIG(status)}"]
    code = os.WEXITSTATUS(status)
    outcomes[{0: "done all the same", 9: "ended", _RAISED: "OSError"}.get(code, "another error")] += 1
    wrong = [] if code in (0, 9, _RAISED) else ["another error than an OSError"]
    if mode.startswith("short") and code != 0:
        wrong.append("a short write was not gone on with")
    return wrong + settle(template, folder)


def summed(a: Any, b: Any) -> Any:
    """Counts of two stores together."""
    return dict(Counter(a) + Counter(b)) if isinstance(a, dict) else a + b

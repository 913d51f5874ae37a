"""Claim: an index survives its writers' deaths, failing disks, flipped bits and hostile files; and what that costs.

Small indexes of every store are harmed in turn: writers are killed at random moments, every call that changes the file
system fails once, bits are flipped, files are forged, readers search while a writer changes everything. Nothing sealed
may be lost, no score may be wrong in silence, nothing may crash.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import xxhash

from bench.environment import RAISED, arguments, environment, forked, in_turn, keep, medians, ratios, table
from bench.environment import kept as kept_result
from bench.faults_cases import MORE, ROWS, Answer, Calls, N, Template, ask, blocks, cases, settle, templates
from bench.faults_damage import flip_trials, fuzz_trials
from lorif_index import BuildConfig, Index

MODES = ("ENOSPC", "EIO", "exit before", "exit after")
READERS = 4


def all_templates(root: Path, shard_bytes: int, smoke: bool) -> list[list[Template]]:
    chosen = cases(shard_bytes)[: 1 if smoke else None]
    return [templates(case, root / case.name.replace(" ", "-")) for case in chosen]


# -- writers that die ----------------------------------------------------------------------------------------------


def kill(root: Path, smoke: bool) -> dict[str, Any]:
    """Kills writers at random moments of every operation in turn; those that had finished are checked, too."""
    made = [template for part in all_templates(root, 3000, smoke) for template in part]
    count, folder, chance, trial = 12 if smoke else 520, root / "work", random.Random(0), 0
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    by_operation: Counter[str] = Counter()
    while outcomes["killed"] < count:
        template = made[trial % len(made)]
        template.begin(folder)
        writer = forked(lambda t=template: t.run(folder), quiet=True)
        time.sleep(chance.uniform(0, template.seconds))
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        outcomes["killed" if os.WIFSIGNALED(status) else "had finished"] += 1
        outcomes["committed" if template.committed(folder) else "not committed"] += 1
        by_operation[template.operation] += 1
        wrong += [f"trial {trial}, {template}: {what}" for what in settle(template, folder)]
        trial += 1
    return {"trials": trial, "by_operation": dict(by_operation), "outcomes": dict(outcomes), "wrong": wrong}


def inject(root: Path, smoke: bool) -> dict[str, Any]:
    """Lets every call of every operation fail once: of the first store in every way, of the others in one way after the
    other."""
    wrong: list[str] = []
    sites: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    modes_done: Counter[str] = Counter()
    folder = root / "work"

    def trial(template: Template, at: int, mode: str, where: str) -> None:
        template.begin(folder)

        def work() -> None:
            with Calls(at, mode).installed():
                template.run(folder)

        _, status = os.waitpid(forked(work, quiet=True), 0)
        code = os.waitstatus_to_exitcode(status)
        kinds = {0: "done all the same", 9: "ended", RAISED: "OSError"}
        outcomes[kinds.get(code, "another error")] += 1
        modes_done[mode] += 1
        found = [] if code in kinds else [f"another end than an OSError: {code}"]
        if mode.startswith("short") and code != 0:
            found.append("a short write was not gone on with")
        found += settle(template, folder) if code >= 0 else []
        wrong.extend(f"{template}, {where}, {mode}: {what}" for what in found)

    for number, part in enumerate(all_templates(root, 8000, smoke)):
        for template in part:
            template.begin(folder)
            with Calls().installed() as calls:
                template.run(folder)
            for at in range(0, len(calls.made), 9 if smoke else 1):
                name = calls.made[at]
                sites[name] += 1
                modes = MODES if number == 0 and not smoke else (MODES[at % len(MODES)],)
                for mode in (*modes, *(["short"] if name == "pwrite" else [])):
                    trial(template, at, mode, f"call {at} ({name})")
            trial(template, -1, "short always", "every write")
    return {
        "sites": sites.total(),
        "trials": modes_done.total(),
        "by_call": dict(sites),
        "by_mode": dict(modes_done),
        "outcomes": dict(outcomes),
        "wrong": wrong,
    }


# -- damage --------------------------------------------------------------------------------------------------------


def flip(root: Path, smoke: bool) -> dict[str, Any]:
    return flip_trials(changed(root, smoke), root, 40 if smoke else 2400)


def fuzz(root: Path, smoke: bool) -> dict[str, Any]:
    return fuzz_trials(changed(root, smoke), root, 60 if smoke else 5400)


def changed(root: Path, smoke: bool) -> list[Template]:
    """Of each store the one that begins with an index that was built and added to."""
    return [part[2] for part in all_templates(root, 8000, smoke)]


# -- readers -------------------------------------------------------------------------------------------------------


def told(answer: Answer) -> str:
    """An answer in short."""
    near = b"" if answer.near is None else answer.near.tobytes()
    parts = [answer.scores.tobytes(), answer.ids.tobytes(), json.dumps(answer.payloads).encode(), near]
    return str(xxhash.xxh3_128_hexdigest(b"".join(parts)))


def read(folder: Path, until: float, anew: bool) -> dict[str, Any]:
    """A reader's answers, each with its version, and its errors; by a handle that is opened anew or refreshed."""
    seen: list[tuple[int, str]] = []
    errors: list[str] = []
    held = Index.open(folder)
    while time.monotonic() < until:
        try:
            if anew:
                held.close()
                held = Index.open(folder)
            else:
                held.refresh()
            for _ in range(2):
                # Twice: the version may have been replaced in between, and still is whole.
                seen.append((held.generation, told(ask(held))))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            held = Index.open(folder)
    return {"seen": seen, "errors": errors}


def readers(root: Path, smoke: bool) -> dict[str, Any]:
    """Readers while a writer changes everything: each answer must be one version's, and agree with itself."""
    folder, case = root / "live", cases()[0]
    index = Index.build(folder, config=case.config, progress=False, **case.given(0, N))
    truth = {index.generation: told(ask(index))}
    until = time.monotonic() + (4.0 if smoke else 150.0)
    outs = {number: root / f"reader-{number}.json" for number in range(READERS)}
    children = [forked(lambda n=n: read(folder, until, n % 2 == 1), out) for n, out in outs.items()]
    more = {"gradients": blocks(ROWS[N:]), "payloads": [{"number": i} for i in range(MORE)]}
    changes: dict[str, Callable[[], Any]] = {
        "add": lambda: index.add(progress=False, **more),
        "remove": lambda: index.remove(index.ids[-MORE:]),
        "compact": lambda: index.compact(progress=False),
        "refit": lambda: index.refit(progress=False),
        "rebuild_coarse": lambda: index.rebuild_coarse("flat", progress=False),
    }
    made: Counter[str] = Counter()
    while time.monotonic() < until:
        for name, change in changes.items():
            change()
            made[name] += 1
            truth[index.generation] = told(ask(index))
    statuses = [os.waitpid(child, 0)[1] for child in children]
    wrong = [f"a reader ended with {status}" for status in statuses if status]
    found = [json.loads(out.read_text()) for out in outs.values() if out.exists()]
    answers = [pair for one in found for pair in one["seen"]]
    wrong += [error for one in found for error in one["errors"]]
    wrong += [f"an answer that version {g} does not give" for g, what in answers if truth.get(g) != what]
    index.verify()
    return {
        "readers": READERS,
        "answers": len(answers),
        "versions_written": len(truth),
        "versions_read": len({generation for generation, _ in answers}),
        "changes": dict(made),
        "wrong": wrong,
    }


# -- what it costs -------------------------------------------------------------------------------------------------


def cost(root: Path, smoke: bool) -> dict[str, Any]:
    """Builds with and without syncs; scans with and without comparing shards with their digests."""
    count, repeats, folder = (600, 2, root / "cost") if smoke else (20_000, 9, root / "cost")
    generator = torch.Generator().manual_seed(9)
    given = [{name: torch.randn(500, 32, 32, generator=generator) for name in "ab"} for _ in range(-(-count // 500))]
    config = BuildConfig(store="factors", rank=4, curvature_rank=64, coarse=None)

    def build() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        Index.build(folder, gradients=given, config=config, progress=False).close()

    def unsynced() -> None:
        with mock.patch.object(os, "fsync", lambda descriptor: None):
            build()

    builds = in_turn({"build without syncs": unsynced, "build": build}, max(repeats // 3, 1))
    asked = {name: part[:4] for name, part in given[0].items()}
    held = {verify: Index.open(folder, verify=verify) for verify in ("never", "first", "always")}

    def first(verify: str) -> None:
        with Index.open(folder, verify=verify) as index:
            index.scores(asked)

    firsts = in_turn({verify: lambda v=verify: first(v) for verify in held}, repeats)
    further = in_turn({verify: lambda i=index: i.scores(asked) for verify, index in held.items()}, repeats)
    size = held["never"].nbytes
    for index in held.values():
        index.close()
    return {
        "rows": count,
        "bytes": size,
        "repeats": repeats,
        "milliseconds": {
            **medians(builds, 1e3),
            "first scan of a new handle, by verify": medians(firsts, 1e3),
            "further scan, by verify": medians(further, 1e3),
        },
        "ratios": {
            "build": ratios(builds, "build without syncs")["build"],
            "first scan of a new handle, by verify": ratios(firsts, "never"),
            "further scan, by verify": ratios(further, "never"),
        },
    }


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "kill": kill,
    "inject": inject,
    "flip": flip,
    "fuzz": fuzz,
    "readers": readers,
    "cost": cost,
}


def main() -> None:
    import faiss

    parsed = arguments(__doc__, only={"choices": list(PARTS), "nargs": "+", "default": list(PARTS)})
    # Writers are forked from here: no other thread may be at work.
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    before = None if parsed.smoke else kept_result("faults")
    parts = {} if before is None else before["parts"]
    for name in parsed.only:
        root, began = Path(tempfile.mkdtemp(prefix="faults-")), time.perf_counter()
        try:
            result = PARTS[name](root, parsed.smoke)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        seconds = round(time.perf_counter() - began, 1)
        table([["", name], *([key, str(value)[:400]] for key, value in result.items()), ["seconds", str(seconds)]])
        parts[name] = result | {"seconds": seconds, "environment": environment()}
        keep("faults", {"parts": parts}, parsed)
    wrong = [f"{name}: {what}" for name in parsed.only for what in parts[name].get("wrong", [])]
    if wrong:
        raise SystemExit("\n".join(wrong[:40]))


if __name__ == "__main__":
    main()

"""Files that are not what they were: flipped bits, and indexes forged to look sound."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bench.environment import ROOT, forked
from bench.faults_cases import CLOSE, Answer, Template, answer, named_files, query, read_json, sealed, write_manifest
from lorif_index import Index
from lorif_index.errors import LorifError

SECONDS, GROWTH = 1.0, 200 << 20
"""Most that the use of a forged index may take of the processor's time, and of memory."""


def flip_trials(made: list[Template], root: Path, count: int, seed: int = 1) -> dict[str, Any]:
    """Flips one bit at a time; `verify` must tell, and what is asked must be refused or be answered as before."""
    chance, wrong = random.Random(seed), []
    outcomes: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for template in made:
        folder = root / "flipped"
        template.begin(folder)
        whole, names = answer(folder), sorted(named_files(folder)) + ["manifest.json"]
        for _ in range(-(-count // len(made))):
            path = folder / chance.choice(names)
            kept = path.read_bytes()
            data, at, bit = bytearray(kept), chance.randrange(len(kept)), chance.randrange(8)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            for what in _flipped(folder, whole, outcomes):
                wrong.append(f"{template.case.name}, {path.name}, byte {at}, bit {bit}: {what}")
            path.write_bytes(kept)
            files[path.stem.split("-")[0]] += 1
    return {"flips": files.total(), "outcomes": dict(outcomes), "by_file": dict(files), "wrong": wrong}


def _flipped(folder: Path, whole: Answer, outcomes: Counter[str]) -> list[str]:
    def scan(index: Index) -> bool:
        return np.array_equal(index.ids, whole.ids) and np.array_equal(index.scores(query()), whole.scores)

    def candidates(index: Index) -> bool:
        hits = index.search(query(), k=5, exact=False)
        if not np.array_equal(hits.ids, whole.near):
            return False
        expected = np.take_along_axis(whole.scores, np.searchsorted(whole.ids, hits.ids), 1)
        return bool(np.abs(hits.scores - expected).max() <= CLOSE * np.abs(whole.scores).max())

    uses: dict[str, Callable[[Index], Any]] = {"verify": lambda index: index.verify(), "scan": scan}
    if whole.near is not None:
        uses["candidate search"] = candidates
    wrong = []
    for name, use in uses.items():
        try:
            with Index.open(folder) as index:
                same = use(index)
        except LorifError:
            outcomes[f"{name} refused"] += 1
            continue
        outcomes[f"{name} not touched by it"] += bool(same)
        wrong += [] if same else [f"{name} did not see it"]
    return wrong


# -- forged indexes --------------------------------------------------------------------------------------------------

_NUMBERS = (-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, -(2**63), 1e308, -1e308, 0.5)
_VALUES = (*_NUMBERS, None, True, False, "", "x", "../x", "/etc/passwd", "manifest.json", ".", [], {}, [[]], "\ud800")
_WORDS = (0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in a manifest."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def at(data: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        data = data[key]
    return data


def change_manifest(folder: Path, chance: random.Random) -> str:
    """Values left out of a manifest, or others in their place: near by, odd, or from elsewhere in it; with a checksum
    that fits."""
    path = folder / "manifest.json"
    data, told = read_json(path), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        where = chance.choice(places(data))
        owner, key = at(data, where[:-1]), where[-1]
        # A copy: what is put inside of itself cannot be written.
        other = json.loads(json.dumps(at(data, chance.choice(places(data)))))
        near = owner[key] + chance.choice((-8, -1, 1, 8, 4096)) if type(owner[key]) is int else other
        new = chance.choice((None, near, other, chance.choice(_VALUES), chance.choice(_VALUES)))
        told.append(f"{where} = {str(new)[:60]}")
        owner[key] = new
        if chance.random() < 0.2:
            del owner[key]
    write_manifest(path, data)
    return "; ".join(told)


def replace_file(folder: Path, chance: random.Random) -> str:
    """A file that is shorter, longer, gone, another, or no file."""
    names = [*sorted(named_files(folder)), "manifest.json"]
    path, other, aside = folder / chance.choice(names), folder / chance.choice(names), folder / "aside"
    data, others = path.read_bytes(), other.read_bytes()
    aside.write_bytes(data)
    ways: dict[str, Callable[[], Any]] = {
        "shorter": lambda: path.write_bytes(data[: chance.randrange(len(data))]),
        "longer": lambda: path.write_bytes(data + bytes(chance.randrange(1, 5000))),
        "another file": lambda: path.write_bytes(others),
        "a link to the outside": lambda: path.symlink_to(folder.parent / "outside"),
        "the right bytes by a link": lambda: path.symlink_to(aside),
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "gone": lambda: None,
    }
    way = chance.choice(list(ways))
    path.unlink()
    ways[way]()
    return f"{path.name}: {way}"


def forge_contents(folder: Path, chance: random.Random) -> str:
    """Other bytes in a file, and a manifest that says they are right."""
    manifest = read_json(folder / "manifest.json")
    entry = chance.choice(sealed(manifest))
    path = folder / entry["file"]
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 2, 4))):
        # What tells kinds and sizes stands in front, and between long vectors.
        near = min(len(data) - 8, 400) if chance.random() < 0.6 else len(data) - 8
        at, size = chance.randrange(max(near, 1)), chance.choice((1, 4, 8))
        word = chance.choice(_WORDS) if chance.random() < 0.7 else chance.randrange(2**64)
        data[at : at + size] = struct.pack("<Q", word)[:size]
    if chance.random() < 0.15:
        data = data[: chance.randrange(len(data))]
    path.write_bytes(data)
    reseal(folder, manifest, entry, bytes(data))
    return f"{path.name} forged"


def reseal(folder: Path, manifest: dict[str, Any], entry: dict[str, Any], data: bytes) -> None:
    """Makes a manifest say that a file's new bytes are those that were sealed; `entry` is its part that names it.

    A coarse index stays one of the rows as they were, and may be refused for that.
    """
    entry["size"], entry["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
    for shard in manifest["shards"]:
        if shard["sealed"] is entry:
            begin = entry["offsets"]["ids"]
            shard["ids_digest"] = xxhash.xxh3_64_hexdigest(data[begin : begin + 8 * shard["rows"]])
    write_manifest(folder / "manifest.json", manifest)


def use_everything(folder: Path) -> tuple[int, int, list[str]]:
    """Asks an index everything: (answers, refusals, what is wrong)."""
    try:
        index = Index.open(folder)
    except LorifError:
        return 0, 1, []
    answers, refusals, asked = 0, 0, query()
    wrong: list[str] = []
    uses: dict[str, Callable[[], Any]] = {
        "verify": index.verify,
        "scores": lambda: index.scores(asked),
        "candidates": lambda: index.search(asked, k=5, exact=False),
        "coarse": lambda: index.search(asked, k=5, rescore=False),
        "payloads": index.payloads,
        "gradients": lambda: index.gradients(index.ids[:5]),
        "self": index.self_influence,
        "facts": lambda: (repr(index), index.nbytes, index.fingerprint, index.curvature_age, index.build_report),
    }
    for name, use in uses.items():
        try:
            use()
            answers += 1
        except LorifError:
            refusals += 1
        except BaseException as error:
            wrong.append(f"{name} raised {type(error).__name__}: {str(error)[:120]}")
    index.close()
    return answers, refusals, wrong


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _watch(folder: Path, told: list[str]) -> None:
    """Notes every file that is opened, and is neither the index's nor Python's own."""
    own = (str(folder), sys.prefix, sys.base_prefix, "/proc/self", str(ROOT), "/sys/", "/dev/null")
    events = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.symlink", "subprocess.Popen")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event in events else None
        if isinstance(path, (str, bytes, os.PathLike)) and not os.fsdecode(path).startswith(own):
            told.append(f"{event} of {os.fsdecode(path)[:100]}")

    sys.addaudithook(hook)


def contained(folder: Path, out: Path) -> dict[str, Any]:
    """Uses an index in a child of little memory: answers, refusals, what is wrong, seconds and growth in bytes."""

    def work() -> dict[str, Any]:
        told: list[str] = []
        _watch(folder, told)
        # What is declared to be larger than this cannot be taken, and is found out.
        before, limit = _status("VmRSS"), _status("VmSize") + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        began, busy = time.perf_counter(), time.process_time()
        answers, refusals, wrong = use_everything(folder)
        seconds, growth = time.perf_counter() - began, max(_status("VmHWM") - before, 0)
        # Others may be at work: what counts is the processor's time.
        busy = time.process_time() - busy
        wrong += told[:3] + ([f"{busy:.1f} s"] if busy > SECONDS else [])
        wrong += [f"{growth >> 20} MB more"] if growth > GROWTH else []
        return {"answers": answers, "refusals": refusals, "wrong": wrong, "seconds": seconds, "growth": growth}

    out.unlink(missing_ok=True)
    _, status = os.waitpid(forked(work, out, seconds=20, quiet=True), 0)
    if status:
        return {"answers": 0, "refusals": 0, "wrong": [f"the child ended with {status}"], "seconds": 0, "growth": 0}
    return read_json(out)


def fuzz_trials(made: list[Template], root: Path, count: int, seed: int = 2) -> dict[str, Any]:
    """Forges indexes and uses each in a child."""
    chance, wrong = random.Random(seed), []
    outcomes: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    slowest = largest = 0.0
    (root / "outside").write_bytes(b"nobody may read this")
    for trial in range(count):
        template, folder = made[trial % len(made)], root / "forged"
        template.begin(folder)
        way = chance.choices((change_manifest, replace_file, forge_contents), (4, 1, 4))[0]
        what = way(folder, chance)
        found = contained(folder, root / "found.json")
        slowest, largest = max(slowest, found["seconds"]), max(largest, found["growth"])
        outcomes["refused" if found["refusals"] else "answered"] += 1
        ways[way.__name__.replace("_", " ")] += 1
        wrong += [f"trial {trial}, {template.case.name}, {what}: {w}" for w in found["wrong"]]
        shutil.rmtree(folder)
    return {
        "trials": count,
        "by_way": dict(ways),
        "outcomes": dict(outcomes),
        "slowest_seconds": round(slowest, 3),
        "most_growth_mb": math.ceil(largest / 2**20),
        "wrong": wrong,
    }

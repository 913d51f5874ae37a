"""Files that are not what they were: flipped bits, and indexes forged to look sound."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import select
import shutil
import signal
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bench.faults_cases import Answer, Template, answer, query, read_json, write_manifest
from lorif_index import Index
from lorif_index.errors import LorifError

SECONDS, GROWTH = 1.0, 200 << 20
# Address space beyond what the parent has: what is declared to be larger cannot be taken, and is found out.
_ROOM = 1 << 30


def flip_trials(made: list[Template], root: Path, count: int, seed: int = 1) -> dict[str, Any]:
    """Flips one bit at a time; `verify` must tell, and what is asked must be refused or be answered as before."""
    chance, wrong = random.Random(seed), []
    outcomes: Counter[str] = Counter()
    files: Counter[str] = Counter()
    per = -(-count // len(made))
    for template in made:
        folder = root / "flipped"
        shutil.rmtree(folder, ignore_errors=True)
        template.begin(folder)
        if template.start is None:
            raise ValueError("flips need an index that is there")
        whole = answer(folder)
        with Index.open(folder) as index:
            names = sorted(file.info.file for file in index._reader.files()) + ["manifest.json"]
        for _ in range(per):
            path = folder / chance.choice(names)
            kept = path.read_bytes()
            data, at, bit = bytearray(kept), chance.randrange(len(kept)), chance.randrange(8)
            data[at] ^= 1 << bit

            path.write_bytes(data)
            for what in _flipped(folder, whole, outcomes):
                wrong.append(f"{template.case.name}, {path.name}, byte {at}, bit {bit}: {what}")
            path.write_bytes(kept)
            files[path.stem.split("-")[0]] += 1
    return {"flips": per * len(made), "outcomes": dict(outcomes), "by_file": dict(files), "wrong": wrong}


def _flipped(folder: Path, whole: Answer, outcomes: Counter[str]) -> list[str]:
    wrong = []
    try:
        with Index.open(folder) as index:
            index.verify()
        wrong.append("verify did not see it")
    except LorifError:
        outcomes["verify raised"] += 1
    try:
        with Index.open(folder) as index:
            found = _scores(index)
        same = np.array_equal(found[0], whole.ids) and np.array_equal(found[1], whole.scores)
        outcomes["a scan was not touched by it" if same else "a wrong scan"] += 1
        wrong += [] if same else ["another answer of a scan, in silence"]
    except LorifError:
        outcomes["a scan was refused"] += 1
    if whole.near is None:
        return wrong
    try:
        with Index.open(folder) as index:
            near = index.search(query(), k=5, exact=False)
        columns = np.searchsorted(whole.ids, near.ids)
        same = np.array_equal(near.ids, whole.near) and bool(
            np.abs(near.scores - np.take_along_axis(whole.scores, columns, 1)).max()
            <= 2e-5 * np.abs(whole.scores).max()
        )
        outcomes["a candidate search was not touched by it" if same else "a wrong candidate search"] += 1
        wrong += [] if same else ["another answer of a candidate search, in silence"]
    except LorifError:
        outcomes["a candidate search was refused"] += 1
    return wrong


def _scores(index: Index) -> tuple[np.ndarray, np.ndarray]:
    if index.codec == "coarse":
        hits = index.search(query(), k=10)
        return hits.ids, hits.scores
    return index.ids, index.scores(query())


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


def _change_manifest(folder: Path, chance: random.Random) -> str:
    path = folder / "manifest.json"
    data = read_json(path)
    told = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        where = chance.choice(places(data))
        told.append(_change(data, where, chance))
    write_manifest(path, data)
    return "; ".join(told)


def _change(data: Any, where: tuple[Any, ...], chance: random.Random) -> str:
    owner = data
    for key in where[:-1]:
        owner = owner[key]
    old = owner[where[-1]]
    way = chance.randrange(6)
    if way == 0:
        del owner[where[-1]]
        return f"{where} left out"
    if way == 1 and isinstance(old, (int, float)) and not isinstance(old, bool):
        owner[where[-1]] = new = old + chance.choice((-8, -1, 1, 8, 4096))
    elif way == 2 and isinstance(old, list) and old:
        owner[where[-1]] = new = old * 2 if chance.random() < 0.5 else old[:-1]
    elif way == 3:
        other: Any = data
        for key in chance.choice(places(data)):
            other = other[key]
        # A copy: what is put inside of itself cannot be written.
        owner[where[-1]] = new = json.loads(json.dumps(other))
    else:
        owner[where[-1]] = new = chance.choice(_VALUES)
    return f"{where} = {str(new)[:60]}"


def _named(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(p for p in folder.iterdir() if p.suffix in (".h5", ".faiss", ".json")))


def _replace_file(folder: Path, chance: random.Random) -> str:
    """A file that is shorter, longer, gone, another, or no file."""
    path = _named(folder, chance)
    data, way = path.read_bytes(), chance.randrange(9)
    path.unlink()
    if way == 0:
        path.write_bytes(data[: chance.randrange(len(data))])
    elif way == 1:
        path.write_bytes(b"")
    elif way == 2:
        path.write_bytes(data + bytes(chance.randrange(1, 5000)))
    elif way == 3:
        path.symlink_to(folder.parent / "outside")
    elif way == 4:
        os.mkfifo(path)
    elif way == 5:
        path.mkdir()
    elif way == 6:
        shutil.copyfile(_named(folder, chance), path)
    elif way == 7:
        # The right bytes, but by a link.
        (folder / "aside").write_bytes(data)
        path.symlink_to(folder / "aside")
    return f"{path.name}, way {way}"


def _forge_contents(folder: Path, chance: random.Random) -> str:
    """Other bytes in a file, and a manifest that says they are right."""
    manifest = read_json(folder / "manifest.json")
    sealed = _sealed(manifest)
    faiss = [entry for entry in sealed if entry["file"].endswith(".faiss")]
    entry = chance.choice(faiss) if faiss and chance.random() < 0.5 else chance.choice(sealed)
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


def _sealed(value: Any) -> list[dict[str, Any]]:
    """Every entry of a manifest that seals a file."""
    if isinstance(value, dict):
        own = [value] if {"file", "size", "digest", "offsets"} <= set(value) else []
        return own + [entry for inner in value.values() for entry in _sealed(inner)]
    return [entry for inner in value for entry in _sealed(inner)] if isinstance(value, list) else []


def reseal(folder: Path, manifest: dict[str, Any], entry: dict[str, Any], data: bytes) -> None:
    """Makes a manifest say that a file's new bytes are those that were sealed; `entry` is its part that names it."""
    entry["size"], entry["digest"] = len(data), xxhash.xxh3_128_hexdigest(data)
    for shard in manifest["shards"]:
        if shard["sealed"] is entry:
            begin = entry["offsets"]["ids"]
            shard["ids_digest"] = xxhash.xxh3_64_hexdigest(data[begin : begin + 8 * shard["rows"]])
    write_manifest(folder / "manifest.json", manifest)
    if manifest["coarse"] is None or entry is manifest["coarse"]["file"]:
        return
    # The coarse index was made from the old digests: it is said to be of the new ones.
    try:
        with Index.open(folder) as index:
            name = index._reader.coarse_fingerprint(manifest["coarse"]["factory"])
    except LorifError:
        return
    old = manifest["coarse"]["file"]["file"]
    manifest["coarse"]["fingerprint"] = name
    manifest["coarse"]["file"]["file"] = f"coarse-{name[:16]}.faiss"
    (folder / old).rename(folder / manifest["coarse"]["file"]["file"])
    write_manifest(folder / "manifest.json", manifest)


_WAYS: tuple[Callable[[Path, random.Random], str], ...] = (_change_manifest, _replace_file, _forge_contents)
_WEIGHTS = (4, 1, 4)


def use_everything(folder: Path) -> tuple[int, int, list[str]]:
    """Asks an index everything: (answers, refusals, what is wrong)."""
    answers = refusals = 0
    wrong: list[str] = []
    try:
        index = Index.open(folder)
    except LorifError:
        return 0, 1, []
    asked = query()
    uses: dict[str, Callable[[], Any]] = {
        "verify": index.verify,
        "scores": lambda: index.scores(asked),
        "candidates": lambda: index.search(asked, k=5, exact=False),
        "coarse": lambda: index.search(asked, k=5, rescore=False),
        "payloads": index.payloads,
        "coordinates": index.coordinates,
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
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            at = "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
            wrong.append(f"{name} raised {type(error).__name__} at {at}: {str(error)[:120]}")
    index.close()
    return answers, refusals, wrong


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _watch(folder: Path, told: list[str]) -> None:
    """Notes every file that is opened, and is neither the index's nor Python's own."""
    own = (
        str(folder),
        sys.prefix,
        sys.base_prefix,
        "/proc/self",
        str(Path(__file__).parent.parent),
        "/sys/",
        "/dev/null",
    )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.symlink", "subprocess.Popen"):
            path = arguments[0]
            if isinstance(path, (str, bytes, os.PathLike)) and not os.fsdecode(path).startswith(own):
                told.append(f"{event} of {os.fsdecode(path)[:100]}")

    sys.addaudithook(hook)


def contained(folder: Path, use: Callable[[Path], tuple[int, int, list[str]]] = use_everything) -> dict[str, Any]:
    """Uses an index in a child of little memory: what came of it."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(receive)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            told: list[str] = []
            _watch(folder, told)
            before, limit = _status("VmRSS"), _status("VmSize") + _ROOM
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            began, busy = time.perf_counter(), time.process_time()
            answers, refusals, wrong = use(folder)
            found = {
                "answers": answers,
                "refusals": refusals,
                "wrong": wrong + told[:3],
                "seconds": time.perf_counter() - began,
                "busy": time.process_time() - busy,
                "growth": max(_status("VmHWM") - before, 0),
            }
            os.write(send, json.dumps(found).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], 20.0)
    raw = os.read(receive, 1 << 16) if ready else b""
    os.close(receive)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not raw:
        died = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return {
            "answers": 0,
            "refusals": 0,
            "wrong": [f"the process ended with {died}"],
            "seconds": 0,
            "busy": 0,
            "growth": 0,
        }
    return dict(json.loads(raw))


def judge(found: dict[str, Any]) -> list[str]:
    """What is wrong with how a forged index was met. Its time is that of the processor: others may be at work."""
    wrong = list(found["wrong"])
    wrong += [f"{found['busy']:.1f} s"] if found["busy"] > SECONDS else []
    wrong += [f"{found['growth'] >> 20} MB more"] if found["growth"] > GROWTH else []
    return wrong


def fuzz_trials(made: list[Template], root: Path, count: int, seed: int = 2) -> dict[str, Any]:
    """Forges indexes and uses each in a child."""
    chance, wrong = random.Random(seed), []
    outcomes: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    slowest = largest = 0.0
    (root / "outside").write_bytes(b"nobody may read this")
    for trial in range(count):
        template = made[trial % len(made)]
        folder = root / "forged"
        _cleared(folder)
        template.begin(folder)
        way = chance.choices(_WAYS, _WEIGHTS)[0]
        what = way(folder, chance)
        found = contained(folder)
        slowest, largest = max(slowest, found["seconds"]), max(largest, found["growth"])
        outcomes["refused" if found["refusals"] else "answered"] += 1
        ways[way.__name__.strip("_").replace("_", " ")] += 1
        wrong += [f"trial {trial}, {template.case.name}, {what}: {w}" for w in judge(found)]
    return {
        "trials": count,
        "by_way": dict(ways),
        "outcomes": dict(outcomes),
        "slowest_seconds": round(slowest, 3),
        "most_growth_mb": math.ceil(largest / 2**20),
        "wrong": wrong,
    }


def _cleared(folder: Path) -> None:
    if folder.exists():
        for item in folder.iterdir():
            if stat.S_ISDIR(item.lstat().st_mode):
                shutil.rmtree(item)
            else:
                item.unlink()
        folder.rmdir()

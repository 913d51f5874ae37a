"""Claim: an index survives its writers' deaths, failing disks, flipped bits and hostile files; and what that costs.

Small indexes of every store are harmed in turn: writers are killed at random moments, every call that changes the file
system fails once, bits are flipped, files are forged, readers search while a writer changes everything. Nothing sealed
may be lost, no score may be wrong in silence, nothing may crash.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import faults_cost, faults_crash, faults_damage, faults_readers
from bench.environment import RESULTS, arguments, environment, keep, table
from bench.faults_cases import Template, cases, templates
from lorif_index.search.coarse import load_faiss

PARTS = ("kill", "inject", "flip", "fuzz", "readers", "cost")


def all_templates(root: Path, shard_bytes: int, smoke: bool) -> list[list[Template]]:
    chosen = cases(shard_bytes)[: 1 if smoke else None]
    return [templates(case, root / case.name.replace(" ", "-")) for case in chosen]


def kill(root: Path, smoke: bool) -> dict[str, Any]:
    made = [template for part in all_templates(root, 3000, smoke) for template in part]
    return faults_crash.kill_trials(made, root / "work", 12 if smoke else 520)


def inject(root: Path, smoke: bool) -> dict[str, Any]:
    """Every call of every operation: of the first store in every way, of the others in one way after the other."""
    found: dict[str, Any] = {}
    for number, part in enumerate(all_templates(root, 8000, smoke)):
        step = 9 if smoke else 1
        trials = faults_crash.injection_trials(part, root / "work", every_mode=number == 0 and not smoke, step=step)
        for key, value in trials.items():
            found[key] = faults_crash.summed(found[key], value) if key in found else value
    return found


def flip(root: Path, smoke: bool) -> dict[str, Any]:
    made = [part[2] for part in all_templates(root, 8000, smoke)]
    return faults_damage.flip_trials(made, root, 40 if smoke else 2400)


def fuzz(root: Path, smoke: bool) -> dict[str, Any]:
    made = [part[2] for part in all_templates(root, 8000, smoke)]
    return faults_damage.fuzz_trials(made, root, 60 if smoke else 5400)


def readers(root: Path, smoke: bool) -> dict[str, Any]:
    return faults_readers.reader_trials(cases()[0], root, seconds=4.0 if smoke else 150.0)


def cost(root: Path, smoke: bool) -> dict[str, Any]:
    return faults_cost.costs(root, 600 if smoke else 20_000, 2 if smoke else 9)


def main() -> None:
    parsed = arguments(__doc__ or "", only={"choices": PARTS, "nargs": "+", "default": list(PARTS)})
    # Writers are forked from here: no other thread may be at work.
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    path = parsed.json or RESULTS / "faults.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() and not parsed.smoke else {}
    for name in parsed.only:
        part: Callable[[Path, bool], dict[str, Any]] = globals()[name]
        root, began = Path(tempfile.mkdtemp(prefix="faults-")), time.perf_counter()
        try:
            result = part(root, parsed.smoke)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        parts[name] = result | {"seconds": round(time.perf_counter() - began, 1), "environment": environment()}
        shown = {key: value for key, value in parts[name].items() if key != "environment"}
        table([["", name], *([key, str(value)[:400]] for key, value in shown.items())])
        keep("faults", {"parts": parts}, parsed)
    wrong = [f"{name}: {what}" for name in parsed.only for what in parts[name].get("wrong", [])]
    if wrong:
        raise SystemExit("\n".join(wrong[:40]))


if __name__ == "__main__":
    main()

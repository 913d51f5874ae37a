"""Claim: what `Index.estimate` says of a build before it starts is within 20% of what the build then takes.

The model of a task before its training, whose gradients cost the same: an estimate, the build, and an estimate again,
so that a machine that is busier at one time than at another is seen.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.environment import arguments, keep, table
from bench.tasks import TASKS, take
from lorif_index import Estimate, Index


def measure(name: str, count: int, smoke: bool) -> dict[str, Any]:
    """One task's figures."""
    task = TASKS[name](smoke)
    model, data = task.begin(0).eval(), take(task.data, slice(0, count))
    with tempfile.TemporaryDirectory() as place:
        before = Index.estimate(model=model, data=data)
        built = in_child(Path(place), model, data)
    after = Index.estimate(model=model, data=data)
    report, nbytes, rows = built["report"], built["nbytes"], built["rows"]
    taken = sum(report["seconds"].values())

    def said(value: Estimate) -> dict[str, Any]:
        return {"disk": value.disk_total, "seconds": round(value.seconds_total, 1), "memory": value.memory}

    return {
        "examples": rows,
        "before": said(before),
        "built": {"disk": nbytes, "seconds": round(taken, 1), "memory": report["peak_rss_bytes"]},
        "after": said(after),
        "stages": {"before": before.seconds, "built": report["seconds"], "after": after.seconds},
        "ratios": {
            "disk": before.disk_total / nbytes,
            "seconds": [before.seconds_total / taken, after.seconds_total / taken],
            "memory": before.memory / report["peak_rss_bytes"],
        },
    }


def in_child(place: Path, model: Any, data: Any) -> dict[str, Any]:
    """The build, in a process of its own, whose peak memory is not the estimate's."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with Index.build(place / "i", model=model, data=data) as index:
                facts = {"report": index.build_report, "nbytes": index.nbytes, "rows": len(index)}
            (place / "facts.json").write_text(json.dumps(facts))
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the build failed: see above")
    return json.loads((place / "facts.json").read_text())


def main() -> None:
    parsed = arguments(__doc__ or "", tasks={"nargs": "*", "default": None})
    tasks = parsed.tasks or (["digits"] if parsed.smoke else ["digits", "scratch"])
    # A child that is forked must not wait for threads that it has not.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {name: measure(name, 256 if parsed.smoke else 2048, parsed.smoke) for name in tasks}
    rows = [["task", "", "bytes on disk", "seconds", "GB of memory"]]
    for name, facts in found.items():
        for kind in ("before", "built", "after"):
            part = facts[kind]
            rows.append([name, kind, f"{part['disk']:,}", f"{part['seconds']}", f"{part['memory'] / 1e9:.2f}"])
    table(rows)
    keep("estimate_accuracy", {"tasks": found}, parsed)


if __name__ == "__main__":
    main()

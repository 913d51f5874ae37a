"""Question: what do scores averaged over checkpoints gain in LDS, at as many times the bytes, and at the same bytes?

Checkpoints are the task's model trained on everything with several seeds (Park et al., arXiv:2303.14186, average over
models likewise). One ensemble of all of them is fitted as the library's default does, projections and curvature, and
the gradients of its first one, two and four members are then stored: in rows of so many times the default's bytes, in
rows of the default's bytes for all members together, and unrounded under the full inverse. What a member's layers are
projected on and divided by depends on that member alone, so that the fit is that of the smaller ensembles, too.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional

from bench.environment import arguments, keep, table
from bench.frontier import Gradients, dense, shaped
from bench.lds import lds, membership, summary
from bench.lds_truth import gather, make
from bench.methods import gathered
from bench.tasks import TASKS, batches, size
from lorif_index import BuildConfig, CurvatureRows, Index
from lorif_index.capture.ensemble import Ensemble

# Bytes of a row of the default with one member: what `eigen_bytes` asks for, or the factors of single predictions.
SAME_BYTES = {"digits": 340, "finetuned": 1600}
DAMPING = 0.1


def of_members(gradients: Gradients, members: tuple[int, ...]) -> Gradients:
    """The layers of some members."""
    return {name: g for name, g in gradients.items() if int(name.partition(".")[0]) in members}


def padded(rows: Gradients) -> Gradients:
    """Rows of zeros behind those of layers that have fewer, which add nothing to a second moment."""
    most = max(len(g) for g in rows.values())
    return {name: functional.pad(g, (0, 0, 0, most - len(g))) for name, g in rows.items()}


def main() -> None:
    parsed = arguments(__doc__ or "", task={"default": "digits", "choices": sorted(SAME_BYTES)})
    smoke = parsed.smoke
    task = TASKS[parsed.task](smoke)
    if smoke:
        make(task, smoke=True)
    losses = gather(task, smoke)
    truth, halves = losses.mean(axis=0), membership(task)
    counts = (1, 2) if smoke else (1, 2, 4)
    models = Ensemble([task.full(seed, smoke) for seed in range(max(counts))])
    same = SAME_BYTES[task.name]
    rows: list[dict[str, Any]] = []
    values: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def note(how: str, members: tuple[int, ...], scores: np.ndarray, each: float) -> None:
        found = values[how, members] = lds(scores, halves, truth)
        one = values.get((how, (0,)), found)
        figures = {"lds": summary(found), "minus_one": summary(found - one)}
        rows.append({"stored": how, "members": list(members), "bytes": each, **figures})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = BuildConfig(
            projection_dim=8 if smoke else "auto",
            curvature_rank=None,
            store="factors",
            rank=None,
            dtype="float32",
            coarse=None,
            damping=DAMPING,
        )
        began = time.perf_counter()
        fitted = Index.build(folder / "fit", model=list(models), data=task.data, config=config, progress=False)
        seconds = time.perf_counter() - began
        print(f"{len(models)} checkpoints fitted in {seconds:.0f} s", flush=True)
        data = {name: left.flatten(1) for name, (left, _) in fitted.factors().items()}
        asked = gathered(models, batches(task.queries), config, fitted)
        roots = {name: (layer.basis * layer.eigenvalues.float().sqrt()).T for name, layer in fitted.curvature.items()}

        def stored(how: str, members: tuple[int, ...], **settings: Any) -> None:
            mine = of_members(data, members)
            of_curvature = padded(of_members(roots, members))
            count = len(next(iter(of_curvature.values())))
            index = Index.build(
                folder / str(len(rows)),
                gradients=list(batches(shaped(mine, fitted.specs), 512)),
                curvature=CurvatureRows([shaped(of_curvature, fitted.specs)], rows_per_example=count),
                config=BuildConfig(coarse=None, damping=DAMPING, curvature_sample=task.count, **settings),
                progress=False,
            )
            scores = index.scores(shaped(of_members(asked, members), fitted.specs))
            note(how, members, scores, float(index.bytes_per_example))

        for count in counts:
            members = tuple(range(count))
            stored("default, bytes for each member", members, eigen_bytes=count * BuildConfig().eigen_bytes)
            stored("eigencodes, bytes of one for all", members, store="eigen", eigen_bytes=same)
            moment = {name: root.T @ root for name, root in of_members(roots, members).items()}
            scores = dense(of_members(asked, members), of_members(data, members), moment, DAMPING)
            each = sum(2.0 * g.shape[1] for g in of_members(data, members).values())
            note("unrounded, full inverse", members, scores, each)
        for seed in range(1, max(counts)):
            stored("default, bytes for each member", (seed,))
    lines = [["stored", "checkpoints", "bytes", "LDS", "minus the first alone"]]
    for r in rows:
        lines.append(
            [
                r["stored"],
                ", ".join(map(str, r["members"])),
                f"{r['bytes']:,.0f}",
                "{:.3f} ± {:.3f}".format(*r["lds"]),
                "{:+.3f} ± {:.3f}".format(*r["minus_one"]),
            ]
        )
    table(lines)
    result = {
        "task": task.name,
        "examples": task.count,
        "queries": size(task.queries),
        "halves": len(truth),
        "seeds": len(losses),
        "fit_seconds": round(seconds, 1),
        "rows": rows,
    }
    keep("ensembles", result, parsed, task.name)


if __name__ == "__main__":
    main()

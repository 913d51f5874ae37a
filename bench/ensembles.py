"""Question: what do scores averaged over checkpoints gain in LDS, at as many times the bytes, and at the same bytes?

Checkpoints are the task's model trained on everything with several seeds (Park et al., arXiv:2303.14186, average over
models likewise). Of the first one, two and four the library builds indexes: with rows of so many times the default's
bytes, with rows of the default's bytes for all members together, and of the first checkpoint alone with as many bytes
as the ensembles take. What rounding does is told by d = 32's unrounded gradients under the full inverse.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import arguments, keep, table
from bench.frontier import Gradients, dense
from bench.lds import lds, membership, summary
from bench.lds_truth import gather, make
from bench.methods import gathered
from bench.tasks import TASKS, batches, size
from lorif_index import BuildConfig, Index
from lorif_index.capture.ensemble import Ensemble

# Bytes of a row of the default with one member: what `eigen_bytes` asks for, or the factors of single predictions.
SAME_BYTES = {"digits": 340, "finetuned": 1600}
DAMPING = 0.1
EACH = "default, bytes for each member"


def of_members(gradients: Gradients, members: tuple[int, ...]) -> Gradients:
    """The layers of some members."""
    return {name: g for name, g in gradients.items() if int(name.partition(".")[0]) in members}


def main() -> None:
    parsed = arguments(__doc__ or "", task={"default": "digits", "choices": sorted(SAME_BYTES)})
    smoke = parsed.smoke
    task = TASKS[parsed.task](smoke)
    if smoke:
        make(task, smoke=True)
    losses = gather(task, smoke)
    truth, halves = losses.mean(axis=0), membership(task)
    counts = (1, 2) if smoke else (1, 2, 4)
    models = [task.full(seed, smoke) for seed in range(max(counts))]
    narrow: dict[str, Any] = {"projection_dim": 8} if smoke else {}
    same = SAME_BYTES[task.name]
    rows: list[dict[str, Any]] = []
    values: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def note(how: str, members: tuple[int, ...], scores: np.ndarray, each: float, against: str | None = None) -> None:
        found = values[how, members] = lds(scores, halves, truth)
        alone = values.get((against or how, (0,)), found)
        figures = {"lds": summary(found), "minus_one": summary(found - alone)}
        rows.append({"stored": how, "members": list(members), "bytes": each, **figures})
        print(rows[-1], flush=True)

    def built(how: str, members: tuple[int, ...], against: str | None = None, **settings: Any) -> None:
        config = BuildConfig(coarse=None, damping=DAMPING, **narrow, **settings)
        with tempfile.TemporaryDirectory() as folder:
            index = Index.build(
                Path(folder) / "i", model=[models[m] for m in members], data=task.data, config=config, progress=False
            )
            note(how, members, index.scores(task.queries), float(index.bytes_per_example), against)

    each = BuildConfig().eigen_bytes
    for count in counts:
        members = tuple(range(count))
        built(EACH, members, eigen_bytes=count * each)
        built("eigencodes, bytes of one for all", members, store="eigen", eigen_bytes=same)
        if count > 1 and same == each:
            how = f"the first alone, {count} times the bytes"
            built(how, (0,), EACH, eigen_bytes=count * each)
            rows[-1]["ensemble_minus_this"] = summary(values[EACH, members] - values[how, (0,)])
            print("ensemble minus this: {:+.3f} ± {:.3f}".format(*rows[-1]["ensemble_minus_this"]), flush=True)
    for seed in range(1, max(counts)):
        built(EACH, (seed,))
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(
            curvature_rank=None, store="factors", rank=None, dtype="float32", coarse=None, damping=DAMPING, **narrow
        )
        fitted = Index.build(Path(folder) / "fit", model=models, data=task.data, config=config, progress=False)
        data = {name: g.flatten(1) for name, g in fitted.gradients(fitted.ids).items()}
        asked = gathered(Ensemble(models), batches(task.queries), config, fitted)
        roots = {name: (layer.basis * layer.eigenvalues.float().sqrt()).T for name, layer in fitted.curvature.items()}
        for count in counts:
            members = tuple(range(count))
            moment = {name: root.T @ root for name, root in of_members(roots, members).items()}
            scores = dense(of_members(asked, members), of_members(data, members), moment, DAMPING)
            whole = sum(2.0 * g.shape[1] for g in of_members(data, members).values())
            note("unrounded, full inverse", members, scores, whole)
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
        "rows": rows,
    }
    keep("ensembles", result, parsed, task.name)


if __name__ == "__main__":
    main()

"""Claim: the default predicts retraining best (LDS), side by side with other methods on the same model and queries.

The linear datamodeling score (Ilyas et al., arXiv:2202.00622; Park et al., arXiv:2303.14186) is the rank correlation,
over random halves of the training set, of the scores summed over a half with minus the query's loss after training on
that half; here its mean over queries. Every method runs at its own default damping, and at the best of a sweep that is
chosen on the even queries and reported on the odd ones; and with its scores shrunk, as by
`Index.scores(shrink=True)`. `bench.lds_truth` makes the truth.

Each method's scores are kept, so that methods can be run one by one (`--methods`), other libraries in an environment of
their own; a call without methods to run gathers what is there.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from bench.environment import CACHE, arguments, keep, plus_minus, table
from bench.environment import kept as kept_result
from bench.lds_truth import gather, make
from bench.methods import METHODS
from bench.peers import Peer
from bench.tasks import TASKS, Task
from lorif_index.search.shrinkage import shrink, thresholds


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(q,) Spearman correlations of rows."""
    ranks = [rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (a, b)]
    norms = [np.sqrt(np.square(r).sum(axis=1)) for r in ranks]
    return (ranks[0] * ranks[1]).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-12)


def trial(name: str, smoke: bool) -> tuple[Task, np.ndarray, np.ndarray]:
    """A task, its losses after retraining (seeds, subsets, q), and which examples are in a half (subsets, n).

    A smoke run makes the truth on the spot.
    """
    task = TASKS[name](smoke)
    if smoke:
        make(task, smoke=True)
    return task, gather(task, smoke), membership(task)


def membership(task: Task) -> np.ndarray:
    """(subsets, n) float64, one where an example is in a half."""
    out = np.zeros((task.subsets, task.count))
    for number in range(task.subsets):
        out[number, task.subset(number)] = 1.0
    return out


def lds(scores: np.ndarray, members: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(q,) of scores (q, n), for losses (subsets, q)."""
    return correlations(scores.astype(np.float64) @ members.T, -truth.T)


def ceiling(losses: np.ndarray) -> dict[str, float]:
    """How well one seed's truth predicts another's, and (Spearman and Brown) what their mean can be predicted by."""
    seeds = len(losses)
    if seeds < 2:
        return {}
    pairs = [correlations(losses[i].T, losses[j].T).mean() for i in range(seeds) for j in range(i)]
    between = float(np.mean(pairs))
    return {"seed to seed": between, "mean of seeds": float(np.sqrt(seeds * between / (1 + (seeds - 1) * between)))}


def summary(values: np.ndarray) -> list[float]:
    """Mean and standard error."""
    return [round(float(values.mean()), 4), round(float(values.std(ddof=1) / np.sqrt(len(values))), 4)]


def judge(found: Peer, members: np.ndarray, truth: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    """The figures of one method; `reference` is the library default's per query."""
    each = {label: lds(scores, members, truth) for label, scores in found.scores.items()}
    even, odd = slice(0, None, 2), slice(1, None, 2)
    best = max(each, key=lambda label: each[label][even].mean())
    default = each[found.default]
    scores = found.scores[found.default].astype(np.float32)
    smaller = torch.from_numpy(scores.copy())
    shrink(smaller, thresholds(scores, scores.shape[1]))
    shrunk = lds(smaller.numpy(), members, truth)
    out = {
        "default": found.default,
        "lds": summary(default),
        "lds_odd": summary(default[odd]),
        "lds_shrunk": summary(shrunk),
        "shrunk_minus_lds": summary(shrunk - default),
        "best": best,
        "best_odd": summary(each[best][odd]),
        "sweep": {label: summary(values) for label, values in each.items()},
        "bytes_per_example": found.bytes_per_example,
        "build_seconds": round(found.build_seconds, 2),
        "query_milliseconds": round(found.query_milliseconds, 3),
        "note": found.note,
    }
    if reference is not None:
        out["minus_library"] = summary(default - reference)
        out["best_minus_library_odd"] = summary((each[best] - reference)[odd])
    return out


def score_file(task: Task, smoke: bool, method: str) -> Path:
    plain = "".join(c if c.isalnum() else "-" for c in method)
    return CACHE / "lds" / (task.name + ("-smoke" if smoke else "")) / f"{plain}.npz"


def save(path: Path, found: Peer) -> None:
    """Keeps a method's scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {k: v for k, v in vars(found).items() if k != "scores"}
    arrays = {f"scores {label}": scores.astype(np.float32) for label, scores in found.scores.items()}
    np.savez(path, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]


def kept(path: Path) -> Peer | None:
    """What `save` kept; None where there is none."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        scores = {key.removeprefix("scores "): file[key] for key in file.files if key != "facts"}
        return Peer(scores=scores, **json.loads(str(file["facts"])))


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "digits", "choices": sorted(TASKS)},
        methods={"nargs": "*", "default": None, "help": "methods to run; all that were not, by default"},
        again={"action": "store_true", "help": "also run what was kept"},
    )
    task, losses, members = trial(parsed.task, parsed.smoke)
    truth = losses.mean(axis=0)
    wanted = list(METHODS) if parsed.methods is None else parsed.methods
    if parsed.smoke and parsed.methods is None:
        wanted = ["random", "gradient dot", "LoGRA d=16", "LoRIF c=1", "library default"]
    model, failed = None, {}
    for name in wanted:
        path = score_file(task, parsed.smoke, name)
        if path.exists() and not parsed.again and not parsed.smoke:
            continue
        model = task.full(0, parsed.smoke) if model is None else model
        try:
            save(path, METHODS[name](task, model))
        except Exception as error:
            failed[name] = "".join(traceback.format_exception_only(error)).strip()
            print(f"{name}: {failed[name]}", flush=True)
    print(
        f"{task.name}: {task.count} examples, {truth.shape[1]} queries, {truth.shape[0]} halves x {len(losses)} seeds"
    )
    best = ceiling(losses)
    print(f"ceiling: {best or 'one seed, not known'}")
    reference = kept(score_file(task, parsed.smoke, "library default"))
    base = lds(reference.scores[reference.default], members, truth) if reference is not None else None
    rows, figures = [["method", "LDS, default", "shrunk", "best on odd", "at", "bytes", "build s", "query ms"]], {}
    before = None if parsed.smoke else kept_result(f"lds_{task.name}")
    for name in METHODS:
        found = kept(score_file(task, parsed.smoke, name))
        if name in failed:
            figures[name] = {"error": failed[name]}
            rows.append([name, "did not run", *[""] * 6])
        elif found is not None:
            f = figures[name] = judge(found, members, truth, base)
            rows.append(
                [name, plus_minus(f["lds"]), plus_minus(f["lds_shrunk"]), plus_minus(f["best_odd"]), f["best"]]
                + [f"{f['bytes_per_example']:,.0f}", f"{f['build_seconds']:.1f}", f"{f['query_milliseconds']:.2f}"]
            )
        elif before is not None and name in before["methods"]:
            # Its scores are on another machine. What was compared with another default's scores is left out.
            figures[name] = {k: v for k, v in before["methods"][name].items() if "minus_library" not in k}
    table(rows)
    result = {
        "task": task.name,
        "examples": task.count,
        "queries": truth.shape[1],
        "halves": truth.shape[0],
        "seeds": len(losses),
        "ceiling": best,
        "methods": figures,
    }
    keep("lds", result, parsed, task.name)


if __name__ == "__main__":
    main()

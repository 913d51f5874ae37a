"""Claim: proof by removal. Without the examples that a method names, the question's loss rises, by most for the best.

Of each question the k best training examples of a method are taken out, the model is trained again from the same start,
and the rise of that question's loss is compared between methods, question by question.

One training for each question, method, k and seed would take days. So questions are *pooled*: a training does without
the k best of several questions together (8 questions at k = 20, 2 at k = 100: at most 160 examples). A question's rise
is its loss after the training of its own pool, less its mean loss over the trainings of the other pools, which the same
method chose as many examples for, but of other questions. What a method removes for every question alike it so gains
nothing by; "over random" is the rise over the trainings of the method "random" instead, which counts that, and what is
removed for the rest of the pool, too. Pools come from one fixed permutation of the questions, the same for all methods.
`--pool 1` is the pure form. All trainings of a seed have the same batches but for what is removed from them, so that
they differ by nothing else; they are as long, too.

Standard errors are over questions. Those of one pool share a training: "se_pools" in the result is over pools.

Trainings are kept one by one, each with what was removed: it goes on where it stopped, several processes can share the
work (`--only rank` once, then `--only train --part I OF`), and a training whose examples a method no longer names is
not used. Stopped early, it has all methods on the first pools of the first k and seed. Scores of references and other
libraries are those that `bench.lds` keeps.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.environment import CACHE, arguments, keep, plus_minus, table
from bench.lds import kept, save, score_file, summary
from bench.methods import METHODS
from bench.tasks import TASKS, VOCABULARY, Task, batches, size
from lorif_index import Index

MOST = 100
"""How many examples of each question a method ranks."""
AT_MOST = 160
"""Examples that one training does without, where --pool does not say otherwise."""
DEFAULT, CHANCE, EXACT = "library default", "random", "library, all refined"


@dataclass(frozen=True)
class Study:
    """A task, and where its rankings and trainings are kept."""

    task: Task
    smoke: bool

    @property
    def folder(self) -> Path:
        return CACHE / "removal" / (self.task.name + ("-smoke" if self.smoke else ""))

    @cached_property
    def model(self) -> nn.Module:
        return self.task.full(0, self.smoke)

    @cached_property
    def index(self) -> Index:
        """With the defaults; built once, and kept."""
        path = self.folder / "index"
        if (path / "manifest.json").exists():
            return Index.open(path, model=self.model, data=self.task.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Index.build(path, model=self.model, data=self.task.data, progress=False)

    @property
    def failed(self) -> dict[str, str]:
        """Method -> error, of those that could not be ranked."""
        path = self.folder / "failed.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, method: str, error: str | None) -> None:
        """That it could not be ranked, or (None) that it was."""
        found = {name: its for name, its in self.failed.items() if name != method}
        (self.folder / "failed.json").write_text(json.dumps(found | ({} if error is None else {method: error})))

    def ranked(self, method: str) -> Path:
        return self.folder / "ranked" / f"{plain(method)}.npy"

    def ranking(self, method: str) -> np.ndarray | None:
        """(q, MOST) example numbers, best first; None if it was not made."""
        path = self.ranked(method)
        return np.load(path, allow_pickle=False) if path.exists() else None


Ranker = Callable[[Study], np.ndarray]


def plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# -- methods -------------------------------------------------------------------------------------------------------


def best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :MOST]


def searched(**settings: Any) -> Ranker:
    """What the library answers with."""

    def rank(study: Study) -> np.ndarray:
        k = min(MOST, study.task.count)
        chosen: dict[str, Any] = {
            name: study.task.count if value == "all" else value for name, value in settings.items()
        }
        return study.index.search(study.task.queries, k=k, **chosen).ids

    return rank


def scored(method: str, at: str | None = None) -> Ranker:
    """A method of `bench.lds`, at its own default or `at` another damping of its sweep."""

    def rank(study: Study) -> np.ndarray:
        path = score_file(study.task, study.smoke, method)
        if not path.exists():
            save(path, METHODS[method](study.task, study.model))
        found = kept(path)
        assert found is not None
        return best(found.scores[found.default if at is None else at])

    return rank


def bm25_scores(study: Study, k1: float = 1.2, b: float = 0.75, *, among: Any = None) -> np.ndarray:
    """(q, n) of the questions with the training data, or `among` others; over word numbers, but for the one of all
    rare words."""

    def counts(data: Any) -> np.ndarray:
        ids = data["input_ids"].numpy()
        out = np.zeros((len(ids), VOCABULARY))
        np.add.at(out, (np.arange(len(ids))[:, None], ids), 1.0)
        out[:, 0] = 0.0
        return out

    documents, asked = counts(study.task.data if among is None else among), counts(study.task.queries)
    having = (documents > 0).sum(axis=0)
    rarity = np.log1p((len(documents) - having + 0.5) / (having + 0.5))
    lengths = documents.sum(axis=1, keepdims=True)
    weights = documents * (k1 + 1) / (documents + k1 * (1 - b + b * lengths / lengths.mean()))
    return (asked * rarity) @ weights.T


def bm25(study: Study) -> np.ndarray:
    return best(bm25_scores(study))


def embedded(study: Study) -> np.ndarray:
    """Cosine of the model's last hidden states, averaged over tokens."""

    def points(data: Any) -> np.ndarray:
        with torch.no_grad():
            states = [study.model(**batch, output_hidden_states=True).hidden_states[-1] for batch in batches(data)]
        return nn.functional.normalize(torch.cat(states).mean(dim=1), dim=1).numpy()

    return best(points(study.task.queries) @ points(study.task.data).T)


RANKERS: dict[str, Ranker] = {
    DEFAULT: searched(),
    "library, reranked": searched(rerank=200),
    "library, refined and reranked": searched(rerank=200, refine=True),
    "library, relatif": searched(normalize="relatif"),
    "library, cosine": searched(normalize="cosine"),
    "EK-FAC (kronfluence)": scored("EK-FAC (kronfluence)"),
    "EK-FAC (bergson)": scored("EK-FAC (bergson)"),
    "EK-FAC and CG (bergson)": scored("EK-FAC and CG (bergson)"),
    "TrackStar (bergson)": scored("TrackStar (bergson)"),
    "LoGRA d=32": scored("LoGRA d=32"),
    "LoGRA (dattri)": scored("LoGRA (dattri)"),
    "TRAK p=2048": scored("TRAK p=2048"),
    "gradient cosine": scored("gradient cosine"),
    "BM25": bm25,
    "embedding cosine": embedded,
    CHANCE: scored("random"),
    EXACT: searched(rerank="all", refine=True),
}
UNASKED = (EXACT,)
"""Ranked, so that others can be compared with it, but not trained without unless named."""


def rank(study: Study, methods: list[str], again: list[str]) -> None:
    """Makes the rankings that are missing; what fails is left out, and its error kept."""
    if any(name.startswith("library") for name in again):
        shutil.rmtree(study.folder / "index", ignore_errors=True)
    for name in methods:
        path = study.ranked(name)
        if path.exists() and name not in again:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        try:
            np.save(path, RANKERS[name](study).astype(np.int32), allow_pickle=False)
        except Exception as error:
            study.note(name, "".join(traceback.format_exception_only(error)).strip()[:500])
            print(f"{name}: did not run: {study.failed[name]}", flush=True)
        else:
            study.note(name, None)
            print(f"{name}: ranked in {time.perf_counter() - began:.0f} s", flush=True)


# -- trainings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which questions are asked, and which of them share a training.

    Attributes:
        questions: how many, of the task's queries.
        seeds: how many trainings of each pool.
        pool: k -> questions in a pool.
    """

    questions: int
    seeds: int
    pool: dict[int, int]

    def pools(self, k: int, queries: int) -> list[np.ndarray]:
        order = np.random.default_rng(11).permutation(queries)[: self.questions]
        return [order[at : at + self.pool[k]] for at in range(0, len(order), self.pool[k])]


@dataclass(frozen=True)
class Job:
    """One training: what it does without, and where its losses are kept."""

    k: int
    seed: int
    pool: int
    method: str
    removed: np.ndarray
    path: Path

    def losses(self) -> np.ndarray | None:
        """(q,) of all queries; None if there are none, or of other examples."""
        if not self.path.exists():
            return None
        with np.load(self.path, allow_pickle=False) as found:
            return found["losses"] if np.array_equal(found["removed"], self.removed) else None

    def train(self, task: Task) -> None:
        model = task.begin(self.seed)
        task.fit(model, np.arange(task.count), self.seed, without=self.removed)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.savez(file, removed=self.removed, losses=task.losses(model).astype(np.float32))
        temporary.replace(self.path)


def jobs(study: Study, plan: Plan, methods: list[str]) -> Iterator[Job]:
    """In the order of the work."""
    for k, size_of in plan.pool.items():
        rankings = {name: study.ranking(name) for name in methods}
        for seed in range(plan.seeds):
            folder = study.folder / f"k{k}-pool{size_of}-seed{seed}"
            for number, pool in enumerate(plan.pools(k, size(study.task.queries))):
                for name, ids in rankings.items():
                    if ids is not None:
                        path = folder / f"{plain(name)}-{number:03d}.npz"
                        yield Job(k, seed, number, name, np.unique(ids[pool, :k]), path)


def train(study: Study, plan: Plan, methods: list[str], part: int = 0, of: int = 1) -> None:
    """Trains what is missing."""
    missing = [job for job in list(jobs(study, plan, methods))[part::of] if job.losses() is None]
    began = time.perf_counter()
    for done, job in enumerate(missing, 1):
        if job.losses() is None:  # Nobody else has made it meanwhile.
            job.train(study.task)
        each = (time.perf_counter() - began) / done
        left = (len(missing) - done) * each / 60
        print(
            f"k={job.k} seed {job.seed} pool {job.pool}, {job.method}: {len(job.removed)} removed, "
            f"{each:.1f} s each, {left:.0f} min left",
            flush=True,
        )


# -- figures -------------------------------------------------------------------------------------------------------


def gathered(study: Study, plan: Plan, methods: list[str], k: int) -> dict[str, np.ndarray]:
    """Method -> (seeds, pools, q) losses, NaN where a training is missing; of methods that have one."""
    pools = len(plan.pools(k, size(study.task.queries)))
    out: dict[str, np.ndarray] = {}
    for job in jobs(study, plan, methods):
        losses = job.losses() if job.k == k else None
        if losses is not None:
            empty = np.full((plan.seeds, pools, len(losses)), np.nan)
            out.setdefault(job.method, empty)[job.seed, job.pool] = losses
    return out


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(axis) / np.where(known.any(axis), known.sum(axis), np.nan)


def rises(losses: np.ndarray, pools: list[np.ndarray], chance: np.ndarray | None = None) -> np.ndarray:
    """(seeds, questions) rise of each pooled question, in the order of the pools: over the other pools, or chance."""
    out = []
    for number, pool in enumerate(pools):
        others = np.delete(losses, number, axis=1) if chance is None else chance
        out.append(losses[:, number, pool] - mean(others[:, :, pool], 1))
    return np.concatenate(out, axis=1)


def differences(losses: np.ndarray, its: np.ndarray, pools: list[np.ndarray]) -> np.ndarray:
    """(seeds, questions) rise of one method less another's, both of the trainings that both have."""
    both = np.isfinite(losses) & np.isfinite(its)
    mine, other = (rises(np.where(both, values, np.nan), pools) for values in (losses, its))
    return mine - other


def figure(values: np.ndarray) -> list[float] | None:
    """Mean and standard error over questions of values (seeds, questions), each first averaged over its seeds."""
    each = mean(values, 0)
    each = each[np.isfinite(each)]
    return summary(each) if len(each) > 1 else None


def by_pool(values: np.ndarray, pools: list[np.ndarray]) -> float | None:
    """Standard error over pools of the same mean."""
    each = mean(values, 0)
    ends = np.cumsum([len(pool) for pool in pools])
    means = np.array([mean(part, 0) for part in np.split(each, ends[:-1])])
    means = means[np.isfinite(means)]
    return summary(means)[1] if len(means) > 1 else None


def judged(study: Study, plan: Plan, methods: list[str], k: int) -> dict[str, Any]:
    """Figures of each method at one k."""
    pools = plan.pools(k, size(study.task.queries))
    losses = gathered(study, plan, methods, k)
    rise = {name: rises(found, pools) for name, found in losses.items()}
    chance = losses.get(CHANCE)
    exact, asked = study.ranking(EXACT), np.concatenate(pools)
    out = {}
    for name, found in rise.items():
        each = mean(found, 0)
        known = each[np.isfinite(each)]
        ids = study.ranking(name)
        assert ids is not None
        union = [len(np.unique(ids[pool, :k])) for pool in pools]
        figures: dict[str, Any] = {
            "trainings": int(np.isfinite(losses[name][:, :, 0]).sum()),
            "questions": len(known),
            "rise": figure(found),
            "rise_se_pools": by_pool(found, pools),
            "share_up": round(float((known > 0).mean()), 4) if len(known) else None,
            "removed": round(float(np.mean(union)), 1),
            "minus": {o: figure(differences(losses[name], its, pools)) for o, its in losses.items() if o != name},
            "rise_each": [None if np.isnan(v) else round(float(v), 4) for v in each],
        }
        if DEFAULT in rise and name != DEFAULT:
            figures["minus_default_se_pools"] = by_pool(differences(losses[name], losses[DEFAULT], pools), pools)
        if chance is not None and name != CHANCE:
            figures["over_random"] = figure(rises(losses[name], pools, chance))
        if exact is not None:
            shared = [len(np.intersect1d(ids[q, :k], exact[q, :k])) / k for q in asked]
            figures["recall_of_exact"] = summary(np.array(shared))
        out[name] = figures
    return out


def shown(figures: list[float] | None) -> str:
    return "" if figures is None else plus_minus(figures, "+.3f")


def show(k: int, found: dict[str, Any], failed: dict[str, str]) -> None:
    rows = [[f"without the {k} best of", "trainings", "rise, nats", "up", "minus default", "over random", "removed"]]
    for name in RANKERS:
        if name in found:
            f = found[name]
            up = "" if f["share_up"] is None else f"{f['share_up']:.0%}"
            rows.append([name, str(f["trainings"]), shown(f["rise"]), up, shown(f["minus"].get(DEFAULT))])
            rows[-1] += [shown(f.get("over_random")), f"{f['removed']:.0f}"]
        elif name in failed:
            rows.append([name, "did not run", *[""] * 5])
    table(rows)
    ours = [name for name in found if name.startswith("library")]
    peers = [name for name in found if not name.startswith("library")]
    if ours and peers:
        print("\nrise less that of")
        table([["", *peers], *([name, *(shown(found[name]["minus"][peer]) for peer in peers)] for name in ours)])
    print()


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "finetuned", "choices": ["bible", "finetuned", "scratch"]},
        k={"type": int, "nargs": "+", "default": [20, 100]},
        questions={"type": int, "default": 64},
        seeds={"type": int, "default": 2},
        pool={"type": int, "default": None, "help": f"questions that share a training; {AT_MOST} / k by default"},
        methods={"nargs": "+", "default": None, "choices": list(RANKERS), "metavar": "METHOD"},
        again={"nargs": "+", "default": [], "choices": list(RANKERS), "metavar": "METHOD", "help": "to rank anew"},
        only={"default": None, "choices": ["rank", "train", "gather"]},
        part={"type": int, "nargs": 2, "default": (0, 1)},
    )
    study = Study(TASKS[parsed.task](parsed.smoke), parsed.smoke)
    pool = {k: parsed.pool or max(1, AT_MOST // k) for k in parsed.k}
    plan = Plan(parsed.questions, parsed.seeds, pool)
    methods = parsed.methods or [name for name in RANKERS if name not in UNASKED]
    if parsed.smoke:
        plan = Plan(6, 1, {4: 2})
        methods = [DEFAULT, "library, reranked", "library, cosine", "BM25", "embedding cosine", CHANCE]
        shutil.rmtree(study.folder, ignore_errors=True)
    if parsed.only in (None, "rank"):
        ours = any(name.startswith("library") for name in methods)
        rank(study, list(dict.fromkeys([*methods, *(UNASKED if ours else ())])), parsed.again)
    if parsed.only in (None, "train"):
        train(study, plan, methods, *parsed.part)
    if parsed.only == "rank" or parsed.part[1] > 1:
        return
    print(f"{study.task.name}: {plan.questions} questions, {plan.seeds} seeds")
    for k, together in plan.pool.items():
        found = judged(study, plan, list(RANKERS), k)
        show(k, found, study.failed)
        result = {
            "task": study.task.name,
            "k": k,
            "questions": plan.questions,
            "seeds": plan.seeds,
            "pool": together,
            "methods": found,
            "failed": study.failed,
        }
        keep("removal", result, parsed, f"{study.task.name}_k{k}")


if __name__ == "__main__":
    main()

"""Claim: a model trained on what `Index.select` chooses for some questions does better on others of their kind.

A topic is a question drawn at random and the 31 of all questions that share most rare words with it (by BM25), or, with
`--of chance`, 31 others drawn at random: then what is asked stands for all that the task is about. Half of them are
asked, the others judge: of 4,096 training examples n are chosen for the first half, the base model is tuned on these
alone, as often as the task tunes on all, and the mean loss of the second half is compared. No training example is a
question, and no question is both asked and judged.

With `--spoilt` a share of the training examples has its words in random order: they are about the same, and teach
little. The model that is asked was tuned on all of them, the spoilt ones too. Which is which words cannot tell.

Beside the library's three methods: the n largest scores of any question ("best of all"), BM25 by turns and by sums, and
random examples. Losses are in nats an example; errors are over topics and seeds, paired.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.environment import CACHE, arguments, keep, plus_minus, table
from bench.lds import summary
from bench.removal import Study, bm25_scores
from bench.tasks import TASKS, Task, size, take
from lorif_index.search.select import METHODS, by_turns

CHANCE = "random"
TOPIC = 32
"""Questions of a topic, half of which are asked."""


class Choice(Study):
    """The task and its index, in a folder of this benchmark's own."""

    @property
    def folder(self) -> Path:
        return CACHE / "selection" / (self.task.name + ("-smoke" if self.smoke else ""))


def spoilt(task: Task, share: float) -> tuple[Task, np.ndarray]:
    """The task with the words of some training examples in random order, and which these are, (n,) bool."""
    generator = np.random.default_rng(11)
    which = generator.random(task.count) < share
    ids = task.data["input_ids"].numpy().copy()
    ids[which] = generator.permuted(ids[which], axis=1)
    data = {**task.data, "input_ids": torch.from_numpy(ids)}
    return replace(task, name=f"{task.name}-spoilt-{round(100 * share)}", data=data), which


def topics(words: np.ndarray | None, count: int, queries: int, seed: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """(asked, judged) question numbers of some topics.

    Args:
        words: (q, q) how alike questions are; None: all are as alike.
        queries: q.
    """
    generator, found = np.random.default_rng(seed), []
    for first in generator.permutation(queries)[:count]:
        alike = generator.random(queries) if words is None else words[first].copy()
        alike[first] = np.inf
        members = generator.permutation(np.argsort(-alike, kind="stable")[: min(TOPIC, queries)])
        found.append((np.sort(members[::2]), np.sort(members[1::2])))
    return found


def chosen(study: Study, scores: np.ndarray, asked: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Method -> ids of n training examples."""
    questions = take(study.task.queries, asked)
    out = {method: study.index.select(questions, n, method=method).ids for method in METHODS}
    ours = study.index.scores(questions)
    out["best of all"] = np.unique(np.argsort(-ours.max(axis=0), kind="stable")[:n])
    words = scores[asked]
    order = np.argsort(-words, axis=1, kind="stable")
    out["BM25 by turns"] = by_turns(order, np.take_along_axis(words, order, axis=1), n).places
    out["BM25 by sums"] = np.argsort(-words.sum(axis=0), kind="stable")[:n]
    return out


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "finetuned", "choices": ["bible", "finetuned"]},
        n={"type": int, "default": 256},
        topics={"type": int, "default": 8},
        seeds={"type": int, "default": 3},
        of={"default": "words", "choices": ["words", "chance"], "help": "what makes questions a topic"},
        spoilt={"type": float, "default": 0.0, "help": "share of the training examples whose words are shuffled"},
    )
    task, broken = TASKS[parsed.task](parsed.smoke), None
    if parsed.spoilt:
        task, broken = spoilt(task, parsed.spoilt)
    study = Choice(task, parsed.smoke)
    if parsed.smoke:
        shutil.rmtree(study.folder, ignore_errors=True)
    n, count, seeds = (16, 2, 1) if parsed.smoke else (parsed.n, parsed.topics, parsed.seeds)
    scores = bm25_scores(study)
    alike = bm25_scores(study, among=task.queries) if parsed.of == "words" else None
    asked_of = topics(alike, count, size(task.queries))
    found: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    began = time.perf_counter()
    for number, (asked, judged) in enumerate(asked_of):
        picked = chosen(study, scores, asked, n)
        for seed in range(seeds):
            chance = np.random.default_rng((number, seed)).permutation(task.count)[:n]
            for method, ids in {**picked, CHANCE: chance}.items():
                model = task.begin(seed)
                torch.manual_seed(seed)
                task.fit(model, np.sort(ids), seed)
                found.setdefault(method, []).append(float(task.losses(model)[judged].mean()))
                if broken is not None:
                    shares.setdefault(method, []).append(float(broken[ids].mean()))
        print(f"topic {number + 1} of {count}: {time.perf_counter() - began:.0f} s", flush=True)
    start = task.losses(task.begin(0))
    every = task.losses(study.model)
    result: dict[str, Any] = {
        "task": task.name,
        "questions": size(task.queries),
        "n": n,
        "topics": count,
        "of": parsed.of,
        "seeds": seeds,
        "loss_before": round(float(np.mean([start[j].mean() for _, j in asked_of])), 4),
        "loss_of_all": round(float(np.mean([every[j].mean() for _, j in asked_of])), 4),
        "methods": {},
    }
    by_chance = np.array(found[CHANCE])
    rows = [[f"{n} of {task.count} examples", "loss of what judges, nats", "less than random's", "spoilt"]]
    for method, losses in found.items():
        gain = by_chance - np.array(losses)
        result["methods"][method] = {"loss": summary(np.array(losses)), "gain": summary(gain), "each": losses}
        less = "" if method == CHANCE else plus_minus(summary(gain), "+.3f")
        part = f"{np.mean(shares[method]):.3f}" if shares else ""
        if shares:
            result["methods"][method]["spoilt"] = round(float(np.mean(shares[method])), 4)
        rows.append([method, plus_minus(summary(np.array(losses)), ".3f"), less, part])
    table(rows)
    print(f"before tuning {result['loss_before']}, tuned on all {result['loss_of_all']}")
    keep("selection", result, parsed, task.name if parsed.of == "words" else f"{task.name}_of_{parsed.of}")


if __name__ == "__main__":
    main()

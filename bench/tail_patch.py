"""Claim: one step of training on the passages that a method finds helps the query more than on those others find.

Tail-patch (Chang et al., arXiv:2410.17413; as in LoRIF, arXiv:2601.21929): from the trained model one gradient step on
a query's top-k proponents, and how much the query's log-probability rises by it; the same for its opponents, where it
should fall. Scores are those that `bench.lds` kept, each method at its own default. Methods whose scores are not on
this machine keep the figures of the result before, with its commit and without a difference from today's default.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.environment import arguments, keep, plus_minus, table
from bench.environment import kept as kept_result
from bench.lds import kept, score_file, summary
from bench.methods import METHODS, library
from bench.tasks import TASKS, Task, positions, take
from lorif_index import default_loss


def patched(task: Task, model: nn.Module, chosen: np.ndarray, query: int, rate: float) -> float:
    """Rise of a query's log-probability, in nats, by a step of gradient descent on the mean loss of some examples."""
    model = copy.deepcopy(model)
    asked = take(task.queries, slice(query, query + 1))
    with torch.no_grad():
        before = float(default_loss(model, asked))
    (default_loss(model, take(task.data, torch.from_numpy(chosen))).mean() / positions(task.data)).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
        return before - float(default_loss(model, asked))


def reported(facts: dict[str, Any]) -> dict[str, Any]:
    """Method -> figures of the kept result if it is of the same questions; each names the commit it is of."""
    found = kept_result("tail_patch")
    if found is None or any(found[key] != value for key, value in facts.items()):
        return {}
    commit = {"commit": found["environment"]["commit"]}
    return {
        name: commit | {k: v for k, v in figures.items() if k != "top_minus_library"}
        for name, figures in found["methods"].items()
    }


def main() -> None:
    parsed = arguments(
        __doc__,
        task={"default": "finetuned", "choices": sorted(TASKS)},
        k={"type": int, "default": 16},
        queries={"type": int, "default": 64},
        rate={"type": float, "default": 0.05, "help": "of the step: small, so that the change is of first order"},
    )
    task = TASKS[parsed.task](parsed.smoke)
    model = task.full(0, parsed.smoke)
    count, k = (3, 4) if parsed.smoke else (parsed.queries, parsed.k)
    rows, figures = [["method", f"top {k}", "minus library's", f"last {k}"]], {}
    base: np.ndarray | None = None
    found: Any
    facts = {"task": task.name, "k": k, "queries": count, "rate": parsed.rate}
    before = {} if parsed.smoke else reported(facts)
    for name in ["library default"] + [m for m in METHODS if m != "library default"]:
        found = kept(score_file(task, parsed.smoke, name))
        if found is None and parsed.smoke and name in ("random", "library default"):
            found = library(task, model, projection_dim=8) if name != "random" else METHODS[name](task, model)
        if found is None and name in before:
            figures[name] = before[name]
            rows.append([name, plus_minus(before[name]["top"], "+.3f"), "not on this machine", ""])
        if found is None:
            continue
        scores = found.scores[found.default][:count]
        order = np.argsort(-scores, axis=1, kind="stable")
        up = np.array([patched(task, model, order[q, :k], q, parsed.rate) for q in range(count)])
        down = np.array([patched(task, model, order[q, -k:], q, parsed.rate) for q in range(count)])
        base = up if base is None else base
        figures[name] = {"top": summary(up), "last": summary(down), "top_minus_library": summary(up - base)}
        figures[name]["top_each"] = [round(float(v), 4) for v in up]
        rows.append([name] + [plus_minus(figures[name][key], "+.3f") for key in ("top", "top_minus_library", "last")])
        print(*rows[-1], flush=True)
    table(rows)
    keep("tail_patch", facts | {"methods": figures}, parsed)


if __name__ == "__main__":
    main()

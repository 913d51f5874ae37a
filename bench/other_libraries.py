"""Question: how do other libraries do on mislabelled, poisoned and repeated training examples?

TRAK (traker), EK-FAC (kronfluence) and LoGRA (dattri) on the models of `bench.mislabelled` and `bench.duplicates`, each
at its own default damping and at a tenth of the mean eigenvalue, which is this library's. They run in an environment of
their own (see `bench/README.md`); what does not run is kept with its error. Beside them stand figures that the other
command has, too, by which one sees that the model is the same.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import duplicates as bible
from bench import mislabelled as mail
from bench.environment import arguments, keep, table
from bench.peers import Peer, dattri_logra, ekfac, trak
from bench.tasks import size

MULTIPLE = 0.1
# TRAK projects all parameters with one matrix that is held in memory: for 3.5 M of them at its default of 2048, 29 GB.
TRAK_DIM = {"mislabelled": 512, "duplicates": 2048}
LOGRA_DIM, SMOKE_DIM = 4096, 16
EKFAC, TRAK, LOGRA = "EK-FAC (kronfluence)", "TRAK (traker)", "LoGRA (dattri)"


@dataclass(frozen=True)
class Problem:
    """What the adapters of `bench.peers` read of a task: training examples and queries, in one form."""

    data: Any
    queries: Any

    @property
    def count(self) -> int:
        return size(self.data)


class Joined(nn.Module):
    """The part of MiniLM that is trained, of one tensor: hidden states, with the mask as one more feature."""

    def __init__(self, top: nn.Module) -> None:
        super().__init__()
        self.top = top
        for module in top.modules():
            if hasattr(module, "config"):
                # The fused attention has no gradient of single examples.
                module.config._attn_implementation = "eager"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(x[..., :-1], x[..., -1])


def joined(data: mail.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([data["hidden"], data["attention_mask"].unsqueeze(2).to(data["hidden"].dtype)], dim=2), data[
        "labels"
    ]


def settings(found: Peer) -> list[tuple[str, str]]:
    """(name of the setting in the results, its label): the own default, then the multiple of the mean eigenvalue."""
    other = next(label for label in found.scores if label != found.default)
    return [("own default", found.default), (f"damping {MULTIPLE}", other)]


def costs(found: Peer) -> dict[str, Any]:
    return {
        "bytes_per_example": found.bytes_per_example,
        "build_seconds": round(found.build_seconds, 1),
        "query_milliseconds": round(found.query_milliseconds, 2),
        "note": found.note,
    }


def attempt(results: dict[str, Any], name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Adds what a library gave, or its error."""
    began = time.perf_counter()
    try:
        results[name] = run()
    except Exception as error:
        results[name] = {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}
    shown = {key: value for key, value in results[name].items() if key != "note"}
    print(f"{name}: {time.perf_counter() - began:.0f} s, {shown}", flush=True)


def adapters(suite: str, smoke: bool) -> dict[str, Callable[..., Peer]]:
    of_logra, of_trak = (SMOKE_DIM, SMOKE_DIM) if smoke else (LOGRA_DIM, TRAK_DIM[suite])
    return {
        LOGRA: lambda p, m: dattri_logra(p, m, proj_dim=of_logra, multiples=(MULTIPLE,)),
        TRAK: lambda p, m: trak(p, m, proj_dim=of_trak, multiples=(0.0, MULTIPLE)),
        EKFAC: lambda p, m, **kind: ekfac(p, m, multiples=(MULTIPLE,), **kind),
    }


def inspected(
    run: Callable[..., Peer], exactly: bool, model: nn.Module, data: mail.Batch, held: mail.Batch, flipped: np.ndarray
) -> dict[str, Any]:
    """How well self-influence, and influence on held-out loss, find flipped labels.

    Args:
        run: a library's adapter.
        exactly: it has self-influence of its own; else training examples are asked about like held-out ones.
    """
    rows, asked = joined(data), joined(held)
    if exactly:
        found = run(Problem(rows, asked), Joined(model), with_itself=True)
        parts = {label: tuple(scores) for label, scores in found.scores.items()}
    else:
        both = tuple(torch.cat(pair) for pair in zip(asked, rows, strict=True))
        found = run(Problem(rows, both), Joined(model))
        count = len(asked[1])
        parts = {label: (s[:count].mean(axis=0), s[count:].diagonal()) for label, s in found.scores.items()}
    out = costs(found)
    for setting, label in settings(found):
        of_held, own = parts[label]
        out[f"self-influence, {setting}"] = mail.found_by(own, flipped)
        out[f"held-out influence, {setting}"] = mail.found_by(-of_held, flipped)
    return out


def mislabelled(smoke: bool, seeds: int) -> dict[str, Any]:
    sizes = mail.SMOKE if smoke else mail.Sizes()
    base = mail.tiny(sizes.length) if smoke else mail.minilm(sizes.length)
    mails = mail.made_up(sizes.train + sizes.held_out + 20) if smoke else mail.spam_assassin()
    train, held_out = mail.split(base, mails, sizes)
    known = adapters("mislabelled", smoke)
    features = base.features(train.texts)
    asked = base.features(held_out.texts) | {"labels": torch.from_numpy(held_out.labels)}
    runs = []
    for seed in range(seeds):
        flipped, labels, generator = mail.flips(train, seed)
        data = features | {"labels": torch.from_numpy(labels)}
        model, _ = mail.fine_tune(base, data, sizes, seed, smoke)
        margin = mail.margins(model, data)
        results: dict[str, Any] = {
            "random": mail.found_by(generator.random(len(labels)), flipped),
            "loss": mail.found_by(-margin, flipped),
        }
        for name, run in known.items():
            attempt(results, name, partial(inspected, run, name == EKFAC, model, data, asked, flipped))
        accuracy = float((mail.margins(model, asked) > 0).mean())
        runs.append({"seed": seed, "held_out_accuracy": accuracy, "results": results})

    generator = np.random.default_rng(23)
    planted, data, queries, _ = mail.plant(base, train, held_out, sizes, generator)
    model, _ = mail.fine_tune(base, data, sizes, 0, smoke)
    cosine = mail.embeddings(model, queries) @ mail.embeddings(model, data).T
    most = max(sizes.cuts)

    def ranked(scores: np.ndarray) -> dict[str, float]:
        return mail.recalls(np.argsort(-scores, axis=1, kind="stable")[:, :most], planted, sizes.cuts)

    def found_planted(name: str) -> dict[str, Any]:
        found = known[name](Problem(joined(data), joined(queries)), Joined(model))
        return costs(found) | {setting: ranked(found.scores[label]) for setting, label in settings(found)}

    poison: dict[str, Any] = {"embedding cosine": ranked(cosine)}
    for name in known:
        attempt(poison, name, partial(found_planted, name))
    success = float((mail.margins(model, queries) > 0).mean())
    return {
        "sizes": dataclasses.asdict(sizes),
        "mislabelled": runs,
        "poisoned": {"attack_success": success, "results": poison},
    }


def duplicates(smoke: bool, seeds: int) -> dict[str, Any]:
    sizes = bible.SMOKE if smoke else bible.Sizes()
    corpus = bible.made_up(160, 24) if smoke else bible.bible()
    data, asked = bible.encode(corpus, sizes)
    model, seconds = bible.trained(data, sizes, smoke)
    common = bible.common_words(corpus)
    known = adapters("duplicates", smoke)
    points, mine = bible.embeddings(model, data), bible.embeddings(model, asked)

    def judged(scores: np.ndarray) -> dict[str, Any]:
        ids = bible.top(scores)
        found = bible.measured(bible.Method(lambda rows: ids[rows], 0.0), corpus, common, 1)
        return {key: value for key, value in found.items() if key.startswith(("recall", "mrr"))}

    def retrieved(name: str) -> dict[str, Any]:
        found = known[name](Problem(data, asked), model)
        return costs(found) | {setting: judged(found.scores[label]) for setting, label in settings(found)}

    results: dict[str, Any] = {"embedding cosine": judged(mine @ points.T)}
    for name in known:
        attempt(results, name, partial(retrieved, name))
    return {"sizes": dataclasses.asdict(sizes), "training_seconds": seconds, "results": results}


SUITES = {"mislabelled": mislabelled, "duplicates": duplicates}


def flat(found: dict[str, Any], way: str = "") -> list[list[str]]:
    """Rows of the table: every dict of figures, with the names that lead to it."""
    if "error" in found:
        return [[way, str(found["error"])]]
    inner = {key: value for key, value in found.items() if isinstance(value, dict)}
    if not inner:
        return [[way, ", ".join(f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float))]]
    return [row for key, value in inner.items() for row in flat(value, f"{way}: {key}" if way else key)]


def main() -> None:
    parsed = arguments(
        __doc__ or "",
        suite={"default": "mislabelled", "choices": sorted(SUITES)},
        seeds={"type": int, "default": 3, "help": "of the flipped labels"},
    )
    result = SUITES[parsed.suite](parsed.smoke, 1 if parsed.smoke else parsed.seeds)
    parts = [run["results"] for run in result.get("mislabelled", [])]
    parts.append(result["poisoned"]["results"] if "poisoned" in result else result["results"])
    table([["method", "figures"], *(row for part in parts for row in flat(part))])
    keep("other_libraries", {"suite": parsed.suite, **result}, parsed, parsed.suite)


if __name__ == "__main__":
    main()

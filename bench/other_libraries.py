"""Question: how do other libraries do on mislabelled, poisoned and repeated training examples?

TRAK (traker), EK-FAC (kronfluence) and LoGRA (dattri) on the models of `bench.mislabelled` and `bench.duplicates`, each
at its own default damping; TRAK and LoGRA, where that costs next to nothing, also at a tenth of the mean eigenvalue.
They run in an environment of their own (see `bench/README.md`); what does not run is kept with
its error. Beside them stand figures that the other command has, too, by which one sees that the model is the same.
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
TRAK_DIM = {"mislabelled": 512, "poisoned": 512, "duplicates": 2048}
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
    mask = data["attention_mask"].unsqueeze(2).to(data["hidden"].dtype)
    return torch.cat([data["hidden"], mask], dim=2), data["labels"]


def settings(found: Peer) -> list[tuple[str, str]]:
    """(name of the setting in the results, its label): the own default, then the multiple of the mean eigenvalue."""
    others = [label for label in found.scores if label != found.default]
    return [("own default", found.default), *((f"damping {MULTIPLE}", label) for label in others)]


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
    # Another damping costs EK-FAC all training gradients again.
    return {
        LOGRA: partial(dattri_logra, proj_dim=of_logra, multiples=(MULTIPLE,)),
        TRAK: partial(trak, proj_dim=of_trak, multiples=(0.0, MULTIPLE)),
        EKFAC: partial(ekfac, multiples=()),
    }


def inspected(
    run: Callable[..., Peer], model: nn.Module, data: mail.Batch, held: mail.Batch, flipped: np.ndarray
) -> dict[str, Any]:
    """How well a library's self-influence, and its influence on held-out loss, find flipped labels."""
    found = run(Problem(joined(data), joined(held)), Joined(model), with_itself=True)
    out = costs(found)
    for setting, label in settings(found):
        of_held, own = found.scores[label]
        out[f"self-influence, {setting}"] = mail.found_by(own, flipped)
        out[f"held-out influence, {setting}"] = mail.found_by(-of_held, flipped)
    return out


def mails(smoke: bool) -> tuple[mail.Sizes, mail.Base, mail.Mails, mail.Mails]:
    """Sizes, pretrained model, training and held-out e-mails of `bench.mislabelled`."""
    sizes = mail.SMOKE if smoke else mail.Sizes()
    base = mail.tiny(sizes.length) if smoke else mail.minilm(sizes.length)
    found = mail.made_up(sizes.train + sizes.held_out + 20) if smoke else mail.spam_assassin()
    return sizes, base, *mail.split(base, found, sizes)


def mislabelled(smoke: bool, seeds: int) -> dict[str, Any]:
    sizes, base, train, held_out = mails(smoke)
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
            attempt(results, name, partial(inspected, run, model, data, asked, flipped))
        accuracy = float((mail.margins(model, asked) > 0).mean())
        runs.append({"seed": seed, "held_out_accuracy": accuracy, "results": results})
    return {"sizes": dataclasses.asdict(sizes), "runs": runs}


def poisoned(smoke: bool, seeds: int) -> dict[str, Any]:
    sizes, base, train, held_out = mails(smoke)
    planted, data, queries, _ = mail.plant(base, train, held_out, sizes, np.random.default_rng(23))
    model, _ = mail.fine_tune(base, data, sizes, 0, smoke)
    most = max(sizes.cuts)

    def ranked(scores: np.ndarray) -> dict[str, float]:
        return mail.recalls(np.argsort(-scores, axis=1, kind="stable")[:, :most], planted, sizes.cuts)

    def found_planted(run: Callable[..., Peer]) -> dict[str, Any]:
        found = run(Problem(joined(data), joined(queries)), Joined(model))
        return costs(found) | {setting: ranked(found.scores[label]) for setting, label in settings(found)}

    cosine = mail.embeddings(model, queries) @ mail.embeddings(model, data).T
    results: dict[str, Any] = {"embedding cosine": ranked(cosine)}
    for name, run in adapters("poisoned", smoke).items():
        attempt(results, name, partial(found_planted, run))
    success = float((mail.margins(model, queries) > 0).mean())
    return {"sizes": dataclasses.asdict(sizes), "attack_success": success, "results": results}


def duplicates(smoke: bool, seeds: int) -> dict[str, Any]:
    sizes = bible.SMOKE if smoke else bible.Sizes()
    corpus = bible.made_up(160, 24) if smoke else bible.bible()
    data, asked = bible.encode(corpus, sizes)
    model, seconds = bible.trained(data, sizes, smoke)
    common = bible.common_words(corpus)
    points, mine = bible.embeddings(model, data), bible.embeddings(model, asked)

    def judged(scores: np.ndarray) -> dict[str, Any]:
        ids = bible.top(scores)
        found = bible.measured(bible.Method(lambda rows: ids[rows], 0.0), corpus, common, 1)
        return {key: value for key, value in found.items() if key.startswith(("recall", "mrr"))}

    def retrieved(run: Callable[..., Peer]) -> dict[str, Any]:
        found = run(Problem(data, asked), model)
        return costs(found) | {setting: judged(found.scores[label]) for setting, label in settings(found)}

    results: dict[str, Any] = {"embedding cosine": judged(mine @ points.T)}
    for name, run in adapters("duplicates", smoke).items():
        attempt(results, name, partial(retrieved, run))
    return {"sizes": dataclasses.asdict(sizes), "training_seconds": seconds, "results": results}


SUITES = {"mislabelled": mislabelled, "poisoned": poisoned, "duplicates": duplicates}


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
        __doc__,
        suite={"default": "mislabelled", "choices": sorted(SUITES)},
        seeds={"type": int, "default": 3, "help": "of the flipped labels"},
    )
    result = SUITES[parsed.suite](parsed.smoke, 1 if parsed.smoke else parsed.seeds)
    parts = [part["results"] for part in result.get("runs", [result])]
    table([["method", "figures"], *(row for part in parts for row in flat(part))])
    keep("other_libraries", {"suite": parsed.suite, **result}, parsed, parsed.suite)


if __name__ == "__main__":
    main()

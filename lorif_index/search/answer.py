"""Answer: one search from its arguments to its hits: checked, planned, gone, and told with statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..damping import Damping
from ..errors import QueryError
from ..progress import ProgressCallback, reporter
from ..results import Hits, Refined, Reranked, SearchStats
from .examples import Examples
from .groups import By, sum_groups
from .named import payloads_at
from .normalise import check_normalize
from .planner import ANSWERS, Answer, Plan, choose_plan
from .reader import Reader
from .rerank import rerank
from .scoring import Question


@dataclass(frozen=True)
class Prepared:
    """A question made ready for the rows.

    Attributes:
        question: to the rows.
        seconds: that this took, by stage.
        inverse: layer -> (q, d_in, d_out) float32: H^-1 g, whose inner products with whole gradients are scores; None
            where it was not asked for.
        refined: how that was refined, or None.
    """

    question: Question
    seconds: dict[str, float]
    inverse: dict[str, torch.Tensor] | None = None
    refined: Refined | None = None


@dataclass(frozen=True)
class Wanted:
    """What a search is to find: the arguments of `Index.search`, with its layers and damping settled.

    Raises:
        QueryError: a k, recall or rerank that cannot be, or two arguments that contradict each other.
    """

    k: int
    recall: float
    rescore: bool
    opponents: bool
    normalize: str | None
    exact: bool | None
    damping: Damping
    layers: tuple[str, ...]
    group_by: By | None
    rerank: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, (int, np.integer)) or self.k < 1:
            raise QueryError(f"k must be an integer of at least 1, got {self.k!r}")
        if isinstance(self.recall, bool) or not isinstance(self.recall, (int, float)) or not 0 < self.recall <= 1:
            raise QueryError(f"recall must be above 0 and at most 1, got {self.recall!r}")
        if self.exact and not self.rescore:
            raise QueryError("exact=True scores every row, and rescore=False none: pass one of them")
        if self.rerank is None:
            return
        if isinstance(self.rerank, bool) or not isinstance(self.rerank, (int, np.integer)) or self.rerank < 1:
            raise QueryError(
                f"rerank says how many of the best by rows are computed again, an integer of at least 1, or None; got "
                f"{self.rerank!r}: pass rerank=200"
            )
        if self.rerank < self.k:
            raise QueryError(
                f"rerank={self.rerank} computes fewer examples again than k={self.k} asks for: pass at least "
                f"rerank={self.k}, and better some times that"
            )


def check_groups(by: Any, k: Any) -> None:
    """Refuses groups that cannot be made.

    Raises:
        QueryError: `by` is no field and no function, or k no count.
    """
    several = isinstance(by, (list, tuple)) and bool(by)
    if not all(isinstance(key, str) or callable(key) for key in (by if several else [by])):
        raise QueryError(
            f"groups are made by a field of the payloads, by function(payload), or by a list of these, got {by!r}"
        )
    if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
        raise QueryError(f"k must be an integer of at least 1, or None for all groups, got {k!r}")


def answer(
    reader: Reader,
    wanted: Wanted,
    prepare: Callable[[], Prepared],
    progress: bool | ProgressCallback | None,
    examples: Examples | None = None,
) -> Hits:
    """Searches one version of an index.

    Args:
        reader: the version.
        wanted: what to find.
        prepare: makes the question; it is called when nothing else can be refused any more.
        progress: as in `Index.search`.
        examples: computes training examples again, where that is wanted.

    Raises:
        QueryError: the index cannot be searched so. Whatever `prepare` raises.
    """
    check_normalize(wanted.normalize)
    if wanted.group_by is not None:
        check_groups(wanted.group_by, None)
    k = min(int(wanted.k), reader.live_count)
    wide = k if wanted.rerank is None else min(int(wanted.rerank), reader.live_count)
    plan = _agreed_plan(reader, wanted, wide)
    prepared, reranked = prepare(), None
    plan, found = _found(reader, prepared.question, plan, wide, not wanted.opponents, progress)
    if examples is not None and prepared.inverse is not None:
        with reporter(progress) as report:
            found, reranked = rerank(
                reader, examples, prepared.inverse, prepared.question, found, k, not wanted.opponents, report
            )
    groups = None
    if wanted.group_by is not None:
        with reporter(progress) as report:
            groups = sum_groups(reader, prepared.question, wanted.group_by, None, report)
    stats = _stats(reader, wanted, plan, found, prepared, reranked)
    return Hits(reader.rows.ids_at(found.positions), found.scores, stats, _payloads(reader, found.positions), groups)


def _agreed_plan(reader: Reader, wanted: Wanted, k: int) -> Plan:
    """The way to go, the same on all ranks."""
    ranks = reader.ranks
    ranks.stage = "search"
    said: dict[str, Any] | Exception
    try:
        plan = choose_plan(
            reader,
            k=k,
            recall=float(wanted.recall),
            largest=not wanted.opponents,
            rescore=wanted.rescore,
            exact=wanted.exact,
            all_layers=len(wanted.layers) == len(reader.specs),
            damping=wanted.damping,
            normalize=wanted.normalize,
        )
        said = {"k": k, "recall": wanted.recall, "opponents": wanted.opponents, "layers": list(wanted.layers)}
        said |= {"way": plan.way, "normalize": wanted.normalize, "groups": wanted.group_by is not None}
        said |= {"rerank": wanted.rerank}
    except Exception as error:
        said = error
    ranks.agree("a search", said)
    return plan


def _found(
    reader: Reader,
    question: Question,
    plan: Plan,
    k: int,
    largest: bool,
    progress: bool | ProgressCallback | None,
) -> tuple[Plan, Answer]:
    """The answer, and the plan that gave it: where candidates are too few, every row is scanned."""
    found = ANSWERS[plan.way](reader, question, plan, k, largest, reporter(progress))
    if plan.way == "scan" or found.positions.min(initial=0) >= 0:
        return plan, found
    # What is lacking must not look like a row.
    if plan.way == "coarse":
        raise QueryError(f"the coarse index proposes fewer than k={k} rows: ask for fewer, or leave rescore=False out")
    plan = Plan("scan", f"the coarse index proposes fewer than k={k} rows: every row is scanned", plan.recall)
    return plan, ANSWERS["scan"](reader, question, plan, k, largest, reporter(progress))


def _stats(
    reader: Reader,
    wanted: Wanted,
    plan: Plan,
    found: Answer,
    prepared: Prepared,
    reranked: Reranked | None,
) -> SearchStats:
    examined, damaged = int(found.candidates.max(initial=0)), reader.store.damaged
    again = "" if reranked is None else f"; the best {reranked.candidates:,} computed again with the model"
    if (refined := prepared.refined) is not None:
        again += f"; refined over {refined.examples:,} examples"
    return SearchStats(
        exact=plan.way == "scan",
        codec=reader.codec.name,
        dtype=reader.codec.label,
        examined=examined,
        total=reader.live_count,
        skipped=sum(shard.count for shard in reader.store.shards if shard.info.sealed.file in damaged),
        bytes_read=found.bytes_read,
        seconds=prepared.seconds | found.seconds,
        damping=wanted.damping.to_json(),
        layers=len(wanted.layers),
        approximate=plan.way == "coarse" and reranked is None,
        plan=plan.reason + again,
        candidates=examined if plan.way == "candidates" else 0,
        recall=float(wanted.recall) if plan.way != "scan" else 1.0,
        estimated_recall=float(found.recall.mean()),
        recall_by_query=found.recall.tolist(),
        candidates_by_query=found.candidates.tolist(),
        reranked=reranked,
        refined=prepared.refined,
    )


def _payloads(reader: Reader, positions: np.ndarray) -> list[list[Any]] | None:
    """Of hits (q, k); None where the index has none."""
    if not reader.any_payloads:
        return None
    found = iter(payloads_at(reader, positions.ravel()))
    return [[next(found) for _ in row] for row in positions]

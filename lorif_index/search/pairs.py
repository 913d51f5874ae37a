"""Pairs: which training examples are explained for which question, and their explanations, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..capture.hooks import Capture
from ..curvature.inverse import Preconditioner
from ..errors import QueryError
from ..progress import Reporter
from ..results import Hits
from .examples import TrainingData
from .explain import Explanation, QueryBatch, explain
from .named import as_ids, check_alone, found_positions
from .reader import Reader


def wanted_ids(reader: Reader, ids: Any) -> np.ndarray:
    """(q, k) or (k,) int64: ids of live rows, of hits or as they were given.

    Raises:
        QueryError: another shape, or an id that the index does not hold.
    """
    if isinstance(ids, Hits):
        ids = ids.ids
    wanted = as_ids(np.asarray(ids).ravel()).reshape(np.shape(ids))
    if wanted.ndim not in (1, 2) or not wanted.size:
        raise QueryError(f"ids must be Hits, or ids of shape (q, k) or (k,), got shape {wanted.shape}")
    check_alone(reader)
    found_positions(reader, np.unique(wanted))
    return wanted


def explain_pairs(
    reader: Reader,
    batches: Iterable[QueryBatch],
    wanted: np.ndarray,
    examples: TrainingData,
    capture: Capture,
    preconditioners: Mapping[str, Preconditioner],
    report: Reporter,
) -> list[list[Explanation]]:
    """For each question of the batches an `Explanation` of each of its examples.

    Args:
        reader: the index.
        batches: the questions.
        wanted: of `wanted_ids`; (k,) stand for every question.
        examples: the training data.
        capture: takes their gradients, of the loss.
        preconditioners: of the chosen layers.
        report: is told.

    Raises:
        QueryError: there are more or fewer questions than ids are for. DataError: as in `explain`.
    """
    out: list[list[Explanation]] = []
    with report.stage("explain", wanted.size) as stage:
        for asked in batches:
            at = len(out)
            if wanted.ndim == 2 and at + asked.count > len(wanted):
                raise QueryError(f"ids are for {len(wanted)} queries, and there are at least {at + asked.count}")
            part = wanted[at : at + asked.count] if wanted.ndim == 2 else np.tile(wanted, (asked.count, 1))
            members = reader.manifest.members
            out += explain(reader, asked, part, at, examples, capture, preconditioners, members, stage)
    if wanted.ndim == 2 and len(out) != len(wanted):
        raise QueryError(f"ids are for {len(wanted)} queries, and there are {len(out)}")
    return out

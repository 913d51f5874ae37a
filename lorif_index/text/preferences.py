"""Preferences: pairs of a chosen and a rejected answer as examples, and the loss of direct preference optimisation.

DPO (Rafailov et al., arXiv:2305.18290, equation 7): with log-probabilities l of an answer given its prompt, and l'
those under the reference model,

    loss = -log sigmoid(m),    m = beta ((l_chosen - l'_chosen) - (l_rejected - l'_rejected)).

It is a logistic loss of one output, m, so that its Gauss-Newton matrix has one row an example, which is seen by itself
(see `capture.seeing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..capture.data import to_device
from ..capture.losses import IGNORE, default_logits
from ..errors import ConfigError, DataError
from ..progress import ProgressCallback, reporter
from .chat import is_chat
from .encoding import Encoded
from .tokenised import TokenisedData

ANSWERS = ("chosen", "rejected")
# What TRL calls the reference's log-probabilities.
_KNOWN = ("ref_chosen_logps", "ref_rejected_logps")
_AT_ONCE = 8


class DPOLoss:
    """The loss of direct preference optimisation, of batches of `PreferencePairs`.

    Args:
        beta: as in training.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise ConfigError(f"beta must be above 0, got {beta!r}: pass that of the training, such as 0.1")
        self.beta = beta
        self.__name__ = f"DPOLoss(beta={beta:g})"

    def margin(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """m, (n,) float32: how much more than the reference the model prefers the chosen answer, times beta.

        Raises:
            DataError: a batch that is not of `PreferencePairs`.
        """
        if not isinstance(batch, Mapping) or not {"input_ids", "labels", "reference"} <= set(batch):
            got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"DPOLoss takes batches of PreferencePairs, got {got}: pass data=PreferencePairs(...)")
        # Both answers of an example, one after the other.
        rows = {name: value.flatten(0, 1) for name, value in batch.items() if name != "reference"}
        gained = _log_probabilities(model, rows).unflatten(0, (-1, len(ANSWERS))) - batch["reference"]
        return self.beta * (gained[:, 0] - gained[:, 1])

    def __call__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Per-example losses, (n,); raises as `margin`."""
        margin = self.margin(model, batch)
        return functional.binary_cross_entropy_with_logits(margin, torch.ones_like(margin), reduction="none")


def _log_probabilities(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(rows,) float32, of each row's labels: the negative of `default_loss`, but computed without the call by which a
    loss's terms are seen; here the term is of the margin."""
    logits, labels = default_logits(model, batch)
    each = logits.float().log_softmax(dim=-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return each.masked_fill(labels == IGNORE, 0.0).sum(dim=1)


class _Answers:
    """Rows of answers: the chosen and the rejected one of each pair, one after the other."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows) * len(ANSWERS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, name = self._rows[i // len(ANSWERS)], ANSWERS[i % len(ANSWERS)]
        if not isinstance(row, Mapping) or not set(ANSWERS) <= set(row):
            got = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(f"pair {i // len(ANSWERS)} has not the columns chosen and rejected, but {got}")
        if row.get("prompt") is not None:
            return {"prompt": row["prompt"], "completion": row[name]}
        return {"messages": row[name]} if is_chat(row[name]) else {"text": row[name]}


class PreferencePairs:
    """A data set for `Index.build(..., loss=DPOLoss(beta))`, and questions to such an index.

    Rows are dicts with `chosen` and `rejected`: texts or chats that follow `prompt`, or without one whole chats or
    texts. They are tokenised as they are read.

    Args:
        rows: a map-style dataset (a Hugging Face Dataset, a list); `rows[i]` must be the same each time.
        tokenizer: of transformers.
        model: that is indexed; says what it takes.
        reference: the model that the training started from, whose log-probabilities are computed once, here; None: rows
            have them as TRL calls them, `ref_chosen_logps` and `ref_rejected_logps`.
        progress: False shows none; a function is told.

    Raises:
        DataError: no such columns, no reference, or as `TokenisedData`.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        model: nn.Module,
        reference: nn.Module | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        if not len(rows):
            raise DataError("the data holds no pairs")
        self._answers = TokenisedData(_Answers(rows), tokenizer, model=model)
        if reference is None:
            self._reference = torch.tensor([_known(rows[i], i) for i in range(len(rows))])
        else:
            self._reference = self._computed(reference, progress)

    def _computed(self, reference: nn.Module, progress: bool | ProgressCallback | None) -> torch.Tensor:
        """(n, 2) float32 log-probabilities."""
        parts, training = [], reference.training
        device = next(reference.parameters()).device
        reference.eval()
        try:
            with reporter(progress) as report, report.stage("reference", len(self)) as stage, torch.no_grad():
                for start in range(0, len(self), _AT_ONCE):
                    ids = range(start * len(ANSWERS), min(start + _AT_ONCE, len(self)) * len(ANSWERS))
                    batch = self._answers.collate_examples(self._answers.__getitems__(ids))
                    parts.append(_log_probabilities(reference, to_device(batch, device)).cpu())
                    stage.advance(len(ids) // len(ANSWERS))
        finally:
            reference.train(training)
        return torch.cat(parts).unflatten(0, (-1, len(ANSWERS)))

    def __len__(self) -> int:
        return len(self._answers) // len(ANSWERS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        both = self._answers.__getitems__(
            [len(ANSWERS) * int(i) + number for i in ids for number in range(len(ANSWERS))]
        )
        return [
            {"answers": both[len(ANSWERS) * at : len(ANSWERS) * (at + 1)], "reference": self._reference[int(i)]}
            for at, i in enumerate(ids)
        ]

    def collate_examples(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch: the columns of tokens (n, 2, t), chosen first, and `reference` (n, 2)."""
        answers: list[Encoded] = [answer for item in items for answer in item["answers"]]
        rows = {name: v.unflatten(0, (-1, len(ANSWERS))) for name, v in self._answers.collate_examples(answers).items()}
        return rows | {"reference": torch.stack([item["reference"] for item in items])}


def _known(row: Mapping[str, Any], number: int) -> list[float]:
    """The reference's log-probabilities that a row has."""
    values = [row.get(name) for name in _KNOWN] if isinstance(row, Mapping) else []
    if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise DataError(
            f"pair {number} has no log-probabilities of a reference ({' and '.join(_KNOWN)}): pass reference=, the "
            "model that the training started from"
        )
    return [float(value) for value in values if value is not None]

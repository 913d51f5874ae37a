"""Probes: gradients of combinations of outputs whose second moment is the Gauss-Newton matrix (GGN).

Of a loss with Hessian H at the model's outputs (see `heads`) the GGN is J^T H J. Back-propagating v with E[v v^T] = H
instead of the loss's gradient estimates it. For a softmax

    v = sqrt(p) e - p sum_c(sqrt(p_c) e_c),    e of random signs,

gives E[v v^T] = diag(p) - p p^T, with independent signs at each position; its variance is far below that of labels
sampled from p. For terms of single outputs v is sqrt(H) e. Where an example is one prediction of few outputs, rows add
up to it exactly, one an output: v_c = sqrt(p_c) (p - onehot(c)) for a softmax, sqrt(H_cc) onehot(c) for others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import DataError
from ..linalg.signs import hashed_signs
from .ensemble import members_of
from .heads import HeadOf, wide

# Up to so many outputs of a single prediction, rows may be exact.
EXACT_UP_TO = 16
# Rows that a sample of single predictions is given, where that takes no more than `MOST_PROBES` an example; twice as
# many if they are exact. A sequence's positions have independent signs: one probe of it is many (`bench.lds`: four
# probes instead of one are worth .005 LDS on sequences).
ROWS, MOST_PROBES = 16_384, 4


class Probes:
    """The functions of a model whose gradients are an example's curvature rows; of an ensemble, the sums of its
    members', each of which has outputs and signs of its own.

    Args:
        head: of the loss.
        probes: random probes an example; None: one of a sequence; of single predictions as many as make `ROWS` rows,
            from 1 to `MOST_PROBES`, or exact rows where there are at most `EXACT_UP_TO` outputs, up to 2 `ROWS`.
        seed: of the signs.
        examples: how many there will be.

    Attributes:
        each: rows of an example; known after `prepare`.
        exact: whether they add up to the example's GGN, or each is an estimate of it.
    """

    def __init__(self, head: HeadOf, probes: int | None, seed: int, examples: int) -> None:
        self._head, self._probes, self._seed, self._examples = head, probes, seed, examples
        self.each = min(max(-(-ROWS // examples), 1), MOST_PROBES) if probes is None else probes
        self.exact = False

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Decides, by the form of the outputs of a batch, how many rows an example has.

        Raises:
            DataError: members whose outputs have different forms.
        """
        if self._probes is not None:
            return
        forms = []
        for member in members_of(model):
            with torch.no_grad():
                outputs = self._head(member, batch).exact
            if outputs is None:
                forms.append((1, False))
            else:
                exact = outputs <= EXACT_UP_TO and outputs * self._examples <= 2 * ROWS
                forms.append((outputs if exact else self.each, exact))
        for number, (each, exact) in enumerate(forms):
            if (each, exact) != forms[0]:
                raise DataError(
                    f"the outputs of model[0] take {forms[0][0]} curvature rows an example and those of "
                    f"model[{number}] {each}: pass members of one form, or BuildConfig(sample=Sample(probes=...))"
                )
        self.each, self.exact = forms[0]

    @property
    def gives_losses(self) -> bool:
        """Whether the losses can be had beside."""
        return self._head.gives_losses

    @property
    def rows_per_example(self) -> int:
        """How many rows add up to one example's curvature (see `CurvatureRows`)."""
        return self.each if self.exact else 1

    def __call__(self, model: nn.Module, batch: Any, ids: np.ndarray, *, losses: bool = False) -> list[torch.Tensor]:
        """Of each row (n,): one function an example, in float32 or wider.

        Args:
            model, batch: as for a loss.
            ids: (n,) of the examples; signs depend on them and not on the batch.
            losses: the losses come first, in their own dtype, where the head gives them.
        """
        rows = [self._rows(member, batch, ids, number, losses) for number, member in enumerate(members_of(model))]
        return [torch.stack(members).sum(dim=0) for members in zip(*rows, strict=True)]

    def _rows(self, model: nn.Module, batch: Any, ids: np.ndarray, member: int, losses: bool) -> list[torch.Tensor]:
        head = self._head(model, batch, losses=losses)
        if self.exact and head.exact != self.each:
            raise DataError(
                f"the first batch has {self.each} outputs an example, and that of example {ids[0]} has outputs of "
                f"shape {tuple(head.outputs.shape)}: pass batches of one form, or BuildConfig(sample=Sample(probes=1))"
            )
        outputs, rows = wide(head.outputs), [] if head.losses is None else [head.losses]
        # A single prediction is one position, an output that is a term of its own one class.
        positions = outputs[0].numel() // head.width if len(ids) else 0
        for number in range(self.each):
            with torch.no_grad():
                if self.exact:
                    v = head.row(number)
                else:
                    signs = hashed_signs((self._seed, "ggn", member), ids, number, positions, head.width, outputs)
                    v = head.root(signs.reshape(outputs.shape))
            rows.append((outputs * v).flatten(1).sum(dim=1))
        return rows

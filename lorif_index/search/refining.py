"""Refining: a question's inverse refined with the model, on the exact Gauss-Newton matrix of some training examples.

The stored curvature H is a matrix a layer, cut and rounded. The GGN of the model, over random training examples and all
layers together, is not stored, but its products with a few vectors can be had (`capture.products`). What is solved is

    H' x = g_q,    H' = (1 - share) (mean_i P^T J_i^T M_i J_i P + lambda) + share H,

for all queries at once, from x = H^-1 g_q on. H is in it because few examples do not have curvature in all directions.
What is asked is a mixture of x and H^-1 g_q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..capture.data import batch_examples, parts_of, tokens_of
from ..capture.products import Products
from ..curvature.inverse import Preconditioner, multiply, transform
from ..curvature.refine import Refine, Vectors, mixed, solve
from ..errors import NonFiniteError, QueryError
from ..linalg.sampling import drawn
from ..progress import Reporter
from ..results import Refined
from .examples import Examples
from .reader import Reader

# What the vectors of the queries that are refined together may take, and how many there are of each at most: x, g, what
# is left over, the same preconditioned and before, directions and those still going, their products, what a pass adds
# to these, H times them, and two on the way.
_VECTORS_BYTES, _VECTORS = 1 << 30, 12


@dataclass(frozen=True, eq=False)
class Refining:
    """What refines questions.

    Attributes:
        choice: how.
        reader: the index.
        examples: computes training examples again.
        products: of the model, for the layers that are asked.
        sequences: whether examples have several predictions.
        batch_size: examples, times queries, that the model is run on at once (see `capture.data.batch_examples`).
    """

    choice: Refine
    reader: Reader
    examples: Examples
    products: Products
    sequences: bool
    batch_size: int | str

    def refined(
        self, gradients: Vectors, preconditioners: Mapping[str, Preconditioner], report: Reporter
    ) -> tuple[Vectors, Refined]:
        """x of H' x = g, mixed with H^-1 g.

        Memory: the vectors of as many queries at a time as take 1 GiB, of 12 vectors (q, D) float32 each; the chosen
        examples as they come from the data; and a pass of a batch.

        Args:
            gradients: g, layer -> (q, d_in, d_out) float32.
            preconditioners: H, of the same layers.
            report: is told of every example of every product.

        Returns:
            x, of the form of g, and how it was found.

        Raises:
            QueryError: one query's vectors are beyond 1 GiB. DataError: the data hold other examples than were indexed.
            CaptureError: the model does not have the derivatives. NonFiniteError: inf or NaN.
        """
        share = self.choice.share_for(self.sequences)
        if share == 1:
            count = len(next(iter(gradients.values())))
            return transform(gradients, preconditioners), Refined(0, 0, 1.0, [[0.0]] * count, "stored", 0.0)
        together = self._together(gradients)
        count, iterations = len(next(iter(gradients.values()))), self.choice.iterations
        chosen = self._chosen()
        parts: list[dict[str, torch.Tensor]] = []
        residuals: list[list[float]] = []
        passes = -(-count // together) * (iterations + 1)
        with report.stage("refine", len(chosen) * (passes + 1)) as stage:
            batches = self._batches(chosen)
            stage.advance(len(chosen))
            for start in range(0, count, together):
                some = {name: g[start : start + together] for name, g in gradients.items()}

                def apply(v: Vectors) -> Vectors:
                    # Sent to the model's device once, and brought back once, for all batches.
                    sent = {name: part.to(self.products.device) for name, part in v.items()}
                    vectors = len(next(iter(v.values())))
                    mean = {name: torch.zeros_like(part) for name, part in sent.items()}
                    for batch in batches:
                        for part in parts_of(batch, self._each(batch, vectors)):
                            for name, product in self.products.summed(sent, part).items():
                                mean[name] += product
                    stage.advance(len(chosen))
                    kept = multiply(v, preconditioners)
                    lams = {name: preconditioners[name].lam for name in v}
                    exact = {n: m.to(v[n].device) / len(chosen) + lams[n] * v[n] for n, m in mean.items()}
                    return {n: (1 - share) * part + share * kept[n] for n, part in exact.items()}

                solved = solve(apply, lambda v: transform(v, preconditioners), some, iterations)
                stored = transform(some, preconditioners)
                parts.append(mixed(solved.x, stored, self.choice.weight, lambda v: multiply(v, preconditioners)))
                residuals += solved.residuals
            seconds = stage.seconds
        x = {name: torch.cat([part[name] for part in parts]) for name in gradients}
        if not all(bool(torch.isfinite(part).all()) for part in x.values()):
            raise NonFiniteError(
                "the refined question is inf or NaN: compute the model in a wider dtype, or search without refine="
            )
        return x, Refined(iterations, len(chosen), share, residuals, str(self.products.way), seconds)

    def _together(self, gradients: Vectors) -> int:
        """How many queries are refined at once."""
        each = 4 * _VECTORS * sum(g[0].numel() for g in gradients.values())
        if each > _VECTORS_BYTES:
            raise QueryError(
                f"refine= holds {_VECTORS} vectors of a query, {each:,} bytes for these layers, and has "
                f"{_VECTORS_BYTES:,}: refine over fewer layers with layers="
            )
        return min(_VECTORS_BYTES // each, batch_examples(self.batch_size, None))

    def _each(self, batch: Any, vectors: int) -> int:
        """Examples of a pass over a batch with so many vectors."""
        return max(batch_examples(self.batch_size, tokens_of(batch)) // vectors, 1)

    def _chosen(self) -> np.ndarray:
        """Ids of random live examples, rising."""
        live, seed = self.reader.store.live_ids, self.reader.config.seed
        return np.sort(live[drawn(len(live), self.choice.examples, seed, "refine", len(live))])

    def _batches(self, ids: np.ndarray) -> list[Any]:
        """The examples, known to be the index's by their norms."""
        return [batch for batch, _ in self.examples.gradients(ids, self.reader.rows.energies_of(ids))]

"""Questions: whatever is asked (a batch, rows, text, gradients) becomes gradients, and these a question to the rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from .capture.data import as_source, as_tensors, batch_count
from .capture.gradients import GradientBlock, keep_finite, parse_block
from .capture.losses import PerExample
from .capture.products import Products, has_sequences
from .capture.seeing import UnseenLoss
from .capture.sources import ModelCapture, check_block, head_of
from .codecs.base import Transformed
from .curvature.refine import Refine, dots
from .damping import Damping
from .errors import NonFiniteError, QueryError
from .identity import Identity
from .progress import ProgressCallback, reporter
from .results import Refined
from .search.answer import Prepared
from .search.examples import Examples, training_data
from .search.explain import Positions, QueryBatch, shown_positions
from .search.named import check_alone
from .search.normalise import inverse_roots, question_roots
from .search.refining import Refining
from .search.scoring import Question, shared_layers, shared_question
from .snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Questions:
    """Makes questions to one version of an index.

    Attributes:
        now: the version.
        identity: the model, loss and tokenizer that ask.
    """

    now: Snapshot
    identity: Identity

    def chosen(self, layers: str | Iterable[str] | None) -> tuple[str, ...]:
        """The layers that names or glob patterns choose, in the index's order; all for None.

        Raises:
            QueryError: no pattern, or one that matches nothing.
        """
        specs = self.now.reader.specs
        if layers is None:
            return tuple(specs)
        patterns = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise QueryError(f"layers takes a layer's name, a glob pattern or a list of them, got {layers!r}")
        if not patterns:
            raise QueryError("layers is empty: name at least one layer, or leave it out for all")
        for pattern in patterns:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in specs):
                raise QueryError(f"layers={pattern!r} matches none of the index's layers {list(specs)}")
        return tuple(n for n in specs if any(n == p or fnmatchcase(n, p) for p in patterns))

    def policy(self, damping: Damping | float | str | None) -> Damping:
        """The damping that is asked for; None: the build's."""
        return self.now.reader.policy(damping)

    def prepare(
        self,
        query: Any,
        measure: PerExample | None,
        policy: Damping,
        chosen: tuple[str, ...],
        normalize: str | None = None,
        some: bool = True,
        *,
        keep: bool = False,
        contrast: Any = None,
        refining: Refining | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> Prepared:
        """Gradients of the query, transformed once into a question to the rows.

        Args:
            query, measure: as in `Index.search`.
            policy, chosen: the damping and the layers.
            normalize: as in `Index.search`.
            some: as in `gradients`.
            keep: also keep the query's inverse.
            contrast: as in `Index.search`.
            refining: refines it; not where several ranks ask.
            progress: as in `Index.search`.

        Raises:
            As `gradients` and `Refining.refined`; NonFiniteError: inf or NaN in the question.
        """
        began = mid = time.perf_counter()
        reader, inverse, refined = self.now.reader, None, None
        asked: Question | Exception | None = None
        ranks, spread = reader.ranks, self.identity.spread

        def ask() -> tuple[Question, dict[str, torch.Tensor] | None, Refined | None]:
            nonlocal mid
            gradients = self.gradients(query, measure, chosen, some)
            if contrast is not None:
                gradients = _without(gradients, self.gradients(contrast, measure, chosen, some))
            mid = time.perf_counter()
            return self._question(gradients, policy, normalize, keep, refining, progress)

        if spread:
            with ranks.jointly():
                asked, inverse, refined = ask()
        elif ranks.first:
            try:
                asked, inverse, refined = ask()
            except Exception as error:
                asked = error
        question = shared_question(asked, ranks)
        inverse = shared_layers(inverse, reader.ranks) if keep else None
        if normalize is not None:
            question = replace(question, scale=self.now.scales.of(policy, chosen))
        seconds = {"gradients": mid - began, "transform": time.perf_counter() - mid}
        return Prepared(question, seconds, inverse, refined)

    def _question(
        self,
        gradients: dict[str, torch.Tensor],
        policy: Damping,
        normalize: str | None,
        keep: bool,
        refining: Refining | None,
        progress: bool | ProgressCallback | None,
    ) -> tuple[Question, dict[str, torch.Tensor] | None, Refined | None]:
        """The question; its inverse x = H^-1 g, where it is to be kept, both scaled as scores are; and how that was
        refined."""
        reader = self.now.reader
        preconditioners, members = reader.preconditioners(gradients, policy), reader.manifest.members
        refined = None
        if refining is None:
            asked = Transformed.of(gradients, preconditioners, reader.curvature)
        else:
            with reporter(progress) as report:
                x, refined = refining.refined(gradients, preconditioners, report)
            asked = Transformed(x, reader.curvature)
        question = reader.ask(asked)
        if question.x is not None and not bool(torch.isfinite(question.x).all()):
            raise NonFiniteError(
                "the query's coordinates are inf or NaN: its gradients are too large, or what the index was fitted "
                "with is damaged (index.verify() tells)"
            )
        if normalize is None and members == 1:
            return question, dict(asked.x) if keep else None, refined
        share = torch.full((question.count,), 1.0 / members)
        if normalize == "cosine":
            if refined is None:
                share *= question_roots(gradients, preconditioners, members)
            else:
                share *= inverse_roots(dots(gradients, dict(asked.x)).float() / members)
        scaled = {name: part * share.reshape(-1, 1, 1) for name, part in asked.x.items()} if keep else None
        return question.scaled(share), scaled, refined

    def gradients(
        self, query: Any, measure: PerExample | None, chosen: tuple[str, ...], some: bool = True
    ) -> dict[str, torch.Tensor]:
        """(q, d_in, d_out) float32 per chosen layer, of the quantity to lower.

        Raises:
            QueryError: there are no examples; none has a gradient; or, unless `some` are enough, one has none.
        """
        parts = list(self.batches(query, measure, chosen))
        if not parts:
            raise QueryError("the query holds no examples")
        found = {name: torch.cat([part.gradients[name] for part in parts]) for name in chosen}
        there = torch.stack([g.flatten(1).ne(0).any(dim=1) for g in found.values()]).any(dim=0)
        if not bool(there.any() if some else there.all()):
            raise QueryError(
                f"example {int((~there).nonzero()[0])} of the query has no gradient in any layer asked, so that no row "
                "has a score for it: a prediction so sure that its loss is 0, a loss on no token or label, or a "
                "measure that was computed without gradients or of another model? Leave it out, or ask another "
                "measure, such as measure=lambda model, batch: model(batch[0])[:, 1]"
            )
        return found

    def batches(
        self,
        query: Any,
        measure: PerExample | None,
        chosen: tuple[str, ...],
        *,
        positions: bool = False,
        taken: ModelCapture | None = None,
    ) -> Iterator[QueryBatch]:
        """The query's gradients, batch by batch.

        Args:
            query, measure: as in `Index.search`.
            chosen: the layers.
            positions: also keep what the layers held at each position.
            taken: what takes gradients of the model, where it was made already.

        Raises:
            QueryError, DataError, CaptureError, NonFiniteError, FingerprintError: as in `Index.search`.
        """
        specs = self.now.reader.specs
        found: Iterator[tuple[GradientBlock, QueryBatch]]
        if isinstance(query, Mapping) and query and set(query) <= set(specs):
            if measure is not None:
                raise QueryError(
                    "measure= needs a batch for the model, but the query is gradients: negate them instead"
                )
            block = parse_block(query, 0)
            needed = block.layers if set(chosen) <= set(block.layers) else chosen
            check_block(block, {name: specs[name] for name in needed}, "the query")
            found = iter([(self.now.projections.project(block), QueryBatch({}))])
        else:
            found = self._captured(query, measure, positions, self.capture(measure) if taken is None else taken)
        for block, asked in found:
            block = keep_finite(block, "error", [], "the query's example")
            if block.count:
                yield replace(asked, gradients={n: block.layers[n].dense().float().cpu() for n in chosen})

    def examples(self, pieces: Sequence[tuple[int, Any]], what: str, taken: ModelCapture | None = None) -> Examples:
        """Computes training examples again, which are known to be the index's by their norms.

        Args:
            pieces: (id of the first example, data) that were given; by default the texts that payloads hold.
            what: needs them, for messages.
            taken: as in `batches`.

        Raises:
            QueryError: no model, or several ranks that do not each have it whole. DataError: no data. FingerprintError:
            the model has changed.
        """
        ranks = self.now.reader.ranks
        with ranks.jointly():
            taken = self.capture(None) if taken is None else taken
            if ranks.size > 1 and self.identity.spread:
                raise QueryError(
                    f"{what} of an index that several ranks have opened takes a model that each of them has whole, and "
                    "this one is spread over them: open the index without distributed="
                )
            # Payloads are looked up by all ranks together, and here each takes its own.
            stored = self.identity.stored(self.now) if ranks.size == 1 else []
            data = training_data(pieces or stored, taken.config.batch_size, what)
        return Examples(data, taken.capture(self.identity.loss).trust())

    def refining(
        self, asked: bool | Refine | None, pieces: Sequence[tuple[int, Any]], chosen: tuple[str, ...]
    ) -> Refining | None:
        """What refines questions to some layers as `refine=` asks; None where it asks for nothing.

        Raises:
            QueryError: as `examples`; no such choice; a loss that does not say where its logits are; a model that is
            spread over processes. DataError, FingerprintError: as `examples`.
        """
        if asked is None or asked is False:
            return None
        choice = Refine() if asked is True else asked
        if not isinstance(choice, Refine):
            raise QueryError(f"refine takes True, a Refine or None, got {asked!r}: pass refine=True")
        check_alone(self.now.reader)
        taken = self.capture(None)
        if self.identity.spread:
            raise QueryError(
                "refine= takes a model that this process has whole, and this one is spread over several: search "
                "without it"
            )
        loss, examples = self.identity.loss, self.examples(pieces, "refine=", taken)
        first = next(iter(examples.data.select(self.now.reader.store.live_ids[:1])))
        try:
            head = head_of(loss, taken, lambda: first)
        except UnseenLoss as error:
            raise QueryError(
                f"refine= takes the second derivative of the loss at the model's outputs, and {error}: build and open "
                "with loss=CrossEntropy(fn), fn(model, batch) -> (logits, labels), or search without refine="
            ) from None
        capture = taken.capture(loss, chosen).trust()
        sequences = has_sequences(capture, head, lambda: first)
        size = taken.config.batch_size
        return Refining(choice, self.now.reader, examples, Products(capture, head), sequences, size)

    def capture(self, measure: PerExample | None) -> ModelCapture:
        """Takes gradients of the model for questions.

        Raises:
            QueryError, FingerprintError: as `Identity.check_to_ask`.
        """
        self.identity.check_to_ask(self.now, measure)
        return self.identity.capture(self.now)

    def _captured(
        self, query: Any, measure: PerExample | None, positions: bool, taken: ModelCapture
    ) -> Iterator[tuple[GradientBlock, QueryBatch]]:
        """Gradients of the model."""
        query = self.identity.query(query, strict=measure is None)
        capture = taken.capture(self.identity.loss if measure is None else measure)
        for ids, batch in _query_batches(query, taken.config.batch_size):
            kept = Positions() if positions else None
            block = capture.gradients(ids, batch, watch=kept)
            if measure is not None:
                # A measure is to be raised, a loss to be lowered.
                block = GradientBlock(block.ids, {name: g.scaled(-1.0) for name, g in block.layers.items()})
            sign = 1.0 if measure is None else -1.0
            yield block, QueryBatch({}, kept, shown_positions(batch), sign / capture.scale, capture)


def _without(gradients: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is asked less what is contrasted with it.

    Raises:
        QueryError: they do not fit, or are the same.
    """
    asked, taken = (len(next(iter(parts.values()))) for parts in (gradients, others))
    if taken not in (1, asked):
        raise QueryError(
            f"contrast holds {taken} examples and the query {asked}: pass one for all of them, or one for each"
        )
    found = {name: part - others[name] for name, part in gradients.items()}
    there = torch.stack([g.flatten(1).ne(0).any(dim=1) for g in found.values()]).any(dim=0)
    if not bool(there.all()):
        raise QueryError(
            f"example {int((~there).nonzero()[0])} of the query has the gradient that its contrast has, so that "
            "nothing is left to ask: pass another contrast"
        )
    return found


def _query_batches(query: Any, batch_size: int | str) -> Iterator[tuple[np.ndarray, Any]]:
    """A query as batches: it may be anything that `data` may be, or one batch with more in it than tensors."""
    query = as_tensors(query)
    if isinstance(query, Mapping) and query and all(isinstance(v, list) for v in query.values()):
        # A slice of a Hugging Face Dataset: columns of examples; or one example of it: columns of numbers.
        one = not any(isinstance(v[0], (list, torch.Tensor)) for v in query.values() if v)
        count = len(next(iter(query.values())))
        query = [dict(query)] if one else [{k: v[i] for k, v in query.items()} for i in range(count)]
    mixed = isinstance(query, (Mapping, tuple)) and not all(
        isinstance(v, torch.Tensor) for v in (query.values() if isinstance(query, Mapping) else query)
    )
    if mixed:
        yield np.arange(batch_count(query), dtype=np.int64), query
    else:
        yield from as_source(query, batch_size).batches()

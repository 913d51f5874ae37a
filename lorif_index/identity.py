"""Identity: the model, loss and tokenizer that an index is asked with, and whether it was built from them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from .capture.ensemble import count_of, members_of
from .capture.losses import PerExample, loss_name
from .capture.sharded import is_spread
from .capture.sources import ModelCapture, model_digest, weights_state
from .errors import FingerprintError, QueryError
from .search.named import StoredTexts
from .snapshot import Snapshot
from .storage.manifest import check_same
from .text.tokenised import TOKENIZER, TokenisedData, check_tokenizer, prepared, prepared_query


class Identity:
    """A model, its loss and its tokenizer, each None where it was not given.

    Weights that were written to since they were last found to be the index's are compared once more, and that is
    remembered: a search of a model that nobody writes to takes no digest.

    Args:
        model: that the index was built from, in the state that it was compared in.
        loss: that it was built with.
        tokenizer: of transformers.
    """

    def __init__(self, model: nn.Module | None = None, loss: PerExample | None = None, tokenizer: Any = None) -> None:
        self.model, self.loss, self.tokenizer = model, loss, tokenizer
        # The state in which the weights are known to be the index's.
        self._known = None if model is None else weights_state(model)

    @classmethod
    def checked(cls, now: Snapshot, model: nn.Module | None, loss: PerExample | None, tokenizer: Any) -> Identity:
        """What was given to open an index with, compared with what it was built from.

        Raises:
            FingerprintError: another model, loss or tokenizer; the message names what differs.
        """
        check_tokenizer(now.manifest.metadata.get(TOKENIZER), tokenizer, str(now.path))
        if model is None:
            return cls(tokenizer=tokenizer)
        built = now.manifest.fingerprint
        if built["model"] is None:
            raise FingerprintError(f"{now.path} was built from gradients, not from a model: open it without model=")
        capture = ModelCapture(model, now.query_config())
        given = {
            "layers": [asdict(spec) for spec in capture.specs.values()],
            "model": model_digest(model),
            "members": count_of(model),
        }
        if loss is not None:
            given["loss"] = loss_name(loss)
        remedy = "open it with the model and loss that it was built from (another question is put by measure=)"
        check_same({k: built.get(k) for k in given}, given, f"what was given for {now.path}", remedy)
        return cls(model, loss, tokenizer)

    @property
    def spread(self) -> bool:
        """Whether the model is spread over ranks: a pass of it is one of all of them."""
        return self.model is not None and is_spread(self.model)

    def data(self, data: Any) -> Any:
        """Training data as they are captured (see `text.tokenised.prepared`)."""
        return prepared(data, self.model, self.tokenizer)

    def stored(self, now: Snapshot) -> list[tuple[int, Any]]:
        """(0, the texts that an index keeps as payloads, as training data); nothing where they cannot be tokenised."""
        if self.model is None or self.tokenizer is None:
            return []
        rows = StoredTexts(now.reader)
        return [(0, TokenisedData(rows, self.tokenizer, model=members_of(self.model)[0], check=False))]

    def query(self, query: Any, *, strict: bool) -> Any:
        """A question as data (see `text.tokenised.prepared_query`)."""
        return prepared_query(query, self.model, self.tokenizer, strict=strict)

    def capture(self, now: Snapshot) -> ModelCapture:
        """Takes the model's gradients as the index's were taken.

        Raises:
            QueryError: there is no model.
        """
        return ModelCapture(self._there(now), now.query_config(), now.projections)

    def check_to_read(self, now: Snapshot) -> None:
        """Texts are made examples with the model and the tokenizer.

        Raises:
            QueryError: only one of them is there.
        """
        if self.tokenizer is not None and self.model is None and now.manifest.fingerprint["model"] is not None:
            raise QueryError(
                "the index was opened with its tokenizer alone: Index.open(path, model=..., tokenizer=...)"
            )

    def check_to_ask(self, now: Snapshot, measure: PerExample | None) -> None:
        """The model must be able to answer with this measure, or without one with the index's loss.

        Raises:
            QueryError: there is none, or, without a measure, it was opened with another loss. FingerprintError: its
            weights are no longer those that the index was built from.
        """
        model, built = self._there(now), now.manifest.fingerprint
        if measure is None and loss_name(self.loss) != built["loss"]:
            raise QueryError(
                f"the index was built with loss {built['loss']!r}: Index.open(path, model=..., loss={built['loss']})"
            )
        if measure is not None and not callable(measure):
            raise QueryError(f"measure must be callable, measure(model, batch) -> (q,), got {measure!r}")
        state = weights_state(model)
        if state != self._known:
            check_same(
                {"model": built["model"]},
                {"model": model_digest(model)},
                f"the model that is to ask {now.path}, whose weights have changed since,",
                "ask with the weights that it was built from, or build an index of the new ones",
            )
            self._known = state

    def data_to_add(self, now: Snapshot, data: Any, tokenizer: Any) -> Any:
        """Further training data, as `data`. The model's digest is always taken: what is added stays, and torch does
        not count what is written to `.data`.

        Args:
            now: the index.
            data: as they were given.
            tokenizer: for data of text, where the index was opened without.

        Raises:
            QueryError: there is no model. FingerprintError: model, loss or tokenizer are not the index's.
        """
        model, built = self._there(now), now.manifest.fingerprint
        state = weights_state(model)
        check_same(
            {"model": built["model"], "loss": built["loss"]},
            {"model": model_digest(model), "loss": loss_name(self.loss)},
            f"the model that is to give gradients for {now.path}",
            "open the index with the model and loss that it was built from",
        )
        self._known = state
        check_tokenizer(now.manifest.metadata.get(TOKENIZER), tokenizer, str(now.path))
        return prepared(data, model, self.tokenizer if tokenizer is None else tokenizer)

    def _there(self, now: Snapshot) -> nn.Module:
        if now.manifest.fingerprint["model"] is None:
            raise QueryError("the index was built from gradients: pass the query as {layer: (q, d_in, d_out)}")
        if self.model is None:
            more = "loss" if TOKENIZER not in now.manifest.metadata else "tokenizer"
            raise QueryError(f"the index was opened without its model: Index.open(path, model=..., {more}=...)")
        return self.model

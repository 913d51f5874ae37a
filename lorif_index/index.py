"""Index: the user's handle. It wires the rooms together, and does no mathematics itself."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .build.estimate import Estimate, estimate_build
from .build.inputs import Given, chosen_config
from .build.pipeline import build_index
from .build.state import check_free
from .capture.data import as_source
from .capture.ensemble import as_model
from .capture.losses import PerExample
from .config import BuildConfig
from .curvature.refine import Refine
from .damping import Damping
from .describe import Described
from .errors import CorruptionError
from .identity import Identity
from .life.add import add_examples, check_addition
from .life.candidates import rebuild_coarse
from .life.incoming import incoming
from .life.merge import merge_indexes
from .life.refit import refit_index
from .life.remove import compact_rows, remove_examples
from .life.repair import repair_index
from .life.writing import Change, writing
from .linalg.precision import in_whole_products
from .progress import ProgressCallback, reporter
from .questions import Questions
from .ranks import ALONE, Ranks
from .results import Groups, Hits, Selection
from .search.answer import Wanted, answer, check_groups
from .search.contents import added_copies, duplicates, found_again, hashes
from .search.devices import search_device
from .search.explain import Explanation
from .search.groups import By, sum_groups
from .search.named import check_alone, payloads_at, payloads_of, stored_gradients
from .search.normalise import check_normalize
from .search.pairs import explain_pairs, wanted_ids
from .search.select import check_select, select
from .search.shrinkage import shrinking
from .search.whole import all_scores, in_order, self_influence
from .snapshot import Access, Snapshot
from .storage.damage import damage_message, find_damage, folder_bytes
from .storage.manifest import read_manifest
from .storage.payloads import Payloads, Values
from .text.tokenised import TOKENIZER, prepared, prepared_rows, tokenizer_digest
from .text.words import Words, question_texts


class Index(Described):
    """A training set's gradients, ready to be asked. Made by `Index.build` or `Index.open`, not by calling it."""

    def __init__(self, now: Snapshot, identity: Identity, data: Any = None) -> None:
        # Replaced as a whole when the index moves on: every method takes it once.
        self._now = now
        self._identity = identity
        # (id of the first example, data): what the index was built from, as far as this handle was given it.
        self._pieces: tuple[tuple[int, Any], ...] = () if data is None else ((0, data),)
        self._kept_words: tuple[Snapshot, Words] | None = None

    @property
    def _questions(self) -> Questions:
        """What makes questions to the version that this handle is of."""
        return Questions(self._now, self._identity)

    def refresh(self) -> bool:
        """Moves on to the newest version of the index; whether there was a newer one.

        An open index answers from the version that it opened, whatever writers do meanwhile.
        """
        before, self._now = self._now, self._now.newest()
        return self._now is not before

    def _writing(self, progress: bool | ProgressCallback | None) -> AbstractContextManager[Change]:
        return writing(self._now, self._newest, progress)

    def _newest(self) -> Snapshot:
        self._now = self._now.newest()
        return self._now

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
    @in_whole_products
    def build(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        data: Any = None,
        gradients: Iterable[Any] | None = None,
        loss: PerExample | None = None,
        curvature: Any = None,
        config: BuildConfig | None = None,
        metadata: dict[str, Any] | None = None,
        payloads: Values | None = None,
        fit: Index | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        distributed: Any = None,
        progress: bool | ProgressCallback | None = None,
    ) -> Index:
        """Builds an index in a folder, and opens it. The same call on an interrupted build goes on with it.

        Args:
            path: a folder that does not exist, is empty, or holds an interrupted build.
            model: the trained model. It is left exactly as it was found. Of a list of models, such as checkpoints of
                several seeds, scores are the mean; layer "w" of the first is then called "0.w" in the index. The
                config's `layers` are of a model's own names.
            data: a torch Dataset, a DataLoader that does not shuffle, a Hugging Face Dataset, or a tuple or dict of
                tensors. Batches are tensors, tuples or dicts; dict items of different lengths are padded. A model of
                transformers also takes texts, chats and packed rows (see `text.TokenisedData`).
            gradients: instead of model and data: an iterable of blocks {layer: (n, d_in, d_out) array}, or of factor
                pairs {layer: ((n, d_in, m), (n, d_out, m))}. What can be walked only once is kept on disk meanwhile.
            loss: loss(model, batch) -> (n,) per-example losses; default `default_loss`.
            curvature: "mixed", "ggn" or "empirical" (see `BuildConfig.curvature`); or rows to fit it from: of the same
                forms as data or gradients, or a `CurvatureRows`. By default the config decides.
            config: the choices; `BuildConfig()` by default.
            metadata: a dict of plain JSON values, kept in the manifest.
            payloads: a plain JSON value for each example (its text, source, label, your own id), which comes back with
                hits. A list, or anything with a length and integer keys.
            fit: another index, whose projections, curvature and directions are taken. Such indexes can be merged. Its
                config is the default then.
            tokenizer: of transformers, for data and questions of text; the metadata keep its digest.
            distributed: None: all ranks of the default process group, if one is initialised, call this with the same
                arguments and share the work. False: this process alone. Or a `ProcessGroup`. Ranks that do not see one
                folder under `path` each get a part; `open(distributed=True)` searches the parts together.
            progress: True or False for bars on stderr, None for bars on a terminal, or a callable that gets every
                `ProgressEvent`.

        Raises:
            IndexExistsError: the folder is not free. ConfigError, DataError, CaptureError: what was given cannot be
            used; nothing is written then. NonFiniteError: inf or NaN in a gradient. FingerprintError: the folder holds
            an interrupted build of something else. DistributedError: another rank failed or was given something else.
        """
        folder = Path(path)
        fitted = None if fit is None else fit.path if isinstance(fit, Index) else Path(fit)
        config = chosen_config(config, fitted, curvature)
        asked, ranks = as_model(model), Ranks.of(distributed)
        known = {} if tokenizer is None else {TOKENIZER: tokenizer_digest(tokenizer)}
        with ranks.jointly("data"):
            # Before much is read: texts are walked once to find what cannot be used.
            check_free(folder)
            data, curvature = prepared(data, asked, tokenizer), prepared_rows(curvature, asked, tokenizer)
        with reporter(progress if ranks.first or callable(progress) else False) as report:
            kept = known | metadata if isinstance(metadata, dict) else known if metadata is None else metadata
            given = Given(asked, data, gradients, loss, curvature, config, kept, payloads, fitted)
            whole = build_index(folder, given, report, ranks)
        access = Access(device=search_device(None), ranks=ALONE if whole else ranks)
        return cls(Snapshot.open(folder, access), Identity(asked, loss, tokenizer), data)

    @classmethod
    @in_whole_products
    def estimate(
        cls,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        data: Any = None,
        gradients: Iterable[Any] | None = None,
        loss: PerExample | None = None,
        config: BuildConfig | None = None,
        examples: int | None = None,
        batches: int = 4,
        disk: int | None = None,
        payload_bytes: float = 0.0,
        world_size: int = 1,
        tokenizer: Any = None,
        progress: bool | ProgressCallback | None = None,
    ) -> Estimate:
        """Disk, memory and time of a build before it starts. Nothing is kept.

        Args:
            model, data, gradients, loss, config, tokenizer, progress: as in `build`.
            examples: N, where `data` is only a part; by default what there is.
            batches: how many are timed.
            disk: bytes that there are for the index: says which choices fit.
            payload_bytes: of an example's payload, on average.
            world_size: ranks that are to build it together: `Estimate.ranks` says what each takes and sends.

        Raises:
            ConfigError, DataError, CaptureError: as in `build`.
        """
        config, asked = chosen_config(config), as_model(model)
        with reporter(progress) as report:
            return estimate_build(
                model=asked,
                data=prepared(data, asked, tokenizer),
                gradients=gradients,
                loss=loss,
                config=config,
                examples=examples,
                batches=batches,
                disk=disk,
                payload_bytes=payload_bytes,
                world_size=world_size,
                folder=None,
                report=report,
            )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        loss: PerExample | None = None,
        data: Any = None,
        device: str | torch.device | None = None,
        verify: str = "first",
        damaged: str = "refuse",
        tokenizer: Any = None,
        distributed: Any = False,
    ) -> Index:
        """Opens a finished index, as it is now: what writers do later is seen after `refresh`.

        Args:
            path: its folder.
            model: the model or models that it was built from; needed for raw queries only.
            loss: the loss it was built with, if that was not the default.
            data: what it was built from, in the same order, for `explain`; it is not looked at before.
            device: where rows are scored: "cuda", where what fits into half of the free memory stays; "cpu"; None: a
                GPU where torch and faiss both see one.
            verify: when a shard that is scanned is compared with its digest: "first", before its first use; "always",
                before every scan; "never". Rows read singly, and all other files, are always checked.
            damaged: "refuse" raises `CorruptionError` where a search meets damage; "skip" looks at every shard now, and
                answers without the examples of damaged ones (`SearchStats.skipped` counts them).
            tokenizer: the one it was built with, to ask in words and to add texts.
            distributed: True: all ranks of the default process group open the index, or its parts, together; or a
                `ProcessGroup`. Each holds a part of the rows. All call the same methods at the same time; rank 0's
                query counts (others may pass None), and all get the answer. Such a handle changes nothing.

        Raises:
            NotAnIndexError, FormatVersionError, CorruptionError: the folder. FingerprintError: another model, a loss
            of another name (what a loss computes is not compared) or another tokenizer; the message names what differs.
        """
        access = Access(search_device(device), verify, damaged, Ranks.of(distributed))
        with access.ranks.jointly("open"):
            read_manifest(Path(path))
        now = Snapshot.open(Path(path), access)
        identity = Identity.checked(now, None if model is None else as_model(model), loss, tokenizer)
        return cls(now, identity, identity.data(data))

    # -- asking --------------------------------------------------------------------------------------------------

    @in_whole_products
    def search(
        self,
        query: Any,
        k: int = 20,
        *,
        recall: float = 0.99,
        rescore: bool = True,
        measure: PerExample | None = None,
        opponents: bool = False,
        contrast: Any = None,
        normalize: str | None = None,
        exact: bool | None = None,
        rerank: int | None = None,
        refine: bool | Refine | None = None,
        damping: Damping | float | str | None = None,
        layers: str | Iterable[str] | None = None,
        group_by: By | None = None,
        lexical: bool = False,
        progress: bool | ProgressCallback | None = False,
    ) -> Hits:
        """The k training examples that lowered (or, with opponents, raised) the query's loss most.

        Args:
            query: one batch of the kind the index was built from; or gradients {layer: (q, d_in, d_out)} or factor
                pairs, of a quantity to lower. With a tokenizer also a text, a chat (a list of messages), a list of
                either, or rows such as {"prompt", "completion"}.
            k: how many; at most n.
            recall: share of the exact k best to find, in (0, 1]. Higher recall costs more time; 1 scans every row.
            rescore: False answers from the coarse index alone, with approximate scores.
            measure: measure(model, batch) -> (q,): explain this instead of the loss; positive scores raise it.
            opponents: the most negative scores first instead.
            contrast: another question, of the query's form: one for all, or one for each. Its gradient is taken off, so
                that hits are those that lowered the query's loss more than the contrast's.
            normalize: "relatif" divides each score by the root of the example's self-influence (RelatIF,
                arXiv:2003.11630); "cosine" by the root of the query's, too. Every row is scanned. The first such search
                under a damping also finds all self-influences and keeps them: 4 bytes a row.
            exact: True scans every row; False rescores candidates, however small the index; None chooses.
            rerank: compute so many of the best by rows again with the model, at least k, and put them in order by the
                scores of their whole gradients, which hits then have. It takes the model and what the index was built
                from (`open(model=, data=)`), and a forward and a backward pass for each of these examples. Groups stay
                those of rows' scores.
            refine: refine the queries' inverse with the model, by conjugate gradients on the exact Gauss-Newton matrix
                of some training examples: True, or a `Refine`. It takes the model and what the index was built from, as
                `rerank` does, and a forward and a backward pass of these examples for each query and step.
            damping: another policy than the build's, a multiple of trace / D, or "auto".
            layers: names or glob patterns of the layers whose scores are summed; all by default.
            group_by: also gives `hits.groups`, as `groups` does by this field of the payloads; it scans every row.
            lexical: also gives `hits.lexical`, where each hit would stand by its words alone (BM25), of texts among
                payloads; the question must be text. The first such search reads all payloads and keeps their words.
            progress: as in `build`.

        Returns:
            `Hits`: ids (q, k) int64, scores (q, k) float32, stats. Memory does not grow with n.

        Raises:
            QueryError: arguments that do not fit, or a way of searching that the index does not have. FingerprintError:
            the model has changed. NonFiniteError: inf or NaN in the query's gradient. DataError: `rerank` or `refine`
            without data, or with others than were indexed. CaptureError: `refine` of a model without the derivatives.
        """
        ask = self._questions
        rerank = None if rerank is False else rerank
        wanted = Wanted(
            k=k,
            recall=recall,
            rescore=rescore,
            opponents=opponents,
            normalize=normalize,
            exact=exact,
            damping=ask.policy(damping),
            layers=ask.chosen(layers),
            group_by=group_by,
            rerank=rerank,
        )
        examples = None if rerank is None else ask.examples(self._pieces, f"rerank={rerank}")
        prepare = partial(
            ask.prepare,
            query,
            measure,
            wanted.damping,
            wanted.layers,
            normalize,
            some=False,
            keep=examples is not None,
            contrast=contrast,
            refining=ask.refining(refine, self._pieces, wanted.layers),
            progress=progress,
        )
        texts = question_texts(query) if lexical else []
        words = self._words(ask.now) if lexical else None
        hits = answer(ask.now.reader, wanted, prepare, progress, examples)
        return hits if words is None else replace(hits, lexical=words.ranks(texts, hits.ids))

    def _words(self, now: Snapshot) -> Words:
        if self._kept_words is None or self._kept_words[0] is not now:
            self._kept_words = (now, Words(now.reader))
        return self._kept_words[1]

    @in_whole_products
    def groups(
        self,
        query: Any,
        by: By,
        *,
        measure: PerExample | None = None,
        contrast: Any = None,
        damping: Damping | float | str | None = None,
        layers: str | Iterable[str] | None = None,
        k: int | None = None,
        shrink: bool = False,
        refine: bool | Refine | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> Groups:
        """Sums the scores of all examples by a field of their payloads, such as source or label.

        Args:
            query, measure, contrast, damping, layers, refine, progress: as in `search`.
            by: a field of the payloads, or a function of a payload that gives text, a number, True, False or None;
                or a list of them, by whose values together groups are made. Examples without one form the group None.
            k: how many groups to keep of each query, of the largest sums; all by default.
            shrink: as in `scores`: the sums are then of what cannot be chance.

        Returns:
            `Groups`, largest sum first. Memory grows with the number of groups.

        Raises:
            QueryError: as in `search`; an index without payloads or rows; a field that no payload has; a value that is
            none of those. CorruptionError: a payload that is damaged.
        """
        ask = self._questions
        reader = ask.now.reader
        check_groups(by, k)
        chosen, policy = ask.chosen(layers), ask.policy(damping)
        refining = ask.refining(refine, self._pieces, chosen)
        question = ask.prepare(
            query, measure, policy, chosen, contrast=contrast, refining=refining, progress=progress
        ).question
        with reporter(progress) as report:
            return sum_groups(reader, shrinking(reader, question) if shrink else question, by, k, report)

    @in_whole_products
    def scores(
        self,
        query: Any,
        *,
        measure: PerExample | None = None,
        contrast: Any = None,
        damping: Damping | float | str | None = None,
        layers: str | Iterable[str] | None = None,
        normalize: str | None = None,
        out: np.ndarray | None = None,
        gather: bool = True,
        shrink: bool = False,
        refine: bool | Refine | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Scores of every training example, exact for what is stored.

        Args:
            query, measure, contrast, damping, layers, normalize, refine, progress: as in `search`.
            out: a (q, n) float32 array to write to, for instance a memory map; (q, m) without `gather`.
            gather: of an index that several ranks have opened together: True gives the whole matrix to each of them;
                False to each the (q, m) columns of the rows that it holds, `index.held_ids`.
            shrink: for scores that are to be summed: makes those small that cannot be told from noise, without
                changing their order (see `search.shrinkage`).

        Returns:
            (q, n) float32; column j is row id `index.ids[j]`.

        Raises:
            QueryError: as in `search`, or an `out` of another shape or dtype.
        """
        ask = self._questions
        reader = ask.now.reader
        check_normalize(normalize)
        chosen, policy = ask.chosen(layers), ask.policy(damping)
        refining = ask.refining(refine, self._pieces, chosen)
        question = ask.prepare(
            query, measure, policy, chosen, normalize, contrast=contrast, refining=refining, progress=progress
        ).question
        with reporter(progress) as report:
            return all_scores(reader, shrinking(reader, question) if shrink else question, out, report, gather=gather)

    @in_whole_products
    def select(
        self,
        queries: Any,
        n: int,
        *,
        method: str = "round-robin",
        measure: PerExample | None = None,
        contrast: Any = None,
        damping: Damping | float | str | None = None,
        refine: bool | Refine | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> Selection:
        """Chooses n training examples for some questions together, such as to train on for what these stand for.

        Args:
            queries, measure, contrast, damping, refine, progress: as in `search`.
            n: how many; at most those that the index holds.
            method: "round-robin": each question in turn takes its best example that is not taken yet
                (arXiv:2602.14696); "sum": those of the largest scores, summed over the questions; "greedy": of four
                times as many of these, one after the other, what brings the sum of all that are taken closest to what
                is asked, so that none says what others have said (see `search.select`). It holds (4n)^2 numbers.

        Returns:
            `Selection`: ids, scores and the question that took each.

        Raises:
            QueryError: as in `search`; no such method; an n that cannot be; an index that several ranks have opened.
        """
        ask = self._questions
        reader = ask.now.reader
        check_alone(reader)
        check_select(n, method, reader.live_count)
        chosen, policy = ask.chosen(None), ask.policy(damping)
        refining = ask.refining(refine, self._pieces, chosen)
        prepared = ask.prepare(
            queries, measure, policy, chosen, contrast=contrast, refining=refining, progress=progress
        )
        with reporter(progress) as report:
            picked = select(reader, prepared.question, int(n), method, policy, report)
        payloads = payloads_at(reader, picked.places) if reader.has_payloads else None
        ids = reader.rows.ids_at(picked.places)
        return Selection(
            ids,
            picked.scores,
            picked.question_of,
            method,
            picked.exhausted,
            picked.ties,
            payloads,
            tuple(self._pieces),
        )

    @in_whole_products
    def explain(
        self,
        query: Any,
        ids: Hits | np.ndarray | Sequence[int] | Sequence[Sequence[int]],
        *,
        data: Any = None,
        measure: PerExample | None = None,
        damping: Damping | float | str | None = None,
        layers: str | Iterable[str] | None = None,
        query_tokens: bool = True,
        progress: bool | ProgressCallback | None = False,
    ) -> list[list[Explanation]]:
        """Takes scores apart by layer, by module and by token of the training example and of the query.

        Only these examples' gradients are computed again. The shares sum to the score of the whole gradient.

        Args:
            query: as in `search`.
            ids: the `Hits` of that search, or row ids (q, k), or (k,) for every query.
            data: what the index was built from, in the same order; by default what `build` or `open` was given, else
                the texts that payloads hold, where there is a tokenizer.
            measure, damping, layers, progress: as in `search`.
            query_tokens: also say where in the query; it costs about as much again.

        Returns:
            for each query, an `Explanation` for each of its ids, in their order.

        Raises:
            QueryError: as in `search`; ids that the index does not hold, or that do not fit the queries; an index of
            gradients, or opened without its model. DataError: no data, or others than were indexed.
        """
        ask = self._questions
        reader, identity = ask.now.reader, ask.identity
        wanted = wanted_ids(reader, ids)
        chosen, policy = ask.chosen(layers), ask.policy(damping)
        taken = ask.capture(None)
        pieces = self._pieces if data is None else [(0, identity.data(data))]
        examples, preconditioners = ask.examples(pieces, "explain", taken), reader.preconditioners(chosen, policy)
        asked = ask.batches(query, measure, chosen, positions=query_tokens, taken=taken)
        with reporter(progress) as report:
            return explain_pairs(reader, asked, wanted, examples.data, examples.capture, preconditioners, report)

    @in_whole_products
    def self_influence(
        self,
        *,
        damping: Damping | float | str | None = None,
        layers: str | Iterable[str] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Each stored example's score with itself, g_i^T H^-1 g_i, (n,) float32, in the order of `index.ids`.

        Of several models, the mean over them, as for scores.
        """
        ask = self._questions
        reader = ask.now.reader
        with reporter(progress) as report:
            own = self_influence(reader, ask.policy(damping), ask.chosen(layers), report)
        return in_order(reader, own)

    def payloads(self, ids: Iterable[int] | np.ndarray | None = None) -> list[Any]:
        """Payloads of some rows, as given to `build` or `add`; None where a row has none.

        Args:
            ids: row ids, in the order wanted; all by default (mind the memory).

        Raises:
            QueryError: an id that the index does not hold. CorruptionError: a payload that is damaged.
        """
        reader = self._reader
        return payloads_of(reader, in_order(reader, reader.store.live_ids) if ids is None else ids)

    def contents(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Hashes of the examples of some rows, by which they are found again in another data set or index.

        A hash is of all that the model was given, inputs and labels: the numbers of the example's batch, without
        padding; for a text, of its tokens and labels. Not of text, ids or urls beside them.

        Args:
            ids: row ids, in the order wanted.

        Returns:
            (m,) str, XXH3-128 as 32 hexadecimal digits.

        Raises:
            QueryError: an id that the index does not hold; an index that was built from gradients.
        """
        return hashes(self._reader, ids)

    def find(self, data: Any) -> list[np.ndarray]:
        """Where examples are in the index: the rows that have the very content (see `contents`).

        Args:
            data: as for `build`, with labels where that had some; for text, the index must have been opened with its
                model and tokenizer.

        Returns:
            For each example the ids (any,) int64 of its rows, rising; none where it is not there.

        Raises:
            QueryError: an index that was built from gradients, or one of texts that was opened without its model.
            DataError: as `build`.
        """
        now = self._now
        self._identity.check_to_read(now)
        examples = as_source(self._identity.data(data), now.query_config().batch_size)
        return found_again(now.reader, (batch for _, batch in examples.batches()))

    def duplicates(self) -> list[np.ndarray]:
        """Examples that are there more than once: for each the ids (at least 2,) int64 of its rows, rising.

        Copies have the same score for every question.

        Raises:
            QueryError: an index that was built from gradients.
        """
        return duplicates(self._reader)

    def gradients(self, ids: Iterable[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The projected gradients that stored rows stand for. They can be asked as a query, without the model.

        Args:
            ids: row ids, in the order wanted (mind the memory). Rows are checked against their checksums.

        Returns:
            Layer -> (n, d_in, d_out) float32.

        Raises:
            QueryError: an id that the index does not hold. CorruptionError: damage.
        """
        return stored_gradients(self._reader, ids)

    # -- changing it ---------------------------------------------------------------------------------------------

    @in_whole_products
    def rebuild_coarse(
        self,
        kind: str = "auto",
        *,
        query: Any = None,
        measure: PerExample | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        """Makes the coarse index anew from the stored rows, and learns again how many candidates a recall takes.

        Args:
            kind: "auto", "pq" or "flat" (see `CoarseIndex`).
            query, measure: as in `search`: queries like those that will be asked. It learns from training examples,
                and from these if given.
            progress: as in `build`.

        Raises:
            QueryError: as in `search`. ConfigError: no such kind, or faiss is not installed. LockedError: another
            writer is at work.
        """
        extra = None if query is None else self._questions.gradients(query, measure, self.layers)
        with self._writing(progress) as change:
            rebuild_coarse(change.now.reader, kind, extra, change.report)

    @in_whole_products
    def add(
        self,
        data: Any = None,
        *,
        gradients: Iterable[Any] | None = None,
        payloads: Values | None = None,
        tokenizer: Any = None,
        progress: bool | ProgressCallback | None = None,
    ) -> np.ndarray:
        """Indexes further examples, which can be found at once. The same call on an interrupted one goes on with it.

        Projections, curvature and sketch stay as they were fitted (see `curvature_age`).

        Args:
            data: as in `build`; the index must have been opened with its model, and its loss.
            gradients: instead of data, as in `build`.
            payloads: as in `build`, of the new examples.
            tokenizer: for data of text, if the index was opened without; the one that it was built with.
            progress: as in `build`.

        Returns:
            (m,) int64: the ids of the new rows. They go on from the last that was ever given.

        Raises:
            DataError, NonFiniteError: as in `build`; the index is then as it was. FingerprintError: the model has
            changed. LockedError: another writer is at work.
        """
        identity = self._identity
        check_addition(data, gradients, identity.model, self._now.manifest.fingerprint["model"] is not None)
        if data is not None:
            data = identity.data_to_add(self._now, data, tokenizer)
        with self._writing(progress) as change, incoming(change.now, identity, data, gradients) as new:
            first = change.now.manifest.next_id
            kept = None if payloads is None else Payloads(payloads, new.source.count)
            add_examples(change.now.reader, new.source, new.digest, kept, change.report, new.device)
        if data is not None and self._pieces:
            self._pieces = (*self._pieces, (first, data))
        copies = added_copies(change.now.reader, first)
        if copies:
            count = sum(int((group >= first).sum()) - int(group[0] >= first) for group in copies)
            warnings.warn(
                f"{count:,} of the added examples are copies of others (such as {copies[0].tolist()[:5]}): "
                "index.duplicates() gives all of them",
                stacklevel=3,
            )
        ids = change.now.reader.store.ids
        return ids[ids >= first]

    def remove(self, ids: Iterable[int] | np.ndarray) -> int:
        """Removes examples: no later answer has them. They leave the disk at `compact`, and a curvature of
        stored factors at `refit`; where rows are eigencodes, it keeps them until the index is built anew.

        Args:
            ids: row ids; one named twice is removed once.

        Returns:
            how many rows were removed.

        Raises:
            QueryError: an id that the index does not hold, or all of them. LockedError: another writer is at work.
        """
        with self._writing(False) as change:
            return remove_examples(change.now.reader, ids)

    def compact(self, *, progress: bool | ProgressCallback | None = None) -> dict[str, Any]:
        """Takes removed examples off the disk, and joins small shards. Ids and scores stay as they are.

        What was fitted on them stays until `refit`. Files that another reader has open stay until a later change.

        Returns:
            {"bytes": freed, "held": names of files that readers of older versions still hold}.

        Raises:
            LockedError: as in `add`.
        """
        before = folder_bytes(self.path)
        with self._writing(progress) as change:
            compact_rows(change.now.reader, change.report)
        return {"bytes": before - folder_bytes(self.path), "held": change.held}

    @in_whole_products
    def refit(self, *, progress: bool | ProgressCallback | None = None) -> dict[str, Any]:
        """Renews curvature, sketch and coarse index from the stored rows, without the model.

        Factors give all three, with the empirical curvature. Other rows keep the curvature that they are written in.

        Returns:
            {"renewed": names, "kept": {name: why}}.

        Raises:
            CurvatureError: the stored gradients have no curvature. LockedError: another writer is at work.
        """
        with self._writing(progress) as change:
            return refit_index(change.now.reader, change.report)

    @classmethod
    @in_whole_products
    def merge(
        cls,
        path: str | os.PathLike[str],
        indexes: Sequence[Index | str | os.PathLike[str]],
        *,
        progress: bool | ProgressCallback | None = None,
    ) -> Index:
        """Makes one index of several that share a fit (see `build(fit=)`), copying their rows, and opens it.

        Ids of the first index stay; those of each further one go on from there. Metadata are the first index's.

        Args:
            path: a folder that does not exist or is empty.
            indexes: at least two, in the order in which their rows are to follow each other.
            progress: as in `build`.

        Raises:
            FingerprintError: they do not share a fit; the message names what differs. ConfigError: fewer than two, or
            one without rows. IndexExistsError: the folder is not free.
        """
        parts = [part.path if isinstance(part, Index) else Path(part) for part in indexes]
        with reporter(progress) as report:
            merge_indexes(Path(path), parts, report)
        return cls(Snapshot.open(Path(path), Access(search_device(None))), Identity())

    @staticmethod
    def repair(path: str | os.PathLike[str], *, progress: bool | ProgressCallback | None = None) -> dict[str, Any]:
        """Mends a damaged index: damaged shards leave it, what was fitted on rows is made again from those left.

        Damaged files stay in the folder, as `damaged-<name>.kept`.

        Args:
            path: its folder.
            progress: as in `build`.

        Returns:
            {"dropped": [{"file", "rows", "first_id", "last_id"}], "rebuilt": names of what was made again}.

        Raises:
            CorruptionError: nothing stored can make it good; the index is left as it is. LockedError: as in `add`.
        """
        with reporter(progress) as report:
            return repair_index(Path(path), report)

    def verify(self) -> None:
        """Compares every file with the digest under which it was sealed.

        Raises:
            CorruptionError: naming every file that differs, and the ids of the examples in it.
        """
        path, found = self.path, find_damage(self.path, self._now.manifest)
        if found:
            raise CorruptionError(damage_message(path, found))

    def close(self) -> None:
        """Gives the file handles back; a closed index opens them again when asked, if its version is still there."""
        self._reader.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

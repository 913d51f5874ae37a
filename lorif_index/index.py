"""Index: the user's handle. It wires the stages together, and does no mathematics itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from .build.coarse_build import rebuild, recalibrate
from .build.estimate import Estimate, estimate_build
from .build.pipeline import build_index, check_free, loss_name
from .capture.data import as_source, as_tensors, batch_count
from .capture.ensemble import as_model, count_of
from .capture.gradients import GradientBlock, GradientSource, LayerSpec, parse_block
from .capture.hooks import keep_finite
from .capture.losses import PerExample
from .capture.sharded import is_spread
from .capture.sources import (
    GivenGradients,
    ModelCapture,
    ModelGradients,
    Rewound,
    check_block,
    data_digest,
    is_one_shot,
    model_digest,
    weights_state,
)
from .capture.spool import remove_leftovers
from .config import BuildConfig
from .curvature.fit import LayerCurvature
from .damping import Damping, as_damping
from .errors import ConfigError, CorruptionError, DataError, FingerprintError, NonFiniteError, QueryError, StoreError
from .life.add import add_examples, check_addition
from .life.merge import merge_indexes
from .life.refit import refit_index
from .life.remove import as_ids, compact_rows, remove_examples
from .life.repair import repair_index
from .linalg.projection import Projections
from .markup import table
from .progress import ProgressCallback, Reporter, reporter
from .ranks import ALONE, Ranks
from .results import Groups, Hits, SearchStats
from .search.devices import search_device
from .search.explain import Asked, Explanation, Positions, TrainingData, explain, shown_positions
from .search.groups import By, sum_groups
from .search.planner import ANSWERS, Plan, choose_plan, scan
from .search.reader import Reader
from .search.scoring import Question, told
from .search.shrinkage import shrinking
from .storage.damage import damage_message, damaged_shards, find_damage, folder_bytes
from .storage.locks import Lease, WriterLock
from .storage.manifest import Manifest, check_same, collect, open_version, read_manifest, spec_to_json
from .storage.payloads import Payloads, Values, decode
from .storage.store import VERIFY
from .text.tokenised import (
    TOKENIZER,
    check_tokenizer,
    prepared,
    prepared_query,
    prepared_rows,
    tokenizer_digest,
)

NORMALIZATIONS = ("relatif", "cosine")


class Index:
    """A training set's gradients, ready to be asked. Made by `Index.build` or `Index.open`, not by calling it."""

    def __init__(
        self,
        path: Path,
        model: nn.Module | None,
        loss: PerExample | None,
        device: str | torch.device | None = None,
        verify: str = "first",
        damaged: str = "refuse",
        ranks: Ranks = ALONE,
        tokenizer: Any = None,
    ) -> None:
        self._path, self._ranks = path, ranks
        self._tokenizer = tokenizer
        self._device = search_device(device)
        self._verify, self._damaged = verify, damaged
        self._use(*open_version(path))
        self._projections = Projections(self._specs, self._config.seed, self._reader.projections)
        self._model = model
        self._loss = loss
        self._weights = None if model is None else weights_state(model)
        # (id of the first example, data): what the index was built from, as far as this handle was given it.
        self._pieces: list[tuple[int, Any]] = []

    def _use(self, manifest: Manifest, lease: Lease) -> None:
        """Reads from one version of the index, and keeps hold of it."""
        damaged = damaged_shards(self._path, manifest) if self._damaged == "skip" else ()
        reader = Reader(
            self._path,
            manifest,
            device=self._device,
            verify=self._verify,
            damaged=damaged,
            lease=lease,
            ranks=self._ranks,
        )
        self._reader = reader
        self._manifest, self._config, self._specs = reader.manifest, reader.config, reader.specs
        self._layout, self._store, self._curvature = reader.layout, reader.store, reader.curvature
        # Scores are means over the models of an ensemble.
        self._members = int(manifest.fingerprint.get("members") or 1)
        self._scales: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}

    def refresh(self) -> bool:
        """Moves on to the newest version of the index; whether there was a newer one.

        An open index answers from the version that it opened, whatever writers do meanwhile.
        """
        manifest, lease = open_version(self._path)
        changed = manifest.generation != self._manifest.generation
        if not any(self._ranks.gather_values(changed)):
            lease.release()
            return False
        # Nothing of the old version is closed: other threads may be searching it, and it goes when the last has done.
        self._use(manifest, lease)
        return True

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
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

        Where torch.distributed is initialised (torchrun), all ranks call this with the same arguments and share the
        work: see `distributed`.

        Args:
            path: a folder that does not exist, is empty, or holds an interrupted build.
            model: the trained model. It is left exactly as it was found. A list of models, such as checkpoints of
                several seeds, makes one index whose scores are the mean over them: layer "w" of the first is called
                "0.w" in the index (and in `layers=` of a search); the config's `layers` are of a model's own names.
            data: a torch Dataset, a DataLoader that does not shuffle, a Hugging Face Dataset, or a tuple or dict of
                tensors. Batches are tensors, tuples or dicts; dict items of different lengths are padded. For a model
                of transformers also texts, chats, prompts with completions, and packed rows (see
                `text.TokenisedData`).
            gradients: instead of model and data: an iterable of blocks {layer: (n, d_in, d_out) array}, or of factor
                pairs {layer: ((n, d_in, m), (n, d_out, m))}. An iterator that is used up by one walk is kept on disk
                meanwhile.
            loss: loss(model, batch) -> (n,) per-example losses; default `default_loss`.
            curvature: "mixed", "ggn" or "empirical" (see `BuildConfig.curvature`), or rows to fit it from, of the same
                forms as data or gradients, or a `CurvatureRows`; default: what the config says, on a random sample.
            config: the choices; `BuildConfig()` by default.
            metadata: a dict of plain JSON values, kept in the manifest.
            payloads: what is to come back with hits: a plain JSON value for each example (its text, source, label, your
                own id for it), as a list or anything with a length and integer keys.
            fit: another index, whose projections, curvature and directions are taken instead of fitted: such indexes
                can be merged. Its config is the default then.
            tokenizer: of transformers, for data and questions of text; a digest of it is kept in the metadata.
            distributed: None: all ranks of the default process group build together, where one is initialised; False:
                this process alone; or a `ProcessGroup`. Where the ranks do not see one folder under `path`, each
                folder gets a part, an index of its own with ids in the whole, and the parts are searched together
                (`open(distributed=True)`).
            progress: True or False for bars on stderr, None for bars on a terminal, or a callable that gets every
                `ProgressEvent`.

        Raises:
            IndexExistsError: the folder is not free. ConfigError, DataError, CaptureError: what was given cannot be
            honoured; nothing is written then. NonFiniteError: inf or NaN in an example's gradient.
            FingerprintError: the folder holds an interrupted build of something else. OSError: disk or permissions.
            DistributedError: another rank failed, hangs, or was given something else.
        """
        folder, fitted = Path(path), None
        if fit is not None:
            fitted = fit.path if isinstance(fit, Index) else Path(fit)
            if curvature is not None:
                raise ConfigError(
                    "fit= takes another index's curvature, so that curvature= has no use: pass one of them"
                )
            if config is None:
                other = read_manifest(fitted)
                config = BuildConfig.from_json(other.config | {"projection_floor": other.floor()})
        config = BuildConfig() if config is None else config
        if not isinstance(config, BuildConfig):
            raise ConfigError(f"config must be a BuildConfig, got {type(config).__name__}")
        asked, ranks = as_model(model), Ranks.of(distributed)
        known = {} if tokenizer is None else {TOKENIZER: tokenizer_digest(tokenizer)}
        with ranks.jointly("data"):
            # Before much is read: texts are walked once to find what cannot be used.
            check_free(folder)
            data, curvature = prepared(data, asked, tokenizer), prepared_rows(curvature, asked, tokenizer)
        with reporter(progress if ranks.first or callable(progress) else False) as report:
            whole = build_index(
                folder,
                model=asked,
                data=data,
                gradients=gradients,
                loss=loss,
                curvature=curvature,
                config=config,
                metadata=known | metadata if isinstance(metadata, dict) else known if metadata is None else metadata,
                payloads=payloads,
                fit=fitted,
                reporter=report,
                ranks=ranks,
            )
        built = cls(folder, asked, loss, ranks=ALONE if whole else ranks, tokenizer=tokenizer)
        built._pieces += [] if data is None else [(0, data)]
        return built

    @classmethod
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
            batches: whose gradients are taken and timed.
            disk: bytes that there are for the index: says which choices fit.
            payload_bytes: of an example's payload, on average.
            world_size: ranks that are to build it together (`build(distributed=)`): `Estimate.ranks` says what each
                takes, and what it sends the others.

        Returns:
            `Estimate`.

        Raises:
            ConfigError, DataError, CaptureError: as in `build`.
        """
        config = BuildConfig() if config is None else config
        if not isinstance(config, BuildConfig):
            raise ConfigError(f"config must be a BuildConfig, got {type(config).__name__}")
        given = {"batches": batches, "examples": examples, "disk": disk, "world_size": world_size}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        with reporter(progress) as report:
            asked = as_model(model)
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
            model: the model it was built from, or the list of them in the same order; needed for raw queries only.
            loss: the loss it was built with, if that was not the default.
            data: what it was built from, in the same order, for `explain`; it is not looked at before.
            device: where rows are scored: "cuda", where what fits into half of the free memory stays; "cpu"; None: a
                GPU where torch and faiss both see one.
            verify: when a shard that is scanned is compared with its digest: "first", before its first use; "always",
                before every scan; "never". Rows read singly, and all other files, are always checked.
            damaged: "refuse" raises `CorruptionError` where a search meets damage; "skip" looks at every shard now, and
                answers without the examples of damaged ones (`SearchStats.skipped` counts them).
            tokenizer: the one it was built with, to ask in words and to add texts.
            distributed: True: all ranks of the default process group open the index together, or the parts of it that
                lie in their folders; or a `ProcessGroup`. Each holds a part of the rows and of the coarse index, all
                call the same methods at the same time, rank 0's query counts (others may pass None), and all get the
                answer. Such a handle changes nothing in the index.

        Raises:
            NotAnIndexError, FormatVersionError, CorruptionError: the folder. FingerprintError: another model, a loss
            of another name (what a loss computes is not compared) or another tokenizer than it was built with; the
            message names what differs.
        """
        if verify not in VERIFY:
            raise ConfigError(f"verify must be one of {VERIFY}, got {verify!r}")
        if damaged not in ("refuse", "skip"):
            raise ConfigError(f"damaged must be 'refuse' or 'skip', got {damaged!r}")
        ranks = Ranks.of(distributed)
        with ranks.jointly("open"):
            read_manifest(Path(path))
        index = cls(Path(path), None, None, device, verify, damaged, ranks, tokenizer)
        check_tokenizer(index.metadata.get(TOKENIZER), tokenizer, str(path))
        if model is not None:
            index._attach(as_model(model), loss)
            data = prepared(data, index._model, tokenizer)
        index._pieces += [] if data is None else [(0, data)]
        return index

    def _attach(self, model: nn.Module, loss: PerExample | None) -> None:
        built = self._manifest.fingerprint
        if built["model"] is None:
            raise FingerprintError(f"{self._path} was built from gradients, not from a model: open it without model=")
        capture = ModelCapture(model, self._query_config())
        given = {
            "layers": [spec_to_json(spec) for spec in capture.specs.values()],
            "model": model_digest(model),
            "members": count_of(model),
        }
        if loss is not None:
            given["loss"] = loss_name(loss)
        remedy = "open it with the model and loss that it was built from (another question is put by measure=)"
        check_same({k: built.get(k) for k in given}, given, f"what was given for {self._path}", remedy)
        self._model, self._loss, self._weights = model, loss, weights_state(model)

    def _query_config(self) -> BuildConfig:
        """The build's config for capturing queries, wherever the model is now."""
        stored = self._config.to_json() | {"device": None, "projection_floor": self._manifest.floor()}
        return BuildConfig.from_json(stored)

    # -- asking --------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Any,
        k: int = 20,
        *,
        recall: float = 0.99,
        rescore: bool = True,
        measure: PerExample | None = None,
        opponents: bool = False,
        normalize: str | None = None,
        exact: bool | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        group_by: By | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> Hits:
        """The k training examples that lowered (or, with opponents, raised) the query's loss most.

        Args:
            query: one batch of the kind the index was built from, or gradients {layer: (q, d_in, d_out)} or factor
                pairs, of a quantity to lower. Where the tokenizer is known, a text, a chat (a list of messages), a list
                of either, or rows such as {"prompt", "completion"}.
            k: how many; above n it gives n.
            recall: the share of the exact k best that is to be found, in (0, 1]; 1 scans every row.
            rescore: False answers from the coarse index alone, with approximate scores.
            measure: measure(model, batch) -> (q,): explain this instead of the loss; positive scores raise it.
            opponents: the most negative scores first instead.
            normalize: "relatif" divides each score by the root of the example's self-influence, so that examples of
                large gradients everywhere do not win (RelatIF, Barshan, Brunet and Dziugaite, arXiv:2003.11630);
                "cosine" by the root of the query's, too. Every row is scanned; the first such search under a damping
                also finds all self-influences, which are kept in memory (4 bytes a row).
            exact: True scans every row; False rescores candidates, however small the index; None chooses.
            damping: another policy than the build's, or a multiple of trace / D.
            layers: names or glob patterns of the layers whose scores are summed; all by default.
            group_by: also sums the scores of the whole training set by this field of the payloads, as `groups` does:
                `hits.groups`. The hits are the same; it takes a scan of every row.
            progress: as in `build`.

        Returns:
            `Hits`: ids (q, k) int64, scores (q, k) float32, stats. Memory does not grow with n.

        Raises:
            QueryError: a query, k, recall or layers that do not fit, or a way of searching that the index does not
            have. NonFiniteError: inf or NaN in the query's gradient.
        """
        self = copy(self)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise QueryError(f"k must be an integer of at least 1, got {k!r}")
        if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1:
            raise QueryError(f"recall must be above 0 and at most 1, got {recall!r}")
        if exact and not rescore:
            raise QueryError("exact=True scores every row, and rescore=False none: pass one of them")
        self._check_normalize(normalize)
        if group_by is not None:
            self._check_groups(group_by, None)
        chosen, policy = self._chosen(layers), self._policy(damping)
        k = min(int(k), len(self))
        # Before the query's gradients are taken: what cannot be answered is refused at once.
        ranks = self._ranks
        ranks.stage = "search"
        with ranks.jointly():
            plan = choose_plan(
                self._reader,
                k=k,
                recall=float(recall),
                largest=not opponents,
                rescore=rescore,
                exact=exact,
                all_layers=len(chosen) == len(self.layers),
                damping=policy,
                normalize=normalize,
            )
        said = {"k": k, "recall": recall, "opponents": opponents, "layers": list(chosen), "way": plan.way}
        ranks.agree("a search", said | {"normalize": normalize, "groups": group_by is not None})
        prepared = self._prepare(query, measure, policy, chosen, normalize, some=False)
        answer = ANSWERS[plan.way](self._reader, prepared.question, plan, k, not opponents, reporter(progress))
        if plan.way != "scan" and answer.positions.min(initial=0) < 0:
            # Inverted lists that were not probed, or a graph in pieces: what is lacking must not look like a row.
            if plan.way == "coarse":
                raise QueryError(
                    f"the coarse index ({self._manifest.coarse['factory']}) proposes fewer than k={k} rows: ask for "  # type: ignore[index]
                    "fewer, or leave rescore=False out"
                )
            plan = Plan("scan", f"the coarse index proposes fewer than k={k} rows: every row is scanned", plan.recall)
            answer = ANSWERS["scan"](self._reader, prepared.question, plan, k, not opponents, reporter(progress))
        stats = SearchStats(
            exact=plan.way == "scan",
            store="coarse" if plan.way == "coarse" else self._reader.representation,
            dtype=self._stored_dtype(),
            examined=int(answer.candidates.max(initial=0)),
            total=len(self),
            skipped=self._skipped_rows(),
            bytes_read=answer.bytes_read,
            seconds=prepared.seconds | answer.seconds,
            damping=policy.to_json(),
            layers=len(chosen),
            approximate=plan.way == "coarse",
            plan=plan.reason,
            candidates=int(answer.candidates.max(initial=0)) if plan.way == "candidates" else 0,
            recall=float(recall) if plan.way != "scan" else 1.0,
            estimated_recall=float(answer.recall.mean()),
            recall_by_query=answer.recall.tolist(),
            candidates_by_query=answer.candidates.tolist(),
        )
        groups = None
        if group_by is not None:
            with reporter(progress) as report:
                groups = sum_groups(self._reader, prepared.question, group_by, None, report)
        ids = self._reader.ids_at(answer.positions)
        return Hits(ids, answer.scores, stats, self._payloads_of(answer.positions), groups)

    def groups(
        self,
        query: Any,
        by: By,
        *,
        measure: PerExample | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        k: int | None = None,
        shrink: bool = False,
        progress: bool | ProgressCallback | None = False,
    ) -> Groups:
        """What whole parts of the training set did to the query: every example's score, summed by source, label, ...

        Args:
            query, measure, damping, layers, progress: as in `search`.
            by: a field of the payloads, or a function of an example's payload that gives text, a number, True, False or
                None. Examples without one form the group None.
            k: how many groups to keep of each query, of the largest sums; all by default.
            shrink: as in `scores`: the sums are then of what cannot be chance.

        Returns:
            `Groups`, largest sum first. Rows are scanned as they stream by: memory grows with the number of groups.

        Raises:
            QueryError: as in `search`; an index without payloads or rows; a field that no payload has; a value that is
            none of those. CorruptionError: a payload that is damaged.
        """
        self = copy(self)
        self._check_groups(by, k)
        question = self._prepare(query, measure, self._policy(damping), self._chosen(layers)).question
        if shrink:
            question = shrinking(self._reader, question)
        with reporter(progress) as report:
            return sum_groups(self._reader, question, by, k, report)

    def scores(
        self,
        query: Any,
        *,
        measure: PerExample | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        normalize: str | None = None,
        out: np.ndarray | None = None,
        gather: bool = True,
        shrink: bool = False,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Exact scores of every training example, (q, n) float32; column j is row id `index.ids[j]`.

        Exact for what is stored: eigencodes, factors, coordinates or both (`BuildConfig.store`).

        Args:
            query, measure, damping, layers, normalize, progress: as in `search`.
            out: a (q, n) float32 array to write to, for instance a memory map; (q, m) without `gather`.
            gather: of an index that several ranks have opened together: True gives the whole matrix to each of them;
                False to each the (q, m) columns of the rows that it holds, `index.held_ids`.
            shrink: for scores that are to be summed, such as to predict what training on a part of the examples would
                do: those that cannot be told from noise are made small, s * s^2 / (s^2 + t^2), t the universal
                threshold by the question's own scores, of 65,536 at random where there are more (see
                `search.shrinkage`). Each question's order stays.

        Raises:
            QueryError: as in `search`, or an `out` of another shape or dtype.
        """
        self = copy(self)
        self._need_rows("scores")
        self._check_normalize(normalize)
        prepared = self._prepare(query, measure, self._policy(damping), self._chosen(layers), normalize)
        width = len(self) if gather else self._store.live_count
        shape = (prepared.question.count, width)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif getattr(out, "shape", None) != shape or getattr(out, "dtype", None) != np.float32:
            got = f"{out.shape} {out.dtype}" if hasattr(out, "shape") and hasattr(out, "dtype") else type(out).__name__
            raise QueryError(f"out must be {shape} float32, got {got}")
        whole = self._ranks.size > 1 and gather
        mine = np.empty((shape[0], self._store.live_count), dtype=np.float32) if whole else out
        question = shrinking(self._reader, prepared.question) if shrink else prepared.question
        with reporter(progress) as report, self._ranks.jointly():
            at = 0
            for _, scores, _ in scan(self._reader, question, report):
                mine[:, at : at + scores.shape[1]] = scores.numpy()
                at += scores.shape[1]
        if whole:
            out[:] = self._in_order(mine.T).T
        return out

    def _in_order(self, values: np.ndarray) -> np.ndarray:
        """(n, ...) of all ranks, in the order of `ids`, of (m, ...) for the live rows that this rank holds."""
        if self._ranks.size == 1:
            return values
        order = np.argsort(np.concatenate(self._ranks.gather(self._store.live_ids)), kind="stable")
        return np.concatenate(self._ranks.gather(values))[order]

    def explain(
        self,
        query: Any,
        ids: Hits | np.ndarray | Sequence[int] | Sequence[Sequence[int]],
        *,
        data: Any = None,
        measure: PerExample | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        query_tokens: bool = True,
        progress: bool | ProgressCallback | None = False,
    ) -> list[list[Explanation]]:
        """Takes scores apart by layer, by module and by token of the training example and of the query.

        The examples' gradients are computed again, and theirs only: the shares sum to the score of the whole gradient,
        which is shown beside that of the stored row.

        Args:
            query: as in `search`.
            ids: the `Hits` of that search, or row ids (q, k), or (k,) for every query.
            data: what the index was built from, in the same order; by default what `build` or `open` was given.
            measure, damping, layers, progress: as in `search`.
            query_tokens: also say where in the query; it costs about as much again.

        Returns:
            for each query, an `Explanation` for each of its ids, in their order.

        Raises:
            QueryError: as in `search`; ids that the index does not hold, or that do not fit the queries; an index of
            gradients, or opened without its model. DataError: no data, or others than were indexed.
        """
        self = copy(self)
        if isinstance(ids, Hits):
            ids = ids.ids
        wanted = as_ids(np.asarray(ids).ravel()).reshape(np.shape(ids))
        if wanted.ndim not in (1, 2) or not wanted.size:
            raise QueryError(f"ids must be Hits, or ids of shape (q, k) or (k,), got shape {wanted.shape}")
        self._positions(np.unique(wanted))
        chosen, policy = self._chosen(layers), self._policy(damping)
        config = self._query_config()
        taken = self._model_capture(None)
        capture = taken.capture(self._loss).trust()
        pieces = self._pieces if data is None else [(0, prepared(data, self._model, self._tokenizer))]
        if not pieces:
            raise DataError(
                "explain computes training examples again, and this index was opened without them: pass data= to it, "
                "or to Index.open"
            )
        examples = TrainingData(pieces, config.batch_size)
        preconditioners = self._reader.preconditioners(chosen, policy)
        out: list[list[Explanation]] = []
        with reporter(progress) as report, report.stage("explain", wanted.size) as stage:
            for asked in self._asked(query, measure, chosen, query_tokens, taken):
                at = len(out)
                if wanted.ndim == 2 and at + asked.count > len(wanted):
                    raise QueryError(f"ids are for {len(wanted)} queries, and there are at least {at + asked.count}")
                part = wanted[at : at + asked.count] if wanted.ndim == 2 else np.tile(wanted, (asked.count, 1))
                out += explain(self._reader, asked, part, at, examples, capture, preconditioners, self._members, stage)
        if wanted.ndim == 2 and len(out) != len(wanted):
            raise QueryError(f"ids are for {len(wanted)} queries, and there are {len(out)}")
        return out

    def self_influence(
        self,
        *,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Each stored example's score with itself, g_i^T H^-1 g_i, (n,) float32, in the order of `index.ids`.

        Of several models, the mean over them, as for scores.
        """
        self = copy(self)
        self._need_rows("self_influence")
        return self._in_order(self._self_influence(self._policy(damping), self._chosen(layers), progress))

    def _self_influence(
        self, policy: Damping, chosen: tuple[str, ...], progress: bool | ProgressCallback | None
    ) -> np.ndarray:
        """(m,) float32, of the live rows that this rank holds."""
        preconditioners = self._reader.preconditioners(chosen, policy)
        out = np.empty(self._store.live_count, dtype=np.float32)
        dead, at = self._store.dead, 0
        with (
            reporter(progress) as report,
            report.stage("scan", self._store.live_count) as stage,
            self._ranks.jointly(),
        ):
            for start, rows in self._store.stream():
                own = self._reader.self_scores(rows, preconditioners) / self._members
                alive = own.numpy() if dead is None else own.numpy()[~dead[start : start + len(rows)]]
                out[at : at + len(alive)] = alive
                at += len(alive)
                stage.advance(len(alive), len(rows) * self._layout.row_bytes)
        return out

    def payloads(self, ids: Iterable[int] | np.ndarray | None = None) -> list[Any]:
        """What was given to `build` or `add` as payloads of some rows, in the order wanted; None where a row has none.

        Args:
            ids: row ids; all by default (mind the memory).

        Raises:
            QueryError: an id that the index does not hold. CorruptionError: a payload that is damaged.
        """
        if ids is None:
            ids = self.ids
        wanted = as_ids(ids)
        return [decode(payload) for payload in self._reader.payloads_at(self._found(wanted))]

    def factors(self, ids: Iterable[int] | np.ndarray | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Stored factors, as float32: layer -> (U (n, d_in, c), V (n, d_out, c)), the stored gradient being U V^T.

        Args:
            ids: row ids, in the order wanted; all by default (mind the memory). Rows are checked against their
                checksums.

        Raises:
            QueryError: an id that the index does not hold, or an index without factors. CorruptionError: a row that is
            damaged.
        """
        if not self._layout.groups:
            raise QueryError(
                f"the index keeps no factors (store={self.representation!r}): build it with store='both' or 'factors'"
            )
        out = {}
        for name, part in self._layout.unpack(self._store.gather(self._positions(ids))).items():
            if part.right is None:
                eye = torch.eye(part.left.shape[2]).expand(len(part.left), -1, -1)
                out[name] = (part.left, eye)
            else:
                out[name] = (part.left.transpose(1, 2), part.right.transpose(1, 2))
        return {name: out[name] for name in self._specs}

    def gradients(self, ids: Iterable[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """What stored rows say of their examples' projected gradients, to be put as a query without the model.

        Args:
            ids: row ids, in the order wanted (mind the memory). Rows are checked against their checksums.

        Returns:
            Layer -> (n, d_in, d_out) float32. Of eigencodes, what their few bits stand for.

        Raises:
            QueryError: an id that the index does not hold, or rows of coordinates alone. CorruptionError: a row that is
            damaged.
        """
        if self._reader.eigen is not None:
            rows = self._store.gather(self._positions(ids))
            dense = self._reader.eigen.dense(rows.factors, self._curvature)
            return {name: dense[name].reshape(-1, spec.d_in, spec.d_out) for name, spec in self._specs.items()}
        if not self._layout.groups:
            raise QueryError(
                f"the index keeps no gradients (store={self.representation!r}): build it with store='eigen', 'factors' "
                "or 'both', or ask with the model"
            )
        return {name: left @ right.transpose(1, 2) for name, (left, right) in self.factors(ids).items()}

    def coordinates(self, ids: Iterable[int] | np.ndarray | None = None) -> np.ndarray:
        """Coordinates z, (n, k) float32, whose inner products approximate influence: stored, or computed from the rows.

        Args:
            ids: row ids, in the order wanted; all by default (mind the memory).

        Raises:
            QueryError: an id that the index does not hold, or an index without a sketch. CorruptionError: a row that is
            damaged.
        """
        if self._reader.sketch is None or not self._layout.row_bytes:
            raise QueryError(
                f"the index has no coordinates (store={self._config.store!r}): build it with store='both' or "
                "'coordinates'"
            )
        return self._reader.coordinates(self._store.gather(self._positions(ids))).numpy()

    # -- the coarse stage ----------------------------------------------------------------------------------------

    def rebuild_coarse(self, coarse: str = "auto", *, progress: bool | ProgressCallback | None = None) -> None:
        """Makes the coarse index anew from the stored rows, without the model, and calibrates it.

        Args:
            coarse: a `faiss.index_factory` string, or "auto".
            progress: as in `build`.

        Raises:
            QueryError: the index keeps the coarse code alone, or has no sketch. ConfigError: faiss is not installed, or
            refuses the string.
        """
        self._need_rows("rebuild_coarse")
        with self._changing(progress) as report:
            rebuild(self._reader, coarse, report)

    def calibrate(
        self,
        query: Any = None,
        *,
        measure: PerExample | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> dict[str, Any]:
        """Learns again how many candidates a recall takes, from training examples and from sample queries if given.

        Args:
            query, measure: as in `search`: queries like those that will be asked.
            progress: as in `build`.

        Returns:
            what was learnt, as it is kept in the manifest.

        Raises:
            QueryError: the index has no coarse stage or no rows to find exact answers in.
        """
        self._need_rows("calibrate")
        if self._reader.candidates is None:
            raise QueryError("the index has no coarse stage: make one with rebuild_coarse()")
        extra = None if query is None else self._query_gradients(query, measure, self.layers)
        with self._changing(progress) as report:
            recalibrate(self._reader, extra, report)
        return dict(self._manifest.calibration or {})

    # -- changing it ---------------------------------------------------------------------------------------------

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

        Projections, curvature and sketch stay as they were fitted: the scores are those of an index that was built of
        everything with this curvature (see `curvature_age`).

        Args:
            data: as in `build`; the index must have been opened with its model, and its loss.
            gradients: instead of data, as in `build`.
            payloads: as in `build`, of the new examples.
            tokenizer: for data of text, if the index was opened without; the one that it was built with.
            progress: as in `build`.

        Returns:
            (m,) int64: the ids of the new rows. They go on from the last that was ever given.

        Raises:
            DataError, NonFiniteError: as in `build`; the index is then as it was. FingerprintError: the model is no
            longer the one that the index was built from. LockedError: another writer is at work.
        """
        check_addition(data, gradients, self._model, self._manifest.fingerprint["model"] is not None)
        if data is not None and self._model is not None:
            # The digest, not whether weights were written to since: what is added stays.
            check_same(
                {"model": self._manifest.fingerprint["model"], "loss": self._manifest.fingerprint["loss"]},
                {"model": model_digest(self._model), "loss": loss_name(self._loss)},
                f"the model that is to give gradients for {self._path}",
                "open the index with the model and loss that it was built from",
            )
            check_tokenizer(self.metadata.get(TOKENIZER), tokenizer, str(self._path))
            data = prepared(data, self._model, self._tokenizer if tokenizer is None else tokenizer)
        with self._changing(progress) as report, ExitStack() as stack:
            first = self._manifest.next_id
            source: GradientSource
            if data is not None and self._model is not None:
                config = self._query_config()
                capture = ModelCapture(self._model, config, self._projections).capture(self._loss)
                examples = as_source(data, config.batch_size)
                source, digest, device = ModelGradients(capture, examples), data_digest(examples), capture.device
            else:
                if is_one_shot(gradients):
                    gradients = Rewound(gradients, self._path)  # type: ignore[arg-type]
                    stack.callback(gradients.close)
                given = GivenGradients(gradients, self._projections)  # type: ignore[arg-type]
                if not given.count:
                    raise DataError("gradients is empty: pass an iterable of {layer: (n, d_in, d_out)} blocks")
                source, digest, device = given, given.digest, torch.device("cpu")
            kept = None if payloads is None else Payloads(payloads, source.count)
            add_examples(self._reader, source, digest, kept, report, device)
        if data is not None and self._pieces:
            self._pieces.append((first, data))
        return self._store.ids[self._store.ids >= first]

    def remove(self, ids: Iterable[int] | np.ndarray) -> int:
        """Removes examples: no later answer has them. They leave the curvature at `refit`, and the disk at `compact`.

        Args:
            ids: row ids; one named twice is removed once.

        Returns:
            how many rows were removed.

        Raises:
            QueryError: an id that the index does not hold, or all of them. LockedError: another writer is at work.
        """
        with self._changing(False):
            return remove_examples(self._reader, ids)

    def compact(self, *, progress: bool | ProgressCallback | None = None) -> dict[str, Any]:
        """Takes removed examples off the disk, and joins small shards. Ids and scores stay as they are.

        What was fitted on them (curvature, projections, sketch: sums over the sample) stays until `refit` or a new
        build. Files that another reader still has open are removed by the next change after that one has closed.

        Returns:
            {"bytes": freed, "held": names of files that readers of older versions still hold}.

        Raises:
            LockedError: another writer is at work. ConfigError: rows are in the coarse index only, of a kind that
            cannot leave any out.
        """
        before = folder_bytes(self._path)
        with self._changing(progress) as report:
            compact_rows(self._reader, report)
        return {"bytes": before - folder_bytes(self._path), "held": self._held}

    def refit(self, *, progress: bool | ProgressCallback | None = None) -> dict[str, Any]:
        """Renews curvature, sketch and coarse index from the stored rows, without the model.

        Factors (`store="factors"`) give all of them; the curvature is the empirical one of the factors then, whatever
        it was. Other rows are written in the directions of their curvature, which they keep.

        Returns:
            {"renewed": names, "kept": {name: why}}.

        Raises:
            CurvatureError: the stored gradients have no curvature. LockedError: another writer is at work.
        """
        with self._changing(progress) as report:
            return refit_index(self._reader, report)[1]

    @classmethod
    def merge(
        cls,
        path: str | os.PathLike[str],
        indexes: Sequence[Index | str | os.PathLike[str]],
        *,
        progress: bool | ProgressCallback | None = None,
    ) -> Index:
        """Makes one index of several that share a fit (see `build(fit=)`), copying their rows, and opens it.

        Ids of the first index stay; to those of each further one is added what the ones before it ever gave out:
        `index.metadata` of none is lost but the later ones', and payloads come along.

        Args:
            path: a folder that does not exist or is empty.
            indexes: at least two, in the order in which their rows are to follow each other.
            progress: as in `build`.

        Raises:
            FingerprintError: they do not share a fit; the message names what differs. ConfigError: fewer than two, or
            ones that keep the coarse code alone. IndexExistsError: the folder is not free.
        """
        parts = [part.path if isinstance(part, Index) else Path(part) for part in indexes]
        with reporter(progress) as report:
            merge_indexes(Path(path), parts, report)
        return cls(Path(path), None, None)

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
            CorruptionError: damage that nothing stored can make good; the index is left as it is. LockedError: another
            writer is at work.
        """
        with reporter(progress) as report:
            return repair_index(Path(path), report)

    @contextmanager
    def _changing(self, progress: bool | ProgressCallback | None) -> Iterator[Reporter]:
        """The only writer, on the newest version; afterwards this index is of the version that was made.

        Raises:
            LockedError: another writer is at work. StoreError: damaged shards are being skipped.
        """
        if self._ranks.size > 1 or self._manifest.part is not None:
            what = "open on several ranks" if self._manifest.part is None else "a part of an index in several folders"
            raise StoreError(
                f"{self._path} is {what}, and is only changed by one process that has all of it: open it alone, or "
                "merge the parts first (Index.merge)"
            )
        with WriterLock(self._path):
            remove_leftovers(self._path)
            collect(self._path)
            self.refresh()
            if self._store.damaged:
                # A change must not take for removed what is only unreadable.
                raise StoreError(
                    f"{self._path} has damaged shards {sorted(self._store.damaged)}, which this index skips: restore "
                    "them from a copy, or Index.repair(path), before it is changed"
                )
            try:
                with reporter(progress) as report:
                    yield report
            finally:
                self.refresh()
                self._held = collect(self._path)

    def verify(self) -> None:
        """Compares every file with the digest under which it was sealed.

        Raises:
            CorruptionError: naming every file that differs, and the ids of the examples in it.
        """
        found = find_damage(self._path, self._manifest)
        if found:
            raise CorruptionError(damage_message(self._path, found))

    # -- looking at it -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """n, the number of rows, of all ranks; removed ones do not count."""
        return self._reader.live_count

    @property
    def path(self) -> Path:
        return self._path

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64: row ids, positions in the training data; they label the columns of `scores`. Of an index that
        several ranks have opened together all of them ask for it at the same time."""
        return self._in_order(self._store.live_ids)

    @property
    def held_ids(self) -> np.ndarray:
        """(m,) int64: ids of the rows that this rank holds; all, where it has opened the index alone."""
        return self._store.live_ids

    @property
    def curvature_age(self) -> dict[str, Any]:
        """What happened since the curvature was fitted.

        Returns:
            {"new_rows": rows that were added since, "rows": all, "new_trace": the share of all rows' squared gradient
            norm that is new ones' (None where an older version did not keep it), "removed": rows that were removed and
            are not yet compacted}.
        """
        ids, live = self._store.ids, self._store.live
        new = ids[live] >= self._manifest.fitted_ids
        energies, share = self._store.energies(), None
        if energies is not None:
            total = float(energies[live].sum(dtype=np.float64))
            share = float(energies[live][new].sum(dtype=np.float64)) / total if total else 0.0
        return {"new_rows": int(new.sum()), "rows": len(new), "new_trace": share, "removed": len(ids) - len(live)}

    @property
    def generation(self) -> int:
        """Rises with every change of the index."""
        return self._manifest.generation

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the tracked layers."""
        return tuple(self._specs)

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """Layer -> `LayerSpec`: widths, projected widths, rank, modules."""
        return dict(self._specs)

    @property
    def curvature(self) -> Mapping[str, LayerCurvature]:
        """Layer -> `LayerCurvature`: basis V, eigenvalues S, trace."""
        return self._curvature

    @property
    def config(self) -> BuildConfig:
        return self._config

    @property
    def metadata(self) -> dict[str, Any]:
        """What was passed to `build` as metadata."""
        return dict(self._manifest.metadata)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Ids left out for inf or NaN."""
        return tuple(self._manifest.skipped)

    @property
    def build_report(self) -> dict[str, Any]:
        """Seconds by stage, rows, bytes of a row, peak memory."""
        return dict(self._manifest.report)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over all that a score depends on, and over the digests of all files."""
        return self._manifest.digest()

    @property
    def nbytes(self) -> int:
        """Bytes on disk: rows, curvature, sketch and coarse index."""
        return sum(file.info.size for file in self._reader.files())

    @property
    def bytes_per_example(self) -> int:
        """Bytes of one example's row, without its id and checksum."""
        return self._layout.row_bytes

    @property
    def representation(self) -> str:
        """What rows hold: "eigen", "both", "factors", "coordinates" or "coarse" (see `BuildConfig.store`)."""
        return self._reader.representation

    @property
    def coarse(self) -> dict[str, Any] | None:
        """The coarse index: factory, bytes per example, dim, method and energy of the sketch; None without one."""
        entry, sketch = self._manifest.coarse, self._manifest.sketch
        if entry is None or sketch is None:
            return None
        try:
            facts = {key: sketch[key] for key in ("dim", "method", "energy")}
            return facts | {"factory": entry["factory"], "bytes_per_example": entry["file"]["size"] / len(self)}
        except KeyError as error:
            raise CorruptionError(f"the manifest's sketch or coarse index lacks {error}: restore it") from None

    def __repr__(self) -> str:
        tied = [spec for spec in self._specs.values() if len(spec.uses) > 1]
        lines = [
            f"Index({str(self._path)!r}): {len(self):,} examples, {len(self._specs)} layers, "
            f"{self.bytes_per_example:,} bytes per example, {self.nbytes / 1e6:,.1f} MB",
            f"  store={self._reader.representation} dtype={self._stored_dtype()} rank={self._config.rank} "
            f"curvature_rank={self._config.curvature_rank} damping={self._config.damping} {self._config.complement}",
        ]
        if self.coarse is not None:
            c = self.coarse
            lines.append(f"  coarse={c['factory']} on {c['dim']} coordinates, {c['bytes_per_example']:.0f} bytes each")
        lines += [f"  {spec.name}: one weight used by {', '.join(spec.uses)}, counted once" for spec in tied]
        if self._manifest.skipped:
            lines.append(f"  {len(self._manifest.skipped)} examples skipped for inf or NaN: index.skipped")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        coarse, config = self.coarse, self._config
        rows = [
            ("examples", f"{len(self):,}" + (f", {len(self.skipped)} skipped" if self.skipped else "")),
            ("size", f"{self.bytes_per_example:,} bytes an example, {self.nbytes / 1e6:,.1f} MB in all"),
            ("stored", f"{self.representation} ({self._stored_dtype()})"),
            ("coarse", "none" if coarse is None else f"{coarse['factory']} on {coarse['dim']} coordinates"),
            ("damping", f"{config.damping}, {config.complement}"),
            ("fingerprint", self.fingerprint),
        ]
        facts = table(("index", str(self._path)), rows)
        layers = [
            (spec.name, f"{spec.width_in} x {spec.width_out}", f"{spec.d_in} x {spec.d_out}", ", ".join(spec.uses))
            for spec in self._specs.values()
        ]
        return facts + table(("layer", "in x out", "projected", "modules"), layers)

    def close(self) -> None:
        """Gives the file handles back; a closed index opens them again when asked, if its version is still there."""
        self._reader.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- from question to scorer ---------------------------------------------------------------------------------

    def _prepare(
        self,
        query: Any,
        measure: PerExample | None,
        policy: Damping,
        chosen: tuple[str, ...],
        normalize: str | None = None,
        some: bool = True,
    ) -> _Prepared:
        """Gradients of the query, transformed once into a question to the rows; `some` as in `_query_gradients`."""
        began = mid = time.perf_counter()
        question: Question | None = None
        with self._ranks.jointly():
            # A pass of a model that is spread over ranks is one of all of them.
            if self._ranks.first or (self._model is not None and is_spread(self._model)):
                gradients = self._query_gradients(query, measure, chosen, some)
                mid = time.perf_counter()
                preconditioners = self._reader.preconditioners(chosen, policy)
                question = self._reader.ask(gradients, preconditioners)
                if question.x is not None and not bool(torch.isfinite(question.x).all()):
                    raise NonFiniteError(
                        "the query's coordinates are inf or NaN: its gradients are too large, or what the index was "
                        "fitted with is damaged (index.verify() tells)"
                    )
                share = torch.full((question.count,), 1.0 / self._members)
                if normalize == "cosine":
                    own = sum(preconditioners[n].quadratic(g.flatten(1)) for n, g in gradients.items())
                    share *= _inverse_roots(own / self._members)
                if normalize is not None or self._members > 1:
                    question = question.scaled(share, None)
        question = told(question, self._ranks)
        if normalize is not None:
            question = replace(question, scale=self._row_scale(policy, chosen))
        return _Prepared(question, {"gradients": mid - began, "transform": time.perf_counter() - mid})

    def _check_normalize(self, normalize: str | None) -> None:
        if normalize is None:
            return
        if normalize not in NORMALIZATIONS:
            raise QueryError(f"normalize must be one of {NORMALIZATIONS} or None, got {normalize!r}")
        self._need_rows(f"normalize={normalize!r}")

    def _check_groups(self, by: Any, k: Any) -> None:
        if not isinstance(by, str) and not callable(by):
            raise QueryError(f"groups are made by a field of the payloads or by function(payload), got {by!r}")
        if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
            raise QueryError(f"k must be an integer of at least 1, or None for all groups, got {k!r}")
        self._need_rows("groups")

    def _row_scale(self, policy: Damping, chosen: tuple[str, ...]) -> torch.Tensor:
        """(n,) float32: 1 / the root of each row's self-influence; the last is kept."""
        key = (json.dumps(policy.to_json(), sort_keys=True), chosen)
        if key not in self._scales:
            own = torch.from_numpy(self._self_influence(policy, chosen, False))
            self._scales.clear()
            self._scales[key] = _inverse_roots(own)
        return self._scales[key]

    def _need_rows(self, what: str) -> None:
        if not self._layout.row_bytes:
            raise QueryError(
                f"{what} needs stored rows, and this index keeps the coarse code alone (store='coarse'): build it with "
                "store='eigen', 'coordinates', 'factors' or 'both'"
            )

    def _positions(self, ids: Iterable[int] | np.ndarray | None) -> np.ndarray:
        if self._ranks.size > 1:
            raise QueryError(
                "this is asked of an index that one process has opened, and several ranks hold this one: "
                "Index.open(path), without distributed="
            )
        return self._store.live if ids is None else self._found(as_ids(ids))

    def _found(self, wanted: np.ndarray) -> np.ndarray:
        """Positions in the whole index of the rows with some ids; QueryError where there is none."""
        positions = self._reader.positions_of(wanted)
        if len(wanted) and positions.min() < 0:
            raise QueryError(f"the index has no row with id {int(wanted[positions < 0][0])}: ids are in index.ids")
        return positions

    def _payloads_of(self, positions: np.ndarray) -> list[list[Any]] | None:
        """Of hits (q, k); None where the index has none."""
        if not any(self._ranks.gather_values(self._reader.has_payloads)):
            return None
        found = iter(self._reader.payloads_at(positions.ravel()))
        return [[decode(next(found)) for _ in row] for row in positions]

    def _skipped_rows(self) -> int:
        """Rows of damaged shards, which no answer has."""
        names = self._store.damaged
        return sum(shard.count for shard in self._store.shards if shard.info.sealed.file in names)

    def _stored_dtype(self) -> str:
        parts = [self._config.dtype] if self._layout.groups else []
        parts += [self._layout.eigen.label] if self._layout.eigen is not None else []
        parts += [self._layout.codes.label] if self._layout.codes is not None else []
        return " + ".join(parts) or "coarse code"

    def _chosen(self, layers: str | Iterable[str] | None) -> tuple[str, ...]:
        if layers is None:
            return self.layers
        patterns = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise QueryError(f"layers takes a layer's name, a glob pattern or a list of them, got {layers!r}")
        if not patterns:
            raise QueryError("layers is empty: name at least one layer, or leave it out for all")
        for pattern in patterns:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in self._specs):
                raise QueryError(f"layers={pattern!r} matches none of the index's layers {list(self._specs)}")
        return tuple(n for n in self._specs if any(n == p or fnmatchcase(n, p) for p in patterns))

    def _policy(self, damping: Damping | float | None) -> Damping:
        return as_damping(self._config.damping if damping is None else damping)

    def _query_gradients(
        self, query: Any, measure: PerExample | None, chosen: tuple[str, ...], some: bool = True
    ) -> dict[str, torch.Tensor]:
        """(q, d_in, d_out) float32 per chosen layer, of the quantity to lower.

        Raises:
            QueryError: there are no examples; none has a gradient; or, unless `some` are enough, one has none.
        """
        parts = list(self._asked(query, measure, chosen, False))
        if not parts:
            raise QueryError("the query holds no examples")
        found = {name: torch.cat([part.gradients[name] for part in parts]) for name in chosen}
        there = torch.stack([g.flatten(1).ne(0).any(dim=1) for g in found.values()]).any(dim=0)
        if not bool(there.any() if some else there.all()):
            raise QueryError(
                f"example {int((~there).nonzero()[0])} of the query has no gradient in any layer asked, so that no row "
                "has a score for it: a loss on no token or label, or a measure that was computed without gradients or "
                "of another model? Leave it out, or mend the measure"
            )
        return found

    def _asked(
        self,
        query: Any,
        measure: PerExample | None,
        chosen: tuple[str, ...],
        positions: bool,
        taken: ModelCapture | None = None,
    ) -> Iterator[Asked]:
        """The query's gradients, batch by batch, with what is at its positions where that is wanted.

        `taken` is what `_model_capture` has found already.
        """
        if isinstance(query, Mapping) and query and set(query) <= set(self._specs):
            if measure is not None:
                raise QueryError(
                    "measure= needs a batch for the model, but the query is gradients: negate them instead"
                )
            block = parse_block(query, 0)
            specs = {name: self._specs[name] for name in (block.layers if set(chosen) <= set(block.layers) else chosen)}
            check_block(block, specs, "the query")
            found: Iterator[tuple[GradientBlock, Asked]] = iter([(self._projections.project(block), Asked({}))])
        else:
            found = self._captured(query, measure, positions, taken or self._model_capture(measure))
        for block, asked in found:
            block = keep_finite(block, "error", [], "the query's example")
            if block.count:
                yield replace(asked, gradients={n: block.layers[n].dense().float().cpu() for n in chosen})

    def _captured(
        self, query: Any, measure: PerExample | None, positions: bool, taken: ModelCapture
    ) -> Iterator[tuple[GradientBlock, Asked]]:
        query = prepared_query(query, self._model, self._tokenizer, strict=measure is None)
        capture = taken.capture(self._loss if measure is None else measure)
        for ids, batch in _query_batches(query, taken.config.batch_size):
            kept = Positions() if positions else None
            block = capture.gradients(ids, batch, watch=kept)
            if measure is not None:
                # A measure is to be raised, a loss to be lowered.
                block = GradientBlock(block.ids, {name: g.negated() for name, g in block.layers.items()})
            sign = 1.0 if measure is None else -1.0
            yield block, Asked({}, kept, shown_positions(batch), sign / capture.scale, capture)

    def _model_capture(self, measure: PerExample | None) -> ModelCapture:
        """Takes gradients of the model that the index was opened with.

        Raises:
            QueryError: there is none, or, without a measure, it was opened with another loss. FingerprintError: its
                weights are no longer those that the index was built from.
        """
        if self._manifest.fingerprint["model"] is None:
            raise QueryError("the index was built from gradients: pass the query as {layer: (q, d_in, d_out)}")
        if self._model is None:
            raise QueryError("the index was opened without its model: Index.open(path, model=..., loss=...)")
        built_with = self._manifest.fingerprint["loss"]
        if measure is None and loss_name(self._loss) != built_with:
            raise QueryError(
                f"the index was built with loss {built_with!r}: Index.open(path, model=..., loss={built_with})"
            )
        if measure is not None and not callable(measure):
            raise QueryError(f"measure must be callable, measure(model, batch) -> (q,), got {measure!r}")
        self._check_weights(self._model)
        return ModelCapture(self._model, self._query_config(), self._projections)

    def _check_weights(self, model: nn.Module) -> None:
        """Weights that were written to since they were compared are compared again."""
        state = weights_state(model)
        if state != self._weights:
            check_same(
                {"model": self._manifest.fingerprint["model"]},
                {"model": model_digest(model)},
                f"the model that is to ask {self._path}, whose weights have changed since,",
                "ask with the weights that it was built from, or build an index of the new ones",
            )
            self._weights = state


@dataclass(frozen=True)
class _Prepared:
    """A question made ready, and how long that took."""

    question: Question
    seconds: dict[str, float]


def _inverse_roots(own: Any) -> torch.Tensor:
    """1 / sqrt of self-influences, float32; 0 where there is none: what has no gradient influences nothing."""
    return torch.where(own > 0, torch.where(own > 0, own, 1.0).rsqrt(), 0.0)


def _query_batches(query: Any, batch_size: int) -> Iterator[tuple[np.ndarray, Any]]:
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

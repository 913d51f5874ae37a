"""Index: the user's handle. It wires the stages together, and does no mathematics itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from .build import build_index, loss_name
from .capture import keep_finite
from .config import BuildConfig
from .curvature import LayerCurvature
from .damping import Damping, as_damping
from .data import as_source, batch_count
from .errors import ConfigError, CorruptionError, FingerprintError, NonFiniteError, QueryError
from .fitted import FittedCurvature
from .gradients import GradientBlock, LayerSpec, parse_block
from .losses import PerExample
from .manifest import Manifest, check_same, read_manifest, spec_to_json
from .progress import ProgressCallback, reporter
from .projection import Projections
from .query import Preconditioner, transform
from .results import Hits, SearchStats
from .rows import RowLayout
from .scoring import Scorer, TopK, self_scores, stream_scores
from .sources import ModelCapture, check_block, model_digest
from .store import Store


class Index:
    """A training set's gradients, ready to be asked. Made by `Index.build` or `Index.open`, not by calling it."""

    def __init__(self, path: Path, manifest: Manifest, model: nn.Module | None, loss: PerExample | None) -> None:
        self._path = path
        self._manifest = manifest
        self._config = BuildConfig.from_json(manifest.config)
        self._specs = {spec.name: spec for spec in manifest.layers}
        self._layout = RowLayout(self._specs, self._config.dtype)
        self._store = Store(path, self._layout, manifest.shards)
        if manifest.curvature is None:
            raise CorruptionError(f"{path} has no curvature in its manifest: restore it from a copy")
        self._curvature = FittedCurvature(path, manifest.curvature, self._specs, manifest.curvature_layers)
        self._projections = Projections(self._specs, self._config.seed)
        self._model = model
        self._loss = loss

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        data: Any = None,
        gradients: Iterable[Any] | None = None,
        loss: PerExample | None = None,
        curvature: Any = None,
        config: BuildConfig | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> Index:
        """Builds an index in a folder, and opens it. The same call on an interrupted build goes on with it.

        Args:
            path: a folder that does not exist, is empty, or holds an interrupted build.
            model: the trained model. It is left exactly as it was found.
            data: a torch Dataset, a DataLoader that does not shuffle, a Hugging Face Dataset, or a tuple or dict of
                tensors. Batches are tensors, tuples or dicts; dict items of different lengths are padded.
            gradients: instead of model and data: an iterable of blocks {layer: (n, d_in, d_out) array}, or of factor
                pairs {layer: ((n, d_in, m), (n, d_out, m))}. An iterator that is used up by one walk is kept on disk
                meanwhile.
            loss: loss(model, batch) -> (n,) per-example losses; default `default_loss`.
            curvature: rows to fit the curvature from, of the same forms as data or gradients, or a `CurvatureRows`;
                default: gradients of a random sample of the data.
            config: the choices; `BuildConfig()` by default.
            metadata: a dict of plain JSON values, kept in the manifest.
            progress: True or False for bars on stderr, None for bars on a terminal, or a callable that gets every
                `ProgressEvent`.

        Raises:
            IndexExistsError: the folder is not free. ConfigError, DataError, CaptureError: what was given cannot be
            honoured; nothing is written then. NonFiniteError: inf or NaN in an example's gradient.
            FingerprintError: the folder holds an interrupted build of something else. OSError: disk or permissions.
        """
        config = BuildConfig() if config is None else config
        if not isinstance(config, BuildConfig):
            raise ConfigError(f"config must be a BuildConfig, got {type(config).__name__}")
        folder = Path(path)
        with reporter(progress) as report:
            build_index(
                folder,
                model=model,
                data=data,
                gradients=gradients,
                loss=loss,
                curvature=curvature,
                config=config,
                metadata={} if metadata is None else metadata,
                reporter=report,
            )
        return cls(folder, read_manifest(folder), model, loss)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, model: nn.Module | None = None, loss: PerExample | None = None
    ) -> Index:
        """Opens a finished index.

        Args:
            path: its folder.
            model: the model it was built from; needed for raw queries only.
            loss: the loss it was built with, if that was not the default.

        Raises:
            NotAnIndexError, FormatVersionError, CorruptionError: the folder. FingerprintError: another model or loss
            than it was built from; the message names what differs.
        """
        folder = Path(path)
        index = cls(folder, read_manifest(folder), None, None)
        if model is not None:
            index._attach(model, loss)
        return index

    def _attach(self, model: nn.Module, loss: PerExample | None) -> None:
        built = self._manifest.fingerprint
        if built["model"] is None:
            raise FingerprintError(f"{self._path} was built from gradients, not from a model: open it without model=")
        capture = ModelCapture(model, self._query_config())
        given = {
            "layers": [spec_to_json(spec) for spec in capture.specs.values()],
            "model": model_digest(model),
        }
        if loss is not None:
            given["loss"] = loss_name(loss)
        remedy = "open it with the model and loss that it was built from (another question is put by measure=)"
        check_same({k: built[k] for k in given}, given, f"what was given for {self._path}", remedy)
        self._model, self._loss = model, loss

    def _query_config(self) -> BuildConfig:
        """The build's config for capturing queries, wherever the model is now."""
        stored = self._config.to_json() | {"device": None}
        return BuildConfig.from_json(stored)

    # -- asking --------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Any,
        k: int = 20,
        *,
        measure: PerExample | None = None,
        opponents: bool = False,
        exact: bool | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> Hits:
        """The k training examples that lowered (or, with opponents, raised) the query's loss most.

        Args:
            query: one batch of the kind the index was built from, or gradients {layer: (q, d_in, d_out)} or factor
                pairs, of a quantity to lower.
            k: how many; above n it gives n.
            measure: measure(model, batch) -> (q,): explain this instead of the loss; positive scores raise it.
            opponents: the most negative scores first instead.
            exact: True or None scans every row; False is refused while the index has no coarse stage.
            damping: another policy than the build's, or a multiple of trace / D.
            layers: names or glob patterns of the layers whose scores are summed; all by default.
            progress: as in `build`.

        Returns:
            `Hits`: ids (q, k) int64, scores (q, k) float32, stats. Memory does not grow with n.

        Raises:
            QueryError: a query, k or layers that do not fit. NonFiniteError: inf or NaN in the query's gradient.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise QueryError(f"k must be an integer of at least 1, got {k!r}")
        if exact is False:
            raise QueryError("exact=False, but this index has no coarse stage yet: leave exact out, or pass True")
        prepared = self._prepare(query, measure, damping, layers)
        top = TopK(prepared.count, min(int(k), len(self)), largest=not opponents)
        read = 0
        began = time.perf_counter()
        for start, scores, size in self._scan(prepared.scorer, progress):
            top.update(start, scores)
            read += size
        positions, best = top.result()
        prepared.seconds["scan"] = time.perf_counter() - began
        stats = SearchStats(
            exact=True,
            store=self._config.store,
            dtype=self._config.dtype,
            examined=len(self),
            total=len(self),
            bytes_read=read,
            seconds=prepared.seconds,
            damping=prepared.damping.to_json(),
            layers=len(prepared.layers),
        )
        return Hits(self._store.ids[positions.numpy()], best.numpy(), stats)

    def scores(
        self,
        query: Any,
        *,
        measure: PerExample | None = None,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        out: np.ndarray | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Exact scores of every training example, (q, n) float32; column j is row id `index.ids[j]`.

        Args:
            query, measure, damping, layers, progress: as in `search`.
            out: a (q, n) float32 array to write to, for instance a memory map.

        Raises:
            QueryError: as in `search`, or an `out` of another shape or dtype.
        """
        prepared = self._prepare(query, measure, damping, layers)
        shape = (prepared.count, len(self))
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise QueryError(f"out must be {shape} float32, got {out.shape} {out.dtype}")
        for start, scores, _ in self._scan(prepared.scorer, progress):
            out[:, start : start + scores.shape[1]] = scores.numpy()
        return out

    def self_influence(
        self,
        *,
        damping: Damping | float | None = None,
        layers: str | Iterable[str] | None = None,
        progress: bool | ProgressCallback | None = False,
    ) -> np.ndarray:
        """Each stored example's score with itself, g_i^T H^-1 g_i, (n,) float32, in the order of `index.ids`."""
        chosen = self._chosen(layers)
        preconditioners = self._preconditioners(chosen, self._policy(damping))
        out = np.empty(len(self), dtype=np.float32)
        with reporter(progress) as report, report.stage("scan", len(self)) as stage:
            for start, rows in self._store.stream():
                out[start : start + len(rows)] = self_scores(self._layout, rows, preconditioners).numpy()
                stage.advance(len(rows), len(rows) * self._layout.row_bytes)
        return out

    def factors(self, ids: Iterable[int] | np.ndarray | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Stored factors, as float32: layer -> (U (n, d_in, c), V (n, d_out, c)), the stored gradient being U V^T.

        Args:
            ids: row ids, in the order wanted; all by default (mind the memory). Rows are checked against their
                checksums.

        Raises:
            QueryError: an id that the index does not hold. CorruptionError: a row that is damaged.
        """
        own = self._store.ids
        if ids is None:
            positions = np.arange(len(own), dtype=np.int64)
        else:
            wanted = np.asarray(list(ids), dtype=np.int64)
            positions = np.searchsorted(own, wanted)
            found = positions < len(own)
            found[found] = own[positions[found]] == wanted[found]
            if not found.all():
                raise QueryError(f"the index has no row with id {int(wanted[~found][0])}: ids are in index.ids")
        out = {}
        for name, part in self._layout.unpack(self._store.gather(positions)).items():
            if part.right is None:
                eye = torch.eye(part.left.shape[2]).expand(len(part.left), -1, -1)
                out[name] = (part.left, eye)
            else:
                out[name] = (part.left.transpose(1, 2), part.right.transpose(1, 2))
        return {name: out[name] for name in self._specs}

    def verify(self) -> None:
        """Compares every file with the digest under which it was sealed.

        Raises:
            CorruptionError: naming the first file that differs.
        """
        self._store.verify()
        self._curvature.file.verify()

    # -- looking at it -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """n, the number of rows."""
        return len(self._store)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def ids(self) -> np.ndarray:
        """(n,) int64: row ids, positions in the training data; they label the columns of `scores`."""
        return self._store.ids

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
        """Bytes on disk: shards and curvature."""
        return self._store.nbytes + self._curvature.file.info.size

    @property
    def bytes_per_example(self) -> int:
        """Bytes of one example's row, without its id and checksum."""
        return self._layout.row_bytes

    def __repr__(self) -> str:
        tied = [spec for spec in self._specs.values() if len(spec.uses) > 1]
        lines = [
            f"Index({str(self._path)!r}): {len(self):,} examples, {len(self._specs)} layers, "
            f"{self.bytes_per_example:,} bytes per example, {self.nbytes / 1e6:,.1f} MB",
            f"  store={self._config.store} dtype={self._config.dtype} rank={self._config.rank} "
            f"curvature_rank={self._config.curvature_rank} damping={self._config.damping} {self._config.complement}",
        ]
        lines += [f"  {spec.name}: one weight used by {', '.join(spec.uses)}, counted once" for spec in tied]
        if self._manifest.skipped:
            lines.append(f"  {len(self._manifest.skipped)} examples skipped for inf or NaN: index.skipped")
        return "\n".join(lines)

    def close(self) -> None:
        """Gives the file handles back; a closed index opens them again when asked."""
        self._store.close()
        self._curvature.file.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- from question to scorer ---------------------------------------------------------------------------------

    def _prepare(self, query: Any, measure: PerExample | None, damping: Any, layers: Any) -> _Prepared:
        """Gradients of the query, transformed once, and the scorer made of them."""
        chosen = self._chosen(layers)
        policy = self._policy(damping)
        began = time.perf_counter()
        gradients = self._query_gradients(query, measure, chosen)
        mid = time.perf_counter()
        scorer = Scorer(self._layout, transform(gradients, self._preconditioners(chosen, policy)))
        seconds = {"gradients": mid - began, "transform": time.perf_counter() - mid}
        return _Prepared(scorer, policy, chosen, seconds)

    def _scan(
        self, scorer: Scorer, progress: bool | ProgressCallback | None
    ) -> Iterator[tuple[int, torch.Tensor, int]]:
        with reporter(progress) as report, report.stage("scan", len(self)) as stage:
            for start, scores, size in stream_scores(self._store, scorer):
                yield start, scores, size
                stage.advance(scores.shape[1], size)

    def _chosen(self, layers: str | Iterable[str] | None) -> tuple[str, ...]:
        if layers is None:
            return self.layers
        patterns = [layers] if isinstance(layers, str) else list(layers)
        if not patterns:
            raise QueryError("layers is empty: name at least one layer, or leave it out for all")
        for pattern in patterns:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in self._specs):
                raise QueryError(f"layers={pattern!r} matches none of the index's layers {list(self._specs)}")
        return tuple(n for n in self._specs if any(n == p or fnmatchcase(n, p) for p in patterns))

    def _policy(self, damping: Damping | float | None) -> Damping:
        return as_damping(self._config.damping if damping is None else damping)

    def _preconditioners(self, chosen: tuple[str, ...], policy: Damping) -> dict[str, Preconditioner]:
        complement = self._config.complement
        return {name: Preconditioner.of(name, self._curvature[name], policy, complement) for name in chosen}

    def _query_gradients(
        self, query: Any, measure: PerExample | None, chosen: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """(q, d_in, d_out) float32 per chosen layer, of the quantity to lower."""
        if isinstance(query, Mapping) and query and set(query) <= set(self._specs):
            if measure is not None:
                raise QueryError(
                    "measure= needs a batch for the model, but the query is gradients: negate them instead"
                )
            block = parse_block(query, 0)
            specs = {name: self._specs[name] for name in (block.layers if set(chosen) <= set(block.layers) else chosen)}
            check_block(block, specs, "the query")
            blocks = [self._projections.project(block)]
        else:
            blocks = list(self._captured(query, measure))
        skipped: list[int] = []
        try:
            blocks = [keep_finite(block, "error", skipped) for block in blocks]
        except NonFiniteError as error:
            raise NonFiniteError(f"query: {error}") from None
        if not sum(block.count for block in blocks):
            raise QueryError("the query holds no examples")
        return {name: torch.cat([b.layers[name].dense().float().cpu() for b in blocks]) for name in chosen}

    def _captured(self, query: Any, measure: PerExample | None) -> Iterator[GradientBlock]:
        if self._manifest.fingerprint["model"] is None:
            raise QueryError("the index was built from gradients: pass the query as {layer: (q, d_in, d_out)}")
        if self._model is None:
            raise QueryError("the index was opened without its model: Index.open(path, model=..., loss=...)")
        built_with = self._manifest.fingerprint["loss"]
        if measure is None and loss_name(self._loss) != built_with:
            raise QueryError(
                f"the index was built with loss {built_with!r}: Index.open(path, model=..., loss={built_with})"
            )
        config = self._query_config()
        capture = ModelCapture(self._model, config).capture(self._loss if measure is None else measure)
        for ids, batch in _query_batches(query, config.batch_size):
            block = capture.gradients(ids, batch)
            if measure is not None:
                # A measure is to be raised, a loss to be lowered.
                block = GradientBlock(block.ids, {name: g.negated() for name, g in block.layers.items()})
            yield block


class _Prepared:
    """A question made ready: its scorer, and what the stats say of it."""

    def __init__(self, scorer: Scorer, damping: Damping, layers: tuple[str, ...], seconds: dict[str, float]) -> None:
        self.scorer = scorer
        self.count = scorer.count
        self.damping = damping
        self.layers = layers
        self.seconds = seconds


def _query_batches(query: Any, batch_size: int) -> Iterator[tuple[np.ndarray, Any]]:
    """A query as batches: it may be anything that `data` may be, or one batch with more in it than tensors."""
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

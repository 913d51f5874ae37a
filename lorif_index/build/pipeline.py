"""Build: fit what is shared on a sample, then one pass over the data encodes each example once.

The stages, each of which leaves its result sealed, so that the same call goes on after an interruption: projections ->
sample -> curvature -> eigencodes or sketch -> encode -> coarse -> calibrate -> manifest. The published recipe fits the
curvature last, from all stored factors; where rows hold factors or eigencodes alone, the sketch is of them, and is
fitted after them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture import eigenbases
from ..capture.data import ExampleSource, as_source
from ..capture.ensemble import count_of, probes_of
from ..capture.gradients import GradientBlock, GradientSource, LayerGradient, LayerSpec
from ..capture.layers import layer_specs
from ..capture.losses import LogitsOf, PerExample, default_loss, logits_of
from ..capture.projection import ALGORITHM, Projections, keyed_generator
from ..capture.sources import (
    GivenGradients,
    ModelCapture,
    ModelGradients,
    ProbedGradients,
    Rewound,
    curvature_source,
    data_digest,
    finite_blocks,
    given_specs,
    is_one_shot,
    model_digest,
)
from ..capture.spool import Spool, remove_leftovers
from ..config import LEAST_FLOOR, BuildConfig, CurvatureRows
from ..errors import ConfigError, CorruptionError, DataError, IndexExistsError, StoreError
from ..fit.curvature import LayerCurvature, Part, RowPass, fit_curvature, mix
from ..fit.eigencodes import EigenEncoder, fit_eigencode
from ..fit.query import Preconditioner
from ..fit.sketch import SketchEncoder, half_whitened
from ..progress import Reporter
from ..rows.factors import factorise
from ..rows.layout import RowLayout
from ..search.coarse import default_factory, faiss_is_installed, load_faiss
from ..search.reader import Reader, row_layout, shard_writer
from ..storage.damage import folder_bytes
from ..storage.fitted import (
    FittedCurvature,
    FittedProjections,
    load_eigencode,
    load_sketch,
    save_curvature,
    save_eigencode,
    save_projections,
    save_queries,
    save_sketch,
)
from ..storage.locks import WRITER, WriterLock
from ..storage.manifest import (
    BUILDING,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    check_same,
    collect,
    read_manifest,
    spec_to_json,
)
from ..storage.payloads import Payloads, Values
from ..storage.sealed import SealedInfo, copy_sealed, part_name
from ..storage.shards import Shard, ShardInfo, write_shard
from ..storage.store import Store
from .coarse_build import calibrate, lambdas, make_coarse, new_sketch, sketch_of_rows
from .coverage import measure_coverage
from .encode import RowEncoder, encode_blocks
from .sizes import QUERY_BYTES, curvature_products, curvature_ranks, disk_sizes

# Settings that leave every stored number as it is; all others must agree when an interrupted build goes on.
_FREE_SETTINGS = ("complement", "shard_bytes", "spool_bytes", "device", "coarse", "calibration_queries")

# Below so many rows a scan is as quick, and "auto" makes no coarse index.
COARSE_FROM = 1024
# Of the mixed curvature's trace (of 1/4, 1/2 and 3/4; chosen on digits and Fashion-MNIST, held on sequences:
# `docs/quality.md`).
_EMPIRICAL_SHARE = 0.25
# Widths of eigencodes' projections in small models, the widest first, and what the sample's gradients may take on disk
# meanwhile, once more for probes (`bench.lds`: on the fine-tuned GPT 32, 64 and 128 have .405, .431 and .435).
_FLOORS = (128, 96, 64, 48)
_FLOOR_BYTES = 4 << 30
# Examples of the sample that tell what factors lose.
_MEASURED = 256
# Share of squared norm below which factors are as good as whole: what rounding to 4 bits costs coordinates.
_LOSSLESS = 0.01


def loss_name(loss: PerExample | None) -> str:
    """How a loss is remembered: "default", or its own name (not the module's or function's that it stands in)."""
    if loss is None:
        return "default"
    return getattr(loss, "__name__", type(loss).__name__)


def build_index(
    path: Path,
    *,
    model: nn.Module | None,
    data: Any,
    gradients: Any,
    loss: PerExample | None,
    curvature: Any,
    config: BuildConfig,
    metadata: dict[str, Any],
    payloads: Values | None,
    fit: Path | None,
    reporter: Reporter,
) -> None:
    """Builds, or goes on building, the index at `path`. See `Index.build`."""
    check_arguments(model, data, gradients, loss)
    _check_json(metadata)
    check_free(path)
    with ExitStack() as stack:
        work = _Build(path, model, data, gradients, loss, curvature, config, metadata, payloads, fit, reporter, stack)
        work.run()


def check_arguments(model: Any, data: Any, gradients: Any, loss: Any) -> None:
    """Either data with its model, or gradients.

    Raises:
        DataError, ConfigError: anything else.
    """
    if (data is None) == (gradients is None):
        given = "both" if data is not None else "neither"
        raise DataError(f"pass either model= and data=, or gradients=; {given} of data and gradients was given")
    if data is not None and model is None:
        raise DataError("data= needs a model= to take gradients of")
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss must be callable, loss(model, batch) -> (n,), got {type(loss).__name__}")


def _check_json(metadata: Any) -> None:
    try:
        if not isinstance(metadata, dict) or json.loads(json.dumps(metadata, allow_nan=False)) != metadata:
            raise TypeError("it does not come back from JSON as it was")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be a dict of plain JSON values: {error}") from None


def check_free(path: Path) -> None:
    """The folder may hold an index that is being built, and nothing else.

    Raises:
        IndexExistsError: it does.
    """
    if (path / MANIFEST).exists():
        raise IndexExistsError(f"{path} already holds an index: open it with Index.open, or choose another folder")
    if path.exists() and not path.is_dir():
        raise IndexExistsError(f"{path} exists and is not a folder: choose another path")
    # A build that ended before its first file had its name leaves these.
    begun = {WRITER, part_name(BUILDING)}
    if path.is_dir() and not (path / BUILDING).is_file() and any(item.name not in begun for item in path.iterdir()):
        raise IndexExistsError(f"{path} is not empty and is no unfinished index: choose a new or empty folder")


class _Build:
    """One run of a build: what it was given, and the manifest it is working on."""

    def __init__(
        self,
        path: Path,
        model: nn.Module | None,
        data: Any,
        gradients: Any,
        loss: PerExample | None,
        curvature: Any,
        config: BuildConfig,
        metadata: dict[str, Any],
        payloads: Values | None,
        fit: Path | None,
        reporter: Reporter,
        stack: ExitStack,
    ) -> None:
        self.path, self.config, self.loss, self.reporter, self.stack = path, config, loss, reporter, stack
        self.lock = WriterLock(path)
        stack.callback(self.lock.release)
        if (path / BUILDING).is_file():
            # Another process may be at work in it.
            self.lock.acquire()
            remove_leftovers(path)
        self.capture: ModelCapture | None = None
        self.examples: ExampleSource | None = None
        if isinstance(curvature, str):
            config = self.config = dataclasses.replace(config, curvature=curvature)
            curvature = None
        self.curvature = (
            curvature if isinstance(curvature, CurvatureRows) or curvature is None else CurvatureRows(curvature)
        )
        # What the index remembers as its config; the fingerprint has what became of it.
        asked = config
        fitted = None if fit is None else read_manifest(fit)
        self.logits = self._logits_for_ggn(gradients is None)
        fingerprint: dict[str, Any]
        self.source: GradientSource
        self._walk_sides: Callable[[np.ndarray, list[eigenbases.Side]], eigenbases.Walk]
        if gradients is None:
            if model is None:
                raise DataError("data= needs a model= to take gradients of")
            # Everything is checked, and the first batch taken, before a folder is made.
            examples = self.examples = as_source(data, config.batch_size)
            if fitted is not None and config.projection_floor == "auto":
                config = dataclasses.replace(config, projection_floor=fitted.floor())
            config = self.config = with_floor(config, model, loss, examples)
            self.capture = ModelCapture(model, config)
            self.specs, self.projections = self.capture.specs, self.capture.projections
            self.source = ModelGradients(self.capture.capture(loss), examples)
            taken = self.capture
            self._walk_sides = lambda ids, sides: taken.sides(loss, examples, ids)
            next(iter(self.source.blocks()))
            fingerprint = {
                "model": model_digest(model),
                "loss": loss_name(loss),
                "autocast": config.autocast,
                "data": data_digest(examples),
            }
            if count_of(model) is not None:
                fingerprint["members"] = count_of(model)
        else:
            if is_one_shot(gradients):
                self._claim()
                gradients = Rewound(gradients, path)
                stack.callback(gradients.close)
            self.specs = given_specs(gradients, config)
            self.projections = Projections(self.specs, config.seed)
            given = self.source = GivenGradients(gradients, self.projections)
            self._walk_sides = lambda ids, sides: eigenbases.walk_gradients(lambda: given.given(ids), sides)
            fingerprint = {"model": None, "loss": None, "data": given.digest}
        self.payloads = None if payloads is None else Payloads(payloads, self.source.count)
        fingerprint |= {
            "format_version": FORMAT_VERSION,
            "examples": self.source.count,
            "projection": ALGORITHM,
            "layers": [spec_to_json(spec) for spec in self.specs.values()],
            "config": {k: v for k, v in config.to_json().items() if k not in _FREE_SETTINGS},
            "curvature": self.curvature_kind if fitted is None else fitted.fingerprint.get("curvature"),
            "payloads": None if self.payloads is None else self.payloads.digest,
            "fit": None if fitted is None or fitted.curvature is None else fitted.curvature.digest,
        }
        self.manifest = self._begin(
            Manifest(fingerprint, asked.to_json(), list(self.specs.values()), metadata=metadata), fit
        )
        self._load_projections()
        self._sampled: tuple[RowPass, int] | None = None
        self._spool: Spool | None = None
        self._vanished = 0

    def _logits_for_ggn(self, from_model: bool) -> LogitsOf | None:
        """How probes find the logits; None where the curvature is something else.

        Raises:
            ConfigError: the GGN was asked for by name, and cannot be had.
        """
        wanted = self.config.curvature
        if self.curvature is not None or self.config.curvature_rows == "factors" or wanted == "empirical":
            return None
        if not from_model:
            if wanted != "auto":
                raise ConfigError(
                    f"curvature={wanted!r} needs the model's logits, and the index is built from gradients: pass the "
                    "curvature's rows as curvature=CurvatureRows(...)"
                )
            return None
        logits = logits_of(default_loss if self.loss is None else self.loss)
        if logits is None:
            trouble = (
                f"the loss {loss_name(self.loss)!r} does not say which logits it is the cross-entropy of (give it an "
                "attribute `logits`, or use CrossEntropy)"
            )
            if wanted != "auto":
                raise ConfigError(f"curvature={wanted!r}: {trouble}, or pass curvature='empirical'")
            warnings.warn(
                f"{trouble}, so the curvature is the empirical one; curvature='empirical' says that this is meant",
                stacklevel=5,
            )
        return logits

    @property
    def curvature_kind(self) -> str:
        """What the curvature's rows are: "given", "mixed", "ggn", "factors" (of everything stored) or "sample" (of
        gradients)."""
        if self.curvature is not None:
            return "given"
        if self.logits is None:
            return self.config.curvature_rows
        return "mixed" if self.config.curvature == "auto" else self.config.curvature

    def _begin(self, fresh: Manifest, fit: Path | None) -> Manifest:
        """The unfinished manifest in the folder if it is of this very build, else a new one."""
        self.lock.acquire()
        fresh.next_id = fresh.fitted_ids = self.source.count
        if (self.path / BUILDING).is_file():
            found = read_manifest(self.path, BUILDING)
            if found.fingerprint:
                check_same(
                    found.fingerprint,
                    fresh.fingerprint,
                    f"the interrupted build in {self.path}",
                    "finish it with what it was begun with, or delete the folder to begin anew",
                )
                fresh.shards, fresh.skipped, fresh.next_file = found.shards, found.skipped, found.next_file
                fresh.projections = found.projections
                fresh.curvature, fresh.curvature_layers = found.curvature, found.curvature_layers
                fresh.stored, fresh.eigen, fresh.sketch = found.stored, found.eigen, found.sketch
                if found.config.get("calibration_queries") == fresh.config["calibration_queries"]:
                    fresh.queries = found.queries
                if found.config.get("coarse") == fresh.config["coarse"] or self.config.store == "coarse":
                    fresh.coarse = found.coarse
                    fresh.calibration = found.calibration if fresh.queries is not None else None
                fresh.report = found.report
        if fit is not None and fresh.curvature is None:
            take_fit(fit, fresh, self.path)
            # None of these examples was there when it was fitted.
            fresh.fitted_ids = 0
        fresh.write(self.path, BUILDING)
        # What an interrupted run left unsealed.
        collect(self.path)
        return fresh

    def _claim(self) -> None:
        """Makes the folder an unfinished build's, for a stream that must be kept there before anything is known."""
        self.lock.acquire()
        if not (self.path / BUILDING).exists():
            Manifest({}, {}, []).write(self.path, BUILDING)

    # -- stages --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        late = self.config.curvature_rows == "factors" and self.curvature is None
        if self.config.projection == "eigen" and self.manifest.projections is None:
            self._fit_projections()
        if self.manifest.stored is None:
            self.manifest.stored = self._decide_representation()
            self.manifest.write(self.path, BUILDING)
        self._check_disk()
        if self.manifest.curvature is None and not late:
            self._fit_from_rows()
        if self.manifest.eigen is None and self.manifest.stored == "eigen":
            self._fit_eigencode()
        if self.manifest.sketch is None and self.manifest.stored not in ("factors", "eigen"):
            self._fit_sketch()
        self._encode()
        if self.manifest.curvature is None:
            self._fit_from_factors()
        self._add_coarse()
        self._finish()

    def _fit_projections(self) -> None:
        """Learns the projections that the first pass of the sample tells."""
        ids = np.sort(self._shuffled()[: min(self.config.curvature_sample, eigenbases.SAMPLE)])
        layers = self.capture.layers if self.capture is not None else []
        sides = eigenbases.fitted_sides(self.specs, layers)
        if not sides:
            return
        walk = self._walk_sides(ids, sides)
        with self.reporter.stage("projections") as stage:
            found = eigenbases.fit_eigenbases(walk, self.specs, sides, self.config.seed, self._device(), stage)
        self.manifest.projections = save_projections(self.path, found, self.specs)
        self.manifest.write(self.path, BUILDING)
        self._load_projections()

    def _load_projections(self) -> None:
        if self.manifest.projections is not None:
            learnt = FittedProjections(self.path, self.manifest.projections, self.specs)
            self.stack.callback(learnt.file.close)
            self.projections.use(learnt)

    def _check_disk(self) -> None:
        """Refuses early what the disk cannot hold.

        Raises:
            StoreError: both sizes, and what to turn.
        """
        count = self.source.count
        sizes = disk_sizes(
            self.config, self.specs, str(self.manifest.stored), count, coarse=wants_coarse(self.config, count)
        )
        there = folder_bytes(self.path)
        free = shutil.disk_usage(self.path).free
        if sizes.total - there > free:
            raise StoreError(
                f"the index will take {sizes.total:,} bytes ({sizes.row:,} an example), {self.path} has {there:,} of "
                f"them, and its disk has {free:,} free: choose another disk, or smaller rows (lorif estimate shows "
                "choices)"
            )

    def _decide_representation(self) -> str:
        """What rows will hold. Where factors lose next to nothing, rounding would only make scores worse: then "auto"
        and "both" are factors alone."""
        if representation_is_open(self.config, self.specs):
            return representation_of(self.config, self.specs, self._sample()[0]())
        return representation_of(self.config, self.specs, ())

    def _sample(self) -> tuple[RowPass, int]:
        """Unfactored gradients of the random sample, the same at each walk, and how many."""
        if self._sampled is None:
            wanted = self._sample_ids()
            everything = len(wanted) == self.source.count
            rows, count, spool, skipped = self._walkable(self.source, wanted, everything)
            if everything and spool is not None:
                # Encoding reads it back instead of computing it again.
                self._spool = spool
                self.manifest.skipped = skipped
            self._sampled = rows, count
        return self._sampled

    def _walkable(
        self, source: GradientSource, wanted: np.ndarray, everything: bool, *, each: int = 1
    ) -> tuple[RowPass, int, Spool | None, list[int]]:
        """Some rows of a source, `each` an example, for several walks, kept on disk meanwhile where they fit; and the
        ids of what was skipped."""
        skipped: list[int] = []

        def walk() -> Iterator[GradientBlock]:
            skipped.clear()
            return finite_blocks(source.sample(wanted), self.config.on_nonfinite, skipped)

        need = len(wanted) * each * sum(spec.dim for spec in self.specs.values()) * 4
        # Given gradients are there to be walked again; a part of them is found faster in a copy.
        most = min(self.config.spool_bytes, shutil.disk_usage(self.path).free // 2)
        if need > most or (everything and isinstance(source, GivenGradients)):
            return walk, sum(block.count for block in walk()), None, skipped
        with self.reporter.stage(
            "sample" if source is self.source else "probes" if self.curvature is None else "rows", len(wanted) * each
        ) as stage:
            spool = Spool(self.path, _told(walk(), stage.advance))
        self.stack.callback(spool.close)
        return spool.blocks, spool.count, spool, list(skipped)

    def _fit_from_rows(self) -> None:
        """Curvature from the user's rows, from probes, or from unfactored gradients of a random sample."""
        spool: Spool | None = None
        if self.curvature is not None:
            source, copy = curvature_source(self.curvature, self.capture, self.loss, self.projections, self.path)
            if copy is not None:
                self.stack.callback(copy.close)
            rows, count, spool, _ = self._walkable(source, np.arange(source.count, dtype=np.int64), True)
            part = Part(rows, count, count / self.curvature.rows_per_example, 1.0)
        elif self.logits is not None and self.capture is not None and self.examples is not None:
            wanted = self._sample_ids()
            probes = probes_of(self.capture.model, self.logits, self.config.probes, self.config.seed, len(wanted))
            probed = ProbedGradients(self.capture.capture(self.loss), self.examples, probes)
            rows, count, spool, _ = self._walkable(probed, wanted, False, each=probes.each)
            part = Part(rows, count, count / probes.rows_per_example, 1.0 - _EMPIRICAL_SHARE)
            if self.curvature_kind == "mixed":
                rows, count = self._sample()
                part = mix([part, Part(rows, count, count, _EMPIRICAL_SHARE)], self.specs)
        else:
            rows, count = self._sample()
            part = Part(rows, count, count, 1.0)
        with self.reporter.stage("curvature") as stage:
            fitted = fit_curvature(
                part.rows,
                part.count,
                self.specs,
                rank=self._curvature_rank(),
                power_iterations=self.config.power_iterations,
                seed=self.config.seed,
                examples=part.examples,
                stage=stage,
                device=self._device(),
                within=curvature_products(self.config, self.specs, str(self.manifest.stored)),
            )
        if spool is not None:
            spool.close()
        self._keep(fitted)

    def _curvature_rank(self) -> dict[str, int | None]:
        """Directions of the layers."""
        return curvature_ranks(self.config, self.specs, str(self.manifest.stored))

    def _fit_eigencode(self) -> None:
        """Which directions rows of eigencodes hold, by the sample's gradients."""
        rows, count = self._sample()
        curvature = self._curvature()
        with self.reporter.stage("eigencodes") as stage:
            code = fit_eigencode(
                rows,
                count,
                curvature,
                lambdas(curvature, self.config),
                row_bytes=self.config.eigen_bytes,
                stage=stage,
                device=self._device(),
            )
        self.manifest.eigen = save_eigencode(self.path, code)
        self.manifest.write(self.path, BUILDING)

    def _fit_sketch(self) -> None:
        """The sketch of unfactored gradients, which coordinates are taken with."""
        (rows, count), curvature, device = self._sample(), self._curvature(), self._device()
        with self.reporter.stage("sketch") as stage:
            whitened = half_whitened(rows, count, curvature, lambdas(curvature, self.config), device)
            sketch = new_sketch(whitened, curvature, self.config, stage, device)
        self.manifest.sketch = save_sketch(self.path, sketch)
        self.manifest.write(self.path, BUILDING)

    def _curvature(self) -> FittedCurvature:
        sealed = self.manifest.curvature
        if sealed is None:
            raise CorruptionError(f"{self.path} lost its fitted curvature while building: delete it and build anew")
        fitted = FittedCurvature(self.path, sealed, self.specs, self.manifest.curvature_layers)
        self.stack.callback(fitted.file.close)
        return fitted

    def _fit_from_factors(self) -> None:
        """The published order: curvature from all stored factors, after they were written."""
        store = Store(self.path, row_layout(self.manifest, self.config, self.specs), self.manifest.shards)
        self.stack.callback(store.close)
        with self.reporter.stage("curvature") as stage:
            fitted = fit_curvature(
                lambda: stored_gradients(store),
                len(store),
                self.specs,
                rank=self._curvature_rank(),
                power_iterations=self.config.power_iterations,
                seed=self.config.seed,
                examples=len(store),
                stage=stage,
                device=self._device(),
            )
        self._keep(fitted)

    def _keep(self, fitted: dict[str, LayerCurvature]) -> None:
        for name, layer in fitted.items():
            # Found out now rather than at the first search.
            Preconditioner.of(name, layer, self.config.damping, self.config.complement)  # type: ignore[arg-type]
        self.manifest.curvature, self.manifest.curvature_layers = save_curvature(self.path, fitted)
        self.manifest.write(self.path, BUILDING)

    def _encode(self) -> None:
        """One pass: gradients -> factors and coordinates -> rows -> shards."""
        manifest = self.manifest
        if self.config.store == "coarse" and manifest.coarse is not None:
            # The rows have served their purpose.
            return
        layout = row_layout(manifest, self.config, self.specs)
        eigen = sketch = None
        if layout.eigen is not None:
            curvature = self._curvature()
            eigen = EigenEncoder(load_eigencode(self.path, manifest.eigen, curvature), curvature, self._device())
        if layout.codes is not None:
            sketch = SketchEncoder(
                load_sketch(self.path, manifest.sketch, self.specs), self._curvature(), self._device()
            )
        encoder = RowEncoder(layout, self.specs, eigen, sketch)
        start = manifest.shards[-1].last_id + 1 if manifest.shards else 0
        source: GradientSource = self.source if self._spool is None else self._spool
        skipped = [i for i in manifest.skipped if self._spool is not None or i < start]
        writer = shard_writer(self.path, manifest, layout, self.config)

        def on_sealed() -> None:
            manifest.skipped = sorted(skipped)
            manifest.write(self.path, BUILDING)

        with self.reporter.stage("encode", self.source.count - start) as stage:
            blocks = finite_blocks(source.blocks(start), self.config.on_nonfinite, skipped)
            encode_blocks(blocks, encoder, writer, stage, on_sealed, payloads=self.payloads)
        self._vanished += encoder.vanished
        manifest.skipped = sorted(skipped)
        if not manifest.shards:
            raise DataError(f"no example is left to index: all {self.source.count} were skipped for inf or NaN")
        manifest.write(self.path, BUILDING)

    def _add_coarse(self) -> None:
        """The coarse index over what is stored, and its calibration."""
        count = sum(shard.rows for shard in self.manifest.shards)
        if not wants_coarse(self.config, count):
            return
        load_faiss()
        if self.manifest.sketch is None:
            # Rows are factors or eigencodes alone: the sketch is of them.
            with self.reporter.stage("sketch") as stage:
                self.manifest.sketch = sketch_of_rows(self._reader(), stage, self._device())
            self.manifest.write(self.path, BUILDING)
        if self.manifest.coarse is None:
            reader = self._reader()
            factory = self.config.coarse
            if factory in (None, "auto"):
                factory = default_factory(reader.sketch.dim)  # type: ignore[union-attr]
            if self.manifest.queries is None:
                ids, gradients = self._calibration_queries()
                self.manifest.queries = save_queries(self.path, ids, gradients)
                self.manifest.write(self.path, BUILDING)
            with self.reporter.stage("coarse", count) as stage:
                entry = make_coarse(reader, str(factory), stage)
            if self.config.store == "coarse":
                self._drop_rows(reader, entry)
            else:
                self.manifest.coarse = entry
                self.manifest.write(self.path, BUILDING)
        if self.manifest.calibration is None and self.config.store != "coarse":
            with self.reporter.stage("calibrate") as stage:
                learnt = calibrate(self._reader(), None, stage)
            self.manifest.calibration = learnt.to_json() if learnt is not None else None
            self.manifest.write(self.path, BUILDING)

    def _drop_rows(self, reader: Reader, entry: dict[str, Any]) -> None:
        """Only the coarse index stays: it is calibrated while the rows are there, and their ids are kept."""
        manifest = self.manifest
        with_rows = dataclasses.replace(manifest, coarse=entry)
        reader = Reader(self.path, with_rows, reader.layout)
        self.stack.callback(reader.close)
        with self.reporter.stage("calibrate") as stage:
            learnt = calibrate(reader, None, stage)
        old = manifest.shards
        kept = []
        for info in old:
            shard = Shard(self.path, info, reader.layout)
            kept.append(_without_rows(self.path, manifest.new_name("ids"), shard))
            shard.file.close()
        manifest.shards, manifest.coarse = kept, entry
        manifest.calibration = learnt.to_json() if learnt is not None else None
        manifest.write(self.path, BUILDING)
        for info in old:
            (self.path / info.sealed.file).unlink()

    def _calibration_queries(self) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Unfactored gradients of training examples as queries: outside of the fitting sample, which would be easier to
        answer, where there are others."""
        each = 4 * sum(spec.dim for spec in self.specs.values())
        most = min(self.config.calibration_queries, max(QUERY_BYTES // each, 1))
        others = self._shuffled()[self.config.curvature_sample :][:most]
        chosen = np.sort(others if len(others) == most else self._shuffled()[:most])
        ids, parts = [], []
        for block in finite_blocks(self.source.sample(chosen), self.config.on_nonfinite, []):
            ids.append(block.ids)
            parts.append({name: g.dense().float().cpu() for name, g in block.layers.items()})
        empty = {name: torch.empty(0, spec.d_in, spec.d_out) for name, spec in self.specs.items()}
        gradients = {name: torch.cat([empty[name], *(p[name] for p in parts)]) for name in self.specs}
        return np.concatenate([np.empty(0, np.int64), *ids]), gradients

    def _reader(self) -> Reader:
        reader = Reader(self.path, self.manifest)
        self.stack.callback(reader.close)
        return reader

    def _finish(self) -> None:
        manifest = self.manifest
        seconds = manifest.report.get("seconds", {})
        for stage, value in self.reporter.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + value, 6)
        manifest.report = {
            "seconds": seconds,
            "rows": sum(shard.rows for shard in manifest.shards),
            "examples": self.source.count,
            "skipped": len(manifest.skipped),
            "vanished": self._vanished,
            "row_bytes": row_layout(manifest, self.config, self.specs).row_bytes,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "torch": torch.__version__,
            "coverage": measure_coverage(self._reader(), self.capture, self.loss, self.examples, self._shuffled()),
        }
        manifest.commit(self.path)
        (self.path / BUILDING).unlink()

    def _sample_ids(self) -> np.ndarray:
        """Sorted ids of the random fitting sample."""
        return np.sort(self._shuffled()[: self.config.curvature_sample])

    def _shuffled(self) -> np.ndarray:
        """All ids in random order: the fitting sample's first."""
        count = self.source.count
        generator = np.random.Generator(keyed_generator(self.config.seed, "curvature-sample", count))
        return generator.permutation(count).astype(np.int64)

    def _device(self) -> torch.device:
        if self.capture is not None:
            return self.capture.capture(self.loss).device
        return torch.device(self.config.device or "cpu")


def wants_coarse(config: BuildConfig, count: int) -> bool:
    """Whether an index of `count` rows gets a coarse index."""
    if config.coarse is None:
        return False
    if config.coarse == "auto" and config.store != "coarse":
        return count >= COARSE_FROM and faiss_is_installed()
    return True


def take_fit(folder: Path, manifest: Manifest, into: Path) -> None:
    """Copies what another index was fitted with: projections, curvature, eigencodes, and the sketch where rows need it.

    Args:
        folder: the other index.
        manifest: of the index that takes it; its layers, config and model must be the same.
        into: its folder.

    Raises:
        FingerprintError: another model, loss, or config, but for settings that change no stored number.
    """
    other = read_manifest(folder)
    keys = ("model", "members", "loss", "autocast", "projection", "layers", "config")
    check_same(
        {k: other.fingerprint[k] for k in keys if k in other.fingerprint},
        {k: manifest.fingerprint[k] for k in keys if k in manifest.fingerprint},
        f"the index {folder}, whose fit was to be taken,",
        "build with the same model, loss and config (leave config out to take that index's)",
    )
    if other.curvature is None:
        raise CorruptionError(f"{folder} has no curvature in its manifest: restore it from a copy")
    # Names of both indexes are never given again.
    manifest.next_file = max(manifest.next_file, other.next_file)
    manifest.curvature = copy_sealed(folder, other.curvature, into, other.curvature.file)
    manifest.curvature_layers, manifest.stored = other.curvature_layers, other.stored
    for field in ("projections", "eigen", *(("sketch",) if other.stored in ("both", "coordinates", "coarse") else ())):
        entry = getattr(other, field)
        if entry is not None:
            info = SealedInfo.from_json(entry["file"])
            setattr(manifest, field, entry | {"file": copy_sealed(folder, info, into, info.file).to_json()})


def with_floor(config: BuildConfig, model: nn.Module, loss: PerExample | None, examples: ExampleSource) -> BuildConfig:
    """The config with a number for projection_floor: wider for eigencodes, which keep the best directions of all, and
    so gain by there being more to choose from. What rows will be is told by the first batch.

    Where a row has room for all directions of the least width, it stays: nothing is chosen, and a wider D would only
    make the same multiple of trace / D a smaller lambda (`bench.lds`: Fashion-MNIST falls from .283 to .248)."""
    if config.projection_floor != "auto":
        return config
    least = dataclasses.replace(config, projection_floor=LEAST_FLOOR)
    if config.projection != "eigen" or config.curvature_rank != "auto" or config.store not in ("auto", "eigen"):
        return least
    taken = ModelCapture(model, least)
    first = itertools.islice(ModelGradients(taken.capture(loss), examples).blocks(), 1)
    if representation_of(least, taken.specs, first) != "eigen":
        return least
    if sum(spec.dim for spec in taken.specs.values()) <= 8 * config.eigen_bytes:
        return least
    for floor in _FLOORS:
        wider = dataclasses.replace(config, projection_floor=floor)
        each = sum(spec.dim for spec in layer_specs(taken.layers, wider).values())
        if 4 * each * min(examples.count, config.curvature_sample) <= _FLOOR_BYTES:
            return wider
    return least


def representation_is_open(config: BuildConfig, specs: dict[str, LayerSpec]) -> bool:
    """Whether what rows hold depends on the gradients."""
    if config.store not in ("auto", "both"):
        return False
    return config.curvature_rows != "factors" and not all(spec.dense for spec in specs.values())


def representation_of(config: BuildConfig, specs: dict[str, LayerSpec], blocks: Iterable[GradientBlock]) -> str:
    """What rows hold: as the config says, or factors alone where they lose next to nothing of some gradients. The
    blocks are only walked where that depends on them."""
    if not representation_is_open(config, specs):
        return "factors" if config.store in ("auto", "both") else config.store
    lost = total = 0.0
    seen = 0
    for block in blocks:
        part = block.select(np.arange(min(block.count, _MEASURED - seen)))
        seen += part.count
        for name, factors in factorise(part, specs).items():
            whole = part.layers[name].dense()
            lost += float((whole - factors.dense()).double().square().sum())
            total += float(whole.double().square().sum())
        if seen >= _MEASURED:
            break
    if lost <= _LOSSLESS * total:
        return "factors"
    return "both" if config.store == "both" else "eigen"


def _told(blocks: Iterator[GradientBlock], advance: Any) -> Iterator[GradientBlock]:
    for block in blocks:
        yield block
        advance(block.count)


def _without_rows(folder: Path, name: str, shard: Shard) -> ShardInfo:
    """A shard sealed anew without its rows, which are in the coarse index only."""
    payloads = shard.payloads(np.arange(shard.count)) if shard.has_payloads else None
    nothing = RowLayout({}, "float32", factors=False).empty(shard.count)
    return write_shard(folder, name, nothing, shard.ids(), "none", energies=shard.energies(), payloads=payloads)


def stored_gradients(store: Store) -> Iterator[GradientBlock]:
    """The stored gradients of all rows, a block at a time."""
    for start, rows in store.stream():
        layers = {name: LayerGradient.from_dense(f.dense()) for name, f in store.layout.unpack(rows).items()}
        yield GradientBlock(np.arange(start, start + len(rows), dtype=np.int64), layers)

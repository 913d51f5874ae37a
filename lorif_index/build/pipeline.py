"""Build: fit what is shared on a sample, then one pass over the data encodes each example once.

The stages, each of which leaves its result sealed, so that the same call goes on after an interruption: projections ->
sample -> curvature -> eigencodes or sketch -> encode -> coarse -> calibrate -> manifest. The published recipe fits the
curvature last, from all stored factors; where rows hold factors or eigencodes alone, the sketch is of them, and is
fitted after them.

Over several ranks each takes the gradients of its part of the examples, of the sample for what is fitted and of the
rest for its shards; sums come together (see `subspace`), rank 0 seals what was fitted, and the leader of each folder
writes what is found there. An interrupted build goes on with any number of ranks: what is not sealed is shared anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture import eigenbases
from ..capture.data import ExampleSource, as_source
from ..capture.ensemble import count_of, probes_of
from ..capture.gradients import GradientBlock, GradientSource, LayerGradient, LayerSpec
from ..capture.losses import LogitsOf, PerExample, default_loss, logits_of
from ..capture.sharded import DataRanks, data_ranks, evened, is_spread
from ..capture.sources import (
    GivenGradients,
    ModelCapture,
    ModelGradients,
    ProbedGradients,
    Rewound,
    asked_device,
    curvature_source,
    data_digest,
    finite_blocks,
    given_specs,
    is_one_shot,
    model_digest,
)
from ..capture.spool import Spool, remove_leftovers
from ..codecs.eigencodes import EigenEncoder, fit_eigencode
from ..codecs.layout import RowLayout
from ..config import BuildConfig, CurvatureRows
from ..curvature.fit import LayerCurvature, Part, RowPass, fit_curvature, mix
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import SketchEncoder, half_whitened
from ..errors import ConfigError, CorruptionError, DataError, IndexExistsError, NonFiniteError, StoreError
from ..linalg.projection import ALGORITHM, Projections
from ..linalg.sampling import drawn
from ..progress import Reporter, Stage, peak_memory
from ..ranks import Ranks, share
from ..search.coarse import check_factory, default_factory, faiss_is_installed, load_faiss
from ..search.reader import Reader, positions_of, row_layout, shard_writer
from ..search.team import Team
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
from ..storage.home import ARRIVING, Home
from ..storage.locks import WRITER, WriterLock
from ..storage.manifest import (
    BUILDING,
    BUILDING_RANKS,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    building_name,
    collect,
    read_manifest,
    spec_to_json,
)
from ..storage.payloads import Payloads, Values
from ..storage.sealed import SealedInfo, part_name
from ..storage.shards import Shard, ShardInfo, write_shard
from ..storage.store import Store
from .coarse_build import calibrate, lambdas, make_coarse, new_sketch, sketch_of_rows
from .coverage import EXAMPLES, measure_coverage
from .encode import RowEncoder, encode_blocks
from .outliers import measure_outliers
from .representation import MEASURED, representation_is_open, representation_of, with_floor
from .resuming import FITTED, take_fit, unfinished
from .sizes import QUERY_BYTES, CurvatureShape, curvature_shapes, disk_sizes
from .spans import some_of, unsealed, within, without_overlaps

# Settings that leave every stored number as it is; all others must agree when an interrupted build goes on.
_FREE_SETTINGS = ("complement", "shard_bytes", "spool_bytes", "device", "coarse", "calibration_queries")

# Below so many rows a scan is as quick, and "auto" makes no coarse index.
COARSE_FROM = 1024
# Of the mixed curvature's trace (of 1/4, 1/2 and 3/4; chosen on digits and Fashion-MNIST, held on sequences:
# `docs/quality.md`).
_EMPIRICAL_SHARE = 0.25


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
    ranks: Ranks,
) -> bool:
    """Builds, or goes on building, the index at `path`. See `Index.build`.

    Returns:
        whether all of it is in that folder; else each rank's folder has a part.
    """
    with ranks.jointly("begin"):
        check_arguments(model, data, gradients, loss)
        _check_json(metadata)
        check_free(path)
    with ExitStack() as stack:
        work = _Build(
            path, model, data, gradients, loss, curvature, config, metadata, payloads, fit, reporter, ranks, stack
        )
        return work.run()


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
    others = (item.name for item in path.iterdir() if not item.name.startswith(ARRIVING)) if path.is_dir() else ()
    if not (path / BUILDING).is_file() and any(name not in begun for name in others):
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
        ranks: Ranks,
        stack: ExitStack,
    ) -> None:
        self.path, self.config, self.loss, self.reporter, self.stack = path, config, loss, reporter, stack
        self.ranks = ranks
        # Which part of the examples is this rank's, and whether it speaks for the ranks that take the same.
        self.data = DataRanks(ranks.rank, ranks.size, True)
        if model is not None and ranks.everyone:
            self.data = data_ranks(model)
        self._home: Home | None = None
        self.lock = WriterLock(path)
        stack.callback(self.lock.release)
        if ranks.count(int((path / BUILDING).is_file())):
            # Another process may be at work in it.
            self.home  # noqa: B018
        self.capture: ModelCapture | None = None
        self.examples: ExampleSource | None = None
        self.specs: dict[str, LayerSpec]
        self.projections: Projections
        self.source: GradientSource
        self._walk_sides: Callable[[np.ndarray, list[eigenbases.Side]], eigenbases.Walk]
        # What the index remembers as its config; the fingerprint has what became of it.
        with ranks.jointly():
            fingerprint, asked = self._take(model, data, gradients, curvature, payloads, fit)
        ranks.agree("what is built", fingerprint)
        self.manifest = self._begin(
            Manifest(fingerprint, asked.to_json(), list(self.specs.values()), metadata=metadata), fit
        )
        self._load_projections()
        self._sampled: tuple[RowPass, int] | None = None
        self._spool: Spool | None = None
        self._vanished = 0

    def _take(
        self,
        model: nn.Module | None,
        data: Any,
        gradients: Any,
        curvature: Any,
        payloads: Values | None,
        fit: Path | None,
    ) -> tuple[dict[str, Any], BuildConfig]:
        """Makes a source of gradients of what was given; the build's fingerprint, and the config that was asked for."""
        config, loss, path = self.config, self.loss, self.path
        asked_device(config)
        if config.coarse is not None and (config.coarse != "auto" or config.store == "coarse"):
            check_factory(config.coarse)
        if isinstance(curvature, str):
            config = self.config = dataclasses.replace(config, curvature=curvature)
            curvature = None
        self.curvature = (
            curvature if isinstance(curvature, CurvatureRows) or curvature is None else CurvatureRows(curvature)
        )
        asked = config
        fitted = None if fit is None else read_manifest(fit)
        self.logits = self._logits_for_ggn(gradients is None)
        fingerprint: dict[str, Any]
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
                self.stack.callback(gradients.close)
            self.specs = given_specs(gradients, config)
            self.projections = Projections(self.specs, config.seed)
            given = self.source = GivenGradients(gradients, self.projections)
            self._walk_sides = lambda ids, sides: eigenbases.walk_gradients(lambda: given.given(ids), sides)
            fingerprint = {"model": None, "loss": None, "data": given.digest}
        self.payloads = None if payloads is None else Payloads(payloads, self.source.count)
        return fingerprint | {
            "format_version": FORMAT_VERSION,
            "examples": self.source.count,
            "projection": ALGORITHM,
            "layers": [spec_to_json(spec) for spec in self.specs.values()],
            "config": {k: v for k, v in config.to_json().items() if k not in _FREE_SETTINGS},
            "curvature": self.curvature_kind if fitted is None else fitted.fingerprint.get("curvature"),
            "payloads": None if self.payloads is None else self.payloads.digest,
            "fit": None if fitted is None or fitted.curvature is None else fitted.curvature.digest,
        }, asked

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

    @property
    def home(self) -> Home:
        """The folder, made and locked when it is first needed, by all ranks together."""
        if self._home is None:
            home = self._home = Home(self.path, self.ranks)
            with self.ranks.jointly():
                if home.leads:
                    self.lock.acquire()
                    if (self.path / BUILDING).is_file():
                        remove_leftovers(self.path)
        return self._home

    def _begin(self, fresh: Manifest, fit: Path | None) -> Manifest:
        """The manifest to work on: with what is already fitted, and on each folder's leader with what is sealed there,
        where a build of this very index was interrupted."""
        home, ranks = self.home, self.ranks
        fresh.next_id = fresh.fitted_ids = self.source.count
        found: Manifest | None = None
        with ranks.jointly():
            if home.leads and (self.path / BUILDING).is_file():
                found = unfinished(self.path, fresh, keep_coarse=home.folders == 1)
        steps = ranks.gather_values(-1 if found is None else sum(getattr(found, f) is not None for f in FITTED))
        if max(steps) >= 0:
            # The folder where most is fitted tells the others, whose rows count if they were made with the same.
            self._adopt(fresh, found, steps.index(max(steps)))
        taken = found is not None and all(getattr(found, f) == getattr(fresh, f) for f in FITTED)
        if found is not None and taken:
            fresh.shards, fresh.skipped = found.shards, found.skipped
            fresh.coarse, fresh.calibration = found.coarse, found.calibration
        # The coarse index is of a folder: its leader's is that of all ranks there.
        fresh.coarse, fresh.calibration = ranks.gather_values([fresh.coarse, fresh.calibration])[home.leader]
        fresh.next_file = max(ranks.gather_values(fresh.next_file if found is None else found.next_file))
        if fit is not None and fresh.curvature is None:
            with ranks.jointly():
                if ranks.first:
                    take_fit(fit, fresh, self.path)
            self._adopt(fresh, fresh, 0)
        if fit is not None:
            # None of these examples was there when it was fitted.
            fresh.fitted_ids = 0
        fresh.shards = without_overlaps(ranks.gather_values([s.span for s in fresh.shards]), ranks.rank, fresh.shards)
        with ranks.jointly():
            if home.leads:
                fresh.write(self.path, BUILDING)
                for path in self.path.glob(BUILDING_RANKS):
                    path.unlink()
                # What an interrupted run left unsealed.
                collect(self.path)
        return fresh

    def _adopt(self, fresh: Manifest, found: Manifest | None, source: int) -> None:
        """All ranks take what rank `source` has fitted, and their folders its files."""
        told = None
        if self.ranks.rank == source and found is not None:
            told = dataclasses.replace(found, shards=[], skipped=[], coarse=None, calibration=None).to_json()
        common = Manifest.from_json(self.ranks.told(told, source))
        there = set() if found is None else {(info.file, info.digest) for info in found.fits()}
        for field in FITTED:
            setattr(fresh, field, getattr(common, field))
        lacking = [i.file for i in common.fits() if (i.file, i.digest) not in there] if self.home.leads else []
        wanted = set().union(*self.ranks.gather_values(lacking))
        self.home.publish([info for info in common.fits() if info.file in wanted], source)
        fresh.next_file = common.next_file

    def _claim(self) -> None:
        """Makes the folder an unfinished build's, for a stream that must be kept there before anything is known."""
        if self.home.leads and not (self.path / BUILDING).exists():
            Manifest({}, {}, []).write(self.path, BUILDING)
        self.ranks.wait()

    def _publish(self, field: str, save: Callable[[], dict[str, Any]]) -> None:
        """Rank 0 seals what was fitted, all folders get it, and the manifest names it."""
        entry: dict[str, Any] | None = None
        with self.ranks.jointly():
            entry = save() if self.ranks.first else None
        entry = self.ranks.told(entry)
        self.home.publish([SealedInfo.from_json(entry["file"])])
        setattr(self.manifest, field, entry)
        self._note()

    def _note(self) -> None:
        """Writes down how far the build is."""
        with self.ranks.jointly():
            if self.home.leads:
                self.manifest.write(self.path, BUILDING)

    # -- stages --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Does what is left to do; whether all of the index is in this folder."""
        late = self.config.curvature_rows == "factors" and self.curvature is None
        if self.config.projection == "eigen" and self.manifest.projections is None:
            self._fit_projections()
        if self.manifest.stored is None:
            self.manifest.stored = self._decide_representation()
            self._note()
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
        return self.home.folders == 1

    def _fit_projections(self) -> None:
        """Learns the projections that the first pass of the sample tells."""
        ids = self._own(np.sort(self._drawn(min(self.config.curvature_sample, eigenbases.SAMPLE))))
        layers = self.capture.layers if self.capture is not None else []
        sides = eigenbases.fitted_sides(self.specs, layers)
        if not sides:
            return
        given = self._walk_sides(ids, sides)

        def walk(sink: eigenbases.Sink) -> None:
            given(sink if self.data.first else lambda _, rows: None)

        with self._stage("projections") as stage:
            found = eigenbases.fit_eigenbases(
                walk, self.specs, sides, self.config.seed, self._device(), stage, self.ranks
            )
        self._publish("projections", lambda: save_projections(self.path, found, self.specs))
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
        count = -(-self.source.count // self.home.folders)
        sizes = disk_sizes(
            self.config, self.specs, str(self.manifest.stored), count, coarse=wants_coarse(self.config, count)
        )
        with self.ranks.jointly():
            there = folder_bytes(self.path)
            free = shutil.disk_usage(self.path).free
            if sizes.total - there > free:
                raise StoreError(
                    f"the index will take {sizes.total:,} bytes ({sizes.row:,} an example), {self.path} has {there:,} "
                    f"of them, and its disk has {free:,} free: choose another disk, or smaller rows (lorif estimate "
                    "shows choices)"
                )

    def _decide_representation(self) -> str:
        """What rows will hold. Where factors lose next to nothing, rounding would only make scores worse: then "auto"
        and "both" are factors alone."""
        if not representation_is_open(self.config, self.specs):
            return representation_of(self.config, self.specs, ())
        found = None
        with self.ranks.jointly():
            # All ranks take the same gradients: passes of a sharded model are one of all of them.
            few = self.source.sample(self._sample_ids()[:MEASURED])
            found = representation_of(self.config, self.specs, list(finite_blocks(few, self.config.on_nonfinite, [])))
        return str(self.ranks.told(found))

    def _sample(self) -> tuple[RowPass, int]:
        """Unfactored gradients of this rank's part of the random sample, the same at each walk, and how many there are
        in the whole sample."""
        if self._sampled is None:
            wanted = self._sample_ids()
            everything = len(wanted) == self.source.count
            rows, count, spool, skipped = self._walkable(self.source, self._own(wanted), everything)
            if everything and spool is not None:
                # Encoding reads it back instead of computing it again.
                self._spool = spool
                self.manifest.skipped = skipped
            self._sampled = rows, count
        return self._sampled

    def _walkable(
        self, source: GradientSource, wanted: np.ndarray, everything: bool, *, each: int = 1
    ) -> tuple[RowPass, int, Spool | None, list[int]]:
        """Some rows of a source, `each` an example, for several walks, kept on disk meanwhile where they fit; how many
        of these all ranks have; and the ids of what was skipped here.

        Args:
            source: of examples.
            wanted: this rank's.
            everything: whether all ranks together take all of them.
            each: rows of an example.
        """
        skipped: list[int] = []

        def walk() -> Iterator[GradientBlock]:
            skipped.clear()
            return self._spoken_for(finite_blocks(source.sample(wanted), self.config.on_nonfinite, skipped))

        need = len(wanted) * each * sum(spec.dim for spec in self.specs.values()) * 4
        # Given gradients are there to be walked again; a part of them is found faster in a copy.
        sharing = self.home.leaders.count(self.home.leader)
        most = min(self.config.spool_bytes, shutil.disk_usage(self.path).free // 2 // sharing)
        if self.ranks.count(int(need > most)) or (everything and isinstance(source, GivenGradients)):
            with self.ranks.jointly("sample"):
                count = sum(block.count for block in walk())
            return walk, self._some(self.ranks.count(count)), None, skipped
        with self._stage(
            "sample" if source is self.source else "probes" if self.curvature is None else "rows", len(wanted) * each
        ) as stage:
            with self.ranks.jointly():
                spool = Spool(self.path, _told(walk(), stage.advance))
            self.stack.callback(spool.close)
            count = self._some(self.ranks.count(spool.count))
        return spool.blocks, count, spool, list(skipped)

    def _some(self, count: int) -> int:
        """The count of rows to fit with, where there are some."""
        if not count:
            raise NonFiniteError(
                "every example of the sample has inf or NaN gradients, and on_nonfinite='skip' leaves nothing to fit "
                "with: mend the data or the loss"
            )
        return count

    @contextmanager
    def _stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """A stage of the work, in reports and in the account of what ranks send each other."""
        self.ranks.stage = name
        with self.reporter.stage(name, total) as stage:
            yield stage

    def _own(self, ids: np.ndarray) -> np.ndarray:
        """This rank's part of some ids."""
        return ids[share(len(ids), self.data.index, self.data.count)]

    def _spoken_for(self, blocks: Iterable[GradientBlock]) -> Iterator[GradientBlock]:
        """Blocks, of one of the ranks that take the same; the others take them, since a pass is one of all."""
        for block in blocks:
            if self.data.first:
                yield block

    def _fit_from_rows(self) -> None:
        """Curvature from the user's rows, from probes, or from unfactored gradients of a random sample."""
        spool: Spool | None = None
        if self.curvature is not None:
            source, copy = curvature_source(self.curvature, self.capture, self.loss, self.projections, self.path)
            if copy is not None:
                self.stack.callback(copy.close)
            every = np.arange(source.count, dtype=np.int64)
            rows, count, spool, _ = self._walkable(source, self._own(every), True)
            part = Part(rows, count, count / self.curvature.rows_per_example, 1.0)
        elif self.logits is not None and self.capture is not None and self.examples is not None:
            wanted = self._sample_ids()
            probes = probes_of(self.capture.model, self.logits, self.config.probes, self.config.seed, len(wanted))
            probed = ProbedGradients(self.capture.capture(self.loss), self.examples, probes)
            rows, count, spool, _ = self._walkable(probed, self._own(wanted), False, each=probes.each)
            part = Part(rows, count, count / probes.rows_per_example, 1.0 - _EMPIRICAL_SHARE)
            if self.curvature_kind == "mixed":
                rows, count = self._sample()
                part = mix([part, Part(rows, count, count, _EMPIRICAL_SHARE)], self.specs, self.ranks)
        else:
            rows, count = self._sample()
            part = Part(rows, count, count, 1.0)
        shapes = self._shapes()
        with self._stage("curvature") as stage:
            fitted = fit_curvature(
                part.rows,
                part.count,
                self.specs,
                rank={name: shape.rank for name, shape in shapes.items()},
                power_iterations=self.config.power_iterations,
                seed=self.config.seed,
                examples=part.examples,
                stage=stage,
                device=self._device(),
                within={name: (shape.products, shape.diagonal) for name, shape in shapes.items() if shape.products},
                ranks=self.ranks,
            )
        if spool is not None:
            spool.close()
        self._keep(fitted)

    def _shapes(self) -> dict[str, CurvatureShape]:
        """Layer -> what is fitted of its curvature."""
        return curvature_shapes(self.config, self.specs, str(self.manifest.stored))

    def _fit_eigencode(self) -> None:
        """Which directions rows of eigencodes hold, by the sample's gradients."""
        rows, count = self._sample()
        curvature = self._curvature()
        with self._stage("eigencodes") as stage:
            code = fit_eigencode(
                rows,
                count,
                curvature,
                lambdas(curvature, self.config),
                row_bytes=self.config.eigen_bytes,
                code=self.config.eigen_code,
                stage=stage,
                device=self._device(),
                ranks=self.ranks,
            )
        self._publish("eigen", lambda: save_eigencode(self.path, code))

    def _fit_sketch(self) -> None:
        """The sketch of unfactored gradients, which coordinates are taken with."""
        (rows, count), curvature, device = self._sample(), self._curvature(), self._device()
        with self._stage("sketch") as stage:
            whitened = half_whitened(rows, count, curvature, lambdas(curvature, self.config), device)
            sketch = new_sketch(whitened, curvature, self.config, stage, device, self.ranks)
        self._publish("sketch", lambda: save_sketch(self.path, sketch))

    def _curvature(self) -> FittedCurvature:
        sealed = self.manifest.curvature
        if sealed is None:
            raise CorruptionError(f"{self.path} lost its fitted curvature while building: delete it and build anew")
        fitted = FittedCurvature(self.path, sealed, self.specs, self.manifest.curvature_layers)
        self.stack.callback(fitted.file.close)
        return fitted

    def _fit_from_factors(self) -> None:
        """The published order: curvature from all stored factors, after they were written."""
        team = Team.of(self.manifest, self.ranks)
        store = Store(self.path, row_layout(self.manifest, self.config, self.specs), team.shards)
        self.stack.callback(store.close)
        with self._stage("curvature") as stage:
            fitted = fit_curvature(
                lambda: stored_gradients(store),
                len(team),
                self.specs,
                rank={name: shape.rank for name, shape in self._shapes().items()},
                power_iterations=self.config.power_iterations,
                seed=self.config.seed,
                examples=len(team),
                stage=stage,
                device=self._device(),
                ranks=self.ranks,
            )
        self._keep(fitted)

    def _keep(self, fitted: dict[str, LayerCurvature]) -> None:
        def save() -> dict[str, Any]:
            for name, layer in fitted.items():
                # Found out now rather than at the first search.
                Preconditioner.of(name, layer, self.config.damping, self.config.complement)  # type: ignore[arg-type]
            info, layers = save_curvature(self.path, fitted)
            return {"file": info.to_json(), "layers": layers}

        entry: dict[str, Any] | None = None
        with self.ranks.jointly():
            entry = save() if self.ranks.first else None
        entry = self.ranks.told(entry)
        info = SealedInfo.from_json(entry["file"])
        self.home.publish([info])
        self.manifest.curvature, self.manifest.curvature_layers = info, entry["layers"]
        self._note()

    def _encode(self) -> None:
        """One pass: gradients -> factors and coordinates -> rows -> shards."""
        manifest = self.manifest
        if self.config.store == "coarse" and manifest.coarse is not None:
            # The rows have served their purpose.
            self._bring_together(manifest.skipped, manifest.next_file)
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
        # What is not sealed anywhere, and this rank's part of it.
        sealed = [span for spans in self.ranks.gather_values([s.span for s in manifest.shards]) for span in spans]
        left = unsealed(sealed, self.source.count)
        total = sum(stop - start for start, stop in left)
        mine = some_of(left, share(total, self.data.index, self.data.count))
        if self.capture is not None and self._spool is None:
            mine = evened(self.capture.model, mine, (0, 0))
        skipped = [i for i in manifest.skipped if self._spool is not None or not within(left, i)]
        name, base = BUILDING if self.home.leads else building_name(self.ranks.rank), manifest.next_file
        writer = shard_writer(self.path, manifest, layout, self.config, self.ranks)

        def on_sealed() -> None:
            # What is left may lie between what was sealed before.
            manifest.shards.sort(key=lambda shard: shard.first_id)
            manifest.skipped = sorted(skipped)
            manifest.write(self.path, name)

        with self._stage("encode", sum(stop - start for start, stop in mine)) as stage, self.ranks.jointly():
            for start, stop in mine:
                source: GradientSource = self.source if self._spool is None else self._spool
                blocks = finite_blocks(source.blocks(start, stop), self.config.on_nonfinite, skipped)
                encode_blocks(self._spoken_for(blocks), encoder, writer, stage, on_sealed, payloads=self.payloads)
            on_sealed()
        self._vanished += self.ranks.count(encoder.vanished)
        self._bring_together(skipped, base)
        if not self._rows():
            raise DataError(f"no example is left to index: all {self.source.count} were skipped for inf or NaN")

    def _bring_together(self, skipped: list[int], base: int) -> None:
        """The ranks' shards become the folders'.

        Args:
            skipped: ids that this rank has left out.
            base: number of the first file that was written.
        """
        manifest, home = self.manifest, self.home
        mine = {
            "shards": [shard.to_json() for shard in manifest.shards],
            "skipped": skipped,
            "next": manifest.next_file,
        }
        found = self.ranks.gather_values(mine)
        here = [said for rank, said in enumerate(found) if home.leaders[rank] == home.leader]
        shards = [ShardInfo.from_json(shard) for said in here for shard in said["shards"]]
        manifest.shards = sorted(shards, key=lambda shard: shard.first_id)
        manifest.skipped = sorted({i for said in found for i in said["skipped"]})
        manifest.next_file = max(base, *(said["next"] for said in found))
        if home.folders > 1:
            digests = sorted(shard["sealed"]["digest"] for said in found for shard in said["shards"])
            facts = json.dumps([manifest.fingerprint, digests], sort_keys=True)
            rows = sum(shard["rows"] for said in found for shard in said["shards"])
            build = hashlib.sha256(facts.encode()).hexdigest()
            manifest.part = {"number": home.number, "of": home.folders, "rows": rows, "build": build}
        self._note()
        with self.ranks.jointly():
            if not home.leads:
                (self.path / building_name(self.ranks.rank)).unlink(missing_ok=True)

    def _rows(self) -> int:
        """Of the whole index."""
        part = self.manifest.part
        return sum(shard.rows for shard in self.manifest.shards) if part is None else int(part["rows"])

    def _add_coarse(self) -> None:
        """The coarse index over what is stored, and its calibration."""
        if not wants_coarse(self.config, self._rows()):
            return
        with self.ranks.jointly():
            load_faiss()
        if self.manifest.sketch is None:
            # Rows are factors or eigencodes alone: the sketch is of them.
            with self._stage("sketch") as stage:
                sketch = sketch_of_rows(self._reader(), stage, self._device())
            self._publish("sketch", lambda: save_sketch(self.path, sketch))
        if self.manifest.coarse is None:
            reader = self._reader()
            factory = self.config.coarse
            if factory in (None, "auto"):
                factory = default_factory(reader.sketch.dim, reader.live_count)  # type: ignore[union-attr]
            if self.manifest.queries is None:
                with self._stage("queries"):
                    ids, gradients = self._calibration_queries()
                self._publish("queries", lambda: save_queries(self.path, ids, gradients))
            with self._stage("coarse", len(reader.store)) as stage:
                entry = make_coarse(reader, str(factory), stage)
            if self.config.store == "coarse":
                self._drop_rows(entry)
            else:
                self.manifest.coarse = entry
                self._note()
        if self.manifest.calibration is None and self.config.store != "coarse":
            self.manifest.calibration = self._calibrated(self._reader())
            self._note()

    def _calibrated(self, reader: Reader) -> dict[str, Any] | None:
        with self._stage("calibrate") as stage:
            learnt = calibrate(reader, None, stage)
        return self.ranks.told(None if learnt is None else learnt.to_json())

    def _drop_rows(self, entry: dict[str, Any]) -> None:
        """Only the coarse index stays: it is calibrated while the rows are there, and their ids are kept."""
        manifest = self.manifest
        layout = row_layout(manifest, self.config, self.specs)
        reader = Reader(self.path, dataclasses.replace(manifest, coarse=entry), layout, ranks=self.ranks)
        self.stack.callback(reader.close)
        manifest.calibration = self._calibrated(reader)
        old, base = manifest.shards, manifest.next_file
        names = manifest.naming("ids", self.ranks.rank, self.ranks.size)
        with self.ranks.jointly():
            manifest.shards = [_without_rows(self.path, names(), shard) for shard in reader.store.shards]
        manifest.coarse = entry
        self._bring_together(manifest.skipped, base)
        with self.ranks.jointly():
            for info in old if self.home.leads else ():
                (self.path / info.sealed.file).unlink()

    def _calibration_queries(self) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Unfactored gradients of training examples as queries, on all ranks: outside of the fitting sample, which
        would be easier to answer, where there are others."""
        each = 4 * sum(spec.dim for spec in self.specs.values())
        most = min(self.config.calibration_queries, max(QUERY_BYTES // each, 1))
        drawn = self._drawn(self.config.curvature_sample + most)
        others = drawn[self.config.curvature_sample :]
        chosen = self._own(np.sort(others if len(others) == most else drawn[:most]))
        ids, parts = [np.empty(0, np.int64)], []
        with self.ranks.jointly():
            taken = finite_blocks(self.source.sample(chosen), self.config.on_nonfinite, [])
            for block in self._spoken_for(taken):
                ids.append(block.ids)
                parts.append({name: g.dense().float().cpu() for name, g in block.layers.items()})
        empty = {name: torch.empty(0, spec.d_in, spec.d_out) for name, spec in self.specs.items()}
        mine = {name: torch.cat([empty[name], *(p[name] for p in parts)]) for name in self.specs}
        every = {n: torch.from_numpy(np.concatenate(self.ranks.gather(g.numpy()))) for n, g in mine.items()}
        return np.concatenate(self.ranks.gather(np.concatenate(ids))), every

    def _reader(self) -> Reader:
        reader = Reader(self.path, self.manifest, ranks=self.ranks)
        self.stack.callback(reader.close)
        return reader

    def _finish(self) -> None:
        manifest, reader = self.manifest, self._reader()
        seconds = manifest.report.get("seconds", {})
        for stage, value in self.reporter.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + value, 6)
        manifest.report = {
            "seconds": seconds,
            "rows": self._rows(),
            "examples": self.source.count,
            "skipped": len(manifest.skipped),
            "vanished": self._vanished,
            "row_bytes": row_layout(manifest, self.config, self.specs).row_bytes,
            "peak_rss_bytes": peak_memory(),
            "torch": torch.__version__,
            "coverage": self._coverage(reader),
            "outliers": measure_outliers(reader),
        }
        if self.ranks.size > 1:
            # What each rank has sent the others, and how much memory it took.
            manifest.report["ranks"] = {
                "size": self.ranks.size,
                "folders": self.home.folders,
                "sent_bytes": self.ranks.gather_values(dict(self.ranks.sent)),
                "peak_rss_bytes": self.ranks.gather_values(manifest.report["peak_rss_bytes"]),
            }
        with self.ranks.jointly("finish"):
            if self.home.leads:
                manifest.commit(self.path)
                (self.path / BUILDING).unlink()

    def _coverage(self, reader: Reader) -> dict[str, Any] | None:
        """What rank 0 keeps of gradients of some of its rows; nothing where a pass of the model takes several ranks."""
        found = None
        with self.ranks.jointly():
            if self.ranks.first and not (self.capture is not None and is_spread(self.capture.model)):
                ids = self._drawn(EXAMPLES * self.ranks.size)
                here = ids[positions_of(reader.store, ids) >= 0][:EXAMPLES]
                found = measure_coverage(reader, self.capture, self.loss, self.examples, here)
        if found is not None and found["differing"]:
            warnings.warn(
                f"captured gradients of layers {found['differing'][:4]} are not autograd's: the model uses their "
                "weights without calling the modules, which is not seen, so that their share of scores is wrong. Leave "
                "them out (layers=LayerSelection(exclude=...)), or let the model call a module",
                stacklevel=5,
            )
        return self.ranks.told(found)

    def _sample_ids(self) -> np.ndarray:
        """Sorted ids of the random fitting sample."""
        return np.sort(self._drawn(self.config.curvature_sample))

    def _drawn(self, count: int) -> np.ndarray:
        """The first ids of all in random order: the fitting sample's, then further ones."""
        total = self.source.count
        return drawn(total, count, self.config.seed, "curvature-sample", total)

    def _device(self) -> torch.device:
        if self.capture is not None:
            return self.capture.capture(self.loss).device
        return asked_device(self.config) or torch.device("cpu")


def wants_coarse(config: BuildConfig, count: int) -> bool:
    """Whether an index of `count` rows gets a coarse index."""
    if config.coarse is None:
        return False
    if config.coarse == "auto" and config.store != "coarse":
        return count >= COARSE_FROM and faiss_is_installed()
    return True


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

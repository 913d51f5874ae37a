"""Estimate: disk, memory and time of a build before it starts, from a handful of batches.

Bytes follow from shapes. Time does not: gradients of a few batches are taken and timed as the build takes them, on its
device, and two miniature indexes are built of rows like them, of some of the layers. What each stage costs is the line
through the two, at the number of examples that the stage will see.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture import eigenbases
from ..capture.data import ExampleSource, as_source, first_batch
from ..capture.gradients import GradientBlock, LayerGradient, LayerSpec
from ..capture.heads import HeadOf
from ..capture.losses import PerExample
from ..capture.probes import Probes
from ..capture.seeing import UnseenLoss
from ..capture.sources import (
    GivenGradients,
    ModelCapture,
    ModelGradients,
    asked_device,
    given_specs,
    head_of,
    rewound,
)
from ..capture.spool import Spool
from ..codecs.registry import CODECS, codec_class
from ..config import BuildConfig, CurvatureRows
from ..curvature.fit import CurvatureShape, thinning
from ..errors import ConfigError, LorifError
from ..linalg.projection import Projections
from ..progress import Reporter, peak_memory
from ..ranks import ALONE
from ..storage.fitted import query_bytes
from ..storage.manifest import read_manifest
from .candidates import query_count, wants_coarse
from .choice import chosen_codec, leaving_out, with_floor
from .inputs import Given, check_arguments
from .pipeline import build_index
from .sizes import Shapes
from .timing import projections_line, timed
from .traffic import build_traffic, search_traffic

# Rows of the two miniature indexes: above the default rank of the curvature.
_SMALL, _LARGE = 600, 1200
# A row's numbers in them; beyond, some layers stand for all. A sketch has all of its coordinates of so many.
_NUMBERS = 10_000
# Stages that grow with the layers. The others see a sketch's coordinates, as many of few layers as of many.
_GROWING = ("curvature", "codec", "encode")
_JITTER = 0.3
# Examples whose sides are walked over, to time it.
_WALKED = 8


@dataclass(frozen=True)
class Choice:
    """One way to store rows.

    Attributes:
        settings: of `BuildConfig`, what differs from the config that was asked about.
        bytes_per_example: of a row.
        disk: bytes of the whole index.
        fits: into the budget that was given; True where none was.
    """

    settings: dict[str, Any]
    bytes_per_example: int
    disk: int
    fits: bool


@dataclass(frozen=True)
class RankEstimate:
    """What a build and searches take of each of several ranks.

    Attributes:
        size: how many ranks.
        disk: bytes by part, of a folder of a rank's own; one that all share holds `Estimate.disk`, once.
        temporary: bytes of gradients that a rank has on disk meanwhile.
        memory: most bytes resident at once, the process with its model included; in a shared folder its leader's.
        held: bytes by stage, of what the index needs alone; "search" of an open index.
        seconds: by stage. What travels is not in it: divide `sent` by what the network carries.
        sent: bytes by stage, of the rank that sends most; "scan" and "candidates" of a search for one query.
        published: bytes that rank 0 sends beside, once, where each rank has a folder of its own.
    """

    size: int
    disk: dict[str, int]
    temporary: int
    memory: int
    held: dict[str, int]
    seconds: dict[str, float]
    sent: dict[str, int]
    published: int

    @property
    def seconds_total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate:
    """What a build will take.

    Attributes:
        examples: N.
        codec: by which rows will be written.
        bytes_per_example: of a row.
        disk: bytes by part: "rows", "fit", "coarse", "payloads".
        temporary: bytes of gradients that are on disk meanwhile.
        memory: most bytes resident at once, this process with its model included.
        seconds: by stage, as `Index.build_report` has them.
        choices: other ways to store rows, from few bytes to many.
        ranks: what each of several ranks takes; None where `world_size` is 1. All else is of one process.
    """

    examples: int
    codec: str
    bytes_per_example: int
    disk: dict[str, int]
    temporary: int
    memory: int
    seconds: dict[str, float]
    choices: list[Choice]
    ranks: RankEstimate | None = None

    @property
    def disk_total(self) -> int:
        """Bytes of the finished index."""
        return sum(self.disk.values())

    @property
    def seconds_total(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, sums included."""
        out = dataclasses.asdict(self) | {"disk_total": self.disk_total, "seconds_total": self.seconds_total}
        if self.ranks is not None:
            out["ranks"]["seconds_total"] = self.ranks.seconds_total
        return out


def estimate_build(
    *,
    model: nn.Module | None,
    data: Any,
    gradients: Any,
    loss: PerExample | None,
    config: BuildConfig,
    examples: int | None,
    batches: int,
    disk: int | None,
    payload_bytes: float,
    world_size: int,
    folder: Path | None,
    report: Reporter,
) -> Estimate:
    """See `Index.estimate`."""
    given = {"batches": batches, "examples": examples, "disk": disk, "world_size": world_size}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    check_arguments(model, data, gradients, loss)
    with tempfile.TemporaryDirectory(prefix="lorif-estimate-", dir=folder) as place:
        seen = _Handful(model, data, gradients, loss, config, batches, examples, Path(place))
        count = seen.count
        codec = chosen_codec(seen.config, seen.specs, seen.rows)
        shapes = Shapes(seen.config, seen.specs, codec, wants_coarse(config, count), _curvature_rows(seen, count))
        sizes = shapes.disk(count, payload_bytes)
        with report.stage("estimate") as stage:
            lines = _miniatures(seen, shapes, Path(place), stage.advance)
        now = peak_memory()
        return Estimate(
            examples=count,
            codec=codec,
            bytes_per_example=sizes.row,
            disk={"rows": sizes.rows, "fit": sizes.fit, "coarse": sizes.coarse, "payloads": sizes.payloads},
            temporary=_temporary(config, seen, count),
            memory=now + _most(shapes.memory(count)),
            seconds=_seconds(seen, count, lines),
            choices=_choices(config, seen, count, shapes.coarse, disk, payload_bytes),
            ranks=None if world_size == 1 else _of_ranks(seen, shapes, count, world_size, payload_bytes, now, lines),
        )


Lines = dict[str, Callable[[int], float]]
"""Stage -> seconds as a function of the examples."""


def _of_ranks(
    seen: _Handful, shapes: Shapes, count: int, size: int, payload_bytes: float, now: int, lines: Lines
) -> RankEstimate:
    own = -(-count // size)
    sizes, whole = shapes.disk(own, payload_bytes), shapes.disk(count)
    # Every folder has all calibration queries, and its own rows' codes.
    codes = whole.coarse - (count - own) * whole.code if whole.coarse else 0
    sent, held = build_traffic(shapes, count, size), shapes.memory(count, ranks=size)
    asked = search_traffic(shapes, count, size).most()
    return RankEstimate(
        size=size,
        disk={"rows": sizes.rows, "fit": sizes.fit, "coarse": codes, "payloads": sizes.payloads},
        temporary=_temporary(shapes.config, seen, count, size),
        memory=now + _most(held),
        held=held,
        seconds=_seconds(seen, count, lines, size),
        sent=sent.most() | (asked if shapes.coarse else {"scan": asked["scan"]}),
        published=sizes.fit + max(codes - own * whole.code, 0),
    )


class _Handful:
    """Some batches' gradients, as the build will take them, and how long each way of taking them takes.

    Attributes:
        count: examples that there will be; by default those in the data.
        specs: the layers.
        device: where all is timed: the model's, or the config's.
        each: seconds an example, for its gradient; 0 where no gradient is taken by itself.
        probe: seconds an example, for its rows of the Gauss-Newton matrix, and how many those are; or None.
        together: whether these seconds are for its gradient, too, both by one forward pass.
        sides: seconds to learn the projections, as a function of the examples, and of how many, at most; or None.
        rows: the gradients that were taken.
    """

    def __init__(
        self,
        model: nn.Module | None,
        data: Any,
        gradients: Any,
        loss: PerExample | None,
        config: BuildConfig,
        batches: int,
        examples: int | None,
        folder: Path,
    ) -> None:
        self.config = config
        self.probe: tuple[float, int] | None = None
        self.together, self.each = False, 0.0
        self.rows: list[GradientBlock] = []
        self.sides: tuple[Callable[[int], float], int] | None = None
        if data is None:
            with ExitStack() as stack:
                gradients = rewound(gradients, lambda: folder, stack)
                self.specs = given_specs(gradients, config)
                source: Any = GivenGradients(gradients, Projections(self.specs, config.seed))
                self.count = source.count if examples is None else examples
                self.device = asked_device(config) or torch.device("cpu")
                self.each, self.rows = timed(source.blocks(), batches, self.device)
            return
        there = as_source(data, config.batch_size)
        self.count = there.count if examples is None else examples

        def timed_by(config: BuildConfig) -> ModelCapture:
            self.config = with_floor(config, model, loss, there)  # type: ignore[arg-type]
            capture = ModelCapture(model, self.config)  # type: ignore[arg-type]
            self.specs, self.device = capture.specs, capture.capture(loss).device
            self._time(capture, loss, there, batches)
            return capture

        _, capture = leaving_out(config, model, timed_by)
        config = self.config
        sides = eigenbases.fitted_sides(self.specs, capture.layers) if config.projection == "eigen" else []
        if sides:
            some = min(sum(block.count for block in self.rows[: max(len(self.rows) - 1, 1)]), _WALKED)
            walk = capture.sides(loss, there, np.arange(some, dtype=np.int64))
            self.sides = projections_line(walk, some, self.specs, sides, self.device)

    def _time(self, capture: ModelCapture, loss: PerExample | None, examples: ExampleSource, batches: int) -> None:
        """Takes and times gradients and rows of the Gauss-Newton matrix; gradients by themselves only where the build
        does so, too."""
        config, head, taken = self.config, _head(self.config, loss, capture, examples), capture.capture(loss)

        def seconds(blocks: Iterator[GradientBlock], each: int = 1) -> tuple[float, list[GradientBlock]]:
            """Of an example, all of its blocks together; and its gradients."""
            found, rows = timed(blocks, batches, self.device, each=each, without=lambda: taken.checking)
            return found * each, rows

        sample, source = min(config.sample.size, self.count), ModelGradients(taken, examples)
        self.rows, self.probe, self.together, probed = [], None, False, None
        if head is not None:
            probes = Probes(head, config.sample.probes, config.seed, sample)
            probed = source.probed(probes)
            # How many those are says which examples have some.
            self.probe = 0.0, probes.each
            wanted = sample == self.count or config.curvature != "ggn"
            fit = 4 * sample * (1 + probes.each) * _width(self.specs) <= config.compute.spool_bytes
            self.together = wanted and fit and probes.gives_losses and _probed(self, sample) == sample
        if probed is not None and self.together:
            every = np.arange(examples.count)
            both = itertools.chain.from_iterable(probed.with_losses(every, require_all=True))
            found, self.rows = seconds(both, 1 + probed.probes.each)
            self.probe = found, probed.probes.each
        if not self.together or sample < self.count or wants_coarse(config, self.count):
            self.each, rows = seconds(source.blocks())
            self.rows = self.rows or rows
        if probed is not None and not self.together:
            self.probe = seconds(probed.blocks(), probed.probes.each)[0], probed.probes.each


def _head(config: BuildConfig, loss: PerExample | None, capture: ModelCapture, examples: Any) -> HeadOf | None:
    if config.sample.rows == "stored" or config.curvature == "empirical":
        return None
    try:
        return head_of(loss, capture, lambda: first_batch(examples))
    except UnseenLoss:
        return None


def _line(at: list[int], seconds: list[float]) -> Callable[[int], float]:
    """Through two measurements; a constant part below zero is none."""
    if len(at) < 2:
        return lambda n: seconds[0] * n / at[0]
    slope = max((seconds[1] - seconds[0]) / (at[1] - at[0]), 0.0)
    fixed = max(seconds[0] - slope * at[0], 0.0)
    return lambda n: fixed + slope * n


def _seconds(seen: _Handful, count: int, lines: Lines, ranks: int = 1) -> dict[str, float]:
    """Of one of several ranks: each takes its part of the examples, and what is not of examples is the same for all."""
    config = seen.config
    sample, late = min(count, config.sample.size), config.sample.rows == "stored"
    whole = sample == count

    def own(examples: int) -> int:
        return -(-examples // ranks)

    seconds = {}
    if seen.sides is not None:
        line, most = seen.sides
        seconds["projections"] = line(own(min(sample, most)))
    if not late and not seen.together:
        seconds["sample"] = own(sample) * seen.each
    if seen.probe is not None:
        seconds["sample" if seen.together else "probes"] = own(_probed(seen, sample)) * seen.probe[0]
    for stage, n in (("curvature", _curvature_rows(seen, count)), ("codec", sample), ("sketch", sample)):
        if stage in lines:
            seconds[stage] = lines[stage](own(n))
    seconds["encode"] = lines["encode"](own(count)) + (0.0 if whole and not late else own(count) * seen.each)
    if "coarse" in lines:
        seconds["queries"] = own(query_count(config, query_bytes(seen.specs), count)) * seen.each
    for stage in ("coarse", "calibration"):
        if stage in lines:
            seconds[stage] = lines[stage](own(count))
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _curvature_rows(seen: _Handful, count: int) -> int:
    """Rows that the curvature will be fitted on."""
    if seen.config.sample.rows == "stored":
        return count
    sample = min(count, seen.config.sample.size)
    if seen.probe is None:
        return -(-sample // thinning(sample, seen.specs))
    return _probed(seen, sample) * (seen.probe[1] + (seen.config.curvature != "ggn"))


def _probed(seen: _Handful, sample: int) -> int:
    """Examples of the sample that probes are computed of."""
    if seen.probe is None:
        return 0
    return -(-sample // thinning(sample, seen.specs, seen.probe[1] + (seen.config.curvature != "ggn")))


def _miniatures(seen: _Handful, shapes: Shapes, folder: Path, advance: Callable[[int], None]) -> Lines:
    specs = _some_layers(seen.specs)
    config = dataclasses.replace(
        seen.config,
        projection_dim=None,
        projection="random",
        curvature="empirical",
        curvature_rank=_rank(seen, specs),
        sample=dataclasses.replace(seen.config.sample, size=_LARGE),
        layers=None,
        store=shapes.codec,
        coarse=dataclasses.replace(
            seen.config.coarse,
            kind=_kind(seen.config) if shapes.coarse else "none",
            queries=shapes.queries(_LARGE),
        ),
        compute=dataclasses.replace(seen.config.compute, device=str(seen.device)),
        on_nonfinite="skip",
    )
    with closing(Spool(folder, _alike(seen.rows, specs, _LARGE, seen.config.seed))) as rows:
        taken: list[dict[str, float]] = []
        for size in (_SMALL, _LARGE):
            path = folder / f"miniature-{size}"
            own = None if config.sample.rows == "stored" else CurvatureRows(_First(rows, size))
            given = Given(None, None, _First(rows, size), None, own, config, {}, None, None)
            build_index(path, given, Reporter(), ALONE)
            taken.append(read_manifest(path).report["seconds"])
            advance(size)
    lines = {}
    for stage in taken[0].keys() & taken[1].keys():
        size_of = partial(_products, seen) if stage == "curvature" else _width
        times = size_of(seen.specs) / size_of(specs) if stage in _GROWING else 1.0
        lines[stage] = _line([_SMALL, _LARGE], [times * seconds[stage] for seconds in taken])
    return lines


def _kind(config: BuildConfig) -> str:
    """Of the miniatures' coarse index: they are too small for "auto" to make one."""
    return "pq" if config.coarse.kind == "auto" else config.coarse.kind


def _products(seen: _Handful, specs: dict[str, LayerSpec]) -> int:
    """Of a row with the blocks of directions that the curvature of some layers is found by."""
    shape = CurvatureShape.of(seen.config, len(seen.specs))
    return sum(spec.dim * shape.fit(name, spec.dim, _LARGE, 0, seen.device).block for name, spec in specs.items())


def _width(specs: dict[str, LayerSpec]) -> int:
    """Numbers of a gradient."""
    return sum(spec.dim for spec in specs.values())


def _rank(seen: _Handful, some: dict[str, LayerSpec]) -> int | str | None:
    """Of the miniatures' curvature: few layers would be given more directions each than all of them."""
    asked = seen.config.curvature_rank
    if asked != "auto" or len(some) == len(seen.specs):
        return asked
    shape = CurvatureShape.of(seen.config, len(seen.specs))
    return -(-sum(shape.directions(spec.dim) * spec.dim for spec in some.values()) // _width(some))


class _First:
    """The first rows of a spool, as an iterable that can be walked again."""

    def __init__(self, spool: Spool, count: int) -> None:
        self._spool, self._count = spool, count

    def __iter__(self) -> Iterator[dict[str, LayerGradient]]:
        left = self._count
        for block in self._spool.walk():
            part = block.select(np.arange(min(block.count, left)))
            left -= part.count
            yield dict(part.layers)
            if not left:
                return


def _some_layers(specs: dict[str, LayerSpec]) -> dict[str, LayerSpec]:
    """All layers, or as many as a miniature's row has room for: of each shape in turn, small ones first."""
    room = _NUMBERS
    if _width(specs) <= room:
        return specs
    by_shape: dict[tuple[int, int], list[LayerSpec]] = {}
    for spec in sorted(specs.values(), key=lambda spec: spec.dim):
        by_shape.setdefault((spec.d_in, spec.d_out), []).append(spec)
    turns = [spec for of_turn in itertools.zip_longest(*by_shape.values()) for spec in of_turn if spec is not None]
    chosen: dict[str, LayerSpec] = {}
    for spec in turns:
        if not chosen or spec.dim <= room:
            chosen[spec.name] = spec
            room -= spec.dim
    return chosen


def _alike(rows: list[GradientBlock], specs: dict[str, LayerSpec], count: int, seed: int) -> Iterator[GradientBlock]:
    """Gradients like some, as many as wanted: each a real one, disturbed so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    at = 0
    while at < count:
        for block in rows:
            part = block.select(np.arange(min(block.count, count - at)))
            if not part.count:
                return
            layers = {
                name: LayerGradient([_moved(piece.float().cpu(), generator) for piece in part.layers[name].parts])
                for name in specs
            }
            yield GradientBlock(np.arange(at, at + part.count, dtype=np.int64), layers)
            at += part.count


def _moved(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = values.square().mean().sqrt() + 1e-12
    return values + _JITTER * size * torch.randn(values.shape, generator=generator)


def _temporary(config: BuildConfig, seen: _Handful, count: int, ranks: int = 1) -> int:
    sample = -(-min(count, config.sample.size) // ranks)
    rows = sample + _probed(seen, sample) * (seen.probe[1] if seen.probe is not None else 0)
    if config.sample.rows == "stored":
        return 0
    need = 4 * _width(seen.specs)
    return sum(n * need for n in (sample, rows - sample) if n * need <= config.compute.spool_bytes)


def _most(held: dict[str, int]) -> int:
    """Of a build's stages."""
    return max(size for stage, size in held.items() if stage != "search")


def _choices(
    config: BuildConfig, seen: _Handful, count: int, coarse: bool, disk: int | None, payload_bytes: float
) -> list[Choice]:
    """Ways to store rows, by rising bytes."""
    out = []
    for settings in ({"store": name} | more for name in CODECS for more in codec_class(name).choices()):
        try:
            changed = dataclasses.replace(config, **settings)
            specs = _respecified(seen.specs, changed, "projection_dim" in settings)
            sizes = Shapes(changed, specs, str(settings["store"]), coarse).disk(count, payload_bytes)
        except LorifError:
            # Not with the other choices of this config.
            continue
        out.append(Choice(settings, sizes.row, sizes.total, disk is None or sizes.total <= disk))
    return sorted(out, key=lambda choice: choice.disk)


def _respecified(specs: dict[str, LayerSpec], config: BuildConfig, widths: bool) -> dict[str, LayerSpec]:
    """The layers under another rank or width."""
    out = {}
    for name, spec in specs.items():
        d_in = min(int(config.projection_dim), spec.width_in) if widths else spec.d_in  # type: ignore[arg-type]
        d_out = min(int(config.projection_dim), spec.width_out) if widths else spec.d_out  # type: ignore[arg-type]
        rank = min(d_in, d_out) if config.rank is None else min(config.rank, d_in, d_out)
        out[name] = dataclasses.replace(spec, d_in=d_in, d_out=d_out, rank=rank)
    return out

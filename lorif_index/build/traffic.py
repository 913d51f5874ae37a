"""Traffic: bytes that each of several ranks sends the others, by stage, from shapes and choices alone.

Counted as `Ranks.sent` counts: a sum that all get costs each rank 2 (K - 1) / K of the tensor, one that a single rank
gets the tensor from each of the others, a tensor that one rank spreads once that tensor, a gather K - 1 copies of each
rank's part. What ranks tell each other in words (arguments, errors, the manifest's entries) is left out: some hundred
bytes a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..capture import eigenbases
from ..capture.gradients import LayerSpec
from ..config import BuildConfig
from ..curvature.fit import CurvatureShape
from ..curvature.sides import turns
from ..curvature.sketch import POWER_ITERATIONS, kept_dim, sketch_method, sketch_subspace
from ..linalg.scratch import CPU
from ..linalg.subspace import OVERSAMPLING, SubspaceFit, grouped
from ..ranks import shared_out
from ..search.calibration import KS, SIGNS
from ..search.candidates import guessed, most_proposed
from ..search.coarse import TRAIN_ROWS, codebook_bytes
from .candidates import TILT_QUERIES, TILTS, TRIED_KS, TRIED_RECALLS
from .sizes import Shapes

SEARCHES = ("scan", "candidates")
"""Stages of searches, which are not a build's."""
# Of a row that is proposed or found: its position and its score.
_FOUND = 12


class Traffic:
    """What each of `size` ranks has sent, stage by stage, if it did what it is told.

    Attributes:
        sent: stage -> bytes of each rank.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: dict[str, list[int]] = {}

    def summed(self, stage: str, size: int) -> None:
        """A tensor of so many bytes, summed over all for all."""
        for rank in range(self.size):
            self._add(stage, rank, 2 * (self.size - 1) * size // self.size)

    def reduced(self, stage: str, size: int, to: int) -> None:
        """The same, for rank `to` alone."""
        for rank in range(self.size):
            self._add(stage, rank, size if rank != to else 0)

    def spread(self, stage: str, size: int, source: int) -> None:
        """A tensor that rank `source` gives to all."""
        self._add(stage, source, size if self.size > 1 else 0)

    def moved(self, stage: str, size: int, source: int, to: int) -> None:
        """A tensor from one rank to another."""
        self._add(stage, source, size if source != to else 0)

    def gathered(self, stage: str, size: int) -> None:
        """A tensor of each rank, so large at most, for all."""
        for rank in range(self.size):
            self._add(stage, rank, (self.size - 1) * size)

    def fitted(self, stage: str, fits: Mapping[Any, SubspaceFit], power_iterations: int) -> None:
        """Subspace fits (see `subspace.fit_in_groups`)."""
        for group in grouped(fits):
            owners = shared_out([fit.cost for _, fit in group], self.size)
            for (_, fit), owner in zip(group, owners, strict=True):
                for _ in range(fit.passes(power_iterations) - 1):
                    self.reduced(stage, 4 * fit.dim * fit.block, owner)
                    self.spread(stage, 4 * fit.dim * fit.block, owner)
                self.reduced(stage, fit.last_bytes, owner)
                self.moved(stage, 4 * fit.dim * fit.rank + 8 * min(fit.rank + OVERSAMPLING, fit.block), owner, 0)
            self.summed(stage, 8 * len(group))

    def most(self) -> dict[str, int]:
        """Stage -> bytes of the rank that sends most."""
        return {stage: max(sent) for stage, sent in self.sent.items()}

    def _add(self, stage: str, rank: int, size: int) -> None:
        self.sent.setdefault(stage, [0] * self.size)[rank] += size


def build_traffic(shapes: Shapes, count: int, ranks: int) -> Traffic:
    """Of a build into one folder that all ranks share. Where each has its own, rank 0 also sends what was fitted, once:
    `shapes.disk(...).fit` and the calibration queries.

    Args:
        shapes: of the index.
        count: n, of all ranks.
        ranks: K.
    """
    out, config, specs = Traffic(ranks), shapes.config, shapes.specs
    sample = min(count, config.sample.size)
    rows = 1 << 62 if shapes.curvature_rows is None else shapes.curvature_rows
    if config.projection == "eigen":
        sides = eigenbases.fitted_sides(dict(specs))
        out.fitted("projections", eigenbases.side_fits(dict(specs), sides, 0, CPU), 0)
    _sides(out, specs)
    shape = CurvatureShape.of(config, len(specs))
    fits = {name: shape.fit(name, spec.dim, rows, 0, CPU) for name, spec in specs.items()}
    out.fitted("curvature", fits, config.power_iterations)
    if shapes.rows.summed:
        out.summed("codec", shapes.rows.summed)
    if shapes.coarse:
        _sketch(out, config, shapes.rows.directions, sample)
        _coarse(out, shapes, count, min(config.coarse.dim, shapes.rows.directions, sample))
    return out


def _sides(out: Traffic, specs: Mapping[str, LayerSpec]) -> None:
    """See `sides.fit_sides`, and the sums of the mean squares."""
    sides = [[width for width in (spec.d_in, spec.d_out) if turns(width)] for spec in specs.values()]
    owners = shared_out([float(sum(width**3 for width in widths)) for widths in sides], out.size)
    for spec, widths, owner in zip(specs.values(), sides, owners, strict=True):
        for width in widths:
            out.reduced("curvature", 8 * width**2, owner)
            out.spread("curvature", 4 * width**2, owner)
        out.summed("curvature", 8 * spec.dim)


def _sketch(out: Traffic, config: BuildConfig, total: int, sample: int) -> None:
    """See `sketch.fit_sketch`."""
    if sketch_method(config.coarse.sketch, total) != "pca":
        out.summed("sketch", 8 * total)
        return
    kept = kept_dim(config.coarse.dim, total, sample)
    out.fitted("sketch", {"sketch": sketch_subspace(total, kept, sample, 0, CPU)}, POWER_ITERATIONS)


def _coarse(out: Traffic, shapes: Shapes, count: int, dim: int) -> None:
    """The coarse codes' sample, and their calibration (see `candidates`)."""
    ranks, own, queries = out.size, -(-count // out.size), shapes.queries(count)
    out.gathered("queries", -(-queries // ranks) * (8 + 4 * shapes.width))
    for rank in range(1, ranks):
        out.moved("coarse", 4 * dim * (min(count, TRAIN_ROWS) // ranks), rank, 0)
    out.spread("coarse", codebook_bytes(dim), 0)
    if not queries:
        return
    limit = most_proposed(count)
    proposed, answers = min(limit, own), max(min(KS[-1], count // 10), 1)
    for _ in SIGNS:
        out.gathered("calibration", _FOUND * queries * min(answers + 1, own))
        out.gathered("calibration", _FOUND * proposed * min(TILT_QUERIES, queries) * len(TILTS))
        # Then one query after the other, as deep as any search may go.
        out.gathered("calibration", _FOUND * proposed * queries)
        out.spread("calibration", 8 * answers * queries, 0)
        for k in TRIED_KS:
            for _ in TRIED_RECALLS:
                _pursued(out, "calibration", count, min(k, answers), queries)


def search_traffic(shapes: Shapes, count: int, ranks: int, *, k: int = 10) -> Traffic:
    """Of one search for one query's k best: by "scan", and by "candidates", as many as are taken where nothing was
    calibrated, without going on."""
    out, own = Traffic(ranks), -(-count // ranks)
    asked = shapes.rows.question + (4 * min(shapes.config.coarse.dim, shapes.rows.directions) if shapes.coarse else 0)
    k = min(k, count)
    for way in SEARCHES:
        out.spread(way, asked, 0)
        out.summed(way, 8 * (k + 1))
    out.gathered("scan", _FOUND * min(k, own))
    _pursued(out, "candidates", count, k, 1)
    return out


def _pursued(out: Traffic, stage: str, count: int, k: int, queries: int) -> None:
    """A search for some queries together, by as many rows as are taken where nothing was calibrated (see `pursuit`)."""
    wide = min(guessed(k), most_proposed(count))
    out.gathered(stage, _FOUND * min(wide, -(-count // out.size)) * queries)
    out.summed(stage, 4 * (wide * queries + 1))

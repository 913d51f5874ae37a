"""Traffic: bytes that each of several ranks sends the others, by stage, from shapes and choices alone.

Counted as `Ranks.sent` counts: a sum that all get costs each rank 2 (K - 1) / K of the tensor, one that a single rank
gets the tensor from each of the others, a tensor that one rank spreads once that tensor, a gather K - 1 copies of each
rank's part. What ranks tell each other in words (arguments, errors, the manifest's entries) is left out: some hundred
bytes a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..capture import eigenbases
from ..capture.gradients import LayerSpec
from ..config import BuildConfig
from ..curvature.sketch import POWER_ITERATIONS, sketch_method
from ..linalg.subspace import OVERSAMPLING, SubspaceFit, grouped
from ..ranks import shared_out
from ..search.calibration import KS, SIGNS
from ..search.candidates import guessed, most_proposed
from ..search.coarse import TRAIN_ROWS
from .coarse_build import TILT_QUERIES, TILTS, TRIED_KS, TRIED_RECALLS
from .sizes import (
    CurvatureShape,
    curvature_shapes,
    directions_in_all,
    directions_kept,
    fit_sizes,
    query_count,
    trained_bytes,
)

_CPU = torch.device("cpu")
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
                self.reduced(stage, 8 * fit.block**2, owner)
                self.moved(stage, 4 * fit.dim * fit.rank + 8 * min(fit.rank + OVERSAMPLING, fit.block), owner, 0)
            self.summed(stage, 8 * len(group))

    def most(self) -> dict[str, int]:
        """Stage -> bytes of the rank that sends most."""
        return {stage: max(sent) for stage, sent in self.sent.items()}

    def _add(self, stage: str, rank: int, size: int) -> None:
        self.sent.setdefault(stage, [0] * self.size)[rank] += size


def build_traffic(
    config: BuildConfig,
    specs: dict[str, LayerSpec],
    stored: str,
    count: int,
    ranks: int,
    *,
    coarse: bool = True,
    curvature_rows: int | None = None,
) -> Traffic:
    """Of a build into one folder that all ranks share. Where each has its own, rank 0 also sends what was fitted, once:
    `disk_sizes(...).fit` and the calibration queries.

    Args:
        config: the choices, with a number for `projection_floor`.
        specs, stored, coarse: as in `disk_sizes`.
        count: n, of all ranks.
        ranks: K.
        curvature_rows: that the curvature is fitted on, of all ranks; None: as many as its rank needs.
    """
    out = Traffic(ranks)
    sample = min(count, config.curvature_sample)
    rows = 1 << 62 if curvature_rows is None else curvature_rows
    shapes = curvature_shapes(config, specs, stored)
    kept = directions_kept(config, specs, stored, rows)
    if config.projection == "eigen":
        sides = eigenbases.fitted_sides(specs)
        out.fitted("projections", eigenbases.side_fits(specs, sides, 0, _CPU), eigenbases.POWER_ITERATIONS)
    _grids(out, specs, shapes)
    fits = {}
    for name, shape in shapes.items():
        dim, size = specs[name].dim, shape.products
        fits[name] = SubspaceFit((), shape.height(dim), shape.rank, rows, 0, _CPU, whole_up_to=size)
    out.fitted("curvature", fits, config.power_iterations)
    if stored == "eigen":
        out.summed("eigencodes", 8 * directions_in_all(config, specs, stored, rows))
    if fit_sizes(config, specs, stored, coarse=coarse)["sketch"]:
        _sketch(out, config, kept, sample)
    if coarse or stored == "coarse":
        _coarse(out, config, specs, stored, count, min(config.sketch_dim, kept, sample))
    return out


def _grids(out: Traffic, specs: Mapping[str, LayerSpec], shapes: Mapping[str, CurvatureShape]) -> None:
    """See `grid.fit_grids`, and the sums of the diagonals."""
    within = {name: shape for name, shape in shapes.items() if shape.products}
    sides = [(specs[name].d_in, specs[name].d_out) for name in within]
    owners = shared_out([float(a**3 + b**3) for a, b in sides], out.size)
    for (a, b), owner, shape in zip(sides, owners, within.values(), strict=True):
        out.reduced("curvature", 8 * (a * a + b * b), owner)
        out.spread("curvature", 4 * (a * a + b * b), owner)
        out.summed("curvature", 8 * a * b)
        out.spread("curvature", 8 * (shape.products + shape.diagonal), 0)
        out.summed("curvature", 8 * shape.diagonal)


def _sketch(out: Traffic, config: BuildConfig, total: int, sample: int) -> None:
    """See `sketch.fit_sketch`."""
    if sketch_method(config.sketch, total) != "pca":
        out.summed("sketch", 8 * total)
        return
    kept = min(config.sketch_dim, total, sample)
    kept = kept // 8 * 8 if kept >= 8 else kept
    out.fitted("sketch", {"sketch": SubspaceFit((), total, kept, sample, 0, _CPU)}, POWER_ITERATIONS)


def _coarse(
    out: Traffic, config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str, count: int, dim: int
) -> None:
    """The coarse index's sample, and its calibration (see `coarse_build`)."""
    ranks, own = out.size, -(-count // out.size)
    queries = query_count(config, specs, count)
    out.gathered("queries", -(-queries // ranks) * (8 + 4 * sum(spec.dim for spec in specs.values())))
    for rank in range(1, ranks):
        out.moved("coarse", 4 * dim * (min(count, TRAIN_ROWS) // ranks), rank, 0)
    out.spread("coarse", trained_bytes(dim), 0)
    if not queries:
        return
    limit = most_proposed(count)
    proposed, answers = min(limit, own), max(min(KS[-1], count // 10), 1)
    for _ in SIGNS:
        out.gathered("calibrate", _FOUND * queries * min(answers + 1, own))
        out.gathered("calibrate", _FOUND * proposed * min(TILT_QUERIES, queries) * len(TILTS))
        # Then one query after the other, as deep as any search may go.
        out.gathered("calibrate", _FOUND * proposed * queries)
        if stored == "both":
            out.summed("calibrate", 8 * (limit + answers) * queries)
        for k in TRIED_KS:
            for _ in TRIED_RECALLS:
                _pursued(out, "calibrate", stored, count, min(k, answers), queries)


def search_traffic(
    config: BuildConfig, specs: Mapping[str, LayerSpec], stored: str, count: int, ranks: int, *, k: int = 10
) -> Traffic:
    """Of one search for one query's k best: by "scan", and by "candidates", as many as are taken where nothing was
    calibrated, without going on."""
    out, own = Traffic(ranks), -(-count // ranks)
    kept = directions_kept(config, specs, stored)
    asked = 4 * min(config.sketch_dim, kept)
    if stored == "eigen":
        asked += 4 * kept
    elif stored in ("both", "factors"):
        asked += 4 * sum(spec.dim for spec in specs.values())
    k = min(k, count)
    for way in SEARCHES:
        out.spread(way, asked, 0)
        out.summed(way, 8 * (k + 1))
    out.gathered("scan", _FOUND * min(k, own))
    _pursued(out, "candidates", stored, count, k, 1)
    return out


def _pursued(out: Traffic, stage: str, stored: str, count: int, k: int, queries: int) -> None:
    """A search for some queries together, by as many rows as are taken where nothing was calibrated (see `pursuit`)."""
    wide, deep = (min(rows, most_proposed(count)) for rows in guessed(k))
    deep = deep if stored == "both" else wide
    out.gathered(stage, _FOUND * min(wide, -(-count // out.size)) * queries)
    if stored in ("both", "coordinates"):
        out.summed(stage, 8 * (wide * queries + 1))
    if stored == "both":
        out.spread(stage, 8 * deep * queries, 0)
    if stored != "coordinates":
        out.summed(stage, 4 * (deep * queries + 1))

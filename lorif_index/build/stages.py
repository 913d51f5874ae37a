"""Stages: what a build does, in order; each fits or writes one thing and leaves it sealed.

A stage's name, its entry in the manifest, its file and its time in the report are one word. Over several ranks each
takes the gradients of its part of the examples, of the sample for what is fitted and of the rest for its shards; sums
come together (see `linalg.subspace`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..capture import eigenbases
from ..capture.gradients import GradientSource, finite_blocks
from ..capture.sharded import evened
from ..capture.sources import curvature_source
from ..codecs.base import Fitting
from ..codecs.registry import codec_class
from ..curvature.fit import CurvatureShape, Part, RowPass, fit_curvature, mix
from ..curvature.inverse import inverses
from ..errors import DataError
from ..ranks import share
from ..search.reader import codec_of
from ..search.rows import IndexRows
from ..storage.fitted import FittedProjections, save_curvature, save_projections
from ..storage.store import StoreWriter
from .choice import MEASURED, chosen_codec, is_open
from .encode import encode_blocks
from .inputs import Inputs
from .sample import SampleRows
from .spans import some_of, unsealed, within
from .state import BuildState

# Of the mixed curvature's trace (of 1/4, 1/2 and 3/4; chosen on digits and Fashion-MNIST, held on sequences:
# `docs/quality.md`).
_EMPIRICAL_SHARE = 0.25


def fit_projections(inputs: Inputs, state: BuildState, sample: SampleRows) -> None:
    """Learns the projections, by a first pass over some of the sample, where they are learnt and not known yet."""
    if inputs.config.projection == "eigen" and "projections" not in state.manifest.fits:
        layers = inputs.capture.layers if inputs.capture is not None else []
        sides = eigenbases.fitted_sides(inputs.specs, layers)
        if sides:

            def walk_of(examples: int) -> eigenbases.Walk:
                given = inputs.walk_sides(state.own(np.sort(sample.drawn(examples))), sides)
                return lambda sink: given(sink if state.data.first else lambda _, rows: None)

            size = min(inputs.config.sample.size, inputs.source.count)
            if size > eigenbases.LEAST:
                counted = eigenbases.COUNTED
                enough = eigenbases.enough(walk_of(counted), counted, inputs.specs, sides, state.ranks)
                size = min(enough, size)
            walk = walk_of(size)
            with state.stage("projections") as stage:
                found = eigenbases.fit_eigenbases(
                    walk, inputs.specs, sides, inputs.config.seed, inputs.device, stage, state.ranks
                )
            state.publish("projections", lambda name: save_projections(state.path, name, found, inputs.specs))
    use_projections(inputs, state)


def use_projections(inputs: Inputs, state: BuildState) -> None:
    """Puts the learnt projections, if there are some, to use."""
    if "projections" in state.manifest.fits:
        learnt = FittedProjections(state.path, state.manifest.fits["projections"], inputs.specs)
        state.stack.callback(learnt.file.close)
        inputs.projections.use(learnt)


def choose_codec(inputs: Inputs, state: BuildState, sample: SampleRows) -> None:
    """Decides which codec rows are written by, where that is not known yet."""
    if state.manifest.codec is not None:
        return
    if not is_open(inputs.config, inputs.specs):
        state.manifest.codec = chosen_codec(inputs.config, inputs.specs, ())
    else:
        rows, _ = sample.gradients()
        found = None
        with state.ranks.jointly():
            if sample.on_disk:
                few = rows()
            else:
                # All ranks take the same gradients: passes of a sharded model are one of all of them.
                taken = inputs.source.sample(sample.ids[:MEASURED])
                few = finite_blocks(taken, inputs.config.on_nonfinite, [])
            found = chosen_codec(inputs.config, inputs.specs, few)
        state.manifest.codec = str(state.ranks.told(found))
    state.note()


def fit_curvature_before(inputs: Inputs, state: BuildState, sample: SampleRows) -> None:
    """Curvature from the user's rows, from probes, or from unfactored gradients of the sample."""
    if "curvature" in state.manifest.fits or inputs.curvature_last:
        return
    spool = None
    if inputs.curvature is not None:
        source = curvature_source(
            inputs.curvature, inputs.capture, inputs.loss, inputs.projections, state.path, state.stack
        )
        every = np.arange(source.count, dtype=np.int64)
        rows, count, spool, _ = sample.walkable("rows", source, state.own(every), True)
        part = Part(rows, count, count / inputs.curvature.rows_per_example, 1.0)
    elif sample.probed is not None:
        rows, count, spool = sample.curvature_rows()
        part = Part(rows, count, count / sample.probed.probes.rows_per_example, 1.0 - _EMPIRICAL_SHARE)
        if inputs.curvature_kind == "mixed":
            rows, count = sample.gradients(sample.step)
            part = mix([part, Part(rows, count, count, _EMPIRICAL_SHARE)], inputs.specs, state.ranks)
    else:
        rows, count = sample.gradients()
        part = Part(rows, count, count, 1.0)
    _fit_curvature(inputs, state, part.rows, part.count, part.examples)
    if spool is not None:
        spool.close()


def fit_curvature_after(inputs: Inputs, state: BuildState) -> None:
    """The published order: curvature from all stored rows, after they were written."""
    if "curvature" not in state.manifest.fits:
        rows = index_rows(inputs, state)
        _fit_curvature(inputs, state, rows.gradients(), len(rows.team), len(rows.team))


def _fit_curvature(inputs: Inputs, state: BuildState, rows: RowPass, count: int, examples: float) -> None:
    config = inputs.config
    with state.stage("curvature") as stage:
        fitted = fit_curvature(
            rows,
            count,
            inputs.specs,
            shape=CurvatureShape.of(config, len(inputs.specs)),
            power_iterations=config.power_iterations,
            seed=config.seed,
            examples=examples,
            stage=stage,
            device=inputs.device,
            ranks=state.ranks,
        )

    def save(name: str) -> dict[str, Any]:
        # Found out now rather than at the first search.
        inverses(fitted, config.policy)
        return save_curvature(state.path, name, fitted)

    state.publish("curvature", save)


def fit_codec(inputs: Inputs, state: BuildState, sample: SampleRows) -> None:
    """What rows are written with."""
    if "codec" in state.manifest.fits:
        return
    kind, config = codec_class(str(state.manifest.codec)), inputs.config
    curvature = state.curvature() if "curvature" in kind.depends_on else {}
    preconditioners = inverses(curvature, config.policy)
    with state.stage("codec") as stage:
        codec = kind.fit(
            Fitting(
                inputs.specs, config, curvature, preconditioners, sample.gradients, stage, inputs.device, state.ranks
            )
        )
    state.publish("codec", lambda name: codec.save(state.path, name))


def encode(inputs: Inputs, state: BuildState, sample: SampleRows) -> int:
    """One pass: gradients -> rows -> shards; how many (example, layer) gradients became zero in it."""
    manifest, config, ranks = state.manifest, inputs.config, state.ranks
    codec = codec_of(state.path, manifest, state.curvature() if "curvature" in manifest.fits else None)
    encoder = codec.encoder(inputs.device)
    # What is not sealed anywhere, and this rank's part of it.
    sealed = [span for spans in ranks.gather_values([s.span for s in manifest.shards]) for span in spans]
    left = unsealed(sealed, inputs.source.count)
    total = sum(stop - start for start, stop in left)
    mine = some_of(left, share(total, state.data.index, state.data.count))
    if inputs.capture is not None and sample.spool is None:
        mine = evened(inputs.capture.model, mine, (0, 0))
    known = sample.skipped if sample.spool is not None else manifest.skipped
    skipped = [i for i in known if sample.spool is not None or not within(left, i)]
    base = manifest.next_file
    writer = StoreWriter(
        state.path,
        codec.row_bytes,
        config.compute.shard_bytes,
        manifest.shards,
        manifest.naming("shard", ranks.rank, ranks.size),
    )

    def on_sealed() -> None:
        # What is left may lie between what was sealed before.
        manifest.shards.sort(key=lambda shard: shard.first_id)
        manifest.skipped = sorted(skipped)
        state.note_shards()

    with state.stage("encode", sum(stop - start for start, stop in mine)) as stage, ranks.jointly():
        for start, stop in mine:
            source: GradientSource = inputs.source if sample.spool is None else sample.spool
            blocks = finite_blocks(source.blocks(start, stop), config.on_nonfinite, skipped)
            spoken = state.spoken_for(blocks)
            encode_blocks(spoken, encoder, writer, stage, on_sealed, window=source.window, payloads=inputs.payloads)
        on_sealed()
    vanished = ranks.count(encoder.vanished)
    state.bring_together(skipped, base)
    if not state.row_count():
        raise DataError(f"no example is left to index: all {inputs.source.count} were skipped for inf or NaN")
    return vanished


def index_rows(inputs: Inputs, state: BuildState) -> IndexRows:
    """The rows that were written."""
    curvature = state.curvature() if "curvature" in state.manifest.fits else None
    codec = codec_of(state.path, state.manifest, curvature)
    rows = IndexRows(state.path, state.manifest, codec, seed=inputs.config.seed, ranks=state.ranks)
    state.stack.callback(rows.close)
    return rows

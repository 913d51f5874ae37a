"""Pipeline: a build from what was given to an index: fit what is shared on a sample, then encode each example once.

projections -> codec's choice -> curvature -> codec -> encode -> sketch, queries, coarse, calibration -> manifest. Each
stage leaves its result sealed, so that the same call goes on after an interruption. The published recipe fits the
curvature last, from all stored rows.
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..capture.gradients import finite_blocks
from ..capture.sharded import DataRanks, data_ranks, is_spread
from ..curvature.inverse import Preconditioner, inverses
from ..errors import ConfigError, CurvatureError, StoreError
from ..linalg.scratch import CPU
from ..progress import Reporter, peak_memory
from ..ranks import Ranks
from ..search.contents import measure_duplicates
from ..search.reader import policy_for
from ..search.rows import IndexRows
from ..storage.damage import folder_bytes
from ..storage.manifest import Manifest
from .candidates import Making, Queries, make_candidates, wants_coarse
from .coverage import EXAMPLES, measure_coverage
from .inputs import Given, Inputs, take, without
from .outliers import measure_outliers
from .sample import SampleRows
from .sizes import REMEDIES, Shapes, memory_of
from .stages import (
    choose_codec,
    encode,
    fit_codec,
    fit_curvature_after,
    fit_curvature_before,
    fit_projections,
    index_rows,
)
from .state import BuildState, check_free

# A share of the gradient below which a build warns.
_HALF = 0.5


def build_index(path: Path, given: Given, reporter: Reporter, ranks: Ranks) -> bool:
    """Builds, or goes on building, the index at `path`. See `Index.build`.

    Returns:
        whether all of it is in that folder; else each rank's folder has a part.
    """
    with ExitStack() as stack:
        inputs, state = begin_index(path, given, reporter, ranks, stack)
        return finish_index(given, inputs, state)


def begin_index(
    path: Path, given: Given, reporter: Reporter, ranks: Ranks, stack: ExitStack, mark: dict[str, Any] | None = None
) -> tuple[Inputs, BuildState]:
    """Checks what was given, and makes the folder an unfinished build's, or finds what is done in it.

    Args:
        stack: gives up what is held.
        mark: further facts that an unfinished build is found by.
    """
    with ranks.jointly("begin"):
        given.check()
        check_free(path)
    data = DataRanks(ranks.rank, ranks.size, True)
    if given.model is not None and ranks.everyone:
        data = data_ranks(given.model)
    state = BuildState(path, ranks, data, reporter, stack)
    with ranks.jointly():
        inputs = take(given, state.claim, stack)
    if mark:
        inputs = replace(inputs, fingerprint=inputs.fingerprint | mark)
    ranks.agree("what is built", inputs.fingerprint)
    _check_memory(inputs, ranks)
    layers = list(inputs.specs.values())
    fresh = Manifest(inputs.fingerprint, inputs.asked.to_json(), layers, metadata=given.metadata)
    fresh.next_id = fresh.fitted_ids = inputs.source.count
    state.begin(fresh, inputs.fit)
    return inputs, state


def finish_index(given: Given, inputs: Inputs, state: BuildState) -> bool:
    """Does what is left of a build, as `build_index`."""
    inputs, sample = _fit(given, inputs, state)
    fit_codec(inputs, state, sample)
    vanished = encode(inputs, state, sample)
    fit_curvature_after(inputs, state)
    rows = index_rows(inputs, state)
    if wants_coarse(inputs.config, state.row_count()):
        _make_candidates(inputs, state, sample, rows)
    _report(inputs, state, sample, rows, vanished)
    # Until now that of what was asked for, by which the same call finds an unfinished build.
    state.manifest.fingerprint = inputs.fingerprint
    state.commit()
    return state.home.folders == 1


def _fit(given: Given, inputs: Inputs, state: BuildState) -> tuple[Inputs, SampleRows]:
    """Projections, the codec's choice and the curvature. Layers that were chosen by default and have no gradient in the
    whole sample, as experts that no token is routed to, are left out, with a warning."""
    there = {spec.name for spec in state.manifest.layers}
    idle = tuple(name for name in inputs.specs if name not in there)
    while True:
        if idle:
            inputs = without(given, inputs, idle)
            state.manifest.layers, state.manifest.config = list(inputs.specs.values()), inputs.asked.to_json()
        sample = SampleRows(inputs, state)
        try:
            fit_projections(inputs, state, sample)
            choose_codec(inputs, state, sample)
            _check_disk(inputs, state)
            fit_curvature_before(inputs, state, sample)
            return inputs, sample
        except CurvatureError as error:
            idle = error.idle
            by_default = inputs.capture is not None and inputs.curvature is None and inputs.asked.layers.by_default
            if not idle or not by_default or not set(idle) < set(inputs.specs):
                raise
            warnings.warn(f"left out: {error}", stacklevel=5)
            # These are by the layers' numbers.
            state.manifest.fits.pop("projections", None)
            state.manifest.codec = None


def _check_memory(inputs: Inputs, ranks: Ranks) -> None:
    """Refuses, before anything is written, what the memory cannot hold.

    Raises:
        ConfigError: a stage that takes more, both sizes, and the setting that mends it.
    """
    count, config = inputs.source.count, inputs.config
    # What "auto" gives is found out later, from the sample.
    codec = "eigen" if config.store == "auto" else config.store
    sizes = Shapes(config, inputs.specs, codec, wants_coarse(config, count))
    taken = sizes.memory(count, ranks=ranks.size)
    with ranks.jointly():
        for stage, size in taken.items():
            room = memory_of(inputs.device if stage in ("gradients", "curvature") else CPU)
            if size > room:
                raise ConfigError(
                    f"the stage {stage!r} would take {size:,} bytes of memory, and there are {room:,}: "
                    f"{REMEDIES[stage]}"
                )


def _check_disk(inputs: Inputs, state: BuildState) -> None:
    """Refuses early what the disk cannot hold.

    Raises:
        StoreError: both sizes, and what to turn.
    """
    count = -(-inputs.source.count // state.home.folders)
    coarse = wants_coarse(inputs.config, count)
    sizes = Shapes(inputs.config, inputs.specs, str(state.manifest.codec), coarse).disk(count)
    with state.ranks.jointly():
        there = folder_bytes(state.path)
        free = shutil.disk_usage(state.path).free
        if sizes.total - there > free:
            raise StoreError(
                f"the index will take {sizes.total:,} bytes ({sizes.row:,} an example), {state.path} has {there:,} "
                f"of them, and its disk has {free:,} free: choose another disk, or smaller rows (lorif estimate "
                "shows choices)"
            )


def _make_candidates(inputs: Inputs, state: BuildState, sample: SampleRows, rows: IndexRows) -> None:
    def queries(most: int) -> Queries:
        return _calibration_queries(inputs, state, sample, most)

    making = Making(
        state.path,
        state.manifest,
        inputs.config,
        state.curvature(),
        rows,
        state.publish,
        state.stage,
        queries,
        note=state.note,
        device=inputs.device,
    )
    make_candidates(making)


def _calibration_queries(inputs: Inputs, state: BuildState, sample: SampleRows, most: int) -> Queries:
    """Unfactored gradients of training examples as queries, on all ranks: outside of the fitting sample, which would be
    easier to answer, where there are others."""
    size, ranks, specs = inputs.config.sample.size, state.ranks, inputs.specs
    drawn = sample.drawn(size + most)
    others = drawn[size:]
    chosen = state.own(np.sort(others if len(others) == most else drawn[:most]))
    ids, parts = [np.empty(0, np.int64)], []
    with ranks.jointly():
        taken = finite_blocks(inputs.source.sample(chosen), inputs.config.on_nonfinite, [])
        for block in state.spoken_for(taken):
            ids.append(block.ids)
            parts.append({name: g.dense().float().cpu() for name, g in block.layers.items()})
    empty = {name: torch.empty(0, spec.d_in, spec.d_out) for name, spec in specs.items()}
    mine = {name: torch.cat([empty[name], *(p[name] for p in parts)]) for name in specs}
    every = {n: torch.from_numpy(np.concatenate(ranks.gather(g.numpy()))) for n, g in mine.items()}
    return np.concatenate(ranks.gather(np.concatenate(ids))), every


def _report(inputs: Inputs, state: BuildState, sample: SampleRows, rows: IndexRows, vanished: int) -> None:
    """What the manifest says of the build."""
    manifest, ranks = state.manifest, state.ranks
    preconditioners = inverses(state.curvature(), policy_for(manifest, rows.codec, inputs.config.damping))
    seconds = manifest.report.get("seconds", {})
    for stage, value in state.reporter.seconds.items():
        seconds[stage] = round(seconds.get(stage, 0.0) + value, 6)
    manifest.report = {
        "seconds": seconds,
        "rows": state.row_count(),
        "examples": inputs.source.count,
        "skipped": len(manifest.skipped),
        "vanished": vanished,
        "row_bytes": rows.codec.row_bytes,
        "peak_rss_bytes": peak_memory(),
        "torch": torch.__version__,
        "coverage": _coverage(inputs, state, sample, rows, preconditioners),
        "outliers": measure_outliers(rows, preconditioners),
        "duplicates": measure_duplicates(rows),
    }
    _say_duplicates(manifest.report["duplicates"], state.row_count())
    if ranks.size > 1:
        # What each rank has sent the others, and how much memory it took.
        manifest.report["ranks"] = {
            "size": ranks.size,
            "folders": state.home.folders,
            "sent_bytes": ranks.gather_values(dict(ranks.sent)),
            "peak_rss_bytes": ranks.gather_values(manifest.report["peak_rss_bytes"]),
        }


def _say_duplicates(found: dict[str, Any] | None, rows: int) -> None:
    if found is not None and found["examples"]:
        about = "" if found["looked_at"] == 1 else "about "
        warnings.warn(
            f"{about}{found['examples']:,} of {rows:,} examples are copies of others (such as {found['first'][0]}): "
            "they have the same scores, and stand side by side in an answer. index.duplicates() gives all of them",
            stacklevel=6,
        )


def _coverage(
    inputs: Inputs,
    state: BuildState,
    sample: SampleRows,
    rows: IndexRows,
    preconditioners: dict[str, Preconditioner],
) -> dict[str, Any] | None:
    """What rank 0 keeps of gradients of some of its rows; nothing where a pass of the model takes several ranks."""
    found, capture = None, inputs.capture
    with state.ranks.jointly():
        if state.ranks.first and capture is not None and not is_spread(capture.model):
            ids = sample.drawn(EXAMPLES * state.ranks.size)
            here = ids[rows.store.positions_of(ids) >= 0][:EXAMPLES]
            found = measure_coverage(rows, preconditioners, capture, inputs.loss, inputs.examples, here)
    if found is not None and found["differing"]:
        warnings.warn(
            f"captured gradients of layers {found['differing'][:4]} are not autograd's: the model uses their "
            "weights without calling the modules, which is not seen, so that their share of scores is wrong. Leave "
            "them out (layers=LayerSelection(exclude=...)), or let the model call a module",
            stacklevel=6,
        )
    # A model that is frozen whole does not say what was trained: adapters alone, perhaps.
    unsaid = capture is None or not any(p.requires_grad for p in capture.model.parameters())
    tracked = None if found is None or unsaid or not inputs.asked.layers.by_default else found["tracked"]
    if found is not None and tracked is not None and tracked < _HALF:
        warnings.warn(
            f"the tracked layers hold {tracked:.2g} of the squared norm of gradients, others, by their modules' class, "
            f"{found['untracked']}: what these learnt is not seen. Track embeddings with "
            "layers=LayerSelection(embeddings=True); see `lorif info --all`",
            stacklevel=6,
        )
    elif found is not None and tracked is not None and found["unknown"]:
        shares = {kind: found["untracked"][kind] for kind in found["unknown"]}
        warnings.warn(
            f"{shares} of the squared norm of gradients are in parameters of modules that are no linear maps, and are "
            "not tracked: what these learnt is not seen. Track norms with layers=LayerSelection(norms=True)",
            stacklevel=6,
        )
    return state.ranks.told(found)

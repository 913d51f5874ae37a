"""Refit: curvature, sketch and coarse index renewed from what is stored, without the model.

Factors are gradients, so that everything can be fitted on them again. Eigencodes and coordinates are written in the
directions of the curvature they were encoded with: they keep it, and what approximates them is renewed.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch

from ..build.coarse_build import (
    make_coarse,
    random_positions,
    recalibrate,
    sketch_of_rows,
    stored_blocks,
    stored_queries,
)
from ..build.pipeline import stored_gradients
from ..build.sizes import curvature_shapes
from ..curvature.fit import fit_curvature
from ..curvature.inverse import Preconditioner
from ..progress import Reporter
from ..search.coarse import default_factory, faiss_is_installed
from ..search.reader import Reader
from ..storage.fitted import save_curvature, save_queries, save_sketch
from ..storage.manifest import Manifest

_BOUND = "rows are written in the directions of the curvature they were encoded with"


def refit_index(reader: Reader, report: Reporter) -> tuple[Manifest | None, dict[str, Any]]:
    """Renews what can be renewed, and commits; the writer's lock is held.

    Args:
        reader: of the newest version.
        report: is told.

    Returns:
        the next version, or None where nothing can be renewed; and {"renewed": names, "kept": {name: why}}.
    """
    renewed: list[str] = []
    kept: dict[str, str] = {}
    manifest = dataclasses.replace(reader.manifest)
    if reader.representation == "factors":
        renew_curvature(reader, manifest, report)
        renewed.append("curvature")
    else:
        kept["curvature"] = f"{_BOUND}: build anew to renew it"
        if reader.representation in ("both", "coordinates", "coarse"):
            kept["sketch"] = "coordinates of unfactored gradients cannot be taken again from what is stored"
    if reader.representation == "coarse":
        kept["coarse"] = "it is all that is stored of the rows"
        return None, {"renewed": renewed, "kept": kept}
    if reader.manifest.coarse is None or not faiss_is_installed():
        if "curvature" not in renewed:
            return None, {"renewed": renewed, "kept": kept}
        manifest.sketch = manifest.coarse = manifest.queries = manifest.calibration = None
        manifest.commit(reader.folder)
        return manifest, {"renewed": renewed, "kept": kept}
    manifest.coarse = manifest.calibration = None
    if reader.representation in ("factors", "eigen"):
        with report.stage("sketch") as stage:
            bare = Reader(reader.folder, manifest)
            sketch = sketch_of_rows(bare, stage, torch.device("cpu"))
            manifest.sketch = save_sketch(reader.folder, sketch, manifest.new_name("sketch"))
            bare.close()
        renewed.append("sketch")
    _renew_queries(reader, manifest)
    bare = Reader(reader.folder, manifest)
    factory = str(reader.manifest.coarse["factory"])
    if reader.config.coarse == "auto":
        factory = default_factory(bare.sketch.dim, bare.live_count)  # type: ignore[union-attr]
    with report.stage("coarse", len(bare.store)) as stage:
        manifest.coarse = make_coarse(bare, factory, stage)
    bare.close()
    renewed.append("coarse")
    return recalibrate(Reader(reader.folder, manifest), None, report), {"renewed": renewed, "kept": kept}


def renew_curvature(reader: Reader, manifest: Manifest, report: Reporter) -> None:
    """Fits the curvature on the stored factors of the living rows, into the manifest."""
    store, config = reader.store, reader.config
    most = store.live_count if config.curvature_rows == "factors" else config.curvature_sample
    chosen, _ = random_positions(reader, "curvature-sample", most)
    everything = len(chosen) == len(store)
    with report.stage("curvature") as stage:
        fitted = fit_curvature(
            partial(stored_gradients, store) if everything else partial(stored_blocks, store, chosen),
            len(chosen),
            reader.specs,
            rank={n: shape.rank for n, shape in curvature_shapes(config, reader.specs, "factors").items()},
            power_iterations=config.power_iterations,
            seed=config.seed,
            examples=len(chosen),
            stage=stage,
            device=torch.device("cpu"),
        )
    for name, layer in fitted.items():
        # Found out now rather than at the first search.
        Preconditioner.of(name, layer, config.damping, config.complement)  # type: ignore[arg-type]
    manifest.curvature, manifest.curvature_layers = save_curvature(
        reader.folder, fitted, manifest.new_name("curvature")
    )
    manifest.fingerprint = manifest.fingerprint | {"curvature": "factors"}
    manifest.fitted_ids = manifest.next_id


def _renew_queries(reader: Reader, manifest: Manifest) -> None:
    """Calibration queries that were removed are replaced, where rows can stand for them."""
    if reader.queries is not None:
        ids = reader.queries.ids()
        if np.isin(ids, reader.store.live_ids).all():
            return
    ids, gradients = stored_queries(reader, reader.config.calibration_queries)
    manifest.queries = save_queries(reader.folder, ids, gradients, manifest.new_name("calibration"))

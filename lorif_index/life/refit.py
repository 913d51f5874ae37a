"""Refit: curvature, sketch and coarse index renewed from what is stored, without the model.

Rows that outlive their curvature are gradients, so that everything can be fitted on them again. Others are written in
the directions of the curvature they were encoded with: they keep it, and what approximates them is renewed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..curvature.fit import CurvatureShape, fit_curvature
from ..curvature.inverse import inverses
from ..linalg.scratch import CPU
from ..progress import Reporter
from ..search.coarse import faiss_is_installed
from ..search.reader import Reader, config_of
from ..search.rows import IndexRows
from ..storage.fitted import save_curvature
from ..storage.manifest import Manifest
from .candidates import renew_candidates

_BOUND = "rows are written in the directions of the curvature they were encoded with: build anew to renew it"


def refit_index(reader: Reader, report: Reporter) -> dict[str, Any]:
    """Renews what can be renewed, and commits; the writer's lock is held.

    Args:
        reader: of the newest version.
        report: is told.

    Returns:
        {"renewed": names, "kept": {name: why}}.
    """
    bound = "curvature" in reader.codec.depends_on
    renewed, kept = [] if bound else ["curvature"], {"curvature": _BOUND} if bound else {}
    with_coarse = reader.manifest.coarse is not None and faiss_is_installed()
    if bound and not with_coarse:
        return {"renewed": renewed, "kept": kept}
    manifest = reader.manifest.copy()
    manifest.coarse = manifest.calibration = None
    manifest.fits.pop("sketch", None)
    if not bound:
        renew_curvature(reader.rows, manifest, report)
    if with_coarse:
        if reader.queries is not None and not np.isin(reader.queries.ids(), reader.store.live_ids).all():
            # Queries that were removed are replaced by what rows stand for.
            del manifest.fits["queries"]
        renew_candidates(reader.folder, manifest, report)
        renewed += ["sketch", "coarse"]
    else:
        manifest.fits.pop("queries", None)
    manifest.commit(reader.folder)
    return {"renewed": renewed, "kept": kept}


def renew_curvature(rows: IndexRows, manifest: Manifest, report: Reporter) -> None:
    """Fits the curvature on the stored gradients of the living rows, into the manifest."""
    folder, config = rows.folder, config_of(manifest)
    most = rows.live_count if config.sample.rows == "stored" else config.sample.size
    chosen, _ = rows.drawn("curvature-sample", most)
    everything = len(chosen) == len(rows.store)
    with report.stage("curvature") as stage:
        fitted = fit_curvature(
            rows.gradients(None if everything else chosen),
            len(chosen),
            rows.codec.specs,
            shape=CurvatureShape.of(config, len(rows.codec.specs)),
            power_iterations=config.power_iterations,
            seed=config.seed,
            examples=len(chosen),
            stage=stage,
            device=CPU,
        )
    # Found out now rather than at the first search.
    inverses(fitted, config.policy)
    manifest.fits["curvature"] = save_curvature(folder, manifest.new_name("curvature"), fitted)
    manifest.fingerprint = manifest.fingerprint | {"curvature": "stored"}
    manifest.fitted_ids = manifest.next_id

"""lorif_index: training data attribution as a search index.

The stages, one module each, in the order in which data flows through them:

    data, losses          batches and per-example losses
    layers, capture       per-example projected gradients of a model's linear maps
    ensemble              several checkpoints as one model of more layers
    projection            the projections they are taken in: random, or learnt
    gradients, sources    gradients as values, from a model or handed over; spool keeps them for several passes
    factors               rank-c factors
    probes                rows that estimate the Gauss-Newton matrix
    subspace              leading eigenpairs of streamed rows, which give
    eigenbases, curvature the learnt projections, and each layer's low-rank curvature
    eigencodes, codes     coordinates in the curvature's eigenbases, in few bits
    sketch                k half-whitened coordinates of all layers together
    rows                  how factors or eigencodes, and codes, of one example lie
    sealed, shards, store immutable HDF5 files, streamed and gathered
    resident              the rows on the device that scores them
    fitted                the files of projections, curvature, eigencodes, sketch and calibration queries
    damping, query        the Woodbury-preconditioned query transform
    scoring, results      exact scores of rows, and the answer with its diagnosis
    coarse, flat, devices what proposes candidates: a FAISS index, or coordinates on a GPU
    calibration, missed   how many candidates a recall takes; how many answers a search has missed
    pursuit, candidates   proposed, narrowed, rescored, checked, and gone on with; where that begins
    planner               scan or candidates, and why
    explain, groups       a score taken apart by layer and token; scores summed by source or label
    locks, manifest, reader      what makes a folder an index, one version after another, and its parts put together
    coarse_build, build   how it is made; payloads and encode write the rows, coverage and outliers look at them
    growth, removal, refit, merging   how it is changed; living answers without removed rows
    damage, repair        bad bytes are found, and mended where that can be
    sizes, estimate       what a build will take
    packed, chat, encoding, tokenised   words as examples and as questions
    documents, passages, model   files of text, cut for a language model
    index                 the user's handle
    callback, textindex   a trainer of transformers builds the index; an index of texts remembers its model

The demo (demo_model, demo) and the command line stand on them; its commands are in the folder cli.
Its pages in the browser: visible, charts, explorer, page, export, report, guard, server.
"""

from __future__ import annotations

from .build.estimate import Estimate
from .capture.losses import CrossEntropy, default_loss
from .config import BuildConfig, CurvatureRows, LayerSelection
from .damping import AbsoluteDamping, Damping, PaperDamping, RelativeDamping, ReleaseDamping
from .errors import LorifError
from .index import Index
from .progress import ProgressEvent
from .results import Group, Groups, Hits, SearchStats
from .search.explain import Explanation
from .version import VERSION

__version__ = VERSION

__all__ = [
    "AbsoluteDamping",
    "BuildConfig",
    "CrossEntropy",
    "CurvatureRows",
    "Damping",
    "Estimate",
    "Explanation",
    "Group",
    "Groups",
    "Hits",
    "Index",
    "LayerSelection",
    "LorifError",
    "PaperDamping",
    "ProgressEvent",
    "RelativeDamping",
    "ReleaseDamping",
    "SearchStats",
    "default_loss",
]

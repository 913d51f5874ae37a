"""lorif_index: training data attribution as a search index.

`Index.build` makes an index of a model's training gradients; `index.search` asks which examples lowered a loss. What is
asked becomes gradients (`capture`, `questions`), these a question under the inverse curvature (`curvature`), which is
put to rows (`codecs`, `storage`) by a scan or by candidates (`search`). `build` makes an index, `life` changes it.
`text`, `web` and `cli` stand on top.

`docs/architecture.md` has the rooms, one walk of an example through the build, and one of a question through the
search, by the names of functions.
"""

from __future__ import annotations

from .build.estimate import Estimate
from .capture.losses import CrossEntropy, default_loss
from .config import BuildConfig, CoarseIndex, Compute, CurvatureRows, LayerSelection, Sample
from .curvature.refine import Refine
from .damping import AbsoluteDamping, Damping, PaperDamping, RelativeDamping, RowDamping
from .errors import LorifError
from .gathering import Gathering
from .index import Index
from .progress import ProgressEvent
from .results import Group, Groups, Hits, Refined, Reranked, SearchStats, Selection
from .search.explain import Explanation
from .version import VERSION

__version__ = VERSION

__all__ = [
    "AbsoluteDamping",
    "BuildConfig",
    "CoarseIndex",
    "Compute",
    "CrossEntropy",
    "CurvatureRows",
    "Damping",
    "Estimate",
    "Explanation",
    "Gathering",
    "Group",
    "Groups",
    "Hits",
    "Index",
    "LayerSelection",
    "LorifError",
    "PaperDamping",
    "ProgressEvent",
    "Refine",
    "Refined",
    "RelativeDamping",
    "Reranked",
    "RowDamping",
    "Sample",
    "SearchStats",
    "Selection",
    "default_loss",
]

"""Sizes: bytes on disk and in memory that a build will take, put together of what each part says of itself.

The model, its activations and what Python itself takes come on top of what is held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..capture.data import batch_examples
from ..capture.gradients import LayerSpec
from ..codecs.base import CodecSizes
from ..codecs.registry import codec_class
from ..config import BuildConfig
from ..curvature.fit import CurvatureShape, fit_bytes
from ..curvature.sketch import sketch_subspace, sketched_directions
from ..linalg.scratch import CPU
from ..linalg.subspace import GROUP_BYTES
from ..search.candidates import most_proposed
from ..search.coarse import TRAIN_ROWS, code_bytes, codebook_bytes
from ..search.proposers import BYTES_ORDERED, ORDERED_BYTES
from ..storage.fitted import curvature_bytes, projection_bytes, query_bytes, sketch_bytes
from ..storage.shards import shard_bytes_of
from .candidates import TILT_QUERIES, query_count

ENTRY_BYTES = 400
"""Of the manifest, for each shard."""
# Of a proposed row: its position and score. Of an id.
_PROPOSED, _ID_BYTES = 12, 8


REMEDIES = {
    "gradients": "pass a smaller batch_size=, or projection_floor=16",
    "curvature": "pass curvature_rank=8, or projection_floor=16",
    "encode": "pass projection_floor=16, or compute={'shard_bytes': 16 << 20}",
    "sketch": "pass coarse={'dim': 128}, or coarse='none'",
    "coarse": "pass coarse={'dim': 128}, coarse='none', or build on more machines",
    "calibration": "pass coarse={'queries': 16}",
    "search": "build and open it on more machines, or pass coarse='none'",
}
"""Of each stage of `Shapes.memory`: what to pass where it takes too much."""


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all; of the CPU what its machine or its container has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text().strip() if limit.is_file() else ""
    return min(there, int(told)) if told.isdigit() else there


@dataclass(frozen=True)
class DiskSizes:
    """Bytes on disk, by part.

    Attributes:
        row: of one example's row, as `Index.bytes_per_example` counts it.
        rows: of all shards, with ids and checksums.
        fit: projections, curvature, codec and sketch.
        coarse: the coarse index and its calibration queries.
        payloads: the user's own.
        code: of one example's row in the coarse index.
    """

    row: int
    rows: int
    fit: int
    coarse: int
    payloads: int
    code: int = 0

    @property
    def total(self) -> int:
        return self.rows + self.fit + self.coarse + self.payloads


@dataclass(frozen=True)
class Shapes:
    """The shapes of an index, which its sizes follow from.

    Attributes:
        config: the choices, with a number for `projection_floor`.
        specs: the layers.
        codec: name of the rows' codec.
        coarse: whether there will be a coarse index.
        curvature_rows: that the curvature is fitted on, which bound its rank; None: enough.
    """

    config: BuildConfig
    specs: Mapping[str, LayerSpec]
    codec: str
    coarse: bool = True
    curvature_rows: int | None = None

    @cached_property
    def directions(self) -> int:
        """Coordinates that a sketch of gradients is made of."""
        return sketched_directions(spec.dim for spec in self.specs.values())

    @cached_property
    def rows(self) -> CodecSizes:
        """What the codec takes."""
        return codec_class(self.codec).sizes(self.config, self.specs, self.directions)

    @property
    def dim(self) -> int:
        """k, the sketch's coordinates."""
        return min(self.config.coarse.dim, max(self.rows.directions, 1))

    @property
    def width(self) -> int:
        """Numbers of a gradient, in all layers."""
        return sum(spec.dim for spec in self.specs.values())

    def queries(self, count: int) -> int:
        """Calibration queries, of so many examples."""
        return query_count(self.config, query_bytes(self.specs), count)

    def fits(self) -> dict[str, int]:
        """Bytes of what all rows share, whatever their number, by the names of the manifest's fits."""
        return {
            "projections": projection_bytes(self.specs) if self.config.projection == "eigen" else 0,
            "curvature": curvature_bytes(
                CurvatureShape.of(self.config, len(self.specs)), self.specs, self.curvature_rows
            ),
            "codec": self.rows.file,
            "sketch": sketch_bytes(self.config.coarse.dim, self.rows.directions) if self.coarse else 0,
        }

    def disk(self, count: int, payload_bytes: float = 0.0) -> DiskSizes:
        """What an index of `count` rows will take.

        Args:
            count: n.
            payload_bytes: of an example's payload, on average; 0: none are kept.
        """
        row = self.rows.row
        shards, payloads = shard_bytes_of(count, row, self.config.compute.shard_bytes, payload_bytes)
        codes = code = 0
        if self.coarse:
            # Which of the two the data decides: whether rows name coordinates.
            short = self.rows.short if self.config.coarse.by_name else 0
            code = max(code_bytes(self.config.coarse.kind, self.dim), short)
            codes = count * code + codebook_bytes(self.dim) + self.queries(count) * query_bytes(self.specs)
        return DiskSizes(row, shards, sum(self.fits().values()), codes, payloads, code)

    def memory(self, count: int, *, ranks: int = 1, shared: bool = True) -> dict[str, int]:
        """Stage -> most bytes that one rank holds.

        Args:
            count: n, of all ranks.
            ranks: how many.
            shared: they share a folder: its leader puts the whole coarse index together. Else each has its own.
        """
        own, config = -(-count // ranks), self.config
        sizes, fits, kept = self.disk(own), self.fits(), self.rows.directions
        found = {
            # Of a batch, and as many rows of probes beside.
            "gradients": 2 * 4 * self.width * batch_examples(config.batch_size, None),
            "curvature": fit_bytes(CurvatureShape.of(self.config, len(self.specs)), self.specs, GROUP_BYTES)
            + fits["curvature"],
            "encode": 2 * sizes.fit + 2 * min(config.compute.shard_bytes, own * sizes.row),
        }
        if self.coarse:
            found["sketch"] = sketch_subspace(kept, self.dim, count, 0, CPU).nbytes
            codes = (count if shared else own) * sizes.code
            # What makes coordinates of rows is one matrix, put together of its layers'.
            found["coarse"] = sizes.fit + 2 * 4 * kept * self.dim + 2 * codes + 8 * min(count, TRAIN_ROWS) * self.dim
            if config.coarse.queries:
                queries = self.queries(count)
                found["calibration"] = (
                    sizes.fit
                    + own * sizes.code
                    + 2 * 4 * self.width * queries
                    + 3 * 4 * kept * queries
                    + _proposals(count, own, ranks, min(queries, TILT_QUERIES))
                )
        # Codes, and once more while they are made ready to be searched.
        found["search"] = sizes.fit + own * (_ID_BYTES + 2 * sizes.code)
        return found


def _proposals(count: int, own: int, ranks: int, queries: int) -> int:
    """Of rows that are proposed to some queries together, as many as may be proposed at all."""
    whole = 2 * _PROPOSED * queries * most_proposed(count)
    if ranks == 1:
        return whole
    own = min(most_proposed(count), own)
    together = min(max(ORDERED_BYTES, BYTES_ORDERED * ranks * own), BYTES_ORDERED * ranks * own * queries)
    return whole + _PROPOSED * queries * own + together

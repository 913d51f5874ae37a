"""Factors: the published row, rank-c factors of each layer's gradient in half precision (LoRIF, arXiv:2601.21929).

Layers of one shape form a group. A row is group after group: all left factors of its layers, then all right ones;
layers of full rank hold their gradient instead. A block of rows is then a handful of strided matrices.

I(q, i) = sum_l sum_a U_i[:, a]^T Q'_l V_i[:, a], O(D) for a pair and layer, summed in float32. (The published code
projects every training example on V at every query, O(D r), for the same numbers.) Such rows are gradients: they
outlive every fit but the projections, and all others can be made of them again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from ..capture.gradients import GradientBlock, LayerSpec
from ..curvature.fit import LayerCurvature
from ..errors import CorruptionError, NonFiniteError
from ..linalg.scratch import CPU, SCRATCH
from .base import CodecSizes, Encoder, Fitting, Parts, RowCodec, Scorer
from .truncation import Factors, factorise

if TYPE_CHECKING:
    from ..config import BuildConfig

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# From here on, rebuilding U V^T once and one matrix product for all queries is faster than a product a query
# (measured at d = 32: from 24 queries on at c = 1, from 10 at c = 4).
_REBUILD_FROM = 48
# Float32 bytes of a block of rows: what stays in a core's cache between the steps; a GPU wants large ones.
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2 << 20, 256 << 20


@dataclass(frozen=True)
class ShapeGroup:
    """Layers of one shape, adjacent in a row.

    Attributes:
        names: the layers, in row order.
        d_in, d_out, rank: of each of them.
        dense: they hold gradients (d_in, d_out) instead of factors.
        offset: of the group, in elements from the row's beginning.
    """

    names: tuple[str, ...]
    d_in: int
    d_out: int
    rank: int
    dense: bool
    offset: int

    @property
    def width(self) -> int:
        """Elements of a row that the group takes."""
        each = self.d_in * self.d_out if self.dense else self.rank * (self.d_in + self.d_out)
        return len(self.names) * each

    def left(self, block: torch.Tensor) -> torch.Tensor:
        """(n, layers, c, d_in) view of a block of rows (n, row width), or (n, layers, d_in, d_out) if dense."""
        inner = (self.d_in, self.d_out) if self.dense else (self.rank, self.d_in)
        return self._view(block, self.offset, inner)

    def right(self, block: torch.Tensor) -> torch.Tensor:
        """(n, layers, c, d_out) view of a block of rows."""
        start = self.offset + len(self.names) * self.rank * self.d_in
        return self._view(block, start, (self.rank, self.d_out))

    def _view(self, block: torch.Tensor, start: int, inner: tuple[int, int]) -> torch.Tensor:
        count = len(self.names)
        part = block[:, start : start + count * inner[0] * inner[1]]
        return part.unflatten(1, (count, *inner))


def groups_of(specs: Mapping[str, LayerSpec]) -> tuple[ShapeGroup, ...]:
    """The layers of a row, those of one shape beside each other."""
    by_shape: dict[tuple[int, int, int], list[str]] = {}
    for spec in specs.values():
        by_shape.setdefault((spec.d_in, spec.d_out, spec.rank), []).append(spec.name)
    groups, offset = [], 0
    for (d_in, d_out, rank), names in by_shape.items():
        group = ShapeGroup(tuple(names), d_in, d_out, rank, rank >= min(d_in, d_out), offset)
        groups.append(group)
        offset += group.width
    return tuple(groups)


class FactorCodec(RowCodec):
    """Rows of factors.

    Args:
        specs, curvature: as in `RowCodec`.
        dtype: "float16", "bfloat16" or "float32".

    Attributes:
        groups: layers of one shape.
        width: numbers of a row.
    """

    name: ClassVar[str] = "factors"

    def __init__(self, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature], dtype: str) -> None:
        super().__init__(specs, curvature)
        self.groups, self.dtype = groups_of(specs), dtype
        self.width = sum(group.width for group in self.groups)

    @classmethod
    def sizes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec], directions: int) -> CodecSizes:
        row = cls(specs, {}, config.dtype).row_bytes
        return CodecSizes(row, 0, directions, 4 * sum(spec.dim for spec in specs.values()))

    @classmethod
    def choices(cls) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"rank": c, "dtype": dtype} for c in (1, 4) for dtype in ("float16", "float32")]
        found += [{"rank": 1, "curvature_rank": rank} for rank in (128, 2048)]
        return found + [{"rank": 1, "projection_dim": d} for d in (16, 64)]

    @classmethod
    def fit(cls, fitting: Fitting) -> Self:
        return cls(fitting.specs, fitting.curvature, fitting.config.dtype)

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        return {"dtype": self.dtype}

    @classmethod
    def load(
        cls, folder: Path, entry: Any, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]
    ) -> Self:
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CorruptionError(f"the manifest says that factors are {dtype!r}: known are {sorted(_DTYPES)}")
        return cls(specs, curvature, dtype)

    @property
    def row_bytes(self) -> int:
        return self.width * _DTYPES[self.dtype].itemsize

    @property
    def label(self) -> str:
        return self.dtype

    def encoder(self, device: torch.device) -> Encoder:
        return _FactorEncoder(self)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """The numbers of rows (n, row_bytes) uint8: a view (n, width) in the stored dtype."""
        return rows.view(_DTYPES[self.dtype])

    def pack(self, factors: Mapping[str, Factors]) -> torch.Tensor:
        """The numbers of rows, (n, width) float32, on the factors' device."""
        first = next(iter(factors.values())).left
        rows = torch.empty(first.shape[0], self.width, dtype=torch.float32, device=first.device)
        for group in self.groups:
            left = group.left(rows)
            for i, name in enumerate(group.names):
                part = factors[name]
                left[:, i] = part.left
                if part.right is not None:
                    group.right(rows)[:, i] = part.right
        return rows

    def stored(self, packed: torch.Tensor, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n, row_bytes) uint8 of numbers (n, width), and (n, layers) bool: which gradients became zero by it.

        Raises:
            NonFiniteError: values beyond the dtype's range.
        """
        stored = packed.to(dtype=_DTYPES[self.dtype])
        fine = torch.isfinite(stored).all(dim=1)
        if not bool(fine.all()):
            bad = int(ids[int((~fine).nonzero()[0, 0])])
            raise NonFiniteError(
                f"the factors of example {bad} overflow {self.dtype}: build with BuildConfig(dtype='bfloat16') or "
                "'float32', in another folder"
            )
        flags = []
        for group in self.groups:
            before, after = ((group.left(r) != 0).flatten(2).any(dim=2) for r in (packed, stored))
            flags.append(before & ~after)
        return stored.view(torch.uint8), torch.cat(flags, dim=1)

    def factors(self, rows: torch.Tensor) -> dict[str, Factors]:
        """The factors in rows (n, row_bytes), as float32."""
        block = self.values(rows).float()
        out = {}
        for group in self.groups:
            left = group.left(block)
            right = None if group.dense else group.right(block)
            for i, name in enumerate(group.names):
                out[name] = Factors(left[:, i], None if right is None else right[:, i])
        return {name: out[name] for name in self.specs}

    def decode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: part.dense().flatten(1) for name, part in self.factors(rows).items()}

    def scorer(self, parts: Parts, device: torch.device = CPU) -> Scorer:
        return _FactorScorer(self, parts, device)


class _FactorEncoder(Encoder):
    def __init__(self, codec: FactorCodec) -> None:
        self._codec = codec
        # Rows that are not zero; examples that became zero in all layers, and the first of them.
        self._there = self._gone = self._first_gone = 0

    def encode(self, block: GradientBlock) -> torch.Tensor:
        packed = self._codec.pack(factorise(block, self._codec.specs)).cpu()
        rows, vanished = self._codec.stored(packed, block.ids)
        self.vanished += int(vanished.sum())
        # Not by their bytes: -0 has one.
        there = (self._codec.values(rows) != 0).any(dim=1)
        self._there += int(there.sum())
        gone = block.ids[(vanished.any(dim=1) & ~there).numpy()]
        if len(gone):
            self._first_gone = min([int(gone.min())] + [self._first_gone] * bool(self._gone))
            self._gone += len(gone)
        return rows

    def check(self) -> None:
        """Confident predictions have gradients of nearly nothing; where all are so small, they are in other units."""
        if not self._gone:
            return
        dtype, wide = self._codec.dtype, "BuildConfig(dtype='bfloat16') or 'float32', in another folder,"
        if not self._there:
            raise NonFiniteError(
                f"the factors of all {self._gone:,} examples underflow to zero in {dtype}: {wide} has room for them"
            )
        warnings.warn(
            f"the gradients of {self._gone:,} examples (the first: {self._first_gone}) are below what {dtype} holds, "
            f"and are stored as zeros, with a score of 0 for every question: {wide} keeps them",
            stacklevel=2,
        )


class _FactorScorer:
    def __init__(self, codec: FactorCodec, parts: Parts, device: torch.device) -> None:
        self._codec, queries = codec, {name: g.to(device) for name, g in parts.items()}
        self._count = int(next(iter(queries.values())).shape[0])
        size = 4 * max(codec.width, 1)
        self._step = max(_BLOCK_BYTES // size, 16)
        self._step = min(self._step, 512) if device.type == "cpu" else max(_GPU_BLOCK_BYTES // size, 16)
        self._plans = [
            _Plan(group, queries, self._count, device)
            for group in codec.groups
            if any(name in queries for name in group.names)
        ]

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(self._count, len(rows), device=rows.device)
        for start in range(0, len(rows), self._step):
            block = SCRATCH.convert("block", self._codec.values(rows[start : start + self._step]))
            for plan in self._plans:
                plan.add(out[:, start : start + len(block)], block)
        return out


class _Plan:
    """How one group of layers is scored: query by query on the factors, or all at once on rebuilt gradients."""

    def __init__(
        self, group: ShapeGroup, queries: Mapping[str, torch.Tensor], count: int, device: torch.device
    ) -> None:
        self._group = group
        self._together = group.dense or count * (group.rank + 1) >= _REBUILD_FROM
        if self._together:
            # One (D, q) matrix for each layer that counts, by its place in the group.
            self._matrices = [
                (i, queries[name].flatten(1).T.contiguous()) for i, name in enumerate(group.names) if name in queries
            ]
        else:
            # Per query one (layers * c, d_in, d_out) batch: a matrix per factor pair, zero where one does not count.
            empty = torch.zeros(count, group.d_in, group.d_out, device=device)
            stacked = torch.stack([queries.get(name, empty) for name in group.names], dim=1)
            self._batches = list(stacked.repeat_interleave(group.rank, dim=1))

    def add(self, out: torch.Tensor, block: torch.Tensor) -> None:
        """Adds the group's scores of a block of rows (n, width) float32 to out (q, n)."""
        if not self._together:
            # Views (layers * c, n, d): the pairs of a block as one batch of strided matrices, without a copy.
            left = self._group.left(block).flatten(1, 2).transpose(0, 1)
            right = self._group.right(block).flatten(1, 2).transpose(0, 1)
            product = SCRATCH.take("product", *left.shape[:2], self._group.d_out, device=block.device)
            for q, batch in enumerate(self._batches):
                out[q] += torch.bmm(left, batch, out=product).mul_(right).sum(0).sum(1)
            return
        total = torch.zeros(len(block), out.shape[0], device=block.device)
        for i, matrix in self._matrices:
            total.addmm_(self._gradient(block, i), matrix)
        out += total.T

    def _gradient(self, block: torch.Tensor, layer: int) -> torch.Tensor:
        """(n, D): the stored gradients of one layer, in a buffer that is used again."""
        group = self._group
        if group.dense:
            return group.left(block)[:, layer].flatten(1)
        dense = SCRATCH.take("product", len(block), group.d_in, group.d_out, device=block.device)
        return rebuild(group.left(block)[:, layer], group.right(block)[:, layer], dense).flatten(1)


def rebuild(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """U V^T from (n, c, d_in) and (n, c, d_out), into out (n, d_in, d_out)."""
    if left.shape[1] == 1:
        return torch.mul(left[:, 0, :, None], right[:, 0, None, :], out=out)
    return torch.bmm(left.transpose(1, 2), right, out=out)

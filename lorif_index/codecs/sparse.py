"""Sparse: of each row its own largest coordinates, with their places, in three bytes each.

What examples add to a score is unequal: a few coordinates of each hold most of it, other ones in other examples (of a
language model's head those of its rare words). A row names its m largest. Each is a place in 19 bits, a sign, and a
magnitude in 16 levels, neighbours a factor of 1.5 apart, above the row's own scale. Other coordinates count as 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import embedding_bag, pad

from ..linalg.largest import largest
from ..linalg.scratch import SCRATCH
from .bits import SCALE_BYTES, scales_of
from .compiled import KERNEL

ENTRY_BYTES = 3
MOST_PLACES = (1 << 19) - 1
"""Coordinates that a place can name."""
_LEVELS, _RATIO = 16, 1.5
# Rows unpacked at once: what stays in a core's cache.
_BLOCK_ROWS, _GPU_BLOCK_ROWS = 512, 1 << 14
# Sums of rows of a table are vectorised over its columns.
_COLUMNS = 8
# Up to so many queries, one by one, the compiled kernel is faster.
_KERNEL_UP_TO = 4


@dataclass(frozen=True)
class SparseLayout:
    """Where a row's entries lie: three planes of m bytes, low bits of the entries first, then the scale, a bfloat16.

    Attributes:
        dim: number of coordinates.
        entries: m.
    """

    dim: int
    entries: int

    @property
    def row_bytes(self) -> int:
        return ENTRY_BYTES * self.entries + SCALE_BYTES

    @property
    def label(self) -> str:
        """How coordinates are coded, in words."""
        return f"{self.entries} largest"

    @property
    def query_bytes(self) -> int:
        """Memory that a scorer takes for each query: in a row for the kernel, and in a column for torch."""
        return 8 * self.dim

    @property
    def cosine(self) -> float:
        """What decoded coordinates are longer by is 1 / cosine: those that are named are as long as they were."""
        return 1.0

    def scorer(self, queries: torch.Tensor) -> SparseScorer:
        """Of fixed queries (q, dim) float32."""
        return SparseScorer(self, queries)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (n, row_bytes) uint8, on the CPU, of coordinates (n, dim), whose device makes them. A row of zeros
        comes back as zeros."""
        places = largest(z.abs(), min(self.entries, self.dim))
        values = z.gather(1, places).float()
        sizes = values.abs()
        peak = sizes.amax(dim=1)
        least = torch.where(sizes > 0, sizes, torch.inf).amin(dim=1)
        scale = torch.maximum(least, peak / _RATIO ** (_LEVELS - 1)).to(torch.bfloat16)
        scale = torch.where(peak > 0, scale, torch.zeros_like(scale))
        unit = scale.float()[:, None]
        # What is far below the scale is nothing: it names the place behind the last.
        nothing = (sizes * _RATIO**0.5 < unit) | (sizes == 0)
        levels = (sizes / torch.where(unit > 0, unit, 1.0)).clamp_min_(1e-30).log_().div_(math.log(_RATIO))
        levels = levels.round_().clamp_(0, _LEVELS - 1).long()
        codes = (places.masked_fill_(nothing, self.dim) << 5) | ((values > 0).long() << 4) | levels
        return self._packed(codes, scale.view(torch.uint8).reshape(len(z), -1)).cpu()

    def _packed(self, entries: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes of integers (n, at most m) that name coordinates, and of bytes (n, 2) of the scales."""
        entries = pad(entries, (0, self.entries - entries.shape[1]), value=self.dim << 5)
        # In rising order of places, so that a scorer reads its table in order.
        entries = entries.sort(dim=1).values
        planes = torch.cat([(entries >> shift) & 255 for shift in (0, 8, 16)], dim=1).to(torch.uint8)
        return torch.cat([planes, scales], dim=1)

    def energy(self, codes: torch.Tensor) -> float:
        """The sum of all that rows (n, row_bytes) hold, squared."""
        places, values = self.unpacked(codes)
        each = torch.where(places < self.dim, values, 0.0) * self.scales(codes)
        return float(each.double().square().sum())

    def shortened(self, codes: torch.Tensor, entries: int) -> torch.Tensor:
        """The same of each row's largest entries alone: codes (n, 3 entries + 2) uint8 of a layout that names so many.
        They are what most of its score is from, so that they propose the row (docs/choosing.md)."""
        m, every = self.entries, self.joined(codes)
        # By magnitude; what names nothing comes last.
        levels = torch.where(every >> 5 < self.dim, every & (_LEVELS - 1), -1)
        kept = every.gather(1, torch.topk(levels, min(entries, m), dim=1, sorted=False).indices)
        return SparseLayout(self.dim, entries)._packed(kept, codes[:, ENTRY_BYTES * m :])

    def joined(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, m) int32: entries, put together of their planes."""
        low, middle, high = codes[:, : ENTRY_BYTES * self.entries].int().unflatten(1, (ENTRY_BYTES, -1)).unbind(1)
        return low | middle << 8 | high << 16

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, 1) float32."""
        return scales_of(codes[:, ENTRY_BYTES * self.entries :])

    def unpacked(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places (n, m) int32 and values in units of the scale (n, m) float32. Scratch: the next call overwrites it."""
        m, device = self.entries, codes.device
        found = SCRATCH.take("sparse codes", len(codes), m, dtype=torch.int32, device=device)
        part = SCRATCH.take("sparse part", len(codes), m, dtype=torch.int32, device=device)
        found.copy_(codes[:, :m])
        for plane in (1, 2):
            part.copy_(codes[:, plane * m : (plane + 1) * m])
            found.add_(part.bitwise_left_shift_(8 * plane))
        torch.bitwise_and(found, 31, out=part)
        values = SCRATCH.take("sparse values", len(codes), m, device=device)
        torch.index_select(_VALUES.to(device), 0, part.view(-1), out=values.view(-1))
        return found.bitwise_right_shift_(5), values

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored coordinates, (n, dim) float32; all that are not named are 0."""
        places, values = self.unpacked(codes)
        out = torch.zeros(len(codes), self.dim + 1, device=codes.device)
        return out.scatter_(1, places.long().clamp_max_(self.dim), values * self.scales(codes))[:, :-1]


def values_of_levels() -> torch.Tensor:
    """(32,) float32: what the low 5 bits of an entry stand for, in units of the row's scale."""
    sizes = _RATIO ** torch.arange(_LEVELS, dtype=torch.float64)
    return torch.cat([-sizes, sizes]).float()


_VALUES = values_of_levels()


class SparseScorer:
    """Inner products of fixed query coordinates with the coordinates in blocks of codes.

    Args:
        layout: the codes' layout.
        queries: (q, dim) float32, on the device where codes will be scored.
    """

    def __init__(self, layout: SparseLayout, queries: torch.Tensor) -> None:
        self._layout, self._count = layout, len(queries)
        self._suits = queries.device.type == "cpu" and self._count <= _KERNEL_UP_TO
        # A zero behind the last, for entries that name nothing.
        self._queries = pad(queries, (0, 1))

    @cached_property
    def _columns(self) -> torch.Tensor:
        """(dim + 1, at least q): the queries as torch takes them; of one query the same memory."""
        spare = -self._count % _COLUMNS if self._count > 1 else 0
        return pad(self._queries, (0, 0, 0, spare)).T.contiguous()

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        if self._suits and KERNEL.ready(codes.numel() * self._count):
            layout, out = self._layout, torch.empty(self._count, len(codes))
            scales = layout.scales(codes)[:, 0]
            return KERNEL.named(codes, layout.entries, self._queries, _VALUES, scales, out)
        out = torch.empty(len(codes), self._columns.shape[1], device=codes.device)
        step = _BLOCK_ROWS if codes.device.type == "cpu" else _GPU_BLOCK_ROWS
        for start in range(0, len(codes), step):
            part = codes[start : start + step]
            places, values = self._layout.unpacked(part)
            here = out[start : start + len(part)]
            if self._count == 1:
                found = SCRATCH.take("sparse found", len(part), self._layout.entries, device=codes.device)
                torch.index_select(self._columns[:, 0], 0, places.view(-1), out=found.view(-1))
                torch.sum(found.mul_(values), dim=1, keepdim=True, out=here)
            else:
                here[:] = embedding_bag(places, self._columns, mode="sum", per_sample_weights=values)
            here.mul_(self._layout.scales(part))
        return out[:, : self._count].T

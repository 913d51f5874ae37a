"""Largest: of each group of coordinates the place and the sign of the largest, in 4 to 8 bits a group.

Where many directions add about as much to a score, a bit buys more if it is spread over several of them: of g unit
Gaussians, the largest holds (E max |z|)^2 of g, .64 for the sign of one in a bit, .40 each of 8 in 4 bits, .17 each of
32 in 6 (the bound for a Gaussian source is 1 - 2^-2R at R bits each: Cover and Thomas, Elements of Information Theory,
10.3.3). It is a vector quantiser whose codewords are the positive and negative unit vectors. As with single levels
(see `bits`), the scale of a piece is |z|^2 / <z, v>, so that inner products are not shrunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch.nn.functional import embedding_bag, pad

from ..linalg.scratch import SCRATCH
from .bits import SCALE_BYTES, CodeLayout
from .eigencodes import EigenCodec, Way

# E max |z| of so many unit Gaussians (integrated numerically).
_MEAN_LARGEST = {8: 1.7834, 16: 2.0772, 32: 2.3471, 64: 2.5961, 128: 2.8276}
GROUPS = tuple(_MEAN_LARGEST)
# Rows unpacked at once: what stays in a core's cache.
_BLOCK_ROWS, _GPU_BLOCK_ROWS = 512, 1 << 14
# Sums of rows of a table are vectorised over its columns: of 2,060 groups a row, 8 queries take 3 us, one would take
# 50, and takes 2 by single entries.
_COLUMNS = 8
# Up to so many queries, a table of both signs is faster than weights for each row's groups, for twice the memory.
_SIGNED_UP_TO = 64


def kept_share(group: int) -> float:
    """Of a unit Gaussian's square, what a group of so many keeps of each on average."""
    return _MEAN_LARGEST[group] ** 2 / group


def code_bits(group: int) -> int:
    """Bits of a group's code: place and sign."""
    return group.bit_length()


class LargestCodec(EigenCodec):
    """Eigencodes of which each group keeps its largest coordinate alone, where that keeps more of what directions add
    than a few bits for each of fewer directions; else these."""

    name: ClassVar[str] = "largest"

    @classmethod
    def layout_of(cls, way: Way, counts: tuple[int, ...]) -> CodeLayout | LargestLayout:
        if way.group == 1:
            return CodeLayout(sum(counts), way.bits, counts)
        return LargestLayout(sum(counts), way.group, counts)

    @classmethod
    def ways(cls, directions: int, room: int) -> list[Way]:
        return [*super().ways(directions, room), *(Way(code_bits(group), group) for group in GROUPS)]

    @classmethod
    def most_kept(cls, row_bytes: int) -> int:
        return 8 * row_bytes * GROUPS[-1] // code_bits(GROUPS[-1])

    @classmethod
    def alone(cls, row_bytes: int, layers: int) -> int:
        return -(-cls.most_kept(row_bytes) // layers)

    @classmethod
    def _knows(cls, way: Way) -> bool:
        return super()._knows(way) or (way.group in GROUPS and way.bits == code_bits(way.group))


@dataclass(frozen=True)
class LargestLayout:
    """Where the codes of groups lie in a row: packed codes, then the pieces' scales.

    Attributes:
        dim: number of coordinates.
        group: coordinates of each group: 8, 16, 32, 64 or 128.
        widths: coordinates of each piece that has its own scale, dim together; whole groups.
    """

    dim: int
    group: int
    widths: tuple[int, ...]

    @cached_property
    def pieces(self) -> tuple[slice, ...]:
        """Which groups are of each piece."""
        out, at = [], 0
        for width in self.widths:
            out.append(slice(at, at + width // self.group))
            at = out[-1].stop
        return tuple(out)

    @property
    def bits(self) -> int:
        """Of each code."""
        return code_bits(self.group)

    @property
    def codes(self) -> int:
        """Number of codes, those that fill the last bytes included."""
        together = Way(self.bits).together
        return -(-(self.dim // self.group) // together) * together

    @property
    def packed(self) -> int:
        """Bytes of the codes."""
        size = self.codes * self.bits // 8
        return size + size % 2

    @property
    def row_bytes(self) -> int:
        return self.packed + SCALE_BYTES * len(self.widths)

    @property
    def label(self) -> str:
        """How coordinates are coded, in words."""
        return f"largest of {self.group}"

    @property
    def cosine(self) -> float:
        """Of Gaussian coordinates and what is decoded; decoded ones are longer by 1 / cosine."""
        return math.sqrt(kept_share(self.group))

    @property
    def query_bytes(self) -> int:
        """Memory that a scorer takes for each query."""
        return 2 * 4 * self.dim

    def scorer(self, queries: torch.Tensor) -> LargestScorer:
        """Of fixed queries (q, dim) float32."""
        return LargestScorer(self, queries)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (n, row_bytes) uint8 of coordinates (n, dim), on the CPU. A piece of zeros comes back as zeros."""
        z = z.to(device="cpu", dtype=torch.float32)
        out = torch.zeros(z.shape[0], self.row_bytes, dtype=torch.uint8)
        groups = z.unflatten(1, (-1, self.group))
        # Places first: torch's max with its indices takes longer.
        place = groups.abs().argmax(dim=2, keepdim=True)
        found = groups.gather(2, place).squeeze(2)
        codes, largest = 2 * place.squeeze(2) + (found >= 0), found.abs()
        _pack(pad(codes, (0, self.codes - codes.shape[1])), self.bits, out[:, : self.codes * self.bits // 8])
        scales = torch.zeros(z.shape[0], len(self.pieces))
        for i, piece in enumerate(self.pieces):
            if piece.stop > piece.start:
                scales[:, i] = _scales(groups[:, piece], largest[:, piece])
        out[:, self.packed :] = scales.to(torch.bfloat16).view(torch.uint8).reshape(len(z), -1)
        return out

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, pieces) float32."""
        return codes[:, self.packed :].contiguous().view(torch.bfloat16).reshape(len(codes), len(self.widths)).float()

    def unpacked(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, dim / group) int32: twice a group's place, and one more for a positive sign, counted over all groups
        before it: an index into coordinates of both signs. Scratch: the next call overwrites it."""
        count = self.dim // self.group
        each = SCRATCH.take("largest codes", len(codes), self.codes, dtype=torch.uint8, device=codes.device)
        _unpack(codes[:, : self.codes * self.bits // 8], self.bits, each)
        at = SCRATCH.take("largest at", len(codes), count, dtype=torch.int32, device=codes.device)
        first = torch.arange(0, 2 * self.dim, 2 * self.group, dtype=torch.int32, device=codes.device)
        return at.copy_(each[:, :count]).add_(first)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored coordinates, (n, dim) float32; all but one of a group are 0."""
        at = self.unpacked(codes)
        values = self.values(codes, at)
        return torch.zeros(len(codes), self.dim, device=codes.device).scatter_(1, (at >> 1).long(), values)

    def values(self, codes: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """(n, dim / group) float32: what is stored of each group, at those unpacked places."""
        counts = torch.tensor([piece.stop - piece.start for piece in self.pieces], device=codes.device)
        return (at & 1).float().mul_(2.0).sub_(1.0).mul_(self.scales(codes).repeat_interleave(counts, dim=1))

    def squares(self, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_j w_j z_j^2 of stored coordinates, (n,) float32, for weights (dim,)."""
        at = self.unpacked(codes)
        found = weights[(at >> 1).flatten().long()].view(at.shape)
        return (found * self.values(codes, at).square_()).sum(dim=1)


def _scales(groups: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """|z|^2 / <z, v>, (n,), of one piece's coordinates (n, groups, g) and the largest of each (n, groups)."""
    # Counted in the largest of all: squares of very small or large coordinates would leave float32.
    peak = largest.amax(dim=1)
    unit = torch.where(peak > 0, peak, 1.0)
    along = (largest / unit[:, None]).sum(dim=1)
    squares = (groups / unit[:, None, None]).square().sum(dim=(1, 2))
    return torch.where(peak > 0, squares / torch.where(along > 0, along, 1.0), 0.0) * peak


def _places(bits: int, count: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """Where codes lie: of each part of the codes, its columns, those of its first and of its next bytes, and the first
    bit there. Codes of a part are in neighbouring bytes, so that unpacking reads and writes contiguous parts."""
    parts = Way(bits).together
    m = count // parts
    for i in range(parts):
        byte, bit = divmod(i * bits, 8)
        yield slice(i * m, (i + 1) * m), slice(byte * m, byte * m + m), slice(byte * m + m, byte * m + 2 * m), bit


def _pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Codes (n, m) int64 into zeros (n, m bits / 8) uint8."""
    for part, first, following, bit in _places(bits, codes.shape[1]):
        out[:, first] |= ((codes[:, part] << bit) & 255).to(torch.uint8)
        if bit + bits > 8:
            out[:, following] |= (codes[:, part] >> (8 - bit)).to(torch.uint8)


def _unpack(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """What `_pack` was given, into (n, m) uint8."""
    for part, first, following, bit in _places(bits, out.shape[1]):
        found = packed[:, first] >> bit
        if bit + bits > 8:
            found |= packed[:, following] << (8 - bit)
        torch.bitwise_and(found, (1 << bits) - 1, out=out[:, part])


class LargestScorer:
    """Inner products of fixed query coordinates with the coordinates in blocks of codes.

    Args:
        layout: the codes' layout.
        queries: (q, dim) float32, on the device where codes will be scored.
    """

    def __init__(self, layout: LargestLayout, queries: torch.Tensor) -> None:
        self._layout, self._count, self._signed = layout, len(queries), len(queries) <= _SIGNED_UP_TO
        columns = pad(queries.T, (0, -len(queries) % _COLUMNS if len(queries) > 1 else 0)).contiguous()
        # (2 dim, q), of both signs, or (dim, q).
        self._columns = torch.stack([-columns, columns], dim=1).flatten(0, 1) if self._signed else columns

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        out = torch.zeros(len(codes), self._columns.shape[1], device=codes.device)
        step = _BLOCK_ROWS if codes.device.type == "cpu" else _GPU_BLOCK_ROWS
        for start in range(0, len(codes), step):
            part = slice(start, start + step)
            self._add(codes[part], out[part])
        return out[:, : self._count].T

    def _add(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the scores of some rows to (n, q) float32."""
        at, scales = self._layout.unpacked(codes), self._layout.scales(codes)
        if not self._signed:
            values = self._layout.values(codes, at)
            out += embedding_bag(at >> 1, self._columns, mode="sum", per_sample_weights=values)
            return
        alone = self._columns.shape[1] == 1
        if alone:
            found = SCRATCH.take("largest found", *at.shape, device=codes.device)
            torch.index_select(self._columns[:, 0], 0, at.flatten(), out=found.view(-1))
        for i, piece in enumerate(self._layout.pieces):
            if piece.stop == piece.start:
                continue
            if alone:
                sums = found[:, piece].sum(dim=1, keepdim=True)
            else:
                sums = embedding_bag(at[:, piece], self._columns, mode="sum")
            out.addcmul_(sums, scales[:, i : i + 1])

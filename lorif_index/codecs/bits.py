"""Bits: coordinates in 1, 2, 4 or 8 bits each, with a scale for each piece of an example's coordinates.

The coordinates of a piece are to look like equal Gaussians, for which a uniform grid with the best step for a unit
Gaussian is within 1 dB of the best quantiser (Max, IRE Trans. Inf. Theory 6(1), 1960). The scale is |z|^2 / <z, v>, v
being the grid point, so that inner products are not shrunk by the rounding (RaBitQ, Gao and Long, arXiv:2405.12497).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..linalg.scratch import SCRATCH
from .compiled import KERNEL, Planes

# Best uniform steps for a unit Gaussian and 2^bits levels (Max, 1960, table II; 8 bits by minimising numerically).
_STEP = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}
# Cosine of a unit Gaussian and its grid point: the least squared error of that step is 1 - cosine^2 (Max, 1960).
_COSINE = {1: 0.7979, 2: 0.9388, 4: 0.9942, 8: 0.99996}
BITS = (1, 2, 4, 8)
"""Widths of coordinates."""
# Of a piece's scale, a bfloat16: 0.2% of what few bits lose.
SCALE_BYTES = 2
# Rows unpacked at once on the CPU: what stays in a core's cache; and on a device, in bytes.
_BLOCK_ROWS, _UNPACKED_BYTES = 512, 1 << 30
# Up to so many queries, and for up to so many bits, a table of what each byte adds is faster than unpacking the bytes
# (1,600 bytes of 1 bit, a core: 2.3 us a row against 11 for one query, 24 against 32 for 8).
_TABLES_UP_TO, _TABLE_BITS = 8, 2
# Up to so many queries, by bits, the compiled kernel is faster than unpacking (see `compiled`); always for few bits.
_KERNEL_UP_TO = {4: 24, 8: 4}


@dataclass(frozen=True)
class Piece:
    """Where one piece of the coordinates lies.

    Attributes:
        coordinates: of all.
        bytes: of a row that hold its levels.
    """

    coordinates: slice
    bytes: slice

    @property
    def count(self) -> int:
        return self.coordinates.stop - self.coordinates.start


@dataclass(frozen=True)
class CodeLayout:
    """Where the codes of coordinates lie in a row: packed levels, piece after piece, then the pieces' scales.

    Attributes:
        dim: number of coordinates.
        bits: of each coordinate.
        widths: coordinates of each piece that has its own scale, dim together.
    """

    dim: int
    bits: int
    widths: tuple[int, ...]

    @property
    def label(self) -> str:
        """How coordinates are coded, in words."""
        return f"{self.bits} bits"

    @property
    def query_bytes(self) -> int:
        """Memory that a scorer takes for each query that it has a table of."""
        return 4 * 256 * self.packed

    def scorer(self, queries: torch.Tensor) -> CodeScorer | OneProduct:
        """Of fixed queries (q, dim) float32."""
        return CodeScorer(self, queries) if queries.device.type == "cpu" else OneProduct(self, queries)

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        out, at, byte = [], 0, 0
        for width in self.widths:
            size = -(-width // self.per_byte)
            out.append(Piece(slice(at, at + width), slice(byte, byte + size)))
            at, byte = at + width, byte + size
        return tuple(out)

    @cached_property
    def order(self) -> torch.Tensor:
        """(packed * per_byte,) int64: which coordinate each level of a row's bytes is of, byte after byte; `dim` where
        there is none."""
        out = torch.full((self.packed, self.per_byte), self.dim)
        for piece in self.pieces:
            size = piece.bytes.stop - piece.bytes.start
            here = torch.full((size * self.per_byte,), self.dim)
            here[: piece.count] = torch.arange(piece.coordinates.start, piece.coordinates.stop)
            out[piece.bytes] = here.unflatten(0, (self.per_byte, size)).T
        return out.flatten()

    @cached_property
    def piece_of(self) -> torch.Tensor:
        """(packed,) int64: the piece of each byte; the first where there is none."""
        out = torch.zeros(self.packed, dtype=torch.int64)
        for number, piece in enumerate(self.pieces):
            out[piece.bytes] = number
        return out

    @property
    def packed(self) -> int:
        """Bytes of the levels."""
        last = self.pieces[-1].bytes.stop
        return last + last % 2

    @property
    def row_bytes(self) -> int:
        return self.packed + SCALE_BYTES * len(self.widths)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (n, row_bytes) uint8, on the CPU, of coordinates (n, dim), whose device makes them. A piece of zeros
        comes back as zeros."""
        z = z.float()
        out = torch.zeros(z.shape[0], self.row_bytes, dtype=torch.uint8, device=z.device)
        scales = torch.zeros(z.shape[0], len(self.pieces), device=z.device)
        for i, piece in enumerate(self.pieces):
            if piece.count:
                scales[:, i] = self._encode(z[:, piece.coordinates], out[:, piece.bytes])
        out[:, self.packed :] = scales.to(torch.bfloat16).view(torch.uint8).reshape(len(z), -1)
        return out.cpu()

    def _encode(self, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes one piece's levels into its bytes of rows; its scales (n,)."""
        count, top = z.shape[0], 2**self.bits - 1
        # The largest entry first: squares of very small or large coordinates would leave float32.
        peak = z.abs().amax(dim=1, keepdim=True)
        unit = z / torch.where(peak > 0, peak, 1.0)
        rms = unit.square().mean(dim=1, keepdim=True).sqrt()
        levels = unit / (torch.where(rms > 0, rms, 1.0) * _STEP[self.bits]) + top / 2
        levels = levels.round_().clamp_(0, top)
        grid = levels - top / 2
        along = (unit * grid).sum(dim=1)
        size = out.shape[1]
        spread = torch.zeros(count, size * self.per_byte, dtype=torch.uint8, device=z.device)
        spread[:, : z.shape[1]] = levels.to(torch.uint8)
        # Byte j holds coordinates j, j + size, j + 2 size, ..., so that unpacking writes contiguous parts.
        parts = spread.unflatten(1, (self.per_byte, size))
        out[:] = parts[:, 0]
        for i in range(1, self.per_byte):
            out |= parts[:, i] << (i * self.bits)
        return torch.where(along > 0, unit.square().sum(dim=1) / along, 0.0) * peak[:, 0]

    def levels(self, packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Unscaled levels 0 .. 2^bits - 1 of one piece's bytes (n, size), into out (n, per_byte * size) float32."""
        if self.bits == 8:
            return out.copy_(packed)
        mask, size = 2**self.bits - 1, packed.shape[1]
        for i in range(self.per_byte):
            part = packed if i == 0 else packed >> (i * self.bits)
            out[:, i * size : (i + 1) * size] = part & mask if i < self.per_byte - 1 else part
        return out

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, pieces) float32."""
        return scales_of(codes[:, self.packed :])

    @property
    def cosine(self) -> float:
        """Of coordinates and what is decoded, about; decoded ones are longer by 1 / cosine."""
        return _COSINE[self.bits]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored coordinates, (n, dim) float32."""
        out, scales = torch.empty(len(codes), self.dim, device=codes.device), self.scales(codes)
        for i, piece in enumerate(self.pieces):
            packed = codes[:, piece.bytes]
            room = torch.empty(len(codes), self.per_byte * packed.shape[1], device=codes.device)
            levels = self.levels(packed, room)[:, : piece.count]
            out[:, piece.coordinates] = (levels - (2**self.bits - 1) / 2) * scales[:, i : i + 1]
        return out

    def squares(self, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_j w_j z_j^2 of stored coordinates, (n,) float32, for weights (dim,)."""
        return self.decode(codes).square_() @ weights


def scales_of(stored: torch.Tensor) -> torch.Tensor:
    """(n, k) float32 of the scales at the end of rows, (n, 2 k) uint8, which may lie at odd addresses."""
    apart = torch.empty(stored.shape, dtype=torch.uint8, device=stored.device)
    return apart.copy_(stored).view(torch.bfloat16).float()


class OneProduct:
    """As `CodeScorer`, by operations whose number does not grow with the pieces: on a device each is a launch.

    Args:
        layout: the codes' layout.
        queries: (q, dim) float32, on the device where codes will be scored.
    """

    def __init__(self, layout: CodeLayout, queries: torch.Tensor) -> None:
        device = queries.device
        padded = torch.cat([queries, torch.zeros(len(queries), 1, device=device)], dim=1)
        self._layout, self._queries = layout, padded.index_select(1, layout.order.to(device)).T
        self._piece_of = layout.piece_of.to(device)
        self._shifts = (torch.arange(layout.per_byte) * layout.bits).to(torch.uint8).to(device)
        self._step = max(_UNPACKED_BYTES // (4 * layout.packed * layout.per_byte), 1)

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        layout, parts = self._layout, []
        mask, middle = 2**layout.bits - 1, (2**layout.bits - 1) / 2
        for part in codes.split(self._step):
            levels = (part[:, : layout.packed, None] >> self._shifts) & mask
            z = SCRATCH.take("unpacked", len(part), layout.packed, layout.per_byte, device=part.device)
            z.copy_(levels).sub_(middle).mul_(layout.scales(part).index_select(1, self._piece_of)[:, :, None])
            parts.append((z.flatten(1) @ self._queries).T)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CodeScorer:
    """Inner products of fixed query coordinates with the coordinates in blocks of codes, on the CPU.

    Args:
        layout: the codes' layout.
        queries: (q, dim) float32.
    """

    def __init__(self, layout: CodeLayout, queries: torch.Tensor) -> None:
        self._layout, self._count = layout, len(queries)
        # The kernel's, once it is there.
        self._queries, self._suits = queries, self._count <= _KERNEL_UP_TO.get(layout.bits, self._count)
        self._middle = (2**layout.bits - 1) / 2
        # Each piece's queries, in the order in which its levels come out: (per_byte * size, q), padded with zeros.
        self._parts = []
        for piece in layout.pieces:
            size = layout.per_byte * (piece.bytes.stop - piece.bytes.start)
            part = torch.zeros(size, self._count)
            part[: piece.count] = queries[:, piece.coordinates].T
            self._parts.append(part)
        # <x, scale (level - middle)> = scale (<x, level> - middle sum x): one product on the raw levels.
        self._offsets = torch.stack([part.sum(dim=0) * self._middle for part in self._parts], dim=1)
        self._by_table = self._count <= _TABLES_UP_TO and layout.bits <= _TABLE_BITS

    @cached_property
    def _cut(self) -> Planes:
        """The queries as the kernel takes them."""
        pieces = self._layout.pieces
        firsts, counts = [piece.coordinates.start for piece in pieces], [piece.count for piece in pieces]
        sizes = [piece.bytes.stop - piece.bytes.start for piece in pieces]
        return KERNEL.planes(self._queries, firsts, counts, sizes, self._layout.bits)

    @cached_property
    def _places(self) -> torch.Tensor:
        """(packed,) int32: where each byte's table begins."""
        return torch.arange(self._layout.packed, dtype=torch.int32) * 256

    @cached_property
    def _tables(self) -> torch.Tensor:
        """(q, packed * 256) float32: what each byte adds to a piece's product, for each of its values."""
        layout = self._layout
        values = torch.arange(256)
        shifts = torch.arange(layout.per_byte) * layout.bits
        grid = ((values[None, :] >> shifts[:, None]) & (2**layout.bits - 1)).float() - self._middle
        out = torch.zeros(self._count, layout.packed, 256)
        for piece, part in zip(layout.pieces, self._parts, strict=True):
            if piece.count:
                out[:, piece.bytes] = part.unflatten(0, (layout.per_byte, -1)).permute(2, 1, 0) @ grid
        return out.flatten(1)

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        out = torch.empty(self._count, codes.shape[0])
        if self._suits and KERNEL.ready(codes.numel() * self._count):
            return self._cut.score(codes, self._layout.scales(codes), self._offsets, out)
        for start in range(0, codes.shape[0], _BLOCK_ROWS):
            part = codes[start : start + _BLOCK_ROWS]
            here = out[:, start : start + len(part)]
            if self._by_table:
                self._by_tables(part, here)
            else:
                self._by_products(part, here)
        return out

    def _by_products(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        scales, layout = self._layout.scales(codes), self._layout
        total: torch.Tensor | None = None
        for i, (piece, queries, offset) in enumerate(zip(layout.pieces, self._parts, self._offsets.T, strict=True)):
            room = SCRATCH.take("levels", len(codes), queries.shape[0])
            levels = layout.levels(codes[:, piece.bytes], room)
            scores = (levels @ queries).sub_(offset).mul_(scales[:, i : i + 1])
            total = scores if total is None else total.add_(scores)
        out[:] = total.T  # type: ignore[union-attr]

    def _by_tables(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        layout = self._layout
        scales = layout.scales(codes)
        places = SCRATCH.take("places", len(codes), layout.packed, dtype=torch.int32)
        places.copy_(codes[:, : layout.packed]).add_(self._places)
        found = SCRATCH.take("found", len(codes), layout.packed)
        for q, table in enumerate(self._tables):
            torch.index_select(table, 0, places.flatten(), out=found.view(-1))
            sums = torch.stack([found[:, piece.bytes].sum(dim=1) for piece in layout.pieces], dim=1)
            out[q] = (sums * scales).sum(dim=1)

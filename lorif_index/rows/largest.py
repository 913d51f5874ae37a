"""Largest: of each group of coordinates the place and the sign of the largest, in 4 to 8 bits a group.

Where many directions add about as much to a score, a bit buys more if it is spread over several of them: of g unit
Gaussians, the largest holds (E max |z|)^2 of g, .64 for the sign of one in a bit, .40 each of 8 in 4 bits, .17 each of
32 in 6 (the bound for a Gaussian source is 1 - 2^-2R at R bits each: Cover and Thomas, Elements of Information Theory,
10.3.3). It is a vector quantiser whose codewords are the positive and negative unit vectors. As with single levels
(see `codes`), the scale of a piece is |z|^2 / <z, v>, so that inner products are not shrunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import embedding_bag, pad

from .codes import SCALES_BYTES, Piece

# E max |z| of so many unit Gaussians (integrated numerically).
_MEAN_LARGEST = {8: 1.7834, 16: 2.0772, 32: 2.3471, 64: 2.5961, 128: 2.8276}
GROUPS = tuple(_MEAN_LARGEST)
# Codes are unpacked from eights, which take as many bytes as a code has bits.
_EIGHT = 8
_BLOCK_ROWS = 512
# Up to so many queries, a table of both signs is faster than weights for each row's groups (a core: 10 us a row
# against 29 for 8 queries, 135 against 131 for 256), for twice the memory.
_SIGNED_UP_TO = 8


def kept_share(group: int) -> float:
    """Of a unit Gaussian's square, what a group of so many keeps of each on average."""
    return _MEAN_LARGEST[group] ** 2 / group


def code_bits(group: int) -> int:
    """Bits of a group's code: place and sign."""
    return group.bit_length()


def codes_of_whole_bytes(bits: int) -> int:
    """Least number of codes of so many bits that end with a byte."""
    return 8 // math.gcd(bits, 8)


@dataclass(frozen=True)
class LargestLayout:
    """Where the codes of groups lie in a row: packed codes, piece after piece, then the pieces' scales.

    Attributes:
        dim: number of coordinates.
        group: coordinates of each group: 8, 16, 32, 64 or 128.
        widths: coordinates of each piece, dim together; whole groups, whose codes are whole bytes.
    """

    dim: int
    group: int
    widths: tuple[int, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        out, at, byte = [], 0, 0
        for width in self.widths:
            size = width // self.group * code_bits(self.group) // 8
            out.append(Piece(slice(at, at + width), slice(byte, byte + size)))
            at, byte = at + width, byte + size
        return tuple(out)

    @property
    def packed(self) -> int:
        """Bytes of the codes."""
        last = self.pieces[-1].bytes.stop
        return last + last % 2

    @property
    def row_bytes(self) -> int:
        return self.packed + SCALES_BYTES * len(self.widths)

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
        scales = torch.zeros(z.shape[0], len(self.pieces))
        for i, piece in enumerate(self.pieces):
            if piece.count:
                scales[:, i] = self._encode(z[:, piece.coordinates], out[:, piece.bytes])
        out[:, self.packed :] = scales.to(torch.bfloat16).view(torch.uint8).reshape(len(z), -1)
        return out

    def _encode(self, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes one piece's codes into its bytes of rows; its scales (n,)."""
        # The largest entry first: squares of very small or large coordinates would leave float32.
        peak = z.abs().amax(dim=1, keepdim=True)
        unit = z / torch.where(peak > 0, peak, 1.0)
        groups = unit.unflatten(1, (-1, self.group))
        largest, place = groups.abs().max(dim=2)
        sign = groups.gather(2, place.unsqueeze(2)).squeeze(2) >= 0
        out[:] = _pack(2 * place + sign, code_bits(self.group), out.shape[1])
        along = largest.sum(dim=1)
        return torch.where(along > 0, unit.square().sum(dim=1) / along, 0.0) * peak[:, 0]

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, pieces) float32."""
        return codes[:, self.packed :].contiguous().view(torch.bfloat16).reshape(len(codes), len(self.widths)).float()

    def unpacked(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, dim / group) int64: twice a group's place, and one more for a positive sign, counted over all groups
        before it: an index into coordinates of both signs."""
        found = [_unpack(codes[:, p.bytes], code_bits(self.group), p.count // self.group) for p in self.pieces]
        each = torch.cat(found, dim=1)
        return each.add_(torch.arange(0, 2 * self.dim, 2 * self.group, device=codes.device))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored coordinates, (n, dim) float32; all but one of a group are 0."""
        at, scales = self.unpacked(codes), self.scales(codes)
        signed = (at & 1).float().mul_(2.0).sub_(1.0)
        counts = torch.tensor([p.count // self.group for p in self.pieces], device=codes.device)
        values = signed * scales.repeat_interleave(counts, dim=1)
        return torch.zeros(len(codes), self.dim, device=codes.device).scatter_(1, at >> 1, values)


def _pack(codes: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """(n, size) uint8 of codes (n, m) int64, eight in `bits` bytes, the first in the lowest bits."""
    eights = pad(codes, (0, -codes.shape[1] % _EIGHT)).unflatten(1, (-1, _EIGHT))
    words = (eights << (torch.arange(_EIGHT) * bits)).sum(dim=2)
    return words.contiguous().view(torch.uint8).unflatten(1, (-1, 8))[:, :, :bits].flatten(1)[:, :size]


def _unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """(n, count) int64: what `_pack` was given."""
    eights = pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    words = pad(eights, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = words >> (torch.arange(_EIGHT, device=packed.device) * bits)
    return codes.bitwise_and_((1 << bits) - 1).flatten(1)[:, :count]


class LargestScorer:
    """Inner products of fixed query coordinates with the coordinates in blocks of codes.

    Args:
        layout: the codes' layout.
        queries: (q, dim) float32, on the device where codes will be scored.
    """

    def __init__(self, layout: LargestLayout, queries: torch.Tensor) -> None:
        self._layout, self._signed = layout, len(queries) <= _SIGNED_UP_TO
        columns = queries.T.contiguous()
        if self._signed:
            columns = torch.stack([-columns, columns], dim=1).flatten(0, 1)
        self._columns = columns

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        return torch.cat([self._block(part) for part in codes.split(_BLOCK_ROWS)]).T

    def _block(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, q) float32."""
        at, scales = self._layout.unpacked(codes), self._layout.scales(codes)
        out = torch.zeros(len(codes), self._columns.shape[1], device=codes.device)
        start = 0
        for i, piece in enumerate(self._layout.pieces):
            part = at[:, start : start + piece.count // self._layout.group]
            start += part.shape[1]
            if not part.shape[1]:
                continue
            if self._signed:
                out.addcmul_(embedding_bag(part, self._columns, mode="sum"), scales[:, i : i + 1])
            else:
                signs = (part & 1).float().mul_(2.0).sub_(1.0).mul_(scales[:, i : i + 1])
                out += embedding_bag(part >> 1, self._columns, mode="sum", per_sample_weights=signs)
        return out

"""Codes: rotated coordinates in 1, 2, 4 or 8 bits each, with one scale per example.

A random rotation makes the coordinates of an example look like equal Gaussians, for which a uniform grid with the
best step for a unit Gaussian is within 1 dB of the best quantiser (Max, IRE Trans. Inf. Theory 6(1), 1960). The scale
is |z|^2 / <z, v>, v being the grid point, so that inner products are not shrunk by the rounding (RaBitQ, Gao and
Long, arXiv:2405.12497).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .scratch import SCRATCH

BITS = (1, 2, 4, 8)
# Best uniform steps for a unit Gaussian and 2^bits levels (Max, 1960, table II; 8 bits by minimising numerically).
_STEP = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}
# Root mean square of a unit Gaussian's level, counted from the middle (integrated numerically).
_LEVEL_RMS = {1: 0.5, 2: 0.9428, 4: 2.9660, 8: 32.4662}
_SCALE_BYTES = 4
# Rows unpacked at once: what stays in a core's cache.
_BLOCK_ROWS, _GPU_BLOCK_ROWS = 512, 1 << 16


@dataclass(frozen=True)
class CodeLayout:
    """Where the codes of k coordinates lie in a row: packed levels, then the scale as float32.

    Attributes:
        dim: k.
        bits: of each coordinate.
    """

    dim: int
    bits: int

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def packed(self) -> int:
        """Bytes of the levels, a multiple of 4, so that the scale is aligned."""
        needed = -(-self.dim // self.per_byte)
        return -(-needed // 4) * 4

    @property
    def row_bytes(self) -> int:
        return self.packed + _SCALE_BYTES

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Codes (n, row_bytes) uint8 of coordinates (n, k) float32, on the CPU. A row of zeros comes back as zeros."""
        z = z.to(device="cpu", dtype=torch.float32)
        count, top = z.shape[0], 2**self.bits - 1
        # The largest entry first: squares of very small or large coordinates would leave float32.
        peak = z.abs().amax(dim=1, keepdim=True)
        unit = z / torch.where(peak > 0, peak, 1.0)
        rms = unit.square().mean(dim=1, keepdim=True).sqrt()
        levels = unit / (torch.where(rms > 0, rms, 1.0) * _STEP[self.bits]) + top / 2
        levels = levels.round_().clamp_(0, top)
        grid = levels - top / 2
        along = (unit * grid).sum(dim=1)
        scale = torch.where(along > 0, unit.square().sum(dim=1) / along, 0.0) * peak[:, 0]
        spread = torch.zeros(count, self.packed * self.per_byte, dtype=torch.uint8)
        spread[:, : self.dim] = levels.to(torch.uint8)
        # Byte j holds coordinates j, j + packed, j + 2 packed, ..., so that unpacking writes contiguous pieces.
        parts = spread.unflatten(1, (self.per_byte, self.packed))
        out = torch.empty(count, self.row_bytes, dtype=torch.uint8)
        out[:, : self.packed] = parts[:, 0]
        for i in range(1, self.per_byte):
            out[:, : self.packed] |= parts[:, i] << (i * self.bits)
        out[:, self.packed :] = scale.contiguous().view(torch.uint8).reshape(count, _SCALE_BYTES)
        return out

    def levels(self, codes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Unscaled levels 0 .. 2^bits - 1 of codes (n, row_bytes), into out (n, per_byte * packed) float32."""
        packed = codes[:, : self.packed]
        if self.bits == 8:
            return out.copy_(packed)
        mask = 2**self.bits - 1
        for i in range(self.per_byte):
            part = packed if i == 0 else packed >> (i * self.bits)
            out[:, i * self.packed : (i + 1) * self.packed] = part & mask if i < self.per_byte - 1 else part
        return out

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """(n,) float32."""
        return codes[:, self.packed :].contiguous().view(torch.float32).reshape(-1)

    def norms(self, codes: torch.Tensor) -> torch.Tensor:
        """(n,) float32, about the coordinates' norms: levels of rotated coordinates differ little in theirs."""
        return self.scales(codes) * (_LEVEL_RMS[self.bits] * math.sqrt(self.dim))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The stored coordinates, (n, k) float32."""
        buffer = torch.empty(codes.shape[0], self.per_byte * self.packed, device=codes.device)
        levels = self.levels(codes, buffer)[:, : self.dim]
        return (levels - (2**self.bits - 1) / 2) * self.scales(codes)[:, None]


class CodeScorer:
    """Inner products of fixed query coordinates with the coordinates in blocks of codes.

    Args:
        layout: the codes' layout.
        queries: (q, k) float32, on the device where codes will be scored.
    """

    def __init__(self, layout: CodeLayout, queries: torch.Tensor) -> None:
        self._layout = layout
        # <x, scale (level - middle)> = scale (<x, level> - middle sum x): one product on the raw levels.
        self._queries = torch.zeros(layout.per_byte * layout.packed, queries.shape[0], device=queries.device)
        self._step = _BLOCK_ROWS if queries.device.type == "cpu" else _GPU_BLOCK_ROWS
        self._queries[: layout.dim] = queries.T
        self._offset = queries.sum(dim=1) * ((2**layout.bits - 1) / 2)

    def score(self, codes: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of codes (n, row_bytes)."""
        out = torch.empty(self._queries.shape[1], codes.shape[0], device=codes.device)
        for start in range(0, codes.shape[0], self._step):
            part = codes[start : start + self._step]
            room = SCRATCH.take("levels", len(part), self._queries.shape[0], device=codes.device)
            levels = self._layout.levels(part, room)
            scores = (levels @ self._queries).sub_(self._offset).mul_(self._layout.scales(part)[:, None])
            out[:, start : start + len(part)] = scores.T
        return out

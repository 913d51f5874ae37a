"""Rows: how all that is stored of one example lies beside each other, so that one example is one read.

A row has two parts, of which an index may keep either or both: the factors of all layers, and the codes of its
coordinates. The parts lie apart, so that the small codes can be read without the factors. Eigencodes take the factors'
place where they are kept. Layers of one shape form a group. Within the factors, group after group: all left factors of
its layers, then all right ones; layers of full rank hold their gradient instead. A block of rows is then a handful of
strided matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..capture.gradients import LayerSpec
from .bits import CodeLayout
from .largest import LargestLayout
from .scratch import CPU
from .truncation import Factors

CODES = "uint8"
STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, CODES: torch.uint8}


@dataclass(frozen=True)
class Rows:
    """A block of rows.

    Attributes:
        factors: (n, width) in the stored dtype, or eigencodes (n, width) uint8; width 0 where neither is kept.
        codes: (n, code bytes) uint8; 0 bytes where none are kept.
    """

    factors: torch.Tensor
    codes: torch.Tensor

    def __len__(self) -> int:
        return int(self.factors.shape[0])

    def __getitem__(self, which: slice | torch.Tensor) -> Rows:
        return Rows(self.factors[which], self.codes[which])

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device; these themselves where they are on it."""
        return Rows(self.factors.to(device), self.codes.to(device))


@dataclass(frozen=True)
class Group:
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


class RowLayout:
    """The layout of a row.

    Args:
        specs: the layers.
        dtype: of the stored factors.
        factors: whether factors are kept.
        codes: the layout of the coordinates' codes, or None where none are kept.
        eigen: the layout of eigencodes, which are kept in the factors' place, or None.

    Attributes:
        groups: layers of one shape; none where no factors are kept.
        width: elements of the factors or eigencodes; 0 where neither is kept.
        factor_bytes, code_bytes: of a row's parts; row_bytes: of both.
    """

    def __init__(
        self,
        specs: Mapping[str, LayerSpec],
        dtype: str,
        *,
        factors: bool = True,
        codes: CodeLayout | None = None,
        eigen: CodeLayout | LargestLayout | None = None,
    ) -> None:
        by_shape: dict[tuple[int, int, int], list[str]] = {}
        for spec in specs.values() if factors and eigen is None else ():
            by_shape.setdefault((spec.d_in, spec.d_out, spec.rank), []).append(spec.name)
        groups, offset = [], 0
        for (d_in, d_out, rank), names in by_shape.items():
            group = Group(tuple(names), d_in, d_out, rank, rank >= min(d_in, d_out), offset)
            groups.append(group)
            offset += group.width
        self.groups = tuple(groups)
        self.codes, self.eigen = codes, eigen
        self.width = offset if eigen is None else eigen.row_bytes
        self.dtype = dtype if eigen is None else CODES
        self.torch_dtype = STORAGE[self.dtype]
        self.factor_bytes = self.width * self.torch_dtype.itemsize
        self.code_bytes = codes.row_bytes if codes else 0
        self.row_bytes = self.factor_bytes + self.code_bytes

    @property
    def narrows(self) -> bool:
        """Whether rows have factors, and coordinates that cost less to score."""
        return self.codes is not None and self.width > 0

    def empty(self, count: int, device: torch.device = CPU) -> Rows:
        """Room for rows."""
        factors = torch.empty(count, self.width, dtype=self.torch_dtype, device=device)
        return Rows(factors, torch.empty(count, self.code_bytes, dtype=torch.uint8, device=device))

    def rows(self, factors: torch.Tensor | None, codes: torch.Tensor | None) -> Rows:
        """Rows of parts that may be absent."""
        count = len(factors) if factors is not None else len(codes) if codes is not None else 0
        none = self.empty(count)
        return Rows(none.factors if factors is None else factors, none.codes if codes is None else codes)

    def pack(self, factors: Mapping[str, Factors]) -> torch.Tensor:
        """The factors' part of rows, (n, width) float32, on the factors' device."""
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

    def vanished(self, rows: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """(n, layers) bool, layers in row order: not zero in rows, float32, but all zero in the stored dtype."""
        flags = []
        for group in self.groups:
            before, after = ((group.left(r) != 0).flatten(2).any(dim=2) for r in (rows, stored))
            flags.append(before & ~after)
        return torch.cat(flags, dim=1)

    def unpack(self, rows: Rows) -> dict[str, Factors]:
        """The factors in rows, as float32."""
        block = rows.factors.float()
        out = {}
        for group in self.groups:
            left = group.left(block)
            right = None if group.dense else group.right(block)
            for i, name in enumerate(group.names):
                out[name] = Factors(left[:, i], None if right is None else right[:, i])
        return out

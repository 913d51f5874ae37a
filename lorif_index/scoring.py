"""Scoring: transformed queries against stored factors, in one streamed pass.

I(q, i) = sum_l sum_a U_i[:, a]^T Q'_l V_i[:, a], O(D) for a pair and layer. (The published code projects every
training example on V at every query, O(D r), for the same numbers.) Everything is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .query import Preconditioner
from .rows import Group, RowLayout
from .store import BlockBuffer, Store

# From here on, rebuilding U V^T once and one matrix product for all queries is faster than a product a query
# (measured at d = 32: from 24 queries on at c = 1, from 10 at c = 4).
_REBUILD_FROM = 48
# Float32 bytes of a block of rows: what stays in a core's cache between the steps.
_BLOCK_BYTES = 2 << 20


def _block_rows(width: int) -> int:
    return min(max(_BLOCK_BYTES // (4 * width), 16), 512)


class Scorer:
    """Scores blocks of rows against a fixed set of transformed queries.

    Args:
        layout: the rows' layout.
        queries: layer -> (q, d_in, d_out) float32; layers that are absent count nothing.
    """

    def __init__(self, layout: RowLayout, queries: Mapping[str, torch.Tensor]) -> None:
        self.count = next(iter(queries.values())).shape[0]
        self._buffer = BlockBuffer()
        self._rows = _block_rows(layout.width)
        self._plans = [
            _Plan(group, queries, self.count) for group in layout.groups if any(name in queries for name in group.names)
        ]

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores (q, n) float32 of rows (n, width) in the stored dtype."""
        out = torch.zeros(self.count, rows.shape[0])
        for start in range(0, rows.shape[0], self._rows):
            block = self._buffer.convert(rows[start : start + self._rows])
            for plan in self._plans:
                plan.add(out[:, start : start + len(block)], block)
        return out


class _Plan:
    """How one group of layers is scored: query by query on the factors, or all at once on rebuilt gradients."""

    def __init__(self, group: Group, queries: Mapping[str, torch.Tensor], count: int) -> None:
        self._group = group
        self._together = group.dense or count * (group.rank + 1) >= _REBUILD_FROM
        self._scratch = torch.empty(0)
        if self._together:
            # One (D, q) matrix for each layer that counts, by its place in the group.
            self._matrices = [
                (i, queries[name].flatten(1).T.contiguous()) for i, name in enumerate(group.names) if name in queries
            ]
        else:
            # Per query one (layers * c, d_in, d_out) batch: a matrix per factor pair, zero where one does not count.
            empty = torch.zeros(count, group.d_in, group.d_out)
            stacked = torch.stack([queries.get(name, empty) for name in group.names], dim=1)
            self._batches = list(stacked.repeat_interleave(group.rank, dim=1))

    def add(self, out: torch.Tensor, block: torch.Tensor) -> None:
        """Adds the group's scores of a block of rows (n, width) float32 to out (q, n)."""
        if not self._together:
            # Views (layers * c, n, d): the pairs of a block as one batch of strided matrices, without a copy.
            left = self._group.left(block).flatten(1, 2).transpose(0, 1)
            right = self._group.right(block).flatten(1, 2).transpose(0, 1)
            product = self._reused((*left.shape[:2], self._group.d_out))
            for q, batch in enumerate(self._batches):
                out[q] += torch.bmm(left, batch, out=product).mul_(right).sum(0).sum(1)
            return
        total = torch.zeros(len(block), out.shape[0])
        for i, matrix in self._matrices:
            total.addmm_(self._gradient(block, i), matrix)
        out += total.T

    def _gradient(self, block: torch.Tensor, layer: int) -> torch.Tensor:
        """(n, D): the stored gradients of one layer, in a buffer that is used again."""
        group = self._group
        if group.dense:
            return group.left(block)[:, layer].flatten(1)
        dense = self._reused((len(block), group.d_in, group.d_out))
        return rebuild(group.left(block)[:, layer], group.right(block)[:, layer], dense).flatten(1)

    def _reused(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self._scratch.shape != shape:
            self._scratch = torch.empty(shape)
        return self._scratch


def rebuild(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """U V^T from (n, c, d_in) and (n, c, d_out), into out (n, d_in, d_out)."""
    if left.shape[1] == 1:
        return torch.mul(left[:, 0, :, None], right[:, 0, None, :], out=out)
    return torch.bmm(left.transpose(1, 2), right, out=out)


def stream_scores(store: Store, scorer: Scorer) -> Iterator[tuple[int, torch.Tensor, int]]:
    """(position of the first row, scores (q, n), bytes read) of every block of the store, in order."""
    for start, rows in store.stream():
        yield start, scorer.score(rows), rows.shape[0] * store.layout.row_bytes


class TopK:
    """The k best of a stream of scores per query; ties go to the earlier row. Memory O(q k), whatever the stream.

    Args:
        queries: q.
        k: how many to keep.
        largest: keep the largest scores; else the smallest.
    """

    def __init__(self, queries: int, k: int, *, largest: bool = True) -> None:
        self._k = k
        self._sign = 1.0 if largest else -1.0
        self._scores = torch.empty(queries, 0)
        self._positions = torch.empty(queries, 0, dtype=torch.int64)

    def update(self, start: int, scores: torch.Tensor) -> None:
        """Takes scores (q, n) of the rows start .. start + n - 1."""
        signed = scores * self._sign
        positions = torch.arange(start, start + signed.shape[1]).expand_as(signed)
        if signed.shape[1] > self._k:
            # Everything at or above the block's k-th best, so that ties are decided by position below.
            kth = torch.topk(signed, self._k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
            if self._scores.shape[1] == self._k:
                kth = torch.maximum(kth, self._scores[:, -1:])
            keep = signed >= kth
            most = int(keep.sum(dim=1).max())
            if most == 0:
                return
            # The chosen columns first, in order; the rest is marked and sorts last.
            order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :most]
            chosen = torch.gather(keep, 1, order)
            signed = torch.gather(signed, 1, order).masked_fill(~chosen, -torch.inf)
            positions = torch.gather(positions, 1, order)
        signed = torch.cat([self._scores, signed], dim=1)
        positions = torch.cat([self._positions, positions], dim=1)
        order = torch.argsort(signed, dim=1, descending=True, stable=True)[:, : self._k]
        self._scores, self._positions = torch.gather(signed, 1, order), torch.gather(positions, 1, order)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions (q, k) int64, scores (q, k) float32), best first."""
        return self._positions, self._scores * self._sign


def self_scores(layout: RowLayout, rows: torch.Tensor, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
    """g^T H^-1 g summed over layers, (n,) float32, for rows (n, width) in the stored dtype."""
    out = torch.zeros(rows.shape[0])
    step = _block_rows(layout.width)
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float()
        for group in layout.groups:
            for i, name in enumerate(group.names):
                if name not in preconditioners:
                    continue
                left = group.left(block)[:, i]
                if not group.dense:
                    left = rebuild(left, group.right(block)[:, i], torch.empty(len(block), group.d_in, group.d_out))
                out[start : start + step] += preconditioners[name].quadratic(left.flatten(1))
    return out

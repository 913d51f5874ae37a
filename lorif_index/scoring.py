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

# From so many queries on, rebuilding U V^T once a block and one matrix product is faster than a product a query.
_REBUILD_FROM = 4
_BLOCK_ROWS = 256


class Scorer:
    """Scores blocks of rows against a fixed set of transformed queries.

    Args:
        layout: the rows' layout.
        queries: layer -> (q, d_in, d_out) float32; layers that are absent count nothing.
    """

    def __init__(self, layout: RowLayout, queries: Mapping[str, torch.Tensor]) -> None:
        self.count = next(iter(queries.values())).shape[0]
        self._groups = [g for g in layout.groups if any(name in queries for name in g.names)]
        self._buffer = BlockBuffer()
        self._rebuild = self.count >= _REBUILD_FROM
        self._matrices: list[torch.Tensor] = []
        for group in self._groups:
            empty = torch.zeros(self.count, group.d_in, group.d_out)
            stacked = torch.stack([queries.get(name, empty) for name in group.names], dim=1)
            if self._rebuild or group.dense:
                self._matrices.append(stacked.reshape(self.count, -1).T.contiguous())
            else:
                # (q, layers * c, d_in, d_out): one matrix per factor pair.
                self._matrices.append(stacked.repeat_interleave(group.rank, dim=1))

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores (q, n) float32 of rows (n, width) in the stored dtype."""
        out = torch.zeros(rows.shape[0], self.count)
        for start in range(0, rows.shape[0], _BLOCK_ROWS):
            part = rows[start : start + _BLOCK_ROWS]
            block = self._buffer.convert(part)
            for group, matrix in zip(self._groups, self._matrices, strict=True):
                self._add(out[start : start + _BLOCK_ROWS], block, group, matrix)
        return out.T

    def _add(self, out: torch.Tensor, block: torch.Tensor, group: Group, matrix: torch.Tensor) -> None:
        if group.dense:
            out.addmm_(group.left(block).flatten(1), matrix)
        elif self._rebuild:
            out.addmm_(_rebuild(group, block).flatten(1), matrix)
        else:
            # Views (layers * c, n, d): the pairs of a block as one batch of strided matrices, without a copy.
            left = group.left(block).flatten(1, 2).transpose(0, 1)
            right = group.right(block).flatten(1, 2).transpose(0, 1)
            for q in range(self.count):
                out[:, q] += torch.bmm(left, matrix[q]).mul_(right).sum(dim=(0, 2))


def _rebuild(group: Group, block: torch.Tensor) -> torch.Tensor:
    """U V^T of every layer of a group, (n, layers, d_in, d_out)."""
    left, right = group.left(block), group.right(block)
    dense = left[:, :, 0, :, None] * right[:, :, 0, None, :]
    for a in range(1, group.rank):
        dense.addcmul_(left[:, :, a, :, None], right[:, :, a, None, :])
    return dense


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
    for start in range(0, rows.shape[0], _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS].float()
        for group in layout.groups:
            dense = group.left(block) if group.dense else _rebuild(group, block)
            for i, name in enumerate(group.names):
                if name in preconditioners:
                    g = dense[:, i].flatten(1)
                    out[start : start + _BLOCK_ROWS] += preconditioners[name].quadratic(g)
    return out

"""Scoring: transformed queries against stored rows, streamed or gathered; exact for what is stored.

Factors: I(q, i) = sum_l sum_a U_i[:, a]^T Q'_l V_i[:, a], O(D) for a pair and layer. (The published code projects every
training example on V at every query, O(D r), for the same numbers.) Coordinates: I(q, i) = <x, z_i>. Both: the
coordinates' subspace from them, the rest from the factors, I = <x, z_i> + sum_l <Q'_l - A_l^T (W x)_l, U_i V_i^T>.
Eigencodes: I(q, i) = sum_l sum_j (v_j^T g_q) (v_j^T g_i) / (S_j + lambda). Everything is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..capture.gradients import LayerSpec
from ..codecs.eigencodes import EigenCode
from ..codecs.layout import Group, RowLayout, Rows
from ..codecs.scratch import CPU, SCRATCH
from ..curvature.fit import LayerCurvature
from ..curvature.inverse import Preconditioner, combined, inside_of, transform
from ..curvature.sketch import Sketch
from ..ranks import Ranks
from ..storage.resident import Resident

# From here on, rebuilding U V^T once and one matrix product for all queries is faster than a product a query
# (measured at d = 32: from 24 queries on at c = 1, from 10 at c = 4).
_REBUILD_FROM = 48
# Float32 bytes of a block of rows: what stays in a core's cache between the steps; a GPU wants large ones.
_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2 << 20, 256 << 20


def _block_rows(width: int, device: torch.device = CPU) -> int:
    if device.type != "cpu":
        return max(_GPU_BLOCK_BYTES // (4 * width), 16)
    return min(max(_BLOCK_BYTES // (4 * width), 16), 512)


class Scorer:
    """Scores blocks of rows against a fixed set of transformed queries.

    Args:
        layout: the rows' layout.
        queries: layer -> (q, d_in, d_out) float32, for the factors; layers that are absent count nothing.
        x: (q, k) float32, for the coordinates, or None where the rows have none.
        eigen: (q, dim) float32, for eigencodes, or None where the rows have none.
        device: where the rows will be; scores are on it, too.
    """

    def __init__(
        self,
        layout: RowLayout,
        queries: Mapping[str, torch.Tensor],
        x: torch.Tensor | None = None,
        eigen: torch.Tensor | None = None,
        device: torch.device = CPU,
    ) -> None:
        queries = {name: g.to(device) for name, g in queries.items()}
        given = next(part for part in (x, eigen, *queries.values()) if part is not None)
        self.count = int(given.shape[0])
        self._layout = layout
        self._rows = _block_rows(max(layout.width, 1), device)
        self._plans = [
            _Plan(group, queries, self.count, device)
            for group in layout.groups
            if any(name in queries for name in group.names)
        ]
        self._codes = self._eigen = None
        if layout.codes is not None and x is not None:
            self._codes = layout.codes.scorer(x.to(device))
        if layout.eigen is not None and eigen is not None:
            self._eigen = layout.eigen.scorer(eigen.to(device))

    def score(self, rows: Rows) -> torch.Tensor:
        """Scores (q, n) float32."""
        out = self.score_factors(rows.factors)
        if self._codes is not None:
            out += self._codes.score(rows.codes)
        return out

    def score_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The coordinates' share of the scores, (q, n) float32, of codes (n, code bytes)."""
        if self._codes is None:
            return torch.zeros(self.count, len(codes), device=codes.device)
        return self._codes.score(codes)

    def score_factors(self, factors: torch.Tensor) -> torch.Tensor:
        """The share of the factors, or of eigencodes, in the scores, (q, n) float32, of (n, width) as stored."""
        if self._eigen is not None:
            return self._eigen.score(factors)
        out = torch.zeros(self.count, factors.shape[0], device=factors.device)
        if self._plans:
            for start in range(0, len(factors), self._rows):
                block = SCRATCH.convert("block", factors[start : start + self._rows])
                for plan in self._plans:
                    plan.add(out[:, start : start + len(block)], block)
        return out


@dataclass(frozen=True)
class Question:
    """Queries made ready for the rows of an index.

    Attributes:
        queries: layer -> (q, d_in, d_out) float32, for the factors; empty where none are kept.
        x: (q, k) float32, for coordinates and coarse index; None where the index has no sketch.
        count: q.
        eigen: (q, dim) float32, for eigencodes, or None.
        scale: (m,) float32 that a scan multiplies the live rows' scores by, or None.
        thresholds: (q,) float32 by which a scan shrinks scores then (see `shrinkage`), or None.
    """

    queries: Mapping[str, torch.Tensor]
    x: torch.Tensor | None
    count: int
    eigen: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    thresholds: torch.Tensor | None = None

    def some(self, rows: slice) -> Question:
        """Some of the queries."""
        x, eigen, thresholds = (None if part is None else part[rows] for part in (self.x, self.eigen, self.thresholds))
        queries = {n: g[rows] for n, g in self.queries.items()}
        return Question(queries, x, len(range(self.count)[rows]), eigen, self.scale, thresholds)

    def scaled(self, queries: torch.Tensor | None, rows: torch.Tensor | None) -> Question:
        """Scores are multiplied by the rows' (n,) and by the queries' (q,), each if given."""
        if queries is None:
            return replace(self, scale=rows)
        scaled = {n: g * queries[:, None, None] for n, g in self.queries.items()}
        x, eigen = (None if part is None else part * queries[:, None] for part in (self.x, self.eigen))
        return replace(self, queries=scaled, x=x, eigen=eigen, scale=rows)

    def scorer(self, layout: RowLayout, device: torch.device = CPU) -> Scorer:
        """The scorer of these queries for rows of that layout, on that device."""
        return Scorer(layout, self.queries, self.x if layout.codes is not None else None, self.eigen, device)


def ask(
    layout: RowLayout,
    specs: Mapping[str, LayerSpec],
    sketch: Sketch | None,
    curvature: Mapping[str, LayerCurvature],
    gradients: Mapping[str, torch.Tensor],
    preconditioners: Mapping[str, Preconditioner],
    eigen: EigenCode | None = None,
) -> Question:
    """The question that a query's gradients {layer: (q, d_in, d_out)} put to rows of that layout."""
    count = int(next(iter(gradients.values())).shape[0])
    flat = {name: g.flatten(1) for name, g in gradients.items()}
    x, inside = None, {}
    if sketch is not None:
        inside = inside_of(flat, curvature)
        x = sketch.query(inside, curvature, preconditioners)
    if eigen is not None:
        inside = inside or inside_of(flat, curvature)
        return Question({}, x, count, eigen.query(inside, preconditioners))
    if not layout.groups:
        return Question({}, x, count)
    if sketch is None or x is None or layout.codes is None:
        return Question(transform(gradients, preconditioners), x, count)
    # What <x, z> accounts for is taken off in every layer, also in those left out by the query: coordinates mix them.
    taken = sketch.taken(x, curvature)
    within = {n: preconditioners[n].within(inside[n]) - taken[n] if n in flat else -taken[n] for n in specs}
    queries = combined(within, curvature)
    for name, g in flat.items():
        queries[name] = preconditioners[name].with_outside(queries[name], g)
    return Question({n: queries[n].reshape(count, s.d_in, s.d_out) for n, s in specs.items()}, x, count)


def told(question: Question | None, ranks: Ranks) -> Question:
    """Rank 0's question, on all ranks; its scale and thresholds stay behind."""
    if ranks.size == 1 and question is not None:
        return question
    facts, tensors = None, list[torch.Tensor]()
    if question is not None and ranks.first:
        parts = {"x": question.x, "eigen": question.eigen} | {f"q {n}": g for n, g in question.queries.items()}
        there = {name: part.contiguous() for name, part in parts.items() if part is not None}
        facts, tensors = [question.count, [[n, list(p.shape)] for n, p in there.items()]], list(there.values())
    count, shapes = ranks.told(facts)
    if not ranks.first:
        tensors = [torch.empty(shape) for _, shape in shapes]
    found = {name: ranks.spread(part, 0) for (name, _), part in zip(shapes, tensors, strict=True)}
    queries = {name[2:]: part for name, part in found.items() if name.startswith("q ")}
    return Question(queries, found.get("x"), count, found.get("eigen"))


class _Plan:
    """How one group of layers is scored: query by query on the factors, or all at once on rebuilt gradients."""

    def __init__(self, group: Group, queries: Mapping[str, torch.Tensor], count: int, device: torch.device) -> None:
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


def stream_scores(rows: Resident, question: Question) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(positions (m,) int64, scaled scores (q, m) on the CPU, bytes read) of the live rows of every block, in order."""
    scorer, dead, at = question.scorer(rows.layout, rows.device), rows.store.dead, 0
    for start, block, read in rows.stream():
        scores, positions = scorer.score(block).cpu(), torch.arange(start, start + len(block))
        if dead is not None:
            alive = torch.from_numpy(~dead[start : start + len(block)])
            scores, positions = scores[:, alive], positions[alive]
        if question.scale is not None:
            scores.mul_(question.scale[at : at + len(positions)])
        at += len(positions)
        yield positions, scores, read


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

    def update(self, positions: torch.Tensor, scores: torch.Tensor) -> None:
        """Takes scores (q, n) of rows at positions (n,), which rise from call to call."""
        signed = scores * self._sign
        positions = positions.expand_as(signed)
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


def self_scores(
    layout: RowLayout,
    rows: Rows,
    preconditioners: Mapping[str, Preconditioner],
    sketch: Sketch | None,
    curvature: Mapping[str, LayerCurvature],
    eigen: EigenCode | None = None,
) -> torch.Tensor:
    """g^T H^-1 g summed over layers, (n,) float32, for what rows say of g.

    With coordinates, those of g inside the subspace are e = e_f + W (z - W^T e_f), e_f being the factors' (0 where
    none are kept), and g^T H^-1 g = sum_l e_l^T diag((S + lambda) / (S + lambda')) e_l + the factors' outside part.
    """
    out = torch.zeros(len(rows))
    step = _block_rows(max(layout.width, 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if eigen is not None:
            out[start : start + step] = eigen.quadratic(part.factors, preconditioners)
            continue
        dense = {name: f.dense().flatten(1) for name, f in layout.unpack(part).items()} if layout.groups else {}
        total = out[start : start + step]
        if layout.codes is None or sketch is None:
            for name, preconditioner in preconditioners.items():
                total += preconditioner.quadratic(dense[name])
            continue
        missing = layout.codes.decode(part.codes)
        inside = {}
        for name, piece in sketch.layers.items():
            if dense:
                found = curvature[name].coordinates(dense[name])[:, piece.directions]
                inside[name] = found / piece.whitening(curvature[name])
                missing = missing - inside[name] @ piece.weights
        for name, preconditioner in preconditioners.items():
            piece = sketch.layers[name]
            scale, weights = piece.whitening(curvature[name]), preconditioner.inside[piece.directions]
            correction = missing @ piece.weights.T
            e = inside[name] + correction if dense else correction
            total += (e * scale).square() @ weights
            if dense:
                total += preconditioner.quadratic(dense[name])
                total -= (inside[name] * scale).square() @ weights
    return out

"""Explain: the score of a training example taken apart, exactly, by layer, module, token of either side.

An example's projected gradient is a sum over its positions, G_i = sum_t (P_in^T x_t) (P_out^T dy_t)^T, so that its
unfactored score is one, too: <Q', G_i> = sum_t x_t^T P_in Q' P_out^T dy_t. So is the query's gradient; H^-1 is linear
and symmetric, so that the share of the query's position t is x_t^T P_in (H^-1 G_i) P_out^T dy_t (`docs/maths.md`). Only
the explained examples are computed again, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..capture.gradients import GradientBlock
from ..capture.hooks import Capture
from ..capture.layers import Use
from ..codecs.base import Transformed
from ..curvature.inverse import Preconditioner, transform_precisely
from ..progress import Stage
from .examples import TrainingData, check_examples
from .reader import Reader

# Share of the absolute sum that may fall on hidden positions and count as rounding.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Explanation:
    """One score taken apart. The shares of each decomposition sum to `score`, up to float32 rounding.

    Attributes:
        query: number of the query in its batch.
        id: of the training example.
        score: of the example's whole gradient, <Q', G_i> over the chosen layers. Signs and units are those of a search.
        stored: what `Index.scores` gives for the pair, from the stored row.
        layers: layer -> its share.
        modules: module -> its share: those of a weight that several modules use are apart.
        tokens: (T,) float32, shares of the example's positions, padding cut off: what reading token t, and predicting
            from there, has to do with it. None where layers differ in their positions, as those of an image do.
        layer_tokens: layer -> (T_layer,) float32.
        query_tokens: (Tq,) float32, shares of the query's positions. None for a query of gradients, where layers differ
            in their positions, and where they were not asked for.
    """

    query: int
    id: int
    score: float
    stored: float
    layers: dict[str, float]
    modules: dict[str, float]
    tokens: np.ndarray | None
    layer_tokens: dict[str, np.ndarray]
    query_tokens: np.ndarray | None

    @property
    def difference(self) -> float:
        """score - stored: what rounding or factoring the row has changed."""
        return self.score - self.stored

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: arrays as lists."""
        return {
            "query": self.query,
            "id": self.id,
            "score": self.score,
            "stored": self.stored,
            "layers": dict(self.layers),
            "modules": dict(self.modules),
            "tokens": None if self.tokens is None else self.tokens.tolist(),
            "layer_tokens": {name: shares.tolist() for name, shares in self.layer_tokens.items()},
            "query_tokens": None if self.query_tokens is None else self.query_tokens.tolist(),
        }


@dataclass
class Positions:
    """What a query's layers hold at its positions: a `Watch` that keeps them."""

    calls: list[tuple[str, Use, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __call__(self, layer: str, use: Use, left: torch.Tensor, right: torch.Tensor) -> None:
        self.calls.append((layer, use, left, right))


@dataclass(frozen=True)
class QueryBatch:
    """A batch of queries.

    Attributes:
        gradients: chosen layer -> (q, d_in, d_out) float32, of the quantity to lower.
        positions: what their layers held, or None where it is not known or not wanted.
        shown: (q, T) bool, which positions are no padding, or None.
        factor: what shares at `positions` are multiplied by: -1 for a measure, over the loss scale.
        capture: that took them, or None.
    """

    gradients: dict[str, torch.Tensor]
    positions: Positions | None = None
    shown: np.ndarray | None = None
    factor: float = 1.0
    capture: Capture | None = None

    @property
    def count(self) -> int:
        return int(next(iter(self.gradients.values())).shape[0])


def shown_positions(batch: Any) -> np.ndarray | None:
    """(n, T) bool: which positions a batch's `attention_mask` shows; None where it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return (mask != 0).cpu().numpy()


def position_shares(
    capture: Capture, layer: str, use: Use, left: torch.Tensor, right: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """(n, t): left_t^T M right_t of positions as a `Watch` gets them; M (d_in, d_out)."""
    matrix = matrix.to(device=left.device, dtype=left.dtype)
    if left.ndim == 4:
        lifted = capture.lifted(layer, use, matrix)
        return torch.einsum("nlgi,igo->nlgo", left, lifted).mul_(right).sum(dim=(2, 3))
    return torch.matmul(left, matrix).mul_(right).sum(dim=2)


class _Shares:
    """A `Watch` that keeps examples' shares in the queries that they are explained for.

    Args:
        capture: that watches.
        matrices: layer -> (q, d_in, d_out), Q'; layers that are absent count nothing.
        wanted: (query, rows of the batch) of the pairs.
    """

    def __init__(
        self, capture: Capture, matrices: Mapping[str, torch.Tensor], wanted: list[tuple[int, np.ndarray]]
    ) -> None:
        self._capture, self._matrices, self._wanted = capture, matrices, wanted
        self.calls: list[tuple[str, str, list[torch.Tensor]]] = []

    def __call__(self, layer: str, use: Use, left: torch.Tensor, right: torch.Tensor) -> None:
        if layer not in self._matrices:
            return
        parts = []
        for query, rows in self._wanted:
            every = len(rows) == left.shape[0]
            x, y = (left, right) if every else (left[rows], right[rows])
            parts.append(position_shares(self._capture, layer, use, x, y, self._matrices[layer][query]))
        self.calls.append((layer, use.name, parts))

    def of(self, number: int) -> list[tuple[str, str, np.ndarray]]:
        """(layer, module, (rows, t) float64) of all calls, of one of the wanted pairs."""
        scale = self._capture.scale
        return [(layer, name, parts[number].cpu().double().numpy() / scale) for layer, name, parts in self.calls]


def explain(
    reader: Reader,
    asked: QueryBatch,
    wanted: np.ndarray,
    first: int,
    data: TrainingData,
    capture: Capture,
    preconditioners: Mapping[str, Preconditioner],
    members: int,
    stage: Stage,
) -> list[list[Explanation]]:
    """Explanations of one batch of queries.

    Args:
        reader: the index.
        asked: the queries.
        wanted: (q, k) int64, ids of live rows.
        first: number of the first query.
        data: where the examples are.
        capture: takes their gradients, of the loss.
        preconditioners: of the chosen layers.
        members: models of the ensemble, over which scores are means.
        stage: is told of every pair.

    Returns:
        q lists of k.

    Raises:
        DataError: the data do not hold an example, or hold another than was indexed.
    """
    matrices = {name: g / members for name, g in transform_precisely(asked.gradients, preconditioners).items()}
    matrices = {name: matrix.to(capture.device) for name, matrix in matrices.items()}
    unique = np.unique(wanted)
    stored = _stored_scores(reader, asked, unique, preconditioners, members)
    found: dict[tuple[int, int], Explanation] = {}
    for ids, batch in data.select(unique):
        pairs = [(q, np.flatnonzero(np.isin(ids, wanted[q]))) for q in range(len(wanted))]
        pairs = [(q, rows) for q, rows in pairs if len(rows)]
        shares = _Shares(capture, matrices, pairs)
        block = capture.gradients(ids, batch, watch=shares)
        check_examples(reader.rows.energies_of(block.ids), block, capture.half)
        backwards = _query_shares(asked, block, pairs, preconditioners, members)
        shown = shown_positions(batch)
        for number, (q, rows) in enumerate(pairs):
            calls, count = shares.of(number), len(rows)
            by_layer = _by_layer([(layer, share) for layer, _, share in calls], list(asked.gradients), count)
            modules = _by_module(calls, list(by_layer), count)
            backward = None if backwards is None else _by_layer(backwards[number], list(by_layer), count)
            for place, row in enumerate(rows.tolist()):
                i = int(ids[row])
                found[q, i] = _explanation(
                    first + q,
                    i,
                    float(stored[q, int(np.searchsorted(unique, i))]),
                    {layer: share[place] for layer, share in by_layer.items()},
                    {module: float(share[place]) for module, share in modules.items()},
                    None if shown is None else shown[row],
                    None if backward is None else {layer: share[place] for layer, share in backward.items()},
                    None if asked.shown is None else asked.shown[q],
                )
            stage.advance(len(rows))
    return [[found[q, i] for i in row] for q, row in enumerate(wanted.tolist())]


def _stored_scores(
    reader: Reader,
    asked: QueryBatch,
    unique: np.ndarray,
    preconditioners: Mapping[str, Preconditioner],
    members: int,
) -> np.ndarray:
    """(q, m): what the stored rows of some ids score."""
    question = reader.ask(Transformed.of(asked.gradients, preconditioners, reader.curvature))
    rows = reader.store.gather(reader.store.positions_of(unique))
    scores: np.ndarray = reader.codec.scorer(question.parts).score(rows).numpy() / members
    return scores


def _query_shares(
    asked: QueryBatch,
    block: GradientBlock,
    pairs: list[tuple[int, np.ndarray]],
    preconditioners: Mapping[str, Preconditioner],
    members: int,
) -> list[list[tuple[str, np.ndarray]]] | None:
    """For each pair's query: (layer, (rows, Tq) float64) of all calls; None without positions.

    H^-1 is applied to the examples, a batch of them, and each is asked what it finds at the query's positions.
    """
    if asked.positions is None or asked.capture is None:
        return None
    gradients = {name: block.layers[name].dense().cpu() for name in asked.gradients}
    turned = transform_precisely(gradients, preconditioners)
    scale = asked.factor / members
    out: list[list[tuple[str, np.ndarray]]] = [[] for _ in pairs]
    for layer, use, left, right in asked.positions.calls:
        if layer not in turned:
            continue
        matrices = turned[layer].to(device=left.device, dtype=left.dtype)
        for number, (q, rows) in enumerate(pairs):
            x, y = left[q : q + 1], right[q : q + 1]
            if left.ndim == 4:
                shares = torch.cat([position_shares(asked.capture, layer, use, x, y, matrices[r]) for r in rows])
            else:
                some = matrices if len(rows) == len(matrices) else matrices[rows]
                shares = torch.matmul(x, some).mul_(y).sum(dim=2)
            out[number].append((layer, shares.cpu().double().numpy() * scale))
    return out


def _by_layer(calls: list[tuple[str, np.ndarray]], layers: list[str], count: int) -> dict[str, np.ndarray]:
    """Layer -> (rows, T) float64, in the index's order: calls of one layer are summed, position by position."""
    found = {layer: np.zeros((count, 0)) for layer in layers}
    for layer, share in calls:
        # Calls of different lengths, position by position from the first.
        wide, narrow = sorted((found[layer], share), key=lambda part: -part.shape[1])
        found[layer] = wide.copy()
        found[layer][:, : narrow.shape[1]] += narrow
    return found


def _by_module(calls: list[tuple[str, str, np.ndarray]], layers: list[str], count: int) -> dict[str, np.ndarray]:
    """Module -> (rows,) float64, in the order of the layers and of their uses."""
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        # Gradients arrive last module first.
        for name, share in reversed([(name, share) for of, name, share in calls if of == layer]):
            found[name] = found.get(name, np.zeros(count)) + share.sum(axis=1)
    return found


def _explanation(
    query: int,
    example: int,
    stored: float,
    layers: dict[str, np.ndarray],
    modules: dict[str, float],
    shown: np.ndarray | None,
    backwards: dict[str, np.ndarray] | None,
    query_shown: np.ndarray | None,
) -> Explanation:
    sums = {layer: float(share.sum()) for layer, share in layers.items()}
    layers = _without_padding(layers, shown)
    return Explanation(
        query=query,
        id=example,
        score=sum(sums.values()),
        stored=stored,
        layers=sums,
        modules=modules,
        tokens=_total(layers),
        layer_tokens={layer: share.astype(np.float32) for layer, share in layers.items()},
        query_tokens=None if backwards is None else _total(_without_padding(backwards, query_shown)),
    )


def _without_padding(layers: dict[str, np.ndarray], shown: np.ndarray | None) -> dict[str, np.ndarray]:
    """Without the positions that a mask hides, in layers that have the mask's; all stay if a share falls on one."""
    if shown is None or shown.all():
        return layers
    masked = [share for share in layers.values() if len(share) == len(shown)]
    hidden = sum(float(np.abs(share[~shown]).sum()) for share in masked)
    if hidden > _NOTHING * sum(float(np.abs(share).sum()) for share in masked):
        return layers
    return {layer: share[shown] if len(share) == len(shown) else share for layer, share in layers.items()}


def _total(layers: dict[str, np.ndarray]) -> np.ndarray | None:
    """(T,) float32, the sum over layers; None where they differ in their positions."""
    # A layer that an example's loss does not reach has no positions.
    parts = [share for share in layers.values() if len(share)]
    if not parts or len({len(part) for part in parts}) > 1:
        return None
    return np.sum(parts, axis=0).astype(np.float32)

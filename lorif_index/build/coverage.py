"""Coverage: which share of the gradients' squared norm an index keeps, stage by stage, on some of its sample.

tracked      of all parameters' gradients, what the tracked layers hold
projection   of theirs, what lies in the span of the projections: with P = Q R, |Q_in^T dW Q_out|^2 / |dW|^2
rows         of the projected gradients', what the stored rows keep: the squared cosine between G and what its row says
scores       the same under H^-1, in whose inner product scores are taken

The first two need gradients of parameters, one example's and one parameter's at a time; these are compared with those
captured, too: a model may use a weight without its module, which capture does not see.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture.data import Batch, ExampleSource, one_of
from ..capture.gradients import GradientBlock
from ..capture.held import HeldMap
from ..capture.hooks import Capture
from ..capture.layers import Use, supported
from ..capture.losses import PerExample
from ..capture.sharded import is_dtensor
from ..capture.sources import ModelCapture
from ..curvature.inverse import Preconditioner
from ..search.rows import IndexRows

# Examples whose parameters' gradients are taken, and whose rows are compared; at most one of so many in the index, so
# that it costs little beside the build.
_WITH_PARAMETERS, _WITH_ROWS = 8, 64
# Of so many random examples those are taken that have rows.
EXAMPLES = 4 * _WITH_ROWS
# Not names of layers.
ALL, SCORES = "", " scores"
# Relative difference that no rounding of a model in half precision makes; but what a projection leaves of a gradient
# may be rounding alone, a part of the whole of no more than this.
_DIFFERS, _ROUNDING = 0.1, 0.01
# Shares of what is not tracked that are told.
_SAID_FROM = 0.05
_ONE_OF = {_WITH_PARAMETERS: 300, _WITH_ROWS: 40}


def measure_coverage(
    rows: IndexRows,
    preconditioners: Mapping[str, Preconditioner],
    taken: ModelCapture,
    loss: PerExample | None,
    examples: ExampleSource | None,
    shuffled: np.ndarray,
) -> dict[str, Any] | None:
    """What an index that was just built keeps; None where it was not built from a model.

    Args:
        rows: of the index.
        preconditioners: layer -> H^-1 under the index's damping.
        taken, loss, examples: what it was built from.
        shuffled: ids in random order.

    Returns:
        shares of the squared norm, as plain JSON values: {"tracked", "untracked": {class of modules: of parameters that
        are not tracked, from .05 on}, "unknown": those of these classes that are no linear maps, "projection", "rows",
        "scores", "layers": {name: {"share": of all parameters', "projection", "rows"}}, "differing": layers whose
        captured gradients are not autograd's, "parameter_examples", "row_examples", "seconds"}. A share that is not
        known is None: those of parameters where autograd cannot give their gradients (out of memory, parameters that
        are quantised).
    """
    if examples is None:
        return None
    began = time.perf_counter()
    # Damaged gradients were skipped, and have no row.
    there = shuffled[:EXAMPLES]
    there = there[rows.store.positions_of(there) >= 0]
    counts = {most: min(most, max(len(rows.store) // each, 2)) for most, each in _ONE_OF.items()}
    wanted, few = np.sort(there[: counts[_WITH_ROWS]]), np.sort(there[: counts[_WITH_PARAMETERS]])
    capture = taken.capture(loss).trust()
    spans, kept, norms = _Spans(taken), _Kept(rows, preconditioners), _Norms(taken)
    # One walk: data without random access are walked through to find some.
    for ids, batch in examples.select(wanted):
        block = capture.gradients(ids, batch)
        kept.add(block)
        mine = np.flatnonzero(np.isin(ids, few))
        spans.add(block.select(mine))
        for place in mine.tolist() if not norms.failed else ():
            norms.add(capture, one_of(batch, place), block.select(np.array([place])))
    found: dict[str, Any] = {
        "tracked": None,
        "untracked": {},
        "unknown": [],
        "projection": None,
        "differing": sorted(norms.differing),
    }
    layers: dict[str, dict[str, float | None]] = {name: {} for name in rows.codec.specs}
    if norms.failed:
        few = few[:0]
    else:
        found["tracked"] = _ratio(sum(norms.layers.values()), norms.total)
        found["untracked"] = {
            kind: share
            for kind, square in sorted(norms.others.items(), key=lambda item: -item[1])
            if (share := _ratio(square, norms.total) or 0.0) >= _SAID_FROM
        }
        found["unknown"] = sorted(norms.unknown & found["untracked"].keys())
        found["projection"] = _ratio(sum(spans.sums.values()), sum(norms.layers.values()))
        for name in layers:
            layers[name]["share"] = _ratio(norms.layers[name], norms.total)
            layers[name]["projection"] = _ratio(spans.sums[name], norms.layers[name])
    for name in layers:
        layers[name]["rows"] = kept.share(name)
    return found | {
        "rows": kept.share(ALL),
        "scores": kept.share(SCORES),
        "layers": layers,
        "parameter_examples": len(few),
        "row_examples": len(wanted),
        "seconds": round(time.perf_counter() - began, 6),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(min(part / whole, 1.0), 6) if whole > 0 else None


class _Norms:
    """Squared norms of the gradients of parameters, of those that are trained and those that are tracked.

    Attributes:
        total: of all of them, over the examples.
        layers: of each layer's.
        others: of what is not tracked, by the class of its module.
        unknown: classes of modules that are no linear maps.
        differing: layers whose projected gradients are others than those captured.
        failed: autograd could not give them; a diagnosis is not worth the build.
    """

    def __init__(self, taken: ModelCapture) -> None:
        self.total, self.failed, self._scale = 0.0, False, 1.0
        self.differing: set[str] = set()
        self._projections = taken.projections
        self.others: dict[str, float] = {}
        self._class = {id(p): type(m).__name__ for m in taken.model.modules() for p in m.parameters(recurse=False)}
        self.unknown = {type(m).__name__ for m in taken.model.modules() if not supported(m)}
        # Parameters that one module alone uses in a known way.
        self._plain: set[int] = set()
        self._projected: dict[str, torch.Tensor] = {}
        self._whole: dict[str, float] = {}
        self.layers = {layer.name: 0.0 for layer in taken.layers}
        # Parameter -> layers, uses, and whether it is the bias there.
        self._owner: dict[int, list[tuple[str, Use, bool]]] = {}
        # A tied weight may be tracked in some of its modules alone, by choice.
        holders = Counter(id(p) for m in taken.model.modules() for p in m.parameters(recurse=False))
        for layer in taken.layers:
            for use in layer.uses:
                weight, biases = getattr(use.module, "weight", None), getattr(use.module, "bias", None)
                if experts := isinstance(use.module, HeldMap):
                    weight, biases = use.module.held, getattr(use.module.parent, str(use.module.biases), None)
                if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
                    # Quantised: its gradient is no parameter's.
                    self.failed = True
                    continue
                self._owner.setdefault(id(weight), []).append((layer.name, use, False))
                plain = holders[id(weight)] == 1 and (experts or type(use.module) in (nn.Linear, nn.Embedding))
                if plain and not is_dtensor(weight):
                    self._plain.add(id(weight))
                if use.bias:
                    self._owner.setdefault(id(biases), []).append((layer.name, use, True))
                    if id(weight) in self._plain:
                        self._plain.add(id(biases))
        parameters = [p for p in taken.model.parameters() if p.is_floating_point()]
        trained = [p for p in parameters if p.requires_grad or id(p) in self._owner]
        # A model that was frozen to be asked says nothing of what was trained.
        self._parameters = trained if any(p.requires_grad for p in parameters) else parameters

    def add(self, capture: Capture, batch: Batch, captured: GradientBlock) -> None:
        """Adds a batch of one, whose captured gradients are compared."""
        self._projected.clear()
        self._whole.clear()
        self._scale = capture.scale

        def on_gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                square = self._square(parameter.grad)
                self.total += square
                shares: dict[str, float] = {}
                for name, use, bias in self._owner.get(id(parameter), ()):
                    part, its = parameter.grad, square
                    if isinstance(use.module, HeldMap):
                        part = use.module.part(part, bias=bias)
                        its = self._square(part)
                    shares[name] = its
                    if id(parameter) in self._plain:
                        self._project(part, its, name, use, bias=bias)
                left = square
                for name, its in shares.items():
                    self.layers[name] += its
                    left -= its
                if id(parameter) not in self._owner or left > _ROUNDING * square:
                    kind = self._class[id(parameter)]
                    self.others[kind] = self.others.get(kind, 0.0) + left
                parameter.grad = None

        try:
            with _wanted(self._parameters, on_gradient):
                capture.differentiate(batch, self._parameters)
        except RuntimeError:
            self.failed = True
            return
        for name, sum_ in self._projected.items():
            theirs, ours = sum_ / capture.scale, captured.layers[name].dense()[0].to(sum_)
            least = _ROUNDING * math.sqrt(self._whole[name])
            if float((theirs - ours).norm()) > max(_DIFFERS * float(torch.maximum(theirs.norm(), ours.norm())), least):
                self.differing.add(name)

    def _square(self, gradient: torch.Tensor) -> float:
        """Squared norm, without the loss's scale."""
        return float(torch.linalg.vector_norm(gradient.float()).double().square()) / self._scale**2

    def _project(self, grad: torch.Tensor, square: float, name: str, use: Use, *, bias: bool) -> None:
        """Adds P_in^T dW P_out of one parameter's gradient to a layer's, and its squared norm."""
        left, right = (self._projections.side(name, side, grad.device, torch.float32) for side in ("in", "out"))
        rows = grad.float()[None] if bias else grad.float() if isinstance(use.module, nn.Embedding) else grad.float().T
        rows = rows if right is None else rows @ right
        # The bias is one more input, the last.
        place = slice(use.inputs, None) if bias else slice(use.inputs)
        if left is None:
            found = rows.new_zeros(use.inputs + use.bias, rows.shape[1])
            found[place] = rows
        else:
            found = left[place].T @ rows
        self._projected[name] = self._projected.get(name, 0.0) + found
        self._whole[name] = self._whole.get(name, 0.0) + square


@contextmanager
def _wanted(parameters: list[nn.Parameter], add: Any) -> Iterator[None]:
    """Gradients of some parameters go to `add`, which clears them; what was there is put back."""
    before, flags = [p.grad for p in parameters], [p.requires_grad for p in parameters]
    handles = []
    try:
        for p in parameters:
            p.grad = None
            # Hooks are for what requires a gradient.
            handles.append(p.requires_grad_(True).register_post_accumulate_grad_hook(add))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, grad, flag in zip(parameters, before, flags, strict=True):
            p.grad = grad
            p.requires_grad_(flag)


class _Spans:
    """Layer -> sum of |Q_in^T dW Q_out|^2, of G = R_in^T Q_in^T dW Q_out R_out."""

    def __init__(self, taken: ModelCapture) -> None:
        self.sums = dict.fromkeys(taken.specs, 0.0)
        self._sides = {name: [_inverse_root(taken, name, side) for side in ("in", "out")] for name in taken.specs}

    def add(self, block: GradientBlock) -> None:
        for name, (left, right) in self._sides.items() if block.count else ():
            g = block.layers[name].dense().cpu().double()
            g = g if left is None else left @ g
            g = g if right is None else g @ right
            self.sums[name] += float(g.square().sum())


def _inverse_root(taken: ModelCapture, layer: str, side: str) -> torch.Tensor | None:
    """(P^T P)^-1/2, (d, d) float64, on P's range; None where P is orthonormal, or there is none."""
    matrix = taken.projections.side(layer, side, torch.device("cpu"), torch.float64)
    if matrix is None:
        return None
    gram = matrix.T @ matrix
    if bool((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-4):
        return None
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-9 * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T


class _Kept:
    """What rows keep: of each layer, of `ALL`, and of what `SCORES` weigh."""

    def __init__(self, rows: IndexRows, preconditioners: Mapping[str, Preconditioner]) -> None:
        self._rows, self._preconditioners = rows, preconditioners
        self._sums = {name: [0.0, 0.0] for name in (*rows.codec.specs, ALL, SCORES)}

    def share(self, name: str) -> float | None:
        return _ratio(*self._sums[name])

    def add(self, block: GradientBlock) -> None:
        products = torch.zeros(2, 3, block.count, dtype=torch.float64)
        kept = self._rows.store.gather(self._rows.store.positions_of(block.ids))
        for name, row in self._rows.codec.decode(kept).items():
            whole = block.layers[name].flat().cpu()
            turned = [self._preconditioners[name].apply(g) for g in (whole, row)]
            of_layer = _products(whole, row, whole, row)
            products += torch.stack([of_layer, _products(whole, row, *turned)])
            _add(self._sums[name], of_layer)
        _add(self._sums[ALL], products[0])
        _add(self._sums[SCORES], products[1])


def _products(g: torch.Tensor, row: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(3, n) float64: <g, left>, <row, right>, <g, right>."""
    pairs = ((g, left), (row, right), (g, right))
    return torch.stack([(a.double() * b.double()).sum(dim=1) for a, b in pairs])


def _add(sums: list[float], products: torch.Tensor) -> None:
    """Adds |g|^2 cos^2 and |g|^2."""
    own, others, both = products
    cosine = torch.where(others > 0, both.clamp(min=0).square() / others.clamp(min=torch.finfo(others.dtype).tiny), 0.0)
    sums[0] += float(cosine.sum())
    sums[1] += float(own.sum())

"""Products: the Gauss-Newton matrix (GGN) of a model times projected vectors, exactly, in passes of a batch's cost.

In the projected coordinates of the tracked layers the GGN of an example is P^T J^T M J P: J the Jacobian of the model's
outputs, M the second derivative of the loss at them, diag(p) - p p^T for a softmax cross-entropy (Schraudolph, Neural
Computation 14(7), 2002). J P v is how the outputs change as the weights do by P_in V P_out^T: each tracked module adds
its own to its output's tangent, a product with narrow matrices, and forward-mode differentiation carries it on to the
outputs. J^T u is what `Capture` takes of sum(outputs u). No vector of the weights' size is ever made.

Where an operation has no forward-mode formula, J P v is found by differentiating twice: scalars s, zero, multiply what
the modules add; <outputs, u> differentiated by s is linear in u, and its derivative by u is J P v (the trick of two
backward passes, Townsend, 2017). Fused attention, which may have neither, is computed as it is written. The first batch
decides, and must show that <v, H v> = <J v, M J v>.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import CaptureError
from .data import Batch, batch_count, repeated
from .ensemble import members_of
from .heads import Head, HeadOf
from .hooks import Capture
from .layers import Use

# How far <v, H v> and <J v, M J v> may be apart, in full and in half precision.
_APART, _HALF_APART = 1e-2, 0.1
_UNFUSED = "without fused attention"
WAYS = ("forward", f"forward {_UNFUSED}", "twice", f"twice {_UNFUSED}")
"""How J P v is found, from the cheapest on."""


class Products:
    """GGN products of one model.

    Args:
        capture: of the layers that vectors are of.
        head: the loss at the model's outputs; of an ensemble at each member's, which have nothing in common.

    Attributes:
        way: one of `WAYS`; None before the first product.
        device: of the model.
    """

    def __init__(self, capture: Capture, head: HeadOf) -> None:
        self._capture, self._head, self.device = capture, head, capture.device
        self.way: str | None = None

    def summed(self, vectors: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """sum_i P^T J_i^T M_i J_i P v over the examples of a batch.

        Args:
            vectors: layer -> (q, d_in, d_out) float32. The batch is run q times over, at once.
            batch: b examples, as for the loss.

        Returns:
            layer -> (q, d_in, d_out) float32, on the device of the vectors.

        Raises:
            CaptureError: the model cannot be differentiated in any of the ways.
        """
        if self.way is not None:
            return self._run(self.way, vectors, batch)[0]
        failures: list[str] = []
        first: Exception | None = None
        for way in WAYS:
            try:
                found, expected = self._run(way, vectors, batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = first or error
                failures.append(f"{way}: {' '.join(str(error).split())[:200]}")
                continue
            got = sum(float((found[name].double() * v.double()).sum()) for name, v in vectors.items())
            expected = float(expected)
            apart = _HALF_APART if self._capture.half else _APART
            if abs(got - expected) <= apart * max(abs(expected), abs(got)):
                self.way = way
                return found
            failures.append(f"{way}: <v, H v> is {got:.6g} and <J v, M J v> {expected:.6g}")
        raise CaptureError(
            "products with the Gauss-Newton matrix need derivatives of the model that it does not have ("
            + "; ".join(failures)
            + "): load it with attn_implementation='eager', switch its custom kernels off, or search without refine="
        ) from first

    def _run(
        self, way: str, vectors: Mapping[str, torch.Tensor], batch: Batch
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | float]:
        """The products, and <J v, M J v> over all examples and vectors."""
        count, each = len(next(iter(vectors.values()))), batch_count(batch)
        batch, ids = repeated(batch, count), np.arange(count)
        made = _Pass(self._capture, self._head, vectors, count * each)
        unfused: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if way.endswith(_UNFUSED) else nullcontext()
        if way.startswith("forward"):
            with unfused:
                made.weights = self._capture.pushed(batch, made.forward, made.push)
            # A pass like any other: nothing of the first is kept but the weights.
            (block,) = self._capture.several(ids, batch, made.weighed, each=each)
        else:
            with unfused:
                (block,) = self._capture.several(ids, batch, made.twice, push=made.push, each=each)
        device = next(iter(vectors.values())).device
        return {name: block.layers[name].dense().to(device) for name in vectors}, made.expected


def has_sequences(capture: Capture, head: HeadOf, first: Callable[[], tuple[np.ndarray, Batch]]) -> bool:
    """Whether examples have several predictions each, as some that `first` gives have."""
    ids, batch = first()
    found: list[bool] = []

    def look(model: nn.Module, given: Any) -> torch.Tensor:
        found.extend(head(member, given).exact is None for member in members_of(model))
        return torch.zeros(0, len(ids))

    capture.several(ids, batch, look)
    return any(found)


class _Pass:
    """A batch on its way through the model, with what modules add to their outputs.

    Attributes:
        weights: M J P v at each member's outputs, once they are known.
        expected: <J P v, M J P v>, summed; a tensor, so that a GPU is not waited for where nobody asks.
    """

    def __init__(self, capture: Capture, head: HeadOf, vectors: Mapping[str, torch.Tensor], rows: int) -> None:
        self._capture, self._head, self._rows = capture, head, rows
        self._vectors = {name: v.to(capture.device) for name, v in vectors.items()}
        # Of the examples, where it is differentiated twice.
        self._scalars: torch.Tensor | None = None
        self.weights: list[torch.Tensor] = []
        self.expected: torch.Tensor | float = 0.0

    def push(self, layer: str, use: Use, left: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output with the layer's part of J P v as its tangent, or times the scalars."""
        if layer not in self._vectors:
            return output
        with torch.no_grad():
            more = self._capture.changed(layer, use, left, self._vectors[layer], output)
        if self._scalars is None:
            return output + forward_ad.make_dual(torch.zeros_like(more), more)
        # A module may have several rows of each example.
        scalars = self._scalars.to(output).repeat_interleave(len(output) // self._rows)
        return output + more * scalars.reshape(-1, *(1 for _ in output.shape[1:]))

    def forward(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """The weights, by forward-mode differentiation."""
        with forward_ad.dual_level():
            heads = [self._head(member, batch) for member in members_of(model)]
            return [self._weights(head, forward_ad.unpack_dual(head.outputs).tangent) for head in heads]

    def weighed(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """(1, n): functions whose gradients are the products."""
        outputs = [self._head(member, batch).outputs for member in members_of(model)]
        found = [(z * u).flatten(1).sum(dim=1) for z, u in zip(outputs, self.weights, strict=True)]
        return torch.stack(found).sum(dim=0, keepdim=True)

    def twice(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The same, with weights by differentiating twice."""
        self._scalars = torch.zeros(self._rows, device=self._capture.device, requires_grad=True)
        found = []
        for member in members_of(model):
            head = self._head(member, batch)
            u = torch.zeros_like(head.outputs, requires_grad=True)
            (slope,) = torch.autograd.grad((head.outputs * u).sum(), self._scalars, create_graph=True)
            (tangent,) = torch.autograd.grad(slope.sum(), u, retain_graph=True)
            found.append((head.outputs * self._weights(head, tangent)).flatten(1).sum(dim=1))
        return torch.stack(found).sum(dim=0, keepdim=True)

    def _weights(self, head: Head, tangent: torch.Tensor | None) -> torch.Tensor:
        """M J P v at a head's outputs, which nothing reaches where they have no tangent."""
        with torch.no_grad():
            if tangent is None:
                return torch.zeros_like(head.outputs.detach())
            tangent = tangent.detach()
            u = head.product(tangent).detach()
            self.expected = self.expected + (tangent.double() * u.double()).sum()
            return u

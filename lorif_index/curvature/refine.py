"""Refine: a question's inverse solved for by conjugate gradients, of which only two products need be known.

H' x = g is solved from x = H^-1 g on, preconditioned by H^-1 (Hestenes and Stiefel, 1952; Saad, Iterative Methods for
Sparse Linear Systems, algorithm 9.1), where H is the stored curvature and H' = (1 - share) GGN + share H. Where H is
what H' is nearly, or has share as its least part, few steps are enough: no eigenvalue of H^-1 H' is below the share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import ConfigError

Vectors = dict[str, torch.Tensor]
"""Layer -> (q, d_in, d_out) float32."""
Linear = Callable[[Vectors], Vectors]

# A residual of float32 vectors says nothing below this share of the question.
_LEAST = 1e-6
# Of the stored curvature, where examples have several predictions.
_SEQUENCES = 0.5
# Of the solution in the answer; chosen on the fine-tuned GPT (`docs/quality.md`).
_WEIGHT = 0.5


@dataclass(frozen=True)
class Refine:
    """How a question's inverse is refined with the model.

    Attributes:
        iterations: of conjugate gradients; each takes a forward and a backward pass of all examples for each query.
        examples: random training examples that the exact Gauss-Newton matrix is the mean over; of fewer, all.
        share: of the stored curvature in the matrix that is solved with, above 0 and at most 1. None: .5 where examples
            are sequences, 1 where each is a single prediction. There the stored curvature is of exact rows, and what
            is new in the matrix, curvature between layers, has made scores worse (`docs/quality.md`).
        weight: of the solution in the refined question, above 0 and at most 1; the rest is the stored inverse's, made
            as long. Each errs in its own way: a mixture predicts retraining better than either.

    Raises:
        ConfigError: a value that cannot be.
    """

    iterations: int = 2
    examples: int = 192
    share: float | None = None
    weight: float = _WEIGHT

    def __post_init__(self) -> None:
        for name in ("iterations", "examples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Refine({name}=...) must be an integer of at least 1, got {value!r}")
        for name in ("share", "weight"):
            value = getattr(self, name)
            if value is None and name == "share":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ConfigError(f"Refine({name}=...) must be above 0 and at most 1, got {value!r}")

    def share_for(self, sequences: bool) -> float:
        """`share`, as a number."""
        if self.share is not None:
            return self.share
        return _SEQUENCES if sequences else 1.0


@dataclass(frozen=True)
class Solved:
    """Solutions of linear systems with one matrix.

    Attributes:
        x: layer -> (q, d_in, d_out) float32.
        residuals: of each system, (b - A x) in the norm of M^-1 over b in the same: at the start, then after each step.
    """

    x: Vectors
    residuals: list[list[float]]


def solve(apply: Linear, precondition: Linear, b: Vectors, iterations: int, least: float = _LEAST) -> Solved:
    """A^-1 b of several systems by conjugate gradients, from M^-1 b on; inner products are over all layers, in float64.

    A system whose residual is at most `least` is left as it is, and takes no more products.

    Args:
        apply: A v, of some of the systems.
        precondition: M^-1 v; A and M symmetric and positive.
        b: the right sides.
        iterations: steps at most.
        least: relative residual that is enough.
    """
    x = precondition(b)
    size = dots(b, x)
    wanted = size * least**2
    r = {name: part - ax for (name, part), ax in zip(b.items(), apply(x).values(), strict=True)}
    z = precondition(r)
    rz, p = dots(r, z), {name: part.clone() for name, part in z.items()}
    residuals = [[value] for value in _relative(rz, size)]
    going = (rz > wanted).nonzero()[:, 0]
    for _ in range(iterations):
        if not len(going):
            break
        some = {name: part[going] for name, part in p.items()}
        ap = apply(some)
        curved = dots(some, ap)
        step = torch.where(curved > 0, rz[going] / curved, 0.0)
        rest: Vectors = {}
        for name, part in some.items():
            by = step.to(part).reshape(-1, 1, 1)
            x[name][going] += by * part
            rest[name] = r[name][going] - by * ap[name]
            r[name][going] = rest[name]
        z = precondition(rest)
        after = dots(rest, z)
        turn = torch.where(rz[going] > 0, after / rz[going], 0.0)
        for name, part in z.items():
            p[name][going] = part + turn.to(part).reshape(-1, 1, 1) * some[name]
        rz[going] = after
        for q, value in zip(going.tolist(), _relative(after, size[going]), strict=True):
            residuals[q].append(value)
        # Where nothing is curved no step was made, and none will be.
        going = going[(after > wanted[going]) & (curved > 0)]
    return Solved(x, residuals)


def mixed(solved: Vectors, stored: Vectors, weight: float, multiply: Linear) -> Vectors:
    """weight x + (1 - weight) y |x| / |y|, in the norm of the stored curvature: that of scores over training examples.

    Args:
        solved, stored: x and y.
        weight: of x, which alone is given back at 1.
        multiply: H v.
    """
    if weight == 1:
        return solved
    x, y = (dots(part, multiply(part)).clamp_min(0.0) for part in (solved, stored))
    ratio = (1 - weight) * torch.where(y > 0, x / y, 0.0).sqrt()
    return {n: weight * part + ratio.to(part).reshape(-1, 1, 1) * stored[n] for n, part in solved.items()}


def dots(a: Vectors, b: Vectors) -> torch.Tensor:
    """(q,) float64: inner products over all layers."""
    parts = [torch.linalg.vecdot(a[name].flatten(1).double(), part.flatten(1).double()) for name, part in b.items()]
    return torch.stack(parts).sum(dim=0)


def _relative(squares: torch.Tensor, sizes: torch.Tensor) -> list[float]:
    """Roots of squares over sizes; 0 of nothing."""
    return torch.where(sizes > 0, squares.clamp_min(0.0) / sizes, 0.0).sqrt().tolist()

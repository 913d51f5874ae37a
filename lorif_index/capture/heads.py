"""Heads: what a loss is of a model's outputs z, by its Hessian there, the middle of the Gauss-Newton matrix J^T H J.

An example's loss is sum_t w_t l_t(z), with terms l_t of one kind and weights w_t that do not depend on z. Kinds:

    softmax    l = -sum_c y_c log p_c of C classes    H = diag(p) - p p^T                   one term of C outputs
    bernoulli  l of a logit, p = sigmoid(z)           H = p (1 - p)                         each output a term
    squared    l = (z - y)^2                          H = 2                                 each output a term

(Schraudolph, Neural Computation 14(7), 2002; of the first two it is also the Fisher matrix, Martens, arXiv:1412.1193.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from .losses import IGNORE, LogitsOf, checked_logits, cross_entropy


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class Head(ABC):
    """The outputs of one batch, and the Hessian of each example's loss at them.

    Attributes:
        kind: its name, which an index remembers.
        outputs: z, (n, ...) of at least two dimensions, with the graph behind it.
        weight: w, at least 0, of each term; it has the terms' shape.
        losses: the examples' own, (n,), from the same forward pass, where they were asked for.
    """

    kind: ClassVar[str]
    outputs: torch.Tensor
    weight: torch.Tensor
    losses: torch.Tensor | None = None

    @property
    @abstractmethod
    def width(self) -> int:
        """How many outputs, the last dimension's, are one term."""

    @property
    def exact(self) -> int | None:
        """How many rows add up to an example's Hessian, where it has one prediction; None where it has several."""
        return int(self.outputs.shape[1]) if self.outputs.ndim == 2 else None

    @abstractmethod
    def row(self, number: int) -> torch.Tensor:
        """v of z's shape; the sum of v v^T over the `exact` numbers is the Hessian."""

    @abstractmethod
    def root(self, signs: torch.Tensor) -> torch.Tensor:
        """v of z's shape, whose E[v v^T] is the Hessian, for independent random signs of z's shape."""

    @abstractmethod
    def product(self, u: torch.Tensor) -> torch.Tensor:
        """H u, for u of z's shape, or of several (..., *z's shape)."""


@dataclass(frozen=True)
class Softmax(Head):
    """Cross-entropy of logits (n, ..., C); weight (n, ...)."""

    kind = "softmax"

    @property
    def width(self) -> int:
        return int(self.outputs.shape[-1])

    @cached_property
    def _p(self) -> torch.Tensor:
        return wide(self.outputs.detach()).softmax(dim=-1)

    @cached_property
    def _scale(self) -> torch.Tensor:
        return self.weight.to(self._p.dtype).sqrt().unsqueeze(-1)

    def row(self, number: int) -> torch.Tensor:
        v = self._p.clone()
        v[..., number] -= 1.0
        v *= self._p[..., number : number + 1].sqrt()
        return v.mul_(self._scale)

    def root(self, signs: torch.Tensor) -> torch.Tensor:
        v = self._p.sqrt() * signs
        v -= self._p * v.sum(dim=-1, keepdim=True)
        return v.mul_(self._scale)

    def product(self, u: torch.Tensor) -> torch.Tensor:
        v = self._p * u
        v = v - self._p * v.sum(dim=-1, keepdim=True)
        return v * self.weight.to(v.dtype).unsqueeze(-1)


@dataclass(frozen=True)
class _Apart(Head):
    """Each output is a term of its own; the weight has z's shape."""

    @property
    def width(self) -> int:
        return 1

    @cached_property
    @abstractmethod
    def _diagonal(self) -> torch.Tensor:
        """The Hessian's, of z's shape."""

    def row(self, number: int) -> torch.Tensor:
        v = torch.zeros_like(self._diagonal)
        v[:, number] = self._diagonal[:, number].sqrt()
        return v

    def root(self, signs: torch.Tensor) -> torch.Tensor:
        return self._diagonal.sqrt() * signs

    def product(self, u: torch.Tensor) -> torch.Tensor:
        return self._diagonal * u


@dataclass(frozen=True)
class Bernoulli(_Apart):
    """Binary cross-entropy of logits (n, ...); weight (n, ...)."""

    kind = "bernoulli"

    @cached_property
    def _diagonal(self) -> torch.Tensor:
        p = wide(self.outputs.detach()).sigmoid()
        return p * (1.0 - p) * self.weight.to(p.dtype)


@dataclass(frozen=True)
class Squared(_Apart):
    """Squared error of outputs (n, ...); weight (n, ...), 1 for (z - y)^2 and .5 for half of it."""

    kind = "squared"

    @cached_property
    def _diagonal(self) -> torch.Tensor:
        return 2.0 * self.weight.to(wide(self.outputs).dtype)


class HeadOf(Protocol):
    """head_of(model, batch) -> the head of the loss of that batch; `kind` is the head's. With losses=True the head has
    the losses, too, where `gives_losses`."""

    kind: str
    gives_losses: bool

    def __call__(self, model: nn.Module, batch: Any, *, losses: bool = False) -> Head: ...


class Declared:
    """The head of a loss that says which logits it is the cross-entropy of, by an attribute `logits` (see `losses`).

    Args:
        logits: that attribute.
        gives_losses: the loss is known to be that cross-entropy, and not only said to be.
    """

    kind = Softmax.kind

    def __init__(self, logits: LogitsOf, gives_losses: bool = False) -> None:
        self._logits = logits
        self.gives_losses = gives_losses

    def __call__(self, model: nn.Module, batch: Any, *, losses: bool = False) -> Softmax:
        """The head of a batch.

        Raises:
            DataError: the function gave something else than logits and labels.
        """
        logits, labels = checked_logits(self._logits(model, batch))
        return Softmax(logits, labels != IGNORE, cross_entropy(logits, labels) if losses else None)

"""Seeing: the head of a user's own loss, found by watching it call torch's loss functions, and checked by autograd.

While the loss runs, calls of `cross_entropy`, `nll_loss`, `binary_cross_entropy_with_logits` and `mse_loss` of
`torch.nn.functional` (classes of `torch.nn` call them) give their terms one by one, however they reduce them. What the
loss makes of the terms says what each weighs: w_t = d loss / d l_t. The loss must be sum_t w_t l_t in every batch; in
the first one autograd's gradient and Hessian of the loss at the recorded outputs must be those of that sum and of the
head too. So nothing that is done with terms or outputs beside, such as a penalty or a power, passes for a head.

`nll_loss` takes log-probabilities. They are logits of themselves: log_softmax leaves them as they are, and the Jacobian
of log_softmax, I - 1 p^T, leaves diag(p) - p p^T as it is from both sides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from .heads import Bernoulli, Head, Softmax, Squared, wide
from .losses import PerExample, loss_name
from .sharded import is_dtensor

# Relative errors of rounding, by bytes of a number: of sums of terms, and of gradients and Hessians of one term; of the
# latter also in units of the term's weight.
_SUMS = {2: 2e-2, 4: 1e-5, 8: 1e-9}
_TERMS = {2: 5e-2, 4: 1e-3, 8: 1e-6}
_SMALL = 1e-2


class UnseenLoss(CaptureError):
    """A loss whose head is not found."""


@dataclass(frozen=True)
class _Call:
    """One call of a loss function.

    Attributes:
        kind: of its terms.
        z: the outputs as they were given, (N, ...), of a softmax (N, C, ...).
        terms: what the loss goes on with, (N, ...).
        scale: by which a term's own Hessian is multiplied, of the terms' shape: class weights, 0 of what is left out.
        trouble: why the call is not understood, or None.
    """

    kind: type[Head]
    z: torch.Tensor
    terms: torch.Tensor
    scale: torch.Tensor
    trouble: str | None = None

    def by_example(self, tensor: torch.Tensor, count: int, *, classes: bool = False) -> torch.Tensor:
        """A tensor of the terms' shape, or of z's, as (n, ...) with classes last; at least two dimensions of z."""
        if classes and self.kind is Softmax:
            tensor = tensor.movedim(1, -1)
        if len(tensor) != count:
            tensor = tensor.reshape(count, len(tensor) // count, *tensor.shape[1:])
        return tensor.unsqueeze(-1) if tensor.ndim == 1 and self.kind is not Softmax else tensor


class _Watch(TorchFunctionMode):
    """Records calls of loss functions, and hands out their terms.

    Args:
        apart: the terms are handed out without the graph behind them, so that what is made of them can be
            differentiated by itself.
    """

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self._apart = apart
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _READERS.get(func)
        if read is None:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        if any(is_dtensor(given[name]) for name in ("input", "target")):
            # Counted neither as a call nor by its value: the loss is then not seen.
            return func(*args, **(kwargs or {}))
        reduction = given.pop("reduction")
        legacy = [given.pop(name, None) for name in ("size_average", "reduce")]
        call, counted = read(given)
        if legacy != [None, None]:
            call = _troubled(call, "size_average and reduce are given in place of reduction")
        if self._apart:
            call = _Call(call.kind, call.z, call.terms.detach().requires_grad_(), call.scale, call.trouble)
        self.calls.append(call)
        if call.trouble is not None:
            return func(*args, **(kwargs or {}))
        if reduction == "none":
            return call.terms
        return call.terms.sum() if reduction == "sum" else call.terms.sum() / counted


def _troubled(call: _Call, trouble: str) -> _Call:
    return _Call(call.kind, call.z, call.terms, call.scale, trouble)


def _cross_entropy(given: dict[str, Any]) -> tuple[_Call, Any]:
    """The call, and what a mean of its terms is divided by.

    With targets q after smoothing, a term is -sum_c a_c q_c log p_c for class weights a: its Hessian is that of
    the softmax times sum_c a_c q_c.
    """
    z, target, smoothing = given["input"], given["target"], given["label_smoothing"]
    terms = functional.cross_entropy(**given, reduction="none")
    if z.ndim < 2:
        return _Call(Softmax, z, terms, terms, "its logits are of one example alone, without a dimension for it"), 1
    classes = z.shape[1]
    with torch.no_grad():
        weight = wide(z).new_ones(classes) if given["weight"] is None else given["weight"]
        if target.shape == z.shape:
            q = target * (1.0 - smoothing) + smoothing / classes
            return _Call(Softmax, z, terms, (q.movedim(1, -1) * weight).sum(dim=-1)), terms.numel()
        shown = target != given["ignore_index"]
        own = weight[target.masked_fill(~shown, 0)] * shown
        scale = own * (1.0 - smoothing) + weight.mean() * smoothing * shown if smoothing else own
    return _Call(Softmax, z, terms, scale), own.sum()


def _nll(given: dict[str, Any]) -> tuple[_Call, Any]:
    call, counted = _cross_entropy(given | {"label_smoothing": 0.0})
    with torch.no_grad():
        total = wide(call.z).logsumexp(dim=1) if call.z.ndim > 1 else call.terms
        wrong = bool((total.abs() > 10 * _rounding(_SUMS, call.z)).any())
    if call.trouble is None and wrong:
        call = _troubled(call, "nll_loss is given something else than log-probabilities, as log_softmax makes them")
    return call, counted


def _binary(given: dict[str, Any]) -> tuple[_Call, Any]:
    """With a weight b of positive labels a term's Hessian is that of a Bernoulli times 1 - y + b y."""
    z, y = given["input"], given["target"]
    terms = functional.binary_cross_entropy_with_logits(**given, reduction="none")
    with torch.no_grad():
        scale = torch.ones_like(terms)
        if given["pos_weight"] is not None:
            scale = scale * (1.0 - y + given["pos_weight"] * y)
        if given["weight"] is not None:
            scale = scale * given["weight"]
    return _Call(Bernoulli, z, terms, scale), terms.numel()


def _squared(given: dict[str, Any]) -> tuple[_Call, Any]:
    """Either side may be the model's."""
    z, y = given["input"], given["target"]
    if y.requires_grad and not z.requires_grad:
        z, y = y, z
    terms = functional.mse_loss(**given, reduction="none")
    if z.shape != y.shape:
        trouble = f"mse_loss is given two shapes, {tuple(z.shape)} and {tuple(y.shape)}"
        return _Call(Squared, z, terms, terms, trouble), terms.numel()
    if y.requires_grad:
        return _Call(Squared, z, terms, terms, "both sides of mse_loss depend on the model"), terms.numel()
    scale = torch.ones_like(terms)
    if given.get("weight") is not None:
        scale = scale * given["weight"].detach()
    return _Call(Squared, z, terms, scale), scale.sum()


_READERS: dict[Any, Callable[[dict[str, Any]], tuple[_Call, Any]]] = {
    functional.cross_entropy: _cross_entropy,
    functional.nll_loss: _nll,
    functional.binary_cross_entropy_with_logits: _binary,
    functional.mse_loss: _squared,
}


def _weights(calls: list[_Call], losses: torch.Tensor) -> list[tuple[_Call, torch.Tensor]]:
    """The calls that losses depend on, and what each of their terms weighs in its loss, of the terms' shape."""
    calls = [call for call in calls if call.terms.requires_grad]
    if not calls or not losses.requires_grad:
        return []
    terms = [call.terms for call in calls]
    weights = torch.autograd.grad(losses.sum(), terms, allow_unused=True, retain_graph=True)
    return [(call, weight) for call, weight in zip(calls, weights, strict=True) if weight is not None]


def _rounding(errors: dict[int, float], *tensors: torch.Tensor) -> float:
    return max(errors[tensor.dtype.itemsize] for tensor in tensors)


class Seen:
    """The head of a loss that is watched in every batch.

    Args:
        loss: the user's own.

    Attributes:
        kind: of the head; known after `check`.
    """

    gives_losses = True

    def __init__(self, loss: PerExample) -> None:
        self._loss = loss
        self.kind = ""

    def __call__(self, model: nn.Module, batch: Any, *, losses: bool = False) -> Head:
        """The head of a batch.

        Raises:
            UnseenLoss: in this batch the loss is something else.
        """
        head, _, own, _ = self._watched(model, batch, apart=not losses)
        return replace(head, losses=own) if losses else head

    def check(self, model: nn.Module, batch: Any) -> None:
        """Compares the head with autograd; the model's outputs must have their graph, as in a pass of capture.

        Raises:
            UnseenLoss: the loss is not understood, or is something else than it seems.
        """
        try:
            self._check(model, batch)
        except UnseenLoss:
            raise
        except Exception as error:
            raise self._unseen(f"it cannot be watched ({type(error).__name__}: {error})") from error

    def _check(self, model: nn.Module, batch: Any) -> None:
        head, call, losses, weight = self._watched(model, batch, apart=False)
        n, z = len(losses), call.z
        if not z.requires_grad:
            raise self._unseen(f"what {call.kind.kind} terms are of depends on no tracked layer")
        # Another factor for each example: its loss must be of its own outputs. The Hessian is seen along u.
        generator = torch.Generator(device=z.device).manual_seed(0)
        factor = 0.5 + torch.rand(n, generator=generator, device=z.device, dtype=wide(z).dtype)
        u = torch.randn(z.shape, generator=generator, device=z.device, dtype=wide(z).dtype).to(z.dtype)
        (gradient,) = torch.autograd.grad((losses * factor).sum(), z, create_graph=True)
        by_term = factor.reshape(n, *[1] * (head.weight.ndim - 1))
        terms = (call.by_example(weight * call.terms, n) * by_term).sum()
        (expected,) = torch.autograd.grad(terms, z, retain_graph=True)
        second = None
        if gradient.requires_grad:
            (second,) = torch.autograd.grad((gradient * u).sum(), z, allow_unused=True)

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            return wide(call.by_example(tensor.detach(), n, classes=True))

        scale = by_term.unsqueeze(-1) if call.kind is Softmax else by_term
        weights = (head.weight * by_term).reshape(*head.weight.shape, *[1] * (scale.ndim - by_term.ndim))
        self._agree("gradient", seen(gradient), seen(expected), weights, call)
        curved = head.product(seen(u)) * scale
        self._agree("Hessian", seen(torch.zeros_like(z) if second is None else second), curved, weights, call)
        self.kind = head.kind

    def _agree(self, what: str, got: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, call: _Call) -> None:
        """Both (n, ...), as the head's outputs; what is not finite is not judged."""
        size = wanted.abs().amax(dim=-1, keepdim=True) if call.kind is Softmax else wanted.abs()
        near = _rounding(_TERMS, call.z, call.terms) * (size + _SMALL * weights)
        far = wanted.isfinite() & ~((got - wanted).abs() <= near)
        if bool(far.any()):
            at = tuple(far.nonzero()[0].tolist())
            raise self._unseen(
                f"in example {at[0]} of the first batch its {what} at an output is {float(got[at]):.6g}, where that of "
                f"its {call.kind.kind} terms is {float(wanted[at]):.6g}"
            )

    def _watched(self, model: nn.Module, batch: Any, *, apart: bool) -> tuple[Head, _Call, torch.Tensor, torch.Tensor]:
        """The head, the call behind it, the losses (n,), and what each term weighs in them, of the terms' shape."""
        with torch.enable_grad():
            with _Watch(apart=apart) as watch:
                losses = self._loss(model, batch)
            if not isinstance(losses, torch.Tensor) or losses.ndim != 1:
                raise self._unseen("it does not give one value an example")
            found = _weights(watch.calls, losses)
        troubles = [call.trouble for call in watch.calls if call.trouble is not None]
        if len(found) > 1:
            raise self._unseen(f"it adds up the terms of {len(found)} calls")
        if not found:
            raise self._unseen(troubles[0] if troubles else "it calls none of torch's loss functions that are known")
        call, weight = found[0]
        return self._head(call, weight, losses), call, losses, weight

    def _head(self, call: _Call, weight: torch.Tensor, losses: torch.Tensor) -> Head:
        n = len(losses)
        with torch.no_grad():
            if not call.terms.ndim or len(call.terms) % n:
                raise self._unseen(
                    f"outputs of shape {tuple(call.z.shape)} do not say which of the {n} examples each is of"
                )
            parts = (wide(weight) * wide(call.terms)).reshape(n, -1)
            gap, most = (parts.sum(dim=1) - losses).abs(), parts.abs().sum(dim=1)
            near = _rounding(_SUMS, call.terms, losses)
            if bool((gap > near * (most + near)).any()):
                worst = int((gap - near * most).nan_to_num().argmax())
                raise self._unseen(
                    f"the loss of example {worst} of a batch is {float(losses[worst]):.6g}, where its {call.kind.kind} "
                    f"terms add up to {float(parts[worst].sum()):.6g}"
                )
            weights = call.by_example(weight * call.scale, n)
            if bool((weights < 0).any()):
                raise self._unseen(f"a {call.kind.kind} term of it has the negative weight {float(weights.min()):.6g}")
        return call.kind(call.by_example(call.z, n, classes=True), weights)

    def _unseen(self, reason: str) -> UnseenLoss:
        return UnseenLoss(
            f"the Gauss-Newton matrix of the loss {loss_name(self._loss)!r} is not known: {reason} (compute it by "
            "cross_entropy, nll_loss, binary_cross_entropy_with_logits or mse_loss of torch.nn.functional alone; or "
            "give it an attribute `logits`, or use CrossEntropy; or pass curvature='empirical')"
        )

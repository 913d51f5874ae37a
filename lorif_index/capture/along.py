"""Along: gradients of examples out of a training's own passes, whose forward and backward the program makes by itself.

The program's loss L is c times the sum of the examples' losses, with a c of its averages and scales. It is seen where
the losses come from, at the model's logits, or at the hidden states before them where its head is fused with the loss:
the losses are computed once more from there, and dL/dz is compared with d(sum of losses)/dz. Where the one is no
multiple of the other, the program's loss is another, and nothing is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CaptureError
from .data import Batch, batch_count, to_device
from .gradients import GradientBlock, LayerGradient
from .heads import wide
from .losses import (
    IGNORE,
    LogitsOf,
    PerExample,
    base_model,
    checked_logits,
    default_loss,
    is_cross_entropy,
    logits_of,
)
from .sharded import has_compiled
from .sources import ModelCapture

# Relative distance of dL/dz from a multiple of d(sum of losses)/dz that is rounding, by bytes of a number.
_NEAR = {2: 3e-2, 4: 1e-3, 8: 1e-6}
# What autograd calls a tensor's conversion to another dtype.
_CONVERSION = "ToCopyBackward"
# Positions of a batch whose slopes are compared for every class; all are compared for the label's.
_POSITIONS = 64


class _Seen:
    """A tensor z of the program's forward pass, and dL/dz once its backward pass has come there.

    Args:
        tensor: z.
        late: called where that happens after another batch was begun.
    """

    def __init__(self, tensor: torch.Tensor, late: Callable[[], None]) -> None:
        self.value = tensor.detach()
        self.slope: torch.Tensor | None = None
        self.over = False
        self._late = late
        node, number = tensor.grad_fn, tensor.output_nr
        while type(node).__name__.startswith(_CONVERSION):
            # Outputs may be converted for the program, and the loss be of what they were before.
            node, number = node.next_functions[0]  # type: ignore[union-attr]
        if node is tensor.grad_fn or node is None:
            tensor.register_hook(self._add)
        else:
            node.register_prehook(lambda slopes: self._add(slopes[number]))

    def _add(self, slope: torch.Tensor | None) -> None:
        if self.over:
            self._late()
        elif slope is not None:
            self.slope = slope.detach() if self.slope is None else self.slope + slope.detach()


class Along:
    """Listens to the passes of a program that trains a model.

    Args:
        taken: the model, its layers and projections.
        loss: of the examples; None for the default.
    """

    def __init__(self, taken: ModelCapture, loss: PerExample | None) -> None:
        self._model, self._loss = taken.model, default_loss if loss is None else loss
        self._capture = taken.capture(loss).trust()
        base = base_model(taken.model)
        found, inner = getattr(base, "get_output_embeddings", None), getattr(base, "base_model", None)
        self._head: nn.Module | None = found() if callable(found) else None
        self._inner = inner if isinstance(inner, nn.Module) and inner is not base else None
        layers = [layer.name for layer in taken.layers if any(use.module is self._head for use in layer.uses)]
        # The head's layer by itself, where a pass goes round the head's module.
        self._around = taken.capture(loss, layers).trust() if layers else None
        self._mixing = [module for module in taken.model.modules() if isinstance(module, _BatchNorm)]
        self._batch: Batch = None
        self._output: Any = None
        self._logits: _Seen | None = None
        self._hidden: _Seen | None = None
        self._calls = self._head_calls = 0
        self._mixed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, `begin` and `end` may be called.

        Raises:
            CaptureError: the model's passes cannot be listened to.
        """
        if has_compiled(self._model):
            raise CaptureError("the passes of a compiled model cannot be listened to: its modules are not called")
        self._check_mixing()
        with ExitStack() as stack:
            stack.enter_context(self._capture.listening())
            if self._around is not None:
                stack.enter_context(self._around.listening())
            hooks = ((self._model, self._called), (self._inner, self._met), (self._head, self._headed))
            for module, hook in hooks:
                if module is not None:
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def begin(self, batch: Batch) -> None:
        """The forward pass of a batch follows, and its backward pass."""
        self.drop()
        self._batch, self._mixed = to_device(batch, self._capture.device), False
        self._capture.started(batch_count(batch))

    def end(self) -> GradientBlock | None:
        """The gradients of the losses of the batch's n examples, by ids 0 .. n - 1; None where the pass has none.

        Raises:
            CaptureError: the program's loss is not the examples', or their gradients cannot be taken.
        """
        try:
            if self._mixed:
                raise CaptureError("the backward pass of an earlier batch came after this one was begun")
            if self._calls > 1:
                raise CaptureError("the model was called more than once for one batch")
            self._check_mixing()
            ids = np.arange(batch_count(self._batch), dtype=np.int64)
            if self._logits is not None:
                factor, rest = self._of_logits(self._logits), None
            elif self._calls and self._hidden is not None and self._head is not None and not self._head_calls:
                factor, rest = self._of_head(ids, self._hidden)
            elif self._calls:
                raise CaptureError("the model's output has no logits, or they need no gradient, in the training's pass")
            else:
                return None
            if not factor:
                return None
            self._capture.scale = factor
            block = self._capture.collected(ids, beside=set() if rest is None else set(rest.layers))
            return block if rest is None else _sum(block, rest)
        finally:
            self.drop()

    def drop(self) -> None:
        """Nothing is taken of the pass that was begun."""
        for seen in (self._logits, self._hidden):
            if seen is not None:
                seen.over = True
        self._batch = self._output = self._logits = self._hidden = None
        self._calls = self._head_calls = 0
        self._capture.dropped()

    def _check_mixing(self) -> None:
        if any(module.training for module in self._mixing):
            raise CaptureError(
                "batch norms mix the examples of a batch while the model trains: build at the end instead"
            )

    # -- what the program's pass shows ---------------------------------------------------------------------------

    def _late(self) -> None:
        self._mixed = True

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model has given its outputs."""
        if self._batch is None or not torch.is_grad_enabled():
            return
        self._calls += 1
        logits = _logits_in(output)
        if logits is not None and logits.requires_grad and self._calls == 1:
            self._output, self._logits = output, _Seen(logits, self._late)

    def _met(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What is below the head has given its hidden states."""
        hidden = getattr(output, "last_hidden_state", None)
        if self._batch is not None and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            self._hidden = _Seen(hidden, self._late)

    def _headed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._head_calls += self._batch is not None

    # -- the same losses again -----------------------------------------------------------------------------------

    def _of_logits(self, seen: _Seen) -> float:
        """c. Of a cross-entropy it is found without a backward pass: at all positions by the slope of the label's
        logit, c (p_y - 1), at some by those of all classes."""
        find = logits_of(self._loss)
        if find is None or not is_cross_entropy(self._loss):
            return self._factor(seen, self._losses)
        if seen.slope is None:
            return 0.0
        logits, labels = self._replayed(find, seen.value)
        slopes, _ = self._replayed(find, seen.slope)
        counted = labels != IGNORE
        targets = labels.clamp_min(0).unsqueeze(-1)
        # An example at a time: no second array of all logits.
        sizes = torch.stack([wide(one).logsumexp(dim=-1) for one in logits])
        p = (wide(logits.gather(-1, targets).squeeze(-1)) - sizes).exp()
        beside = torch.stack([one.abs().amax(dim=-1) for one in slopes])[~counted]
        own = [(p.double() - 1.0)[counted], beside.new_zeros(beside.shape, dtype=torch.float64)]
        theirs = [slopes.gather(-1, targets).squeeze(-1)[counted].double(), beside.double()]
        places = counted.nonzero()
        places = places[torch.linspace(0, len(places) - 1, min(len(places), _POSITIONS)).long().to(places.device)]
        at = tuple(places.T)
        whole = logits[at].double().softmax(dim=1)
        whole[torch.arange(len(places), device=whole.device), labels[at]] -= 1.0
        own.append(whole.flatten())
        theirs.append(slopes[at].double().flatten())
        return self._compared(seen, torch.cat(own), torch.cat(theirs))

    def _replayed(self, find: LogitsOf, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = _Replayed(self._model, self._output, values)
        return checked_logits(find(model, self._batch))

    def _losses(self, logits: torch.Tensor) -> torch.Tensor:
        """The examples' losses, (n,), of logits."""
        model: Any = _Replayed(self._model, self._output, logits)
        return self._loss(model, self._batch)

    def _of_head(self, ids: np.ndarray, hidden: _Seen) -> tuple[float, GradientBlock | None]:
        """c, and the gradients in the head's layer, if it is tracked, of the head's part of the pass."""
        head: Any = self._head
        around = self._around
        self._output = {}
        with self._capture.deaf():
            if around is None:
                return self._factor(hidden, lambda z: self._losses(head(z))), None
            around.started(len(ids))
            try:
                factor = self._factor(hidden, lambda z: self._losses(head(z)))
                around.scale = 1.0
                return factor, around.collected(ids)
            finally:
                around.dropped()

    def _factor(self, seen: _Seen, losses: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """c; 0 where no loss has been differentiated, or it has no gradient there, or one of inf or NaN."""
        if seen.slope is None:
            return 0.0
        with torch.enable_grad(), torch.autocast(seen.value.device.type, enabled=False):
            z = seen.value.to(getattr(self._head, "weight", seen.value).dtype if seen is self._hidden else None)
            z = z.detach().requires_grad_(True)
            own = torch.autograd.grad(losses(z).sum(), z)[0]
        return self._compared(seen, own.double().flatten(), seen.slope.double().flatten())

    def _compared(self, seen: _Seen, own: torch.Tensor, theirs: torch.Tensor) -> float:
        """c of dL/dz and d(sum of losses)/dz, float64.

        Raises:
            CaptureError: the one is no multiple of the other.
        """
        size = float(own @ own)
        factor = float(own @ theirs) / size if size else 0.0
        if not np.isfinite(factor) or not factor:
            return 0.0
        apart = float((theirs - factor * own).norm() / theirs.norm())
        kinds = (seen.value.dtype, torch.float32 if seen.slope is None else seen.slope.dtype)
        if apart > _NEAR[min(max(min(kind.itemsize for kind in kinds), 2), 8)]:
            raise CaptureError(
                "the training's loss is not the sum of the examples' losses, up to a factor: at the model's outputs "
                f"its gradient is {apart:.2g} of its norm away from theirs (label smoothing, weights of examples, or "
                "labels that differ?)"
            )
        return factor


def _logits_in(output: Any) -> torch.Tensor | None:
    """As the default loss finds them."""
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    found = output.get("logits") if found is None and isinstance(output, Mapping) else found
    return found if isinstance(found, torch.Tensor) else None


class _Replayed:
    """Stands in for a model that was called already: gives its output again, with other logits."""

    def __init__(self, model: nn.Module, output: Any, logits: torch.Tensor) -> None:
        self._base, self._output, self._logits = base_model(model), output, logits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._output, torch.Tensor):
            return self._logits
        again = copy.copy(self._output)
        if isinstance(again, Mapping):
            again["logits"] = self._logits  # type: ignore[index]
        else:
            again.logits = self._logits
        return again

    def get_base_model(self) -> nn.Module:
        """As a model of peft says what is inside."""
        return self._base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _sum(block: GradientBlock, rest: GradientBlock) -> GradientBlock:
    """The block, with what some layers have beside."""
    more = {n: LayerGradient.from_dense(block.layers[n].dense() + g.dense()) for n, g in rest.layers.items()}
    return replace(block, layers=block.layers | more)

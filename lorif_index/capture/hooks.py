"""Capture: per-example projected gradients of a model's linear maps, from one forward and one backward pass.

A forward hook projects a module's inputs, X P_in; a hook on its output projects the output's gradient, dY P_out; their
product over positions is the projected gradient (LoGRA, arXiv:2405.13954). No parameter requires a gradient meanwhile,
so that no parameter-sized gradient is ever formed, and the backward pass skips their products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..errors import CaptureError, DataError
from ..linalg.precision import as_chosen
from ..linalg.projection import Projections
from .attention import attending, followed
from .data import Batch, batch_count, dtypes_of, to_device
from .gradients import GradientBlock, LayerGradient, LayerSpec
from .held import HeldMap, routed
from .layers import TrackedLayer, Use, output_positions, positions, stored_inputs_first, torch_forward
from .losses import PerExample
from .norms import norming
from .sharded import (
    Columns,
    Spread,
    agreed,
    columns_of,
    device_of,
    fresh,
    full,
    half_of,
    is_dtensor,
    needs_lockstep,
    recover,
    settle,
    spread_of,
    uncompiled,
)

T = TypeVar("T")
Functions = Callable[[nn.Module, Any], Sequence[torch.Tensor] | torch.Tensor]
"""functions(model, batch) -> (n,) of each row, or (rows, n)."""

_REMEDY = "exclude it with LayerSelection(exclude=[...])"
_HALF_LOSS_SCALE = 2.0**10
PROVEN_BY = 8
"""Batches in which it is seen that examples do not depend on each other, where modules have several rows of each; else
one."""
_NO_WORD = -1
# Relative errors of an output that is a multiple of another, by bytes of a number.
_NEAR = {2: 2e-2, 4: 1e-4, 8: 1e-8}

Watch = Callable[[str, Use, torch.Tensor, torch.Tensor], None]
"""Told of one call of a module in the backward pass: layer, use, projected inputs (n, t, d_in) and projected output
gradients (n, t, d_out), times `Capture.scale`, whose products over t are the projected gradient. Of a convolution with
groups: inputs (n, t, groups, d_in), and gradients (n, t, groups, outputs per group) that are not projected (see
`Capture.lifted`)."""

Push = Callable[[str, Use, torch.Tensor, torch.Tensor], torch.Tensor]
"""Told of one call of a module in the forward pass: layer, use, projected inputs as `Watch` gets them (of a use
the other way round, on the output side's projection; of an embedding's words -1 for padding), and the output; gives
what the model goes on with."""


@dataclass
class _Sum:
    """What one layer has gathered in one pass: few positions as pairs, more as their dense sum."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    dense: torch.Tensor | None = None


class Capture:
    """Takes per-example gradients of one model under one loss or measure.

    Args:
        model: left exactly as it was found after every call, also after an exception; FSDP2's modules are left
            sharded. Where it is sharded, calls are collectives (see `sharded`).
        layers: what to track, from `select_layers`.
        specs: their projected widths and ranks.
        projections: the shared projections.
        function: loss(model, batch) -> (n,), or a measure.
        autocast: None, "bfloat16" or "float16".

    Attributes:
        device: that batches are put on, and gradients are gathered on.
        half: whether anything is computed in half precision.
        regrouped: whether a module has had several rows of each example.
        scale: what losses are multiplied by before they are differentiated; gradients are divided by it again.
        checking: seconds that it took to see that examples do not depend on each other, in the first batches.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[TrackedLayer],
        specs: dict[str, LayerSpec],
        projections: Projections,
        function: PerExample,
        autocast: str | None = None,
    ) -> None:
        self.model = model
        self._layers = layers
        self._specs = specs
        self._projections = projections
        self._function = function
        self._autocast = autocast
        # Holder of weights -> map -> its layer and use; of attention also where only the module after it is tracked.
        self._held: dict[nn.Module, dict[HeldMap, tuple[str, Use]]] = {}
        for layer in layers:
            for use in layer.uses:
                if isinstance(use.module, HeldMap):
                    self._held.setdefault(use.module.parent, {})[use.module] = layer.name, use
        tracked = {id(use.module) for layer in layers for use in layer.uses}
        self._attention = {
            module: self._held.pop(module, {})
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
            and followed(module)
            and (module in self._held or id(module.out_proj) in tracked)
        }
        # ids of modules of attention, and norms, whose forward here was compared with their own.
        self._attended: set[int] = set()
        self._unproven, self.regrouped, self.checking = PROVEN_BY, False, 0.0
        self._trusted = self._proves = False
        # Use -> what its module multiplies its linear map by, where its class is not torch's.
        self._factors: dict[str, float] = {}
        # Layers whose gradients cannot be taken, and why, in the pass at hand.
        self._troubles: dict[str, str] = {}
        # Uses among them whose examples may lie along the second dimension.
        self._second: set[str] = set()
        self._n, self._each = 0, 1
        # Of the program's passes that are listened to: a backward pass may come when another has begun.
        self._pass, self._mixed = 0, False
        self._probing: int | None = None
        self._active = False
        self._sums: dict[str, _Sum] = {}
        self._called: set[str] = set()
        self._watch: Watch | None = None
        self._push: Push | None = None
        self._forward_only = False
        self._graded: set[str] = set()
        self.device = device_of(model)
        self._in_step = needs_lockstep(model)
        half = autocast == "float16" or half_of(model)
        self.scale = _HALF_LOSS_SCALE if half else 1.0
        self.half = half or autocast is not None or any(p.dtype == torch.bfloat16 for p in model.parameters())

    def gradients(
        self, ids: np.ndarray, batch: Batch, *, require_all: bool = False, watch: Watch | None = None
    ) -> GradientBlock:
        """Projected gradients of the examples of one batch.

        Args:
            ids: (n,) int64, kept with the result.
            batch: whatever the loss takes.
            require_all: refuse a tracked layer that no example's loss reaches.
            watch: is told of every position as it is summed.

        Returns:
            float32 gradients on the model's device; inf and NaN are passed on for the caller's policy.

        Raises:
            CaptureError: rows that cannot be mapped to examples, examples that depend on each other, a layer without
                gradient; each names the module.
        """
        (block,) = self.several(ids, batch, self._one_row, require_all=require_all, watch=watch)
        return block

    @property
    def proven(self) -> bool:
        """Whether it was seen, or is trusted, that examples do not depend on each other."""
        return not self._unproven

    def trust(self) -> Capture:
        """Leaves out the check that examples do not depend on each other, for data that has passed it."""
        self._unproven, self._trusted = 0, True
        return self

    def lifted(self, layer: str, use: Use, matrix: torch.Tensor) -> torch.Tensor:
        """Matrix (d_in, d_out) P_out^T of a convolution with groups, as (d_in, groups, outputs per group)."""
        p_out = self._projections.side(layer, "out", matrix.device, matrix.dtype)
        wide = matrix if p_out is None else matrix @ p_out.T
        return wide[..., : use.outputs].reshape(*matrix.shape[:-1], int(getattr(use.module, "groups", 1)), -1)

    def changed(
        self, layer: str, use: Use, left: torch.Tensor, matrices: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """What a module's output changes by where its layer's weight, bias included, changes by P_in V P_out^T.

        Args:
            layer, use, left: of the call, as `Push` gets them; examples (q b, ...).
            matrices: V (q, d_in, d_out), each for b examples that follow one another.
            like: the output.

        Returns:
            of the output's shape and dtype.
        """
        work = left.dtype if left.is_floating_point() else _working(like.dtype)
        matrices = matrices.to(device=left.device, dtype=work)
        questions = len(matrices)
        if left.ndim == 4:
            lifted, parts = self.lifted(layer, use, matrices), left.reshape(questions, -1, *left.shape[1:])
            out = torch.einsum("qblgi,qigo->qblgo", parts, lifted).reshape(*left.shape[:2], -1)
        else:
            matrices = matrices.mT if use.transposed else matrices
            if left.is_floating_point():
                turned = torch.bmm(left.reshape(questions, -1, left.shape[-1]), matrices)
            else:
                words = left.reshape(questions, -1, 1)
                turned = matrices.gather(1, words.clamp_min(0).expand(-1, -1, matrices.shape[-1]))
                turned.masked_fill_(words == _NO_WORD, 0.0)
            turned = turned.reshape(*left.shape[:2], matrices.shape[-1])
            side, _ = self._side(layer, not use.transposed, left.device, work)
            out = turned[..., : use.outputs] if side is None else turned @ side[: use.outputs].T
        if isinstance(use.module, (nn.Conv1d, nn.Conv2d)):
            out = out.reshape(len(like), -1, out.shape[-1]).transpose(1, 2)
        out = out.reshape(use.examples_first(like).shape) * self._factors.get(use.name, 1.0)
        return use.examples_first(out).to(like.dtype)

    def several(
        self,
        ids: np.ndarray,
        batch: Batch,
        functions: Functions,
        *,
        require_all: bool = False,
        watch: Watch | None = None,
        push: Push | None = None,
        each: int = 1,
    ) -> list[GradientBlock]:
        """Gradients of several functions of the same batch, functions(model, batch) -> (n,) of each row, from one
        forward pass and a backward pass each: one block a row; raises as `gradients` does.

        Args:
            ids: (n / each,), kept with the results.
            batch, functions: n examples, and what is differentiated.
            require_all, watch: as in `gradients`.
            push: changes modules' outputs.
            each: examples, following one another, whose gradients are summed.
        """
        batch = to_device(batch, self.device)
        self._n, self._each = batch_count(batch), each
        if self._n != len(ids) * each:
            raise CaptureError(f"the batch holds {self._n} examples where {len(ids) * each} were expected")
        blocks = []
        self._called, self._graded, self._watch, self._push = set(), set(), watch, push
        self._troubles = {}
        try:
            with self._hooked():
                with self._casting():
                    rows = self._rows(functions, ids, batch)
                if self._unproven and (agreed(self.model, self._n > 1) if self._in_step else self._n > 1):
                    self._check_isolation(sum(rows, torch.zeros((), device=self.device)))
                self._check_troubles()
                self._active = True
                for number, row in enumerate(rows):
                    self._sums = {layer.name: _Sum() for layer in self._layers}
                    if row.requires_grad:
                        (row.sum() * self.scale).backward(retain_graph=number + 1 < len(rows))
                    self._check_graded()
                    if require_all:
                        self._check_reached(row)
                    self._check_troubles()
                    results = {layer.name: self._result(layer.name) for layer in self._layers}
                    blocks.append(GradientBlock(ids, results))
            return blocks
        finally:
            self._active, self._probing, self._watch, self._push, self._sums = False, None, None, None, {}

    def pushed(self, batch: Batch, function: Callable[[nn.Module, Any], T], push: Push) -> T:
        """What function(model, batch) gives where `push` changes the outputs of modules, called as in `several`, but
        without gradients; raises as `gradients` does."""
        batch = to_device(batch, self.device)
        self._n, self._push, self._forward_only, self._troubles = batch_count(batch), push, True, {}
        try:
            with self._hooked(), torch.no_grad(), self._casting():
                found = function(self.model, batch)
            self._check_troubles()
            return found
        finally:
            self._push, self._forward_only = None, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the program's own passes are listened to, between `started` and `collected`.

        Raises:
            CaptureError: the model has modules whose work is done in their stead (attention, experts, norms), which
                would not leave the program's passes as they are.
        """
        if self._attention or self._held:
            kinds = sorted({type(module).__name__ for module in (*self._attention, *self._held)})
            raise CaptureError(f"the program's own passes cannot be listened to in modules of {kinds}: {_REMEDY}")
        with self._placed():
            yield
        self._n = 0

    def started(self, count: int) -> None:
        """From now on the program makes a pass of so many examples."""
        self._n, self._each, self._active = count, 1, True
        self._pass, self._mixed = self._pass + 1, False
        self._called, self._graded, self._troubles = set(), set(), {}
        self._sums = {layer.name: _Sum() for layer in self._layers}

    def collected(self, ids: np.ndarray, beside: Collection[str] = ()) -> GradientBlock:
        """What the pass that was started has given, divided by `scale`; raises as `gradients` does, and where it did
        not call a layer.

        Args:
            ids: (n,) int64, kept with the result.
            beside: layers that the pass need not have called.
        """
        try:
            if self._mixed:
                raise CaptureError("the backward pass of an earlier batch came after this one was begun")
            self._check_graded()
            for layer in self._layers:
                if layer.name not in self._called and layer.name not in beside:
                    self._troubles[layer.name] = f"layer {layer.name!r} was not called in the program's pass"
            self._check_troubles()
            return GradientBlock(ids, {layer.name: self._result(layer.name) for layer in self._layers})
        finally:
            self.dropped()

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Inside, what is called is not of the pass that was started."""
        count, self._n = self._n, 0
        try:
            yield
        finally:
            self._n = count

    def dropped(self) -> None:
        """Ends a pass that was started."""
        self._n, self._active, self._sums = 0, False, {}

    def differentiate(self, batch: Batch, parameters: Iterable[nn.Parameter]) -> None:
        """Plain autograd: the gradients of some parameters, times `scale`, for whoever has hooked them."""
        with _left_as_found(self.model), torch.enable_grad():
            for p in parameters:
                p.requires_grad_(True)
            batch = to_device(batch, self.device)
            with self._casting():
                losses = self._function(self.model, batch)
            (losses.sum() * self.scale).backward()

    def look(self, batch: Batch, function: Callable[[nn.Module, Any], None]) -> None:
        """Calls function(model, batch) as the passes do: on the model's device, in eval mode, left as it was found."""
        with _left_as_found(self.model), self._casting():
            function(self.model, to_device(batch, self.device))

    def _rows(self, functions: Functions, ids: np.ndarray, batch: Batch) -> Sequence[torch.Tensor] | torch.Tensor:
        """What is differentiated. An error in the user's code, or in the model's, says which examples it met."""
        try:
            return functions(self.model, batch)
        except Exception as error:
            if isinstance(error, RuntimeError) and "dtype" in str(error) and torch.float64 in dtypes_of(batch):
                kinds = sorted({str(p.dtype) for p in self.model.parameters()})
                raise DataError(
                    f"{error}: the batch has numbers of torch.float64, and the model {', '.join(kinds)}: pass "
                    "x.float(), or of NumPy x.astype('float32')"
                ) from error
            note = f"(raised for a batch of examples {_listed(ids)}, counted from 0)"
            if len(ids) and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    # -- the pass ------------------------------------------------------------------------------------------------

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Eval mode, no parameter gradients, hooks in place; everything put back afterwards."""
        with _left_as_found(self.model), torch.enable_grad(), self._placed():
            yield

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Hooks in place."""
        with ExitStack() as stack:
            for layer in self._layers:
                for use in layer.uses:
                    # Tensor parallelism brings outputs into the form that the model wants by hooks of its own. Before
                    # them an output says how it is spread, and its gradient likewise.
                    handle = use.module.register_forward_hook(
                        self._forward_hook(layer.name, use),
                        prepend=is_dtensor(getattr(use.module, "weight", None)),
                        with_kwargs=True,
                    )
                    stack.callback(handle.remove)
            for module, maps in self._attention.items():
                trouble = partial(self._not_followed, maps)
                stack.enter_context(attending(module, list(maps), trouble, self._attended))
            for maps in self._held.values():
                trouble = partial(self._not_followed, maps)
                if next(iter(maps)).vector:
                    stack.enter_context(norming(list(maps), trouble, self._attended))
                    continue
                stack.enter_context(routed(list(maps), lambda: self._n, lambda: self._watch is not None, trouble))
            yield

    def _casting(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self._autocast))

    def _one_row(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss or measure as (1, n)."""
        losses = self._function(model, batch)
        got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        if got != (self._n,):
            raise CaptureError(
                f"the loss must give one value per example, shape ({self._n},), but gave {got}: "
                "leave its examples unreduced (reduction='none') and sum over positions only"
            )
        return full(losses).unsqueeze(0)

    def _forward_hook(self, layer: str, use: Use) -> Callable[..., torch.Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
            if not self._n:
                # A call that is no pass of examples, beside those that are listened to.
                return None
            self._called.add(layer)
            graded = torch.is_grad_enabled()
            if not graded and not self._forward_only:
                # A reentrant checkpoint calls again, with gradients, in the backward pass. (One that is not reentrant
                # also calls again, to fill in what it did not save: no gradient reaches those outputs, so that nothing
                # is counted twice.)
                return None
            if graded:
                self._graded.add(layer)
            x = _input_of(args, kwargs)
            if not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor):
                self._troubles[layer] = f"module {use.name!r} was called without a tensor input or output"
                return None
            self._check_rows(layer, use, x, "input")
            factor = 1.0 if layer in self._troubles else self._factor(layer, use, args, kwargs, output)
            if layer in self._troubles:
                return None
            # The first tracked module of the graph: nothing before it needs gradients.
            replaced = fresh(output) if graded and not output.requires_grad else None
            target = output if replaced is None else replaced
            # Some quantised modules have no weight of that name.
            spread = spread_of(getattr(module, "weight", None), inputs_first=stored_inputs_first(module))
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                x = x.detach()
                padded = None
                if isinstance(module, nn.Embedding):
                    x = full(x)
                    padded = None if module.padding_idx is None else torch.eq(x, module.padding_idx)
                inputs = _columns(use, use.examples_first(x), spread, "input").map(
                    lambda own: positions(use, own, self._n)
                )
                # Projected now: the model may change its input in place later, and the projection is smaller.
                left = self._project_input(layer, use, inputs, output.dtype)
            if graded:
                number = self._pass

                def collect(dy: torch.Tensor) -> None:
                    if number == self._pass:
                        self._collect(layer, use, left, padded, spread, factor, dy)
                    else:
                        self._mixed = True

                target.register_hook(collect)
            if self._push is None:
                return replaced
            with torch.autocast(x.device.type, enabled=False):
                there = left.to(_working(output.dtype)) if left.is_floating_point() else left
                if padded is not None:
                    # Padding has no gradient, so that the weight's change does not reach it either.
                    at, real = padded.reshape(self._n, -1), there.is_floating_point()
                    there = there.masked_fill(at.unsqueeze(2), 0.0) if real else there.masked_fill(at, _NO_WORD)
                return self._push(layer, use, there, target)

        return hook

    def _factor(
        self, layer: str, use: Use, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> float:
        """What a module's class multiplies its linear map by, as scaled embeddings do; seen at its first call that says
        something, by the gradient of its weight, or by the output of an embedding."""
        base = torch_forward(use.module)
        module: Any = use.module
        if base is None or use.name in self._factors:
            return self._factors.get(use.name, 1.0)
        if is_dtensor(module.weight):
            return float(getattr(module, "embed_scale", 1.0))
        x = _input_of(args, kwargs).detach()
        ours = theirs = output.new_zeros(0)
        try:
            if isinstance(module, nn.Embedding):
                with torch.no_grad():
                    ours, theirs = base(module, x), output.detach()
            else:
                given = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
                ours, theirs = _weight_gradients(module, (base, (x,), {}), (type(module).forward, given, kwargs))
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            if isinstance(module, nn.Linear):
                # A weight that has no gradient, as in eight bits: taken at its word.
                return 1.0
            # Another kind of input, as of an embedding of positions that finds them itself.
        plain, there = ours.double().flatten(), theirs.double().flatten()
        fits, size = len(plain) > 0 and plain.shape == there.shape, float(plain @ plain)
        if fits and size == 0 and not bool(there.any()):
            # It says nothing yet.
            return 1.0
        factor = float(plain @ there) / size if fits and size else 0.0
        width = max(min(output.dtype.itemsize, module.weight.dtype.itemsize), 2)
        near = _NEAR[width] * float(there.norm())
        if not factor or float((there - factor * plain).norm()) > near:
            self._troubles[layer] = (
                f"module {use.name!r} is a {type(module).__name__}, whose output is not its weight's linear map"
            )
            return 1.0
        self._factors[use.name] = factor
        return factor

    def _not_followed(self, maps: dict[HeldMap, tuple[str, Use]], its: HeldMap, why: str) -> None:
        layer, use = maps[its]
        self._troubles[layer] = f"module {use.name!r}: {why}"

    def _check_rows(self, layer: str, use: Use, tensor: torch.Tensor, what: str) -> None:
        """Whether its rows are examples', so many of each one after the other: that they are the right ones is seen by
        `_check_isolation`."""
        least = 1 if isinstance(use.module, nn.Embedding) and what == "input" else 2
        if use.second:
            least, tensor = 3, tensor.transpose(0, 1) if tensor.ndim > 1 else tensor
        rows = tensor.shape[0] if tensor.ndim else 0
        several = 0 < self._n < rows and rows % self._n == 0 and not use.second
        # That an expert's rows are put together rightly is to be proven as well.
        mapped = several or _may_rest(use)
        if tensor.ndim < least or not (rows == self._n or several):
            if use.may_be_second(tensor, self._n):
                self._second.add(use.name)
            self._troubles[layer] = (
                f"module {use.name!r} has an {what} of shape {tuple(tensor.shape)} for a batch of {self._n} examples, "
                "so its rows cannot be mapped to examples (routed experts, shared input?)"
            )
        if mapped and not self.regrouped:
            # Also where only later batches have such rows.
            self.regrouped = True
            self._unproven = self._unproven if self._trusted or self._in_step else PROVEN_BY

    def _project_input(self, layer: str, use: Use, x: Columns, dtype: torch.dtype) -> torch.Tensor:
        """X P as (n, positions, d) or (n, positions, groups, d); on the output side's projection where transposed."""
        work = _working(dtype)
        matrix, width = self._side(layer, use.transposed, x.local.device, work)
        if isinstance(use.module, nn.Embedding):
            # Words that keep their own width stay numbers until their gradients are there.
            return x.local if matrix is None else matrix[x.local]
        if matrix is None:
            # In its own number type until its gradient is there: a whole model's inputs are held meanwhile.
            extra, whole = width - use.inputs, x.whole()
            return functional.pad(whole, (0, extra), value=1.0 if use.bias else 0.0) if extra else whole
        projected = x.map(lambda own: own.to(work)).times(matrix[: use.inputs])
        return projected + matrix[use.inputs] if use.bias else projected

    def _project_output(self, layer: str, use: Use, dy: Columns) -> torch.Tensor:
        matrix, width = self._side(layer, not use.transposed, dy.local.device, dy.local.dtype)
        if matrix is None:
            # A tied use may carry a bias this one has not: its column stays empty here.
            extra, whole = width - use.outputs, dy.whole()
            return functional.pad(whole, (0, extra)) if extra else whole
        return dy.times(matrix[: use.outputs])

    def _side(self, layer: str, out: bool, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor | None, int]:
        """A side's projection, if it has one, and its own width."""
        side = "out" if out else "in"
        return self._projections.side(layer, side, device, dtype), self._specs[layer].side(side)[0]

    def _collect(
        self,
        layer: str,
        use: Use,
        left: torch.Tensor,
        padded: torch.Tensor | None,
        spread: Spread,
        factor: float,
        dy: torch.Tensor,
    ) -> None:
        if layer not in self._troubles:
            self._check_rows(layer, use, dy, "output gradient")
            if self._probing is not None and layer not in self._troubles:
                self._check_isolated_rows(layer, use, dy)
        if not self._active or layer in self._troubles:
            return
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            work = _working(dy.dtype)
            left = left.to(work) if left.is_floating_point() else left
            part = _columns(use, use.examples_first(dy.detach()), spread, "output").map(lambda own: own.to(work))
            part = part if factor == 1 else part.map(lambda own: own * factor)
            if padded is not None:
                part = part.map(lambda own: own.masked_fill(padded.unsqueeze(-1), 0.0))
            part = part.map(lambda own: output_positions(use, own, self._n))
            if left.device != part.local.device:
                left = left.to(part.local.device)
            if left.ndim == 4:
                # Groups of a convolution: each has its own outputs, all share the inputs' projection.
                if self._watch is not None:
                    self._watch(layer, use, left, part.whole())
                dense = torch.einsum("nlgi,nlgo->nigo", self._joined(left), self._joined(part.local)).flatten(2)
                self._add_dense(layer, self._project_output(layer, use, Columns(dense, 0, dense.shape[-1])))
                return
            right = self._project_output(layer, use, part)
            if left.shape[1] != right.shape[1]:
                raise CaptureError(
                    f"module {use.name!r} has inputs at {left.shape[1]} positions and gradients at {right.shape[1]} on "
                    "this rank (positions spread over ranks in plain tensors?): shard it with the styles of "
                    f"torch.distributed.tensor.parallel, or {_REMEDY}"
                )
            if not left.is_floating_point():
                words = self._side(layer, use.transposed, left.device, right.dtype)[1]
                if self._watch is None:
                    self._add_words(layer, use, left, right, words)
                    return
                left = functional.one_hot(left, words).to(right.dtype)
            if use.transposed:
                left, right = right, left
            if self._watch is not None:
                self._watch(layer, use, left, right)
            self._add(layer, use, left, right)

    def _add(self, layer: str, use: Use, left: torch.Tensor, right: torch.Tensor) -> None:
        """left (n, t, d_in), right (n, t, d_out); of a transposed use, left is the gradient."""
        total = self._sums[layer]
        if right.device != self.device:
            # A model on several devices: they are small by now, and the uses of a tied weight meet.
            left, right = left.to(self.device), right.to(self.device)
        left, right = self._joined(left), self._joined(right)
        held = sum(pair[0].shape[1] for pair in total.pairs) + left.shape[1]
        spec = self._specs[layer]
        if total.dense is None and held <= spec.rank and held * (spec.d_in + spec.d_out) <= spec.dim:
            total.pairs.append((left, right))
            return
        self._add_dense(layer, torch.bmm(left.transpose(1, 2), right))

    def _add_words(self, layer: str, use: Use, words: torch.Tensor, right: torch.Tensor, count: int) -> None:
        """words (n, t) int64, of so many, and the gradients (n, t, d) at what they were turned into."""
        words, right = self._joined(words).to(self.device), self._joined(right).to(self.device)
        dense = right.new_zeros(right.shape[0], count, right.shape[2])
        dense.scatter_add_(1, words.unsqueeze(2).expand_as(right), right)
        self._add_dense(layer, dense.transpose(1, 2) if use.transposed else dense)

    def _joined(self, part: torch.Tensor) -> torch.Tensor:
        """Positions of examples (n, t, ...) whose gradients are summed, as those of one: (n / each, each t, ...)."""
        return part if self._each == 1 else part.reshape(self._n // self._each, -1, *part.shape[2:])

    def _add_dense(self, layer: str, gradient: torch.Tensor) -> None:
        """gradient (n, d_in, d_out); pairs held so far join it."""
        total = self._sums[layer]
        gradient = gradient.to(self.device)
        for pair in total.pairs:
            gradient = gradient + torch.bmm(pair[0].transpose(1, 2), pair[1])
        total.pairs.clear()
        total.dense = gradient if total.dense is None else total.dense.add_(gradient)

    def _result(self, layer: str) -> LayerGradient:
        total, spec = self._sums[layer], self._specs[layer]
        if total.pairs:
            left = torch.cat([pair[0] for pair in total.pairs], dim=1).transpose(1, 2) / self.scale
            right = torch.cat([pair[1] for pair in total.pairs], dim=1).transpose(1, 2)
            return LayerGradient.from_pair(left.float(), right.float())
        if total.dense is None:
            count = self._n // self._each
            return LayerGradient.from_dense(torch.zeros(count, spec.d_in, spec.d_out, device=self.device))
        return LayerGradient.from_dense((total.dense / self.scale if self.scale != 1 else total.dense).float())

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_isolation(self, losses: torch.Tensor) -> None:
        """One example's loss must reach that example's rows only: else rows would depend on their batch."""
        began, self._proves = self._now(), False
        if losses.requires_grad:
            self._probing = self._n - 1
            try:
                losses[self._probing].backward(retain_graph=True)
            finally:
                self._probing = None
        self.checking += self._now() - began
        regrouped, proves = self.regrouped, self._proves
        if self._in_step:
            regrouped, proves = agreed(self.model, regrouped), agreed(self.model, proves)
        # A loss without a gradient proves nothing. Rows that were mapped by their number alone might, by chance, be as
        # many as they would be.
        if proves:
            self._unproven = self._unproven - 1 if regrouped else 0

    def _now(self) -> float:
        """Seconds of a clock, when the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _check_isolated_rows(self, layer: str, use: Use, dy: torch.Tensor) -> None:
        whole = use.examples_first(full(dy.detach()))
        each = len(whole) // self._n
        others, own = whole[: self._n * each - each], whole[self._n * each - each :]
        self._proves |= bool(own.any())
        if others.numel() and bool(others.abs().amax() > 0):
            trouble = (
                f"module {use.name!r}: the loss of one example has a gradient in rows of others, so its rows cannot be "
                "mapped to examples (batch not in the first dimension, examples that interact, or a loss that is "
                "averaged over the batch?)"
            )
            if use.may_be_second(dy, self._n):
                self._second.add(use.name)
            elif each == 1 and not _may_rest(use):
                # Examples that interact do so for all layers before.
                raise CaptureError(f"{trouble}: {_REMEDY}, or mend the loss")
            self._troubles[layer] = trouble

    def _check_troubles(self) -> None:
        """Raises CaptureError where layers' gradients cannot be taken."""
        if self._troubles:
            names = list(self._troubles)
            more = f" (and {len(names) - 1} more: {names[1:5]})" if len(names) > 1 else ""
            uses = tuple(use.name for layer in self._layers if layer.name in self._troubles for use in layer.uses)
            second = tuple(name for name in uses if name in self._second)
            raise CaptureError(f"{self._troubles[names[0]]}{more}: {_REMEDY}", uses, second)

    def _check_graded(self) -> None:
        """Gradients of a layer that was called without them would be zeros, and look like an answer."""
        without = sorted(self._called - self._graded)
        if without:
            raise CaptureError(
                f"layers {without[:4]} are called with gradients switched off only: under no_grad, or in a checkpoint "
                "with use_reentrant=True whose inputs need no gradient. Pass use_reentrant=False, switch checkpointing "
                f"off, or: {_REMEDY}"
            )

    def _check_reached(self, losses: torch.Tensor) -> None:
        if not losses.requires_grad:
            raise CaptureError(
                "the loss does not depend on any tracked layer (computed without gradients, or on another model?)"
            )
        for layer in self._layers:
            total = self._sums[layer.name]
            # No token may be routed to an expert.
            if total.dense is None and not total.pairs and not any(map(_may_rest, layer.uses)):
                how = (
                    "is called, but the loss does not depend on it" if layer.name in self._called else "is never called"
                )
                self._troubles[layer.name] = f"layer {layer.name!r} got no gradient: it {how}"


def _may_rest(use: Use) -> bool:
    """Whether a batch may have no row for a module, as for an expert."""
    return isinstance(use.module, HeldMap) and use.module.may_rest


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with."""
    return args[0] if args else kwargs.get("input", kwargs.get("x"))


def _weight_gradients(module: Any, *calls: tuple[Callable[..., Any], Any, dict[str, Any]]) -> list[torch.Tensor]:
    """The gradients of a module's weight by the same combination of the outputs of several forwards of it."""
    weight, found = module.weight, []
    needed = weight.requires_grad
    try:
        with torch.enable_grad():
            weight.requires_grad_(True)
            for forward, args, kwargs in calls:
                y = forward(module, *args, **kwargs)
                v = torch.arange(y.numel(), device=y.device, dtype=torch.float32).cos().reshape(y.shape).to(y.dtype)
                found.append(torch.autograd.grad(y, weight, v)[0])
    finally:
        weight.requires_grad_(needed)
    return found


def _working(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _columns(use: Use, tensor: torch.Tensor, spread: Spread, what: str) -> Columns:
    """This rank's columns of a module's input, or of the gradient at its output."""
    # Indices, and patches that take more than the last dimension, are whole.
    whole = (nn.Conv1d, nn.Conv2d, nn.Embedding) if what == "input" else (nn.Conv1d, nn.Conv2d)
    width, share = (use.inputs, spread.inputs) if what == "input" else (use.outputs, spread.outputs)
    if isinstance(use.module, whole):
        return Columns(full(tensor), 0, width)
    return columns_of(tensor, width, share, f"the {what} of module {use.name!r}")


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Eval mode, no parameter gradients and the program's precision inside; train flags and requires_grad put back one
    by one."""
    settle(model)
    flags = [(module, module.training) for module in model.modules()]
    needed = [(p, p.requires_grad) for p in model.parameters()]
    offloaded = [
        (m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None and p.is_meta
    ]
    # torch's fused transformer layers would bypass the hooks.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for p, _ in needed:
            p.requires_grad_(False)
        with uncompiled(model), as_chosen():
            yield
    except BaseException:
        recover(model)
        raise
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        settle(model)
        for module, name, p in offloaded:
            # Brought in for a pass, and taken away again as another parameter.
            module._parameters[name] = p
        for module, training in flags:
            module.training = training
        for p, flag in needed:
            p.requires_grad_(flag)


def _listed(ids: np.ndarray) -> str:
    """Ids in order, for a message: as a range, where none is left out."""
    if len(ids) > 1 and int(ids[-1]) - int(ids[0]) == len(ids) - 1:
        return f"{ids[0]} to {ids[-1]}"
    shown = ", ".join(str(i) for i in ids[:64])
    return shown if len(ids) <= 64 else f"{shown}, ..."

"""Experts: linear maps whose weights are slices of one parameter, seen in the calls of the module that holds them.

A module of fused experts keeps a weight (experts, ., .) and multiplies the tokens that are routed to an expert by its
slice, without a module of its own. While a pass runs, such products go through an `ExpertMap` for each expert, which is
hooked as any linear map is. Rows are followed from the module's input to the product, so that an expert's rows are put
together by example, with zeros where an example has fewer: they add nothing to its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_experts")
_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm)
_BATCHED = (torch.bmm, torch.Tensor.bmm)
_CASTS = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type, torch.Tensor.contiguous)
_GATHERS = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)


class ExpertMap(nn.Module):
    """One expert's linear map, or that of a router, as a module that can be hooked. It holds nothing.

    Attributes:
        parent: who holds the parameter.
        parameter: its name there.
        expert: which slice; None: all of it.
        inputs_first: whether the slice is (inputs, outputs).
        inputs, outputs: its widths.
        biases: name of the parameter (experts, outputs) that is added to the product, if there is one.
    """

    parent: nn.Module

    def __init__(self, parent: nn.Module, parameter: str, expert: int | None, *, inputs_first: bool) -> None:
        super().__init__()
        # Not as a child: this module is none of the model's.
        object.__setattr__(self, "parent", parent)
        self.parameter, self.expert, self.inputs_first = parameter, expert, inputs_first
        first, second = getattr(parent, parameter).shape[-2:]
        self.inputs, self.outputs = (first, second) if self.inputs_first else (second, first)
        name = "bias" if expert is None else f"{parameter}_bias"
        bias, wanted = (
            parent._parameters.get(name),
            (*getattr(parent, parameter).shape[: expert is not None], self.outputs),
        )
        self.biases = name if bias is not None and tuple(bias.shape) == wanted else None

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,)"""
        whole = None if self.biases is None else getattr(self.parent, self.biases)
        return whole if whole is None or self.expert is None else whole[self.expert]

    @property
    def held(self) -> torch.Tensor:
        """The parameter, as its holder has it now."""
        found: torch.Tensor = getattr(self.parent, self.parameter)
        return found

    def part(self, gradient: torch.Tensor) -> torch.Tensor:
        """(outputs, inputs) of the parameter's gradient; (outputs,) of the biases'."""
        its = gradient if self.expert is None else gradient[self.expert]
        return its.mT if self.inputs_first and its.ndim == 2 else its

    def forward(self, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """What its hooks are told of: x (n, t, inputs), and the product (n, t, outputs)."""
        return product


def expert_maps(name: str, module: nn.Module) -> dict[str, ExpertMap]:
    """Name -> map, of a module that holds fused experts or routes to them; {} of others.

    Known by what they have: a number of experts, and either parameters (experts, ., .), or a weight (experts, inputs)
    and no more.
    """
    count = next((c for key in _COUNTS if type(c := getattr(module, key, None)) is int), 0)
    if not count:
        return {}
    if fused := _fused(module, count):
        first = _inputs_first(module, fused)
        return {
            f"{name}.{key}.{e}": ExpertMap(module, key, e, inputs_first=first) for key in fused for e in range(count)
        }
    weight = module._parameters.get("weight")
    routes = weight is not None and weight.ndim == 2 and len(weight) == count and weight.is_floating_point()
    if not routes or isinstance(module, nn.Linear) or next(module.children(), None) is not None:
        return {}
    return {f"{name}.weight": ExpertMap(module, "weight", None, inputs_first=False)}


def _inputs_first(module: nn.Module, fused: list[str]) -> bool:
    """Whether slices are (inputs, outputs): as transformers' classes say, or as the first map's inputs are as many as
    the last one's outputs."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first, last = (getattr(module, key).shape for key in (fused[0], fused[-1]))
    return bool(first[1] == last[2] and first[2] != last[1])


def _fused(module: nn.Module, count: int) -> list[str]:
    """Names of its parameters that have a matrix for each of so many experts."""
    return [
        key
        for key, p in module._parameters.items()
        if p is not None and p.ndim == 3 and len(p) == count and p.is_floating_point()
    ]


@contextmanager
def routed(
    maps: Sequence[ExpertMap], examples: Callable[[], int], trouble: Callable[[ExpertMap, str], None]
) -> Iterator[None]:
    """While inside, the products of the maps' parent, the same of all, go through them.

    Args:
        maps: of one parent.
        examples: gives how many examples the batch has.
        trouble: told of a map whose rows cannot be followed.
    """
    parent = maps[0].parent
    own, forward = parent.__dict__.get("forward"), parent.forward

    def through(*args: Any, **kwargs: Any) -> Any:
        with _eager(parent), _Routing(maps, _first(args, kwargs), examples(), trouble):
            return forward(*args, **kwargs)

    parent.forward = through
    try:
        yield
    finally:
        if own is None:
            del parent.forward
        else:
            parent.forward = own


@contextmanager
def _eager(parent: nn.Module) -> Iterator[None]:
    """transformers chooses among forwards by its config; the plain one takes expert by expert."""
    config, key = getattr(parent, "config", None), "_experts_implementation"
    if not hasattr(config, key):
        yield
        return
    before = getattr(config, key)
    setattr(config, key, "eager")
    try:
        yield
    finally:
        setattr(config, key, before)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The rows that a module is called with."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next((value for value in given if value.is_floating_point() and value.ndim > 1), None)


class _Routing(TorchFunctionMode):
    """One call of the parent: sees which rows of its input are gathered, and sends products through the maps."""

    def __init__(
        self,
        maps: Sequence[ExpertMap],
        hidden: torch.Tensor | None,
        examples: int,
        trouble: Callable[[ExpertMap, str], None],
    ) -> None:
        super().__init__()
        self._maps = {(m.parameter, m.expert): m for m in maps}
        self._parameters = {id(m.held): m.parameter for m in maps}
        self._hidden, self._examples, self._trouble = hidden, examples, trouble
        self._seen: set[tuple[str, int | None]] = set()
        # id of a slice -> it, and what it is of; of all that are alive here, so that no id is used twice.
        self._slices: dict[int, tuple[torch.Tensor, tuple[str, int | None]]] = {}
        rows = 0 if hidden is None else hidden.numel() // max(hidden.shape[-1], 1)
        self._of_row: torch.Tensor | None = None
        if hidden is not None and examples and rows % examples == 0:
            self._of_row = torch.arange(examples, device=hidden.device).repeat_interleave(rows // examples)
        self._gathered = self._of_row

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        used = {parameter for parameter, _ in self._seen}
        for (parameter, _), its in self._maps.items() if kind is None else ():
            if parameter not in used:
                self._trouble(its, f"{type(its.parent).__name__} uses {parameter!r} in a way that is not followed")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if (key := self._known(given["weight"])) is not None:
                return self._product(key, given["input"], given["weight"], given.get("bias"), inputs_first=False)
        elif func in _PRODUCTS and len(args) == 2 and (key := self._known(args[1])) is not None:
            return self._product(key, *args, None, inputs_first=True)
        elif func in _BATCHED and len(args) == 2 and self._name(args[1]) is not None:
            return self._each(*args)
        found = func(*args, **kwargs)
        if func in _GATHERS and len(args) > 1:
            self._follow(args[0], args[-1], found)
        elif func in _CASTS and (key := self._known(args[0])) is not None:
            self._slices[id(found)] = found, key
        return found

    def _name(self, tensor: Any) -> str | None:
        return self._parameters.get(id(tensor))

    def _known(self, tensor: Any) -> tuple[str, int | None] | None:
        """Which map's weight a tensor is."""
        if id(tensor) in self._slices:
            return self._slices[id(tensor)][1]
        name = self._name(tensor)
        return (name, None) if name is not None and (name, None) in self._maps else None

    def _follow(self, source: Any, index: Any, found: torch.Tensor) -> None:
        """What is taken of a weight, or of the module's rows."""
        name = self._name(source)
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if name is not None:
            if found.shape == source.shape[1:]:
                self._slices[id(found)] = found, (name, int(index))
        elif isinstance(index, torch.Tensor) and self._of_row is not None and self._is_hidden(source):
            self._gathered = self._of_row[index] if found.ndim == 2 else None

    def _is_hidden(self, tensor: Any) -> bool:
        """The module's rows themselves, in whatever view of all of them."""
        hidden = self._hidden
        if hidden is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            return False
        same = tensor is hidden or tensor.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        return same and tensor.numel() == hidden.numel() and tensor.shape[-1] == hidden.shape[-1]

    def _product(
        self,
        key: tuple[str, int | None],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        inputs_first: bool,
    ) -> torch.Tensor:
        """x (rows, inputs) times the weight of a map, each example's rows together."""
        product = functional.linear(x, weight.mT if inputs_first else weight, bias)
        self._seen.add(key)
        if key not in self._maps:
            # One that is not tracked.
            return product
        its, rows = self._maps[key], self._rows_of(x, whole=key[1] is None)
        if rows is None or its.inputs_first != inputs_first:
            why = "in another orientation" if rows is not None else "by rows that cannot be mapped to examples"
            self._trouble(its, f"{type(its.parent).__name__} multiplies {key[0]!r} {why} (shape {tuple(x.shape)})")
            return product
        if key[1] is None:
            # All rows, in their order.
            return its(*(part.reshape(self._examples, -1, part.shape[-1]) for part in (x, product))).reshape_as(product)
        # Rows of an expert come in the order of its choices, or in any other.
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows, minlength=self._examples)
        first = counts.cumsum(0) - counts
        slot = torch.empty_like(rows)
        slot[order] = torch.arange(len(rows), device=rows.device) - first[rows[order]]
        longest = max(int(counts.max()), 1)
        # Zeros stand where an example has fewer rows than another.
        together = (p.new_zeros(self._examples, longest, p.shape[-1]).index_put((rows, slot), p) for p in (x, product))
        return its(*together)[rows, slot]

    def _rows_of(self, x: torch.Tensor, *, whole: bool) -> torch.Tensor | None:
        """(rows,) the example of each; None where that is not known."""
        if whole:
            return self._of_row if self._of_row is not None and x.numel() // x.shape[-1] == len(self._of_row) else None
        rows = self._of_row if self._is_hidden(x) else self._gathered
        return rows if rows is not None and x.ndim == 2 and len(rows) == len(x) else None

    def _each(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (experts, rows, inputs) times all experts' weights, each over all rows in their order."""
        name, out = str(self._name(weight)), []
        for expert in range(len(x)):
            its, product = self._maps.get((name, expert)), x[expert] @ weight[expert]
            self._seen.add((name, expert))
            known = x.shape[1] % self._examples == 0 if self._examples else False
            if its is None or not known or not its.inputs_first:
                if its is not None:
                    self._trouble(
                        its, f"{type(its.parent).__name__} multiplies {name!r} by rows of shape {tuple(x.shape)}"
                    )
                out.append(product)
            else:
                together = (part.reshape(self._examples, -1, part.shape[-1]) for part in (x[expert], product))
                out.append(its(*together).reshape_as(product))
        return torch.stack(out)

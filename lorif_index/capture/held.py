"""Held: linear maps whose weights are parameters, or slices of one, of a module that has no module for each of them.

Fused experts keep a weight (experts, ., .), and multiply the tokens that are routed to an expert by its slice; routers
and `nn.MultiheadAttention` (see `attention`) multiply by parameters of their own. While a pass runs, each such product
is shown to a `HeldMap`, which is hooked as any linear map is. Experts' rows are followed from the module's input to
the product, so that an expert's rows are put together by example, with zeros where an example has fewer: they add
nothing to its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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


class HeldMap(nn.Module):
    """One linear map of a module that holds its weight, as a module that can be hooked. It holds nothing itself.

    Attributes:
        parent: who holds the parameter.
        parameter: its name there.
        number: which slice along the first dimension, or block where it is `packed`; None: all of it.
        packed: how many blocks of rows the parameter has; None: its first dimension is that of the slices.
        inputs_first: whether the slice is (inputs, outputs).
        inputs, outputs: its widths.
        biases: name of the parameter that is added to the product, in slices alike, if there is one.
        bias_block: (number, blocks) of it, where it is in blocks and the weight is not.
        may_rest: whether a batch may have no row for it.
    """

    parent: nn.Module

    def __init__(
        self,
        parent: nn.Module,
        parameter: str,
        number: int | None,
        *,
        inputs_first: bool = False,
        packed: int | None = None,
        biases: str | None = None,
        bias_block: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        # Not as a child: this module is none of the model's.
        object.__setattr__(self, "parent", parent)
        self.parameter, self.number, self.packed, self.inputs_first = parameter, number, packed, inputs_first
        self.may_rest = number is not None and packed is None
        first, second = self._slice(self.held).shape
        self.inputs, self.outputs = (first, second) if inputs_first else (second, first)
        self.bias_block = bias_block
        added = None if biases is None else parent._parameters.get(biases)
        fits = added is not None and tuple(self._slice(added, bias=True).shape) == (self.outputs,)
        self.biases = biases if fits else None

    def _slice(self, whole: torch.Tensor, *, bias: bool = False) -> torch.Tensor:
        number, packed = self.bias_block if bias and self.bias_block else (self.number, self.packed)
        blocks = whole if packed is None else whole.unflatten(0, (packed, -1))
        return blocks if number is None else blocks[number]

    @property
    def held(self) -> torch.Tensor:
        """The parameter, as its holder has it now."""
        found: torch.Tensor = getattr(self.parent, self.parameter)
        return found

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,)"""
        return None if self.biases is None else self._slice(getattr(self.parent, self.biases), bias=True)

    def part(self, gradient: torch.Tensor, *, bias: bool = False) -> torch.Tensor:
        """(outputs, inputs) of the parameter's gradient; (outputs,) of the biases'."""
        its = self._slice(gradient, bias=bias)
        return its.mT if self.inputs_first and not bias else its

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, t, inputs) times the weight, and what hooks make of it."""
        found: torch.Tensor = self(x, functional.linear(x, self.part(self.held), self.bias))
        return found

    def forward(self, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """What its hooks are told of: x (n, t, inputs), and the product (n, t, outputs)."""
        return product


def expert_maps(name: str, module: nn.Module) -> dict[str, HeldMap]:
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
            f"{name}.{key}.{e}": HeldMap(module, key, e, inputs_first=first, biases=f"{key}_bias")
            for key in fused
            for e in range(count)
        }
    weight = module._parameters.get("weight")
    routes = weight is not None and weight.ndim == 2 and len(weight) == count and weight.is_floating_point()
    if not routes or isinstance(module, nn.Linear) or next(module.children(), None) is not None:
        return {}
    return {f"{name}.weight": HeldMap(module, "weight", None, biases="bias")}


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
    maps: Sequence[HeldMap], examples: Callable[[], int], trouble: Callable[[HeldMap, str], None]
) -> Iterator[None]:
    """While inside, the products of the maps' parent, the same of all, go through them.

    Args:
        maps: of one parent.
        examples: gives how many examples the batch has.
        trouble: told of a map whose rows cannot be followed.
    """
    parent = maps[0].parent

    def through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _eager(parent), _Routing(maps, _first(args, kwargs), examples(), trouble):
            return forward(*args, **kwargs)

    with instead(parent, through):
        yield


@contextmanager
def instead(module: nn.Module, through: Callable[..., Any]) -> Iterator[None]:
    """While inside, a call of the module is through(its forward, arguments...)."""
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = partial(through, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


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
        maps: Sequence[HeldMap],
        hidden: torch.Tensor | None,
        examples: int,
        trouble: Callable[[HeldMap, str], None],
    ) -> None:
        super().__init__()
        self._maps = {(m.parameter, m.number): m for m in maps}
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

"""Held: linear maps whose weights are parameters, or slices of one, of a module that has no module for each of them.

Fused experts keep a weight (experts, ., .), and multiply the tokens that are routed to an expert by its slice; routers
and `nn.MultiheadAttention` (see `attention`) multiply by parameters of their own. While a pass runs, each such product
is shown to a `HeldMap`, which is hooked as any linear map is. Experts' rows are followed from the module's input to
the product, so that an expert's rows are put together by example, with zeros where an example has fewer: they add
nothing to its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_experts")
_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm)
_BATCHED = (torch.bmm, torch.Tensor.bmm)
_CASTS = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type, torch.Tensor.contiguous)
_TURNS = (torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
_SWAPS = (torch.Tensor.transpose, torch.transpose, torch.Tensor.swapaxes, torch.Tensor.swapdims)
_SELECTS = (torch.index_select, torch.Tensor.index_select)


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
        vector: whether the parameter is one of outputs alone, of an input that is always 1.
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
        self.may_rest, self.vector = number is not None and packed is None, self.held.ndim == 1
        first, second = self._slice(self.held).shape
        self.inputs, self.outputs = (first, second) if inputs_first else (second, first)
        self.bias_block = bias_block
        added = None if biases is None else parent._parameters.get(biases)
        fits = added is not None and tuple(self._slice(added, bias=True).shape) == (self.outputs,)
        self.biases = biases if fits else None

    def _slice(self, whole: torch.Tensor, *, bias: bool = False) -> torch.Tensor:
        if self.vector:
            return whole.unsqueeze(-1)
        number, packed = self.bias_block if bias and self.bias_block else (self.number, self.packed)
        blocks = whole if packed is None else whole.unflatten(0, (packed, -1))
        return blocks if number is None else blocks[number]

    @property
    def held(self) -> torch.Tensor:
        """The parameter, as its holder has it now."""
        found: torch.Tensor = getattr(self.parent, self.parameter)
        return found

    @property
    def key(self) -> tuple[int, int | None, int | None]:
        """What maps of one weight share, also where two modules hold it."""
        return id(self.held), self.number, self.packed

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
    # A bias of its own is often of the choice alone, and no part of the product.
    return {f"{name}.weight": HeldMap(module, "weight", None)}


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
    maps: Sequence[HeldMap],
    examples: Callable[[], int],
    in_place: Callable[[], bool],
    trouble: Callable[[HeldMap, str], None],
) -> Iterator[None]:
    """While inside, the products of the maps' parent, the same of all, go through them.

    Args:
        maps: of one parent.
        examples: gives how many examples the batch has.
        in_place: says whether rows stand at their own positions, so that positions are the same in all maps, and not
            one after the other, which takes less.
        trouble: told of a map whose rows cannot be followed.
    """
    parent = maps[0].parent

    def through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _eager(parent), _Routing(maps, _first(args, kwargs), examples(), trouble, in_place=in_place()):
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


class Unfollowed(Exception):
    """A call of a form that is not computed here."""


@contextmanager
def computed(
    module: nn.Module,
    maps: Sequence[HeldMap],
    compute: Callable[..., Any],
    trouble: Callable[[HeldMap, str], None],
    proven: set[int],
    near: Mapping[int, float],
    differs: str,
) -> Iterator[None]:
    """While inside, a call of the module is compute(its forward, arguments...), which goes through its maps. At the
    first call it is compared with the forward, whose output stands where it differs.

    Args:
        module: of the maps.
        maps: those of it that are tracked.
        compute: may raise `Unfollowed`: the forward is called instead.
        trouble: told of the maps where it is.
        proven: ids of modules that were compared; this one is, if it is not among them.
        near: relative errors of rounding, by bytes of a number.
        differs: the trouble where it differs.
    """

    def through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            found = compute(forward, *args, **kwargs)
            if id(module) not in proven:
                with torch.no_grad():
                    ours, wanted = (_output(out).detach() for out in (found, forward(*args, **kwargs)))
                if not wanted.numel():
                    return found
                limit = near[max(min(wanted.dtype.itemsize, 8), 2)] * wanted.abs().amax()
                if not bool((ours - wanted).abs().amax() <= limit):
                    raise Unfollowed(differs)
                proven.add(id(module))
        except Unfollowed as error:
            for its in maps:
                trouble(its, str(error))
            return forward(*args, **kwargs)
        return found

    with instead(module, through):
        yield


def _output(found: Any) -> torch.Tensor:
    """What a module gives, or the first of several."""
    first: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return first


@contextmanager
def _eager(parent: nn.Module) -> Iterator[None]:
    """transformers chooses among forwards by its config; the plain one takes expert by expert."""
    config = getattr(parent, "config", None)
    # The public one would be set in parts of the config, too.
    keys = ("_experts_implementation_internal", "_experts_implementation")
    key = next((key for key in keys if hasattr(config, key)), None)
    if key is None:
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


class _Weight(NamedTuple):
    """A tensor that is (a slice of) a parameter, alive as long as this is, so that no id is used twice.

    Attributes:
        tensor: the tensor.
        parameter: the parameter's name.
        number: which slice; None: all of it.
        turned: whether its last two dimensions are swapped.
    """

    tensor: torch.Tensor
    parameter: str
    number: int | None
    turned: bool = False


class _Routing(TorchFunctionMode):
    """One call of the parent: sees which rows of its input are gathered, and sends products through the maps."""

    def __init__(
        self,
        maps: Sequence[HeldMap],
        hidden: torch.Tensor | None,
        examples: int,
        trouble: Callable[[HeldMap, str], None],
        *,
        in_place: bool,
    ) -> None:
        super().__init__()
        self._maps = {(m.parameter, m.number): m for m in maps}
        self._hidden, self._examples, self._trouble, self._in_place = hidden, examples, trouble, in_place
        self._used: set[str] = set()
        self._weights = {id(m.held): _Weight(m.held, m.parameter, None) for m in maps}
        rows = 0 if hidden is None else hidden.numel() // max(hidden.shape[-1], 1)
        # Rows of an example; 0 where they are not known.
        self._each = rows // examples if examples and rows % examples == 0 else 0
        self._rows = None if hidden is None else torch.arange(rows, device=hidden.device)
        self._gathered = self._rows

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]
        for parameter in {parameter for parameter, _ in self._maps} - self._used if kind is None else ():
            self._unfollowed(parameter, "in a way that is not followed")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if (weight := self._known(given["weight"])) is not None:
                return self._product(weight, given["input"], given.get("bias"), inputs_first=weight.turned)
        elif func in _PRODUCTS and len(args) == 2 and (weight := self._known(args[1])) is not None:
            return self._product(weight, *args[:1], None, inputs_first=not weight.turned)
        elif func in _BATCHED and len(args) == 2 and (weight := self._known(args[1])) is not None:
            return self._all(weight, args[0])
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor):
            self._follow(func, args, kwargs, found)
        return found

    def _known(self, tensor: Any) -> _Weight | None:
        return self._weights.get(id(tensor))

    def _unfollowed(self, parameter: str, how: str) -> None:
        """Of all experts: another batch has others."""
        for (name, _), its in self._maps.items():
            if name == parameter:
                self._trouble(its, f"{type(its.parent).__name__} uses {parameter!r} {how}")

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: torch.Tensor) -> None:
        """What is taken of a weight, or of the module's rows."""
        source = args[0] if args else None
        if (weight := self._known(source)) is not None:
            self._weights[id(found)] = its = self._taken(weight, func, args[1:], found)
            if its.parameter == "":
                del self._weights[id(found)]
                if found.is_floating_point():
                    self._unfollowed(
                        weight.parameter, f"in a way that is not followed ({getattr(func, '__name__', func)})"
                    )
        elif any(self._known(arg) is not None for arg in (*args[1:], *kwargs.values())):
            of = next(w for arg in (*args[1:], *kwargs.values()) if (w := self._known(arg)) is not None)
            self._unfollowed(of.parameter, f"in a way that is not followed ({getattr(func, '__name__', func)})")
        elif self._rows is not None and self._is_hidden(source):
            if func is torch.Tensor.__getitem__:
                index = args[1][0] if isinstance(args[1], tuple) and len(args[1]) == 1 else args[1]
            elif func in _SELECTS:
                given = dict(zip(("dim", "index"), args[1:], strict=False)) | kwargs
                index = given["index"] if given["dim"] in (0, -2) else None
            else:
                return
            fits = isinstance(index, torch.Tensor) and found.ndim == 2
            self._gathered = self._rows[index] if fits else None

    def _taken(self, weight: _Weight, func: Any, further: tuple[Any, ...], found: torch.Tensor) -> _Weight:
        """What a function has made of a weight; without a name where that is not followed."""
        if func in _CASTS and found.shape == weight.tensor.shape:
            return weight._replace(tensor=found)
        swapped = func in _SWAPS and weight.tensor.ndim == 2 and {d % 2 for d in further if type(d) is int} == {0, 1}
        if weight.number is not None and (func in _TURNS or swapped):
            return weight._replace(tensor=found, turned=not weight.turned)
        if func is torch.Tensor.__getitem__ and weight.number is None and found.shape == weight.tensor.shape[1:]:
            index = further[0] if isinstance(further[0], tuple) else further
            first, rest = index[0], index[1:]
            plain = type(first) is int or (isinstance(first, torch.Tensor) and first.ndim == 0)
            if plain and all(part is Ellipsis or part == slice(None) for part in rest):
                return _Weight(found, weight.parameter, int(first) % len(weight.tensor))
        return _Weight(found, "", None)

    def _is_hidden(self, tensor: Any) -> bool:
        """The module's rows themselves, in whatever view of all of them."""
        hidden = self._hidden
        if hidden is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            return False
        same = tensor is hidden or tensor.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        return same and tensor.numel() == hidden.numel() and tensor.shape[-1] == hidden.shape[-1]

    def _product(
        self, weight: _Weight, x: torch.Tensor, bias: torch.Tensor | None, *, inputs_first: bool
    ) -> torch.Tensor:
        """x (rows, inputs) times a weight, each example's rows together.

        Args:
            inputs_first: whether the product takes the parameter's slice, as it is stored, as (inputs, outputs).
        """
        stored = weight.tensor.mT if weight.turned else weight.tensor
        product = functional.linear(x, stored.mT if inputs_first else stored, bias)
        its = self._maps.get((weight.parameter, weight.number))
        self._used.add(weight.parameter)
        if its is None:
            # One that is not tracked; or all of a parameter of which slices are.
            if weight.number is None:
                self._unfollowed(weight.parameter, "whole")
            return product
        if its.inputs_first != inputs_first:
            self._unfollowed(weight.parameter, "in another orientation")
            return product
        if weight.number is None:
            if not self._each or x.numel() // x.shape[-1] != self._each * self._examples:
                self._unfollowed(weight.parameter, f"for rows that are not examples' (shape {tuple(x.shape)})")
                return product
            # All rows, in their order.
            return its(*(part.reshape(self._examples, -1, part.shape[-1]) for part in (x, product))).reshape_as(product)
        rows = self._rows if self._is_hidden(x) else self._gathered
        if not self._each or rows is None or x.ndim != 2 or len(rows) != len(x):
            self._unfollowed(weight.parameter, f"for rows that cannot be mapped to examples (shape {tuple(x.shape)})")
            return product
        example, slot, width = self._places(rows)
        # Zeros stand where an example has no row.
        together = (p.new_zeros(self._examples, width, p.shape[-1]).index_put((example, slot), p) for p in (x, product))
        return its(*together)[example, slot]

    def _places(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(rows,) the example of each and its place there, and how many places there are."""
        example, key = rows // self._each, rows if self._in_place else rows // self._each
        # How often the same was there before.
        order = torch.argsort(key, stable=True)
        counts = torch.bincount(key, minlength=1)
        before = torch.empty_like(rows)
        before[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[key[order]]
        most = max(int(counts.max()), 1)
        if self._in_place:
            return example, before * self._each + rows % self._each, most * self._each
        return example, before, most

    def _all(self, weight: _Weight, x: torch.Tensor) -> torch.Tensor:
        """x (experts, rows, inputs) times all experts' weights, each over all rows in their order."""
        self._used.add(weight.parameter)
        maps = [self._maps.get((weight.parameter, expert)) for expert in range(len(x))]
        products = torch.bmm(x, weight.tensor)
        whole = weight.number is None and not weight.turned
        if (
            not whole
            or not self._examples
            or x.shape[1] % self._examples
            or any(m and not m.inputs_first for m in maps)
        ):
            self._unfollowed(weight.parameter, f"for rows that are not examples' (shape {tuple(x.shape)})")
            return products
        out = []
        for its, rows, product in zip(maps, x, products, strict=True):
            together = (part.reshape(self._examples, -1, part.shape[-1]) for part in (rows, product))
            out.append(product if its is None else its(*together).reshape_as(product))
        return torch.stack(out)

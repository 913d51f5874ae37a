"""A device that is not the CPU, on a machine that has none: tensors that say they are there, and are held by the CPU.

Real numbers are computed, by the CPU's own operations, so that what runs there can be compared with what runs on the
CPU. An operation that a GPU would refuse is refused: tensors of several dimensions that meet the CPU's. What makes the
CPU wait for a GPU is counted: numbers that are brought back, and shapes that depend on numbers.

torch's "lazy" device type is borrowed for it: of those that a CPU build has, it is one that autograd knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten

# Take tensors of two devices: copies; and indices may be the CPU's, which a GPU is then sent.
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}
# Their results' shapes, or they themselves, are numbers that the CPU has to see.
_READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "mask",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
}


class Elsewhere(torch.Tensor):
    """A tensor on that device.

    Attributes:
        inner: its numbers.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class Device(TorchDispatchMode):
    """Inside, tensors can be made on `DEVICE`, and modules moved there.

    Attributes:
        reads: what made the CPU wait for the device, by kind, since it was cleared.
        launches: operations that computed something there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.reads: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self._lifted, self._autocast = torch._C._only_lift_cpu_tensors(), torch.autocast
        self._generator = torch.Generator
        # `torch.tensor` makes its tensor on the CPU, and then sends it.
        torch._C._set_only_lift_cpu_tensors(True)
        torch.autocast = no_autocast(self._autocast)  # type: ignore[misc]
        torch.Generator = _of_the_cpu(self._generator)  # type: ignore[misc]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.autocast = self._autocast  # type: ignore[misc]
        torch.Generator = self._generator  # type: ignore[misc]
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(func, args, kwargs or {}, self.reads)
        self.launches += not func.is_view and any(isinstance(part, Elsewhere) for part in tree_flatten(found)[0])
        return found


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor of either device."""
    return tensor.inner if isinstance(tensor, Elsewhere) else tensor


def no_autocast(autocast: Any) -> Any:
    """`torch.autocast`, which knows nothing of the device's type, for a device that has none."""

    class Autocast(autocast):
        """Of a device that has none it can be switched off."""

        def __new__(cls, device_type: str, *args: Any, **kwargs: Any) -> Any:
            if device_type == DEVICE.type:
                assert kwargs == {"enabled": False}
                device_type = "cpu"
            return autocast(device_type, *args, **kwargs)

    return Autocast


def _of_the_cpu(generator: Any) -> Any:
    class Generator:
        """The device's random numbers are the CPU's."""

        def __new__(cls, device: Any = "cpu") -> Any:
            device = torch.device(device)
            return generator(device="cpu" if device.type == DEVICE.type else device)

    return Generator


def _run(func: Any, args: Any, kwargs: dict[str, Any], reads: Counter[str]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
    to = DEVICE.type == wanted.type if wanted is not None else there
    if not there and not to:
        return func(*args, **kwargs)
    if there:
        _check(func, args, kwargs)
        _count(func, args, to, reads)
    inner_args, inner_kwargs = tree_map(here_or_same, (args, kwargs))
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if func is aten._to_copy.default and wanted is not None and to != there:
        # Onto another device is a copy even where nothing else changes.
        inner_kwargs.pop("non_blocking", None)
    out = func(*inner_args, **inner_kwargs)
    mutated = [t for t, written in _with_writes(func, args, kwargs) if written]
    if mutated:
        return mutated[0] if len(mutated) == 1 else tuple(mutated)
    return tree_map(lambda t: Elsewhere(t) if to and isinstance(t, torch.Tensor) else t, out)


def here_or_same(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _with_writes(func: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[torch.Tensor, bool]]:
    """Tensors among the arguments, and whether the operation writes to them."""
    found = []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for value in tree_flatten(given.get(argument.name))[0]:
            if isinstance(value, torch.Tensor):
                found.append((value, writes))
    return found


def _check(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if func in _COPIES:
        return
    if func in _INDEXED:
        # The indices may lie on the CPU, if what is indexed does not.
        indexed = [args[0], *args[2:3]]
        found = [(t, False) for t in indexed if isinstance(t, torch.Tensor)]
        if not isinstance(args[0], Elsewhere):
            found += [(t, False) for t in tree_flatten(args[1])[0] if isinstance(t, torch.Tensor)]
    else:
        found = _with_writes(func, args, kwargs)
    if not any(isinstance(t, Elsewhere) for t, _ in found):
        return
    for tensor, written in found:
        # The CPU's numbers without dimensions go along with what is computed elsewhere.
        if not isinstance(tensor, Elsewhere) and (tensor.ndim or written):
            shapes = [(str(t.device), tuple(t.shape)) for t, _ in found]
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {shapes}")


def _count(func: Any, args: Any, to: bool, reads: Counter[str]) -> None:
    copied = func is aten.copy_.default and not isinstance(args[0], Elsewhere)
    if func in _READS:
        reads[_READS[func]] += 1
    elif copied or (func is aten._to_copy.default and not to):
        reads["to the CPU"] += 1
    elif func in _INDEXED:
        for index in args[1]:
            if isinstance(index, torch.Tensor):
                if index.dtype in (torch.bool, torch.uint8):
                    reads["mask"] += 1
                elif not isinstance(index, Elsewhere):
                    reads["sent indices"] += 1


def moved(model: nn.Module, to: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.to(DEVICE)) -> nn.Module:
    """The model, in place, with its weights on the device, inside a `Device`. (`Module.to` would untie tied weights:
    it can give a tensor of one kind no data of another.)"""
    there: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there.setdefault(id(p), nn.Parameter(to(p).detach(), p.requires_grad))
                module._parameters[name] = there[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else to(buffer)
    return model

"""Norms: the scale and the bias of layer norms as layers of one input.

A norm is y = f(x; 0, 0) + u w + b in its scale w and bias b, with u = f(x; 1, 0) - f(x; 0, 0), also where it is
u (1 + w). While a pass runs it is computed so, with w and b as the outputs of maps whose one input is always 1:
gradients at these are u dy and dy at each position. At the first call it is compared with the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .held import HeldMap, Unfollowed, computed

# Relative errors of rounding, by bytes of a number.
_NEAR = {2: 5e-2, 4: 1e-4, 8: 1e-9}


def norm_maps(name: str, module: nn.Module) -> dict[str, HeldMap]:
    """Name -> map of the scale and the bias of a norm over the last dimension; {} of other modules. Norms of other
    libraries are known by the names of their classes."""
    named = any(c.__name__.endswith(("LayerNorm", "RMSNorm")) for c in type(module).__mro__)
    own = {key: p for key, p in module._parameters.items() if p is not None}
    fits = "weight" in own and set(own) <= {"weight", "bias"} and next(module.children(), None) is None
    if not named or not fits or any(p.ndim != 1 or not p.is_floating_point() for p in own.values()):
        return {}
    return {f"{name}.{key}": HeldMap(module, key, None) for key in own}


@contextmanager
def norming(maps: Sequence[HeldMap], trouble: Callable[[HeldMap, str], None], proven: set[int]) -> Iterator[None]:
    """While inside, a norm is computed by its maps.

    Args:
        maps: those of one module that are tracked.
        trouble: told of maps that cannot be followed.
        proven: ids of modules that were compared with their own forward; this one is, if it is not among them.
    """
    module = maps[0].parent
    tracked = {m.parameter: m for m in maps}

    def part(key: str, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        wide = at.to(x.dtype).expand(x.shape)
        found: torch.Tensor = tracked[key](x.new_ones(*x.shape[:-1], 1), wide) if key in tracked else wide
        return found

    def norm(forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or args[0].ndim < 2:
            raise Unfollowed(f"{type(module).__name__} is called with more than one tensor of features")
        own = {key: p for key, p in module._parameters.items() if p is not None}
        zeros = {key: torch.zeros_like(p) for key, p in own.items()}
        rest = _at(module, zeros, forward, args[0])
        unit = _at(module, zeros | {"weight": torch.ones_like(own["weight"])}, forward, args[0]) - rest
        found = rest + unit * part("weight", unit, own["weight"])
        return found + part("bias", unit, own["bias"]) if "bias" in own else found

    differs = f"{type(module).__name__} is not linear in its scale"
    with computed(module, maps, norm, trouble, proven, _NEAR, differs):
        yield


def _at(
    module: nn.Module, values: Mapping[str, torch.Tensor], forward: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """What a module gives with other parameters."""
    before = dict(module._parameters)
    module._parameters.update(values)  # type: ignore[arg-type]
    try:
        return forward(x)
    finally:
        module._parameters.update(before)

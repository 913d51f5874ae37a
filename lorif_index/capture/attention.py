"""Attention: `nn.MultiheadAttention`, whose projections' weights are used without a module, computed by maps of it.

Its own forward is torch's; while a pass runs, the same is computed from maps that can be hooked: three blocks of
`in_proj_weight`, or three parameters, and the module `out_proj`. At the first call both are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .held import HeldMap, Unfollowed, computed

_PARTS = ("q", "k", "v")
# Relative errors of rounding, by bytes of a number.
_NEAR = {2: 5e-2, 4: 1e-3, 8: 1e-8}


def followed(module: nn.Module) -> bool:
    """Whether a module's attention is computed here: torch's own, without the keys and values that some add."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    plain = all(p is None or p.is_floating_point() for p in module._parameters.values())
    return plain and module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def attention_maps(name: str, module: nn.Module) -> dict[str, HeldMap]:
    """Name -> map of queries, keys and values; {} of modules that are none of `followed`."""
    if not followed(module):
        return {}
    maps = {}
    for number, part in enumerate(_PARTS):
        if module.in_proj_weight is not None:
            its = HeldMap(module, "in_proj_weight", number, packed=len(_PARTS), biases="in_proj_bias")
        else:
            its = HeldMap(module, f"{part}_proj_weight", None, biases="in_proj_bias", bias_block=(number, len(_PARTS)))
        maps[f"{name}.{part}_proj"] = its
    return maps


@contextmanager
def attending(
    module: nn.MultiheadAttention, maps: Sequence[HeldMap], trouble: Callable[[HeldMap, str], None], proven: set[int]
) -> Iterator[None]:
    """While inside, the module's attention is computed by its maps.

    Args:
        module: of `followed`.
        maps: those of it that are tracked.
        trouble: told of maps that cannot be followed.
        proven: ids of modules that were compared with torch's forward; this one is, if it is not among them.
    """
    every = attention_maps("", module)
    # Those that are not tracked multiply all the same.
    tracked = {(m.parameter, m.number): m for m in maps}
    chosen = [tracked.get((m.parameter, m.number), m) for m in every.values()]

    def attend(_: Any, *args: Any, **kwargs: Any) -> Any:
        return _attention(module, chosen, *args, **kwargs)

    differs = "nn.MultiheadAttention is not computed here as it is by torch"
    with computed(module, maps, attend, trouble, proven, _NEAR, differs):
        yield


def _attention(
    module: nn.MultiheadAttention,
    maps: Sequence[HeldMap],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `nn.MultiheadAttention.forward`, in eval mode."""
    if query.ndim != 3 or query.is_nested:
        raise Unfollowed(f"nn.MultiheadAttention is called with a query of shape {tuple(query.shape)}, not in batches")
    if is_causal and attn_mask is None:
        raise Unfollowed("nn.MultiheadAttention is called with is_causal, and without the mask that it needs")
    inputs = (query, key, value)
    if not module.batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)  # type: ignore[assignment]
    heads = module.num_heads
    q, k, v = (m.product(x).unflatten(2, (heads, -1)).transpose(1, 2) for m, x in zip(maps, inputs, strict=True))
    mask = _mask(key_padding_mask, attn_mask, q, k)
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        mixed = weights @ v
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    return (out if module.batch_first else out.transpose(0, 1)), weights


def _mask(
    padding: torch.Tensor | None, given: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """What is added to scores (n, heads, L, S); True stands for minus infinity."""
    total: torch.Tensor | None = None
    if padding is not None:
        total = _added(padding, q.dtype)[:, None, None, :]
    if given is not None:
        its = _added(given, q.dtype)
        its = its.reshape(len(q), q.shape[1], q.shape[2], k.shape[2]) if its.ndim == 3 else its
        total = its if total is None else total + its
    return total


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)

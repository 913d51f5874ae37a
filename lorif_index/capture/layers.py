"""Layers: which linear maps of a model are tracked, and how a module's call becomes positions x features.

Every supported module is a linear map applied at each position t of an example, or stands for one (see `held`): the
gradient of its weight is sum_t x_t dy_t^T, shape (inputs, outputs). Convolutions are unfolded (Grosse and Martens,
arXiv:1602.01407), embeddings have one-hot inputs, a bias is one more input that is always one. Only inputs and output
gradients are looked at, never the weight's values: a quantised linear map is tracked as if its weight were not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..config import BuildConfig, LayerSelection
from ..errors import CaptureError, ConfigError
from .attention import attention_maps, followed
from .gradients import LayerSpec
from .held import HeldMap, expert_maps
from .norms import norm_maps
from .sharded import plain_name

HEAD_NUMBERS = 1 << 19
"""Most numbers of a gradient of a head that keeps its words."""
_LEAST_HEAD = 8
_HEAD_NAMES = ("lm_head", "embed_out", "output_embeddings")


@dataclass(frozen=True)
class Use:
    """One module that uses a tracked weight.

    Attributes:
        name: the module's name.
        module: the module.
        transposed: the weight is used the other way round than by the layer's first use (tied embedding and head),
            so that inputs and output gradients change sides.
        inputs, outputs: widths of the module's own linear map, without bias; inputs per group of a convolution.
        bias: whether a bias is tracked with it.
        second: whether examples lie along the second dimension of its inputs and outputs, and not the first.
    """

    name: str
    module: nn.Module
    transposed: bool
    inputs: int
    outputs: int
    bias: bool
    second: bool = False

    def examples_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its input, or the gradient at its output, with the examples along the first dimension."""
        return tensor.transpose(0, 1) if self.second else tensor

    def may_be_second(self, tensor: torch.Tensor, count: int) -> bool:
        """Whether so many examples may lie along a tensor's second dimension, where the first is not theirs."""
        held = isinstance(self.module, HeldMap) and not self.module.vector
        plain = not held and not isinstance(self.module, (nn.Conv1d, nn.Conv2d, nn.Embedding))
        return plain and not self.second and tensor.ndim > 2 and tensor.shape[1] == count


@dataclass(frozen=True)
class TrackedLayer:
    """A weight and the modules that use it. Widths include the bias's column of ones on the input side; `words` is the
    side, "in" or "out", that has a language model's vocabulary, or None."""

    name: str
    uses: tuple[Use, ...]
    width_in: int
    width_out: int
    bias: bool
    words: str | None = None


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """transformers' `Conv1D`: a linear map whose weight is stored (inputs, outputs). Known by name: never imported."""
    # Of all bases: `fully_shard` puts a class of its own before them.
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_quantised_linear(module: nn.Module) -> bool:
    """A linear map of some library's own class, over a weight in integers: a leaf with `in_features`, `out_features`,
    tensors of integers, and no `weight` of floating point. Known by these, never imported."""
    if isinstance(module, nn.Linear) or next(module.children(), None) is not None:
        return False
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(width, int) and width > 0 for width in widths):
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = getattr(module, "weight", None)
    whole = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return not whole and any(not t.is_floating_point() and not t.is_complex() and t.ndim for t in tensors)


def supported(module: nn.Module) -> bool:
    plain = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, HeldMap))
    return plain or is_conv1d_of_transformers(module) or is_quantised_linear(module)


def named_maps(model: nn.Module, *, norms: bool) -> dict[str, nn.Module]:
    """Name -> module, of all modules of a model, and of the linear maps that some hold without a module of their
    own."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        name = plain_name(name)
        found[name] = module
        found |= expert_maps(name, module) | attention_maps(name, module)
        if norms:
            found |= norm_maps(name, module)
    return found


def _key(module: nn.Module) -> Hashable:
    """What modules with one weight share: its id; the module's own where the weight is no stored parameter (a quantised
    one of another name, or one computed anew at each look, whose id means nothing)."""
    if isinstance(module, HeldMap):
        return module.key
    weight = module._parameters.get("weight")
    return id(module) if weight is None else id(weight)


def _owner(module: nn.Module) -> int:
    """id of a module, or of the one that holds its weight."""
    return id(module.parent if isinstance(module, HeldMap) else module)


def _bias_key(module: nn.Module) -> Hashable:
    """What modules with one bias share."""
    if isinstance(module, HeldMap) and module.biases is not None:
        return id(getattr(module.parent, module.biases)), *module.key[1:]
    return id(module.bias)


def _packed(module: nn.Module) -> bool:
    """Whether it is an `nn.Linear` whose weight is kept in a form of its own, as bitsandbytes' in four bits is."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    return not weight.is_floating_point() or (weight.shape[-1] == 1 and module.in_features != 1)


def torch_forward(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """The forward of torch's class, where a module's own class has another one over a weight of numbers."""
    for base in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d):
        if isinstance(module, base):
            plain = type(module).forward is base.forward or not module.weight.is_floating_point() or _packed(module)
            return None if plain else base.forward
    return None


def stored_inputs_first(module: nn.Module) -> bool:
    """Whether the weight is (inputs, outputs), and not (outputs, inputs)."""
    return isinstance(module, nn.Embedding) or is_conv1d_of_transformers(module)


def _describe(name: str, module: nn.Module, bias: bool) -> Use:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, HeldMap):
        inputs, outputs = module.inputs, module.outputs
    elif is_quantised_linear(module) or _packed(module):
        # By name: a weight in four bits has another shape.
        inputs, outputs = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    elif stored_inputs_first(module):
        inputs, outputs = weight.shape
    else:
        outputs, inputs = weight.shape[0], weight.shape[1:].numel()
    has_bias = bias and getattr(module, "bias", None) is not None
    return Use(name, module, False, inputs, outputs, has_bias)


def _refuse_unsupported_settings(use: Use) -> None:
    for setting in ("max_norm", "scale_grad_by_freq", "sparse") if isinstance(use.module, nn.Embedding) else ():
        if value := getattr(use.module, setting):
            raise CaptureError(
                f"embedding {use.name!r} has {setting}={value!r}, whose gradient depends on the batch or is not dense: "
                "exclude it, or build it without"
            )


def _default_exclusions(
    model: nn.Module, modules: dict[str, nn.Module], selection: LayerSelection, adapters: set[int], idle: set[int]
) -> set[int]:
    """ids of modules that the default leaves out: embeddings, a language model's head, and what bypasses hooks."""
    out: set[int] = set()
    embedding_weights = {_key(m) for m in modules.values() if isinstance(m, nn.Embedding)}
    head = _output_embeddings(model)
    only = selection.adapters == "auto" and bool(adapters)
    for name, module in modules.items():
        if _owner(module) in idle:
            out.add(id(module))
        elif _owner(module) in adapters:
            # A classifier's head that is trained with them, too.
            continue
        elif only and supported(module):
            out.add(id(module))
        elif isinstance(module, nn.Embedding):
            if not selection.embeddings and nn.Embedding.__name__ not in selection.types:
                out.add(id(module))
        elif isinstance(module, nn.MultiheadAttention) and not followed(module):
            # Its forward uses the projections' weights without calling the modules.
            out.update(id(child) for child in module.modules())
        elif supported(module):
            is_head = module is head or _key(module) in embedding_weights or _named_head(name)
            if is_head and not (selection.head and _trained(module, model)):
                out.add(id(module))
    return out


def _named_head(name: str) -> bool:
    return name.rpartition(".")[2] in _HEAD_NAMES


def _trained(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module's weight is trained, as far as the model says: of one that was frozen whole, all are."""
    weight = getattr(module, "weight", None)
    frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
    return not (frozen and any(p.requires_grad for p in model.parameters()))


def _adapters(model: nn.Module) -> tuple[set[int], set[int]]:
    """ids of the modules that peft trains, and of those that it leaves uncalled: idle adapters, replaced originals.

    Known by the attributes of peft's layers (`adapter_layer_names`, `modules_to_save`), never imported.
    """
    trained: set[int] = set()
    idle: set[int] = set()
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", None)
        if isinstance(names, tuple) and isinstance(getattr(module, "base_layer", None), nn.Module):
            parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.ModuleDict)]
        elif isinstance(getattr(module, "original_module", None), nn.Module):
            parts = [p for p in [getattr(module, "modules_to_save", None)] if isinstance(p, nn.ModuleDict)]
            off = bool(getattr(module, "disable_adapters", False))
            unused = parts if off else [module.original_module]
            idle.update(id(m) for part in unused for m in part.modules())  # type: ignore[union-attr]
        else:
            continue
        active = getattr(module, "active_adapters", ())
        for part in parts:
            for name, adapter in part.items():
                (trained if name in active else idle).update(id(m) for m in adapter.modules())
    return trained - idle, idle


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        head = getter()
    except (NotImplementedError, AttributeError):
        return None
    # transformers' classifiers answer None; an encoder may answer something that is no module.
    return head if isinstance(head, nn.Module) else None


def select_layers(model: nn.Module, selection: LayerSelection) -> list[TrackedLayer]:
    """The tracked layers of a model, in the order of its modules; tied weights make one layer.

    A weight is tracked if any of the modules that use it is selected, and then all its uses are summed, as the
    gradient of that weight is.

    Raises:
        ConfigError: a pattern or type that matches nothing; the message lists the candidates.
        CaptureError: a selected module with settings that cannot be honoured, or tied weights with unlike biases.
    """
    modules = named_maps(model, norms=selection.norms)
    candidates = {name: m for name, m in modules.items() if supported(m)}
    for pattern in selection.include:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ConfigError(f"layer pattern {pattern!r} matches none of the supported modules {_listed(candidates)}")
    bases = {name: {c.__name__ for c in type(m).__mro__} for name, m in candidates.items()}
    for wanted in selection.types:
        if not any(wanted in names for names in bases.values()):
            raise ConfigError(f"layer type {wanted!r} matches none of the supported modules {_listed(candidates)}")
    adapters, idle = _adapters(model)
    excluded = _default_exclusions(model, modules, selection, adapters, idle)
    if selection.adapters == "only" and not adapters:
        raise ConfigError(
            "LayerSelection(adapters='only'), but the model has no active adapters of peft: leave adapters out, or "
            "pass the peft model"
        )
    chosen: set[Hashable] = set()
    for name, module in candidates.items():
        named = any(fnmatchcase(name, p) for p in selection.include)
        wanted_type = not selection.types or bool(bases[name] & set(selection.types))
        by_default = not selection.include and id(module) not in excluded
        dropped = any(fnmatchcase(name, p) for p in selection.exclude)
        if selection.adapters in ("only", "exclude"):
            dropped |= (_owner(module) in adapters) == (selection.adapters == "exclude")
        if (named or by_default) and wanted_type and not dropped:
            chosen.add(_key(module))
    groups: dict[Hashable, list[Use]] = {}
    for name, module in candidates.items():
        if _key(module) in chosen:
            use = _describe(name, module, selection.bias)
            second = any(fnmatchcase(name, pattern) for pattern in selection.batch_second)
            groups.setdefault(_key(module), []).append(replace(use, second=second))
    head = _output_embeddings(model)
    layers = [_tie(uses, head) for uses in groups.values()]
    if not layers:
        raise ConfigError(f"the selection leaves no layer to track: supported modules are {_listed(candidates)}")
    return layers


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:12])
    return f"[{shown}{', ...' if len(names) > 12 else ''}] ({len(names)} in all)"


def _words(uses: list[Use], head: nn.Module | None) -> str | None:
    """The side of a layer that has a head's vocabulary; None where no head uses its weight."""
    for use in uses:
        if use.module is head or (_named_head(use.name) and not isinstance(use.module, nn.Embedding)):
            return "in" if use.transposed else "out"
    return None


def _tie(uses: list[Use], head: nn.Module | None) -> TrackedLayer:
    for use in uses:
        _refuse_unsupported_settings(use)
    first = uses[0]
    biases = {_bias_key(use.module) for use in uses if use.bias}
    if len(biases) > 1:
        raise CaptureError(
            f"modules {[u.name for u in uses]} share a weight but have different biases: exclude one of them, or track "
            "no biases with LayerSelection(bias=False)"
        )
    orientation = stored_inputs_first(first.module)
    uses = [replace(use, transposed=stored_inputs_first(use.module) != orientation) for use in uses]
    # A tied use the other way round brings its bias's column of ones on the output side.
    bias_in = any(use.bias and not use.transposed for use in uses)
    bias_out = any(use.bias and use.transposed for use in uses)
    if bias_in and bias_out:
        raise CaptureError(f"modules {[u.name for u in uses]} share a weight both ways and a bias: exclude one of them")
    return TrackedLayer(
        first.name,
        tuple(uses),
        first.inputs + int(bias_in),
        first.outputs + int(bias_out),
        bias_in or bias_out,
        _words(uses, head),
    )


def layer_specs(layers: list[TrackedLayer], config: BuildConfig) -> dict[str, LayerSpec]:
    """Projected widths and ranks of the tracked layers.

    Where the config leaves widths open, a head keeps its words: what examples say of rare words is a large part of what
    they do, and a projection mixes it with the others' (`docs/quality.md`). Its other side is then as narrow as
    `HEAD_NUMBERS` allow, but no narrower than 8; above, the words are projected, too.
    """
    specs = {}
    for layer in layers:
        first = layer.uses[0]
        d_in = config.projected_width(first.inputs, from_model=True)
        d_out = config.projected_width(first.outputs, from_model=True)
        if layer.words is not None and config.projection_dim == "auto":
            words, other = (first.inputs, d_out) if layer.words == "in" else (first.outputs, d_in)
            if words * min(_LEAST_HEAD, other) <= HEAD_NUMBERS:
                other = min(other, max(HEAD_NUMBERS // words, _LEAST_HEAD))
                d_in, d_out = (words, other) if layer.words == "in" else (other, words)
        # A side whose own width is kept keeps the bias's column too; a projected one takes it in.
        d_in = layer.width_in if d_in >= first.inputs else d_in
        d_out = layer.width_out if d_out >= first.outputs else d_out
        uses = tuple(use.name for use in layer.uses)
        rank = kept_rank(config.rank, d_in, d_out)
        specs[layer.name] = LayerSpec(layer.name, layer.width_in, layer.width_out, d_in, d_out, rank, layer.bias, uses)
    return specs


def kept_rank(rank: int | None, d_in: int, d_out: int) -> int:
    """c, or the full rank where that is less."""
    full = min(d_in, d_out)
    return full if rank is None else min(rank, full)


def positions(use: Use, x: torch.Tensor, count: int) -> torch.Tensor:
    """A module's input as (n, positions, inputs), or (n, positions, groups, inputs) for a grouped convolution.

    Embeddings give their indices, (n, positions) int64.

    Args:
        use: of the module.
        x: its input (k n, ...): of each example k rows, one after the other, as where a model takes positions or
            windows for examples.
        count: n.
    """
    module = use.module
    if isinstance(module, nn.Embedding):
        return x.reshape(count, -1)
    if isinstance(module, nn.Conv1d):
        return _by_example(_unfold(module, x.unsqueeze(2), one_dimensional=True), count)
    if isinstance(module, nn.Conv2d):
        return _by_example(_unfold(module, x, one_dimensional=False), count)
    return _by_example(_by_position(x), count)


def output_positions(use: Use, dy: torch.Tensor, count: int) -> torch.Tensor:
    """The gradient at a module's output as (n, positions, outputs), or (n, positions, groups, outputs per group)."""
    module = use.module
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        dy = dy.flatten(2).transpose(1, 2)
        if module.groups > 1:
            dy = dy.reshape(*dy.shape[:2], module.groups, -1)
        return _by_example(dy, count)
    return _by_example(_by_position(dy), count)


def _by_example(x: torch.Tensor, count: int) -> torch.Tensor:
    """(k n, positions, ...) as (n, k positions, ...)."""
    # A batch without examples, of a rank that has none, stays as it is.
    return x if len(x) == count else x.unflatten(0, (count, -1)).flatten(1, 2)


def _by_position(x: torch.Tensor) -> torch.Tensor:
    # A rank of a tensor parallel model may have no features at all.
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _unfold(module: nn.Conv1d | nn.Conv2d, x: torch.Tensor, *, one_dimensional: bool) -> torch.Tensor:
    """(n, C, h, w) -> (n, positions, C * kh * kw) in the weight's own order, or with a dimension of groups."""
    # The module's own reversed padding covers 'same', 'valid' and numbers alike, one pair per dimension, last first.
    pad = list(module._reversed_padding_repeated_twice)
    kernel, stride, dilation = tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation)
    if one_dimensional:
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    if any(pad):
        mode = module.padding_mode
        if one_dimensional and mode != "zeros":
            x = functional.pad(x.squeeze(2), pad, mode=mode).unsqueeze(2)
        else:
            x = functional.pad(x, pad, mode="constant" if mode == "zeros" else mode)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride).transpose(1, 2)
    if module.groups > 1:
        columns = columns.reshape(*columns.shape[:2], module.groups, -1)
    return columns

"""Sharded: models that are spread over processes or devices, seen as the one model that they are.

A wrapper (DistributedDataParallel, torch.compile) is taken off: names, forward and weights are those of the model
inside. Under FSDP2 (`fully_shard`) a module's weights are whole while it runs, so that hooks see what they always see;
but every pass is a collective, and all ranks make the same number of them (`lockstep`). Under tensor parallelism a
module sees some columns of its input or of its output's gradient. A projection is linear,
X P = sum_ranks X[:, own] P[own], so that each rank projects its own columns and the small results are added up: no side
is ever gathered that is projected.

Neither FSDP2 nor DTensor is imported until a model has brought it along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import CaptureError, DataError
from ..ranks import Ranks

T = TypeVar("T")

_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class DataRanks:
    """Which examples this process is given, where several work together.

    Attributes:
        index, count: part `index` of `count` of the data is this process's.
        first: whether it is the first of the processes that are given this part: the one that speaks for them.
    """

    index: int
    count: int
    first: bool


@dataclass(frozen=True)
class Columns:
    """This rank's columns of a tensor that is spread along its last dimension.

    Attributes:
        local: (..., columns).
        start: the first of them.
        width: of the whole.
        group: of the ranks that hold the others; None where this rank holds all.
    """

    local: torch.Tensor
    start: int
    width: int
    group: Any = None

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """The whole times a matrix (width, d): (..., d), the same on all ranks."""
        if self.group is None:
            return torch.matmul(self.local, matrix)
        return self._added(torch.matmul(self.local, matrix[self.start : self.start + self.local.shape[-1]]))

    def whole(self) -> torch.Tensor:
        """(..., width), the same on all ranks."""
        if self.group is None:
            return self.local
        out = self.local.new_zeros(*self.local.shape[:-1], self.width)
        out[..., self.start : self.start + self.local.shape[-1]] = self.local
        return self._added(out)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Columns:
        """The columns after a function that leaves the last dimension alone."""
        return Columns(function(self.local), self.start, self.width, self.group)

    def _added(self, part: torch.Tensor) -> torch.Tensor:
        part = part.contiguous()
        torch.distributed.all_reduce(part, group=self.group)
        return part


# -- wrappers ----------------------------------------------------------------------------------------------------------


def unwrapped(model: T) -> T:
    """The model inside of DistributedDataParallel, DataParallel and torch.compile; anything else as it is.

    Raises:
        DataError: the older FullyShardedDataParallel, whose weights have no shape.
    """
    inner: Any = model
    while True:
        if is_compiled(inner):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        else:
            break
    if isinstance(inner, nn.Module):
        for name, module in inner.named_modules():
            if type(module).__name__ == "FullyShardedDataParallel":
                raise DataError(
                    f"module {name or type(inner).__name__!r} is wrapped in FullyShardedDataParallel, which flattens "
                    "weights: shard the model with torch.distributed.fsdp.fully_shard instead"
                )
    return inner


def is_compiled(module: Any) -> bool:
    return isinstance(module, nn.Module) and "_orig_mod" in module._modules


def plain_name(name: str) -> str:
    """A module's or parameter's name without what torch.compile puts into it."""
    return name.replace(_COMPILED, "").removesuffix(_COMPILED[:-1]).rstrip(".")


def has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has compiled the model, or a module of it: hooks may not be called."""
    return any(is_compiled(m) or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Modules that torch.compile has compiled run as they are written, inside."""
    if has_compiled(model):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def half_of(model: nn.Module) -> bool:
    """Whether anything is computed in float16: by the weights' type, or by FSDP2's mixed precision."""
    policies = [module._get_fsdp_state()._mp_policy.param_dtype for module in fsdp_modules(model)]
    return torch.float16 in policies or any(p.dtype == torch.float16 for p in model.parameters())


def needs_lockstep(model: nn.Module) -> bool:
    """Whether each forward and backward pass of the model is a collective of all ranks that hold a part of it."""
    return bool(fsdp_modules(unwrapped(model)))


def settle(model: nn.Module) -> None:
    """Brings the parameters into the state in which their flags and bytes are looked at.

    FSDP2's become sharded, as they are between steps. Offloaded weights that were one, and of which accelerate has made
    several without data, become one again.
    """
    for module in fsdp_modules(model):
        module.reshard()
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        for target, source in (tied if isinstance(tied, dict) else {}).items():
            (owner, name), (other, first) = _place(module, target), _place(module, source)
            old, new = owner._parameters.get(name), other._parameters.get(first)
            if old is not None and new is not None and old.is_meta and new.is_meta:
                owner._parameters[name] = new


def recover(model: nn.Module) -> None:
    """Makes FSDP2 forget a pass that an exception ended, where torch can: else the next one would go on with it."""
    for module in fsdp_modules(model):
        reset = getattr(module, "reset_iter_state", None)
        if reset is not None and module._get_fsdp_state()._is_root:
            reset()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    try:
        return model.get_submodule(path), last
    except AttributeError:
        return model, name


def lockstep(model: nn.Module, batches: Iterator[T], spare: Callable[[], T]) -> Iterator[tuple[T, bool]]:
    """(batch, whether it is one) until no rank has any left: a rank that has none repeats its last, or takes `spare()`.

    The model is run once, in the same way, for each batch that is handed out; all ranks must walk to the end. Where the
    model needs no lockstep these are the batches alone.
    """
    if not needs_lockstep(model):
        for batch in batches:
            yield batch, True
        return
    last: list[T] = []
    while True:
        mine = list(islice(batches, 1))
        if not agreed(model, bool(mine)):
            return
        last = mine or last or [spare()]
        yield last[0], bool(mine)


def agreed(model: nn.Module, flag: bool) -> bool:
    """Whether the flag is set on any rank that shares an FSDP2 model's passes; of other models, the flag itself."""
    return bool(_greatest(model, int(flag)))


def evened(model: nn.Module, things: Sequence[T], nothing: T) -> list[T]:
    """Things that each take some passes, as many on all ranks that share an FSDP2 model's: `nothing` fills them up.

    Of other models, the things alone.
    """
    return [*things, *[nothing] * (_greatest(model, len(things)) - len(things))]


def _greatest(model: nn.Module, value: int) -> int:
    meshes = _fsdp_meshes(unwrapped(model))
    if not meshes:
        return value
    seen = torch.tensor(value, device=_mesh_device(meshes[0]))
    for mesh in meshes:
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return int(seen.item())


def _fsdp_meshes(model: nn.Module) -> list[Any]:
    meshes: list[Any] = []
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        # One group each in earlier versions of torch, several in later ones.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None and group.mesh_info.mesh not in meshes:
                meshes.append(group.mesh_info.mesh)
    return meshes


def _mesh_device(mesh: Any) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())


# -- which rank has which examples -------------------------------------------------------------------------------------


def data_ranks(model: nn.Module | None) -> DataRanks:
    """Which part of the data this process takes: a collective of the default group where there is one.

    Ranks that hold parts of the same layers (tensor parallelism) are given the same examples; all others are given
    examples of their own, whether they hold copies of the model (none, DDP) or shards of it (FSDP2, HSDP).

    Args:
        model: the model, or an ensemble, as it will be run; None: one that every process has for itself.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return DataRanks(0, 1, True)
    rank = torch.distributed.get_rank()
    leader = min(_replicas(unwrapped(model), rank) if model is not None else {rank})
    leaders = sorted(set(Ranks.of(True).gather_values(leader)))
    return DataRanks(leaders.index(leader), len(leaders), rank == leader)


def is_spread(model: nn.Module) -> bool:
    """Whether a pass through the model is one of several processes together."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    model = unwrapped(model)
    return started and (needs_lockstep(model) or len(_replicas(model, torch.distributed.get_rank())) > 1)


def _replicas(model: nn.Module, rank: int) -> set[int]:
    """The ranks that must be given the same examples as this one."""
    settle(model)
    data = {rank}
    for mesh in _fsdp_meshes(model):
        data |= set(mesh.mesh.flatten().tolist())
    same = {rank}
    for p in model.parameters():
        mesh = getattr(p, "device_mesh", None)
        here = None if mesh is None else mesh.get_coordinate()
        if mesh is None or here is None:
            continue
        # FSDP2's own dimensions are those along which the ranks of its mesh lie.
        index: list[Any] = [slice(None)] * mesh.ndim
        for dim in range(mesh.ndim):
            line = mesh.mesh[tuple(slice(None) if d == dim else c for d, c in enumerate(here))]
            if len(line) > 1 and set(line.tolist()) <= data:
                index[dim] = here[dim]
        same |= set(mesh.mesh[tuple(index)].flatten().tolist())
    return same


# -- tensors in parts --------------------------------------------------------------------------------------------------


def is_dtensor(tensor: object) -> bool:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all that other ranks hold of it; differentiable. A collective where it is in parts."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def fresh(output: torch.Tensor) -> torch.Tensor:
    """An output as the beginning of a graph: a clone, since a leaf that requires gradients could not be changed in
    place by the model."""
    output = output.detach()
    if is_dtensor(output) and any(p.is_partial() for p in output.placements):  # type: ignore[attr-defined]
        from torch.distributed.tensor import Replicate

        there = [Replicate() if p.is_partial() else p for p in output.placements]  # type: ignore[attr-defined]
        output = output.redistribute(placements=there)  # type: ignore[attr-defined]
    return output.requires_grad_().clone()


Share = tuple[Any, int, int]
"""(group, start, end) of this rank's columns of a side that is spread."""


@dataclass(frozen=True)
class Spread:
    """This rank's shares of a weight's sides under tensor parallelism; None where it has all of one."""

    inputs: Share | None = None
    outputs: Share | None = None


def spread_of(weight: Any, *, inputs_first: bool) -> Spread:
    """The shares of a weight (outputs, inputs), or (inputs, outputs), as it is while its module runs."""
    if not is_dtensor(weight) or weight.ndim != 2:
        return Spread()
    from torch.distributed.tensor import Shard

    sides: dict[int, Share] = {}
    mesh = weight.device_mesh
    for dim, placement in enumerate(weight.placements):
        # Of the strided kind the columns do not lie together.
        if type(placement) is Shard:
            sides[placement.dim % 2] = _share(mesh, dim, weight.shape[placement.dim])
    return Spread(sides.get(0 if inputs_first else 1), sides.get(1 if inputs_first else 0))


def _share(mesh: Any, dim: int, width: int) -> Share:
    """As torch.chunk cuts."""
    size = -(-width // mesh.size(dim))
    start = min(mesh.get_local_rank(dim) * size, width)
    return mesh.get_group(dim), start, min(start + size, width)


def columns_of(tensor: torch.Tensor, width: int, share: Share | None, what: str) -> Columns:
    """This rank's columns of a module's input or of its output's gradient.

    Args:
        tensor: (..., features), a DTensor in any placement, or a plain tensor: all features, or the weight's share.
        width: the number of features.
        share: this rank's share of that side of the weight.
        what: names it in errors.

    Raises:
        CaptureError: a plain tensor of another width than either.
    """
    if is_dtensor(tensor):
        return _columns_of_dtensor(tensor)
    have = tensor.shape[-1]
    if have == width:
        return Columns(tensor, 0, width)
    if share is None or have != share[2] - share[1]:
        part = "" if share is None else f", of which this rank holds {share[2] - share[1]}"
        raise CaptureError(f"{what} has {have} features where the weight has {width}{part}")
    return Columns(tensor, share[1], width, share[0])


def _columns_of_dtensor(tensor: Any) -> Columns:
    from torch.distributed.tensor import Replicate, Shard

    mesh, last = tensor.device_mesh, tensor.ndim - 1
    split = [d for d, p in enumerate(tensor.placements) if type(p) is Shard and p.dim % tensor.ndim == last]
    # Sequences, batches and sums in parts become whole; so do features along a second dimension of the mesh.
    kept = split[0] if len(split) == 1 else None
    there = [p if d == kept else Replicate() for d, p in enumerate(tensor.placements)]
    local = tensor.redistribute(placements=there).to_local()
    width = tensor.shape[-1]
    if kept is None:
        return Columns(local, 0, width)
    group, start, end = _share(mesh, kept, width)
    if local.shape[-1] != end - start:
        raise CaptureError(f"a tensor of {width} features is cut in an unknown way: {tensor.placements}")
    return Columns(local, start, width, group)


# -- devices -----------------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device:
    """The device that batches are put on, and gradients are gathered on: that of the first weights.

    Weights that accelerate brings in from elsewhere count as being where they are used, those that FSDP2 keeps on the
    CPU likewise.
    """
    for module in model.modules():
        for p in module._parameters.values():
            if p is None:
                continue
            if p.is_meta:
                where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                if where is not None:
                    return torch.device(where)
            elif is_dtensor(p):
                return _mesh_device(p.device_mesh)  # type: ignore[attr-defined]
            else:
                return p.device
    return torch.device("cpu")


def weights_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) of all parameters and buffers as the unsharded model has them, one at a time.

    A collective of the ranks that hold parts of the model.

    Raises:
        DataError: a weight without data that nothing brings in.
    """
    model = unwrapped(model)
    settle(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor = tensor.detach()
        if tensor.is_meta:
            tensor = torch.as_tensor(_brought_in(model, name)[name.rpartition(".")[2]])
        elif is_dtensor(tensor):
            device = _mesh_device(tensor.device_mesh)  # type: ignore[attr-defined]
            tensor = full(tensor if tensor.device == device else tensor.to(device))
        yield plain_name(name), tensor.cpu()


def check_weights(model: nn.Module) -> None:
    """All weights have data, or a hook of accelerate's that brings them in.

    Raises:
        DataError: naming one that has not.
    """
    for name, p in model.named_parameters():
        if p.is_meta:
            _brought_in(model, name)


def _brought_in(model: nn.Module, name: str) -> Mapping[str, Any]:
    """What accelerate's hook on a parameter's module has instead of it, by its names in the module."""
    hook = getattr(_place(model, name)[0], "_hf_hook", None)
    # Several hooks of one module are kept as one.
    for part in [hook, *getattr(hook, "hooks", ())]:
        weights = getattr(part, "weights_map", None)
        if isinstance(weights, Mapping):
            return weights
    raise DataError(
        f"parameter {name!r} is on the meta device, without data: load the model's weights, or place it with "
        "device_map=... so that accelerate brings them in"
    )

"""Ensemble: several checkpoints of a model in one index. To the stages behind, an ensemble is more layers.

One trained model is one draw: scores averaged over models trained with other seeds predict retraining better (TRAK,
Park et al., arXiv:2303.14186, section 3.2). All members see the same batch, and the loss is the sum of theirs, so that
the gradient in a member's layers is that member's own; layer "blocks.3.mlp" of member 1 is called "1.blocks.3.mlp", and
has its own projections, curvature and share of a row. A search divides the sum over layers by the number of members.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import LayerSelection
from ..errors import DataError, LorifError
from .layers import TrackedLayer, select_layers, supported
from .losses import PerExample
from .sharded import unwrapped


class Ensemble(nn.ModuleList):
    """Members that are asked about the same batches, on one device; their modules' names begin with their number.

    Args:
        members: the models, in an order that belongs to the index: it names the layers.

    Raises:
        DataError: no members, something that is no module, members on different devices, or members that share a
            linear map, whose calls could not be told apart.
    """

    def __init__(self, members: Iterable[Any]) -> None:
        members = [unwrapped(member) for member in members]
        if not members:
            raise DataError("model is an empty list: pass one trained model, or a list of at least one")
        for number, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise DataError(
                    f"model[{number}] must be a torch.nn.Module, got {type(member).__name__}: pass a list of models"
                )
        _check_devices(members)
        _check_apart(members)
        super().__init__(members)


def _check_devices(members: list[nn.Module]) -> None:
    places = [sorted(_places(member)) for member in members]
    for number, place in enumerate(places):
        if place != places[0]:
            raise DataError(
                f"model[0] is on {places[0]} and model[{number}] on {place}: move all members to one device with "
                "model.to(...)"
            )


def _places(member: nn.Module) -> set[str]:
    # Offloaded weights are where the others are while they are used.
    devices = {p.device for p in member.parameters()}
    return {str(d) for d in devices if d.type != "meta" or len(devices) == 1}


def _check_apart(members: list[nn.Module]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for number, member in enumerate(members):
        for name, module in member.named_modules():
            first = owner.setdefault(id(module), (number, name))
            if first[0] != number and supported(module):
                raise DataError(
                    f"model[{first[0]}] and model[{number}] share the module {name or type(module).__name__!r}: each "
                    "member needs modules of its own, pass copy.deepcopy(model)"
                )


def as_model(model: Any) -> Any:
    """A list or tuple of models as an `Ensemble`, a wrapped model without its wrapper; anything else as it is.

    Raises:
        DataError: as `Ensemble` does.
    """
    return Ensemble(model) if isinstance(model, (list, tuple)) else unwrapped(model)


def members_of(model: nn.Module) -> list[nn.Module]:
    """The members of an ensemble; of any other model, itself."""
    return list(model) if isinstance(model, Ensemble) else [model]


def count_of(model: nn.Module | None) -> int | None:
    """How many members an ensemble has; None for a model that is none, which is what its index remembers."""
    return len(model) if isinstance(model, Ensemble) else None


def tracked_layers(model: nn.Module, selection: LayerSelection) -> list[TrackedLayer]:
    """The tracked layers of a model, or of all members: the selection is of a member's own names.

    Raises:
        ConfigError, CaptureError: as `select_layers` does, naming the member.
    """
    if not isinstance(model, Ensemble):
        return select_layers(model, selection)
    layers: list[TrackedLayer] = []
    for number, member in enumerate(members_of(model)):
        try:
            found = select_layers(member, selection)
        except LorifError as error:
            raise type(error)(f"model[{number}]: {error}") from None
        layers += [_named(layer, number) for layer in found]
    return layers


def _named(layer: TrackedLayer, number: int) -> TrackedLayer:
    uses = tuple(replace(use, name=f"{number}.{use.name}") for use in layer.uses)
    return replace(layer, name=f"{number}.{layer.name}", uses=uses)


def summed(model: nn.Module, function: PerExample) -> PerExample:
    """The loss or measure of a model; of an ensemble, the sum of its members', (n,)."""
    if not isinstance(model, Ensemble):
        return function

    def total(ensemble: nn.Module, batch: Any) -> torch.Tensor:
        parts = [function(member, batch) for member in members_of(ensemble)]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            # Capture says what is wrong with it.
            return parts[0]
        return torch.stack(parts).sum(dim=0)

    return total

"""Damping policies: from a layer's spectrum to its lambda. A property of a search, never of a build.

All eigenvalues are in units of the normalised second moment C = (1/n) sum g g^T (squared gradient units).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from .errors import ConfigError


class Spectrum(Protocol):
    """What a policy may look at: one layer's fitted spectrum."""

    @property
    def trace(self) -> float: ...
    @property
    def dim(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def spectrum(self) -> torch.Tensor: ...


@runtime_checkable
class Damping(Protocol):
    """A rule giving lambda > 0 for a layer."""

    def value(self, layer: Spectrum) -> float: ...

    def to_json(self) -> dict[str, Any]: ...


# Rows of so many bytes have RowDamping.multiple as it is.
_ROW_BYTES = 4096


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}: pass for instance 0.1")


@dataclass(frozen=True)
class RelativeDamping:
    """lambda = multiple * trace(C) / D, a multiple of the layer's mean eigenvalue (LogIX, Bergson: 0.1)."""

    multiple: float = 0.1

    def __post_init__(self) -> None:
        _positive("RelativeDamping.multiple", self.multiple)

    def value(self, layer: Spectrum) -> float:
        return self.multiple * layer.trace / layer.dim

    def to_json(self) -> dict[str, Any]:
        return {"rule": "relative", "multiple": self.multiple}


@dataclass(frozen=True)
class RowDamping:
    """The default: lambda = multiple * sqrt(4096 / bytes of a row) * trace(C) / D.

    A small row holds little of the directions that a strong inverse asks for, so it wants more damping. Measured on
    rows of 256 to 32,768 bytes (docs/quality.md).
    """

    multiple: float = 0.03

    def __post_init__(self) -> None:
        _positive("RowDamping.multiple", self.multiple)

    def of(self, row_bytes: float) -> RelativeDamping:
        """The rule for rows of so many bytes."""
        return RelativeDamping(round(self.multiple * math.sqrt(_ROW_BYTES / row_bytes), 6))

    def value(self, layer: Spectrum) -> float:
        """While the size of rows is not known: as for rows of 4,096 bytes."""
        return self.of(_ROW_BYTES).value(layer)

    def to_json(self) -> dict[str, Any]:
        return {"rule": "rows", "multiple": self.multiple}


@dataclass(frozen=True)
class AbsoluteDamping:
    """lambda = value in every layer; for a model trained with l2 regularisation, its own lambda."""

    lam: float

    def __post_init__(self) -> None:
        _positive("AbsoluteDamping.lam", self.lam)

    def value(self, layer: Spectrum) -> float:
        return self.lam

    def to_json(self) -> dict[str, Any]:
        return {"rule": "absolute", "lam": self.lam}


@dataclass(frozen=True)
class PaperDamping:
    """lambda = multiple * mean of the leading r + p eigenvalues, p = 10 (LoRIF, arXiv:2601.21929).

    The paper writes 0.1 * mean(sigma^2[:r+p]) with sigma the singular values of the unnormalised gradient
    matrix; sigma^2 = n S, so in the normalised units used here the n cancels.
    """

    multiple: float = 0.1

    def __post_init__(self) -> None:
        _positive("PaperDamping.multiple", self.multiple)

    def value(self, layer: Spectrum) -> float:
        return self.multiple * float(layer.spectrum.double().mean())

    def to_json(self) -> dict[str, Any]:
        return {"rule": "paper", "multiple": self.multiple}


_RULES: dict[str, type[Any]] = {
    "rows": RowDamping,
    "relative": RelativeDamping,
    "absolute": AbsoluteDamping,
    "paper": PaperDamping,
}


def as_damping(value: Any) -> Damping:
    """A policy from a policy, from "auto", or from a number meaning that multiple of trace / D.

    Raises:
        ConfigError: for anything else, or a number that is not finite and above 0.
    """
    if isinstance(value, bool):
        raise ConfigError(f"damping must be a number or a damping policy, got {value!r}")
    if isinstance(value, (int, float)):
        return RelativeDamping(float(value))
    if value == "auto":
        return RowDamping()
    if isinstance(value, Damping) and not isinstance(value, type):
        return value
    raise ConfigError(
        f"damping must be 'auto', a number (a multiple of trace/D) or one of "
        f"{sorted(c.__name__ for c in _RULES.values())}, got {value!r}"
    )


def settled(damping: Damping, row_bytes: float) -> Damping:
    """A policy for rows of so many bytes: the rule of `RowDamping` for these, any other as it is."""
    return damping.of(row_bytes) if isinstance(damping, RowDamping) else damping


def damping_from_json(data: dict[str, Any]) -> Damping:
    """The inverse of `to_json`."""
    fields = dict(data)
    rule = fields.pop("rule", None)
    if rule not in _RULES:
        raise ConfigError(f"unknown damping rule {rule!r}: known are {sorted(_RULES)}")
    try:
        return _RULES[rule](**fields)
    except TypeError as error:
        raise ConfigError(f"damping rule {rule!r} got fields {sorted(fields)}: {error}") from None

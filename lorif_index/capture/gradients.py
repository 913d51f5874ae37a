"""Gradients: the values that flow from capture (or from the user) to factors and curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import DataError, NonFiniteError

SIDES = ("in", "out")


@dataclass(frozen=True)
class LayerSpec:
    """One tracked layer.

    Attributes:
        name: the module's name, or the key in the gradient blocks.
        width_in: inputs of the linear map, the bias's column of ones included.
        width_out: outputs.
        d_in, d_out: the projected widths; a gradient is (d_in, d_out), vectorised row by row, D = d_in * d_out.
        rank: factor pairs kept; min(d_in, d_out) means the gradient itself is kept.
        bias: whether the last input is the bias's column of ones.
        uses: names of the modules that use this weight (more than one where weights are tied).
    """

    name: str
    width_in: int
    width_out: int
    d_in: int
    d_out: int
    rank: int
    bias: bool = False
    uses: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """D = d_in * d_out."""
        return self.d_in * self.d_out

    def side(self, side: str) -> tuple[int, int]:
        """(its own width, its projected width) of a side, "in" or "out"."""
        return (self.width_in, self.d_in) if side == "in" else (self.width_out, self.d_out)

    def projected(self, side: str) -> bool:
        """Whether a side is projected, or keeps its own width."""
        width, dim = self.side(side)
        return dim < width

    @property
    def dense(self) -> bool:
        """Whether the rank is full, so that the gradient itself is stored."""
        return self.rank >= min(self.d_in, self.d_out)


def layers_named(names: Sequence[str]) -> str:
    """Some layers as the subject of a message: "layer 'a' has", "layers 'a', 'b' and 7 more have"."""
    if len(names) == 1:
        return f"layer {names[0]!r} has"
    shown = ", ".join(repr(name) for name in names[:4])
    return f"layers {shown}{f' and {len(names) - 4} more' if len(names) > 4 else ''} have"


class LayerGradient:
    """Gradients of n examples in one layer, (n, a, b), dense or as a pair with G = left right^T.

    Given in any floating point type and converted to float32 when looked at, so that what is passed over is not.

    Attributes:
        parts: the dense (n, a, b), or left (n, a, m) and right (n, b, m), as they were given.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def from_dense(cls, dense: torch.Tensor) -> LayerGradient:
        return cls((dense,))

    @classmethod
    def from_pair(cls, left: torch.Tensor, right: torch.Tensor) -> LayerGradient:
        return cls((left, right))

    @classmethod
    def of(cls, value: Any, what: str) -> LayerGradient:
        """From an (n, a, b) array, or a pair of arrays (n, a, m) and (n, b, m).

        Raises:
            DataError: another form or shape; `what` names the place.
        """
        if isinstance(value, LayerGradient):
            return value
        if isinstance(value, (tuple, list)) and len(value) == 2:
            left, right = (_tensor(v, what) for v in value)
            if left.ndim != 3 or right.ndim != 3 or left.shape[0] != right.shape[0] or left.shape[2] != right.shape[2]:
                raise DataError(
                    f"{what}: a factor pair must be (n, d_in, m) and (n, d_out, m), got {tuple(left.shape)} and "
                    f"{tuple(right.shape)}"
                )
            return cls.from_pair(left, right)
        dense = _tensor(value, what)
        if dense.ndim != 3:
            raise DataError(f"{what}: gradients must be (n, d_in, d_out), got shape {tuple(dense.shape)}")
        return cls.from_dense(dense)

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(left (n, a, m), right (n, b, m)) float32, or None where the gradient is dense."""
        return None if len(self.parts) == 1 else (self.parts[0].float(), self.parts[1].float())

    @property
    def count(self) -> int:
        return len(self.parts[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(a, b) of one example's gradient."""
        first, last = self.parts[0], self.parts[-1]
        return int(first.shape[1]), int(last.shape[2 if last is first else 1])

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def dense(self) -> torch.Tensor:
        """(n, a, b) float32."""
        pair = self.pair
        return self.parts[0].float() if pair is None else torch.bmm(pair[0], pair[1].mT)

    def flat(self) -> torch.Tensor:
        """(n, a * b) float32."""
        return self.dense().flatten(1)

    def select(self, rows: torch.Tensor | slice) -> LayerGradient:
        return LayerGradient([part[rows] for part in self.parts])

    def scaled(self, factor: float) -> LayerGradient:
        return LayerGradient([self.parts[0] * factor, *self.parts[1:]])

    def squared_norms(self) -> torch.Tensor:
        """(n,) float64."""
        pair = self.pair
        if pair is None or pair[0].shape[2] >= min(self.shape):
            return torch.linalg.vector_norm(self.flat(), dim=1, dtype=torch.float64).square()
        # |L R^T|^2 = <L^T L, R^T R>, without the product of many by many features.
        left, right = (torch.bmm(part.mT, part) for part in (pair[0].double(), pair[1].double()))
        return (left * right).sum(dim=(1, 2)).clamp(min=0.0)

    def total(self) -> torch.Tensor:
        """() float32: a sum that is inf or NaN if any entry is (and, of very large ones, by itself)."""
        return torch.stack([part.sum(dtype=torch.float32) for part in self.parts]).sum()

    def finite(self) -> torch.Tensor:
        """(n,) bool: no inf or NaN."""
        return torch.stack([torch.isfinite(part.flatten(1)).all(dim=1) for part in self.parts]).all(dim=0)


def _tensor(value: Any, what: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
    elif isinstance(value, np.ndarray):
        # A copy: torch cannot share read-only arrays, and never needs to write here.
        tensor = torch.from_numpy(np.array(value))
    else:
        raise DataError(f"{what}: expected an array or a pair of arrays, got {type(value).__name__}")
    if not tensor.is_floating_point():
        raise DataError(f"{what}: gradients must be floating point, got {tensor.dtype}")
    return tensor


@dataclass(frozen=True)
class GradientBlock:
    """Gradients of the same n examples in every layer.

    Attributes:
        ids: (n,) int64, the examples' positions in the data.
        layers: name -> LayerGradient of n examples.
        contents: (n, 16) uint8, hashes of the examples (see `contents`); None where only gradients are known.
    """

    ids: np.ndarray
    layers: dict[str, LayerGradient]
    contents: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.ids)

    def select(self, rows: np.ndarray) -> GradientBlock:
        """The block restricted to some of its rows (positions in the block)."""
        if len(rows) == self.count and bool((rows == np.arange(self.count)).all()):
            return self
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        # Sent to a GPU once, and not for each layer.
        there = {device: index.to(device) for device in {g.device for g in self.layers.values()}}
        contents = None if self.contents is None else self.contents[rows]
        return GradientBlock(self.ids[rows], {k: g.select(there[g.device]) for k, g in self.layers.items()}, contents)


def energies(block: GradientBlock) -> np.ndarray:
    """(n,) float32: squared norms of the examples' gradients, over all layers."""
    first, *others = block.layers.values()
    total = first.squared_norms()
    for gradient in others:
        # Where the first is, so that a GPU is waited for once, and not for each layer.
        total = total + gradient.squared_norms().to(total.device)
    return total.clamp(max=torch.finfo(torch.float32).max).float().cpu().numpy()


def keep_finite(block: GradientBlock, policy: str, skipped: list[int], what: str = "example") -> GradientBlock:
    """Applies the policy for examples with inf or NaN in any layer.

    Args:
        policy: "error" or "skip".
        skipped: ids left out are appended.
        what: the examples are, for the message.

    Raises:
        NonFiniteError: under "error", with the example's id and layer.
    """
    totals = [gradient.total() for gradient in block.layers.values()]
    if bool(torch.isfinite(torch.stack([total.to(totals[0].device) for total in totals])).all()):
        # The usual case, for which a GPU is waited for once, and not for each layer.
        return block
    fine = np.ones(block.count, dtype=bool)
    for name, gradient in block.layers.items():
        flags = gradient.finite().cpu().numpy()
        if policy == "error" and not flags.all():
            skip = ", or pass on_nonfinite='skip' to leave such examples out and have their ids recorded"
            raise NonFiniteError(
                f"the gradient of {what} {block.ids[~flags][0]} in layer {name!r} has inf or NaN: look at that "
                f"example, or compute in a wider dtype{skip if what == 'example' else ''}"
            )
        fine &= flags
    skipped.extend(block.ids[~fine].tolist())
    return block.select(np.flatnonzero(fine))


def finite_blocks(blocks: Iterable[GradientBlock], policy: str, skipped: list[int]) -> Iterator[GradientBlock]:
    """Blocks without the examples that have inf or NaN, or the error that names one (see `keep_finite`)."""
    for block in blocks:
        kept = keep_finite(block, policy, skipped)
        if kept.count:
            yield kept


class GradientSource(Protocol):
    """Something that can be walked more than once and gives projected gradients, the same blocks in each walk."""

    @property
    def count(self) -> int: ...

    @property
    def window(self) -> int | None:
        """Within so many examples, from a multiple of it on, `blocks` gives blocks in any order, each of examples of
        one window; None: all in the order of ids."""
        ...

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        """All examples with start <= id < stop."""
        ...

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        """The examples with these ids (sorted, unique), in any order."""
        ...


def parse_block(value: Any, first_id: int) -> GradientBlock:
    """A block handed over by the user, checked.

    Args:
        value: {layer: (n, a, b) array, or a pair (n, a, m), (n, b, m)}.
        first_id: id of its first example.

    Raises:
        DataError: not a dict, empty, of the wrong rank, or with layers that disagree on n.
    """
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"a gradient block must be a dict of layer -> array, got {type(value).__name__}")
    layers = {str(name): LayerGradient.of(array, f"layer {name!r}") for name, array in value.items()}
    counts = {name: g.count for name, g in layers.items()}
    n = next(iter(counts.values()))
    for name, other in counts.items():
        if other != n:
            first = next(iter(counts))
            raise DataError(f"layer {name!r} has {other} examples but layer {first!r} has {n}: pass the same examples")
    return GradientBlock(np.arange(first_id, first_id + n, dtype=np.int64), layers)

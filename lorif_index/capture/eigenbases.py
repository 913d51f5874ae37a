"""Eigenbases: projections learnt from the data, the leading eigenvectors of each side's second moment.

P_in holds those of sum x x^T over positions, P_out those of sum dy dy^T: the bases in which a Kronecker-factored
curvature is diagonal (K-FAC, Martens and Grosse, arXiv:1503.05671; EK-FAC, George et al., arXiv:1806.03884), cut to
width d. LoGRA (arXiv:2405.13954) starts its projections so. A one-hot side (an embedding's tokens) keeps its random
projection: its leading eigenvectors would be the most frequent tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..errors import CurvatureError
from ..linalg.projection import Projections
from ..linalg.subspace import GROUP_BYTES, SubspaceFit, fit_in_groups, together_bytes
from ..progress import Stage
from ..ranks import ALONE, Ranks
from .data import ExampleSource, first_batch
from .gradients import SIDES, GradientBlock, LayerGradient, LayerSpec, layers_named
from .hooks import Capture
from .layers import TrackedLayer, Use
from .losses import PerExample
from .sharded import lockstep

Side = tuple[str, str]
"""(layer, "in" or "out")."""

# Examples that the second moments are taken of: as many as give each side so many positions for each of its features,
# but at least and at most so many. Four times as many gain .003 of what is kept of other examples' squares (.894 of
# them with 17 positions a feature, .897 with 67; the demo's model, 192 wide, 64 directions), and nothing of LDS.
POSITIONS, LEAST, SAMPLE = 16, 128, 4096
# Examples whose positions are counted.
COUNTED = 32
# A second moment is held whole up to this width. Above, a block of so many times as many directions as are wanted takes
# less time to add to, in one walk, too: of sides 3,072 wide whose spectra fall as 1 / j^1.2 or faster, 4 times keep at
# least .994 of what the best 64 directions do, 2 times .983. Twice where all would not have room together.
_WHOLE_UP_TO = 1024
_TIMES = (4, 2)
_BATCH_ROWS = 4096
# The share of an example's largest output gradient from which on a position counts: 256 float32 epsilons. A gradient
# that cancels out, such as that of a first token's query, whose softmax is over one key, is zero on one machine and a
# few epsilons on another.
_COUNTS_FROM = 2.0**-15

Sink = Callable[[Side, torch.Tensor], None]
"""Takes rows (m, width) of one side."""
Walk = Callable[[Sink], None]
"""Hands all rows of all sides to a sink, the same ones each time."""


def fitted_sides(specs: dict[str, LayerSpec], layers: Iterable[TrackedLayer] = ()) -> list[Side]:
    """The sides that are projected and have no one-hot inputs."""
    one_hot = {
        (layer.name, "out" if use.transposed else "in")
        for layer in layers
        for use in layer.uses
        if isinstance(use.module, nn.Embedding)
    }
    found = [(spec.name, side) for side in SIDES for spec in specs.values() if spec.projected(side)]
    return [side for side in found if side not in one_hot]


def side_fits(
    specs: dict[str, LayerSpec], sides: Iterable[Side], seed: int, device: torch.device
) -> dict[Side, SubspaceFit]:
    """A fit for each side, not begun."""
    sides = list(sides)
    fits: dict[Side, SubspaceFit] = {}
    for times in _TIMES:
        for name, side in sides:
            width, dim = specs[name].side(side)
            key = ("projection", name, side)
            fits[name, side] = SubspaceFit(key, width, dim, dim, seed, device, whole_up_to=_WHOLE_UP_TO, times=times)
        if together_bytes(fits.values()) <= GROUP_BYTES:
            break
    return fits


def enough(walk: Walk, counted: int, specs: dict[str, LayerSpec], sides: list[Side], ranks: Ranks = ALONE) -> int:
    """How many examples the second moments are taken of; a walk over some of them, so many of all ranks, counts their
    positions."""
    seen = dict.fromkeys(sides, 0)

    def count(side: Side, rows: torch.Tensor) -> None:
        if side in seen:
            seen[side] += len(rows)

    with ranks.jointly():
        walk(count)
    every = ranks.sum(torch.tensor(list(seen.values()))).tolist()
    return needed(dict(zip(sides, every, strict=True)), counted, specs)


def needed(positions: Mapping[Side, int], counted: int, specs: dict[str, LayerSpec]) -> int:
    """How many examples the second moments are taken of, where so many have these positions."""
    most = LEAST
    for (name, side), count in positions.items():
        wanted = POSITIONS * specs[name].side(side)[0] * counted
        most = max(most, -(-wanted // count) if count else SAMPLE)
    return min(most, SAMPLE)


def fit_eigenbases(
    walk: Walk,
    specs: dict[str, LayerSpec],
    sides: list[Side],
    seed: int,
    device: torch.device,
    stage: Stage,
    ranks: Ranks = ALONE,
) -> dict[Side, torch.Tensor]:
    """(width, d) float32 orthonormal columns for each side, in falling order of eigenvalue; signs are fixed. Over
    several ranks, which each walk their own examples, they are rank 0's.

    One walk over the data, or one for each 4 GiB that the sides take together. Of sides up to 1,024 wide the second
    moment is held, and its eigenvectors are found in float64; of wider ones they are those of a Nyström approximation.

    Raises:
        CurvatureError: a side whose rows are all zero.
    """
    fits = side_fits(specs, sides, seed, device)

    def planned(passes: int) -> None:
        stage.total = (stage.total or 0) + passes

    def once(active: Mapping[Side, SubspaceFit]) -> None:
        def take(side: Side, rows: torch.Tensor) -> None:
            if side in active:
                for part in rows.to(device, torch.float32).split(_BATCH_ROWS):
                    active[side].add(part)

        walk(take)
        stage.advance(1)

    found: dict[Side, torch.Tensor] = {}
    idle: list[str] = []
    for (name, side), pairs in fit_in_groups(fits, 0, 1.0, once, planned, ranks):
        if not pairs.trace > 0:
            idle.append(name)
        found[name, side] = pairs.vectors
    if idle:
        idle = list(dict.fromkeys(idle))
        raise CurvatureError(
            f"{layers_named(idle)} zero gradients in all examples of the sample, so that no projection can be "
            "learnt: exclude with LayerSelection(exclude=[...]), or build with projection='random'",
            tuple(idle),
        )
    return found


class _Sides(Capture):
    """Hands inputs and output gradients at their own widths to a sink, instead of making gradients of them."""

    sink: Sink

    def _add(self, layer: str, use: Use, left: torch.Tensor, right: torch.Tensor) -> None:
        # By their places, which a GPU is waited for once, and not for each side.
        places = counted(left if use.transposed else right).flatten().nonzero()[:, 0]
        self.sink((layer, "in"), left.flatten(0, 1).index_select(0, places))
        self.sink((layer, "out"), right.flatten(0, 1).index_select(0, places))

    def _add_dense(self, layer: str, gradient: torch.Tensor) -> None:
        sides_of_gradients(layer, gradient, self.sink)

    def _result(self, layer: str) -> LayerGradient:
        return LayerGradient.from_dense(torch.zeros(self._n, 1, 1))


def counted(gradients: torch.Tensor) -> torch.Tensor:
    """Which positions' inputs count, by the gradients at their outputs: (n, t, d) -> (n, t) bool.

    Those whose gradient is more than rounding. Padding has inputs, too, but no gradient; and a gradient that cancels
    out is not always zero to the last bit. The measure is the largest of the same example in the same call of the
    module, so that neither other examples, nor padding, nor the loss's scale, nor the ranks that share a batch or a
    weight change what counts. It is the same share in all number types: what cancels out is summed in float32, or
    wider, in half precision, too. An example whose gradients have inf or NaN counts nothing.
    """
    sizes = gradients.abs().amax(dim=2)
    return sizes > _COUNTS_FROM * sizes.amax(dim=1, keepdim=True)


def sides_of_gradients(layer: str, gradient: torch.Tensor, sink: Sink) -> None:
    """Rows whose second moments are sum G G^T and sum G^T G, of gradients (n, d_in, d_out)."""
    sink((layer, "in"), gradient.transpose(1, 2).flatten(0, 1))
    sink((layer, "out"), gradient.flatten(0, 1))


def walk_model(
    model: nn.Module,
    layers: list[TrackedLayer],
    specs: dict[str, LayerSpec],
    loss: PerExample,
    autocast: str | None,
    examples: ExampleSource,
    ids: np.ndarray,
) -> Walk:
    """A walk over the inputs and output gradients of a model on some examples. That examples do not depend on each
    other is checked by whoever takes gradients: a check is a backward pass more."""
    sides = set(fitted_sides(specs, layers))
    # Sides that are not wanted are projected to one column, rather than made whole.
    wide = {
        name: replace(
            spec,
            d_in=spec.width_in if (name, "in") in sides else 1,
            d_out=spec.width_out if (name, "out") in sides else 1,
        )
        for name, spec in specs.items()
    }
    capture = _Sides(model, layers, wide, Projections(wide, 0), loss, autocast)
    capture.trust()

    def walk(sink: Sink) -> None:
        batches = lockstep(model, examples.draw(ids), lambda: first_batch(examples))
        for (part, batch), counts in batches:
            capture.sink = sink if counts else lambda side, rows: None
            capture.gradients(part, batch)

    return walk


def walk_gradients(blocks: Callable[[], Iterable[GradientBlock]], sides: list[Side]) -> Walk:
    """A walk over the sides of gradients that were handed over at their own widths."""
    names = {name for name, _ in sides}

    def walk(sink: Sink) -> None:
        for block in blocks():
            for name in names:
                sides_of_gradients(name, block.layers[name].dense(), sink)

    return walk

"""Sources: where projected gradients come from, a model or the user, in one form for curvature and for encoding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from ..config import BuildConfig, CurvatureRows
from ..errors import ConfigError, DataError
from ..linalg.projection import Projections
from .contents import contents_of
from .data import ExampleSource, as_source, digest_of, feed, first_batch
from .eigenbases import Walk, walk_model
from .ensemble import members_of, summed, tracked_layers
from .gradients import GradientBlock, GradientSource, LayerSpec, parse_block
from .heads import Declared, HeadOf
from .hooks import PROVEN_BY, Capture
from .layers import TrackedLayer, kept_rank, layer_specs
from .losses import PerExample, default_loss, is_cross_entropy, logits_of
from .probes import Probes
from .seeing import Seen
from .sharded import check_weights, is_spread, lockstep, settle, unwrapped, weights_of
from .spool import Spool

# Batches beside the first that tell one data set from another.
_SAMPLED_BATCHES = 5


class ModelGradients:
    """Gradients of a model over a source of examples.

    Where the model's passes are collectives, all ranks walk to the end of their examples together (see `lockstep`).
    """

    def __init__(self, capture: Capture, examples: ExampleSource) -> None:
        self._capture = capture
        self._examples = examples
        self._reached = False
        self.count, self.window = examples.count, examples.window

    def look(self) -> None:
        """Takes the gradients of as many batches as show whether they can be taken.

        Raises:
            CaptureError: they cannot.
        """
        for _ in zip(range(PROVEN_BY), self.blocks(), strict=False):
            if self._capture.proven:
                return

    def probed(self, probes: Probes) -> ProbedGradients:
        """The source of the same examples' curvature rows, by the same capture: what is not proven yet of one is of the
        other."""
        return ProbedGradients(self._capture, self._examples, probes)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        stop = self.count if stop is None else stop
        for ids, block in self._gradients(self._examples.walk(start, stop)):
            # A batch may hold examples before `start` and after `stop`: it is computed whole, so that its rows depend
            # neither on where an interrupted build went on nor on how many ranks share the data.
            yield block.select(np.flatnonzero((ids >= start) & (ids < stop)))

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        return (block for _, block in self._gradients(self._examples.draw(ids)))

    def _gradients(self, batches: Iterator[tuple[np.ndarray, Any]]) -> Iterator[tuple[np.ndarray, GradientBlock]]:
        for (ids, batch), counts in lockstep(self._capture.model, batches, lambda: first_batch(self._examples)):
            # The first batch must reach every tracked layer; later ones may leave out a conditional branch.
            block = self._capture.gradients(ids, batch, require_all=not self._reached)
            self._reached = True
            if counts:
                yield ids, replace(block, contents=contents_of(batch))


class ProbedGradients:
    """Curvature rows of a model over a source of examples: gradients of probes instead of the loss (see `probes`), or
    beside it."""

    def __init__(self, capture: Capture, examples: ExampleSource, probes: Probes) -> None:
        self._capture = capture
        self._examples = examples
        self.probes = probes
        self.count, self.window = examples.count, examples.window
        capture.look(first_batch(examples)[1], probes.prepare)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        return self.sample(np.arange(start, self.count if stop is None else stop, dtype=np.int64))

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        """The rows of the examples with these ids; blocks of the same examples follow each other."""
        for blocks in self._batches(ids, losses=False):
            yield from blocks

    def with_losses(self, ids: np.ndarray, *, require_all: bool = False) -> Iterator[list[GradientBlock]]:
        """Of each batch of the examples with these ids the gradients of the loss, and then the rows, all by one forward
        pass; where the head gives the losses. The first batch may be required to reach all layers."""
        return self._batches(ids, losses=True, require_all=require_all)

    def _batches(self, ids: np.ndarray, *, losses: bool, require_all: bool = False) -> Iterator[list[GradientBlock]]:
        batches = lockstep(self._capture.model, self._examples.draw(ids), lambda: first_batch(self._examples))
        for (part, batch), counts in batches:

            def functions(model: nn.Module, given: Any, part: np.ndarray = part) -> list[torch.Tensor]:
                return self.probes(model, given, part, losses=losses)

            blocks = self._capture.several(part, batch, functions, require_all=require_all)
            require_all = False
            if losses:
                blocks[0] = replace(blocks[0], contents=contents_of(batch))
            if counts:
                yield blocks


class GivenGradients:
    """Gradients handed over by the user, as an iterable of blocks that can be walked again.

    Attributes:
        digest: XXH3-128, in hex, of each block's first and last example: a cheap sign of content and order.
    """

    window = None

    def __init__(self, blocks: Iterable[Any], projections: Projections) -> None:
        self._blocks = blocks
        self._projections = projections
        self.count, digest = 0, xxhash.xxh3_128()
        for block in _parsed(blocks, projections.specs):
            self.count += block.count
            _feed_block(digest, block)
        self.digest = str(digest.hexdigest())

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[GradientBlock]:
        stop = self.count if stop is None else stop
        for block in _parsed(self._blocks, self._projections.specs):
            if block.ids[0] >= stop:
                return
            if block.ids[-1] >= start:
                wanted = np.flatnonzero((block.ids >= start) & (block.ids < stop))
                yield self._projections.project(block).select(wanted)

    def sample(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        return map(self._projections.project, self.given(ids))

    def given(self, ids: np.ndarray) -> Iterator[GradientBlock]:
        """The examples with these ids as they were handed over, not projected."""
        for block in _parsed(self._blocks, self._projections.specs):
            rows = np.flatnonzero(np.isin(block.ids, ids))
            if len(rows):
                yield block.select(rows)


def _parsed(blocks: Iterable[Any], specs: dict[str, LayerSpec] | None = None) -> Iterator[GradientBlock]:
    """Checked blocks with running ids; empty blocks are passed over."""
    at = 0
    for value in blocks:
        block = parse_block(value, at)
        if specs is not None:
            check_block(block, specs)
        if block.count:
            yield block
        at += block.count


def check_block(block: GradientBlock, specs: dict[str, LayerSpec], what: str = "a gradient block") -> None:
    """A block must hold exactly the layers, at their own widths or projected.

    Raises:
        DataError: naming the layers or both shapes.
    """
    missing, extra = sorted(specs.keys() - block.layers.keys()), sorted(block.layers.keys() - specs.keys())
    if missing or extra:
        raise DataError(f"{what} has other layers than the index: missing {missing}, unknown {extra}")
    for name, spec in specs.items():
        shape = block.layers[name].shape
        if shape not in ((spec.width_in, spec.width_out), (spec.d_in, spec.d_out)):
            raise DataError(
                f"{what} has gradients of shape {shape} in layer {name!r}, where the index has "
                f"({spec.width_in}, {spec.width_out}), projected ({spec.d_in}, {spec.d_out})"
            )


class ModelCapture:
    """What is needed to take gradients of a model: its tracked layers, their specs, and the shared projections.

    Args:
        model: on devices of one type, or sharded over processes (see `sharded`); or an `Ensemble`.
        config: layers, widths and seed.
        projections: an index's own; by default new ones, which are random.
    """

    def __init__(self, model: nn.Module, config: BuildConfig, projections: Projections | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise DataError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = unwrapped(model)
        settle(model)
        check_weights(model)
        check_device(model, config)
        self.model = model
        self.config = config
        self.layers: list[TrackedLayer] = tracked_layers(model, config.layers)
        self.specs = layer_specs(self.layers, config)
        self.projections = Projections(self.specs, config.seed) if projections is None else projections

    def capture(self, function: PerExample | None, layers: Collection[str] | None = None) -> Capture:
        """Takes gradients of a loss or measure, of all layers or of some."""
        return Capture(
            self.model,
            [layer for layer in self.layers if layers is None or layer.name in layers],
            self.specs,
            self.projections,
            self._function(function),
            self.config.compute.autocast,
        )

    def sides(self, function: PerExample | None, examples: ExampleSource, ids: np.ndarray) -> Walk:
        """A walk over the inputs and output gradients of the layers on some examples (see `eigenbases`)."""
        function = self._function(function)
        return walk_model(self.model, self.layers, self.specs, function, self.config.compute.autocast, examples, ids)

    def _function(self, function: PerExample | None) -> PerExample:
        return summed(self.model, default_loss if function is None else function)


def head_of(loss: PerExample | None, capture: ModelCapture, first: Callable[[], tuple[np.ndarray, Any]]) -> HeadOf:
    """How the outputs of a loss, and its Hessian there, are found: as it says, or as is seen in the first batch.

    Args:
        loss: as for `Index.build`.
        capture: of the model.
        first: gives (ids, batch) of some examples.

    Raises:
        UnseenLoss: it says nothing, and is not understood.
    """
    loss = default_loss if loss is None else loss
    logits = logits_of(loss)
    if logits is not None:
        return Declared(logits, is_cross_entropy(loss))
    seen = Seen(loss)

    def check(model: nn.Module, batch: Any) -> torch.Tensor:
        for member in members_of(model):
            seen.check(member, batch)
        return torch.zeros(0, len(ids))

    ids, batch = first()
    capture.capture(loss).trust().several(ids, batch, check)
    return seen


def asked_device(config: BuildConfig) -> torch.device | None:
    """The config's device, if it names one.

    Raises:
        ConfigError: torch does not know it. A config with such a name can be read all the same: an index is opened
        where what it was built on is not.
    """
    try:
        return None if config.compute.device is None else torch.device(config.compute.device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={config.compute.device!r} is no device ({error}): pass 'cpu', 'cuda', 'cuda:1' or None"
        ) from None


def check_device(model: nn.Module, config: BuildConfig) -> None:
    """The model must be on devices of the type that was asked for; weights without data are brought to them."""
    wanted, devices = asked_device(config), {p.device for p in model.parameters() if not p.is_meta}
    if wanted is not None and devices and {wanted.type} != {d.type for d in devices}:
        raise ConfigError(
            f"device={config.compute.device!r}, but the model's parameters are on {sorted(map(str, devices))}: move "
            f"the model with model.to({config.compute.device!r}), or leave device out"
        )


def given_specs(blocks: Iterable[Any], config: BuildConfig) -> dict[str, LayerSpec]:
    """Specs from the first block of a re-iterable stream of gradients.

    Raises:
        DataError: no block, or one of the wrong form.
    """
    first = next(iter(blocks), None)
    if first is None:
        raise DataError("gradients is empty: pass an iterable of {layer: (n, d_in, d_out)} blocks")
    specs = {}
    for name, gradient in parse_block(first, 0).layers.items():
        width_in, width_out = gradient.shape
        if not width_in or not width_out:
            raise DataError(f"layer {name!r} has gradients of shape {gradient.shape}: no side may be empty")
        d_in = config.projected_width(width_in, from_model=False)
        d_out = config.projected_width(width_out, from_model=False)
        rank = kept_rank(config.rank, d_in, d_out)
        specs[name] = LayerSpec(name, width_in, width_out, d_in, d_out, rank, uses=(name,))
    return specs


def rewound(stream: Iterable[Any], folder: Callable[[], Path], stack: ExitStack) -> Iterable[Any]:
    """Gradient blocks that can be walked again: the stream itself, or a one-shot one's copy in a folder, which is
    removed when the stack closes."""
    if not isinstance(stream, Iterator):
        return stream
    spool = Spool(folder(), _parsed(stream))
    stack.callback(spool.close)
    return spool


def curvature_source(
    rows: CurvatureRows,
    source: ModelCapture | None,
    loss: PerExample | None,
    projections: Projections,
    folder: Path,
    stack: ExitStack,
) -> GradientSource:
    """A source of rows from what was passed as `curvature=`: gradients, or data for the model and its loss; of a
    one-shot stream a copy in a folder, which is removed when the stack closes."""
    one_shot = isinstance(rows.rows, Iterator)
    stream = rewound(rows.rows, lambda: folder, stack)
    if one_shot or _looks_like_gradients(stream, projections.specs):
        return GivenGradients(stream, projections)
    if source is None:
        raise DataError("curvature= is data, but the index is built from gradients: pass gradient blocks there too")
    return ModelGradients(source.capture(loss), as_source(stream, source.config.batch_size))


def _looks_like_gradients(stream: Any, specs: dict[str, LayerSpec]) -> bool:
    if hasattr(stream, "keys") or isinstance(stream, torch.Tensor) or not isinstance(stream, Iterable):
        return False
    first = next(iter(stream), None)
    return isinstance(first, dict) and set(first) == set(specs)


def model_digest(model: nn.Module) -> str:
    """XXH3-128, in hex, over names, shapes, dtypes and bytes of all parameters and buffers, in order.

    However the model is wrapped, sharded or placed, it is that of the plain model; where it is sharded, this is a
    collective, which gathers one parameter at a time.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in weights_of(model):
        digest.update(f"{name}|".encode())
        feed(digest, tensor)
    return str(digest.hexdigest())


def weights_state(model: nn.Module) -> tuple[tuple[int, int], ...] | None:
    """Which tensors a model's parameters are, and how often each was written to: it differs where an optimiser has made
    a step, or weights were loaded, and costs nothing. None where it says nothing: of models that are sharded, or whose
    weights are brought in for a pass. What is written to `.data` is not counted by torch; buffers may be caches."""
    parameters = list(model.parameters())
    if is_spread(model) or any(p.is_meta or p.is_inference() for p in parameters):
        return None
    return tuple((id(p), p._version) for p in parameters)


def data_digest(examples: ExampleSource) -> str:
    """XXH3-128, in hex, of some batches: a cheap sign of the data's content and order.

    The first batch, and of data with random access five further ones, the last among them.
    """
    ids, batch = first_batch(examples)
    batches = [batch]
    if examples.random_access and examples.count > len(ids):
        for start in np.linspace(len(ids), examples.count - 1, _SAMPLED_BATCHES).astype(np.int64).tolist():
            batches.append(next(iter(examples.batches(start)))[1])
    return digest_of(*batches)


def _feed_block(digest: Any, block: GradientBlock) -> None:
    ends = block.select(np.unique([0, block.count - 1]))
    for name, gradient in ends.layers.items():
        digest.update(f"{name}|{block.count}".encode())
        for part in gradient.parts:
            feed(digest, part)

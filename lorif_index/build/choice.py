"""Choice: which codec rows are written by, and how wide projections are for it, where the config leaves that open."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from torch import nn

from ..capture.data import ExampleSource
from ..capture.ensemble import Ensemble
from ..capture.gradients import GradientBlock, LayerSpec
from ..capture.layers import TrackedLayer, layer_specs
from ..capture.losses import PerExample
from ..capture.sources import ModelCapture, ModelGradients
from ..codecs.registry import LOSSLESS, PREFERRED, codec_class
from ..codecs.truncation import factorise
from ..config import LEAST_FLOOR, BuildConfig
from ..errors import CaptureError, ConfigError

T = TypeVar("T")

# Widths of eigencodes' projections, and most numbers of a gradient beside a head's.
_FLOORS = (16, 24, 32, 48, 64)
_NUMBERS = 1 << 19
# A sample whose gradients take more temporary disk, once more for probes, is smaller, but not below so many examples.
_LEAST_SAMPLE = 2048
# A model whose directions of the least width so many bytes hold all stays there, however many or few are asked for
# (docs/quality.md: two checkpoints of digits in 340 bytes have .583 at d = 32, and .344 when they were wider).
_SMALL = 1600
# Examples of the sample that tell what factors lose.
MEASURED = 256
# Of so many examples, which codec is likely is seen before the projections' width is known.
_LOOKED_AT = 8
# Share of squared norm below which factors are as good as whole: what rounding to 4 bits costs coordinates.
_LOSSLESS_SHARE = 0.01


def leaving_out(config: BuildConfig, model: Any, body: Callable[[BuildConfig], T]) -> tuple[BuildConfig, T]:
    """What body(config) gives, which takes a first batch's gradients of the model, and the config that it was given at
    last: where layers are chosen by default, those whose gradients cannot be taken are left out, with a warning; those
    that have examples along their second dimension are taken so.

    Raises:
        CaptureError: of layers that were asked for, or of all.
    """
    chosen, troubles = config.layers, list[CaptureError]()
    while True:
        try:
            found = body(config)
        except CaptureError as error:
            turned = _adding(config, "batch_second", model, error.second)
            if turned != config:
                config = turned
                continue
            if not error.layers or not chosen.by_default:
                raise
            # Without its traceback, which holds the failed pass.
            troubles.append(CaptureError(str(error), error.layers))
            fewer = excluding(config, model, error.layers)
            if fewer == config:
                raise
            config = fewer
        except ConfigError:
            # None is left.
            if troubles:
                raise troubles[0] from None
            raise
        else:
            for trouble in troubles:
                warnings.warn(f"left out: {trouble}", stacklevel=5)
            return config, found


def excluding(config: BuildConfig, model: Any, modules: Iterable[str]) -> BuildConfig:
    """The config without some modules."""
    return _adding(config, "exclude", model, modules)


def _adding(config: BuildConfig, field: str, model: Any, modules: Iterable[str]) -> BuildConfig:
    """The config with modules added to a field of its layers; of an ensemble those of all members."""
    names = [name.partition(".")[2] if isinstance(model, Ensemble) else name for name in modules]
    patterns = tuple(dict.fromkeys((*getattr(config.layers, field), *names)))
    return dataclasses.replace(config, layers=dataclasses.replace(config.layers, **{field: patterns}))


def with_floor(config: BuildConfig, model: nn.Module, loss: PerExample | None, examples: ExampleSource) -> BuildConfig:
    """The config with a number for projection_floor: wider for codecs that gain by there being more directions to
    choose from. A few examples decide which codec is likely.

    Where a usual row has room for all directions of the least width, it stays: a wider D would make the same multiple
    of trace / D a smaller lambda (`bench.lds`: Fashion-MNIST falls from .283 to .248)."""
    if config.projection_floor != "auto":
        return config
    least = dataclasses.replace(config, projection_floor=LEAST_FLOOR)
    if config.projection != "eigen" or config.curvature_rank != "auto":
        return least
    if config.store != "auto" and not codec_class(config.store).gains_by_width:
        return least
    taken = ModelCapture(model, least)
    # That examples do not depend on each other is checked by the pass that follows: a check is a backward pass more.
    # Of all the data, which may be in order of length; the first ones where others are had by walking there.
    most = examples.count - 1 if examples.random_access else _LOOKED_AT - 1
    few = np.unique(np.linspace(0, min(most, examples.count - 1), _LOOKED_AT).astype(np.int64))
    blocks = ModelGradients(taken.capture(loss).trust(), examples).sample(few)
    some = itertools.islice(blocks, len(few) if examples.random_access else 1)
    if not codec_class(chosen_codec(least, taken.specs, some)).gains_by_width:
        return least
    if config.projection_dim != "auto" or sum(spec.dim for spec in taken.specs.values()) <= 8 * _SMALL:
        return least
    return widest(config, taken.layers)


def widest(config: BuildConfig, layers: list[TrackedLayer]) -> BuildConfig:
    """The config with the largest number for projection_floor whose gradients are not too large; at least the smallest.
    Its sample shrinks where temporary disk would not hold its gradients."""
    words = {layer.name for layer in layers if layer.words is not None}
    found, each = config, 0
    for floor in _FLOORS:
        wider = dataclasses.replace(config, projection_floor=floor)
        specs = layer_specs(layers, wider)
        if each and sum(spec.dim for spec in specs.values() if spec.name not in words) > _NUMBERS:
            break
        found, each = wider, sum(spec.dim for spec in specs.values())
    most = max(config.compute.spool_bytes // (8 * each), _LEAST_SAMPLE)
    if config.sample.size <= most:
        return found
    return dataclasses.replace(found, sample=dataclasses.replace(config.sample, size=most))


def is_open(config: BuildConfig, specs: dict[str, LayerSpec]) -> bool:
    """Whether the codec depends on the gradients."""
    return config.store == "auto" and config.sample.rows != "stored" and not all(spec.dense for spec in specs.values())


def chosen_codec(config: BuildConfig, specs: dict[str, LayerSpec], blocks: Iterable[GradientBlock]) -> str:
    """The codec's name: as the config says, or factors where they lose next to nothing of some gradients: there
    rounding would only make scores worse. The blocks are only walked where that depends on them."""
    if not is_open(config, specs):
        return LOSSLESS if config.store == "auto" else config.store
    lost = total = 0.0
    seen = 0
    for block in blocks:
        part = block.select(np.arange(min(block.count, MEASURED - seen)))
        seen += part.count
        for name, factors in factorise(part, specs).items():
            whole = part.layers[name].dense()
            lost += float((whole - factors.dense()).double().square().sum())
            total += float(whole.double().square().sum())
        if seen >= MEASURED:
            break
    return LOSSLESS if lost <= _LOSSLESS_SHARE * total else PREFERRED

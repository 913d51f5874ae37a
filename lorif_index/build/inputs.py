"""Inputs: what a build was given, checked before anything is written, as one source of gradients."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture import eigenbases
from ..capture.data import ExampleSource, as_source, first_batch
from ..capture.ensemble import count_of
from ..capture.gradients import GradientSource, LayerSpec
from ..capture.heads import HeadOf
from ..capture.losses import PerExample, loss_name
from ..capture.seeing import UnseenLoss
from ..capture.sources import (
    GivenGradients,
    ModelCapture,
    ModelGradients,
    asked_device,
    data_digest,
    given_specs,
    head_of,
    model_digest,
    rewound,
)
from ..config import BuildConfig, CurvatureRows
from ..errors import ConfigError, DataError
from ..linalg.projection import ALGORITHM, Projections
from ..search.coarse import load_faiss
from ..storage.manifest import FORMAT_VERSION, read_manifest
from ..storage.payloads import Payloads, Values
from .choice import excluding, leaving_out, with_floor

# Settings that leave every stored number as it is; all others must agree when an interrupted build goes on. autocast
# is in the fingerprint by itself.
_FREE_SETTINGS = ("coarse", "compute")


@dataclass(frozen=True)
class Given:
    """What the user gave, as `Index.build` has it."""

    model: nn.Module | None
    data: Any
    gradients: Any
    loss: PerExample | None
    curvature: Any
    config: BuildConfig
    metadata: dict[str, Any]
    payloads: Values | None
    fit: Path | None

    def check(self) -> None:
        """Either data with its model, or gradients; metadata that JSON can keep.

        Raises:
            DataError, ConfigError: anything else.
        """
        check_arguments(self.model, self.data, self.gradients, self.loss)
        try:
            if (
                not isinstance(self.metadata, dict)
                or json.loads(json.dumps(self.metadata, allow_nan=False)) != self.metadata
            ):
                raise TypeError("it does not come back from JSON as it was")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"metadata must be a dict of plain JSON values: {error}") from None


def check_arguments(model: Any, data: Any, gradients: Any, loss: Any) -> None:
    """Either data with its model, or gradients.

    Raises:
        DataError, ConfigError: anything else.
    """
    if (data is None) == (gradients is None):
        given = "both" if data is not None else "neither"
        raise DataError(f"pass either model= and data=, or gradients=; {given} of data and gradients was given")
    if data is not None and model is None:
        raise DataError("data= needs a model= to take gradients of")
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss must be callable, loss(model, batch) -> (n,), got {type(loss).__name__}")


@dataclass(frozen=True)
class Inputs:
    """What a build works on.

    Attributes:
        config: the choices, with a number for `projection_floor`.
        asked: the choices as they were given, which the index remembers.
        loss: or None for the default.
        specs: the layers.
        projections: of their sides.
        source: of the examples' gradients.
        walk_sides: walks over the sides' inputs or output gradients of some examples, for learnt projections.
        capture, examples: of the model and the data; None where gradients were given.
        curvature: the user's own rows, or None.
        head: how probes find the outputs, and the loss's Hessian there; None where the curvature is something else.
        payloads: of the examples, or None.
        fingerprint: of everything a score depends on.
        fit: the index whose fit is taken, or None.
    """

    config: BuildConfig
    asked: BuildConfig
    loss: PerExample | None
    specs: dict[str, LayerSpec]
    projections: Projections
    source: GradientSource
    walk_sides: Callable[[np.ndarray, list[eigenbases.Side]], eigenbases.Walk]
    capture: ModelCapture | None
    examples: ExampleSource | None
    curvature: CurvatureRows | None
    head: HeadOf | None
    payloads: Payloads | None
    fingerprint: dict[str, Any]
    fit: Path | None

    @property
    def curvature_last(self) -> bool:
        """Whether the curvature is fitted on all stored rows, after they were written (the published order)."""
        return self.config.sample.rows == "stored" and self.curvature is None

    @property
    def curvature_kind(self) -> str:
        """What the curvature's rows are (see `curvature_kind`)."""
        return curvature_kind(self.config, self.curvature, self.head)

    @property
    def device(self) -> torch.device:
        """Where fits and encoding are computed."""
        if self.capture is not None:
            return self.capture.capture(self.loss).device
        return asked_device(self.config) or torch.device("cpu")


def curvature_kind(config: BuildConfig, given: CurvatureRows | None, head: HeadOf | None) -> str:
    """What a curvature's rows are: "given", "mixed", "ggn", "stored" (all rows) or "sample" (of gradients)."""
    if given is not None:
        return "given"
    if head is None:
        return config.sample.rows
    return "mixed" if config.curvature == "auto" else config.curvature


def take(given: Given, claim: Callable[[], Path], stack: ExitStack) -> Inputs:
    """Makes a source of gradients of what was given. The first batch is taken, so that what cannot be honoured is
    refused before a folder is made.

    Args:
        given: by the user.
        claim: makes the index's folder an unfinished build's, for a stream that must be kept there, and gives it.
        stack: closes what is opened.

    Raises:
        ConfigError, DataError, CaptureError: what was given cannot be honoured.
    """
    config, loss, curvature = given.config, given.loss, given.curvature
    asked_device(config)
    if config.coarse.kind == "flat":
        load_faiss()
    if isinstance(curvature, str):
        config, curvature = dataclasses.replace(config, curvature=curvature), None
    rows = curvature if isinstance(curvature, CurvatureRows) or curvature is None else CurvatureRows(curvature)
    asked = config
    fitted = None if given.fit is None else read_manifest(given.fit)
    wants_head = _wants_head(config, rows, from_model=given.gradients is None)
    capture = examples = head = None
    source: GradientSource
    if given.gradients is None:
        if given.model is None:
            raise DataError("data= needs a model= to take gradients of")
        examples = as_source(given.data, config.batch_size)
        if fitted is not None and config.projection_floor == "auto":
            config = dataclasses.replace(config, projection_floor=fitted.floor())
        plain, (config, taken, source) = leaving_out(
            config, given.model, partial(_looked_at, model=given.model, loss=loss, examples=examples)
        )
        asked, capture = dataclasses.replace(asked, layers=plain.layers), taken
        specs, projections = capture.specs, capture.projections

        def walk(ids: np.ndarray, sides: list[eigenbases.Side]) -> eigenbases.Walk:
            return taken.sides(loss, examples, ids)

        if wants_head and fitted is None:
            head = _head_for_ggn(config, loss, taken, examples)
        fingerprint = {
            "model": model_digest(given.model),
            "loss": loss_name(loss),
            "autocast": config.compute.autocast,
            "data": data_digest(examples),
        }
        if count_of(given.model) is not None:
            fingerprint["members"] = count_of(given.model)
    else:
        gradients = rewound(given.gradients, claim, stack)
        specs = given_specs(gradients, config)
        projections = Projections(specs, config.seed)
        handed = source = GivenGradients(gradients, projections)

        def walk(ids: np.ndarray, sides: list[eigenbases.Side]) -> eigenbases.Walk:
            return eigenbases.walk_gradients(lambda: handed.given(ids), sides)

        fingerprint = {"model": None, "loss": None, "data": handed.digest}
    payloads = None if given.payloads is None else Payloads(given.payloads, source.count)
    fingerprint |= {
        "format_version": FORMAT_VERSION,
        "examples": source.count,
        "projection": ALGORITHM,
        "layers": [dataclasses.asdict(spec) for spec in specs.values()],
        "config": {k: v for k, v in config.to_json().items() if k not in _FREE_SETTINGS},
        "curvature": curvature_kind(config, rows, head) if fitted is None else fitted.fingerprint.get("curvature"),
        "payloads": None if payloads is None else payloads.digest,
        "fit": None if fitted is None else fitted.files()["curvature"].digest,
    }
    kind = head.kind if head is not None else fitted.fingerprint.get("head") if fitted is not None else None
    if kind is not None:
        fingerprint["head"] = kind
    return Inputs(
        config,
        asked,
        loss,
        specs,
        projections,
        source,
        walk,
        capture,
        examples,
        rows,
        head,
        payloads,
        fingerprint,
        given.fit,
    )


def without(given: Given, inputs: Inputs, idle: Collection[str]) -> Inputs:
    """The same inputs without some layers."""
    uses = [use for name in idle for use in (inputs.specs[name].uses or (name,))]
    asked = dataclasses.replace(given.config, layers=inputs.asked.layers)
    fewer = dataclasses.replace(given, config=excluding(asked, given.model, uses))
    with ExitStack() as stack:
        # Nothing is opened for a model's data.
        return take(fewer, lambda: Path(), stack)


def _looked_at(
    config: BuildConfig, *, model: nn.Module, loss: PerExample | None, examples: ExampleSource
) -> tuple[BuildConfig, ModelCapture, ModelGradients]:
    """The config with a number for projection_floor, and gradients that can be taken."""
    config = with_floor(config, model, loss, examples)
    capture = ModelCapture(model, config)
    source = ModelGradients(capture.capture(loss), examples)
    source.look()
    return config, capture, source


def _wants_head(config: BuildConfig, rows: CurvatureRows | None, *, from_model: bool) -> bool:
    """Whether the curvature is to be of probes, if it can be.

    Raises:
        ConfigError: the GGN was asked for by name, and there is no model.
    """
    wanted = config.curvature
    if rows is not None or config.sample.rows == "stored" or wanted == "empirical":
        return False
    if not from_model and wanted != "auto":
        raise ConfigError(
            f"curvature={wanted!r} needs the model's outputs, and the index is built from gradients: pass the "
            "curvature's rows as curvature=CurvatureRows(...)"
        )
    return from_model


def _head_for_ggn(
    config: BuildConfig, loss: PerExample | None, capture: ModelCapture, examples: ExampleSource
) -> HeadOf | None:
    """How probes find the outputs; None, with a warning, where the loss is not understood.

    Raises:
        ConfigError: the GGN was asked for by name, and cannot be had.
    """
    try:
        return head_of(loss, capture, lambda: first_batch(examples))
    except UnseenLoss as error:
        if config.curvature != "auto":
            raise ConfigError(f"curvature={config.curvature!r}: {error}") from None
        warnings.warn(f"{error}. The curvature is the empirical one instead", stacklevel=6)
        return None


def chosen_config(config: BuildConfig | None, fit: Path | None = None, curvature: Any = None) -> BuildConfig:
    """The config of a build: the one given, that of the index whose fit is taken, or the default.

    Args:
        config: as it was given.
        fit: the folder of an index whose fit is taken, or None.
        curvature: as it was given.

    Raises:
        ConfigError: it is no config, or curvature was given beside a fit. NotAnIndexError: there is no index in `fit`.
    """
    if fit is not None:
        if curvature is not None:
            raise ConfigError("fit= takes another index's curvature, so that curvature= has no use: pass one of them")
        if config is None:
            other = read_manifest(fit)
            config = BuildConfig.from_json(other.config | {"projection_floor": other.floor()})
    config = BuildConfig() if config is None else config
    if not isinstance(config, BuildConfig):
        raise ConfigError(f"config must be a BuildConfig, got {type(config).__name__}")
    return config

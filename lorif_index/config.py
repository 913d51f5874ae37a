"""What a build can choose: small frozen objects that check themselves; unknown keys fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .damping import Damping, PaperDamping, RelativeDamping, as_damping, damping_from_json
from .errors import ConfigError

DTYPES = ("float16", "bfloat16", "float32")
PROJECTIONS = ("eigen", "random")
CURVATURES = ("auto", "mixed", "ggn", "empirical")
REPRESENTATIONS = ("eigen", "both", "factors", "coordinates", "coarse")
STORES = ("auto", *REPRESENTATIONS)
ADAPTERS = ("auto", "only", "include", "exclude")
BITS = (1, 2, 4, 8)
"""Widths of codes' coordinates."""
EIGEN_CODES = ("levels", "largest")
# What projection_floor="auto" is where nothing asks for more.
LEAST_FLOOR = 32


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Which linear maps are tracked. Default: every supported one but embeddings and a language model's head; in a
    model with adapters of peft, the adapters alone.

    Attributes:
        include: glob patterns (`fnmatch`) on module names; a module named by one is taken, embeddings and head too.
        exclude: glob patterns of modules left out, whatever else says.
        types: module classes, or their names, to which the selection is restricted.
        embeddings: also track `nn.Embedding`.
        head: also track a causal language model's output head.
        bias: track the bias as one more input, of ones.
        adapters: of a peft model: "only" the linear maps that it trains (LoRA's A and B of active adapters, and whole
            modules of `modules_to_save`), "include" them beside the base model's, or "exclude" them; "auto": "only"
            where there are some, and what `include` names.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = False
    bias: bool = True
    adapters: str = "auto"

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            given = getattr(self, name)
            if isinstance(given, (str, type)):
                given = (given,)
            names: tuple[Any, ...] = tuple(t.__name__ if isinstance(t, type) else t for t in given)
            if not all(isinstance(t, str) and t for t in names):
                raise ConfigError(f"LayerSelection.{name} takes names or glob patterns, got {given!r}")
            object.__setattr__(self, name, names)
        if self.adapters not in ADAPTERS:
            raise ConfigError(f"LayerSelection.adapters must be one of {ADAPTERS}, got {self.adapters!r}")

    @classmethod
    def of(cls, value: Any) -> LayerSelection:
        """A selection from a selection, None, a glob pattern, a module class, or several of them."""
        if value is None:
            return cls()
        if isinstance(value, LayerSelection):
            return value
        parts = [value] if isinstance(value, (str, type)) else value
        if not isinstance(parts, Iterable):
            raise ConfigError(f"layers takes glob patterns, module classes or a LayerSelection, got {value!r}")
        parts = list(parts)
        if not parts:
            raise ConfigError("layers is empty: name at least one layer, or leave it out to track all")
        return cls(
            include=tuple(p for p in parts if isinstance(p, str)),
            types=tuple(p.__name__ if isinstance(p, type) else p for p in parts if not isinstance(p, str)),
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CurvatureRows:
    """A stream of rows for the curvature, and how many of them stand for one example.

    C = (1 / (rows / rows_per_example)) * sum over rows of vec(g) vec(g)^T. The GGN of an example with classes c is
    the sum over c of p_c grad(-log p_c) grad(-log p_c)^T: feed sqrt(p_c) grad(-log p_c), one row per class, with
    rows_per_example = the number of classes. Random probes average: leave it at 1.

    Attributes:
        rows: the stream, of the same forms as `data` or `gradients`.
        rows_per_example: how many rows add up to one example's curvature.
    """

    rows: Any
    rows_per_example: int = 1

    def __post_init__(self) -> None:
        if not _is_int(self.rows_per_example) or self.rows_per_example < 1:
            raise ConfigError(f"rows_per_example must be an integer of at least 1, got {self.rows_per_example!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Every choice of a build. `BuildConfig()` is the recommended default, `BuildConfig.paper()` the published recipe.

    Attributes:
        projection_dim: width d that each side of a layer's gradient is projected to, never above the layer's own
            width: an int; a fraction of the width (0 < f < 1), such as 1/16; None for no projection; "auto" is 1/16
            for a model's gradients and no projection for gradients handed over by the user.
        projection_floor: the least width that a fraction may give (small models lose too much below it). "auto": 32;
            where rows are eigencodes of a model's gradients in learnt projections, and 1,600 bytes have no room for all
            directions of that, the widest of 48, 64, 96 and 128, or for larger rows 192 and 256, with which the
            sample's gradients take no more than 4 GiB; `index.specs` has the widths that it gave.
        projection: "eigen": each side's leading eigenvectors, learnt from a sample; "random": random signs, which need
            no pass over data.
        rank: c, the number of factor pairs kept per example and layer; None keeps the full rank.
        curvature: what the curvature is the second moment of. "ggn": rows that estimate the Gauss-Newton matrix, for a
            loss that says where its logits are; "empirical": the gradients themselves; "mixed": a quarter of the trace
            of "ggn" replaced by as much of the empirical; "auto": "mixed" where it can be.
        probes: random rows an example of the Gauss-Newton matrix; None: 1 for sequences; for single predictions exact
            rows where classes and examples are few, else 1 to 4, the fewer the larger the sample (see `probes`).
        curvature_rank: r, the number of curvature directions kept per layer; None keeps all; "auto": 512, or more where
            layers are so few that rows of eigencodes have room for more (see `eigencodes.directions_for`).
        curvature_rows: "sample" fits the curvature on unfactored gradients of a random sample; "factors" on all stored
            factors, after they were written (the published order).
        curvature_sample: size of that sample, in examples.
        power_iterations: subspace iterations of the randomised SVD that fits the curvature.
        damping: the default damping of searches; a number is a multiple of trace / D.
        complement: the weight of directions outside the subspace. "log-mean": what a tail of falling eigenvalues gives
            a gradient on average (`query.log_mean`); "tail-corrected": 1 / (lambda + mean tail eigenvalue);
            "truncated": 1 / lambda.
        store: what is kept per example. "eigen": the unfactored gradient's coordinates in the layers' curvature
            eigenbases, in few bits (see `eigencodes`). "auto": that, or factors alone where they lose less than 1% of
            the gradients' squared norm (one position per example, the full rank) or the curvature is of them.
            "factors": the published design. "both": factors, and coordinates of the unfactored gradient, which the
            scores' leading subspace is taken from; factors alone as with "auto". "coordinates": the smallest that can
            be rescored. "coarse": the coarse code alone.
        eigen_bytes: most bytes of a row with store="eigen"; the models of an ensemble share it.
        eigen_code: "levels": 1 to 8 bits for each direction that is kept. "largest": of each group of 8 to 128
            directions the place and the sign of the largest coordinate, where that keeps more of what directions add:
            better for the same bytes in models with far more directions than bits (see `rows.largest`).
        sketch_dim: k, the number of coordinates, for all layers together.
        sketch: "pca" over all layers; "per-layer", each layer's own eigenvectors; "auto": "pca" up to 262,144
            half-whitened coordinates (layers x r).
        coordinate_bits: of each stored coordinate: 1, 2, 4 or 8.
        coarse: a `faiss.index_factory` string for the coarse index; "auto": 4-bit product quantisation with fast scan
            in at most 128 bytes, from 1,024 examples on and where faiss is installed; None: none, every search scans.
        calibration_queries: training examples whose exact answers calibrate the number of candidates; 0: none.
        dtype: of the stored factors: "float16", "bfloat16" or "float32".
        seed: of projections, samples and starting blocks.
        layers: a LayerSelection, or glob patterns or module classes (see `LayerSelection.of`).
        batch_size: examples per forward and backward pass, where the data does not come in batches already.
        device: where the model is expected to be, or where gradients handed over are worked on; None: where they are.
        autocast: None, "bfloat16" or "float16": mixed precision of the forward pass and the loss.
        on_nonfinite: "error" stops at an example whose gradient has inf or NaN; "skip" records and leaves it out.
        shard_bytes: size of a shard's rows, in bytes; also the memory that collecting them takes.
        spool_bytes: most bytes of disk that temporary curvature rows may take; above it they are recomputed per pass.
    """

    projection_dim: int | float | Fraction | str | None = "auto"
    projection_floor: int | str = "auto"
    projection: str = "eigen"
    rank: int | None = 1
    curvature: str = "auto"
    probes: int | None = None
    curvature_rank: int | str | None = "auto"
    curvature_rows: str = "sample"
    curvature_sample: int = 10_000
    power_iterations: int = 2
    damping: Damping | float = field(default_factory=RelativeDamping)
    complement: str = "log-mean"
    store: str = "auto"
    eigen_bytes: int = 1600
    eigen_code: str = "levels"
    sketch_dim: int = 512
    sketch: str = "auto"
    coordinate_bits: int = 4
    coarse: str | None = "auto"
    calibration_queries: int = 128
    dtype: str = "float16"
    seed: int = 0
    layers: LayerSelection | Any = None
    batch_size: int = 32
    device: str | None = None
    autocast: str | None = None
    on_nonfinite: str = "error"
    shard_bytes: int = 64 << 20
    spool_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        for name, least in (
            ("projection_floor", 1),
            ("curvature_sample", 1),
            ("power_iterations", 0),
            ("seed", 0),
            ("batch_size", 1),
            ("shard_bytes", 1),
            ("spool_bytes", 0),
            ("sketch_dim", 1),
            ("eigen_bytes", 1),
            ("calibration_queries", 0),
        ):
            value = getattr(self, name)
            if name == "projection_floor" and value == "auto":
                continue
            if not _is_int(value) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("rank", "curvature_rank"):
            value = getattr(self, name)
            if name == "curvature_rank" and value == "auto":
                continue
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, or None for the full rank, got {value!r}")
        for name, allowed in (
            ("projection", PROJECTIONS),
            ("curvature", CURVATURES),
            ("curvature_rows", ("sample", "factors")),
            ("complement", ("log-mean", "tail-corrected", "truncated")),
            ("store", STORES),
            ("sketch", ("auto", "pca", "per-layer")),
            ("coordinate_bits", BITS),
            ("eigen_code", EIGEN_CODES),
            ("dtype", DTYPES),
            ("autocast", (None, "bfloat16", "float16")),
            ("on_nonfinite", ("error", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.coarse is not None and (not isinstance(self.coarse, str) or not self.coarse):
            raise ConfigError(f"coarse must be a faiss.index_factory string, 'auto' or None, got {self.coarse!r}")
        if self.store == "coarse" and self.coarse is None:
            raise ConfigError("store='coarse' keeps the coarse code alone, but coarse=None leaves it out")
        if self.probes is not None and (not _is_int(self.probes) or self.probes < 1):
            raise ConfigError(f"probes must be an integer of at least 1, or None for the default, got {self.probes!r}")
        if self.curvature_rows == "factors" and self.curvature in ("mixed", "ggn"):
            raise ConfigError(
                f"curvature={self.curvature!r} needs rows of its own, and curvature_rows='factors' takes the stored "
                "gradients: pass curvature_rows='sample', or curvature='empirical'"
            )
        if self.curvature_rows == "factors" and self.store not in ("auto", "factors"):
            raise ConfigError(
                f"curvature_rows='factors' fits the curvature after everything was stored, and store={self.store!r} "
                "keeps what needs it before: pass store='factors', or curvature_rows='sample'"
            )
        if self.device is not None and not isinstance(self.device, str):
            object.__setattr__(self, "device", str(self.device))
        object.__setattr__(self, "damping", as_damping(self.damping))
        object.__setattr__(self, "layers", LayerSelection.of(self.layers))
        self._check_projection()

    def _check_projection(self) -> None:
        dim = self.projection_dim
        if dim is None or dim == "auto" or (isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1):
            return
        if isinstance(dim, (float, Fraction)) and 0 < dim < 1:
            return
        raise ConfigError(
            "projection_dim must be an int of at least 1, a fraction between 0 and 1 such as 1/16, None or 'auto', "
            f"got {dim!r}"
        )

    @classmethod
    def paper(cls, **changes: Any) -> BuildConfig:
        """The published recipe (arXiv:2601.21929): f=16, c=1, r=2048, curvature of all factors, its damping."""
        recipe: dict[str, Any] = {
            "projection_dim": 1 / 16,
            "projection_floor": 1,
            "projection": "random",
            "curvature": "empirical",
            "rank": 1,
            "curvature_rank": 2048,
            "curvature_rows": "factors",
            "power_iterations": 3,
            "damping": PaperDamping(),
            "complement": "truncated",
            "store": "factors",
        }
        return cls(**(recipe | changes))

    def projected_width(self, width: int, *, from_model: bool) -> int:
        """d for one side of a layer of that width (in features, without the bias's column)."""
        dim = self.projection_dim
        if dim == "auto":
            dim = 1 / 16 if from_model else None
        if dim is None:
            return width
        if isinstance(dim, int):
            return min(dim, width)
        floor = LEAST_FLOOR if self.projection_floor == "auto" else int(self.projection_floor)
        return min(max(round(width * float(dim)), floor, 1), width)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_json` makes an equal config."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("damping", "layers"):
                value = value.to_json()
            elif isinstance(value, Fraction):
                value = {"fraction": [value.numerator, value.denominator]}
            out[f.name] = value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: an unknown key, or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"unknown BuildConfig keys {unknown}: known are {sorted(known)}")
        fields = dict(data)
        if isinstance(fields.get("damping"), dict):
            fields["damping"] = damping_from_json(fields["damping"])
        if isinstance(fields.get("layers"), dict):
            try:
                fields["layers"] = LayerSelection(**fields["layers"])
            except TypeError as error:
                raise ConfigError(f"layers: {error}") from None
        dim = fields.get("projection_dim")
        if isinstance(dim, dict):
            fields["projection_dim"] = Fraction(*dim["fraction"])
        return cls(**fields)

"""What a build can choose: small frozen objects that check themselves; unknown keys fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .codecs.registry import CODECS, codec_class
from .damping import Damping, PaperDamping, as_damping, damping_from_json
from .errors import ConfigError

DTYPES = ("float16", "bfloat16", "float32")
PROJECTIONS = ("eigen", "random")
CURVATURES = ("auto", "mixed", "ggn", "empirical")
COMPLEMENTS = ("diagonal", "truncated")
COARSE_KINDS = ("auto", "pq", "flat", "none")
ADAPTERS = ("auto", "only", "include", "exclude")
# What projection_floor="auto" is where nothing asks for more.
LEAST_FLOOR = 32


@dataclass(frozen=True, kw_only=True)
class LayerSelection:
    """Which linear maps are tracked. Default: every supported one but embeddings, unless a language model's head shares
    their weight; in a model with adapters of peft, the adapters alone.

    Attributes:
        include: glob patterns (`fnmatch`) on module names; a module named by one is taken, embeddings and head too.
        exclude: glob patterns of modules left out, whatever else says.
        types: module classes, or their names, to which the selection is restricted.
        embeddings: also track `nn.Embedding`.
        head: also track a language model's output head, if it is trained.
        bias: track the bias as one more input, of ones.
        norms: also track the scale and bias of layer norms.
        adapters: of a peft model: "only" the linear maps that it trains (LoRA's A and B of active adapters, and whole
            modules of `modules_to_save`), "include" them beside the base model's, or "exclude" them; "auto": "only"
            where there are some, and what `include` names.
        batch_second: glob patterns of linear maps whose inputs have the examples along their second dimension, as in
            `nn.Transformer` without `batch_first`; a build adds those that it finds.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = True
    bias: bool = True
    norms: bool = False
    adapters: str = "auto"
    batch_second: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types", "batch_second"):
            given = getattr(self, name)
            if isinstance(given, (str, type)):
                given = (given,)
            names: tuple[Any, ...] = tuple(t.__name__ if isinstance(t, type) else t for t in given)
            if not all(isinstance(t, str) and t for t in names):
                raise ConfigError(f"LayerSelection.{name} takes names or glob patterns, got {given!r}")
            object.__setattr__(self, name, names)
        if self.adapters not in ADAPTERS:
            raise ConfigError(f"LayerSelection.adapters must be one of {ADAPTERS}, got {self.adapters!r}")

    @property
    def by_default(self) -> bool:
        """Whether nobody has named what is tracked."""
        return not (self.include or self.types)

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


def stores() -> tuple[str, ...]:
    """What `BuildConfig.store` may be: the row codecs that are registered."""
    return ("auto", *CODECS)


def _check_integers(of: Any, **least: int) -> None:
    """Refuses fields that are no integers, or below their least."""
    for name, bound in least.items():
        value = getattr(of, name)
        if not _is_int(value) or value < bound:
            raise ConfigError(f"{name} must be an integer of at least {bound}, got {value!r}")


def _check_among(of: Any, **allowed: tuple[Any, ...]) -> None:
    """Refuses fields that are none of the values known."""
    for name, values in allowed.items():
        if getattr(of, name) not in values:
            raise ConfigError(f"{name} must be one of {values}, got {getattr(of, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is fitted on.

    Attributes:
        size: of the random sample, in examples; fewer, but at least 2,048, where `Compute.spool_bytes` would not hold
            their gradients and probes and widths are chosen by the build.
        rows: "sample" fits the curvature on unfactored gradients of the sample; "stored" on all stored rows, after they
            were written (the published order).
        probes: random rows an example of the Gauss-Newton matrix; None: 1 for sequences; for single predictions exact
            rows where classes and examples are few, else 1 to 4, the fewer the larger the sample (see `probes`).
    """

    size: int = 10_000
    rows: str = "sample"
    probes: int | None = None

    def __post_init__(self) -> None:
        _check_integers(self, size=1)
        _check_among(self, rows=("sample", "stored"))
        if self.probes is not None and (not _is_int(self.probes) or self.probes < 1):
            raise ConfigError(f"probes must be an integer of at least 1, or None for the default, got {self.probes!r}")


@dataclass(frozen=True, kw_only=True)
class CoarseIndex:
    """What proposes candidates.

    Attributes:
        kind: "pq": 4-bit product quantisation with fast scan, in at most 128 bytes a row; "auto": that, or shortened
            rows where rows name their largest coordinates, where there are more than 10,000 examples (fewer are
            scanned) and faiss is installed; "flat": the coordinates themselves; "none": all searches scan.
        dim: k, the number of coordinates, for all layers together.
        sketch: "pca" over all layers; "per-layer", each layer's own eigenvectors; "auto": "pca" up to 262,144
            half-whitened coordinates (layers x r).
        queries: training examples whose exact answers calibrate the number of candidates; 0: none.
    """

    kind: str = "auto"
    dim: int = 512
    sketch: str = "auto"
    queries: int = 128

    def __post_init__(self) -> None:
        _check_integers(self, dim=1, queries=0)
        _check_among(self, kind=COARSE_KINDS, sketch=("auto", "pca", "per-layer"))

    @property
    def by_name(self) -> bool:
        """Whether rows that name their largest coordinates are proposed by the largest of these."""
        return self.kind == self.sketch == "auto"


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and in which pieces the work is done; no stored number hangs on these, but on `autocast`.

    Attributes:
        device: where the model is expected to be, or where gradients handed over are worked on; None: where they are.
        autocast: None, "bfloat16" or "float16": mixed precision of the forward pass and the loss.
        shard_bytes: size of a shard's rows, in bytes; also the memory that collecting them takes.
        spool_bytes: most bytes of disk that the sample's gradients, or its curvature rows, may take meanwhile; above it
            they are computed anew in each pass. Where both fit, one forward pass gives them.
    """

    device: str | None = None
    autocast: str | None = None
    shard_bytes: int = 64 << 20
    spool_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        _check_integers(self, shard_bytes=1, spool_bytes=0)
        _check_among(self, autocast=(None, "bfloat16", "float16"))
        if self.device is not None and not isinstance(self.device, str):
            object.__setattr__(self, "device", str(self.device))


PARTS: dict[str, tuple[type[Any], str]] = {
    "sample": (Sample, "size"),
    "coarse": (CoarseIndex, "kind"),
    "compute": (Compute, "device"),
}
"""Fields of `BuildConfig` that are objects: their class, and the attribute that a bare value stands for."""


def _part(name: str, given: Any) -> Any:
    """The object of a field: itself, a bare value, None, or a dict of its attributes.

    Raises:
        ConfigError: it is none of those, or has an unknown key.
    """
    kind, short = PARTS[name]
    if isinstance(given, kind):
        return given
    if isinstance(given, dict):
        known = [f.name for f in dataclasses.fields(kind)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"unknown keys {unknown} of {name}: known are {known}")
        return kind(**given)
    if name == "coarse" and given is None:
        given = "none"
    return kind(**{short: given})


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Every choice of a build. `BuildConfig()` is the recommended default, `BuildConfig.paper()` the published recipe.

    Attributes:
        projection_dim: width d that each side of a layer's gradient is projected to, never above the layer's own
            width: an int; a fraction of the width (0 < f < 1), such as 1/16; None for no projection; "auto" is
            `projection_floor` for a model's gradients, while a head's side of words keeps its own width (see
            `capture.layers.layer_specs`), and no projection for gradients handed over by the user.
        projection_floor: the least width that a fraction may give (small models lose too much below it), and the width
            that "auto" gives. "auto": 32; where rows are eigencodes of a model's gradients in learnt projections, and
            1,600 bytes have no room for all directions of that, the widest from 16 to 64 with which a gradient has no
            more than half a million numbers beside the head's; `index.specs` has what it gave.
        projection: "eigen": each side's leading eigenvectors, learnt from a sample; "random": random signs, which need
            no pass over data.
        rank: c, the number of factor pairs kept per example and layer; None keeps the full rank.
        curvature: what the curvature is the second moment of. "ggn": rows that estimate the Gauss-Newton matrix, for a
            loss that says where its logits are; "empirical": the gradients themselves; "mixed": a quarter of the trace
            of "ggn" replaced by as much of the empirical; "auto": "mixed" where it can be.
        curvature_rank: r, directions of each layer's low-rank curvature; None keeps all, and then
            H is C + lambda; "auto": as many as a few million numbers hold (see `curvature.fit`).
        power_iterations: subspace iterations of the randomised SVD that fits the curvature.
        damping: the default damping of searches; a number is a multiple of trace / D. "auto": .03 of it for rows of
            4,096 bytes, more for smaller ones and less for larger (see `RowDamping`).
        complement: what H is beside its low-rank part. "diagonal": a share of the curvature's diagonal in the basis of
            the sides' eigenvectors, and lambda (see `curvature.fit`); "truncated": lambda, as published.
        store: the row codec, what is kept of an example. "eigen": coordinates of the unfactored gradient in the basis
            of its layers' sides, in few bytes (see `codecs.eigencodes`). "factors": the published design. "auto":
            "eigen", or "factors" where they lose less than 1% of the gradients' squared norm (one position per example,
            the full rank) or the curvature is of them.
        eigen_bytes: most bytes of a row with "eigen"; the models of an ensemble share it. "auto": the least of 512,
            1,024, 2,048 and 4,096 whose scores agree with those of whole gradients by a mean rank correlation of .9,
            as measured on the sample; the largest where none does (see `codecs.agreement`).
        dtype: of the stored factors: "float16", "bfloat16" or "float32".
        seed: of projections, samples and starting blocks.
        layers: a LayerSelection, or glob patterns or module classes (see `LayerSelection.of`).
        batch_size: examples per forward and backward pass, where the data does not come in batches already. "auto": up
            to 32; of sequences as many as have 2,048 tokens, but two at least (see `capture.data.batch_examples`).
        on_nonfinite: "error" stops at an example whose gradient has inf or NaN; "skip" records and leaves it out.
        sample: what is fitted on, a `Sample`; a bare number is its size.
        coarse: what proposes candidates, a `CoarseIndex`; a bare word is its kind, None is "none".
        compute: devices, precision and memory, a `Compute`.
    """

    projection_dim: int | float | Fraction | str | None = "auto"
    projection_floor: int | str = "auto"
    projection: str = "eigen"
    rank: int | None = 1
    curvature: str = "auto"
    curvature_rank: int | str | None = "auto"
    power_iterations: int = 1
    damping: Damping | float | str = "auto"
    complement: str = "diagonal"
    store: str = "auto"
    eigen_bytes: int | str = "auto"
    dtype: str = "float16"
    seed: int = 0
    layers: LayerSelection | Any = None
    batch_size: int | str = "auto"
    on_nonfinite: str = "error"
    sample: Sample | Any = field(default_factory=Sample)
    coarse: CoarseIndex | Any = field(default_factory=CoarseIndex)
    compute: Compute | Any = field(default_factory=Compute)

    def __post_init__(self) -> None:
        _check_integers(self, power_iterations=0, seed=0)
        size = self.batch_size
        if size != "auto" and (isinstance(size, str) or not _is_int(size) or size < 1):
            raise ConfigError(f"batch_size must be an integer of at least 1, or 'auto', got {self.batch_size!r}")
        if self.eigen_bytes != "auto":
            # A row names at least one coordinate, in three bytes beside its scale: known before anything is fitted.
            _check_integers(self, eigen_bytes=5)
        if self.projection_floor != "auto":
            _check_integers(self, projection_floor=1)
        for name in ("rank", "curvature_rank"):
            value = getattr(self, name)
            if name == "curvature_rank" and value == "auto":
                continue
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, or None for the full rank, got {value!r}")
        _check_among(
            self,
            projection=PROJECTIONS,
            curvature=CURVATURES,
            complement=COMPLEMENTS,
            store=stores(),
            dtype=DTYPES,
            on_nonfinite=("error", "skip"),
        )
        for name in PARTS:
            object.__setattr__(self, name, _part(name, getattr(self, name)))
        if self.sample.rows == "stored" and self.curvature in ("mixed", "ggn"):
            raise ConfigError(
                f"curvature={self.curvature!r} needs rows of its own, and Sample(rows='stored') takes the stored "
                "gradients: pass Sample(rows='sample'), or curvature='empirical'"
            )
        if self.sample.rows == "stored" and self.store != "auto" and "curvature" in codec_class(self.store).depends_on:
            raise ConfigError(
                f"Sample(rows='stored') fits the curvature after everything was stored, and store={self.store!r} needs "
                "it before: pass store='factors', or Sample(rows='sample')"
            )
        object.__setattr__(self, "damping", as_damping(self.damping))
        object.__setattr__(self, "layers", LayerSelection.of(self.layers))
        self._check_projection()

    @property
    def policy(self) -> Damping:
        """`damping`, as a policy, while rows are not known."""
        return as_damping(self.damping)

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
            "sample": Sample(rows="stored"),
            "power_iterations": 3,
            "damping": PaperDamping(),
            "complement": "truncated",
            "store": "factors",
            "layers": LayerSelection(head=False),
        }
        return cls(**(recipe | changes))

    def projected_width(self, width: int, *, from_model: bool) -> int:
        """d for one side of a layer of that width (in features, without the bias's column)."""
        dim = self.projection_dim
        if dim is None or (dim == "auto" and not from_model):
            return width
        if isinstance(dim, int):
            return min(dim, width)
        floor = LEAST_FLOOR if self.projection_floor == "auto" else int(self.projection_floor)
        if dim == "auto":
            return min(floor, width)
        return min(max(round(width * float(dim)), floor, 1), width)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_json` makes an equal config."""
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("damping", "layers"):
                value = value.to_json()
            elif f.name in PARTS:
                value = dataclasses.asdict(value)
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

"""Base: what a row codec is. It turns an example's gradients into a row of bytes, and scores such rows.

To the store a row is bytes; what they mean is known to the codec alone. Whoever adds one writes one class and a line in
the registry. What is not abstract here works for any codec, by what its rows stand for (`decode`); a codec whose rows
can be scored more quickly as they are says how.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch

from ..capture.gradients import GradientBlock, LayerGradient, LayerSpec
from ..curvature.fit import LayerCurvature, RowPass
from ..curvature.inverse import Preconditioner
from ..curvature.sketch import Named, Sketch, SketchEncoder, Whitened, half_whitened
from ..errors import CorruptionError
from ..linalg.scratch import CPU
from ..progress import Stage
from ..ranks import ALONE, Ranks

if TYPE_CHECKING:
    from ..config import BuildConfig

# Rows decoded at once where a codec has nothing quicker: float32 bytes of their gradients.
_BLOCK_BYTES = 16 << 20
# Rows whose sketch is taken together.
SKETCHED_ROWS = 512

Parts = dict[str, torch.Tensor]
"""A question as a codec's scorer takes it: named float32 tensors (q, ...), linear in the question's gradients."""


@dataclass(frozen=True)
class Fitting:
    """What a codec may be fitted by.

    Attributes:
        specs: the layers.
        config: the build's choices.
        curvature: layer -> fitted curvature; empty where the codec does not depend on it.
        preconditioners: layer -> H^-1 under the config's damping; empty likewise.
        sample: gives this rank's blocks of the sample's gradients, the same at each walk, and how many rows all ranks
            have. Nothing is computed before it is called.
        stage: told of the rows walked.
        device: where products are computed.
        ranks: who have the sample's rows, and all call `fit`.
    """

    specs: Mapping[str, LayerSpec]
    config: BuildConfig
    curvature: Mapping[str, LayerCurvature]
    preconditioners: Mapping[str, Preconditioner]
    sample: Callable[[], tuple[RowPass, int]]
    stage: Stage
    device: torch.device = CPU
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class CodecSizes:
    """Bytes that a codec will take, by shapes alone.

    Attributes:
        row: of a row.
        file: of its own file.
        directions: that a sketch of its rows is made of, in all layers.
        question: of a question's parts.
        summed: of what is summed over ranks while it is fitted.
        short: of a shortened row, where rows may be proposed by one; else 0.
    """

    row: int
    file: int
    directions: int
    question: int
    summed: int = 0
    short: int = 0


class Transformed:
    """Transformed gradients of some queries, x = H^-1 G: as they are, or in the curvature's coordinates; the one is
    made of the other when it is asked for.

    Args:
        x: layer -> (q, d_in, d_out) float32; layers that are absent count nothing. Or None.
        curvature: layer -> fitted curvature.
        turned: layer -> (q, D) float32, x in the curvature's coordinates; needed where x is None.
    """

    def __init__(
        self,
        x: Mapping[str, torch.Tensor] | None,
        curvature: Mapping[str, LayerCurvature],
        turned: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.curvature, self._x, self._turned = curvature, x or {}, turned or {}

    @classmethod
    def of(
        cls,
        gradients: Mapping[str, torch.Tensor],
        preconditioners: Mapping[str, Preconditioner],
        curvature: Mapping[str, LayerCurvature],
    ) -> Transformed:
        """Of queries' gradients {layer: (q, d_in, d_out)}."""
        turned = {name: curvature[name].sides.turned(g.flatten(1)) for name, g in gradients.items()}
        return cls(None, curvature, {name: preconditioners[name].divided(g) for name, g in turned.items()})

    @property
    def count(self) -> int:
        """q."""
        return int(next(iter((self._x or self._turned).values())).shape[0])

    @cached_property
    def x(self) -> Mapping[str, torch.Tensor]:
        """Layer -> (q, d_in, d_out) float32."""
        sides = {name: self.curvature[name].sides for name in self._turned}
        return self._x or {n: sides[n].turned_back(t).unflatten(1, sides[n].shape) for n, t in self._turned.items()}

    @cached_property
    def turned(self) -> Mapping[str, torch.Tensor]:
        """Layer -> x in the curvature's coordinates, (q, D) float32."""
        return self._turned or {n: self.curvature[n].sides.turned(x.flatten(1)) for n, x in self._x.items()}


class Scorer(Protocol):
    """Scores blocks of rows against fixed questions."""

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """(q, n) float32 of rows (n, row_bytes) uint8, on the device that the scorer was made for."""
        ...


class Encoder(ABC):
    """Makes rows of gradients.

    Attributes:
        vanished: how many (example, layer) gradients became zero in what is stored.
    """

    vanished: int = 0

    def check(self) -> None:  # noqa: B027 - most have nothing to say
        """Called when all rows were made: says what was lost.

        Raises:
            NonFiniteError: all of it was.
        """

    @abstractmethod
    def encode(self, block: GradientBlock) -> torch.Tensor:
        """Rows (n, row_bytes) uint8, on the CPU.

        Raises:
            NonFiniteError: an example that cannot be stored.
        """


class RowCodec(ABC):
    """What is kept of an example.

    Attributes:
        name: by which `BuildConfig.store` chooses it.
        depends_on: fits without which its rows mean nothing, beside the projections and its own file: "curvature" or
            none. Such a fit is made before the rows, and is never renewed or repaired without them.
        gains_by_width: whether wider projections make its rows better at the same size.
        specs: the layers.
        curvature: layer -> fitted curvature; not looked at before it is needed.
    """

    name: ClassVar[str]
    depends_on: ClassVar[frozenset[str]] = frozenset()
    gains_by_width: ClassVar[bool] = False

    def __init__(self, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]) -> None:
        self.specs, self.curvature = specs, curvature

    # -- before anything is fitted -------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def sizes(cls, config: BuildConfig, specs: Mapping[str, LayerSpec], directions: int) -> CodecSizes:
        """What it will take; `directions` is how many coordinates a sketch of gradients is made of."""

    @classmethod
    def choices(cls) -> list[dict[str, Any]]:
        """Settings of `BuildConfig` that make larger and smaller rows, for an estimate to show."""
        return [{}]

    # -- made, kept, read ----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def fit(cls, fitting: Fitting) -> Self:
        """The codec for an index; on all ranks the same.

        Raises:
            CurvatureError: nothing can be stored so.
        """

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """Seals what it needs, if anything, as a file of that name; the manifest's entry: plain JSON values, `file` of
        a sealed file."""
        return {}

    @classmethod
    @abstractmethod
    def load(
        cls, folder: Path, entry: Any, specs: Mapping[str, LayerSpec], curvature: Mapping[str, LayerCurvature]
    ) -> Self:
        """From what `save` gave. A file is not read before it is needed.

        Raises:
            CorruptionError: the entry is damaged.
        """

    # -- rows ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a row."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How numbers are stored, in a word or two."""

    @property
    def query_bytes(self) -> int:
        """Memory that a scorer takes for each question."""
        return 4 * sum(spec.dim for spec in self.specs.values())

    @abstractmethod
    def encoder(self, device: torch.device) -> Encoder:
        """What makes rows, its products on that device."""

    @abstractmethod
    def decode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layer -> (n, D) float32: the gradients that rows (n, row_bytes) uint8 on the CPU stand for."""

    def question(self, asked: Transformed) -> Parts:
        """What `scorer` takes: here x of each layer, (q, d_in, d_out)."""
        return dict(asked.x)

    def scorer(self, parts: Parts, device: torch.device = CPU) -> Scorer:
        """Scores rows on a device by what `question` gave, for some or all of its questions."""
        return _DecodingScorer(self, parts, device)

    def self_influence(self, rows: torch.Tensor, preconditioners: Mapping[str, Preconditioner]) -> torch.Tensor:
        """g^T H^-1 g of what rows (n, row_bytes) say of g, summed over the given layers, (n,) float32."""
        out = torch.zeros(len(rows))
        for part, total in self._pieces(rows, out):
            gradients = self.decode(part)
            for name, preconditioner in preconditioners.items():
                total += preconditioner.quadratic(gradients[name])
        return out

    def gradients(self, rows: torch.Tensor) -> dict[str, LayerGradient]:
        """Layer -> what rows stand for, as a block of gradients has it."""
        shapes = {name: (-1, spec.d_in, spec.d_out) for name, spec in self.specs.items()}
        return {n: LayerGradient.from_dense(g.reshape(shapes[n])) for n, g in self.decode(rows).items()}

    @property
    def short_entries(self) -> int:
        """How many of a row's named coordinates propose it well; 0: rows name none, or few."""
        return 0

    def named(self, rows: torch.Tensor) -> Named:
        """What proposes candidates by these, measured on some rows (n, row_bytes)."""
        raise NotImplementedError

    # -- the sketch of rows --------------------------------------------------------------------------------------

    def whitened(
        self, rows: Callable[[], Iterable[torch.Tensor]], count: int, lams: Mapping[str, float], device: torch.device
    ) -> Whitened:
        """Half-whitened coordinates of blocks of rows, which a sketch is fitted on.

        Args:
            rows: gives this rank's blocks (n, row_bytes), the same each time.
            count: rows of all ranks.
            lams: layer -> lambda.
            device: where the products are computed.
        """

        def blocks() -> Iterator[dict[str, LayerGradient]]:
            for block in rows():
                yield self.gradients(block)

        return half_whitened(blocks, count, self.curvature, lams, device)

    def sketcher(self, sketch: Sketch | Named) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from rows (n, row_bytes) to their coordinates z (n, k) float32; by `Named` to shortened rows.

        Raises:
            CorruptionError: by `Named`, where rows name no coordinates.
        """
        if isinstance(sketch, Named):
            raise CorruptionError(f"rows by {self.name!r} name no coordinates: rebuild_coarse()")
        encoder = SketchEncoder(sketch, self.curvature)

        def coordinates(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([encoder.encode(self.gradients(part)) for part in rows.split(SKETCHED_ROWS)])

        return coordinates

    # ------------------------------------------------------------------------------------------------------------

    def _pieces(self, rows: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Some rows at a time, and their part of what is made of them: bounds memory."""
        step = max(_BLOCK_BYTES // (4 * sum(spec.dim for spec in self.specs.values())), 16)
        yield from zip(rows.split(step), out.split(step), strict=True)


class _DecodingScorer:
    """Scores what rows stand for, layer by layer."""

    def __init__(self, codec: RowCodec, parts: Parts, device: torch.device) -> None:
        self._codec, self._device = codec, device
        self._matrices = {name: part.flatten(1).T.to(device) for name, part in parts.items()}
        self._count = next(iter(parts.values())).shape[0]

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(rows), self._count, device=self._device)
        for part, total in self._codec._pieces(rows.cpu(), out):
            gradients = self._codec.decode(part)
            for name, matrix in self._matrices.items():
                total.addmm_(gradients[name].to(self._device), matrix)
        return out.T

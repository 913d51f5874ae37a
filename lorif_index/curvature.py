"""Curvature: each layer's leading eigenpairs of the second moment of gradients, by streamed randomised SVD.

C = (1/n) sum_i vec(G_i) vec(G_i)^T ~= V S V^T, by subspace iteration with a Rayleigh-Ritz pass at the end (Halko,
Martinsson and Tropp, arXiv:0909.4061; LoRIF, arXiv:2601.21929). Rows are walked, never held: memory is O(D r) a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .errors import CurvatureError
from .gradients import GradientBlock, LayerSpec
from .progress import Stage
from .projection import keyed_generator

OVERSAMPLING = 10
_GROUP_BYTES = 4 << 30
_BATCH_ROWS = 256

RowPass = Callable[[], Iterable[GradientBlock]]
"""Gives the same rows each time it is called."""


@dataclass(frozen=True)
class LayerCurvature:
    """One layer's fitted curvature, in units of squared gradients.

    Attributes:
        basis: V, (D, r) float32, orthonormal columns; gradients are vectorised row by row from (d_in, d_out).
        spectrum: (at least r,) float64, falling: the eigenvalues of the basis and up to 10 more.
        trace: of C, exact over the rows.
        rows: how many rows were used.
        examples: n, how many examples those rows stand for.
    """

    basis: torch.Tensor
    spectrum: torch.Tensor
    trace: float
    rows: int
    examples: float

    @property
    def dim(self) -> int:
        """D."""
        return int(self.basis.shape[0])

    @property
    def rank(self) -> int:
        """r, at most D."""
        return int(self.basis.shape[1])

    @property
    def eigenvalues(self) -> torch.Tensor:
        """S, (r,) float64, falling."""
        return self.spectrum[: self.rank]

    @property
    def tail_mean(self) -> float:
        """Mean eigenvalue outside the basis; 0 where the basis is complete."""
        left = self.dim - self.rank
        if left == 0:
            return 0.0
        return max(self.trace - float(self.eigenvalues.sum()), 0.0) / left


def fit_curvature(
    rows: RowPass,
    count: int,
    specs: Mapping[str, LayerSpec],
    *,
    rank: int | None,
    power_iterations: int,
    seed: int,
    rows_per_example: int,
    stage: Stage,
    device: torch.device,
) -> dict[str, LayerCurvature]:
    """Fits every layer; layers are taken together as far as their blocks fit a bounded memory.

    Args:
        rows: gives the blocks of rows, the same each time; called 2 + power_iterations times (once where r is so
            near D that the dense matrix is no larger than the sketch).
        count: number of rows.
        specs: the layers.
        rank: r, or None for all directions; never above D or the number of rows.
        power_iterations: subspace iterations between the first sketch and the Rayleigh-Ritz pass.
        seed: of the starting blocks.
        rows_per_example: rows that stand for one example.
        stage: told of the rows walked.
        device: where the products are computed.

    Raises:
        CurvatureError: no rows, or a layer whose rows are all zero.
    """
    if count == 0:
        raise CurvatureError("there are no rows to fit the curvature from: pass more data, or curvature=")
    pending = [_Fit(spec, rank, count, seed, device) for spec in specs.values()]
    fitted: dict[str, LayerCurvature] = {}
    while pending:
        group, used = [pending.pop(0)], 0
        used = group[0].nbytes
        while pending and used + pending[0].nbytes <= _GROUP_BYTES:
            used += pending[0].nbytes
            group.append(pending.pop(0))
        passes = max(fit.passes(power_iterations) for fit in group)
        stage.total = (stage.total or 0) + passes * count
        for number in range(passes):
            _walk(rows, count, group, number, passes, stage)
        examples = count / rows_per_example
        for fit in group:
            fitted[fit.spec.name] = fit.result(count, examples)
    return {name: fitted[name] for name in specs}


def _walk(rows: RowPass, count: int, group: list[_Fit], number: int, passes: int, stage: Stage) -> None:
    active = [fit for fit in group if fit.begin(number, passes)]
    seen = 0
    for block in rows():
        for fit in active:
            gradients = block.layers[fit.spec.name].flat().to(fit.device, torch.float32)
            for part in gradients.split(_BATCH_ROWS):
                fit.add(part)
        seen += block.count
        stage.advance(block.count)
    if seen != count:
        raise CurvatureError(f"a pass over the curvature rows gave {seen} rows where {count} were counted before")
    for fit in active:
        fit.end()


class _Fit:
    """The state of one layer's fit: a sketch that becomes an orthonormal block, then Rayleigh-Ritz inside it."""

    def __init__(self, spec: LayerSpec, rank: int | None, count: int, seed: int, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.rank = min(spec.dim if rank is None else rank, spec.dim, count)
        self.block = min(self.rank + OVERSAMPLING, spec.dim)
        self.exact = self.block >= spec.dim
        self._seed = seed
        self._trace = 0.0
        self._basis: torch.Tensor | None = None
        self._sketch: torch.Tensor | None = None
        self._core: torch.Tensor | None = None
        self._last = False
        self._tracing = True

    @property
    def nbytes(self) -> int:
        return 4 * self.spec.dim * self.block * (3 if self.exact else 2) + 8 * self.block**2

    def passes(self, power_iterations: int) -> int:
        return 1 if self.exact else 2 + power_iterations

    def begin(self, number: int, passes: int) -> bool:
        """Prepares pass `number` of `passes`; whether this layer takes part in it."""
        self._last = number == passes - 1
        if self.exact:
            # One pass is enough; it takes part in the last.
            if self._last:
                self._core = torch.zeros(self.block, self.block, dtype=torch.float64, device=self.device)
            return self._last
        if self._last:
            self._core = torch.zeros(self.block, self.block, dtype=torch.float64, device=self.device)
        else:
            if self._basis is None:
                generator = np.random.Generator(keyed_generator(self._seed, "curvature", self.spec.name))
                start = generator.standard_normal((self.spec.dim, self.block), dtype=np.float32)
                self._basis = torch.from_numpy(start).to(self.device)
            self._sketch = torch.zeros(self.spec.dim, self.block, device=self.device)
        return True

    def add(self, g: torch.Tensor) -> None:
        """Takes rows (b, D)."""
        if self._tracing:
            self._trace += float(torch.linalg.vector_norm(g.double(), dim=1).square().sum())
        if self.exact:
            self._core += g.T @ g  # type: ignore[operator]
            return
        projected = g @ self._basis  # type: ignore[operator]
        if self._last:
            self._core += projected.T @ projected  # type: ignore[operator]
        else:
            self._sketch.addmm_(g.T, projected)  # type: ignore[union-attr]

    def end(self) -> None:
        self._tracing = False
        if not self._last:
            # Scaled first: sums of squares of very small gradients would leave float32's range in the factorisation.
            sketch = self._sketch.double()  # type: ignore[union-attr]
            peak = sketch.abs().amax()
            self._basis = torch.linalg.qr(sketch / torch.where(peak > 0, peak, 1.0)).Q.float()
            self._sketch = None

    def result(self, rows: int, examples: float) -> LayerCurvature:
        if not self._trace > 0:
            raise CurvatureError(
                f"layer {self.spec.name!r} has zero gradients in all {rows} curvature rows, so its curvature is "
                "singular: exclude it with LayerSelection(exclude=[...]), or fit from other rows"
            )
        values, vectors = torch.linalg.eigh(self._core / examples)  # type: ignore[operator]
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)[:, : self.rank]
        basis = vectors if self.exact else self._basis.double() @ vectors  # type: ignore[union-attr]
        self._basis = self._core = None
        # Signs are fixed, so that a refit of the same rows gives the same files.
        largest = basis.abs().argmax(dim=0, keepdim=True)
        basis = basis * torch.sign(torch.gather(basis, 0, largest))
        return LayerCurvature(basis.float().contiguous().cpu(), values.cpu(), self._trace / examples, rows, examples)
